use futures_util::stream;
use tokio::io::{duplex, join};
use tokio_util::io::StreamReader;

use super::*;

const PROGRAM: &[u8] = b"program";

/// Delivers to a shell that says `first`, reads what is sent, and says `then`; what it got, and the result with what was left to read.
async fn delivered(first: &str, then: &str) -> (Vec<u8>, io::Result<Vec<u8>>) {
    let (mut near, mut far) = duplex(4);
    let shell = async {
        far.write_all(first.as_bytes()).await.unwrap();
        let mut got = vec![0; if first.starts_with(SEND) { PROGRAM.len() } else { 0 }];
        far.read_exact(&mut got).await.unwrap();
        far.write_all(then.as_bytes()).await.unwrap();
        drop(far);
        got
    };
    let server = async {
        deliver(&mut near, PROGRAM).await?;
        let mut rest = Vec::new();
        near.read_to_end(&mut rest).await?;
        Ok(rest)
    };
    tokio::join!(shell, server)
}

#[tokio::test]
async fn what_is_there_is_not_sent_and_what_is_not_is() {
    let (got, rest) = delivered("here\n", "\nagent").await;
    assert_eq!((got.as_slice(), rest.unwrap().as_slice()), (b"".as_slice(), b"\nagent".as_slice()));
    let (got, rest) = delivered("send\n", "here\nagent").await;
    assert_eq!((got.as_slice(), rest.unwrap().as_slice()), (PROGRAM, b"agent".as_slice()));
}

#[tokio::test]
async fn a_pod_that_says_something_else_is_not_believed() {
    for (first, then) in
        [("", ""), ("send\n", ""), ("hello\n", ""), ("send\n", "send\n"), ("\x1b]0;a very long line", "")]
    {
        let (_, result) = delivered(first, then).await;
        let said = result.unwrap_err().to_string();
        assert!(!said.contains('\x1b'), "{said}");
    }
}

#[tokio::test]
async fn a_pod_that_takes_nothing_is_told_by_its_last_words() {
    let said = stream::iter([Ok("send\n".as_bytes()), Err(io::Error::other("no space left on device"))]);
    let (refusing, gone) = duplex(1);
    drop(gone);
    let mut stream = join(StreamReader::new(said), refusing);
    let said = deliver(&mut stream, PROGRAM).await.unwrap_err().to_string();
    assert_eq!(said, "no space left on device");
}

#[test]
fn the_waiting_shell_has_nothing_that_kubernetes_would_replace() {
    assert!(!WAIT.contains("$(") && !WAIT.contains("$$"));
}
