//! What holds of each change of status, whatever happened.

use crds::{AgenticSessionStatus, Phase, condition};

use crate::session::validate::DEFAULT_MAX_ATTEMPTS;

pub fn check_transition(before: &AgenticSessionStatus, after: &AgenticSessionStatus) {
    if before.phase.is_terminal() && before.run == after.run {
        assert_eq!(
            (
                before.phase,
                &before.reason,
                before.attempt,
                before.completion_time.clone()
            ),
            (after.phase, &after.reason, after.attempt, after.completion_time.clone()),
            "an ended run stays ended"
        );
    }
    assert!(after.attempt >= before.attempt && after.run >= before.run);
    let made = after.attempt.unwrap_or(0) - after.first_attempt.unwrap_or(1).min(after.attempt.unwrap_or(0));
    if after.phase == Phase::Creating {
        assert!(
            made < DEFAULT_MAX_ATTEMPTS + after.free_retries.unwrap_or(0),
            "more attempts than there are"
        );
    }
    if after.phase == Phase::Completed {
        assert_ne!(before.phase, Phase::Creating, "`Running` is never skipped");
    }
    let finished = after.conditions.iter().any(|c| c.type_ == condition::FINISHED);
    assert_eq!(
        finished,
        after.phase.is_terminal(),
        "the condition and the phase say the same"
    );
    assert_eq!(after.completion_time.is_some(), after.phase.is_terminal());
    assert!(
        after.reason.is_some() && after.message.is_some(),
        "there is always a why"
    );
}
