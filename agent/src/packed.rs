//! A byte stream in blocks, each of them compressed (LZ4) where that makes it much shorter.
//!
//! It is for streams that pay for each byte on their way: one through a cluster's exec passes API server, kubelet and container
//! runtime, which take several times as long for a byte as LZ4 does.
//!
//! A block is a head of six bytes and what it announces:
//!
//! | bytes | |
//! | --- | --- |
//! | 0 to 2 | its size, 1 to [`BLOCK`], big endian |
//! | 3 to 5 | how many bytes follow: as many, and they are the block itself; fewer, and they are an LZ4 block of that size |
//!
//! Bytes of a plain block are handed on as they arrive, and the rest of one may follow at any time: nothing waits for more.
//! What does not shrink is found out by trying, at ever larger distances. This module does not know what the bytes mean, and
//! takes what it reads for hostile.
use std::{
    future::Future as _,
    io::{self, IoSlice},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use lz4_flex::block;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    task::coop,
};

#[cfg(test)]
mod tests;

/// Largest block, bytes.
pub const BLOCK: usize = 128 * 1024;
const HEAD: usize = 6;
/// A shorter write is not worth a try.
const WORTH: usize = 1024;
/// A block is compressed where it becomes shorter by this factor at least: below it, LZ4 takes as long as the way of the bytes that it
/// saves.
const FACTOR: usize = 2;
/// Blocks that pass untried after one that did not shrink, at most.
const UNTRIED: u32 = 63;
/// What is read at once: a little while little comes, more while there is more.
const READ: (usize, usize) = (1024, 64 * 1024);

/// A byte stream over `T`; the other end must be one too.
#[derive(Debug)]
pub struct Packed<T> {
    io: T,
    writing: Writing,
    reading: Reading,
}

#[derive(Debug, Default)]
struct Writing {
    /// A compressed block, or the head of a plain one, that `T` has not taken yet.
    ready: Bytes,
    /// Bytes of a plain block that have been announced and not written.
    announced: usize,
    /// Blocks that pass untried, and how many the next one that does not shrink lets pass.
    untried: u32,
    distance: u32,
}

#[derive(Debug)]
struct Reading {
    /// As it came.
    arrived: BytesMut,
    /// How much is asked for next.
    wanted: usize,
    /// Bytes of a plain block that are still to come.
    announced: usize,
    /// A compressed block, unpacked and not yet handed on.
    unpacked: Bytes,
}

