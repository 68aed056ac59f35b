//! Types of conditions.

/// `False` while what the spec asks for by now is not allowed: an attempt under way goes on with what it was begun with.
pub const SPEC_ACCEPTED: &str = "SpecAccepted";
/// `False` while something that should go may not be deleted, or a pod not be let go: all else goes on.
pub const CLEANED_UP: &str = "CleanedUp";
/// The session has a place among those that may run at once.
pub const ADMITTED: &str = "Admitted";
/// The session's claim exists and is bound.
pub const WORKSPACE_READY: &str = "WorkspaceReady";
/// The runner of the current attempt has started.
pub const RUNNER_STARTED: &str = "RunnerStarted";
/// The run has ended.
pub const FINISHED: &str = "Finished";
/// All records have arrived at the gateway.
pub const EVENTS_DELIVERED: &str = "EventsDelivered";
/// The trace has arrived.
pub const TRACES_DELIVERED: &str = "TracesDelivered";

/// Reason of [`EVENTS_DELIVERED`] when what is missing will not come any more.
pub const LOST: &str = "Lost";
