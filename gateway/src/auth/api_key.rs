//! API keys: for callers without a Kubernetes identity. A key may do certain things in one namespace, so often a minute.
//!
//! The file holds the SHA-256 of each key, not the key. A key has 256 random bits, so that its hash cannot be guessed and
//! looking it up by its hash tells nobody anything.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::{
    kubernetes::{Identity, Verb},
    rate::Bucket,
};
use crate::{compat::ANONYMOUS, sessions::is_namespace};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Longest key that is looked up.
const MAX_KEY: usize = 512;

/// What is wrong with a file of keys.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("failed to read the API keys in {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It says something else than keys.
    #[error("failed to understand the API keys in {path}: {why}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    keys: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    sha256: String,
    namespace: String,
    verbs: Vec<Verb>,
    #[serde(default, rename = "ratePerMinute")]
    rate_per_minute: Option<u32>,
}

/// A key.
#[derive(Debug)]
pub struct Key {
    name: String,
    /// It is of the environment, and not of the file.
    built_in: bool,
    namespace: String,
    verbs: Vec<Verb>,
    rate: Option<u32>,
    bucket: Arc<Mutex<Bucket>>,
}

/// What a key may, without what it is.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Described {
    /// Its name.
    pub name: String,
    /// Where it may something.
    pub namespace: String,
    /// What it may there.
    pub verbs: Vec<&'static str>,
    /// Requests a minute; no bound when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_minute: Option<u32>,
}

impl Key {
    /// One that may do everything in a namespace.
    pub fn of_namespace(name: &str, namespace: &str, rate: Option<u32>) -> Self {
        Self {
            name: name.to_owned(),
            built_in: true,
            namespace: namespace.to_owned(),
            verbs: vec![Verb::Get, Verb::List, Verb::Create, Verb::Update, Verb::Delete],
            rate,
            bucket: bucket(rate),
        }
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its name, if it is of the file and one of several.
    pub fn own_name(&self) -> Option<&str> {
        (!self.built_in).then_some(&self.name)
    }

    /// What it may.
    pub fn described(&self) -> Described {
        Described {
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            verbs: self.verbs.iter().map(|verb| verb.as_str()).collect(),
            rate_per_minute: self.rate,
        }
    }

    /// Whether it may do this there.
    pub fn may(&self, verb: Verb, namespace: &str) -> bool {
        self.namespace == namespace && self.verbs.contains(&verb)
    }

    /// Who it is to the sessions that it creates.
    pub fn identity(&self) -> Identity {
        Identity {
            user: match self.name.as_str() {
                ANONYMOUS if self.built_in => ANONYMOUS.to_owned(),
                name => format!("api-key:{name}"),
            },
            ..Identity::default()
        }
    }

    /// Counts a request, or says how many seconds to wait before the next.
    pub fn count(&self) -> Result<(), u64> {
        let Some(rate) = self.rate else { return Ok(()) };
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(rate)
    }
}

fn bucket(rate: Option<u32>) -> Arc<Mutex<Bucket>> {
    Arc::new(Mutex::new(Bucket::new(rate.unwrap_or_default())))
}

type Known = HashMap<[u8; 32], Arc<Key>>;

/// All keys, as the file has them now.
#[derive(Debug, Default)]
pub struct Keys {
    known: RwLock<Arc<Known>>,
    /// That of the environment.
    built_in: OnceLock<([u8; 32], Arc<Key>)>,
}

impl Keys {
    /// The key that somebody shows.
    pub fn find(&self, shown: &str) -> Option<Arc<Key>> {
        if shown.len() > MAX_KEY {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(shown).into();
        if let Some((own, key)) = self.built_in.get()
            && *own == digest
        {
            return Some(key.clone());
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&digest).cloned()
    }

    /// Takes a key beside those of the file, once.
    pub fn add(&self, shown: &str, key: Key) {
        // A second one changes nothing.
        let _ = self.built_in.set((Sha256::digest(shown).into(), Arc::new(key)));
    }

    /// What all keys may.
    pub fn described(&self) -> Vec<Described> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).clone();
        let built_in = self.built_in.get().map(|(_, key)| key);
        let mut keys: Vec<_> = known.values().chain(built_in).map(|key| key.described()).collect();
        keys.sort_by(|a, b| a.name.cmp(&b.name));
        keys
    }

