//! What became of the rows of runs of reverse ETL.

use std::collections::BTreeMap;

use md5::{Digest, Md5};
use sqlx::{AnyConnection, AssertSqlSafe};

use crate::clock::Timestamp;
use crate::model::id::JobRunId;
use crate::model::job_status::{Counts, FailedRow, JobKey, JobStatus};

use super::position::advance;
use super::{Group, Migrations, Move, Store, StoreError};

const SCHEMA: &str = "job_status";
const MIGRATIONS: &Migrations = &[
    (1, "counts", include_str!("../../migrations/job_status/0001_counts.sql")),
    (2, "topic_id", include_str!("../../migrations/job_status/0002_topic_id.sql")),
];

/// Rows that one statement deletes.
const STEP: u64 = 5_000;

/// Counts and failed rows, by run.
#[derive(Clone)]
pub struct JobStatusStore(Store);

/// A failed row as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRow {
    pub key: JobKey,
    pub row: FailedRow,
    /// Behind which the next page begins.
    pub place: Place,
}

/// A place in the order in which failed rows are listed: task run, source, destination, row.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub task_run: String,
    pub source: String,
    pub destination: String,
    pub id: String,
}

impl JobStatusStore {
    /// # Errors
    /// [`StoreError::Refused`], where the URL is none of a store. Nothing is asked yet.
    pub fn new(url: &str) -> Result<Self, StoreError> {
        Store::new(url, SCHEMA).map(Self)
    }

    /// # Errors
    /// [`StoreError`].
    pub async fn migrate(&self) -> Result<Vec<String>, StoreError> {
        self.0.migrate(MIGRATIONS).await
    }

