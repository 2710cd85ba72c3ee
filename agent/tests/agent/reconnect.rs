//! A client whose connection was lost comes back to the very same terminal.
use std::time::Duration;

use carrel_agent::{
    flow,
    wire::{Join, ProcessSpec, Pty},
};
use http::{Method, StatusCode};
use tokio::{net::UnixStream, time::timeout};

use crate::support::{
    Agent, DEADLINE, Refused, Stream, connect, eventually, is_running, new_id, open, process_headers,
};

/// A shell as the gateway asks for one; `terminal` names the one to come back to.
fn spec(name: &str, terminal: Option<&str>, (cols, rows): (u16, u16)) -> ProcessSpec {
    ProcessSpec {
        env: vec![("PS1".into(), "$ ".into())],
        pty: Some(Pty { term: "xterm-256color".into(), cols, rows, modes: Vec::new() }),
        keep_seconds: Some(300),
        join: Join::Ssh,
        attachment: Some(name.into()),
        terminal: terminal.map(Into::into),
        ..ProcessSpec::default()
    }
}

/// A request on a connection of its own.
async fn on_its_own(agent: &Agent, spec: &ProcessSpec) -> Result<Stream, Refused> {
    let requests = connect(&agent.direct_socket()).await;
    open(requests, Method::POST, &format!("/v1/processes/{}", new_id()), process_headers(spec, None)).await
}

async fn settled(agent: &Agent, name: &str) -> Stream {
    let mut shell = on_its_own(agent, &spec(name, None, (80, 24))).await.unwrap();
    shell
        .send("PS1='$ '; bind 'set enable-bracketed-paste off' 2>/dev/null; stty -echo; echo re''ady\n")
        .await;
    shell.expect("ready\r\n").await;
    shell
}

/// What `echo pid=$$=` has shown.
fn pid_in(text: &str) -> i32 {
    text.rsplit('=').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn it_takes_the_place_of_its_lost_connection_also_before_that_is_known_to_be_lost() {
    let agent = Agent::start().await;
    let mut lost = settled(&agent, "me").await;
    let id = lost.process_id().to_owned();
    lost.send("echo sho''wn; x=kept\n").await;
    lost.expect("shown").await;
    let mut back = on_its_own(&agent, &spec("me", Some(&id), (100, 30))).await.unwrap();
    assert_eq!((back.process_id(), back.resumed()), (id.as_str(), true));
    back.expect("shown").await;
    back.send("echo $x; stty size\n").await;
    back.expect("kept\r\n30 100\r\n").await;
    // What was there before is let go; its keys reach nobody.
    let reset = timeout(DEADLINE, async { while let Ok(Some(_)) = lost.input.read().await {} });
    reset.await.expect("the lost connection's stream stays open");
    // One ssh client is there, not two: the next gets a shell of its own, and the one after this has gone the main one.
    assert!(!on_its_own(&agent, &spec("other", None, (80, 24))).await.unwrap().resumed());
    drop(back);
    timeout(DEADLINE, async {
        while on_its_own(&agent, &spec("third", None, (80, 24))).await.unwrap().process_id() != id {}
    })
    .await
    .expect("the lost connection still has its place");
}

#[tokio::test]
async fn a_lost_connection_that_takes_nothing_holds_the_process_back_no_longer() {
    let agent = Agent::start().await;
    let mut lost = settled(&agent, "me").await;
    let id = lost.process_id().to_owned();
    // More than all queues on the way hold.
    lost.send("head -c 8000000 /dev/zero | tr '\\0' x; echo; echo the e''nd; touch ~/done\n").await;
    let done = agent.home().join("done");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!done.exists(), "nothing was held back: this test shows nothing");
    let mut back = on_its_own(&agent, &spec("me", Some(&id), (80, 24))).await.unwrap();
    back.expect("the end").await;
    eventually("the process has ended", DEADLINE, || done.exists()).await;
}

