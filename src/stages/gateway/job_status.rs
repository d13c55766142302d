//! `/internal/v2/job-status`: what became of the rows of a run of reverse ETL, from the store.
//!
//! A run is completed when everything that came in came through or failed, at its source and at every destination. The
//! counts are those of a moment: who asks has to know that it has sent everything. Nothing that the edge had answered before the
//! question is left out of a `completed: true`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::model::id::JobRunId;
use crate::model::job_status::{Counts, JobKey};
use crate::store::StoreError;
use crate::store::job_status::{JobStatusStore, Place, StoredRow};
use crate::telemetry::seldom;

use super::reply;
use super::request::Refusal;

/// A question that has no turn within this time is answered with 503, so that none waits without bound.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);
/// Rows that are read at a time, and those in an answer where nobody says how many.
const PAGE: u32 = 1_000;
const MOST_ROWS: usize = 100_000;
const MOST_BYTES: usize = 8 << 20;
/// Questions at a time: each may keep a reader and a connection.
const AT_A_TIME: usize = 8;

/// Waits a moment until everything that was counted of a run before is in the store; false where it is not.
pub type CaughtUp = Arc<dyn Fn(JobRunId) -> BoxFuture<'static, bool> + Send + Sync>;

pub struct JobStatusApi {
    store: JobStatusStore,
    caught_up: CaughtUp,
    turns: Semaphore,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    Status,
    FailedRecords,
}

/// `?task_run_id=…&source_id=…&pageSize=…&pageToken=…`
#[derive(Default)]
struct Query {
    task_runs: BTreeSet<String>,
    sources: BTreeSet<String>,
    size: Option<usize>,
    token: Option<String>,
}

impl Query {
    fn of(text: &str) -> Self {
        let mut query = Self::default();
        for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
            match name.as_ref() {
                "task_run_id" => drop(query.task_runs.insert(value.into_owned())),
                "source_id" => drop(query.sources.insert(value.into_owned())),
                "pageSize" => query.size = value.parse().ok().filter(|size| *size > 0),
                "pageToken" => query.token = Some(value.into_owned()).filter(|token| !token.is_empty()),
                _ => {}
            }
        }
        query
    }

    fn means(&self, key: &JobKey) -> bool {
        (self.task_runs.is_empty() || self.task_runs.contains(key.task_run.as_str()))
            && (self.sources.is_empty() || self.sources.contains(key.source.as_str()))
    }
}

/// Why there is no answer.
enum Failed {
    NotFound,
    NotCompleted,
    BadToken,
    Store(StoreError),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Failed::Store(error)
    }
}

impl JobStatusApi {
    pub fn new(store: JobStatusStore, caught_up: CaughtUp) -> Self {
        Self { store, caught_up, turns: Semaphore::new(AT_A_TIME) }
    }

    /// Answers. `is_delete`: forget it instead of telling.
    pub async fn answer(&self, about: About, is_delete: bool, run: &str, query: &str) -> Response {
        if run.trim().is_empty() {
            return reply::text(StatusCode::BAD_REQUEST, "job_run_id not found");
        }
        let (run, query) = (JobRunId::from(run), Query::of(query));
        let turn = tokio::time::timeout(TURN_TIMEOUT, self.turns.acquire()).await;
        let Ok(Ok(_turn)) = turn else { return reply::refuse(Refusal::Unavailable) };
        let told = match (about, is_delete) {
            (About::Status, false) => self.status(&run, &query).await.map(Some),
            (About::Status, true) => self.forget(&run, &query).await.map(|()| None),
            (About::FailedRecords, false) => self.failed(&run, &query).await.map(Some),
            (About::FailedRecords, true) => self.forget_failed(&run, &query).await.map(|()| None),
        };
        match told {
            Ok(Some(body)) => {
                let kind =
                    [(header::CONTENT_TYPE, "application/json; charset=utf-8"), (header::CACHE_CONTROL, "no-store")];
                (StatusCode::OK, kind, body).into_response()
            }
            Ok(None) => StatusCode::NO_CONTENT.into_response(),
            Err(Failed::NotFound) => reply::text(StatusCode::NOT_FOUND, "status not found"),
            Err(Failed::NotCompleted) => reply::text(StatusCode::BAD_REQUEST, "source not completed"),
            Err(Failed::BadToken) => reply::text(StatusCode::BAD_REQUEST, "invalid page token"),
            Err(Failed::Store(error)) => {
                if let Some(left_out) = seldom::due("job status not told", &error.to_string()) {
                    tracing::warn!(%error, left_out, "the store of job status does not answer");
                }
                reply::refuse(Refusal::Unavailable)
            }
        }
    }

