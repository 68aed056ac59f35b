//! How a gateway knows another: an address may by now be somebody else's, and callers' tokens must not get there.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::store::Peer;

/// What gateways on one database know.
#[derive(Clone)]
pub(super) struct Peers {
    secret: String,
    /// Of this gateway.
    address: Option<String>,
}

impl Peers {
    pub(super) fn new(secret: String, address: Option<String>) -> Self {
        Self { secret, address }
    }

    /// The address is a part of it: whoever passes a question on to a real gateway gets an answer for that one's address.
    fn mac(&self, address: &str, question: &str) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.secret.as_bytes()).ok()?;
        mac.update(format!("agentic-gateway\n{address}\n{question}").as_bytes());
        Some(mac)
    }
}

impl Peer for Peers {
    fn answer(&self, question: &str) -> Option<String> {
        let mac = self.mac(self.address.as_deref()?, question)?;
        Some(hex::encode(mac.finalize().into_bytes()))
    }

    fn is_answer(&self, address: &str, question: &str, answer: &str) -> bool {
        match (self.mac(address, question), hex::decode(answer.trim())) {
            (Some(mac), Ok(answer)) => mac.verify_slice(&answer).is_ok(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_gateway_of_this_database_at_this_address_has_the_answer() {
        let at = |secret: &str, address: &str| Peers::new(secret.to_owned(), Some(address.to_owned()));
        let (asking, asked) = (at("secret", "10.0.0.1:8080"), at("secret", "10.0.0.2:8080"));
        let answer = asked.answer("question").unwrap();
        assert!(asking.is_answer("10.0.0.2:8080", "question", &answer));
        assert!(!asking.is_answer("10.0.0.2:8080", "another", &answer));
        assert!(
            !asking.is_answer("10.0.0.3:8080", "question", &answer),
            "passed on from elsewhere"
        );
        let stranger = at("guess", "10.0.0.2:8080").answer("question").unwrap();
        assert!(!asking.is_answer("10.0.0.2:8080", "question", &stranger));
        for wrong in ["", "00", "not hexadecimal"] {
            assert!(!asking.is_answer("10.0.0.2:8080", "question", wrong));
        }
        assert_eq!(Peers::new("secret".to_owned(), None).answer("question"), None);
    }
}
