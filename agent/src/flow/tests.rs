//! Real h2 on both ends of an in-memory pipe.
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::{Reason, client::SendRequest};
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::{task::JoinSet, time::timeout};

use super::{Inbound, Listened, Outbound, client, server, silence};
use crate::wire::limits;

const DEADLINE: Duration = Duration::from_secs(30);
/// Many times h2's budget for small frames.
const TINY_WRITES: usize = 200_000;

/// A server whose paths behave: `/echo`; `/tiny` writes small lines for ever; `/flood` writes large blocks for ever;
/// `/sink` never reads; `/count` answers with the number of bytes it got, in trailers; `/reset` resets.
async fn connect() -> SendRequest<Bytes> {
    let (ours, theirs) = tokio::io::duplex(256 * 1024);
    tokio::spawn(async move {
        let mut connection = server(theirs).await.unwrap();
        while let Some(request) = connection.accept().await {
            let Ok((request, mut respond)) = request else { return };
            // Refused for a stream that its client has reset meanwhile.
            let Ok(stream) = respond.send_response(Response::new(()), false) else { continue };
            tokio::spawn(async move {
                let path = request.uri().path().to_owned();
                let output = Outbound::new(stream);
                let input = Inbound::new(request.into_body());
                serve(&path, input, output).await;
            });
        }
    });
    let (requests, connection) = client(ours).await.unwrap();
    tokio::spawn(connection);
    requests
}

