//! The exam's setup script: it runs once, however often it is asked for, and every asker gets the same answer.
use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Seek as _, SeekFrom, Write as _},
    process::{Command, Stdio},
    sync::{Arc, PoisonError},
};

use carrel_agent::wire::{SetupResult, limits};
use rustix::{
    fs::MemfdFlags,
    pipe::{PipeFlags, pipe_with},
};
use tokio::{net::unix::pipe, sync::watch};

use crate::{
    process::{read_some, spawn_failure},
    request::{Exchange, Refusal},
    serve::Agent,
};

/// Of its output, bytes.
const TAIL: usize = 4096;

/// The script's answer, once there is one.
pub type Outcome = watch::Receiver<Option<SetupResult>>;

/// Runs the script in the request's body, or waits for the run that there was.
pub async fn run(agent: Arc<Agent>, mut exchange: Exchange) {
    let script = match body(&mut exchange).await {
        Ok(script) => script,
        Err(refusal) => return exchange.refuse(&refusal),
    };
    let mut outcome = {
        let mut setup = agent.setup.lock().unwrap_or_else(PoisonError::into_inner);
        match setup.as_ref() {
            Some(outcome) => outcome.clone(),
            None => match start(&agent, &script) {
                Ok(outcome) => setup.insert(outcome).clone(),
                Err(refusal) => return exchange.refuse(&refusal),
            },
        }
    };
    let result = outcome.wait_for(Option::is_some).await.ok().and_then(|result| result.clone());
    match result {
        Some(result) => exchange.answer(&result).await,
        None => exchange.refuse(&Refusal::Failed("the setup script was lost".into())),
    }
}

async fn body(exchange: &mut Exchange) -> Result<Vec<u8>, Refusal> {
    let mut script = Vec::new();
    while let Some(chunk) = exchange.body.data().await {
        let chunk = chunk.map_err(|_| Refusal::BadRequest("the script did not arrive whole".into()))?;
        if script.len().saturating_add(chunk.len()) > limits::SETUP_BYTES {
            return Err(Refusal::TooLarge(format!(
                "a setup script has at most {} bytes",
                limits::SETUP_BYTES
            )));
        }
        script.extend_from_slice(&chunk);
        // Refused only when the stream is gone.
        let _ = exchange.body.flow_control().release_capacity(chunk.len());
    }
    Ok(script)
}

fn start(agent: &Arc<Agent>, script: &[u8]) -> Result<Outcome, Refusal> {
    let failed = |error: io::Error| Refusal::Failed(format!("the setup script cannot be started: {error}"));
    // A file without a name, opened a second time by the shell: what the script's commands read from stdin is at its end.
    let mut file =
        File::from(rustix::fs::memfd_create("setup", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
    file.write_all(script).and_then(|()| file.seek(SeekFrom::End(0))).map_err(failed)?;
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let mut command = Command::new(&agent.account.shell);
    command
        .arg("/proc/self/fd/0")
        .stdin(Stdio::from(file))
        .stdout(Stdio::from(write.try_clone().map_err(failed)?))
        .stderr(Stdio::from(write));
    agent.surround(&mut command, &[]);
    let (_, mut ending) =
        agent.spawn(&mut command, false).map_err(|error| spawn_failure(&agent.account.shell, &error))?;
    drop(command);
    let output = pipe::Receiver::from_owned_fd(read).map_err(failed)?;
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(async move {
        let mut tail = VecDeque::new();
        let exit = tokio::select! {
            exit = ending.wait() => exit,
            () = keep(&output, &mut tail) => ending.wait().await,
        };
        // What it had written is in the pipe by now. A service that it started may hold the pipe and go on writing.
        while let Ok(bytes) = read_some(|buffer| output.try_read(buffer)) {
            if bytes.is_empty() || tail.len() > limits::SETUP_BYTES {
                break;
            }
            tail.extend(bytes);
        }
        let result = SetupResult { exit_code: exit.code(), tail: text(&mut tail) };
        // Nobody may be waiting any more; the answer is kept for the next.
        let _ = sender.send(Some(result));
        keep(&output, &mut VecDeque::new()).await;
    });
    Ok(receiver)
}

/// Reads until the end, keeping the last of it.
async fn keep(output: &pipe::Receiver, tail: &mut VecDeque<u8>) {
    while output.readable().await.is_ok() {
        match read_some(|buffer| output.try_read(buffer)) {
            Ok(bytes) if bytes.is_empty() => return,
            Ok(bytes) => {
                tail.extend(bytes);
                tail.drain(..tail.len().saturating_sub(TAIL));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// The last lines, whole ones if there is a line's end among them.
fn text(tail: &mut VecDeque<u8>) -> String {
    let cut = tail.len() > TAIL;
    tail.drain(..tail.len().saturating_sub(TAIL));
    let bytes = tail.make_contiguous();
    let start = if cut {
        bytes.iter().position(|byte| *byte == b'\n').map_or(0, |at| at.saturating_add(1))
    } else {
        0
    };
    let mut text = String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned();
    // A byte that is no UTF-8 becomes three.
    while text.len() > TAIL {
        text.remove(0);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_tail_is_cut_at_a_line_and_a_short_one_is_whole() {
        assert_eq!(text(&mut b"one\ntwo\n".iter().copied().collect()), "one\ntwo\n");
        let long = format!("{}\nlast\n", "x".repeat(TAIL));
        assert_eq!(text(&mut long.into_bytes().into()), "last\n");
        assert!(text(&mut vec![0xff; 3 * TAIL].into()).len() <= TAIL);
    }
}
