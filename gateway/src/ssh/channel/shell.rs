//! An interactive shell on a channel: the client stays when the link to its environment is lost.
use std::{convert::Infallible, pin::pin, time::Duration};

use bytes::Bytes;
use carrel_agent::wire::ProcessSpec;
use carrel_api::environment::link::Exit;
use tokio::{sync::mpsc, time::sleep};

use super::{Inbox, Outlet, Stop, latest, pass_on};
use crate::bridge::{
    Visit,
    terminal::{Input, LOST, News, Output, PLAIN, Sizes, Terminal, resizes},
};

/// A terminal that takes longer to open says so.
const SAID_AFTER: Duration = Duration::from_secs(3);

/// An interactive shell: it stays when its link is lost.
pub(super) async fn run(
    outlet: &Outlet,
    inbox: &Inbox,
    sizes: Sizes,
    signals: mpsc::Receiver<&'static str>,
    mut spec: ProcessSpec,
    visit: &Visit,
) -> Result<Exit, Stop> {
    if let Some(pty) = &mut spec.pty {
        latest(pty, &sizes);
    }
    let mut opening = pin!(visit.terminal(spec, sizes.clone()));
    let opened = tokio::select! {
        biased;
        opened = opening.as_mut() => opened,
        () = sleep(SAID_AFTER) => {
            outlet.line("your environment cannot be reached at this moment; waiting for it").await?;
            opening.await
        }
    };
    let Terminal { output, input, control, .. } = opened?;
    tokio::select! {
        ended = show(outlet, output, visit) => ended,
        never = keys(inbox, input) => match never {},
        never = resizes(control.clone(), sizes) => match never {},
        never = pass_on(&control, signals) => match never {},
    }
}

/// The terminal to the client until the shell has ended.
async fn show(outlet: &Outlet, mut output: Output, visit: &Visit) -> Result<Exit, Stop> {
    loop {
        match output.next().await {
            Ok(News::Bytes(bytes)) => outlet.data(bytes).await?,
            Ok(News::Lost) => {
                outlet.data(Bytes::from_static(PLAIN.as_bytes())).await?;
                outlet.line(LOST).await?;
            }
            Ok(News::Back) => {}
            Ok(News::Ended(exit)) => return Ok(exit),
            Err(error) => return Err(visit.refusal(error).await.into()),
        }
    }
}

/// The client's keys to the terminal, then their end. Never resolves.
async fn keys(inbox: &Inbox, mut input: Input) -> Infallible {
    while let Some(keys) = inbox.read().await {
        input.write(keys).await;
    }
    input.finish().await
}
