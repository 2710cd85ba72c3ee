//! Commands on pipes.
use std::time::Duration;

use bytes::Bytes;
use carrel_agent::{
    flow,
    wire::{self, Health, ProcessSpec, limits},
};
use http::{HeaderMap, Method, StatusCode};
use tokio::{net::UnixStream, time::timeout};

use crate::support::{
    Agent, DEADLINE, connect, eventually, is_running, new_id, open, process_headers, read_all,
};

#[tokio::test]
async fn every_exit_code_is_told_exactly() {
    let agent = Agent::start().await;
    for code in 0..=255 {
        assert_eq!(agent.run(&format!("exit {code}")).await.code(), code);
    }
}

#[tokio::test]
async fn the_end_by_a_signal_is_told_by_its_name() {
    let agent = Agent::start().await;
    for name in ["TERM", "KILL", "INT", "SEGV", "PIPE"] {
        assert_eq!(agent.run(&format!("kill -{name} $$")).await.signal(), name);
    }
}

#[tokio::test]
async fn a_client_can_send_a_signal() {
    let agent = Agent::start().await;
    let mut stream = agent.command("echo ready; exec sleep 1000").await;
    stream.expect("ready").await;
    let path = format!("/v1/processes/{}/signal", stream.process_id());
    assert_eq!(agent.post(&path, wire::SIGNAL, "NONSENSE").await, StatusCode::BAD_REQUEST);
    assert_eq!(agent.post(&path, wire::SIGNAL, "USR1").await, StatusCode::NO_CONTENT);
    assert_eq!(stream.end().await.signal(), "USR1");
    assert_eq!(agent.post(&path, wire::SIGNAL, "USR1").await, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn the_end_of_stdin_is_half_a_close() {
    let agent = Agent::start().await;
    let outcome = agent.run_with(&ProcessSpec::default(), b"wc -c; echo after; exit 3", b"12345").await;
    assert_eq!((outcome.text().as_str(), outcome.code()), ("5\nafter\n", 3));
}

#[tokio::test]
async fn stderr_comes_apart_from_stdout() {
    let agent = Agent::start().await;
    let outcome = agent.run("echo out; echo err >&2; head -c 300000 /dev/zero >&2; echo out").await;
    assert_eq!(outcome.text(), "out\nout\n");
    assert_eq!(outcome.stderr.len(), 4 + 300_000);
}

#[tokio::test]
async fn a_request_for_stderr_may_come_first_or_never_and_ends_with_its_process() {
    let agent = Agent::start().await;
    let mut stream = agent.command("echo unread >&2; echo out").await;
    assert_eq!(stream.end().await.text(), "out\n");
    // Of one that has ended there is none.
    let path = format!("/v1/processes/{}/stderr", stream.process_id());
    let mut late = agent.open(Method::GET, &path, HeaderMap::new()).await.unwrap();
    assert!(late.end().await.stdout.is_empty());
    // One whose process never comes can be given up, and asked for again.
    let path = format!("/v1/processes/{}/stderr", new_id());
    drop(agent.open(Method::GET, &path, HeaderMap::new()).await.unwrap());
    timeout(DEADLINE, async { while agent.open(Method::GET, &path, HeaderMap::new()).await.is_err() {} })
        .await
        .unwrap();
}

#[tokio::test]
async fn eight_megabytes_of_any_bytes_come_back_unchanged() {
    let agent = Agent::start().await;
    let mut seed: u32 = 1;
    let sent: Vec<u8> = (0..8 << 20)
        .map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed.to_be_bytes()[0]
        })
        .collect();
    let outcome = agent.run_with(&ProcessSpec::default(), b"cat", &sent).await;
    assert!(outcome.stdout == sent);
    assert_eq!(outcome.code(), 0);
}

#[tokio::test]
async fn a_process_that_does_not_read_its_stdin_is_no_error() {
    let agent = Agent::start().await;
    let big = vec![0; 4 << 20];
    let outcome = agent.run_with(&ProcessSpec::default(), b"exit 5", &big).await;
    assert_eq!(outcome.code(), 5);
    let outcome = agent.run_with(&ProcessSpec::default(), b"exec <&-; sleep 0.2; echo done", &big).await;
    assert_eq!(outcome.text(), "done\n");
}

#[tokio::test]
async fn a_command_is_raw_bytes_given_to_the_shell() {
    let agent = Agent::start().await;
    let spec = ProcessSpec::default();
    assert_eq!(
        agent.run_with(&spec, b"printf '\xff\xfe'; printf %s \"$0\"", b"").await.stdout,
        b"\xff\xfe/bin/bash"
    );
    assert_eq!(agent.run("/bin/ls -d / | wc -l").await.text().trim(), "1");
    assert_eq!(agent.run(" ").await.code(), 0);
    assert_eq!(agent.run("").await.code(), 0);
    assert_eq!(agent.run("no-such-command-here").await.code(), 127);
    let long = format!(": {}", "x".repeat(limits::COMMAND_BYTES - 2));
    assert_eq!(agent.run(&long).await.code(), 0);
    let longer = vec![b'x'; limits::COMMAND_BYTES + 1];
    let refused = agent.process(&spec, Some(&longer)).await.err().unwrap();
    assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
    agent.assert_usable().await;
}

