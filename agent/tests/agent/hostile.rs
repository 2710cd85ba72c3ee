//! What a peer that means harm, or knows no better, can send.
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use carrel_agent::wire::{self, ProcessSpec, limits};
use h2::Reason;
use http::{HeaderMap, Method, Request, StatusCode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};

use crate::support::{Agent, DEADLINE, Stream, connect, new_id, open, process_headers};

#[tokio::test]
async fn bytes_that_are_no_http2_are_let_go() {
    let agent = Agent::start().await;
    for rubbish in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(),
        &[0xff; 100_000],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff",
    ] {
        let mut stream = UnixStream::connect(agent.direct_socket()).await.unwrap();
        // It may be let go before all was written.
        let _ = stream.write_all(rubbish).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect("it was not let go");
    }
    agent.assert_usable().await;
}

#[tokio::test]
async fn unknown_paths_methods_and_bad_ids_are_refused() {
    let agent = Agent::start().await;
    let long = format!("/v1/processes/{}", "x".repeat(65));
    let cases = [
        (Method::GET, "/", StatusCode::NOT_FOUND),
        (Method::GET, "/v1/processes/a", StatusCode::NOT_FOUND),
        (Method::POST, "/v2/health", StatusCode::NOT_FOUND),
        (Method::DELETE, "/v1/health", StatusCode::NOT_FOUND),
        (Method::POST, "/v1/processes/", StatusCode::BAD_REQUEST),
        (Method::POST, "/v1/processes/a%2fb", StatusCode::BAD_REQUEST),
        (Method::POST, "/v1/processes/a_b", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/processes/../stderr", StatusCode::BAD_REQUEST),
        (Method::POST, &long, StatusCode::BAD_REQUEST),
    ];
    for (method, path, status) in cases {
        let refused = agent.open(method, path, HeaderMap::new()).await.err().unwrap();
        assert_eq!(refused.status, status, "{path}");
        assert!(!refused.sentence.is_empty());
    }
    agent.assert_usable().await;
}

#[tokio::test]
async fn bad_headers_are_refused() {
    let agent = Agent::start().await;
    let encoded = |json: &str| BASE64_URL_SAFE_NO_PAD.encode(json);
    let bad_specs = [
        "!".into(),
        encoded("{"),
        encoded("[]x"),
        encoded(r#"{"pty":{"term":"x","cols":0,"rows":24}}"#),
        encoded(r#"{"pty":{"term":"x","cols":80,"rows":99999}}"#),
        encoded(r#"{"env":[["A=B","x"]]}"#),
        encoded(r#"{"join":"everything"}"#),
    ];
    for spec in bad_specs {
        let mut headers = HeaderMap::new();
        headers.insert(wire::SPEC, spec.parse().unwrap());
        let path = format!("/v1/processes/{}", new_id());
        let refused = agent.open(Method::POST, &path, headers).await.err().unwrap();
        assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{spec}");
    }
    agent.assert_usable().await;
}

#[tokio::test]
async fn headers_beyond_the_limit_end_their_request_and_no_other() {
    let agent = Agent::start().await;
    let requests = connect(&agent.direct_socket()).await;
    let mut headers = HeaderMap::new();
    headers.insert("x-large", "x".repeat(limits::HEADER_LIST as usize).parse().unwrap());
    let mut request = Request::get("http://agent/v1/health").body(()).unwrap();
    *request.headers_mut() = headers;
    let mut requests = requests.ready().await.unwrap();
    if let Ok((response, _)) = requests.send_request(request, true) {
        let refused = timeout(DEADLINE, response).await.expect("no answer");
        assert!(
            refused.map_or(true, |response| response.status() == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
        );
    }
    agent.assert_usable().await;
}

#[tokio::test]
async fn thousands_of_resets_do_not_end_the_connection() {
    let agent = Agent::start().await;
    let mut typing = agent.command("cat").await;
    for _ in 0..3_000 {
        let mut requests = agent.requests().ready().await.unwrap();
        let mut request = Request::post(format!("http://agent/v1/processes/{}", new_id())).body(()).unwrap();
        *request.headers_mut() = process_headers(&ProcessSpec::default(), Some(b"!"));
        request.headers_mut().remove(wire::COMMAND);
        request.headers_mut().insert(wire::SPEC, "!".parse().unwrap());
        let (_, mut stream) = requests.send_request(request, false).unwrap();
        stream.send_reset(Reason::CANCEL);
    }
    typing.send("still here").await;
    typing.expect("still here").await;
    agent.assert_usable().await;
}

#[tokio::test]
async fn more_streams_than_allowed_wait_their_turn() {
    let agent = Agent::start().await;
    let mut waiting = Vec::new();
    let headers = HeaderMap::new();
    for _ in 0..limits::STREAMS {
        let path = format!("/v1/processes/{}/stderr", new_id());
        waiting.push(agent.open(Method::GET, &path, headers.clone()).await.unwrap());
    }
    let further = agent.open(Method::GET, "/v1/health", headers.clone());
    tokio::pin!(further);
    assert!(timeout(std::time::Duration::from_millis(100), &mut further).await.is_err());
    drop(waiting.pop());
    assert!(timeout(DEADLINE, further).await.unwrap().is_ok());
    drop(waiting);
    agent.assert_usable().await;
}

#[tokio::test]
async fn a_window_overrun_ends_one_connection_only() {
    let agent = Agent::start().await;
    // A raw client that sends more than the stream's window allows.
    let mut raw = UnixStream::connect(agent.direct_socket()).await.unwrap();
    raw.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    // HEADERS: POST http / agent, from the static table.
    raw.write_all(&[0, 0, 4, 1, 4, 0, 0, 0, 1, 0x83, 0x86, 0x84, 0x41]).await.unwrap();
    let mut data = vec![0, 0x40, 0, 0, 0, 0, 0, 0, 1];
    data.extend_from_slice(&[0; 0x4000]);
    for _ in 0..200 {
        if raw.write_all(&data).await.is_err() {
            break;
        }
    }
    drop(raw);
    agent.assert_usable().await;
}

#[tokio::test]
async fn too_many_connections_are_closed_and_the_others_go_on() {
    let agent = Agent::start().await;
    let mut connections = Vec::new();
    for _ in 0..200 {
        if let Ok(stream) = UnixStream::connect(agent.direct_socket()).await {
            connections.push(stream);
        }
    }
    agent.assert_usable().await;
    drop(connections);
    let requests = timeout(DEADLINE, async {
        loop {
            let requests = connect(&agent.direct_socket()).await;
            let Ok(mut ready) = requests.ready().await else { continue };
            let request = Request::get("http://agent/v1/health").body(()).unwrap();
            let Ok((response, _)) = ready.send_request(request, true) else { continue };
            if response.await.is_ok() {
                return ready;
            }
        }
    })
    .await
    .expect("connections were not taken again");
    let stream: Stream = open(requests, Method::GET, "/v1/health", HeaderMap::new()).await.unwrap();
    drop(stream);
    let _: Bytes = Bytes::new();
}
