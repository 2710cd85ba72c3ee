//! Links against agents that do as a test says. Real agents are in the conformance tests.
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use carrel_agent::{
    flow::Outbound,
    wire::{EXIT_CODE, PROCESS, ProcessSpec, Pty},
};
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use tokio::sync::watch;

use super::*;
use crate::environment::{ByteStream, Create, Observation, Observed};
use crate::identity::{SessionId, UserId};

type Answer = fn(Request<h2::RecvStream>, SendResponse<Bytes>);

/// What `connect` gives.
#[derive(Clone, Copy)]
enum Agent {
    /// An HTTP/2 server.
    Answers(Answer),
    /// A stream that nobody reads.
    Silent,
    /// Nothing, ever.
    Hangs,
    Refuses,
}

struct Fake {
    agent: Mutex<HashMap<EnvironmentId, Agent>>,
    connects: AtomicUsize,
    /// Ends of silent streams.
    kept: Mutex<Vec<tokio::io::DuplexStream>>,
}

impl Fake {
    fn with(agents: &[(EnvironmentId, Agent)]) -> Arc<Self> {
        let agent = Mutex::new(agents.iter().copied().collect());
        Arc::new(Self { agent, connects: AtomicUsize::new(0), kept: Mutex::default() })
    }

    fn connects(&self) -> usize {
        self.connects.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Environment for Fake {
    fn place(&self) -> String {
        "fake".to_owned()
    }
    fn makes(&self) -> String {
        "fake".to_owned()
    }

    async fn check(&self) -> Result<(), EnvironmentError> {
        Ok(())
    }

    async fn create(&self, _: &Create) -> Result<(), EnvironmentError> {
        Ok(())
    }

    fn observe(&self) -> watch::Receiver<Arc<Observation>> {
        watch::channel(Arc::default()).1
    }

    async fn inspect(&self, _: EnvironmentId) -> Result<Option<Observed>, EnvironmentError> {
        Ok(None)
    }

    async fn connect(&self, id: EnvironmentId) -> Result<Box<dyn ByteStream>, EnvironmentError> {
        self.connects.fetch_add(1, Ordering::SeqCst);
        let agent = self.agent.lock().unwrap().get(&id).copied().ok_or(EnvironmentError::NotFound)?;
        let (near, far) = tokio::io::duplex(64 * 1024);
        match agent {
            Agent::Answers(answer) => {
                tokio::spawn(async move {
                    let mut connection = flow::server(far).await.unwrap();
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        answer(request, respond);
                    }
                });
            }
            Agent::Silent => self.kept.lock().unwrap().push(far),
            Agent::Hangs => std::future::pending().await,
            Agent::Refuses => return Err(EnvironmentError::Unavailable("not now".into())),
        }
        Ok(Box::new(near))
    }

    async fn adopt(&self, _: EnvironmentId, _: (UserId, SessionId)) -> Result<(), EnvironmentError> {
        Ok(())
    }

    async fn destroy(&self, _: EnvironmentId) -> Result<(), EnvironmentError> {
        Ok(())
    }
}

const SHORT: Times = Times {
    connect: Duration::from_millis(200),
    ping: Duration::from_millis(100),
    idle: Duration::from_millis(300),
    look: Duration::from_millis(20),
};

fn answer(respond: &mut SendResponse<Bytes>, head: http::response::Builder) -> Outbound {
    Outbound::new(respond.send_response(head.body(()).unwrap(), false).unwrap())
}

fn text(
    respond: &mut SendResponse<Bytes>,
    head: http::response::Builder,
    body: impl Into<Bytes> + Send + 'static,
) {
    let mut outbound = answer(respond, head);
    let body = body.into();
    tokio::spawn(async move {
        let _ = outbound.write(body).await;
        outbound.finish();
    });
}

fn healthy(_: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>) {
    text(&mut respond, Response::builder(), r#"{"version":"1","processes":0,"oom_kills":0}"#);
}

/// Every process says a word and is never heard of again.
fn running(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>) {
    if request.uri().path() == "/v1/health" {
        return healthy(request, respond);
    }
    let mut outbound = answer(&mut respond, Response::builder().header(PROCESS, "1"));
    tokio::spawn(async move {
        outbound.write(Bytes::from_static(b"word")).await.unwrap();
        outbound.closed().await;
        drop(request);
    });
}

fn terminal() -> ProcessSpec {
    let pty = Pty { term: "xterm".into(), cols: 80, rows: 24, modes: Vec::new() };
    ProcessSpec { pty: Some(pty), ..ProcessSpec::default() }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), future).await.unwrap()
}

