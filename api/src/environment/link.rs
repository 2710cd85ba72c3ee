//! One connection to each environment's agent, shared by everybody who is attached to it.
//!
//! A connection is opened when it is first asked for and dropped after a minute without streams. What comes from the
//! agent is hostile input: the tenant can replace it. This module knows processes and their streams, not who uses them.
mod connection;
mod exit;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use carrel_agent::flow;
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use tokio::{
    sync::oneshot,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tracing::Instrument;

pub use connection::{Control, Link, Process};
pub use exit::{Exit, exit};

use super::{Environment, EnvironmentError};
use crate::identity::EnvironmentId;

/// The time limits of connections.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// Opening one, from the backend's byte stream to the end of the handshake.
    connect: Duration,
    /// A ping this often, and so long for its answer: load balancers cut silent streams after 60 s.
    ping: Duration,
    /// One without streams is dropped after this.
    idle: Duration,
    /// How often is looked for idleness.
    look: Duration,
}

const TIMES: Times = Times {
    connect: Duration::from_secs(10),
    ping: Duration::from_secs(15),
    idle: Duration::from_secs(60),
    look: Duration::from_secs(5),
};

/// Why the agent of an environment did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// There is no connection, and nothing was asked: worth another try.
    #[error("the environment cannot be reached: {0}")]
    Unreachable(String),
    /// The agent has answered and refuses; its sentence, free of control characters.
    #[error("{0}")]
    Refused(String),
    /// The connection ended, or the agent does not answer.
    #[error("the connection to the environment is lost: {0}")]
    Lost(String),
}

type Opening = Shared<BoxFuture<'static, Result<Arc<Link>, LinkError>>>;

struct Slot {
    generation: u64,
    end: CancellationToken,
    link: Opening,
}

#[derive(Default)]
struct Slots {
    generation: u64,
    by_environment: HashMap<EnvironmentId, Slot>,
}

/// All connections of this process, at most one for each environment.
pub struct Links {
    environment: Arc<dyn Environment>,
    times: Times,
    slots: Mutex<Slots>,
    tasks: TaskTracker,
    end: CancellationToken,
    _end_on_drop: DropGuard,
}

impl Links {
    /// None are open yet. Dropping it closes all. Needs a Tokio runtime from the first [`Links::get`] on.
    #[must_use]
    pub fn new(environment: Arc<dyn Environment>) -> Arc<Self> {
        Self::with(environment, TIMES)
    }

    fn with(environment: Arc<dyn Environment>, times: Times) -> Arc<Self> {
        let end = CancellationToken::new();
        Arc::new(Self {
            environment,
            times,
            slots: Mutex::default(),
            tasks: TaskTracker::new(),
            _end_on_drop: end.clone().drop_guard(),
            end,
        })
    }

    /// The connection to an environment; opened if there is none. All that ask while it is being opened wait for the
    /// same attempt and get the same answer; those of other environments do not wait.
    ///
    /// # Errors
    /// `Unreachable`, after 10 s at the latest.
    pub async fn get(self: &Arc<Self>, id: EnvironmentId) -> Result<Arc<Link>, LinkError> {
        self.opening(id).await
    }

    /// Ends the connection to an environment now, with all its streams. The next [`Links::get`] would open another.
    pub fn close(&self, id: EnvironmentId) {
        if let Some(slot) = self.slots().by_environment.remove(&id) {
            slot.end.cancel();
        }
    }

    /// Closes all connections and waits until their tasks are gone.
    pub async fn shutdown(&self) {
        self.end.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn opening(self: &Arc<Self>, id: EnvironmentId) -> Opening {
        let mut slots = self.slots();
        if let Some(slot) = slots.by_environment.get(&id) {
            match slot.link.peek() {
                Some(Ok(link)) if link.lost().is_some() => {}
                Some(Ok(link)) => {
                    link.touch();
                    return slot.link.clone();
                }
                // An attempt that has failed is not given to those who come after it.
                Some(Err(_)) => {}
                None => return slot.link.clone(),
            }
        }
        slots.generation += 1;
        let generation = slots.generation;
        let end = self.end.child_token();
        let (opened, answer) = oneshot::channel();
        let task = Task { links: Arc::downgrade(self), id, generation, end: end.clone(), times: self.times };
        let span = tracing::info_span!("link", environment_id = %id);
        self.tasks.spawn(task.run(Arc::clone(&self.environment), opened).instrument(span));
        let link = async { answer.await.unwrap_or_else(|_| Err(closed())) }.boxed().shared();
        slots.by_environment.insert(id, Slot { generation, end, link: link.clone() });
        link
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> LinkError {
    LinkError::Unreachable("the connection was closed".into())
}

/// One connection's life.
struct Task {
    links: Weak<Links>,
    id: EnvironmentId,
    generation: u64,
    end: CancellationToken,
    times: Times,
}

impl Task {
    async fn run(
        self,
        environment: Arc<dyn Environment>,
        opened: oneshot::Sender<Result<Arc<Link>, LinkError>>,
    ) {
        let connecting = async {
            let stream = environment.connect(self.id).await.map_err(unreachable)?;
            let (stream, pulse) = flow::Listened::new(stream);
            let connected = flow::client(stream).await;
            connected.map(|both| (both, pulse)).map_err(|error| LinkError::Unreachable(error.to_string()))
        };
        let connected = tokio::select! {
            biased;
            () = self.end.cancelled() => Err(closed()),
            result = timeout(self.times.connect, connecting) => {
                result.unwrap_or_else(|_| Err(LinkError::Unreachable("no answer in time".into())))
            }
        };
        // Not held while the connection lives: the backend may be dropped first.
        drop(environment);
        let ((requests, mut connection), pulse) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                tracing::debug!(%error, "not connected");
                self.forget();
                // Nobody waits any more: then nobody needs the answer.
                let _ = opened.send(Err(error));
                return;
            }
        };
        let pings = connection.ping_pong();
        let link = Arc::new(Link::new(requests));
        let why = {
            let watched = Arc::clone(&link);
            let _ = opened.send(Ok(Arc::clone(&link)));
            tokio::select! {
                biased;
                () = self.end.cancelled() => "it was closed".to_owned(),
                result = connection => match result {
                    Ok(()) => "the agent ended it".to_owned(),
                    Err(error) => error.to_string(),
                },
                why = flow::silence(pings, &pulse, self.times.ping) => why,
                () = self.idle(&watched) => "it was without use".to_owned(),
            }
        };
        // First the reason, then the end of the streams, which comes with the end of this block's connection.
        link.set_lost(&why);
        tracing::debug!(%why, "connection ended");
        self.forget();
    }

    /// Returns once nobody has used the link for its idle time; it is then out of the map, so that nobody gets it any more.
    async fn idle(&self, link: &Link) {
        let mut ticks = interval_at(Instant::now() + self.times.look, self.times.look);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if link.streams() > 0 {
                link.touch();
                continue;
            }
            let Some(links) = self.links.upgrade() else { return };
            // Under the lock under which a link is handed out and touched.
            let mut slots = links.slots();
            if link.used().elapsed() >= self.times.idle {
                self.forget_in(&mut slots);
                return;
            }
        }
    }

    fn forget(&self) {
        if let Some(links) = self.links.upgrade() {
            self.forget_in(&mut links.slots());
        }
    }

    fn forget_in(&self, slots: &mut Slots) {
        if slots.by_environment.get(&self.id).is_some_and(|slot| slot.generation == self.generation) {
            slots.by_environment.remove(&self.id);
        }
    }
}

fn unreachable(error: EnvironmentError) -> LinkError {
    LinkError::Unreachable(error.to_string())
}