#[tokio::test]
async fn variables_and_directory_are_those_of_the_account_and_the_request() {
    let own =
        [("CARREL_ENV_EXAM", "one"), ("CARREL_ENV_BOTH", "agent"), ("CARREL_ENV_", "x"), ("OTHER", "x")];
    let agent = Agent::start_surrounded(&[], &own).await;
    let spec = ProcessSpec {
        env: vec![("LANG".into(), "C.UTF-8".into()), ("BOTH".into(), "request".into())],
        ..ProcessSpec::default()
    };
    let command =
        b"pwd; echo $HOME $SHELL $EXAM $LANG $BOTH; test $USER = $LOGNAME && test -n \"$PATH\" && echo set";
    let home = agent.home().display();
    let text = agent.run_with(&spec, command, b"").await.text();
    assert_eq!(text, format!("{home}\n{home} /bin/bash one C.UTF-8 agent\nset\n"));
    let names = agent.run_with(&spec, b"env | cut -d= -f1", b"").await.text();
    assert!(!names.lines().any(|name| name == "OTHER" || name.starts_with("CARREL")), "{names}");
}

#[tokio::test]
async fn without_a_command_a_login_shell_reads_stdin() {
    let agent = Agent::start().await;
    let mut stream = agent.process(&ProcessSpec::default(), None).await.unwrap();
    stream.send("echo $0; shopt -q login_shell && echo login; exit 4\n").await;
    let outcome = stream.end().await;
    assert_eq!((outcome.text().as_str(), outcome.code()), ("-bash\nlogin\n", 4));
}

