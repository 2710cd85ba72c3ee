//! Shells in a sandbox of this machine, whose link is closed under them.
use std::time::Duration;

use carrel_agent::wire::{Join, Pty};
use carrel_api::{
    environment::{
        Agent, Create, Environment,
        local::{LocalEnvironment, LocalOptions},
    },
    exam::EnvironmentSpec,
};
use tempfile::TempDir;
use tokio::time::sleep;

use super::*;
use crate::AGENT;

/// For anything that should happen soon.
const DEADLINE: Duration = Duration::from_secs(30);

/// An environment of its own.
struct Room {
    environment: Arc<LocalEnvironment>,
    links: Arc<Links>,
    id: EnvironmentId,
    _directory: TempDir,
}

impl Room {
    async fn open() -> Self {
        assert!(!AGENT.is_empty(), "the agent is built first: make build");
        let directory = tempfile::tempdir().unwrap();
        let options = LocalOptions {
            data_dir: directory.path().to_owned(),
            agent: Agent::Bytes(AGENT),
            shared: Vec::new(),
        };
        let environment = Arc::new(LocalEnvironment::new(options).unwrap());
        let id = EnvironmentId::new();
        let request = Create {
            environment_id: id,
            owner: None,
            exam_id: "test".to_owned(),
            spec: EnvironmentSpec::default(),
            lifetime_seconds: 300,
        };
        environment.create(&request).await.unwrap();
        let links = Links::new(environment.clone());
        timeout(DEADLINE, async {
            while links.get(id).await.is_err() {
                sleep(Duration::from_millis(50)).await;
            }
        })
        .await
        .unwrap();
        Self { environment, links, id, _directory: directory }
    }

    async fn shell(&self, sizes: Sizes, window: Duration) -> Terminal {
        let spec = ProcessSpec {
            env: vec![("PS1".into(), "$ ".into())],
            pty: Some(Pty { term: "xterm".into(), cols: 80, rows: 24, modes: Vec::new() }),
            keep_seconds: Some(60),
            join: Join::Ssh,
            attachment: Some("me".into()),
            ..ProcessSpec::default()
        };
        let process = self.links.get(self.id).await.unwrap().start(None, &spec).await.unwrap();
        let place = Place { links: Arc::clone(&self.links), environment: self.id, spec, sizes };
        let mut terminal = Terminal::new(place, process);
        terminal.output.window = window;
        terminal.output.retry = Retry::within(window);
        terminal
    }

    async fn close(self) {
        self.environment.destroy(self.id).await.unwrap();
        self.links.shutdown().await;
    }
}

async fn next(output: &mut Output) -> Result<News, LinkError> {
    timeout(DEADLINE, output.next()).await.expect("nothing came")
}

/// Reads until `text` has come.
async fn shows(output: &mut Output, text: &str) -> String {
    let mut seen = Vec::new();
    loop {
        match timeout(DEADLINE, output.next()).await {
            Ok(Ok(News::Bytes(bytes))) => seen.extend_from_slice(&bytes),
            other => panic!("{other:?} instead of {text:?} after {:?}", String::from_utf8_lossy(&seen)),
        }
        let seen = String::from_utf8_lossy(&seen);
        if seen.contains(text) {
            return seen.into_owned();
        }
    }
}

