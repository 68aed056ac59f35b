//! Identities derived from a session's UID, so that a retry arrives at the same ones.

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// Id of the command that stands for the session's prompt.
pub const PROMPT_COMMAND: &str = "prompt";

/// UUID of the user message that a command sends: the same for every try, so that the CLI's transcript can be asked for it.
///
/// `session_uid` that is not a UUID (only outside Kubernetes) is hashed into one first.
pub fn message_uuid(session_uid: &str, command_id: &str) -> Uuid {
    let namespace =
        Uuid::parse_str(session_uid).unwrap_or_else(|_| Uuid::new_v5(&Uuid::NAMESPACE_OID, session_uid.as_bytes()));
    Uuid::new_v5(&namespace, command_id.as_bytes())
}

/// Command id of the `n`-th continuation message of an attempt.
pub fn continuation_command(run: u32, attempt: u32, n: u32) -> String {
    format!("continue/{run}/{attempt}/{n}")
}

/// Trace id of a session: the first 16 bytes of SHA-256 of its UID, hex (the rule Langfuse's own SDKs use for seeds).
pub fn trace_id(session_uid: &str) -> String {
    hex::encode(trace_id_bytes(session_uid))
}

/// [`trace_id`] as bytes.
pub fn trace_id_bytes(session_uid: &str) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&Sha256::digest(session_uid.as_bytes())[..16]);
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_command_has_the_same_uuid_and_another_has_another() {
        let uid = "6fa459ea-ee8a-3ca4-894e-db77e160355e";
        assert_eq!(message_uuid(uid, PROMPT_COMMAND), message_uuid(uid, PROMPT_COMMAND));
        assert_ne!(message_uuid(uid, PROMPT_COMMAND), message_uuid(uid, "m-1"));
        assert_ne!(message_uuid(uid, PROMPT_COMMAND), message_uuid("local", PROMPT_COMMAND));
    }

    #[test]
    fn a_trace_id_is_32_hex_digits() {
        assert_eq!(trace_id("abc"), "ba7816bf8f01cfea414140de5dae2223");
    }
}