#[tokio::test]
async fn all_that_ask_at_once_share_one_connection() {
    let id = EnvironmentId::new();
    let fake = Fake::with(&[(id, Agent::Answers(healthy))]);
    let links = Links::new(fake.clone());
    let asked = futures_util::future::join_all((0..50).map(|_| links.get(id)));
    let first = links.get(id).await.unwrap();
    for link in soon(asked).await {
        assert!(Arc::ptr_eq(&link.unwrap(), &first));
    }
    assert_eq!(first.health().await.unwrap().version, "1");
    assert_eq!(fake.connects(), 1);
}

#[tokio::test]
async fn one_environment_that_hangs_holds_up_no_other() {
    let (stuck, well) = (EnvironmentId::new(), EnvironmentId::new());
    let fake = Fake::with(&[(stuck, Agent::Hangs), (well, Agent::Answers(healthy))]);
    let links = Links::with(fake, Times { connect: Duration::from_secs(3600), ..SHORT });
    let waiting = tokio::spawn({
        let links = links.clone();
        async move { links.get(stuck).await.map(|_| ()) }
    });
    soon(async { links.get(well).await.unwrap().health().await }).await.unwrap();
    assert!(!waiting.is_finished());
    links.close(stuck);
    assert!(matches!(soon(waiting).await.unwrap(), Err(LinkError::Unreachable(_))));
}

#[tokio::test]
async fn a_failed_attempt_is_told_to_all_who_waited_and_to_nobody_after() {
    let id = EnvironmentId::new();
    let fake = Fake::with(&[(id, Agent::Refuses)]);
    let links = Links::with(fake.clone(), SHORT);
    assert!(matches!(links.get(id).await, Err(LinkError::Unreachable(why)) if why.contains("not now")));
    fake.agent.lock().unwrap().insert(id, Agent::Hangs);
    assert!(matches!(soon(links.get(id)).await, Err(LinkError::Unreachable(_))));
    fake.agent.lock().unwrap().insert(id, Agent::Answers(healthy));
    soon(async { links.get(id).await.unwrap().health().await }).await.unwrap();
    assert!(matches!(links.get(EnvironmentId::new()).await, Err(LinkError::Unreachable(_))));
}

#[tokio::test]
async fn closing_ends_every_stream_now_and_the_process_is_lost() {
    let id = EnvironmentId::new();
    let fake = Fake::with(&[(id, Agent::Answers(running))]);
    let links = Links::new(fake.clone());
    let link = links.get(id).await.unwrap();
    let mut process = soon(link.start(None, &terminal())).await.unwrap();
    assert_eq!(soon(process.stdout.read()).await.unwrap().unwrap().as_ref(), b"word");
    links.close(id);
    assert!(soon(process.stdout.read()).await.is_err());
    assert!(matches!(soon(exit(&mut process.stdout)).await, Exit::Lost(_)));
    soon(process.stdin.closed()).await;
    let unasked = soon(process.control.resize(80, 24)).await;
    assert_eq!(unasked, Err(LinkError::Unreachable("it was closed".into())));
    soon(async { links.get(id).await.unwrap().health().await }).await.unwrap();
    assert_eq!(fake.connects(), 2);
}

#[tokio::test]
async fn an_agent_that_answers_no_ping_is_lost() {
    let id = EnvironmentId::new();
    let links = Links::with(Fake::with(&[(id, Agent::Silent)]), SHORT);
    let link = links.get(id).await.unwrap();
    let result = soon(link.health()).await;
    assert_eq!(result, Err(LinkError::Lost("it does not answer".into())));
    assert!(links.slots().by_environment.is_empty());
}

#[tokio::test]
async fn a_connection_without_streams_is_dropped_and_one_with_a_stream_is_not() {
    let id = EnvironmentId::new();
    let fake = Fake::with(&[(id, Agent::Answers(running))]);
    let links = Links::with(fake.clone(), Times { idle: Duration::from_millis(200), ..SHORT });
    let process = links.get(id).await.unwrap().start(None, &terminal()).await.unwrap();
    let begun = Instant::now();
    let mut process = process;
    process.stdout.read().await.unwrap();
    // Five idle times with an open stream.
    assert!(
        timeout(Duration::from_secs(1), process.stdout.read()).await.is_err(),
        "after {:?}",
        begun.elapsed()
    );
    assert_eq!(links.slots().by_environment.len(), 1);
    drop(process);
    soon(async {
        while !links.slots().by_environment.is_empty() {
            tokio::time::sleep(SHORT.look).await;
        }
    })
    .await;
    assert_eq!(fake.connects(), 1);
}

