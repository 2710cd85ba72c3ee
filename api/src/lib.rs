//! What a session is, who may have it, where it runs and when it ends.
//!
//! This crate does not know SSH, terminals or browsers.
#![forbid(unsafe_code)]

pub mod access;
pub mod cli;
pub mod credential;
pub mod environment;
pub mod exam;
pub mod http;
pub mod identity;
pub mod lifecycle;
pub mod metrics;
pub mod reason;
pub mod session;
pub mod store;