    /// Takes the keys of a file; on an error those before it stay.
    pub fn load(&self, path: &Path) -> Result<usize, Error> {
        let text = std::fs::read(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        self.take(&text).map_err(|why| Error::Content {
            path: path.to_owned(),
            why,
        })
    }

    fn take(&self, text: &[u8]) -> Result<usize, String> {
        let File { keys } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let before = self.known.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut known = Known::new();
        for Entry {
            name,
            sha256,
            namespace,
            verbs,
            rate_per_minute: rate,
        } in keys
        {
            let mut digest = [0; 32];
            hex::decode_to_slice(&sha256, &mut digest)
                .map_err(|_| format!("key {name:?}: sha256 must be the 64 hexadecimal digits of the key's SHA-256"))?;
            if name.is_empty() || name.len() > 128 {
                return Err(format!("key {name:?}: a name has 1 to 128 bytes"));
            }
            if !is_namespace(&namespace) {
                return Err(format!("key {name:?}: no namespace can have the name {namespace:?}"));
            }
            if rate == Some(0) {
                return Err(format!("key {name:?}: ratePerMinute must be 1 or more, or left out"));
            }
            // A key whose entry is read again has used what it has used.
            let bucket = before
                .get(&digest)
                .filter(|old| old.rate == rate)
                .map_or_else(|| bucket(rate), |old| old.bucket.clone());
            let key = Key {
                name,
                built_in: false,
                namespace,
                verbs,
                rate,
                bucket,
            };
            if let Some(twin) = known.insert(digest, Arc::new(key)) {
                return Err(format!("key {:?}: another entry has the same hash", twin.name));
            }
        }
        let count = known.len();
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(known);
        Ok(count)
    }

    /// Follows the file until the gateway stops. A file that is wrong or gone changes nothing.
    pub async fn follow(&self, path: &Path, shutdown: &CancellationToken) {
        let mut last = None;
        while shutdown
            .run_until_cancelled(tokio::time::sleep(LOOK_EVERY))
            .await
            .is_some()
        {
            let content = tokio::fs::read(path).await.ok();
            if content == last {
                continue;
            }
            last = content;
            match self.load(path) {
                Ok(keys) => tracing::info!(keys, "API keys read"),
                Err(error) => tracing::error!(%error, "API keys stay as they were"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Of `fake-key`.
    const HASH: &str = "6f0378f21a495f5c13247317d158e9d51da45a5bf68fc2f366e450deafdc8302";

    fn file(fields: &str) -> String {
        let hash = hex::encode(Sha256::digest("fake-key"));
        format!(
            r#"{{"keys":[{{"name":"ci","sha256":"{hash}","namespace":"team-a","verbs":["get","create"]{fields}}}]}}"#
        )
    }

    #[test]
    fn a_key_is_found_by_what_its_owner_shows_and_nothing_else() {
        let keys = Keys::default();
        assert_eq!(keys.take(file("").as_bytes()), Ok(1));
        let key = keys.find("fake-key").unwrap();
        assert_eq!(key.identity().user, "api-key:ci");
        assert!(key.may(Verb::Get, "team-a") && key.may(Verb::Create, "team-a"));
        assert!(!key.may(Verb::Delete, "team-a") && !key.may(Verb::Get, "team-b"));
        for other in ["", "fake-key ", "Fake-key", "ci", HASH] {
            assert!(keys.find(other).is_none(), "{other:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_asks_too_often_is_told_when_to_come_again_also_when_the_file_is_read_anew() {
        let keys = Keys::default();
        keys.take(file(r#","ratePerMinute":2"#).as_bytes()).unwrap();
        let key = keys.find("fake-key").unwrap();
        assert_eq!((key.count(), key.count(), key.count()), (Ok(()), Ok(()), Err(30)));
        keys.take(file(r#","ratePerMinute":2"#).as_bytes()).unwrap();
        let key = keys.find("fake-key").unwrap();
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(key.count(), Err(10));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!((key.count(), key.count()), (Ok(()), Err(30)));
        tokio::time::advance(Duration::from_hours(1)).await;
        assert_eq!((key.count(), key.count(), key.count()), (Ok(()), Ok(()), Err(30)));
    }

    #[rstest]
    #[case(
        r#"{"keys":[{"name":"a","sha256":"12","namespace":"n","verbs":[]}]}"#,
        "64 hexadecimal"
    )]
    #[case(r#"{"keys":[{"name":"a","key":"plain"}]}"#, "unknown field `key`")]
    #[case(
        r#"{"keys":[{"name":"a","sha256":"HASH","namespace":"n","verbs":["all"]}]}"#,
        "unknown variant `all`"
    )]
    #[case(r#"{"keys":[{"name":"a","sha256":"HASH","namespace":"N","verbs":[]}]}"#, "namespace")]
    #[case(
        r#"{"keys":[{"name":"a","sha256":"HASH","namespace":"n","verbs":[],"ratePerMinute":0}]}"#,
        "ratePerMinute"
    )]
    #[case(r#"{"keys":[{"name":"a","sha256":"HASH","namespace":"n","verbs":[]},{"name":"b","sha256":"HASH","namespace":"n","verbs":[]}]}"#, "same hash")]
    fn a_file_that_is_wrong_leaves_the_keys_as_they_were(#[case] text: &str, #[case] why: &str) {
        let keys = Keys::default();
        keys.take(file("").as_bytes()).unwrap();
        let error = keys.take(text.replace("HASH", HASH).as_bytes()).unwrap_err();
        assert!(error.contains(why), "{error}");
        assert!(keys.find("fake-key").is_some());
    }
}
