//! What is kept in a database: job status. Postgres for a cluster, a SQLite file for one machine, by the same statements.
//!
//! No queue, no retry state and no configuration lies here: events are delivered with the database away, and what is counted
//! catches up when it is back.

pub mod job_status;
mod position;

use std::borrow::Cow;
use std::future::Future;
use std::sync::{Arc, Once, PoisonError, RwLock};
use std::time::Duration;

use sqlx::any::{AnyPoolOptions, install_default_drivers};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AnyConnection, AnyPool, AssertSqlSafe, Executor, SqlSafeStr};

pub use position::{Group, Mismatch, Move, Position};

/// Connections at a time of one process.
const CONNECTIONS: u32 = 4;
/// Whoever wants one waits so long.
const PATIENCE: Duration = Duration::from_secs(5);
/// One call, whatever the server does. It gives up earlier by itself, where it can.
const CALL: Duration = Duration::from_secs(40);
/// What each connection begins with. An owner that has gone must not hold what its successor needs.
const POSTGRES: &str =
    "set statement_timeout = '30s'; set lock_timeout = '10s'; set idle_in_transaction_session_timeout = '30s'";
const SQLITE: &str = "pragma journal_mode = wal; pragma synchronous = full; pragma busy_timeout = 5000";
const MIGRATIONS: &str = "_migrations";

/// What the caller of a store does next.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Come again: it does not answer, or could not do it now. Nothing was changed.
    #[error("{0}")]
    Away(String),
    /// Its tables are not those of this version.
    #[error("{0}")]
    Unmigrated(String),
    /// Somebody else has written meanwhile, or the answer to the last write was lost. Take over again.
    #[error("another owner has written")]
    Stale,
    /// It cannot be done with these values, now or later; or it is no store at all.
    #[error("{0}")]
    Refused(String),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(refused) => {
                let code = refused.code().unwrap_or_default();
                // What the data is to blame for: its values, constraints, sizes. SQLite's codes are numbers, with what is said closer
                // above the lowest byte.
                let number = code.parse::<u32>().ok().filter(|_| code.len() != 5).map(|number| number & 0xFF);
                let is_data = ["22", "23", "54"].iter().any(|class| code.starts_with(class) && code.len() == 5)
                    || matches!(number, Some(18..=20));
                match code.as_ref() {
                    "42P01" | "42703" | "3F000" => StoreError::Unmigrated(unmigrated(refused.message())),
                    "1" if ["no such table", "no such column"].iter().any(|what| refused.message().contains(what)) => {
                        StoreError::Unmigrated(unmigrated(refused.message()))
                    }
                    _ if is_data => StoreError::Refused(error.to_string()),
                    _ => StoreError::Away(error.to_string()),
                }
            }
            sqlx::Error::PoolTimedOut => {
                let why =
                    format!("no connection to the database within {PATIENCE:?}: is it up, and is store.url right?");
                StoreError::Away(why)
            }
            sqlx::Error::Configuration(_) => StoreError::Refused("store.url cannot be used".to_owned()),
            _ => StoreError::Away(error.to_string()),
        }
    }
}

fn unmigrated(why: &str) -> String {
    format!("{why}: `laneway migrate` prepares the store")
}

/// Number, name and text of each.
type Migrations = [(i64, &'static str, &'static str)];

/// One database. Clones share their connections.
#[derive(Clone)]
pub struct Store {
    pool: Arc<RwLock<AnyPool>>,
    /// Another pool for the same database.
    anew: Arc<dyn Fn() -> Result<AnyPool, StoreError> + Send + Sync>,
    is_sqlite: bool,
    /// Where Postgres has its tables.
    schema: &'static str,
}