#[tokio::test]
async fn the_end_of_the_agent_is_the_end_of_its_link() {
    fn leaves(_: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>) {
        respond.send_reset(h2::Reason::INTERNAL_ERROR);
    }
    let id = EnvironmentId::new();
    let links = Links::new(Fake::with(&[(id, Agent::Answers(leaves))]));
    let link = links.get(id).await.unwrap();
    assert!(matches!(soon(link.health()).await, Err(LinkError::Lost(_))));
    assert!(matches!(soon(link.start(None, &terminal())).await.map(|_| ()), Err(LinkError::Lost(_))));
}

#[tokio::test]
async fn what_a_hostile_agent_answers_is_refused() {
    fn hostile(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>) {
        match request.uri().path() {
            "/v1/health" => text(&mut respond, Response::builder(), vec![b' '; 1 << 20]),
            "/v1/setup" => {
                text(&mut respond, Response::builder(), "{\"exit_code\":");
                // Its body is kept open, and never read.
                tokio::spawn(async move {
                    std::future::pending::<()>().await;
                    drop(request)
                });
            }
            _ => text(&mut respond, Response::builder().header(PROCESS, "../../v1/setup"), ""),
        }
    }
    let id = EnvironmentId::new();
    let links = Links::new(Fake::with(&[(id, Agent::Answers(hostile))]));
    let link = links.get(id).await.unwrap();
    assert!(matches!(soon(link.health()).await, Err(LinkError::Refused(why)) if why.contains("too long")));
    assert!(
        matches!(soon(link.setup("true")).await, Err(LinkError::Refused(why)) if why.contains("malformed"))
    );
    assert!(matches!(soon(link.start(None, &terminal())).await.map(|_| ()), Err(LinkError::Refused(_))));
    let long = "x".repeat(carrel_agent::wire::limits::SETUP_BYTES + 1);
    assert!(matches!(link.setup(&long).await, Err(LinkError::Refused(_))));
}

#[tokio::test]
async fn a_stream_that_ends_without_a_status_is_lost_and_one_with_it_is_not() {
    fn ends(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>) {
        let mut outbound = answer(&mut respond, Response::builder().header(PROCESS, "1"));
        let mut trailers = HeaderMap::new();
        if request.headers().contains_key(carrel_agent::wire::COMMAND) {
            trailers.insert(EXIT_CODE, http::HeaderValue::from_static("0"));
            outbound.finish_with(trailers);
        } else {
            outbound.finish();
        }
    }
    let id = EnvironmentId::new();
    let links = Links::new(Fake::with(&[(id, Agent::Answers(ends))]));
    let link = links.get(id).await.unwrap();
    let mut lost = soon(link.start(None, &terminal())).await.unwrap();
    assert_eq!(soon(lost.stdout.read()).await, Ok(None));
    assert!(matches!(soon(exit(&mut lost.stdout)).await, Exit::Lost(_)));
    let mut done = soon(link.start(Some(b"true"), &ProcessSpec::default())).await.unwrap();
    assert_eq!(soon(done.stdout.read()).await, Ok(None));
    assert_eq!(soon(exit(&mut done.stdout)).await, Exit::Code(0));
}

#[tokio::test]
async fn another_terminal_than_the_one_that_was_named_is_refused() {
    let id = EnvironmentId::new();
    let links = Links::new(Fake::with(&[(id, Agent::Answers(running))]));
    let link = links.get(id).await.unwrap();
    let named = |name: &str| ProcessSpec { terminal: Some(name.into()), ..terminal() };
    assert_eq!(soon(link.start(None, &named("1"))).await.unwrap().id, "1");
    let other = soon(link.start(None, &named("2"))).await.map(|_| ());
    assert!(matches!(other, Err(LinkError::Refused(why)) if why.contains("another terminal")));
}

#[tokio::test]
async fn what_was_asked_and_not_answered_is_lost_and_what_was_not_asked_is_worth_another_try() {
    fn never(request: Request<h2::RecvStream>, respond: SendResponse<Bytes>) {
        tokio::spawn(async move {
            std::future::pending::<()>().await;
            drop((request, respond));
        });
    }
    let id = EnvironmentId::new();
    let links = Links::new(Fake::with(&[(id, Agent::Answers(never))]));
    let link = links.get(id).await.unwrap();
    let asking = tokio::spawn({
        let link = Arc::clone(&link);
        async move { link.start(Some(b"true"), &ProcessSpec::default()).await.map(|_| ()) }
    });
    soon(async {
        while link.streams() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    links.close(id);
    assert_eq!(soon(asking).await.unwrap(), Err(LinkError::Lost("it was closed".into())));
    let after = soon(link.start(Some(b"true"), &ProcessSpec::default())).await.map(|_| ());
    assert_eq!(after, Err(LinkError::Unreachable("it was closed".into())));
}
