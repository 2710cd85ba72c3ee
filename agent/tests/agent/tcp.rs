//! CONNECT to the loopback.
use http::{HeaderMap, Method, StatusCode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::support::Agent;

#[tokio::test]
async fn bytes_pass_both_ways_and_each_way_ends_by_itself() {
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    let service = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        stream.write_all(format!("{} bytes", got.len()).as_bytes()).await.unwrap();
    });
    let mut stream = agent.open(Method::CONNECT, &authority, HeaderMap::new()).await.unwrap();
    stream.send(&"x".repeat(3_000_000)).await;
    stream.output.finish();
    assert_eq!(stream.end().await.text(), "3000000 bytes");
    service.await.unwrap();
}

#[tokio::test]
async fn a_port_where_nothing_listens_and_other_hosts_are_refused() {
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    drop(listener);
    let refused = agent.open(Method::CONNECT, &authority, HeaderMap::new()).await.err().unwrap();
    assert_eq!(refused.status, StatusCode::BAD_GATEWAY);
    assert!(refused.sentence.starts_with("nothing answers at port"), "{}", refused.sentence);
    for other in ["127.0.0.2:22", "example.org:80", "127.0.0.1:0"] {
        let refused = agent.open(Method::CONNECT, other, HeaderMap::new()).await.err().unwrap();
        assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    }
}