    async fn counts(&self, run: &JobRunId, query: &Query) -> Result<(Sources, bool), Failed> {
        // Asked first: what comes while it is waited for may be counted or not.
        let is_caught_up = (self.caught_up)(run.clone()).await;
        let found = self.store.counts(run).await?;
        let mut sources = Sources::new();
        for (key, counts) in found.into_iter().filter(|(key, _)| query.means(key)) {
            let source = sources.entry((key.task_run.to_string(), key.source.to_string())).or_default();
            match key.destination {
                None => source.own = repaired(counts),
                Some(id) => drop(source.destinations.insert(id.to_string(), repaired(counts))),
            }
        }
        if sources.is_empty() { Err(Failed::NotFound) } else { Ok((sources, is_caught_up)) }
    }

    async fn status(&self, run: &JobRunId, query: &Query) -> Result<String, Failed> {
        let (sources, is_caught_up) = self.counts(run, query).await?;
        let mut tasks: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
        for ((task, id), source) in &sources {
            let destinations: Vec<Value> = source
                .destinations
                .iter()
                .map(|(id, counts)| {
                    json!({"id": id, "completed": is_caught_up && is_completed(counts), "stats": stats(counts)})
                })
                .collect();
            tasks.entry(task).or_default().push(json!({
                "id": id, "completed": is_caught_up && source.is_completed(), "stats": stats(&source.own),
                "destinations": destinations,
            }));
        }
        let tasks: Vec<Value> = tasks.into_iter().map(|(id, sources)| json!({"id": id, "sources": sources})).collect();
        Ok(json!({"id": run.as_str(), "tasks": tasks}).to_string())
    }

    async fn forget(&self, run: &JobRunId, query: &Query) -> Result<(), Failed> {
        let (sources, is_caught_up) = self.counts(run, query).await?;
        if !is_caught_up || !sources.values().all(Source::is_completed) {
            return Err(Failed::NotCompleted);
        }
        let found = self.store.counts(run).await?;
        let keys: Vec<JobKey> = found.into_keys().filter(|key| query.means(key)).collect();
        Ok(self.store.forget(&keys).await?)
    }

    async fn failed(&self, run: &JobRunId, query: &Query) -> Result<String, Failed> {
        let mut behind = Place::default();
        if let Some(token) = &query.token {
            behind = place_of(token).ok_or(Failed::BadToken)?;
        }
        let most = query.size.unwrap_or(MOST_ROWS).min(MOST_ROWS);
        let (mut rows, mut bytes): (Vec<StoredRow>, usize) = (Vec::new(), 0);
        let is_full = |rows: &[StoredRow], bytes| rows.len() >= most || bytes >= MOST_BYTES;
        while !is_full(&rows, bytes) {
            let found = self.store.failed_rows(run, &behind, PAGE).await?;
            let Some(last) = found.last() else { break };
            behind = last.place.clone();
            for row in found.into_iter().filter(|row| query.means(&row.key)) {
                if is_full(&rows, bytes) {
                    break;
                }
                bytes += row.row.record.len();
                rows.push(row);
            }
        }
        let next = rows.last().filter(|_| is_full(&rows, bytes)).map(|last| token_of(&last.place));
        let paging = next.map(|next| Paging { size: most, next });
        let answer = Answer { id: run.as_str(), tasks: tasks_of(&rows), paging };
        serde_json::to_string(&answer).map_err(|error| Failed::Store(StoreError::Refused(error.to_string())))
    }

    async fn forget_failed(&self, run: &JobRunId, query: &Query) -> Result<(), Failed> {
        let keys = self.store.keys_of_failed_rows(run).await?;
        let keys: Vec<JobKey> = keys.into_iter().filter(|key| query.means(key)).collect();
        Ok(self.store.forget_rows(run, &keys).await?)
    }
}

