//! TCP to the environment's own loopback: `CONNECT 127.0.0.1:{port}`.
use bytes::Bytes;
use carrel_agent::flow::{Closed, Inbound, Outbound};
use http::Response;
use tokio::{
    io::AsyncWriteExt as _,
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::{
    process::read_some,
    request::{Exchange, Refusal},
};

/// Connects and passes bytes in both directions, each with its own end.
pub async fn connect(authority: &str, exchange: Exchange) {
    let stream = match open(authority).await {
        Ok(stream) => stream,
        Err(refusal) => return exchange.refuse(&refusal),
    };
    let Some((input, mut output)) = exchange.open(Response::new(())) else { return };
    let (read, write) = stream.into_split();
    let sending = async {
        // A target that takes no more may still send.
        let _ = send(input, write).await;
        Ok(())
    };
    let receiving = async {
        receive(&read, &mut output).await?;
        // Told at once: the client may wait for it before it ends its own direction.
        output.finish();
        Ok::<(), Closed>(())
    };
    // What was not finished is reset when dropped.
    let _ = tokio::try_join!(sending, receiving);
}

async fn open(authority: &str) -> Result<TcpStream, Refusal> {
    let (host, port) = target(authority).ok_or_else(|| {
        Refusal::BadRequest("only 127.0.0.1, [::1] and localhost can be connected to".into())
    })?;
    let unreachable = |error| Refusal::Unreachable(format!("nothing answers at port {port}: {error}"));
    let stream = TcpStream::connect((host, port)).await.map_err(unreachable)?;
    stream.set_nodelay(true).map_err(unreachable)?;
    Ok(stream)
}

fn target(authority: &str) -> Option<(&'static str, u16)> {
    let (host, port) = authority.rsplit_once(':')?;
    let host = match host {
        "127.0.0.1" | "localhost" => "127.0.0.1",
        "[::1]" => "::1",
        _ => return None,
    };
    Some((host, port.parse().ok().filter(|port| *port != 0)?))
}

async fn send(mut input: Inbound, mut write: OwnedWriteHalf) -> Result<(), Closed> {
    while let Some(bytes) = input.read().await? {
        if write.write_all(&bytes).await.is_err() {
            return Err(Closed { reason: None });
        }
    }
    // The other side may be gone; then there is nobody to tell.
    let _ = write.shutdown().await;
    Ok(())
}

async fn receive(read: &OwnedReadHalf, output: &mut Outbound) -> Result<(), Closed> {
    loop {
        let bytes: Bytes = tokio::select! {
            closed = output.closed() => return Err(closed),
            ready = read.readable() => match ready.and_then(|()| read_some(|buffer| read.try_read(buffer))) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(_) => return Err(Closed { reason: None }),
            },
        };
        if bytes.is_empty() {
            return Ok(());
        }
        output.write(bytes).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::target;

    #[test]
    fn only_the_loopback_is_a_target() {
        assert_eq!(target("127.0.0.1:80"), Some(("127.0.0.1", 80)));
        assert_eq!(target("localhost:80"), Some(("127.0.0.1", 80)));
        assert_eq!(target("[::1]:65535"), Some(("::1", 65535)));
        for bad in [
            "",
            "127.0.0.1",
            "127.0.0.1:0",
            "127.0.0.1:65536",
            "127.0.0.2:80",
            "10.0.0.1:80",
            "a@127.0.0.1:80",
            "::1:80",
        ] {
            assert_eq!(target(bad), None, "{bad}");
        }
    }
}
