//! Buffers between HTTP/2 streams and their users.
