//! The setup script.
use bytes::Bytes;
use carrel_agent::wire::{SetupResult, limits};
use http::{HeaderMap, Method, StatusCode};

use crate::support::{Agent, Refused, read_all};

async fn setup(agent: &Agent, script: &[u8]) -> Result<SetupResult, Refused> {
    use h2::client::SendRequest;
    let mut requests: SendRequest<Bytes> = agent.requests().ready().await.unwrap();
    let request = http::Request::post("http://agent/v1/setup").body(()).unwrap();
    let (response, stream) = requests.send_request(request, false).unwrap();
    let mut output = carrel_agent::flow::Outbound::new(stream);
    if output.write(Bytes::copy_from_slice(script)).await.is_ok() {
        output.finish();
    }
    let response = response.await.unwrap();
    let status = response.status();
    if status != StatusCode::OK {
        return Err(Refused { status, sentence: String::new() });
    }
    let mut input = carrel_agent::flow::Inbound::new(response.into_body());
    Ok(serde_json::from_slice(&read_all(&mut input).await).unwrap())
}

#[tokio::test]
async fn it_runs_once_and_everybody_gets_the_same_answer() {
    let agent = Agent::start().await;
    let script = b"echo run >> runs\nread line && echo \"stdin: $line\"\necho out; echo err >&2\nexit 7\n";
    let (first, second) = tokio::join!(setup(&agent, script), setup(&agent, script));
    let first = first.unwrap();
    assert_eq!(first, second.unwrap());
    assert_eq!(first, SetupResult { exit_code: 7, tail: "out\nerr\n".into() });
    assert_eq!(setup(&agent, b"echo other").await.unwrap(), first);
    assert_eq!(std::fs::read_to_string(agent.home().join("runs")).unwrap(), "run\n");
}

#[tokio::test]
async fn a_service_that_it_starts_does_not_hold_it_up() {
    let agent = Agent::start().await;
    let result =
        setup(&agent, b"(while sleep 0.05; do echo tick; done) & echo $! > pid; echo started").await.unwrap();
    assert_eq!(result, SetupResult { exit_code: 0, tail: "started\n".into() });
    agent.run("kill $(cat pid)").await;
}

#[tokio::test]
async fn a_client_that_gives_up_does_not_end_it() {
    let agent = Agent::start().await;
    let script = b"echo run >> runs; while [ ! -e go ]; do sleep 0.02; done; echo done";
    {
        let waiting = setup(&agent, script);
        tokio::pin!(waiting);
        let started = crate::support::eventually("it has started", crate::support::DEADLINE, || {
            agent.home().join("runs").exists()
        });
        tokio::select! {
            _ = &mut waiting => panic!("it ended"),
            () = started => {}
        }
    }
    std::fs::write(agent.home().join("go"), "").unwrap();
    assert_eq!(setup(&agent, script).await.unwrap().tail, "done\n");
    assert_eq!(std::fs::read_to_string(agent.home().join("runs")).unwrap(), "run\n");
}

#[tokio::test]
async fn a_long_script_works_and_one_too_long_is_refused() {
    let agent = Agent::start().await;
    let refused = setup(&agent, &vec![b'#'; limits::SETUP_BYTES + 1]).await.unwrap_err();
    assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
    let mut script = vec![b'#'; limits::SETUP_BYTES - 10];
    script.extend_from_slice(b"\necho ok\n");
    assert_eq!(setup(&agent, &script).await.unwrap().tail, "ok\n");
    assert!(agent.open(Method::GET, "/v1/setup", HeaderMap::new()).await.is_err());
}
