//! What a terminal shows, so that somebody who attaches late sees it: a model fed with the process's output.
//!
//! The model is only fed up to the last safe place. An escape sequence or character that has not come whole yet is held back and
//! replayed raw after a redraw, so that its rest, which comes live, finds its beginning.
use std::panic::{AssertUnwindSafe, catch_unwind};

use shpool_vterm::{ContentRegion, Size, Term};

/// Lines above the screen that a redraw brings back.
const HISTORY: usize = 500;
/// Longest sequence that is held back, bytes. Of a longer one, a late attachment sees nothing.
const HELD: usize = 16 * 1024;
/// Longest run of characters that may belong together, bytes.
const GRAPHEME: usize = 64;
/// Largest redraw, bytes: beyond it, first the history and then colours and links are left out.
const REDRAW: usize = 400 * 1024;

/// A terminal's contents.
pub struct Screen {
    term: Term,
    size: Size,
    held: Vec<u8>,
    /// Bytes of `held` that the model can be fed with.
    safe: usize,
    state: State,
    /// The unfinished sequence was longer than [`HELD`].
    overlong: bool,
}

/// Where in the grammar of ECMA-48 the output stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ground,
    Escape,
    /// After ESC and intermediate bytes, which one more byte ends.
    Intermediate,
    Csi,
    /// An operating system command, which BEL ends too.
    Osc,
    /// A device control, privacy or application string.
    String,
}

impl Screen {
    /// An empty one.
    pub fn new(cols: u16, rows: u16) -> Self {
        let size = Size { width: cols.into(), height: rows.into() };
        Self {
            term: Term::new(HISTORY, size),
            size,
            held: Vec::new(),
            safe: 0,
            state: State::Ground,
            overlong: false,
        }
    }

    /// Takes output of the process.
    pub fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let at = self.held.len();
            self.held.push(*byte);
            self.step(*byte, at);
        }
        if self.held.len().saturating_sub(self.safe) > HELD {
            self.safe = self.held.len();
            self.overlong = true;
        }
        let held = std::mem::take(&mut self.held);
        let (safe, rest) = held.split_at_checked(self.safe).unwrap_or((&held, &[]));
        self.model(|term| term.process(safe));
        self.held = rest.to_vec();
        self.safe = 0;
    }

    fn step(&mut self, byte: u8, at: usize) {
        let after = at.saturating_add(1);
        let next = match (self.state, byte) {
            (_, 0x1b) => {
                if self.state == State::Ground {
                    self.safe = at;
                }
                State::Escape
            }
            // CAN and SUB end anything.
            (_, 0x18 | 0x1a) => State::Ground,
            (State::Ground, _) => {
                match byte {
                    // What follows may join a printed character, but not a control; and ASCII joins nothing before it.
                    0..0x20 | 0x7f => self.safe = after,
                    0x20..0x7f => self.safe = at,
                    _ if at.saturating_sub(self.safe) > GRAPHEME && byte >= 0xc0 => self.safe = at,
                    _ => {}
                }
                return;
            }
            (State::Escape, b'[') => State::Csi,
            (State::Escape, b']') => State::Osc,
            (State::Escape, b'P' | b'X' | b'^' | b'_') => State::String,
            (State::Escape | State::Intermediate, 0x20..0x30) => State::Intermediate,
            (State::Escape | State::Intermediate, 0x30..0x7f)
            | (State::Csi, 0x40..0x7f)
            | (State::Osc, 0x07) => State::Ground,
            (state, _) => state,
        };
        self.state = next;
        if next == State::Ground {
            self.safe = after;
            self.overlong = false;
        }
    }

    /// Takes another size.
    pub fn resize(&mut self, cols: u16, rows: u16) {
        let size = Size { width: cols.into(), height: rows.into() };
        self.size = size;
        self.model(|term| term.resize(size));
    }

    /// What brings any terminal, in whatever state, to show what this one shows and to understand what comes next.
    pub fn redraw(&mut self, history: bool) -> Vec<u8> {
        // Whatever string the terminal may be in the middle of ends here.
        let mut redraw = b"\x1b\\".to_vec();
        let mut contents = self.contents(if history { ContentRegion::All } else { ContentRegion::Screen });
        if contents.len() > REDRAW && history {
            contents = self.contents(ContentRegion::Screen);
        }
        if contents.len() > REDRAW {
            contents = plain(&contents);
        }
        redraw.append(&mut contents);
        if self.overlong {
            // Its rest must not be taken for text: a string that terminals ignore swallows it.
            redraw.extend_from_slice(match self.state {
                State::Osc => b"\x1b]9999;",
                State::String => b"\x1b_",
                _ => b"",
            });
        }
        redraw.extend_from_slice(&self.held);
        redraw
    }

    fn contents(&mut self, region: ContentRegion) -> Vec<u8> {
        let mut contents = Vec::new();
        self.model(|term| contents = term.contents(region));
        contents
    }

    /// What the process writes is anything, and a fault of the model must cost no more than what was shown.
    fn model(&mut self, work: impl FnOnce(&mut Term)) {
        if catch_unwind(AssertUnwindSafe(|| work(&mut self.term))).is_err() {
            self.term = Term::new(HISTORY, self.size);
        }
    }
}

