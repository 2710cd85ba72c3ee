//! Shells at terminals: joining, leaving, looking on, and what late ones see.
use std::time::Duration;

use carrel_agent::wire::{self, Join, ProcessSpec, Pty};
use http::StatusCode;
use tokio::time::timeout;

use crate::support::{Agent, DEADLINE, Stream, eventually, is_running};

const KEEP: Option<u64> = Some(300);

/// Waits until the shell answers, and turns off what would make its answers hard to read.
async fn settle(shell: &mut Stream) {
    shell
        .send("PS1='$ '; bind 'set enable-bracketed-paste off' 2>/dev/null; stty -echo; echo re''ady\n")
        .await;
    shell.expect("ready\r\n").await;
}

async fn settled_shell(agent: &Agent, join: Join) -> Stream {
    let mut shell = agent.shell(join, KEEP).await.unwrap();
    settle(&mut shell).await;
    shell
}

async fn pid_of(shell: &mut Stream) -> i32 {
    shell.send("echo pid=$$=\n").await;
    let text = shell.expect("=\r\n").await;
    text.split('=').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_login_shell_has_a_controlling_terminal_of_the_size_asked_for() {
    let agent = Agent::start().await;
    let mut shell = settled_shell(&agent, Join::Never).await;
    shell.send("echo $0 $TERM; stty size; tty; echo $SSH_TTY; echo x > /dev/tty; shopt -q login_shell && echo lo''gin\n").await;
    let text = shell.expect("login").await;
    assert!(text.contains("-bash xterm-256color\r\n24 80\r\n/dev/pts/"), "{text}");
    shell.send("exit 9\n").await;
    assert_eq!(shell.end().await.code(), 9);
}

#[tokio::test]
async fn a_command_at_a_terminal_ends_with_all_of_its_output() {
    let agent = Agent::start().await;
    let spec = ProcessSpec {
        pty: Some(Pty { term: "vt100".into(), cols: 80, rows: 24, modes: vec![(72, 0)] }),
        ..ProcessSpec::default()
    };
    for _ in 0..20 {
        let mut stream = agent.process(&spec, Some(b"seq 1 5000; exit 3")).await.unwrap();
        let outcome = stream.end().await;
        assert_eq!(outcome.code(), 3);
        assert_eq!(outcome.text(), (1..=5000).map(|number| format!("{number}\n")).collect::<String>());
    }
    // Somebody who holds the terminal open does not hold the end up.
    let mut stream = agent.process(&spec, Some(b"trap '' HUP; sleep 3 & echo end")).await.unwrap();
    assert_eq!(timeout(Duration::from_secs(2), stream.end()).await.unwrap().text(), "end\n");
}

#[tokio::test]
async fn who_writes_on_in_the_background_does_not_hold_the_end_up() {
    let agent = Agent::start().await;
    let spec = ProcessSpec {
        pty: Some(Pty { term: "vt100".into(), cols: 80, rows: 24, modes: Vec::new() }),
        ..ProcessSpec::default()
    };
    let mut stream = agent.process(&spec, Some(b"set -m; yes & sleep 0.1; exit 8")).await.unwrap();
    assert_eq!(stream.end().await.code(), 8);
}

#[tokio::test]
async fn a_client_alone_that_does_not_read_holds_its_process_back_and_loses_nothing() {
    let agent = Agent::start().await;
    let spec = ProcessSpec {
        pty: Some(Pty { term: "vt100".into(), cols: 80, rows: 24, modes: vec![(70, 0)] }),
        ..ProcessSpec::default()
    };
    let mut stream = agent.process(&spec, Some(b"head -c 8000000 /dev/zero | tr '\\0' x")).await.unwrap();
    agent.assert_usable().await;
    assert_eq!(stream.end().await.stdout.len(), 8_000_000);
}

#[tokio::test]
async fn keys_signals_and_the_end_of_input_are_those_of_a_terminal() {
    let agent = Agent::start().await;
    let spec = ProcessSpec {
        pty: Some(Pty { term: "vt100".into(), cols: 80, rows: 24, modes: vec![(1, 24)] }),
        ..ProcessSpec::default()
    };
    let mut stream = agent.process(&spec, Some(b"echo ready; exec sleep 1000")).await.unwrap();
    stream.expect("ready").await;
    stream.send("\x18").await;
    assert_eq!(stream.end().await.signal(), "INT");
    let mut stream = agent.process(&spec, Some(b"stty -echo; echo ready; cat; echo end")).await.unwrap();
    stream.expect("ready").await;
    stream.send("line\n").await;
    stream.output.finish();
    assert_eq!(stream.end().await.text().trim(), "line\r\nend");
}

#[tokio::test]
async fn a_resize_reaches_the_foreground() {
    let agent = Agent::start().await;
    let mut shell = settled_shell(&agent, Join::Never).await;
    shell.send("trap 'stty size' WINCH; echo tra''pped\n").await;
    shell.expect("trapped").await;
    let path = format!("/v1/processes/{}/resize", shell.process_id());
    assert_eq!(agent.post(&path, wire::WINDOW, "132x43").await, StatusCode::NO_CONTENT);
    shell.send("\n").await;
    shell.expect("43 132").await;
    assert_eq!(agent.post(&path, wire::WINDOW, "0x43").await, StatusCode::BAD_REQUEST);
    assert_eq!(agent.post("/v1/processes/none/resize", wire::WINDOW, "80x24").await, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_kept_shell_survives_its_client_and_is_shown_to_the_next() {
    let agent = Agent::start().await;
    let mut first = settled_shell(&agent, Join::Ssh).await;
    assert!(!first.resumed());
    let pid = pid_of(&mut first).await;
    first.send("printf '\\033[2J\\033[10;20Hshown \\342\\202\\254'; cat\n").await;
    first.expect("€").await;
    let id = first.process_id().to_owned();
    drop(first);
    assert!(is_running(pid));
    let mut second = agent.shell(Join::Ssh, KEEP).await.unwrap();
    assert!(second.resumed());
    assert_eq!(second.process_id(), id);
    let redraw = second.expect("€").await;
    assert!(redraw.contains("shown"), "{redraw:?}");
    second.send("typed\n").await;
    second.expect("typed").await;
}

#[tokio::test]
async fn a_sequence_cut_by_a_reconnect_is_whole_again() {
    let agent = Agent::start().await;
    let mut first = settled_shell(&agent, Join::Ssh).await;
    first.send("printf 'mark\\033[3'; read; printf '1mred'; read\n").await;
    first.expect("mark\u{1b}[3").await;
    drop(first);
    let mut second = agent.shell(Join::Ssh, KEEP).await.unwrap();
    let redraw = second.expect("\u{1b}[3").await;
    assert!(redraw.contains("mark"), "{redraw:?}");
    second.send("\n").await;
    let rest = second.expect("red").await;
    assert!(rest.ends_with("1mred"), "{rest:?}");
}

#[tokio::test]
async fn a_shell_that_is_not_kept_goes_with_its_client() {
    let agent = Agent::start().await;
    let mut shell = agent.shell(Join::Never, None).await.unwrap();
    settle(&mut shell).await;
    let pid = pid_of(&mut shell).await;
    drop(shell);
    eventually("the shell is gone", Duration::from_secs(8), || !is_running(pid)).await;
}

#[tokio::test]
async fn a_kept_shell_ends_when_nobody_comes_back() {
    let agent = Agent::start().await;
    let mut shell = agent.shell(Join::Ssh, Some(1)).await.unwrap();
    settle(&mut shell).await;
    let pid = pid_of(&mut shell).await;
    drop(shell);
    // One who looks on does not keep it.
    let mut watcher = agent.shell(Join::Watch, None).await.unwrap();
    watcher.end().await;
    assert!(!is_running(pid));
    assert!(!agent.shell(Join::Ssh, KEEP).await.unwrap().resumed());
}

#[tokio::test]
async fn several_share_a_terminal_and_one_who_looks_on_cannot_type() {
    let agent = Agent::start().await;
    assert_eq!(agent.shell(Join::Watch, None).await.err().unwrap().status, StatusCode::NOT_FOUND);
    let mut ssh = settled_shell(&agent, Join::Ssh).await;
    let mut browser = agent.shell(Join::Browser, KEEP).await.unwrap();
    let mut watcher = agent.shell(Join::Watch, None).await.unwrap();
    assert!(browser.resumed() && watcher.resumed());
    watcher.send("echo in''trusion\n").await;
    browser.send("echo from the br''owser\n").await;
    for stream in [&mut ssh, &mut browser, &mut watcher] {
        let text = stream.expect("from the browser").await;
        assert!(!text.contains("intrusion"), "{text}");
    }
    // A second ssh gets a terminal of its own; when the first goes, the next gets the main one again.
    let other = agent.shell(Join::Ssh, KEEP).await.unwrap();
    assert!(!other.resumed());
    let main = ssh.process_id().to_owned();
    drop(ssh);
    timeout(DEADLINE, async {
        loop {
            let third = agent.shell(Join::Ssh, KEEP).await.unwrap();
            if third.process_id() == main {
                return;
            }
        }
    })
    .await
    .expect("the main terminal was not given again");
    browser.send("exit 2\n").await;
    assert_eq!(browser.end().await.code(), 2);
    assert_eq!(watcher.end().await.code(), 2);
    drop(other);
}

#[tokio::test]
async fn one_of_several_that_sends_no_more_does_not_end_the_others_shell() {
    let agent = Agent::start().await;
    let mut ssh = settled_shell(&agent, Join::Ssh).await;
    let mut browser = agent.shell(Join::Browser, KEEP).await.unwrap();
    browser.output.finish();
    ssh.send("echo still h''ere\n").await;
    ssh.expect("still here").await;
    browser.expect("still here").await;
}

#[tokio::test]
async fn a_slow_one_of_several_blocks_nobody_and_sees_the_present_when_it_catches_up() {
    let agent = Agent::start().await;
    let mut ssh = settled_shell(&agent, Join::Ssh).await;
    let mut slow = agent.shell(Join::Browser, KEEP).await.unwrap();
    // Many times what can wait for a client.
    ssh.send("seq 1 1500000; echo the e''nd\n").await;
    timeout(Duration::from_secs(60), async {
        let mut tail = String::new();
        while !tail.contains("the end") {
            let bytes = ssh.input.read().await.unwrap().unwrap();
            tail = format!("{}{}", &tail[tail.len().saturating_sub(16)..], String::from_utf8_lossy(&bytes));
            if !tail.is_ascii() {
                tail.clear();
            }
        }
    })
    .await
    .expect("the slow one held the others up");
    let text = slow.expect("the end").await;
    assert!(text.len() < 8 << 20, "{} bytes were kept for the slow one", text.len());
    assert!(text.contains("1499999"), "the redraw does not show the present");
    slow.send("echo al''ive\n").await;
    slow.expect("alive").await;
}

#[tokio::test]
async fn a_paste_of_a_megabyte_arrives_whole() {
    let agent = Agent::start().await;
    let mut shell = settled_shell(&agent, Join::Ssh).await;
    shell.send("stty raw; echo re''ady; head -c 1000000 | md5sum; stty sane; echo do''ne\n").await;
    shell.expect("ready").await;
    let paste = "0123456789".repeat(100_000);
    shell.send(&paste).await;
    let text = shell.expect("done").await;
    let expected = agent.run("for i in $(seq 100000); do printf 0123456789; done | md5sum").await.text();
    assert!(text.contains(expected.split(' ').next().unwrap()), "{text}");
}