#[tokio::test]
async fn it_hears_how_its_terminal_has_ended_meanwhile() {
    let agent = Agent::start().await;
    let mut lost = settled(&agent, "me").await;
    let id = lost.process_id().to_owned();
    lost.send("echo pid=$$=; sleep 0.3; exit 7\n").await;
    let pid = pid_in(&lost.expect("=\r\n").await);
    drop(lost);
    eventually("the shell has ended", DEADLINE, || !is_running(pid)).await;
    for _ in 0..2 {
        let mut back = on_its_own(&agent, &spec("me", Some(&id), (80, 24))).await.unwrap();
        assert_eq!(back.process_id(), id);
        assert_eq!(back.end().await.code(), 7);
    }
    let unknown = on_its_own(&agent, &spec("me", Some("never-was"), (80, 24))).await.err().unwrap();
    assert_eq!(
        (unknown.status, unknown.sentence.as_str()),
        (StatusCode::NOT_FOUND, "this terminal has ended")
    );
    // A command's end is told once, to its own client.
    let command =
        ProcessSpec { terminal: None, keep_seconds: None, join: Join::Never, ..spec("me", None, (80, 24)) };
    let mut stream = agent.process(&command, Some(b"exit 3")).await.unwrap();
    let id = stream.process_id().to_owned();
    assert_eq!(stream.end().await.code(), 3);
    let gone = on_its_own(&agent, &spec("me", Some(&id), (80, 24))).await.err().unwrap();
    assert_eq!(gone.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn nobody_comes_to_a_commands_terminal() {
    let agent = Agent::start().await;
    let command = ProcessSpec { keep_seconds: None, join: Join::Never, ..spec("me", None, (80, 24)) };
    let mut stream = agent.process(&command, Some(b"echo up; exec sleep 1000")).await.unwrap();
    stream.expect("up").await;
    let refused = on_its_own(&agent, &spec("me", Some(stream.process_id()), (80, 24))).await.err().unwrap();
    assert_eq!(refused.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_terminal_that_is_kept_for_no_time_still_waits_for_a_client_whose_connection_was_lost() {
    let agent = Agent::start().await;
    let at_once = ProcessSpec { keep_seconds: Some(0), ..spec("me", None, (80, 24)) };
    let (requests, connection) =
        flow::client(UnixStream::connect(agent.direct_socket()).await.unwrap()).await.unwrap();
    let connection = tokio::spawn(connection);
    let path = format!("/v1/processes/{}", new_id());
    let mut lost = open(requests, Method::POST, &path, process_headers(&at_once, None)).await.unwrap();
    lost.send("echo pid=$$=''\n").await;
    let pid = pid_in(&lost.expect("=\r\n").await);
    connection.abort();
    while let Ok(Some(_)) = lost.input.read().await {}
    let again = ProcessSpec { terminal: Some(lost.process_id().into()), ..at_once };
    let mut back = on_its_own(&agent, &again).await.unwrap();
    back.send("echo pid=$$=''\n").await;
    back.expect(&format!("pid={pid}=")).await;
    // One that leaves is not waited for.
    drop(back);
    eventually("the shell has ended", DEADLINE, || !is_running(pid)).await;
}

#[tokio::test]
async fn it_waits_for_a_terminal_that_has_been_told_to_end() {
    let agent = Agent::start().await;
    let mut lost = settled(&agent, "me").await;
    let id = lost.process_id().to_owned();
    lost.send(
        "exec sh -c 'trap \"\" HUP; trap \"touch ~/told\" CONT; echo pid=$$=; while :; do sleep 0.1; done'\n",
    )
    .await;
    let pid = pid_in(&lost.expect("=\r\n").await);
    let short = ProcessSpec { keep_seconds: Some(0), ..spec("me", Some(&id), (80, 24)) };
    drop(on_its_own(&agent, &short).await.unwrap());
    drop(lost);
    let told = agent.home().join("told");
    eventually("the shell was told to end", DEADLINE, || told.exists()).await;
    assert!(is_running(pid));
    let mut back = on_its_own(&agent, &spec("me", Some(&id), (80, 24))).await.unwrap();
    assert_eq!(back.end().await.signal(), "KILL");
    assert!(!is_running(pid));
}

#[tokio::test]
async fn names_that_could_not_be_ours_are_refused() {
    let agent = Agent::start().await;
    for (name, terminal) in [("a/b", None), ("", None), ("me", Some("../x"))] {
        let refused = on_its_own(&agent, &spec(name, terminal, (80, 24))).await.err().unwrap();
        assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    }
    agent.assert_usable().await;
}