/// The same without colours (SGR) and links (OSC 8), which can be many times the text.
fn plain(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, after)) = rest.split_first() {
        let length =
            if *first == 0x1b { sequence(after).map(|length| length.saturating_add(1)) } else { None };
        let (whole, next) = rest.split_at(length.unwrap_or(1).min(rest.len()));
        let is_link = whole.starts_with(b"\x1b]8;");
        let is_colour = whole.starts_with(b"\x1b[") && whole.ends_with(b"m") && !whole.contains(&b'>');
        if !is_link && !is_colour {
            plain.extend_from_slice(whole);
        }
        rest = next;
    }
    plain
}

/// Length of the CSI or OSC sequence whose ESC stands before `bytes`.
fn sequence(bytes: &[u8]) -> Option<usize> {
    let body = bytes.get(1..)?;
    let end = match bytes.first()? {
        b'[' => body.iter().position(|byte| (0x40..0x7f).contains(byte))?,
        b']' => {
            let bell = body.iter().position(|byte| *byte == 7);
            let terminator =
                body.windows(2).position(|pair| pair == b"\x1b\\").map(|at| at.saturating_add(1));
            bell.into_iter().chain(terminator).min()?
        }
        _ => return None,
    };
    Some(end.saturating_add(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a terminal shows that has got `redraw`.
    fn shown(bytes: &[u8]) -> String {
        let mut term = Term::new(24, Size { width: 80, height: 24 });
        term.process(bytes);
        String::from_utf8_lossy(&term.contents(ContentRegion::Screen)).into_owned()
    }

    #[test]
    fn a_redraw_anywhere_and_the_rest_show_what_all_bytes_show() {
        let whole = "plain \u{1b}[1;31mred\u{1b}[0m \u{1b}]0;title\u{7}\u{1b}[5;10H\u{1b}[4mÄ日本 e\u{301}\u{1b}[?2004h\u{1b}[?1004h\
            \u{1b}[?1000;1006h\u{1b}P$q m\u{1b}\\\u{1b}(0qqq\u{1b}(B\u{1b}[?1049h\u{1b}[2;3Halternate\u{1b}7\u{1b}[9;9H\u{1b}8end"
            .as_bytes();
        let expected = shown(whole);
        for cut in 0..=whole.len() {
            let (before, after) = whole.split_at(cut);
            let mut screen = Screen::new(80, 24);
            screen.feed(before);
            let mut replay = b"rubbish\x1b[7m\x1b]2;half a title".to_vec();
            replay.extend(screen.redraw(true));
            replay.extend_from_slice(after);
            assert_eq!(shown(&replay), expected, "cut at {cut}");
        }
    }

    #[test]
    fn fed_bytewise_it_shows_the_same() {
        let whole = b"\x1b[2J\x1b[3;3Hhello \xe2\x82\xac\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\";
        let mut at_once = Screen::new(80, 24);
        at_once.feed(whole);
        let mut bytewise = Screen::new(80, 24);
        for byte in whole {
            bytewise.feed(&[*byte]);
        }
        assert_eq!(at_once.redraw(false), bytewise.redraw(false));
    }

    #[test]
    fn an_endless_string_is_not_kept_and_its_rest_not_shown() {
        let mut screen = Screen::new(80, 24);
        screen.feed(b"before\x1bPq");
        for _ in 0..100 {
            screen.feed(&[b'#'; 4096]);
        }
        assert!(screen.held.len() <= HELD);
        let mut replay = screen.redraw(false);
        replay.extend_from_slice(b"###\x1b\\after");
        let shown = shown(&replay);
        assert!(shown.contains("before") && shown.contains("after") && !shown.contains('#'), "{shown}");
    }

    #[test]
    fn a_redraw_is_bounded() {
        let mut screen = Screen::new(200, 50);
        for index in 0..20_000_u32 {
            let [_, red, green, blue] = index.to_be_bytes();
            screen.feed(
                format!(
                    "\x1b]8;;http://example.org/{index}/{}\x1b\\\x1b[38;2;{red};{green};{blue}mx",
                    "p".repeat(99)
                )
                .as_bytes(),
            );
        }
        let redraw = screen.redraw(true);
        assert!(redraw.len() <= REDRAW, "{}", redraw.len());
        assert!(redraw.iter().filter(|byte| **byte == b'x').count() >= 200 * 49);
    }

    #[test]
    fn random_bytes_and_sizes_do_no_harm() {
        let mut seed: u32 = 7;
        let mut random = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        };
        let alphabet =
            b"\x1b\x1b\x1b[[[]]P0123456789;;;?hlmHJKABCDLMPX@rsuq\x07\\\n\r\t ax\xe2\x82\xac\xcc\x81";
        let mut screen = Screen::new(80, 24);
        for _ in 0..3_000 {
            let bytes: Vec<u8> = (0..64).map(|_| alphabet[random() as usize % alphabet.len()]).collect();
            screen.feed(&bytes);
            if random() % 8 == 0 {
                let cols = u16::try_from(random() % 500).unwrap() + 1;
                let rows = u16::try_from(random() % 300).unwrap() + 1;
                screen.resize(cols, rows);
            }
            if random() % 16 == 0 {
                assert!(screen.redraw(true).len() <= REDRAW + HELD + 64);
            }
        }
    }
}
