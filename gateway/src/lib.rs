//! How people get in: SSH server, browser terminal, and the bridge between a client and a process.
//!
//! This crate does not decide who may come in, nor when a session ends: it asks `carrel-api`.
#![forbid(unsafe_code)]

pub mod bridge;
pub mod demo;
pub mod http;
pub mod keys;
pub mod options;
pub mod serve;
pub mod ssh;
pub mod tools;
pub mod web;

/// The agent, a static program for this target. Empty when the crate was built without it.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/carrel-agent"));
