//! What both ends of an environment's byte stream share: the wire types ([`wire`]), the buffers that keep one slow
//! HTTP/2 stream from disturbing the others ([`flow`]), and compression where the way is costly ([`packed`]).
//!
//! This library does not know sessions, users or SSH.
#![forbid(unsafe_code)]

pub mod flow;
pub mod packed;
pub mod wire;