impl Store {
    /// A store by its URL, `postgres://…` or `sqlite:FILE`, with its tables in a schema of their own. Nothing is asked yet.
    ///
    /// # Errors
    /// [`StoreError::Refused`], where it is neither.
    fn new(url: &str, schema: &'static str) -> Result<Self, StoreError> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(install_default_drivers);
        let is_sqlite = url.starts_with("sqlite:");
        if !is_sqlite && !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(StoreError::Refused("store.url is neither postgres://… nor sqlite:FILE".to_owned()));
        }
        if url.split('?').nth(1).is_some_and(|query| query.to_lowercase().contains("password")) {
            let why = "store.url has a password in its query; it goes before the host: postgres://user:password@host";
            return Err(StoreError::Refused(why.to_owned()));
        }
        let is_memory = url.starts_with("sqlite::memory:");
        let url = match is_sqlite && !url.contains('?') && !is_memory {
            true => Cow::Owned(format!("{url}?mode=rwc")),
            false => Cow::Borrowed(url),
        };
        let first = match is_sqlite {
            true => SQLITE.to_owned(),
            false => format!("set search_path to {schema}; {POSTGRES}"),
        };
        let url = url.into_owned();
        let anew = move || {
            let mut options = AnyPoolOptions::new().acquire_timeout(PATIENCE).max_connections(CONNECTIONS);
            if is_memory {
                // Each connection would be a database of its own, gone with it.
                options = options.max_connections(1).idle_timeout(None).max_lifetime(None);
            }
            let first = first.clone();
            let options = options.after_connect(move |connection, _| {
                let first = AssertSqlSafe(first.clone());
                Box::pin(async move { connection.execute(first).await.map(drop) })
            });
            // What is wrong with it may hold a password.
            let refused = |_| StoreError::Refused("store.url is not an address of a database".to_owned());
            options.connect_lazy(&url).map_err(refused)
        };
        let pool = Arc::new(RwLock::new(anew()?));
        Ok(Self { pool, anew: Arc::new(anew), is_sqlite, schema })
    }

    /// The connections.
    fn pool(&self) -> AnyPool {
        self.pool.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a call that ends, whatever the server does.
    async fn call<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        if let Ok(answer) = tokio::time::timeout(CALL, call).await {
            return answer;
        }
        // Its connections may never answer again.
        if let (Ok(pool), false) = ((self.anew)(), self.is_sqlite) {
            *self.pool.write().unwrap_or_else(PoisonError::into_inner) = pool;
        }
        Err(StoreError::Away(format!("no answer within {CALL:?}")))
    }

    /// Brings the tables to what this version needs, and says what was done.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn migrate(&self, all: &Migrations) -> Result<Vec<String>, StoreError> {
        let pending = self.pending(all).await?;
        let mut connection = self.pool().acquire().await?;
        if !self.is_sqlite {
            self.create_schema(&mut connection).await?;
        }
        if !self.is_sqlite {
            connection.execute("set statement_timeout = 0".into_sql_str()).await?;
        }
        migrator(all).run_direct(None, &mut *connection, false).await.map_err(refused)?;
        if !self.is_sqlite {
            connection.execute(POSTGRES.into_sql_str()).await?;
        }
        Ok(pending)
    }

    async fn create_schema(&self, connection: &mut AnyConnection) -> Result<(), StoreError> {
        let (encoding,): (String,) =
            sqlx::query_as("select current_setting('server_encoding')").fetch_one(&mut *connection).await?;
        if encoding != "UTF8" {
            return Err(StoreError::Refused(format!("the database's encoding is {encoding}; it has to be UTF8")));
        }
        let there: Option<(i32,)> = sqlx::query_as("select 1 from pg_namespace where nspname = $1")
            .bind(self.schema)
            .fetch_optional(&mut *connection)
            .await?;
        if there.is_some() {
            return Ok(());
        }
        let create = AssertSqlSafe(format!("create schema {}", self.schema));
        match connection.execute(create).await {
            // Somebody else has made it meanwhile.
            Err(sqlx::Error::Database(error)) if matches!(error.code().as_deref(), Some("42P06" | "23505")) => Ok(()),
            created => Ok(created.map(drop)?),
        }
    }

    /// The migrations that are missing. Nothing is changed.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn pending(&self, all: &Migrations) -> Result<Vec<String>, StoreError> {
        let found = sqlx::query_as("select version from _migrations where success").fetch_all(&self.pool()).await;
        let applied: Vec<(i64,)> = match found.map_err(StoreError::from) {
            // There is no table of them yet.
            Err(StoreError::Unmigrated(_)) => Vec::new(),
            found => found?,
        };
        let missing = all.iter().filter(|(version, ..)| !applied.contains(&(*version,)));
        Ok(missing.map(|(_, name, _)| (*name).to_owned()).collect())
    }

    /// A transaction that writes.
    async fn begin(&self) -> Result<sqlx::Transaction<'static, sqlx::Any>, StoreError> {
        match self.is_sqlite {
            // A read that becomes a write would be refused where another one writes.
            true => Ok(self.pool().begin_with("begin immediate").await?),
            false => Ok(self.pool().begin().await?),
        }
    }

    /// A file, not a server.
    pub fn is_sqlite(&self) -> bool {
        self.is_sqlite
    }
}

fn migrator(all: &Migrations) -> Migrator {
    let migration = |(version, name, text): &(i64, &'static str, &'static str)| {
        Migration::new(*version, Cow::Borrowed(*name), MigrationType::Simple, text.into_sql_str(), false)
    };
    let mut migrator = Migrator::with_migrations(all.iter().map(migration).collect());
    migrator.dangerous_set_table_name(MIGRATIONS);
    // A version that is newer than this one knows more.
    migrator.set_ignore_missing(true);
    migrator
}

fn refused(error: sqlx::migrate::MigrateError) -> StoreError {
    match error {
        sqlx::migrate::MigrateError::Execute(error) => error.into(),
        other => StoreError::Refused(other.to_string()),
    }
}
