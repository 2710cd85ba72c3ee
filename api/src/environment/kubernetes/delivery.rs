//! The agent's way into a pod: the first exec stream brings it, and goes on as the connection to it.
//!
//! Until then the session container's first process is its image's shell, which waits ([`WAIT`]). The exec ([`CONNECT`]) takes the
//! program from its stdin, wakes the shell, which becomes the agent, and becomes `agent connect` itself. So a pod needs neither a
//! second container nor a volume, and its image a shell and the programs named in [`PLACE`]. Whatever is done twice, by two servers at
//! once or because a candidate has deleted the file, ends the same. Does not know what an exec stream is.
use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// What the exec says when it wants the program.
const SEND: &str = "send";
/// What it says before it becomes `agent connect`.
const HERE: &str = "here";
/// A word has no more bytes than this.
const WORD: usize = 16;

/// Sets `a` to the agent's file, in the first directory that can be written: the same for the waiting shell and the exec, whichever
/// comes first.
macro_rules! place {
    () => {
        r#"
for program in head wc chmod mv rm mkdir sleep; do
    command -v "$program" >/dev/null || { echo "the image has no $program, which the agent needs to come in" >&2; exit 72; }
done
a=
for directory in /tmp /var/tmp "$HOME"; do
    if [ -w "$directory/.carrel" ] || mkdir -m 700 "$directory/.carrel" 2>/dev/null; then
        a=$directory/.carrel/agent
        break
    fi
done
if [ -z "$a" ]; then
    echo "the image lets its user write neither to /tmp nor to /var/tmp nor to its home, and the agent has to be put somewhere" >&2
    exit 73
fi
"#
    };
}

/// The session container's first process, a shell script whose arguments are those of `agent serve`. The exec may come at any line of
/// it: before the trap its signal is lost, and the file is seen; after that the trap is taken.
/// Kubernetes replaces `$(NAME)` and `$$` in a container's command: neither may stand here.
pub(super) const WAIT: &str = concat!(
    r#"
become() {
    [ -x "$a" ] || return 0
    if [ -n "$waiting" ]; then kill "$waiting"; wait "$waiting"; fi 2>/dev/null
    exec "$a" serve "$@"
}
a= waiting=
trap 'become "$@"' USR1
"#,
    place!(),
    r#"
become "$@"
while :; do
    sleep 600 &
    waiting=$!
    wait "$waiting"
done
"#
);

/// The exec, a shell script: its arguments are the program's size in bytes and those of `agent connect`.
pub(super) const CONNECT: &str = concat!(
    place!(),
    r#"
size=$1
shift
if [ ! -x "$a" ]; then
    echo send
    if head -c "$size" >"$a.$$" && [ "$(wc -c <"$a.$$")" -eq "$size" ] && chmod 700 "$a.$$" && mv -f "$a.$$" "$a"; then
        kill -USR1 1
    else
        rm -f "$a.$$"
        echo "the agent could not be written to $a" >&2
        exit 74
    fi
fi
echo here
exec "$a" connect "$@"
"#
);

/// Sends the program if the other side, where [`CONNECT`] runs, has none. What is read next is the agent's.
///
/// # Errors
/// What the other side's end says, or that it says something else than it should.
pub(super) async fn deliver<S>(stream: &mut S, program: &[u8]) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match word(stream).await?.as_str() {
        HERE => return Ok(()),
        SEND => {}
        other => return Err(unexpected(other)),
    }
    let sent = async {
        stream.write_all(program).await?;
        stream.flush().await
    }
    .await;
    // When it does not take the program, its last words say why.
    match (word(stream).await, sent) {
        (Ok(word), Ok(())) if word == HERE => Ok(()),
        (Ok(word), Ok(())) => Err(unexpected(&word)),
        (Ok(_), Err(error)) | (Err(error), _) => Err(error),
    }
}

/// One line, without its end. Byte by byte: what follows is somebody else's.
async fn word(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut word = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(String::from_utf8_lossy(&word).into_owned()),
            byte => word.push(byte),
        }
        if word.len() > WORD {
            return Err(unexpected(&String::from_utf8_lossy(&word)));
        }
    }
}

fn unexpected(said: &str) -> io::Error {
    let said: String = said.chars().filter(|letter| !letter.is_control()).collect();
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the pod's shell says {said:?} where the agent should be"),
    )
}

#[cfg(test)]
#[path = "delivery/tests.rs"]
mod tests;