#[tokio::test]
async fn what_cannot_be_started_is_said_in_a_sentence() {
    let agent = Agent::start_with(&["--shell", "/no/such/shell"]).await;
    let refused = agent.process(&ProcessSpec::default(), Some(b"true")).await.err().unwrap();
    assert_eq!(refused.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(refused.sentence, "there is no /no/such/shell in this environment");
    let agent = Agent::start().await;
    let spec = ProcessSpec { env: vec![("A".into(), "x".repeat(130 * 1024))], ..ProcessSpec::default() };
    // The first request of a connection, too: before the agent's settings are known.
    let path = format!("/v1/processes/{}", new_id());
    let headers = process_headers(&spec, Some(b"true"));
    let refused =
        open(connect(&agent.direct_socket()).await, Method::POST, &path, headers).await.err().unwrap();
    assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(refused.sentence.contains("longer than this system takes"), "{}", refused.sentence);
    agent.assert_usable().await;
}

#[tokio::test]
async fn an_id_is_used_once() {
    let agent = Agent::start().await;
    let path = format!("/v1/processes/{}", new_id());
    let headers = process_headers(&ProcessSpec::default(), Some(b"cat"));
    let mut first = agent.open(Method::POST, &path, headers.clone()).await.unwrap();
    assert_eq!(
        agent.open(Method::POST, &path, headers.clone()).await.err().unwrap().status,
        StatusCode::CONFLICT
    );
    first.output.finish();
    first.end().await;
    assert_eq!(agent.open(Method::POST, &path, headers).await.err().unwrap().status, StatusCode::CONFLICT);
}

#[tokio::test]
async fn the_exit_waits_for_those_who_hold_the_output_and_only_for_them() {
    let agent = Agent::start().await;
    let outcome = agent.run("(sleep 0.3; echo late) & echo early; exit 6").await;
    assert_eq!((outcome.text().as_str(), outcome.code()), ("early\nlate\n", 6));
    let outcome = agent.run("sleep 1000 >/dev/null 2>&1 & echo $!").await;
    let pid = outcome.text().trim().parse().unwrap();
    assert!(is_running(pid), "a background process that holds nothing goes on");
    agent.run(&format!("kill {pid}")).await;
}

/// Processes that ignore HUP, in and outside of the process group.
const STUBBORN: &str = "trap '' HUP; set -m; sleep 1000 & echo $$ $!; set +m; sleep 1001 & echo $! end; wait";

fn pids(text: &str) -> Vec<i32> {
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

#[tokio::test]
async fn a_reset_ends_the_whole_session() {
    let agent = Agent::start().await;
    let mut stream = agent.command(STUBBORN).await;
    let pids = pids(&stream.expect("end").await);
    assert_eq!(pids.len(), 3);
    assert!(pids.iter().all(|pid| is_running(*pid)));
    stream.output.reset();
    eventually("all are gone", Duration::from_secs(8), || !pids.iter().any(|pid| is_running(*pid))).await;
    agent.assert_usable().await;
}

#[tokio::test]
async fn a_lost_connection_ends_its_commands_and_no_others() {
    let agent = Agent::start().await;
    let mut other = agent.command("echo ready; cat").await;
    other.expect("ready").await;
    let io = UnixStream::connect(agent.direct_socket()).await.unwrap();
    let (requests, connection) = flow::client(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let path = format!("/v1/processes/{}", new_id());
    let headers = process_headers(&ProcessSpec::default(), Some(b"echo $$ end; exec sleep 1000"));
    let mut stream = open(requests, Method::POST, &path, headers).await.unwrap();
    let pids = pids(&stream.expect("end").await);
    connection.abort();
    eventually("it is gone", Duration::from_secs(8), || !pids.iter().any(|pid| is_running(*pid))).await;
    other.send("still here").await;
    other.expect("still here").await;
}

#[tokio::test]
async fn the_agents_end_ends_everything() {
    let agent = Agent::start().await;
    let mut stream = agent.command(STUBBORN).await;
    let pids = pids(&stream.expect("end").await);
    drop(agent);
    eventually("all are gone", Duration::from_secs(2), || !pids.iter().any(|pid| is_running(*pid))).await;
}

#[tokio::test]
async fn two_hundred_commands_killed_at_once_leave_the_agent_usable() {
    let agent = Agent::start().await;
    let mut typing = agent.command("echo ready; cat").await;
    typing.expect("ready").await;
    let mut streams = Vec::new();
    for _ in 0..200 {
        streams.push(agent.command("yes").await);
    }
    for stream in &mut streams {
        stream.output.reset();
    }
    drop(streams);
    typing.send("still here").await;
    typing.expect("still here").await;
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        let mut stream = agent.open(Method::GET, "/v1/health", HeaderMap::new()).await.unwrap();
        let health: Health = serde_json::from_slice(&read_all(&mut stream.input).await).unwrap();
        if health.processes == 1 {
            break;
        }
        assert!(tokio::time::Instant::now() < end, "{} processes are left", health.processes);
    }
    agent.assert_usable().await;
}

#[tokio::test]
async fn a_loop_of_tiny_writes_that_nobody_reads_disturbs_nobody() {
    let agent = Agent::start().await;
    let stalled = agent.command("while :; do echo x; done").await;
    let mut typing = agent.command("cat").await;
    for _ in 0..2_000 {
        typing.send("k").await;
        typing.expect("k").await;
    }
    drop(stalled);
}

#[tokio::test]
async fn tiny_writes_to_a_process_that_does_not_read_disturb_nobody() {
    let agent = Agent::start().await;
    let mut stalled = agent.command("sleep 1000").await;
    let writer = tokio::spawn(async move {
        // More than a pipe holds, less than a window.
        for _ in 0..300_000 {
            stalled.output.write(Bytes::from_static(b"x")).await.unwrap();
        }
        stalled
    });
    let mut typing = agent.command("cat").await;
    for _ in 0..500 {
        typing.send("k").await;
        typing.expect("k").await;
    }
    drop(timeout(DEADLINE, writer).await.unwrap().unwrap());
    agent.assert_usable().await;
}

#[tokio::test]
async fn sixteen_stalled_streams_and_one_that_types() {
    let agent = Agent::start().await;
    let mut stalled = Vec::new();
    for index in 0..16 {
        let mut stream = agent.command(if index % 2 == 0 { "cat /dev/zero" } else { "sleep 1000" }).await;
        if index % 2 == 1 {
            // As much as goes in without anybody reading.
            while let Ok(sent) =
                timeout(Duration::from_millis(200), stream.output.write(Bytes::from(vec![0; 65536]))).await
            {
                sent.unwrap();
            }
        }
        stalled.push(stream);
    }
    let mut typing = agent.command("cat").await;
    for _ in 0..1_000 {
        typing.send("k").await;
        typing.expect("k").await;
    }
}

#[tokio::test]
async fn a_stalled_reader_holds_its_process_back_and_nothing_is_lost() {
    let agent = Agent::start().await;
    let mut stream = agent.command("head -c 20000000 /dev/zero; echo end").await;
    // Windows and buffers fill up meanwhile.
    agent.assert_usable().await;
    let outcome = stream.end().await;
    assert_eq!(outcome.stdout.len(), 20_000_004);
    assert_eq!(outcome.code(), 0);
}

#[tokio::test]
async fn file_transfer_is_a_process_like_any_other() {
    let agent = Agent::start().await;
    let spec = ProcessSpec { sftp: true, ..ProcessSpec::default() };
    let mut stream = agent.process(&spec, None).await.unwrap();
    // SSH_FXP_INIT, version 3; the answer is SSH_FXP_VERSION, version 3.
    stream.output.write(Bytes::from_static(&[0, 0, 0, 5, 1, 0, 0, 0, 3])).await.unwrap();
    let answer = timeout(DEADLINE, stream.input.read()).await.unwrap().unwrap().unwrap();
    assert_eq!(answer.get(4..9), Some([2, 0, 0, 0, 3].as_slice()));
    stream.output.finish();
    assert_eq!(stream.end().await.code(), 0);
}