/// By task run and source.
type Sources = BTreeMap<(String, String), Source>;

#[derive(Default)]
struct Source {
    own: Counts,
    destinations: BTreeMap<String, Counts>,
}

impl Source {
    fn is_completed(&self) -> bool {
        is_completed(&self.own) && self.destinations.values().all(is_completed)
    }
}

/// More can come out than was counted in: rows that were published to the topic, a request whose client tried again. What came
/// out had come in.
fn repaired(counts: Counts) -> Counts {
    Counts { taken: counts.taken.max(counts.passed + counts.failed), ..counts }
}

fn is_completed(counts: &Counts) -> bool {
    counts.taken == counts.passed + counts.failed
}

fn stats(counts: &Counts) -> Value {
    json!({"in": counts.taken, "out": counts.passed, "failed": counts.failed})
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    tasks: Option<Vec<Task<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    paging: Option<Paging>,
}

#[derive(Serialize)]
struct Paging {
    size: usize,
    next: String,
}

#[derive(Serialize)]
struct Task<'a> {
    id: &'a str,
    sources: Vec<FailedSource<'a>>,
}

#[derive(Serialize)]
struct FailedSource<'a> {
    id: &'a str,
    records: Vec<FailedRecord<'a>>,
    destinations: Vec<FailedDestination<'a>>,
}

#[derive(Serialize)]
struct FailedDestination<'a> {
    id: &'a str,
    records: Vec<FailedRecord<'a>>,
}

#[derive(Serialize)]
struct FailedRecord<'a> {
    record: Record<'a>,
    code: u16,
}

/// JSON as it came; a text, where it is none.
#[derive(Serialize)]
#[serde(untagged)]
enum Record<'a> {
    Json(&'a RawValue),
    Text(std::borrow::Cow<'a, str>),
}

/// Rows in the order of the store: by task run, source, destination, where a source's own come first.
fn tasks_of(rows: &[StoredRow]) -> Option<Vec<Task<'_>>> {
    let mut tasks: Vec<Task<'_>> = Vec::new();
    for StoredRow { key, row, .. } in rows {
        let (task_id, source_id) = (key.task_run.as_str(), key.source.as_str());
        if tasks.last().is_none_or(|last| last.id != task_id) {
            tasks.push(Task { id: task_id, sources: Vec::new() });
        }
        let Some(task) = tasks.last_mut() else { continue };
        if task.sources.last().is_none_or(|last| last.id != source_id) {
            task.sources.push(FailedSource { id: source_id, records: Vec::new(), destinations: Vec::new() });
        }
        let Some(source) = task.sources.last_mut() else { continue };
        let record = match serde_json::from_slice(&row.record) {
            Ok(json) => Record::Json(json),
            Err(_) => Record::Text(String::from_utf8_lossy(&row.record)),
        };
        let failed = FailedRecord { record, code: row.code };
        let Some(id) = key.destination.as_ref().map(|id| id.as_str()) else {
            source.records.push(failed);
            continue;
        };
        if source.destinations.last().is_none_or(|last| last.id != id) {
            source.destinations.push(FailedDestination { id, records: Vec::new() });
        }
        if let Some(last) = source.destinations.last_mut() {
            last.records.push(failed);
        }
    }
    (!tasks.is_empty()).then_some(tasks)
}

#[derive(Deserialize, Serialize)]
struct Token(String, String, String, String);

fn token_of(place: &Place) -> String {
    let Place { task_run, source, destination, id } = place.clone();
    let text = serde_json::to_vec(&Token(task_run, source, destination, id)).unwrap_or_default();
    BASE64_URL_SAFE_NO_PAD.encode(text)
}

fn place_of(token: &str) -> Option<Place> {
    let text = BASE64_URL_SAFE_NO_PAD.decode(token.trim_end_matches('=')).ok()?;
    let Token(task_run, source, destination, id) = serde_json::from_slice(&text).ok()?;
    // No database has it, and some refuse to be asked for it.
    let has_nul = [&task_run, &source, &destination, &id].iter().any(|part| part.contains('\0'));
    (!has_nul).then_some(Place { task_run, source, destination, id })
}
