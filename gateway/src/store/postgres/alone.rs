//! What one gateway does while the others wait: a lock of the server, with the life of a connection.

use std::sync::Arc;

use super::{
    super::{Alone, StoreError},
    pool::{Connection, Pool},
};

/// The first number sets these locks apart from all others of the database; any that nobody else uses.
const LOCK: &str = "SELECT pg_advisory_lock(702031765, hashtext($1))";
const UNLOCK: &str = "SELECT pg_advisory_unlock(702031765, hashtext($1))";

struct Held {
    pool: Arc<Pool>,
    of: String,
    connection: Option<Connection>,
}

/// Waits for it as long as for any lock.
pub(super) async fn take(pool: Arc<Pool>, of: String) -> Result<Alone, StoreError> {
    let mut connection = pool.take().await?;
    connection.one(LOCK, &[&of]).await?;
    Ok(Alone(Some(Box::new(Held {
        pool,
        of,
        connection: Some(connection),
    }))))
}

impl Drop for Held {
    fn drop(&mut self) {
        let (Some(mut connection), Ok(runtime)) = (self.connection.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let (pool, of) = (self.pool.clone(), std::mem::take(&mut self.of));
        runtime.spawn(async move {
            // Otherwise the connection is closed, and the server lets the others go on.
            if connection.one(UNLOCK, &[&of]).await.is_ok() {
                pool.give_back(connection);
            }
        });
    }
}