    /// Migrations that are missing. Nothing is changed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn pending(&self) -> Result<Vec<String>, StoreError> {
        self.0.pending(MIGRATIONS).await
    }

    /// The migrations that there are.
    pub fn migrations() -> Vec<String> {
        MIGRATIONS.iter().map(|(_, name, _)| (*name).to_owned()).collect()
    }

    /// Where positions lie.
    pub fn store(&self) -> &Store {
        &self.0
    }

    /// Adds counts, and moves positions on: both or nothing.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Stale`] where another owner has written.
    pub async fn add(
        &self,
        group: &Group,
        moves: &[Move],
        all: Vec<JobStatus>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        // By key, so that writers come in one order and no two wait for each other.
        let mut counts: BTreeMap<JobKey, Counts> = BTreeMap::new();
        all.into_iter().for_each(|status| counts.entry(status.key).or_default().add(status.counts));
        let writing = async {
            let mut writing = self.0.begin().await?;
            advance(&mut writing, group, moves).await?;
            for (key, counts) in &counts {
                add(&mut writing, key, counts, now).await?;
            }
            add_rows(&mut writing, &counts, now).await?;
            writing.commit().await?;
            Ok(())
        };
        self.0.call(writing).await
    }

    /// The counts of a run.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn counts(&self, run: &JobRunId) -> Result<BTreeMap<JobKey, Counts>, StoreError> {
        let asking = sqlx::query_as(
            "select task_run, source, destination, taken, passed, failed from counts where job_run = $1",
        )
        .bind(text(run.as_str()));
        let pool = self.0.pool();
        let rows: Vec<(String, String, String, i64, i64, i64)> =
            self.0.call(async { Ok(asking.fetch_all(&pool).await?) }).await?;
        let count = |it: i64| it.max(0).unsigned_abs();
        let counted = rows.into_iter().map(|(task_run, source, destination, taken, passed, failed)| {
            let counts =
                Counts { taken: count(taken), passed: count(passed), failed: count(failed), failed_rows: Vec::new() };
            (key_of(run, task_run, source, destination), counts)
        });
        Ok(counted.collect())
    }

    /// Failed rows of a run behind a place, in their order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn failed_rows(&self, run: &JobRunId, behind: &Place, limit: u32) -> Result<Vec<StoredRow>, StoreError> {
        let asking = sqlx::query_as(
            "select task_run, source, destination, id, record, code from failed_rows \
             where job_run = $1 and (task_run, source, destination, id) > ($2, $3, $4, $5) \
             order by task_run, source, destination, id limit $6",
        )
        .bind(text(run.as_str()))
        .bind(behind.task_run.clone())
        .bind(behind.source.clone())
        .bind(behind.destination.clone())
        .bind(behind.id.clone())
        .bind(i64::from(limit));
        let pool = self.0.pool();
        let rows: Vec<(String, String, String, String, String, i64)> =
            self.0.call(async { Ok(asking.fetch_all(&pool).await?) }).await?;
        let stored = rows.into_iter().map(|(task_run, source, destination, id, record, code)| StoredRow {
            key: key_of(run, task_run.clone(), source.clone(), destination.clone()),
            row: FailedRow { record: record.into(), code: u16::try_from(code).unwrap_or(0) },
            place: Place { task_run, source, destination, id },
        });
        Ok(stored.collect())
    }

    /// Forgets the counts of these.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget(&self, keys: &[JobKey]) -> Result<(), StoreError> {
        let forgetting = async {
            let mut writing = self.0.begin().await?;
            for key in keys {
                sqlx::query("delete from counts where id = $1").bind(id_of(key, None)).execute(&mut *writing).await?;
            }
            writing.commit().await?;
            Ok(())
        };
        self.0.call(forgetting).await
    }

    /// Forgets the failed rows of these.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_rows(&self, run: &JobRunId, keys: &[JobKey]) -> Result<(), StoreError> {
        for key in keys {
            let names = [run.as_str(), key.task_run.as_str(), key.source.as_str(), destination(key)].map(text);
            let which = "job_run = $1 and task_run = $2 and source = $3 and destination = $4";
            self.delete("failed_rows", which, &names).await?;
        }
        Ok(())
    }

    /// Of whom a run has failed rows.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keys_of_failed_rows(&self, run: &JobRunId) -> Result<Vec<JobKey>, StoreError> {
        let asking =
            sqlx::query_as("select distinct task_run, source, destination from failed_rows where job_run = $1")
                .bind(text(run.as_str()));
        let pool = self.0.pool();
        let rows: Vec<(String, String, String)> = self.0.call(async { Ok(asking.fetch_all(&pool).await?) }).await?;
        Ok(rows.into_iter().map(|(task_run, source, to)| key_of(run, task_run, source, to)).collect())
    }

    /// Forgets runs of which nothing has changed since then. How many counts and rows that were.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn expire(&self, before: Timestamp) -> Result<u64, StoreError> {
        let mut gone = 0;
        for (ask, table) in [
            ("select job_run from counts group by job_run having max(changed_at) < $1 limit 100", "counts"),
            (
                "select job_run from failed_rows where not exists (select 1 from counts where counts.job_run = failed_rows.job_run) \
                 group by job_run having max(changed_at) < $1 limit 100",
                "failed_rows",
            ),
        ] {
            loop {
                let (asking, pool) = (sqlx::query_as(ask).bind(before.micros()), self.0.pool());
                let runs: Vec<(String,)> = self.0.call(async { Ok(asking.fetch_all(&pool).await?) }).await?;
                if runs.is_empty() {
                    break;
                }
                for (run,) in runs {
                    gone += self.delete(table, "job_run = $1", &[run]).await?;
                }
            }
        }
        Ok(gone)
    }

    /// Deletes in steps: no statement takes long, or keeps many rows from others.
    async fn delete(&self, table: &str, which: &str, names: &[String]) -> Result<u64, StoreError> {
        let statement = format!("delete from {table} where id in (select id from {table} where {which} limit {STEP})");
        let mut gone = 0;
        loop {
            let mut query = sqlx::query(AssertSqlSafe(statement.clone()));
            for name in names {
                query = query.bind(name.clone());
            }
            let pool = self.0.pool();
            let deleted = self.0.call(async { Ok(query.execute(&pool).await?.rows_affected()) }).await?;
            gone += deleted;
            if deleted < STEP {
                return Ok(gone);
            }
        }
    }
}

