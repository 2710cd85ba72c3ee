//! Both ends on an in-memory pipe.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]
use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::timeout,
};

use super::*;

/// Text that shrinks, never twice the same line.
fn text(length: usize) -> Vec<u8> {
    (0..).flat_map(|n: u32| format!("{n}: of candidate and exam\n").into_bytes()).take(length).collect()
}

/// Bytes that do not.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

fn pair(pipe: usize) -> (Packed<DuplexStream>, Packed<DuplexStream>) {
    let (a, b) = duplex(pipe);
    (Packed::new(a), Packed::new(b))
}

/// What `parts` are on the wire, each written and flushed on its own.
async fn wire(parts: &[&[u8]]) -> Vec<u8> {
    let (near, mut far) = duplex(1 << 20);
    let writer = async move {
        let mut packed = Packed::new(near);
        for part in parts {
            packed.write_all(part).await.unwrap();
            packed.flush().await.unwrap();
        }
    };
    let mut bytes = Vec::new();
    let (read, ()) = tokio::join!(far.read_to_end(&mut bytes), writer);
    read.unwrap();
    bytes
}

#[tokio::test]
async fn all_bytes_arrive_as_they_were_whatever_they_are_and_however_they_are_cut() {
    for pipe in [1, 7, 4096, 1 << 20] {
        let long = if pipe < 100 { 20_000 } else { 700_000 };
        let mut sent = Vec::new();
        let mut pieces = Vec::new();
        for (n, length) in [1, 5, 1023, 1024, 1025, 3, long, 40_000, long, 2, 70_000].into_iter().enumerate()
        {
            let bytes = match n % 3 {
                0 => text(length),
                1 => noise(length, n as u64),
                _ => [text(length / 2), noise(length - length / 2, n as u64)].concat(),
            };
            sent.extend_from_slice(&bytes);
            pieces.push(bytes);
        }
        let (mut near, mut far) = pair(pipe);
        let writer = async move {
            for (n, piece) in pieces.iter().enumerate() {
                let (a, b) = piece.split_at(piece.len() / 3);
                // Vectored, as h2 writes, and whole.
                let taken = near.write_vectored(&[IoSlice::new(a), IoSlice::new(b)]).await.unwrap();
                near.write_all(&piece[taken..]).await.unwrap();
                if n % 2 == 0 {
                    near.flush().await.unwrap();
                }
            }
            near.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let (read, ()) = tokio::join!(far.read_to_end(&mut received), writer);
        read.unwrap();
        assert!(received == sent, "pipe of {pipe}: {} of {} bytes, or others", received.len(), sent.len());
    }
}

#[tokio::test]
async fn text_shrinks_and_noise_costs_next_to_nothing() {
    let text = text(1 << 20);
    assert!(wire(&[&text]).await.len() < text.len() / 3);
    let noise = noise(1 << 20, 9);
    assert!(wire(&[&noise]).await.len() <= noise.len() + noise.len() / BLOCK * HEAD);
}

#[tokio::test]
async fn what_does_not_shrink_is_tried_ever_more_rarely_and_again_when_it_does() {
    let noise = noise(4096, 3);
    let text = text(4096);
    let mut writing = Writing::default();
    let mut tries = 0;
    for _ in 0..1000 {
        tries += u32::from(writing.untried == 0);
        assert_eq!(writing.pack(&[IoSlice::new(&noise)], noise.len()), None);
    }
    assert!((15..25).contains(&tries), "{tries}");
    let before = (0..).take_while(|_| writing.pack(&[IoSlice::new(&text)], text.len()).is_none()).count();
    assert!(before <= UNTRIED as usize, "{before}");
    assert_eq!(writing.pack(&[IoSlice::new(&text)], text.len()), Some(text.len()));
}

#[tokio::test]
async fn a_keystroke_does_not_wait_for_another_nor_a_plain_block_for_its_end() {
    let (mut near, mut far) = pair(1 << 20);
    near.write_all(b"x").await.unwrap();
    assert_eq!(timeout(Duration::from_secs(5), far.read_u8()).await.unwrap().unwrap(), b'x');

    // A head has announced 5000 bytes; the pipe took 94 of them, and they are handed on.
    let (near, mut far) = pair(100);
    let writer = tokio::spawn(async move {
        let mut near = near;
        let noise = noise(5000, 5);
        near.write_all(&noise).await.unwrap();
        near
    });
    let mut first = [0; 94];
    timeout(Duration::from_secs(5), far.read_exact(&mut first)).await.unwrap().unwrap();
    assert_eq!(first, noise(94, 5).as_slice());
    let mut rest = vec![0; 5000 - 94];
    far.read_exact(&mut rest).await.unwrap();
    writer.await.unwrap();
}

#[tokio::test]
async fn a_stream_that_ends_within_a_block_is_cut() {
    for bytes in [wire(&[&text(3000)]).await, wire(&[&noise(3000, 1)]).await] {
        for length in [1, HEAD - 1, HEAD, HEAD + 1, bytes.len() - 1] {
            let (mut near, far) = duplex(1 << 20);
            near.write_all(&bytes[..length]).await.unwrap();
            drop(near);
            let error = Packed::new(far).read_to_end(&mut Vec::new()).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{length}");
        }
    }
}

#[tokio::test]
async fn what_is_no_block_is_an_error() {
    let too_large = head(BLOCK + 1, BLOCK + 1);
    // Says that it grows beyond what it unpacks to, and the other way round.
    let mut wrong_size = wire(&[&text(3000)]).await;
    wrong_size[2] ^= 1;
    let cases: [&[u8]; 6] = [
        &[0; 6],
        &head(1, 0),
        &head(5, 6),
        &too_large,
        &[&head(100, 8)[..], &[255; 8]].concat(),
        &wrong_size,
    ];
    for bytes in cases {
        let (mut near, far) = duplex(1 << 20);
        near.write_all(bytes).await.unwrap();
        let error = Packed::new(far).read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
    }
}

#[tokio::test]
async fn hostile_bytes_end_in_bytes_or_an_error() {
    let good = wire(&[&text(2000), b"x", &noise(1500, 2), &text(5000)]).await;
    for seed in 1..3000_u64 {
        let mut bytes = good.clone();
        for change in noise(6, seed.wrapping_mul(0x9e37_79b9)).chunks(2) {
            let at = (usize::from(change[0]) << 4 ^ seed as usize) % bytes.len();
            bytes[at] = change[1];
        }
        let (mut near, far) = duplex(1 << 20);
        near.write_all(&bytes).await.unwrap();
        drop(near);
        let mut read = Vec::new();
        let _ = Packed::new(far).read_to_end(&mut read).await;
        assert!(read.len() <= bytes.len() / HEAD * BLOCK);
    }
}

#[tokio::test]
async fn a_stream_that_has_become_quiet_keeps_no_large_buffer() {
    let (mut near, mut far) = pair(1 << 20);
    let bulk = noise(1 << 20, 4);
    let mut got = vec![0; bulk.len()];
    let (sent, read) = tokio::join!(near.write_all(&bulk), far.read_exact(&mut got));
    sent.unwrap();
    read.unwrap();
    for _ in 0..20 {
        near.write_all(b"x").await.unwrap();
        far.read_u8().await.unwrap();
    }
    assert!(far.reading.arrived.capacity() <= 4 * READ.0, "{}", far.reading.arrived.capacity());
    assert!(near.writing.ready.is_empty());
}

#[tokio::test]
async fn others_get_their_turn_while_much_is_unpacked() {
    let zeros = vec![0; BLOCK];
    let bytes = wire(&[zeros.as_slice(); 2000]).await;
    assert!(bytes.len() < 2 << 20, "{}", bytes.len());
    let mut turns = 0;
    let others = async {
        loop {
            turns += 1;
            tokio::task::yield_now().await;
        }
    };
    let all = async {
        let mut packed = Packed::new(bytes.as_slice());
        let mut buffer = vec![0; BLOCK];
        for _ in 0..2000 {
            packed.read_exact(&mut buffer).await.unwrap();
        }
    };
    tokio::select! {
        () = others => {}
        () = all => {}
    }
    assert!(turns >= 10, "{turns}");
}
