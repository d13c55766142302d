//! Every route, once: the router is built from this table, and so is what `/docs` and `/openapi.json` say.

use super::auth::Auth;
use super::job_status::About;
use super::request::Call;

/// What a route does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Takes events.
    Ingest(Ingest),
    /// Takes one event from its own address, and answers with a picture whatever becomes of it.
    Pixel(&'static str),
    /// Takes a request of another tool, whose meaning the transformer service knows.
    Webhook,
    /// Takes messages that another edge has admitted.
    Messages,
    /// Ends what is pending of a run of reverse ETL.
    DrainJob,
    /// Tells what became of its rows, or forgets it.
    JobStatus(About),
    /// Passes it on to the warehouse service.
    Warehouse,
    SourceConfig,
    /// What Segment's SDKs ask before they start.
    Settings,
    Health,
    Version,
    Robots,
    Docs(Listener),
    OpenApi(Listener),
}

/// Whose routes a description lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Public,
    /// Both: who has the token may know what there is.
    Internal,
}

impl Listener {
    /// Its endpoints by title, the internal ones last.
    pub fn described(self) -> Vec<(&'static str, &'static [Endpoint], bool)> {
        let mut all: Vec<(&str, &[Endpoint], bool)> = vec![("Public", &PUBLIC, false)];
        if self == Listener::Internal {
            all.push(("Internal (gateway.internal.listen, with a token)", &INTERNAL, true));
        }
        all
    }
}

/// How events are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ingest {
    pub call: Call,
    pub auth: Auth,
    pub kind: Kind,
}

/// What makes the difference when not everything can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Users do it now.
    Live,
    /// It can come later: imports, reverse ETL.
    Backfill,
    /// It has been here before; it can come later too.
    Replay,
}

#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    /// In lower case, as OpenAPI writes it.
    pub method: &'static str,
    pub path: &'static str,
    pub summary: &'static str,
    pub action: Action,
}

const fn at(method: &'static str, path: &'static str, action: Action, summary: &'static str) -> Endpoint {
    Endpoint { method, path, summary, action }
}

const fn ingest(path: &'static str, call: Call, auth: Auth, kind: Kind, summary: &'static str) -> Endpoint {
    at("post", path, Action::Ingest(Ingest { call, auth, kind }), summary)
}

const fn typed(path: &'static str, word: &'static str, summary: &'static str) -> Endpoint {
    ingest(path, Call::Typed(word), Auth::HeaderOrBody, Kind::Live, summary)
}

/// What newer SDKs of Segment send: the first letter of the type in the path, the write key in the body.
const fn short(path: &'static str, word: &'static str) -> Endpoint {
    typed(path, word, "The same, as newer SDKs of Segment send it.")
}

const fn batch(path: &'static str) -> Endpoint {
    let summary = "Several events, as newer SDKs of Segment send them.";
    ingest(path, Call::Batch, Auth::HeaderOrBody, Kind::Live, summary)
}