async fn add(connection: &mut AnyConnection, key: &JobKey, counts: &Counts, now: Timestamp) -> Result<(), StoreError> {
    // No sum of them may be too large for a column.
    let number = |count: u64| i64::try_from(count.min(1 << 40)).unwrap_or(0);
    sqlx::query(
        "insert into counts (id, job_run, task_run, source, destination, taken, passed, failed, changed_at) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9) on conflict (id) do update set taken = counts.taken + excluded.taken, \
         passed = counts.passed + excluded.passed, failed = counts.failed + excluded.failed, changed_at = excluded.changed_at",
    )
    .bind(id_of(key, None))
    .bind(text(key.job_run.as_str()))
    .bind(text(key.task_run.as_str()))
    .bind(text(key.source.as_str()))
    .bind(text(destination(key)))
    .bind(number(counts.taken))
    .bind(number(counts.passed))
    .bind(number(counts.failed))
    .bind(now.micros())
    .execute(&mut *connection)
    .await?;
    Ok(())
}

/// Rows of one statement.
const ROWS: usize = 200;

async fn add_rows(
    connection: &mut AnyConnection,
    counts: &BTreeMap<JobKey, Counts>,
    now: Timestamp,
) -> Result<(), StoreError> {
    // By id: one statement must not mean a row twice, and writers come in one order.
    let mut rows: BTreeMap<String, (&JobKey, String, u16)> = BTreeMap::new();
    for (key, counts) in counts {
        for row in &counts.failed_rows {
            let record = text(&String::from_utf8_lossy(&row.record));
            rows.entry(id_of(key, Some(&record))).or_insert((key, record, row.code));
        }
    }
    let rows: Vec<(String, (&JobKey, String, u16))> = rows.into_iter().collect();
    for rows in rows.chunks(ROWS) {
        let places = |row: usize| {
            let numbers: Vec<String> = (1..=8).map(|column| format!("${}", row * 8 + column)).collect();
            format!("({})", numbers.join(", "))
        };
        let values: Vec<String> = (0..rows.len()).map(places).collect();
        // The first code stays.
        let statement = format!(
            "insert into failed_rows (id, job_run, task_run, source, destination, record, code, changed_at) values {} \
             on conflict (id) do update set changed_at = excluded.changed_at",
            values.join(", ")
        );
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for (id, (key, record, code)) in rows {
            query = query
                .bind(id.clone())
                .bind(text(key.job_run.as_str()))
                .bind(text(key.task_run.as_str()))
                .bind(text(key.source.as_str()))
                .bind(text(destination(key)))
                .bind(record.clone())
                .bind(i64::from(*code))
                .bind(now.micros());
        }
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

/// A text that every database takes: Postgres knows no NUL.
fn text(raw: &str) -> String {
    raw.replace('\0', "\u{FFFD}")
}

fn destination(key: &JobKey) -> &str {
    key.destination.as_ref().map_or("", |id| id.as_str())
}

fn key_of(run: &JobRunId, task_run: String, source: String, destination: String) -> JobKey {
    let destination = (!destination.is_empty()).then(|| destination.into());
    JobKey { job_run: run.clone(), task_run: task_run.into(), source: source.into(), destination }
}

/// A digest of the names of a key, and of a row. Who sends rows chooses names: none is to be found that is another's.
fn id_of(key: &JobKey, record: Option<&str>) -> String {
    let mut digest = Md5::new();
    let parts = [key.job_run.as_str(), key.task_run.as_str(), key.source.as_str(), destination(key)];
    for part in parts.into_iter().chain(record) {
        let part = text(part);
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    format!("{:032x}", u128::from_be_bytes(digest.finalize().into()))
}
