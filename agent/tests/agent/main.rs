//! The built program, driven over a unix socket with real HTTP/2.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected fails"
)]

mod handoff;
mod hostile;
mod processes;
mod reconnect;
mod setup;
mod support;
mod tcp;
mod terminals;
