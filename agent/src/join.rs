//! Brings a request for a terminal to the one that it names, to one that it may join, or to a new one.
use std::{sync::Arc, time::Duration};

use carrel_agent::wire::{Join, Pty};

use crate::{
    process::answer,
    request::{Exchange, Refusal, Start},
    seats::Seat,
    serve::Agent,
    terminal::{self, Attach},
};

/// See the module's documentation.
pub async fn run(agent: Arc<Agent>, start: Start, pty: Pty, exchange: Exchange) {
    if let Some(id) = start.spec.terminal.clone() {
        return again(&agent, &id, start, &pty, exchange).await;
    }
    let join = if start.is_shell() { start.spec.join } else { Join::Never };
    let mut exchange = exchange;
    while let Some((id, seat)) = agent.terminals.join(join) {
        exchange = match to(&agent, &id, attach(&start, &pty, exchange, Some(seat))).await {
            Ok(()) => return,
            // It has just ended: the next, if there is one.
            Err(attach) => attach.exchange,
        };
        agent.terminals.remove(&id);
    }
    if join == Join::Watch {
        return exchange.refuse(&Refusal::NotFound("there is no terminal to look at"));
    }
    terminal::run(agent, start, pty, exchange).await;
}

/// A client whose connection was lost comes back to its terminal, or hears how that has ended.
async fn again(agent: &Agent, id: &str, start: Start, pty: &Pty, exchange: Exchange) {
    let seat = agent.terminals.seat_at(id, start.spec.join);
    let attach = Attach { again: true, ..attach(&start, pty, exchange, seat) };
    let Err(attach) = to(agent, id, attach).await else { return };
    match agent.registry.end_of(id) {
        Some(trailers) => {
            if let Some((_input, mut output)) = attach.exchange.open(answer(id, true)) {
                output.finish_with(trailers);
            }
        }
        None => attach.exchange.refuse(&Refusal::NotFound("this terminal has ended")),
    }
}

fn attach(start: &Start, pty: &Pty, exchange: Exchange, seat: Option<Seat>) -> Attach {
    Attach {
        exchange,
        seat,
        join: start.spec.join,
        name: start.spec.attachment.clone(),
        again: false,
        window: (pty.cols, pty.rows),
        keep: start.spec.keep_seconds.map(Duration::from_secs),
    }
}

/// # Errors
/// The client, when there is no such terminal any more.
async fn to(agent: &Agent, id: &str, attach: Attach) -> Result<(), Box<Attach>> {
    match agent.registry.get(id).ok().and_then(|handle| handle.terminal) {
        Some(terminal) => terminal.attach(attach).await,
        None => Err(Box::new(attach)),
    }
}
