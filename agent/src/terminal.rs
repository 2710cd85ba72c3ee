//! Terminals.
use std::sync::Arc;

use rustix::process::Pid;

use crate::{
    request::{Exchange, Refusal, Start},
    serve::Agent,
};

/// Orders to a terminal.
#[derive(Debug, Clone)]
pub struct Control;

impl Control {
    pub fn foreground(&self) -> Option<Pid> {
        None
    }

    pub fn resize(&self, _cols: u16, _rows: u16) -> Result<(), Refusal> {
        Err(Refusal::NotFound("this process has no terminal"))
    }
}

pub async fn run(_agent: Arc<Agent>, _start: Start, exchange: Exchange) {
    exchange.refuse(&Refusal::Failed("terminals are not served yet".into()));
}