impl<T> Packed<T> {
    /// Packs what is written and unpacks what is read.
    pub fn new(io: T) -> Self {
        let reading =
            Reading { arrived: BytesMut::new(), wanted: READ.0, announced: 0, unpacked: Bytes::new() };
        Self { io, writing: Writing::default(), reading }
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn head(size: usize, stored: usize) -> [u8; HEAD] {
    let [.., a, b, c] = size.to_be_bytes();
    let [.., d, e, f] = stored.to_be_bytes();
    [a, b, c, d, e, f]
}

/// The first `size` bytes of `parts`, or all of them.
fn cut<'a>(parts: &'a [IoSlice<'_>], size: usize) -> impl Iterator<Item = &'a [u8]> {
    parts.iter().scan(size, |room, part| {
        let part: &[u8] = part.get(..*room).unwrap_or(part);
        *room = room.saturating_sub(part.len());
        Some(part)
    })
}

impl Writing {
    /// Takes up to a block of `parts` if it shrinks, and says how much that was.
    fn pack(&mut self, parts: &[IoSlice<'_>], size: usize) -> Option<usize> {
        if size < WORTH {
            return None;
        }
        if self.untried > 0 {
            self.untried = self.untried.saturating_sub(1);
            return None;
        }
        let mut block = Vec::with_capacity(size);
        cut(parts, size).for_each(|part| block.extend_from_slice(part));
        let mut packed = vec![0; HEAD.saturating_add(block::get_maximum_output_size(size))];
        let (space_for_head, space) = packed.split_at_mut_checked(HEAD)?;
        let stored = block::compress_into(&block, space).ok()?;
        if stored > size / FACTOR {
            self.distance = self.distance.saturating_mul(2).saturating_add(1).min(UNTRIED);
            self.untried = self.distance;
            return None;
        }
        self.distance = 0;
        space_for_head.copy_from_slice(&head(size, stored));
        packed.truncate(HEAD.saturating_add(stored));
        self.ready = packed.into();
        Some(size)
    }
}

impl<T: AsyncWrite + Unpin> Packed<T> {
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.writing.ready.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(context, &self.writing.ready))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.writing.ready.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes the rest of a head and what of `parts` has been announced; the number of bytes of `parts`.
    fn poll_announced(
        &mut self,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut slices = Vec::with_capacity(parts.len().saturating_add(1));
            slices.push(IoSlice::new(&self.writing.ready));
            slices.extend(cut(parts, self.writing.announced).map(IoSlice::new));
            let written = ready!(Pin::new(&mut self.io).poll_write_vectored(context, &slices))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_head = written.min(self.writing.ready.len());
            self.writing.ready.advance(of_head);
            let of_parts = written.saturating_sub(of_head);
            self.writing.announced = self.writing.announced.saturating_sub(of_parts);
            if of_parts > 0 {
                return Poll::Ready(Ok(of_parts));
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Packed<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let size = parts.iter().map(|part| part.len()).sum::<usize>().min(BLOCK);
        if size == 0 {
            return Poll::Ready(Ok(0));
        }
        if self.writing.announced == 0 {
            ready!(self.poll_ready(context))?;
            if let Some(taken) = self.writing.pack(parts, size) {
                // What does not go now goes with the next write or flush.
                if let Poll::Ready(Err(error)) = self.poll_ready(context) {
                    return Poll::Ready(Err(error));
                }
                return Poll::Ready(Ok(taken));
            }
            self.writing.ready = Bytes::copy_from_slice(&head(size, size));
            self.writing.announced = size;
        }
        self.poll_announced(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_ready(context))?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_ready(context))?;
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

impl Reading {
    /// Reads the next head, and its block if that is a compressed one. False: more has to arrive first.
    ///
    /// # Errors
    /// For what is no block.
    fn next(&mut self) -> io::Result<bool> {
        let Some(&[a, b, c, d, e, f]) = self.arrived.first_chunk() else { return Ok(false) };
        let size = u32::from_be_bytes([0, a, b, c]) as usize;
        let stored = u32::from_be_bytes([0, d, e, f]) as usize;
        if size == 0 || size > BLOCK || stored == 0 || stored > size {
            return Err(invalid("this is no block of a packed stream"));
        }
        if stored == size {
            self.arrived.advance(HEAD);
            self.announced = size;
            return Ok(true);
        }
        let Some(packed) = self.arrived.get(HEAD..HEAD.saturating_add(stored)) else { return Ok(false) };
        let mut unpacked = vec![0; size];
        if !matches!(block::decompress_into(packed, &mut unpacked), Ok(length) if length == size) {
            return Err(invalid("a block of a packed stream cannot be unpacked"));
        }
        self.unpacked = unpacked.into();
        self.arrived.advance(HEAD.saturating_add(stored));
        Ok(true)
    }

    /// Hands on what is there, if anything is.
    fn take(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let (from, left): (&[u8], _) = if self.unpacked.is_empty() {
            (&self.arrived, self.announced)
        } else {
            (&self.unpacked, self.unpacked.len())
        };
        let length = from.len().min(left).min(buffer.remaining());
        let Some(bytes) = from.get(..length) else { return false };
        buffer.put_slice(bytes);
        if self.unpacked.is_empty() {
            self.arrived.advance(length);
            self.announced = left.saturating_sub(length);
        } else {
            self.unpacked.advance(length);
        }
        length > 0
    }

    /// Asks for more where all that was asked for came, and keeps no large buffer for little.
    fn adjust(&mut self, room: usize, read: usize) {
        let (least, most) = READ;
        if read == room {
            self.wanted = self.wanted.saturating_mul(4).min(most);
        } else if read < self.wanted / 4 {
            self.wanted = (self.wanted / 2).max(least);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Packed<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { io, reading, .. } = self.get_mut();
        loop {
            if buffer.remaining() == 0 || reading.take(buffer) {
                return Poll::Ready(Ok(()));
            }
            if reading.announced == 0 {
                // A few bytes can be many blocks' worth of work: other tasks get their turn in between.
                let turn = ready!(coop::poll_proceed(context));
                if reading.next()? {
                    turn.made_progress();
                    continue;
                }
            }
            if reading.arrived.is_empty() && reading.arrived.capacity() > reading.wanted.saturating_mul(2) {
                reading.arrived = BytesMut::new();
            }
            reading.arrived.reserve(reading.wanted);
            let room = reading.arrived.spare_capacity_mut().len();
            let read = ready!(pin!(io.read_buf(&mut reading.arrived)).poll(context))?;
            if read == 0 {
                if reading.arrived.is_empty() && reading.announced == 0 {
                    return Poll::Ready(Ok(()));
                }
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            reading.adjust(room, read);
        }
    }
}
