//! Cuts a byte stream only between characters.
use bytes::{Bytes, BytesMut};

/// Holds back the beginning of a UTF-8 character at the end of a piece until the rest has come: three bytes at most. Bytes that
/// begin no character are let through at once; nothing is ever changed.
#[derive(Debug, Default)]
pub struct Utf8Tail {
    held: Bytes,
}

impl Utf8Tail {
    /// The next piece, cut at a character. May be empty.
    pub fn push(&mut self, piece: Bytes) -> Bytes {
        let mut piece = if self.held.is_empty() {
            piece
        } else {
            let mut joined = BytesMut::with_capacity(self.held.len() + piece.len());
            joined.extend_from_slice(&self.held);
            joined.extend_from_slice(&piece);
            joined.freeze()
        };
        self.held = piece.split_off(piece.len() - unfinished(&piece));
        piece
    }

    /// What is still held: the stream ended within a character.
    pub fn finish(&mut self) -> Bytes {
        std::mem::take(&mut self.held)
    }
}

/// How many bytes at the end begin a character that more bytes could complete.
fn unfinished(bytes: &[u8]) -> usize {
    (1..=3usize.min(bytes.len()))
        .find(|back| {
            let tail = bytes.get(bytes.len() - back..).unwrap_or_default();
            // `error_len() == None` is the standard library's word for: valid as far as it goes.
            matches!(std::str::from_utf8(tail), Err(error) if error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way to cut it in two.
    fn cuts(bytes: &'static [u8]) -> impl Iterator<Item = (Bytes, Bytes)> {
        let whole = Bytes::from_static(bytes);
        (0..=bytes.len()).map(move |at| (whole.slice(..at), whole.slice(at..)))
    }

    #[test]
    fn a_character_is_never_cut_and_no_byte_is_lost() {
        let text = "aé€😀z\u{7ff}\u{ffff}\u{10ffff}";
        for (first, second) in cuts(text.as_bytes()) {
            let mut tail = Utf8Tail::default();
            let pieces = [tail.push(first), tail.push(second), tail.finish()];
            for piece in &pieces {
                assert!(std::str::from_utf8(piece).is_ok(), "{piece:?}");
            }
            assert_eq!(pieces.concat(), text.as_bytes());
        }
    }

    #[test]
    fn bytes_that_are_no_text_pass_unchanged_and_are_not_held() {
        for bytes in
            [&b"\xff\xfe"[..], b"a\x80\x80\x80", b"\xc0\xaf", b"\xed\xa0\x80x", b"\xf5\x80", b"\xe2\x28\xa1"]
        {
            let bytes: &'static [u8] = bytes;
            for (first, second) in cuts(bytes) {
                let mut tail = Utf8Tail::default();
                assert_eq!([tail.push(first), tail.push(second), tail.finish()].concat(), bytes);
            }
        }
        let mut tail = Utf8Tail::default();
        assert_eq!(tail.push(Bytes::from_static(b"a\xff")), b"a\xff"[..]);
    }

    #[test]
    fn a_stream_that_ends_within_a_character_still_ends_with_its_bytes() {
        let mut tail = Utf8Tail::default();
        assert_eq!(tail.push(Bytes::from_static(b"x\xf0\x9f")), b"x"[..]);
        assert_eq!(tail.push(Bytes::from_static(b"\x98")), b""[..]);
        assert_eq!(tail.finish(), b"\xf0\x9f\x98"[..]);
    }
}
