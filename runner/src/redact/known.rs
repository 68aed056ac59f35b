//! Keys that are told by their shape.

/// A shape: a prefix and what follows it.
pub struct Known {
    /// What it begins with.
    pub prefix: &'static str,
    /// Fewest characters behind the prefix.
    min: usize,
    /// Most characters: a longer run is something else, such as an image in base64.
    max: usize,
    allowed: fn(u8) -> bool,
    /// What else must hold for the characters behind the prefix. Asked once for each run, or of few characters.
    check: fn(&[u8]) -> bool,
    /// How many dots must be among them.
    dots: Option<usize>,
}

/// The run of allowed characters that was looked at last for a shape. The agent can write a line that is one run and holds
/// the prefix everywhere: it is walked through once, not once for each of them.
#[derive(Clone, Copy, Default)]
pub struct Run {
    from: usize,
    end: usize,
    dots: usize,
}

impl Run {
    /// What is left of the run at `from`, which never goes back.
    fn at(&mut self, bytes: &[u8], from: usize, allowed: fn(u8) -> bool) -> Self {
        let dots = |bytes: &[u8]| bytes.split(|b| *b == b'.').count() - 1;
        if from < self.from || from >= self.end {
            let length = bytes[from..].iter().take_while(|b| allowed(**b)).count();
            *self = Self {
                from,
                end: from + length,
                dots: dots(&bytes[from..from + length]),
            };
        } else {
            self.dots -= dots(&bytes[self.from..from]);
            self.from = from;
        }
        *self
    }
}

const ANY: usize = 4096;

/// The shapes.
pub const KNOWN: [Known; 18] = [
    known("sk-ant-", 16, ANY, word),
    known("sk-lf-", 16, ANY, word),
    known("sk-proj-", 20, ANY, word),
    known("ghp_", 30, ANY, alphanumeric),
    known("gho_", 30, ANY, alphanumeric),
    known("ghu_", 30, ANY, alphanumeric),
    known("ghs_", 30, ANY, alphanumeric),
    known("ghr_", 30, ANY, alphanumeric),
    known("github_pat_", 22, ANY, word),
    known("glpat-", 20, ANY, dotted),
    // Counted as a run of base64, checked to be capitals and digits: an image that holds the prefix is no key.
    Known {
        check: capitals,
        ..known("AKIA", 16, 16, blob)
    },
    Known {
        check: capitals,
        ..known("ASIA", 16, 16, blob)
    },
    known("AIza", 35, 35, word),
    known("xoxb-", 20, ANY, word),
    known("xoxp-", 20, ANY, word),
    known("ya29.", 20, ANY, dotted),
    // A token has digits; a sentence about bearers has none.
    Known {
        check: |rest| rest.iter().any(u8::is_ascii_digit),
        ..known("Bearer ", 20, ANY, token)
    },
    // A JWT: three parts.
    Known {
        dots: Some(2),
        ..known("eyJ", 30, ANY, dotted)
    },
];

const fn known(prefix: &'static str, min: usize, max: usize, allowed: fn(u8) -> bool) -> Known {
    Known {
        prefix,
        min,
        max,
        allowed,
        check: |_| true,
        dots: None,
    }
}

impl Known {
    /// Whether a key may begin with this text, which goes on.
    pub fn may_begin(&self, text: &str) -> bool {
        match text.strip_prefix(self.prefix) {
            Some(rest) => rest.len() <= self.max && rest.bytes().all(self.allowed),
            None => self.prefix.starts_with(text),
        }
    }

    /// Where the key whose prefix ends at `from` ends; `None`: it is no key.
    pub fn end(&self, bytes: &[u8], from: usize, run: &mut Run) -> Option<usize> {
        let Run { end, dots, .. } = run.at(bytes, from, self.allowed);
        let fits = (self.min..=self.max).contains(&(end - from));
        let is_key = fits && self.dots.is_none_or(|wanted| wanted == dots) && (self.check)(&bytes[from..end]);
        is_key.then_some(end)
    }
}

fn alphanumeric(b: u8) -> bool {
    b.is_ascii_alphanumeric()
}

fn blob(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/')
}

fn capitals(rest: &[u8]) -> bool {
    rest.iter().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

fn word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')
}

fn dotted(b: u8) -> bool {
    word(b) || b == b'.'
}

fn token(b: u8) -> bool {
    dotted(b) || matches!(b, b'~' | b'+' | b'/' | b'=')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_run_that_is_remembered_is_the_run_that_is_there(
            parts in prop::collection::vec(prop_oneof![Just("eyJ"), Just("sk-ant-"), Just("."), Just("a1-"), Just(" "), Just("/")], 0..40),
        ) {
            let text = parts.concat();
            for known in &KNOWN {
                let mut run = Run::default();
                for from in 0..text.len() {
                    let alone = known.end(text.as_bytes(), from, &mut Run::default());
                    prop_assert_eq!(known.end(text.as_bytes(), from, &mut run), alone);
                }
            }
        }
    }
}
