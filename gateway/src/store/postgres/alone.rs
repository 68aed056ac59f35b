//! What one gateway does while the others wait: a lock of the server, with the life of a connection that all of a gateway's
//! share, so that however many wait, what is stored has its connections.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, Statement};

use super::{
    super::{Alone, StoreError},
    pool::Pool,
};

/// The first number sets these locks apart from all others of the database; any that nobody else uses.
const LOCK: &str = "SELECT pg_try_advisory_lock(702031765, hashtext($1))";
const UNLOCK: &str = "SELECT pg_advisory_unlock(702031765, hashtext($1))";
/// How often it is tried.
const AGAIN: Duration = Duration::from_millis(20);
/// How long it is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// The connection, while it works.
#[derive(Default)]
pub(super) struct Locks(Mutex<Option<Arc<Line>>>);

struct Line {
    client: Client,
    lock: Statement,
    unlock: Statement,
}

struct Held {
    locks: Arc<Locks>,
    line: Arc<Line>,
    of: String,
}

impl Locks {
    /// Waits until nobody has this lock. In a task of its own: whoever goes away in between leaves no lock behind.
    pub(super) async fn take(self: Arc<Self>, pool: Arc<Pool>, of: String) -> Result<Alone, StoreError> {
        let held = tokio::spawn(async move { self.held(&pool, of).await });
        let held = held.await.map_err(|_| StoreError::Stopped)??;
        Ok(Alone(Some(Box::new(held))))
    }

    async fn held(self: Arc<Self>, pool: &Pool, of: String) -> Result<Held, StoreError> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let line = self.line(pool).await?;
            match line.client.query_one(&line.lock, &[&of]).await {
                Ok(row) if row.get(0) => {
                    return Ok(Held { locks: self, line, of });
                }
                Ok(_) => sleep(AGAIN).await,
                Err(error) => {
                    self.forget(&line);
                    return Err(error.into());
                }
            }
        }
        Err(StoreError::Silent)
    }

    async fn line(&self, pool: &Pool) -> Result<Arc<Line>, StoreError> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(line) = known.filter(|line| !line.client.is_closed()) {
            return Ok(line);
        }
        let (client, connection) = pool.connect().await?;
        tokio::spawn(connection);
        let line = Arc::new(Line {
            lock: client.prepare(LOCK).await?,
            unlock: client.prepare(UNLOCK).await?,
            client,
        });
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.clone());
        Ok(line)
    }

    /// Its locks go with it.
    fn forget(&self, line: &Arc<Line>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_some_and(|known| Arc::ptr_eq(known, line)) {
            *known = None;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (locks, line, of) = (self.locks.clone(), self.line.clone(), std::mem::take(&mut self.of));
        runtime.spawn(async move {
            if line.client.query_one(&line.unlock, &[&of]).await.is_err() {
                locks.forget(&line);
            }
        });
    }
}
