//! Callers: `TokenReview` says who, `SubjectAccessReview` whether. Answers are kept for at most a minute.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, Resource as _, api::PostParams};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::{sync::Semaphore, time::Instant};

use super::api_key::Key;
use crate::sessions::{self, bounded};

/// How long a yes is believed.
pub const YES: Duration = Duration::from_mins(1);
/// How long a no is believed: rights that were just given should work soon.
pub const NO: Duration = Duration::from_secs(5);
/// Tokens of callers, whoever they are, reviewed at once.
static CALLERS: Semaphore = Semaphore::const_new(64);
/// The same of runners: nobody else is in their way.
static RUNNERS: Semaphore = Semaphore::const_new(64);
/// Answers kept at most.
const CAPACITY: usize = 10_000;

/// What a caller wants to do with sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Read one, and its events.
    Get,
    /// Read all of a namespace.
    List,
    /// Create one.
    Create,
    /// Change one, or speak with its agent.
    Update,
    /// Delete one.
    Delete,
}

impl Verb {
    /// The verb in Kubernetes' rights.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Create => "create",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// Why a caller is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Nobody knows who it is.
    #[error(
        "the token was not accepted by the cluster: send a valid Kubernetes token, such as that of `kubectl create token <service account>`"
    )]
    Unauthenticated,
    /// Nobody has that API key.
    #[error("the API key is not known: ask who runs this gateway for one")]
    UnknownKey,
    /// The caller asks too often.
    #[error("the API key or account made too many requests: try again in {0} s")]
    TooOften(u64),
    /// It may not.
    #[error(
        "{user} may not {verb} agenticsessions.vteam.ambient-code in namespace {namespace}: ask its administrator for a role that allows it"
    )]
    Forbidden {
        /// Who.
        user: String,
        /// What.
        verb: &'static str,
        /// Where.
        namespace: String,
    },
    /// The API server could not be asked.
    #[error(transparent)]
    Unavailable(#[from] sessions::Error),
}

/// Who a token belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Name by which rights are given.
    pub user: String,
    /// Id by which the cluster knows it.
    pub uid: Option<String>,
    /// Groups by which rights are given.
    pub groups: Vec<String>,
    /// What else the authenticator says.
    pub extra: BTreeMap<String, Vec<String>>,
}

type Digest = [u8; 32];

/// A caller whose token was accepted.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who it is.
    pub identity: Arc<Identity>,
    /// The API key that it showed instead of a token.
    pub key: Option<Arc<Key>>,
    token: Digest,
}

