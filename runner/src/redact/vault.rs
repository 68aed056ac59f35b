//! All values that the runner holds or has held: Secrets are read again for each use, and what is used must not be seen.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use secrecy::{ExposeSecret as _, SecretString};

use super::{Held, Redactor};

/// See the module. Clones share what they know.
#[derive(Clone, Default)]
pub struct Vault(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    held: Vec<Held>,
    /// Name and value of each: most reads find what was found before.
    seen: HashSet<(String, String)>,
    /// Made of what is held; `None`: something came since.
    redactor: Option<Arc<Redactor>>,
}

impl Vault {
    /// Remembers a value, for good: an old one is as secret as the one that replaced it.
    pub fn learn(&self, name: &str, value: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if value.trim().is_empty() || !known.seen.insert((name.to_owned(), value.to_owned())) {
            return;
        }
        // `Bearer token`, the whole value of a header: the token alone must not be seen either.
        let token = value
            .trim()
            .split_once(' ')
            .filter(|(scheme, _)| matches!(*scheme, "Bearer" | "Basic"));
        let token = token.map(|(_, token)| token.trim());
        known.held.extend([value].into_iter().chain(token).map(|value| Held {
            name: name.to_owned(),
            value: SecretString::from(value),
        }));
        known.redactor = None;
    }

    /// Remembers values.
    pub fn learn_all(&self, held: impl IntoIterator<Item = Held>) {
        for held in held {
            self.learn(&held.name, held.value.expose_secret());
        }
    }

    /// A redactor of all that was learned until now.
    pub fn redactor(&self) -> Arc<Redactor> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(redactor) = &known.redactor {
            return Arc::clone(redactor);
        }
        let redactor = Arc::new(Redactor::new(known.held.iter().cloned()));
        known.redactor = Some(Arc::clone(&redactor));
        redactor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_learned_later_is_taken_out_from_then_on_and_what_was_known_still_is() {
        let vault = Vault::default();
        vault.learn_all([Held {
            name: "API_TOKEN".into(),
            value: "fake-old-1".into(),
        }]);
        let early = vault.redactor();
        vault.clone().learn("API_TOKEN", "fake-new-2");
        vault.learn("mcp", "Bearer fake-of-a-header");
        let text = "fake-old-1 fake-new-2 fake-of-a-header";
        assert_eq!(early.text(text), "[redacted API_TOKEN] fake-new-2 fake-of-a-header");
        assert_eq!(
            vault.redactor().text(text),
            "[redacted API_TOKEN] [redacted API_TOKEN] [redacted mcp]"
        );
        let now = vault.redactor();
        vault.learn("API_TOKEN", "fake-new-2");
        assert!(Arc::ptr_eq(&now, &vault.redactor()), "nothing new, nothing made");
    }
}
