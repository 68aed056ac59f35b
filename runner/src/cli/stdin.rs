//! What is said to the CLI: lines of its stdin. One line of bad JSON ends it, so they are only made here.

use uuid::Uuid;

/// A user message.
pub fn user_message(uuid: Uuid, text: &str) -> Vec<u8> {
    line(&serde_json::json!({
        "type": "user",
        "message": { "role": "user", "content": text },
        "uuid": uuid,
    }))
}

/// Asks the CLI to stop its turn, and to forget what is queued or to go on with it.
pub fn interrupt(request_id: &str, cancel_queued: bool) -> Vec<u8> {
    line(&serde_json::json!({
        "type": "control_request",
        "request_id": request_id,
        "request": { "subtype": "interrupt", "cancel_queued": cancel_queued },
    }))
}

/// Somebody's answer to a permission question.
#[derive(Clone, Debug, PartialEq)]
pub struct PermissionAnswer {
    response: serde_json::Value,
    /// Whether the tool may run.
    pub allowed: bool,
}

impl PermissionAnswer {
    /// Reads an answer in the CLI's own form; the CLI takes a malformed one as a denial, so there is none here.
    pub fn parse(response: &str) -> Result<Self, &'static str> {
        let response: serde_json::Value = serde_json::from_str(response).map_err(|_| "the answer is not JSON")?;
        let allowed = match response["behavior"].as_str() {
            Some("allow") => true,
            Some("deny") if response["message"].is_string() => false,
            _ => {
                return Err(
                    r#"the answer must be {"behavior":"allow","updatedInput"?} or {"behavior":"deny","message":"…"}"#,
                );
            }
        };
        Ok(Self { response, allowed })
    }

    /// The answer as a line of stdin.
    pub fn line(&self, request_id: &str) -> Vec<u8> {
        line(&serde_json::json!({
            "type": "control_response",
            "response": { "subtype": "success", "request_id": request_id, "response": self.response },
        }))
    }
}

/// Refuses what the CLI asks: a one-shot has nobody to answer.
pub fn refusal(request_id: &str, subtype: &str) -> Vec<u8> {
    let response = if subtype == "can_use_tool" {
        serde_json::json!({
            "subtype": "success",
            "request_id": request_id,
            "response": { "behavior": "deny", "message": "Nobody is there to answer permission questions in this session." },
        })
    } else {
        serde_json::json!({
            "subtype": "error",
            "request_id": request_id,
            "error": "not supported by this runner",
        })
    };
    line(&serde_json::json!({ "type": "control_response", "response": response }))
}

fn line(message: &serde_json::Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(r#"{"behavior":"allow"}"#, Ok(true))]
    #[case(r#"{"behavior":"deny","message":"no"}"#, Ok(false))]
    #[case::a_denial_says_why(r#"{"behavior":"deny"}"#, Err(()))]
    #[case(r#"{"behavior":"maybe"}"#, Err(()))]
    #[case("[]", Err(()))]
    #[case("{", Err(()))]
    fn only_an_answer_that_the_cli_understands_is_one(#[case] text: &str, #[case] expected: Result<bool, ()>) {
        let parsed = PermissionAnswer::parse(text);
        assert_eq!(parsed.map(|answer| answer.allowed).map_err(|_| ()), expected);
    }

    #[test]
    fn a_message_is_one_line_whatever_it_holds() {
        let bytes = user_message(Uuid::nil(), "a\nb\u{2028}\"\\$$(A)\u{7f}");
        assert_eq!(bytes.iter().position(|byte| *byte == b'\n'), Some(bytes.len() - 1));
        let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["message"]["content"], "a\nb\u{2028}\"\\$$(A)\u{7f}");
    }
}