impl From<Arc<Key>> for Caller {
    fn from(key: Arc<Key>) -> Self {
        Self {
            identity: Arc::new(key.identity()),
            key: Some(key),
            token: Digest::default(),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Question {
    token: Digest,
    verb: Verb,
    namespace: String,
    name: Option<String>,
}

/// Asks the API server, and remembers for a while.
pub struct Reviews {
    client: Client,
    identities: Cache<Digest, Option<Arc<Identity>>>,
    rights: Cache<Question, bool>,
}

impl Reviews {
    /// Through this client.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            identities: Cache::default(),
            rights: Cache::default(),
        }
    }

    /// Who a caller is.
    pub async fn authenticate(&self, token: &str) -> Result<Caller, Refusal> {
        let digest: Digest = Sha256::digest(token).into();
        let known = self.identities.get(&digest);
        let identity = if let Some(identity) = known {
            identity
        } else {
            let identity = review(&self.client, token, None, Queue::Callers).await?.map(Arc::new);
            let lifetime = if identity.is_some() { YES } else { NO };
            self.identities.put(digest, identity.clone(), lifetime);
            identity
        };
        let identity = identity.ok_or(Refusal::Unauthenticated)?;
        Ok(Caller {
            identity,
            key: None,
            token: digest,
        })
    }

    /// Whether a caller may do something in a namespace, to the session `name` or to any.
    pub async fn authorize(
        &self,
        caller: &Caller,
        verb: Verb,
        namespace: &str,
        name: Option<&str>,
    ) -> Result<(), Refusal> {
        let question = Question {
            token: caller.token,
            verb,
            namespace: namespace.to_owned(),
            name: name.map(str::to_owned),
        };
        let known = self.rights.get(&question);
        let allowed = if let Some(allowed) = known {
            allowed
        } else {
            let allowed = self.ask(&caller.identity, &question).await?;
            self.rights.put(question, allowed, if allowed { YES } else { NO });
            allowed
        };
        if allowed {
            return Ok(());
        }
        Err(Refusal::Forbidden {
            user: caller.identity.user.clone(),
            verb: verb.as_str(),
            namespace: namespace.to_owned(),
        })
    }

    async fn ask(&self, identity: &Identity, question: &Question) -> Result<bool, sessions::Error> {
        let Identity {
            user,
            uid,
            groups,
            extra,
        } = identity.clone();
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user),
                uid,
                groups: Some(groups),
                extra: Some(extra),
                resource_attributes: Some(ResourceAttributes {
                    group: Some(crds::AgenticSession::group(&()).into_owned()),
                    resource: Some(crds::AgenticSession::plural(&()).into_owned()),
                    verb: Some(question.verb.as_str().to_owned()),
                    namespace: Some(question.namespace.clone()),
                    name: question.name.clone(),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let answer = bounded(
            "create",
            || "SubjectAccessReview".to_owned(),
            api.create(&params, &review),
        )
        .await?;
        Ok(answer
            .status
            .is_some_and(|status| status.allowed && status.denied != Some(true)))
    }
}

/// Where a token waits for its review.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    /// With those of everybody, who may send what nobody knows.
    Callers,
    /// With those that say that they are of a pod which a session names.
    Runners,
}

/// Who a token belongs to; with an audience, only if it is meant for it.
pub(crate) async fn review(
    client: &Client,
    token: &str,
    audience: Option<&str>,
    queue: Queue,
) -> Result<Option<Identity>, sessions::Error> {
    let review = TokenReview {
        spec: TokenReviewSpec {
            token: token.to_owned(),
            audiences: audience.map(|audience| vec![audience.to_owned()]),
        },
        ..TokenReview::default()
    };
    // Whoever sends tokens that nobody knows costs the API server no more than this.
    let queue = match queue {
        Queue::Callers => &CALLERS,
        Queue::Runners => &RUNNERS,
    };
    let _turn = queue.acquire().await;
    let api: Api<TokenReview> = Api::all(client.clone());
    let params = PostParams::default();
    let answer = bounded("create", || "TokenReview".to_owned(), api.create(&params, &review)).await?;
    let Some(status) = answer.status else { return Ok(None) };
    // An authenticator that knows nothing of audiences answers without them: then the token is not known to be meant for us.
    let meant = |audience: &str| status.audiences.iter().flatten().any(|meant| meant == audience);
    if status.authenticated != Some(true) || !audience.is_none_or(meant) {
        return Ok(None);
    }
    Ok(status.user.map(|user| Identity {
        user: user.username.unwrap_or_default(),
        uid: user.uid,
        groups: user.groups.unwrap_or_default(),
        extra: user.extra.unwrap_or_default(),
    }))
}

/// Answers that are believed until a time.
struct Cache<K, V> {
    answers: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self {
            answers: Mutex::default(),
        }
    }
}

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, value) = answers.get(key)?;
        (*until > Instant::now()).then(|| value.clone())
    }

    fn put(&self, key: K, value: V, lifetime: Duration) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if answers.len() >= CAPACITY {
            answers.retain(|_, (until, _)| *until > now);
            if answers.len() >= CAPACITY {
                answers.clear();
            }
        }
        answers.insert(key, (now + lifetime, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_forgotten_when_its_time_is_over_and_a_flood_is_bounded() {
        let cache = Cache::default();
        cache.put(0, "no", NO);
        cache.put(1, "yes", YES);
        tokio::time::advance(NO).await;
        assert_eq!((cache.get(&0), cache.get(&1)), (None, Some("yes")));
        tokio::time::advance(YES).await;
        assert_eq!(cache.get(&1), None);
        for key in 0..3 * CAPACITY {
            cache.put(key, "no", NO);
        }
        assert!(cache.answers.lock().unwrap().len() <= CAPACITY);
    }
}
