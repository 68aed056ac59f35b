//! What happens at one of several gateways on one log, for the others.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Epoch, Progress};

/// What happened. All but pieces of messages are in the log as well: news may be lost, and nothing else with them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum News {
    /// Records were stored.
    Stored {
        /// UID of the session.
        session: String,
        /// How far its log goes.
        progress: Progress,
    },
    /// A pod was admitted as a session's writer.
    Admitted {
        /// UID of the session.
        session: String,
        /// Under this epoch.
        epoch: Epoch,
    },
    /// A command was kept.
    Commanded {
        /// UID of the session.
        session: String,
    },
    /// A piece of a message while it is written.
    Delta {
        /// UID of the session.
        session: String,
        /// The piece, JSON.
        #[serde(with = "text")]
        delta: Bytes,
    },
    /// Some news may have been missed: look at the log.
    Missed,
}

mod text {
    use bytes::Bytes;
    use serde::{Deserialize as _, Deserializer, Serializer, ser::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(std::str::from_utf8(bytes).map_err(S::Error::custom)?)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        String::deserialize(deserializer).map(Bytes::from)
    }
}
