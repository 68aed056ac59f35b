//! Connections, a few, each with its prepared statements. One that failed is never used again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_postgres::{Client, Config, Row, Socket, Statement, config::TargetSessionAttrs, types::ToSql};

use super::{
    super::StoreError,
    Database,
    tls::{self, Stream, Tls},
};

/// Connections at once; a transaction has one to itself.
const PLACES: usize = 16;
/// How long anything may take, the wait for a connection included.
const DONE_WITHIN: Duration = Duration::from_secs(90);
/// How long a connection may take to be made.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long a server may say nothing.
const SILENCE: Duration = Duration::from_secs(20);

/// Parameters of a statement.
pub(super) type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];
type Result<T, E = tokio_postgres::Error> = std::result::Result<T, E>;

/// See the module.
pub(super) struct Pool {
    config: Config,
    tls: Tls,
    places: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

/// One of them.
pub(super) struct Connection {
    client: Client,
    statements: HashMap<&'static str, Statement>,
    /// While it is used.
    place: Option<OwnedSemaphorePermit>,
}

/// A connection outside the pool, whose messages the caller polls.
pub(super) type Raw = (Client, tokio_postgres::Connection<Socket, Stream<Socket>>);

impl Pool {
    /// Of connections to this database, which begin when they are needed.
    pub(super) fn new(database: &Database) -> Result<Arc<Self>, StoreError> {
        let (mut config, tls) = tls::configuration(database)?;
        config.application_name("agentic-gateway");
        // One that only reads, such as a standby, can keep nothing.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        // A server that is gone without a word is found.
        config.keepalives_idle(SILENCE).tcp_user_timeout(SILENCE);
        Ok(Arc::new(Self {
            config,
            tls,
            places: Arc::new(Semaphore::new(PLACES)),
            idle: Mutex::default(),
        }))
    }

    /// A new connection.
    pub(super) async fn connect(&self) -> Result<Raw, StoreError> {
        let connected = timeout(CONNECT_WITHIN, self.config.connect(self.tls.clone())).await;
        let (client, connection) = connected.map_err(|_| StoreError::Silent)??;
        Ok((client, connection))
    }

    async fn take(&self) -> Result<Connection, StoreError> {
        let place = self
            .places
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| StoreError::Stopped)?;
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut connection) = idle else { break };
            if !connection.client.is_closed() {
                connection.place = Some(place);
                return Ok(connection);
            }
        }
        let (client, connection) = self.connect().await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::warn!(%error, "connection to PostgreSQL lost");
            }
        });
        // Whatever the role's default is: a commit is on disk when it is answered, and nothing waits for ever.
        client
            .batch_execute("SET synchronous_commit = on; SET lock_timeout = '20s'; SET statement_timeout = '60s'; SET idle_in_transaction_session_timeout = '60s'")
            .await?;
        Ok(Connection {
            client,
            statements: HashMap::new(),
            place: Some(place),
        })
    }

    /// After it did all that it was asked to.
    fn give_back(&self, mut connection: Connection) {
        connection.place = None;
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
    }

    /// Does something to its end, whatever becomes of who asked for it.
    pub(super) fn run<T, F>(self: &Arc<Self>, work: F) -> BoxFuture<'static, Result<T, StoreError>>
    where
        T: Send + 'static,
        F: for<'a> FnOnce(&'a mut Connection) -> BoxFuture<'a, Result<T>> + Send + 'static,
    {
        let pool = self.clone();
        async move {
            // In a task of its own: whoever asks may not be polled for long, and must not hold a connection meanwhile.
            let done = async move {
                let mut connection = pool.take().await?;
                let answer = work(&mut connection).await?;
                pool.give_back(connection);
                Ok(answer)
            };
            let answer = tokio::spawn(timeout(DONE_WITHIN, done));
            answer
                .await
                .map_err(|_| StoreError::Stopped)?
                .map_err(|_| StoreError::Silent)?
        }
        .boxed()
    }

    /// [`Self::run`] in a transaction, committed unless the work fails.
    pub(super) fn transact<T, F>(self: &Arc<Self>, work: F) -> BoxFuture<'static, Result<T, StoreError>>
    where
        T: Send + 'static,
        F: for<'a> FnOnce(&'a mut Connection) -> BoxFuture<'a, Result<T>> + Send + 'static,
    {
        self.run(|connection| {
            async move {
                connection.client.batch_execute("BEGIN").await?;
                let answer = work(connection).await?;
                connection.client.batch_execute("COMMIT").await?;
                Ok(answer)
            }
            .boxed()
        })
    }
}

impl Connection {
    async fn statement(&mut self, sql: &'static str) -> Result<Statement> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare(sql).await?;
        self.statements.insert(sql, statement.clone());
        Ok(statement)
    }

    /// All rows.
    pub(super) async fn all(&mut self, sql: &'static str, parameters: Parameters<'_>) -> Result<Vec<Row>> {
        let statement = self.statement(sql).await?;
        self.client.query(&statement, parameters).await
    }

    /// A row, or none.
    pub(super) async fn one(&mut self, sql: &'static str, parameters: Parameters<'_>) -> Result<Option<Row>> {
        Ok(self.all(sql, parameters).await?.into_iter().next())
    }

    /// How many rows were changed.
    pub(super) async fn change(&mut self, sql: &'static str, parameters: Parameters<'_>) -> Result<u64> {
        let statement = self.statement(sql).await?;
        self.client.execute(&statement, parameters).await
    }
}
