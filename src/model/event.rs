//! One customer event, as it lies on the `events` topic (schemas/event.avsc).

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::model::id::{JobRunId, MessageId, SourceId, User, WorkspaceId, WriteKey};

/// How an event came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Http,
    Webhook,
    Pixel,
    Publish,
    Replay,
}

impl Channel {
    pub const ALL: [Channel; 5] = [Channel::Http, Channel::Webhook, Channel::Pixel, Channel::Publish, Channel::Replay];

    /// Its symbol in the schema.
    pub fn as_str(self) -> &'static str {
        match self {
            Channel::Http => "http",
            Channel::Webhook => "webhook",
            Channel::Pixel => "pixel",
            Channel::Publish => "publish",
            Channel::Replay => "replay",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub workspace: WorkspaceId,
    pub source: SourceId,
    pub write_key: WriteKey,
    /// Who stays in order; none where the event names nobody.
    pub user: Option<User>,
    pub message_id: MessageId,
    /// `track`, `page`, …: the text the event came with, not checked.
    pub event_type: String,
    pub received_at: Timestamp,
    pub request_ip: String,
    pub job_run: Option<JobRunId>,
    pub task_run: Option<JobRunId>,
    pub channel: Channel,
    /// The customer's JSON object, byte for byte but for what was spliced in.
    pub payload: Bytes,
}