/// Reads until the link is lost.
async fn is_lost(output: &mut Output) {
    loop {
        match next(output).await {
            Ok(News::Bytes(_)) => {}
            Ok(News::Lost) => return,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn the_same_shell_is_there_again_in_the_latest_size_without_the_keys_of_meanwhile() {
    let room = Room::open().await;
    let (size, sizes) = watch::channel(None);
    let mut terminal = room.shell(sizes.clone(), DEADLINE).await;
    terminal.input.write("kept=kept; clear; echo on-the-scr''een\n".into()).await;
    shows(&mut terminal.output, "on-the-screen").await;
    let resizing = tokio::spawn(resizes(terminal.control.clone(), sizes));
    room.links.close(room.id);
    is_lost(&mut terminal.output).await;
    terminal.input.write("echo typed mean''while\n".into()).await;
    size.send_replace(Some((101, 33)));
    assert!(matches!(next(&mut terminal.output).await, Ok(News::Back)));
    terminal.input.write("echo $kept; stty size\n".into()).await;
    let seen = shows(&mut terminal.output, "33 101").await;
    assert!(seen.contains("on-the-screen") && seen.contains("kept\r\n"), "{seen:?}");
    assert!(!seen.contains("typed meanwhile"), "{seen:?}");
    // bash reads the size and sets it again whenever it begins to edit a line, and a change in between is undone: first it is busy.
    terminal.input.write("until stty size | grep '20 70'; do echo wait''ing; sleep 0.1; done\n".into()).await;
    shows(&mut terminal.output, "waiting").await;
    size.send_replace(Some((70, 20)));
    shows(&mut terminal.output, "20 70\r\n").await;
    resizing.abort();
    room.close().await;
}

#[tokio::test]
async fn the_end_of_the_input_reaches_the_shell_on_the_next_link() {
    let room = Room::open().await;
    let mut terminal = room.shell(watch::channel(None).1, DEADLINE).await;
    terminal.input.write("cat; exit 6\n".into()).await;
    shows(&mut terminal.output, "exit 6").await;
    room.links.close(room.id);
    is_lost(&mut terminal.output).await;
    let input = tokio::spawn(terminal.input.finish());
    let ended = loop {
        match next(&mut terminal.output).await.unwrap() {
            News::Ended(exit) => break exit,
            News::Lost => panic!("lost again"),
            News::Back | News::Bytes(_) => {}
        }
    };
    assert_eq!(ended, Exit::Code(6));
    input.abort();
    room.close().await;
}

#[tokio::test]
async fn a_shell_that_has_ended_meanwhile_is_reported_as_it_ended() {
    let room = Room::open().await;
    let mut terminal = room.shell(watch::channel(None).1, DEADLINE).await;
    terminal
        .input
        .write("mkfifo /tmp/go; echo $$ > /tmp/pid; echo rea''dy; read < /tmp/go; exit 7\n".into())
        .await;
    shows(&mut terminal.output, "ready").await;
    room.links.close(room.id);
    is_lost(&mut terminal.output).await;
    // On a link of its own, which stays.
    let command = b"pid=$(cat /tmp/pid); echo > /tmp/go; while kill -0 $pid; do sleep 0.05; done";
    let spec = ProcessSpec::default();
    let mut ending = room.links.get(room.id).await.unwrap().start(Some(command), &spec).await.unwrap();
    ending.stdin.finish();
    timeout(DEADLINE, async { while let Ok(Some(_)) = ending.stdout.read().await {} }).await.unwrap();
    assert!(matches!(next(&mut terminal.output).await, Ok(News::Back)));
    let ended = loop {
        if let News::Ended(exit) = next(&mut terminal.output).await.unwrap() {
            break exit;
        }
    };
    assert_eq!(ended, Exit::Code(7));
    room.close().await;
}

#[tokio::test]
async fn a_link_that_is_lost_again_and_again_is_given_up() {
    let room = Room::open().await;
    let mut terminal = room.shell(watch::channel(None).1, Duration::from_secs(2)).await;
    let begun = Instant::now();
    let mut back = 0;
    let error = loop {
        room.links.close(room.id);
        is_lost(&mut terminal.output).await;
        match next(&mut terminal.output).await {
            Ok(News::Back) => back += 1,
            Err(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(error, LinkError::Lost(_)), "{error}");
    assert!((1..30).contains(&back), "{back} times in {:?}", begun.elapsed());
    room.close().await;
}

#[tokio::test]
async fn an_environment_that_is_gone_is_given_up() {
    let room = Room::open().await;
    let mut terminal = room.shell(watch::channel(None).1, Duration::from_millis(500)).await;
    room.environment.destroy(room.id).await.unwrap();
    is_lost(&mut terminal.output).await;
    assert!(matches!(next(&mut terminal.output).await, Err(LinkError::Unreachable(_))));
    room.close().await;
}