async fn serve(path: &str, mut input: Inbound, mut output: Outbound) {
    match path {
        "/echo" => {
            while let Ok(Some(bytes)) = input.read().await {
                if output.write(bytes).await.is_err() {
                    return;
                }
            }
            output.finish();
        }
        "/tiny" => while output.write(Bytes::from_static(b"x\n")).await.is_ok() {},
        "/flood" => while output.write(Bytes::from(vec![7; 100_000])).await.is_ok() {},
        "/count" => {
            let mut count: usize = 0;
            while let Ok(Some(bytes)) = input.read().await {
                count += bytes.len();
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("count", HeaderValue::from(count));
            output.finish_with(trailers);
        }
        "/reset" => output.reset(),
        // `/sink`, and whatever else: open, unread.
        _ => {
            output.closed().await;
        }
    }
}

async fn open(requests: &SendRequest<Bytes>, path: &str) -> (Inbound, Outbound) {
    let mut requests = requests.clone().ready().await.unwrap();
    let request = Request::get(format!("http://agent{path}")).body(()).unwrap();
    let (response, stream) = requests.send_request(request, false).unwrap();
    let output = Outbound::new(stream);
    (Inbound::new(response.await.unwrap().into_body()), output)
}

/// A keystroke there and back.
async fn echo((input, output): &mut (Inbound, Outbound), text: &'static [u8]) {
    timeout(DEADLINE, async {
        output.write(Bytes::from_static(text)).await.unwrap();
        let mut got = BytesMut::new();
        while got.len() < text.len() {
            got.extend_from_slice(&input.read().await.unwrap().unwrap());
        }
        assert_eq!(got, text);
    })
    .await
    .expect("the echo did not come back");
}

#[tokio::test]
async fn bytes_and_trailers_arrive_whole_and_in_order() {
    let requests = connect().await;
    let (mut input, mut output) = open(&requests, "/count").await;
    for size in [1, 4095, 4096, 70_000, 3_000_000] {
        output.write(Bytes::from(vec![1; size])).await.unwrap();
    }
    output.finish();
    assert_eq!(timeout(DEADLINE, input.read()).await.unwrap(), Ok(None));
    let trailers = input.trailers().await.unwrap();
    assert_eq!(trailers["count"], (1 + 4095 + 4096 + 70_000 + 3_000_000).to_string());
}

#[tokio::test]
async fn eight_megabytes_echo_unchanged() {
    let requests = connect().await;
    let (mut input, mut output) = open(&requests, "/echo").await;
    let sent: Bytes = (0_u32..2_000_000).flat_map(u32::to_le_bytes).collect::<Vec<_>>().into();
    let copy = sent.clone();
    let writer = tokio::spawn(async move {
        output.write(copy).await.unwrap();
        output.finish();
        output
    });
    let mut got = BytesMut::new();
    while let Some(bytes) = timeout(DEADLINE, input.read()).await.unwrap().unwrap() {
        assert!(bytes.len() <= super::BLOCK);
        got.extend_from_slice(&bytes);
    }
    assert!(got == sent);
    writer.await.unwrap();
}

#[tokio::test]
async fn a_stalled_reader_of_tiny_writes_disturbs_nobody() {
    let requests = connect().await;
    let _stalled = open(&requests, "/tiny").await;
    let mut typing = open(&requests, "/echo").await;
    for _ in 0..2_000 {
        echo(&mut typing, b"k").await;
    }
}

#[tokio::test]
async fn tiny_writes_to_a_stalled_process_disturb_nobody() {
    let requests = connect().await;
    let (_input, mut output) = open(&requests, "/sink").await;
    let mut typing = open(&requests, "/echo").await;
    let writer = tokio::spawn(async move {
        for _ in 0..TINY_WRITES {
            if output.write(Bytes::from_static(b"x")).await.is_err() {
                break;
            }
        }
        output
    });
    for _ in 0..500 {
        echo(&mut typing, b"k").await;
    }
    // All of them fit into the window, so they must get there although nobody reads.
    let mut output = timeout(DEADLINE, writer).await.unwrap().unwrap();
    assert!(TINY_WRITES < limits::STREAM_WINDOW as usize);
    assert!(timeout(Duration::ZERO, output.closed()).await.is_err(), "the stream was closed");
    echo(&mut typing, b"still here").await;
}

#[tokio::test]
async fn sixteen_stalled_streams_and_one_that_types() {
    let requests = connect().await;
    let mut stalled = JoinSet::new();
    for index in 0..16 {
        let (input, mut output) = open(&requests, if index % 2 == 0 { "/flood" } else { "/sink" }).await;
        stalled.spawn(async move {
            while output.write(Bytes::from(vec![0; 100_000])).await.is_ok() {}
            drop(input);
        });
    }
    let mut typing = open(&requests, "/echo").await;
    for _ in 0..500 {
        echo(&mut typing, b"k").await;
    }
    assert!(stalled.try_join_next().is_none(), "a stalled stream ended by itself");
}

#[tokio::test]
async fn two_hundred_streams_reset_at_once_leave_the_connection_usable() {
    let requests = connect().await;
    let mut typing = open(&requests, "/echo").await;
    for _ in 0..5 {
        let mut streams = Vec::new();
        for _ in 0..200 {
            streams.push(open(&requests, "/flood").await);
        }
        for (_, output) in &mut streams {
            output.reset();
        }
        drop(streams);
        echo(&mut typing, b"k").await;
    }
    // Resets before the answer has been seen, too.
    for _ in 0..1_000 {
        let mut requests = requests.clone().ready().await.unwrap();
        let (_, mut stream) =
            requests.send_request(Request::get("http://agent/echo").body(()).unwrap(), false).unwrap();
        stream.send_reset(Reason::CANCEL);
    }
    echo(&mut typing, b"k").await;
}

#[tokio::test]
async fn a_reset_reaches_a_writer_that_waits_and_a_reader() {
    let requests = connect().await;
    let (mut input, mut output) = open(&requests, "/reset").await;
    let closed =
        timeout(DEADLINE, async { while output.write(Bytes::from(vec![0; 100_000])).await.is_ok() {} }).await;
    assert!(closed.is_ok(), "the writer did not notice the reset");
    assert_eq!(output.closed().await.reason, Some(Reason::CANCEL));
    assert_eq!(timeout(DEADLINE, input.read()).await.unwrap().unwrap_err().reason, Some(Reason::CANCEL));
}

#[tokio::test]
async fn dropping_an_unfinished_half_resets_and_a_lost_connection_closes() {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let serving = tokio::spawn(async move {
        let mut connection = server(theirs).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let mut output = Outbound::new(respond.send_response(Response::new(()), false).unwrap());
        let (request_2, mut respond_2) = connection.accept().await.unwrap().unwrap();
        let mut output_2 = Outbound::new(respond_2.send_response(Response::new(()), false).unwrap());
        tokio::spawn(async move { while connection.accept().await.is_some() {} });
        assert_eq!(output.closed().await.reason, Some(Reason::CANCEL));
        drop(request);
        let lost = output_2.closed().await;
        drop(request_2);
        lost
    });
    let (requests, connection) = client(ours).await.unwrap();
    let connection = tokio::spawn(connection);
    let first = open(&requests, "/").await;
    let (mut input, second) = open(&requests, "/").await;
    drop(first);
    // The first has been seen as reset when a round trip later the second is still open.
    assert!(timeout(Duration::from_millis(1), input.read()).await.is_err());
    connection.abort();
    let lost = timeout(DEADLINE, serving).await.unwrap().unwrap();
    assert_ne!(lost.reason, Some(Reason::CANCEL));
    drop(second);
}

/// h2 that has a ping to write and cannot does not read: on a stream that is full both ways two ends that ask would stop each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_both_ways_is_not_stopped_by_asking_whether_somebody_is_there() {
    const LIMIT: Duration = Duration::from_millis(50);
    let (ours, theirs) = tokio::io::duplex(64);
    tokio::spawn(async move {
        let (theirs, pulse) = Listened::new(theirs);
        let mut connection = server(theirs).await.unwrap();
        let mut gone = Box::pin(silence(connection.ping_pong(), &pulse, LIMIT));
        loop {
            let (request, mut respond) = tokio::select! {
                request = connection.accept() => request.unwrap().unwrap(),
                why = &mut gone => panic!("the server: {why}"),
            };
            let output = Outbound::new(respond.send_response(Response::new(()), false).unwrap());
            tokio::spawn(async move {
                let path = request.uri().path().to_owned();
                serve(&path, Inbound::new(request.into_body()), output).await;
            });
        }
    });
    let (ours, pulse) = Listened::new(ours);
    let (requests, mut connection) = client(ours).await.unwrap();
    let pings = connection.ping_pong();
    let connection = tokio::spawn(async move {
        tokio::select! {
            result = connection => format!("{result:?}"),
            why = silence(pings, &pulse, LIMIT) => why,
        }
    });
    let mut bulk = JoinSet::new();
    for _ in 0..4 {
        let (mut input, up) = open(&requests, "/flood").await;
        let (down, mut output) = open(&requests, "/count").await;
        bulk.spawn(async move {
            for _ in 0..200 {
                assert!(input.read().await.unwrap().is_some());
            }
            drop(up);
        });
        bulk.spawn(async move {
            for _ in 0..200 {
                output.write(Bytes::from(vec![7; 100_000])).await.unwrap();
            }
            drop(down);
        });
    }
    let done = timeout(DEADLINE, async {
        while let Some(done) = bulk.join_next().await {
            done.unwrap();
        }
    })
    .await;
    assert!(done.is_ok(), "it stands still");
    assert!(!connection.is_finished(), "{:?}", connection.await);
}
