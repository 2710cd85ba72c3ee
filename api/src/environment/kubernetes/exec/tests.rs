use std::{future::pending, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::oneshot,
    time::timeout,
};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

use super::*;

/// What a test waits for comes at once; this only keeps a fault from hanging.
const LIMIT: Duration = Duration::from_secs(10);

type Server = WebSocketStream<DuplexStream>;

async fn pair(end: impl Future<Output = String> + Send + 'static) -> (ExecStream, Server) {
    let (near, far) = duplex(8 * 1024);
    let client = WebSocketStream::from_raw_socket(near, Role::Client, None).await;
    let server = WebSocketStream::from_raw_socket(far, Role::Server, None).await;
    (ExecStream::new(client, end, &TaskTracker::new()), server)
}

fn frame(channel: u8, bytes: &[u8]) -> Message {
    Message::Binary([&[channel], bytes].concat().into())
}

async fn next(server: &mut Server) -> Vec<u8> {
    match timeout(LIMIT, server.next()).await.unwrap() {
        Some(Ok(Message::Binary(bytes))) => bytes.to_vec(),
        other => panic!("{other:?}"),
    }
}

async fn closes(server: &mut Server) -> bool {
    matches!(timeout(LIMIT, server.next()).await.unwrap(), Some(Ok(Message::Close(_))))
}

async fn rest(stream: &mut ExecStream) -> (Vec<u8>, io::Result<usize>) {
    let mut bytes = Vec::new();
    let result = timeout(LIMIT, stream.read_to_end(&mut bytes)).await.unwrap();
    (bytes, result)
}

const SUCCESS: &[u8] = br#"{"metadata":{},"status":"Success"}"#;
const FAILURE: &[u8] = br#"{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"1"}]}}"#;

#[tokio::test]
async fn bytes_go_both_ways_and_success_is_an_end() {
    let (mut stream, mut server) = pair(pending()).await;
    stream.write_all(b"hello").await.unwrap();
    assert_eq!(next(&mut server).await, b"\0hello");
    // The empty first frame of each stream, as an API server sends it, is no end.
    for message in [frame(STDOUT, b""), frame(STDOUT, b"one "), frame(STDOUT, b"two"), frame(ERROR, SUCCESS)]
    {
        server.send(message).await.unwrap();
    }
    let (bytes, result) = rest(&mut stream).await;
    assert_eq!((bytes.as_slice(), result.unwrap()), (b"one two".as_slice(), 7));
}

#[tokio::test]
async fn what_was_written_before_the_end_arrives_before_the_connection_closes() {
    let (mut stream, mut server) = pair(pending()).await;
    stream.write_all(b"last words").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(next(&mut server).await, b"\0last words");
    assert!(closes(&mut server).await);
}

#[tokio::test]
async fn an_end_without_success_is_an_error_that_says_what_stderr_said() {
    let ends = [
        (Some(frame(ERROR, FAILURE)), "non-zero exit code: no such file"),
        (Some(frame(ERROR, b"{")), "cannot be read: no such file"),
        (Some(frame(ERROR, b"{}")), "no such file"),
        (Some(Message::Close(None)), "without a status: no such file"),
        (None, ""),
    ];
    for (end, expected) in ends {
        let (mut stream, mut server) = pair(pending()).await;
        server.send(frame(STDOUT, b"some")).await.unwrap();
        server.send(frame(STDERR, b"no such \x1b\nfile")).await.unwrap();
        if let Some(end) = end {
            server.send(end).await.unwrap();
        }
        drop(server);
        let (bytes, result) = rest(&mut stream).await;
        assert_eq!(bytes, b"some");
        let said = result.unwrap_err().to_string();
        assert!(said.replace("  ", "").contains(&expected.replace("  ", "")), "{said}");
    }
}

#[tokio::test]
async fn a_stream_that_stays_open_ends_with_its_pod() {
    let (end, ended) = oneshot::channel();
    let (mut stream, server) = pair(async { ended.await.unwrap() }).await;
    end.send("the pod is gone".to_owned()).unwrap();
    let (_, result) = rest(&mut stream).await;
    let error = result.unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (io::ErrorKind::ConnectionAborted, "the pod is gone")
    );
    drop(server);
}

#[tokio::test]
async fn a_full_direction_does_not_stop_the_other() {
    let (stream, mut server) = pair(pending()).await;
    let (mut reading, mut writing) = tokio::io::split(stream);
    // Nobody takes this out at the other end: after a while writing waits, as it should.
    let writer = tokio::spawn(async move {
        loop {
            writing.write_all(&[7; outgoing::FRAME]).await.unwrap();
        }
    });
    for _ in 0..200 {
        timeout(LIMIT, server.feed(frame(STDOUT, &[1; 1000]))).await.unwrap().unwrap();
        timeout(LIMIT, server.flush()).await.unwrap().unwrap();
        let mut bytes = [0; 1000];
        timeout(LIMIT, reading.read_exact(&mut bytes)).await.unwrap().unwrap();
    }
    assert!(!writer.is_finished());
    writer.abort();
}

#[tokio::test]
async fn dropping_the_stream_ends_the_connection() {
    let (stream, mut server) = pair(pending()).await;
    drop(stream);
    assert!(!matches!(timeout(LIMIT, server.next()).await.unwrap(), Some(Ok(_))));
}

#[tokio::test]
async fn a_frame_beyond_all_measure_is_refused() {
    let (mut stream, mut server) = pair(pending()).await;
    let sender = tokio::spawn(async move { server.send(frame(STDOUT, &vec![0; LARGEST + 1])).await });
    let (_, result) = rest(&mut stream).await;
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
    let _ = sender.await.unwrap();
}

#[tokio::test]
async fn what_is_written_faster_than_it_is_sent_goes_as_whole_frames() {
    let (mut stream, mut server) = pair(pending()).await;
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let mut lengths = Vec::new();
    let mut arrived = Vec::new();
    // As h2 writes: four frames and their heads at a time.
    for part in bytes.chunks(65_572) {
        stream.write_all(part).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    while arrived.len() < bytes.len() {
        let frame = next(&mut server).await;
        let (first, payload) = frame.split_first().unwrap();
        assert_eq!(*first, STDIN);
        lengths.push(payload.len());
        arrived.extend_from_slice(payload);
    }
    assert!(arrived == bytes, "the bytes are others");
    let short = lengths.iter().filter(|length| **length != outgoing::FRAME).count();
    assert!(short <= 2, "{lengths:?}");
    assert!(closes(&mut server).await);
}

#[tokio::test]
async fn a_writer_that_waits_is_told_when_nothing_is_sent_any_more() {
    let (mut stream, server) = pair(pending()).await;
    let writer = tokio::spawn(async move {
        loop {
            if let Err(error) = stream.write_all(&[7; outgoing::FRAME]).await {
                return error.kind();
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(server);
    assert_eq!(timeout(LIMIT, writer).await.unwrap().unwrap(), io::ErrorKind::BrokenPipe);
}
