//! Changes to bytes that once meant something: what random bytes alone would never reach.

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;

/// Pieces that parsers are known to stumble over.
const BITS: [&[u8]; 24] = [
    b"\n",
    b"\r\n",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\u0000",
    b"\"",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"null",
    b"true",
    b"-0",
    b"1e999",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"\"type\":\"result\"",
    b"\"type\":\"control_request\"",
    b"\"parent_tool_use_id\":\"x\"",
    b"\"uuid\":\"00000000-0000-0000-0000-000000000001\"",
    b"\"user_message_uuids\":[]",
    b"\x1b]0;title\x07",
];

/// Changes something; what comes out is at most a little longer than what went in.
pub fn mutate(random: &mut StdRng, bytes: &mut Vec<u8>) {
    for _ in 0..random.random_range(1..=4) {
        once(random, bytes);
    }
}

fn once(random: &mut StdRng, bytes: &mut Vec<u8>) {
    let length = bytes.len();
    let at = random.random_range(0..=length);
    let span = at..(at + random.random_range(0..=64)).min(length);
    match random.random_range(0..8) {
        0 if at < length => bytes[at] ^= 1 << random.random_range(0..8),
        1 => drop(bytes.drain(span)),
        2 => {
            let copy = bytes[span].to_vec();
            bytes.splice(at..at, copy);
        }
        3 => {
            let bit = BITS.choose(random).copied().unwrap_or_default();
            bytes.splice(at..at, bit.iter().copied());
        }
        4 => {
            let bit = BITS.choose(random).copied().unwrap_or_default();
            bytes.splice(span, bit.iter().copied());
        }
        5 => bytes.truncate(at),
        // Deeper than any stack would like.
        6 => {
            let deep = [b"[".as_slice(), b"{\"a\":"]
                .choose(random)
                .copied()
                .unwrap_or_default();
            bytes.splice(at..at, deep.repeat(random.random_range(1..2_000)));
        }
        _ => {
            let noise: Vec<u8> = (0..random.random_range(1..16)).map(|_| random.random()).collect();
            bytes.splice(at..at, noise);
        }
    }
}

/// The same bytes in pieces, cut anywhere.
pub fn pieces<'a>(random: &mut StdRng, bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let mut rest = bytes;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(random.random_range(1..=rest.len().min(4_096)));
        pieces.push(piece);
        rest = after;
    }
    pieces
}
