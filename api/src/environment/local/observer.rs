//! The observer: looks at directories and processes, says what there is, and finishes what a killed server left undone.
//!
//! It looks when a process that this server started ends, when a call has changed something, and every second in any case:
//! nothing depends on an event being seen.
use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::OwnedFd,
    process::Child,
    sync::{Arc, Weak},
    time::Duration,
};

use rustix::process::Pid;
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::watch};

use super::{
    Inner,
    directory::{Locked, Record, Stage, Wait, record},
    processes,
};
use crate::{
    environment::{Observation, Observed, Phase},
    identity::EnvironmentId,
};

/// Between two looks without an event.
const LOOK: Duration = Duration::from_secs(1);
/// Last words that are kept of each environment, bytes.
const LAST_WORDS: usize = 2048;
/// Bytes of an environment's stderr that are read as fast as they come.
const EAGER: usize = 64 * 1024;
/// Pause after each read once there were more.
const SLOW: Duration = Duration::from_millis(100);
/// Index into [`crate::session::STEPS`] while the processes are being started.
const STARTING: usize = 2;

/// Starts looking; ends when `inner` is dropped.
pub(super) fn start(inner: &Arc<Inner>) -> watch::Receiver<Arc<Observation>> {
    let (sender, receiver) = watch::channel(Arc::default());
    tokio::spawn(run(Arc::downgrade(inner), sender));
    receiver
}

async fn run(inner: Weak<Inner>, sender: watch::Sender<Arc<Observation>>) {
    loop {
        {
            let Some(inner) = inner.upgrade() else { return };
            let look = tokio::task::spawn_blocking(move || {
                let running = processes::all(inner.instance)?;
                inner.tidy(&running);
                inner.look()
            });
            let observation = match look.await {
                Ok(Ok(observation)) => observation,
                // The last look's environments stay: nothing follows from not seeing.
                Ok(Err(error)) => unseen(&sender.borrow(), error.to_string()),
                Err(error) => unseen(&sender.borrow(), error.to_string()),
            };
            sender.send_if_modified(|last| {
                let changed = **last != observation;
                if changed {
                    *last = Arc::new(observation);
                }
                changed
            });
        }
        let Some(wait) = inner.upgrade().map(|inner| async move {
            tokio::select! {
                () = inner.changed.notified() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }) else {
            return;
        };
        tokio::select! {
            () = wait => {}
            () = sender.closed() => return,
        }
    }
}

fn unseen(last: &Observation, why: String) -> Observation {
    Observation { unavailable: Some(why), ..last.clone() }
}

impl Inner {
    /// Everything there is.
    pub(super) fn look(&self) -> io::Result<Observation> {
        // Records first: one whose processes start in between is seen as it was, and looked at again soon. The other way round an
        // environment that has just started would look as if its processes had ended.
        // Without a record it is about to be made, or about to be removed.
        let known = self.directories()?.into_iter().filter_map(|id| Some((id, record(&self.path(id))?)));
        let known: Vec<(EnvironmentId, Record)> = known.collect();
        let running = processes::all(self.instance)?;
        let observed = |(id, record): (EnvironmentId, Record)| {
            let observed = self.observed(id, &record, running.contains_key(&id));
            (id, observed)
        };
        let environments: BTreeMap<_, _> = known.into_iter().map(observed).collect();
        Ok(Observation { complete: true, unavailable: None, environments })
    }

    fn observed(&self, id: EnvironmentId, record: &Record, running: bool) -> Observed {
        let phase = match record.stage {
            Stage::Ending => Phase::Ending,
            _ if running => Phase::Up,
            Stage::Making => Phase::Starting { step: STARTING, reachable: false },
            Stage::Started => Phase::Failed(self.why_ended(id, record)),
        };
        Observed {
            cut_off: false,
            phase,
            name: id.to_string(),
            namespace: "local".into(),
            created_at: record.created_at,
            owner: record.owner.map(|(_, session)| session),
        }
    }

    fn directories(&self) -> io::Result<Vec<EnvironmentId>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            if let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Finishes what a killed server left: a directory whose processes never ran goes, one whose processes run is recorded as
    /// started, a destruction is carried out, and processes without a directory end.
    fn tidy(&self, running: &Running) {
        let Ok(ids) = self.directories() else { return };
        for id in &ids {
            let path = self.path(*id);
            let undone = |stage: Option<Stage>| !matches!(stage, Some(Stage::Started));
            if !undone(record(&path).map(|record| record.stage)) {
                continue;
            }
            // Locked: somebody is at work on it.
            let Ok(Some(directory)) = Locked::open(&path, Wait::No) else { continue };
            let written = directory.record();
            let result = match written {
                Some(record) if record.stage == Stage::Started => Ok(()),
                Some(mut record) if record.stage == Stage::Making && running.contains_key(id) => {
                    record.stage = Stage::Started;
                    directory.write(&record).map_err(super::unavailable)
                }
                _ => self.end(*id, directory),
            };
            if let Err(error) = result {
                tracing::warn!(environment_id = %id, %error, "an unfinished environment cannot be tidied away");
            }
        }
        // Looked for after the processes: whoever makes an environment makes its directory first.
        for id in running.keys().filter(|id| !self.path(**id).exists()) {
            tracing::warn!(environment_id = %id, "processes without a directory are ended");
            if let Err(error) = processes::kill_all(self.instance, *id) {
                tracing::warn!(environment_id = %id, %error, "processes without a directory cannot be ended");
            }
        }
    }
}

type Running = BTreeMap<EnvironmentId, Vec<Pid>>;

/// Waits for a child of this server, so that it does not stay as a zombie, and keeps its last words.
pub(super) fn watch_child(inner: &Arc<Inner>, id: EnvironmentId, mut child: Child) {
    let inner = Arc::downgrade(inner);
    tokio::spawn(async move {
        let said =
            match child.stderr.take().map(|stderr| pipe::Receiver::from_owned_fd(OwnedFd::from(stderr))) {
                Some(Ok(stderr)) => last_words(stderr).await,
                _ => String::new(),
            };
        // Its stderr has ended with it, or nearly so.
        let _ = tokio::task::spawn_blocking(move || child.wait()).await;
        if let Some(inner) = inner.upgrade() {
            if !said.is_empty() && inner.path(id).exists() {
                inner.last_words().insert(id, said);
            }
            inner.changed.notify_one();
        }
    });
}

/// Reads to the end and keeps the end. A tenant can write here too: past [`EAGER`] bytes it is read slowly, so that this costs
/// no processor time; whoever writes then waits.
async fn last_words(mut stderr: pipe::Receiver) -> String {
    let mut kept = Vec::new();
    let mut total = 0usize;
    let mut chunk = [0; 512];
    while let Ok(count @ 1..) = stderr.read(&mut chunk).await {
        kept.extend_from_slice(chunk.get(..count).unwrap_or_default());
        let surplus = kept.len().saturating_sub(LAST_WORDS);
        kept.drain(..surplus);
        total = total.saturating_add(count);
        if total > EAGER {
            tokio::time::sleep(SLOW).await;
        }
    }
    String::from_utf8_lossy(&kept).chars().map(|it| if it.is_control() { ' ' } else { it }).collect()
}