/// For everybody.
pub const PUBLIC: [Endpoint; 38] = [
    typed("/v1/identify", "identify", "Who a user is."),
    typed("/v1/track", "track", "What a user did."),
    typed("/v1/page", "page", "A page that a user saw."),
    typed("/v1/screen", "screen", "A screen of an app that a user saw."),
    typed("/v1/group", "group", "The group that a user belongs to."),
    typed("/v1/alias", "alias", "A user's new id."),
    typed("/v1/merge", "merge", "Ids that are the same user."),
    typed("/v1/audiencelist", "audiencelist", "Members of an audience; as large as a request may be."),
    ingest("/v1/batch", Call::Batch, Auth::HeaderOrBody, Kind::Live, "Several events, each with its type."),
    short("/v1/i", "identify"),
    short("/v1/t", "track"),
    short("/v1/p", "page"),
    short("/v1/s", "screen"),
    short("/v1/g", "group"),
    short("/v1/a", "alias"),
    batch("/v1/b"),
    short("/i", "identify"),
    short("/t", "track"),
    short("/p", "page"),
    short("/s", "screen"),
    short("/g", "group"),
    short("/a", "alias"),
    batch("/b"),
    ingest(
        "/v1/import",
        Call::Batch,
        Auth::HeaderOrBody,
        Kind::Backfill,
        "Several events of the past; turned away before live ones.",
    ),
    at("post", "/v1/webhook", Action::Webhook, "A request of another tool, of a source of the category `webhook`."),
    at("get", "/v1/webhook", Action::Webhook, "The same, of the types of sources that send events so."),
    ingest("/beacon/v1/batch", Call::Batch, Auth::QueryKey, Kind::Live, "Several events, from `navigator.sendBeacon`."),
    at(
        "get",
        "/pixel/v1/track",
        Action::Pixel("track"),
        "An event as the address of an image: each parameter is a field.",
    ),
    at("get", "/pixel/v1/page", Action::Pixel("page"), "A page as the address of an image: each parameter is a field."),
    at("get", "/sourceConfig", Action::SourceConfig, "What browser SDKs ask before they start."),
    at("get", "/v1/projects/{write_key}/settings", Action::Settings, "What SDKs of Segment ask before they start."),
    at("get", "/projects/{write_key}/settings", Action::Settings, "The same, for SDKs whose host has no path."),
    at("get", "/health", Action::Health, "Whether events are taken."),
    at("get", "/", Action::Health, "Whether events are taken."),
    at("get", "/version", Action::Version, "Which version this is."),
    at("get", "/robots.txt", Action::Robots, "Nothing here is for search engines."),
    at("get", "/docs", Action::Docs(Listener::Public), "This list, to read."),
    at("get", "/openapi.json", Action::OpenApi(Listener::Public), "This list, as OpenAPI 3.1."),
];

const STATUS: &str = "/internal/v2/job-status/{job_run_id}";
const FAILED: &str = "/internal/v2/job-status/{job_run_id}/failed-records";

/// On the internal listener, for who has its token.
pub const INTERNAL: [Endpoint; 17] = [
    at("get", "/internal/docs", Action::Docs(Listener::Internal), "This list, to read."),
    at("get", "/internal/openapi.json", Action::OpenApi(Listener::Internal), "This list, as OpenAPI 3.1."),
    ingest(
        "/internal/v1/extract",
        Call::Typed("extract"),
        Auth::WriteKey,
        Kind::Backfill,
        "A row that was extracted; it needs no identity.",
    ),
    ingest(
        "/internal/v1/retl",
        Call::Batch,
        Auth::SourceId,
        Kind::Backfill,
        "Rows of reverse ETL, to all destinations of a source or one.",
    ),
    ingest(
        "/internal/v1/replay",
        Call::Batch,
        Auth::Replay,
        Kind::Replay,
        "Events of the past, with the time at which they were received.",
    ),
    ingest(
        "/internal/v1/audiencelist",
        Call::Typed("audiencelist"),
        Auth::WriteKey,
        Kind::Live,
        "Members of an audience.",
    ),
    at(
        "post",
        "/internal/v1/batch",
        Action::Messages,
        "Messages that another edge has admitted: properties and payload.",
    ),
    at(
        "put",
        "/internal/drain/job/{job_run_id}",
        Action::DrainJob,
        "Ends what is pending of a run of reverse ETL, without sending it.",
    ),
    at("get", "/internal/v1/warehouse/fetch-tables", Action::Warehouse, "The warehouse service: its tables."),
    at("post", "/internal/v1/warehouse/pending-events", Action::Warehouse, "The warehouse service: what is pending."),
    at("post", "/internal/v1/warehouse/trigger-upload", Action::Warehouse, "The warehouse service: uploads now."),
    at("post", "/internal/v1/warehouse/jobs", Action::Warehouse, "The warehouse service: a new job."),
    at("get", "/internal/v1/warehouse/jobs/status", Action::Warehouse, "The warehouse service: how a job is."),
    at(
        "get",
        STATUS,
        Action::JobStatus(About::Status),
        "What became of a run's rows: in, out and failed, and whether that is all.",
    ),
    at("delete", STATUS, Action::JobStatus(About::Status), "Forgets the counts of a run that is completed."),
    at("get", FAILED, Action::JobStatus(About::FailedRecords), "Rows of a run that failed for good."),
    at("delete", FAILED, Action::JobStatus(About::FailedRecords), "Forgets the failed rows of a run."),
];
