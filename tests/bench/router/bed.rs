//! What a run lies in: topics of its own on the test Kafka or Pulsar, filled directly, and the router as a process of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use laneway::clock::Clock;
use laneway::log::kafka::{Kafka, KafkaConfig};
use laneway::log::partitioner::Placement;
use laneway::log::pulsar::PulsarLog;
use laneway::log::topic::Topics;
use laneway::log::{Backend, Publisher};
use laneway::model::codec;
use laneway::model::delivery::{BodyFormat, Delivery, HttpRequest, Payload, TransformAt};
use laneway::model::record::{Addressed, Headers, Partition, Topic, header};

use crate::process::{Running, Setting, bootstrap, pulsar};
use crate::sink::Sink;

/// Of a delivery's body, in bytes: with the rest a record is about 1 KB.
const BODY: usize = 600;
/// Records in one call of the publisher, and calls at a time.
const BATCH: usize = 500;
const CALLS: usize = 8;

/// Where deliveries go.
#[derive(Clone, Copy)]
pub enum Place {
    /// As the processor would put them.
    Usual,
    /// All into one partition, so that they are in each other's way as much as they can be.
    One,
}

/// Which log, with what writes to it.
#[derive(Clone)]
enum Log {
    Kafka(Kafka, <Kafka as Backend>::Publisher),
    Pulsar(PulsarLog, <PulsarLog as Backend>::Publisher),
}

impl Log {
    fn of(setting: &Setting, is_pulsar: bool) -> Self {
        if is_pulsar {
            let log = PulsarLog::new(pulsar(&setting.prefix)).expect("a log");
            let publisher = log.publisher().expect("a publisher");
            return Log::Pulsar(log, publisher);
        }
        let log = Kafka::new(KafkaConfig {
            bootstrap_servers: bootstrap(),
            prefix: setting.prefix.clone(),
            properties: Default::default(),
        });
        let publisher = log.publisher().expect("a publisher");
        Log::Kafka(log, publisher)
    }

    async fn publish(self, records: Vec<Addressed>) {
        match self {
            Log::Kafka(_, publisher) => publisher.publish(records).await.expect("published"),
            Log::Pulsar(_, publisher) => publisher.publish(records).await.expect("published"),
        }
    }
}

pub struct Bed {
    setting: Setting,
    log: Log,
    placement: Placement,
    place: Place,
    clock: Clock,
    port: u16,
    pub sink: Arc<Sink>,
    numbers: HashMap<(u32, u32), u32>,
    pub published: u64,
    pub bytes: u64,
    router: Option<Running>,
}

impl Bed {
    /// Topics, a workspace of so many webhooks, and their sink.
    pub async fn new(destinations: usize, place: Place, config: &str) -> Self {
        let (sink, port) = Sink::start(destinations).await;
        let each = |number| {
            serde_json::json!({"id": format!("d{number}"), "enabled": true, "config": {"webhookUrl": format!("http://127.0.0.1:{port}/"),
                "webhookMethod": "POST"}, "destinationDefinition": {"name": "WEBHOOK", "displayName": "Webhook", "config": {}}})
        };
        let all: Vec<serde_json::Value> = (0..destinations).map(each).collect();
        let workspace = serde_json::json!({"workspaceId": "ws-1", "sources": [{"id": "src-1", "writeKey": "wk-1", "enabled": true,
            "destinations": all}]});
        let is_pulsar = std::env::var("LOG").is_ok_and(|log| log == "pulsar");
        let setting = match is_pulsar {
            true => Setting::on_pulsar(&workspace, config),
            false => Setting::new(&workspace, config),
        };
        let log = Log::of(&setting, is_pulsar);
        let topics = Topics::load(None).expect("topics");
        let deliveries = topics.iter().find(|spec| spec.topic() == Topic::DELIVERIES).expect("deliveries");
        let placement = deliveries.placement();
        Self {
            setting,
            log,
            placement,
            place,
            clock: Clock::system(),
            port,
            sink,
            numbers: HashMap::new(),
            published: 0,
            bytes: 0,
            router: None,
        }
    }

    /// Publishes one delivery for each pair of destination and user, in order, and waits until the log has them.
    pub async fn fill(&mut self, pairs: impl IntoIterator<Item = (u32, u32)>) {
        let mut pairs = pairs.into_iter().peekable();
        let mut calls = FuturesUnordered::new();
        while pairs.peek().is_some() {
            let batch: Vec<Addressed> = pairs.by_ref().take(BATCH).map(|(d, user)| self.delivery(d, user)).collect();
            calls.push(self.log.clone().publish(batch));
            if calls.len() >= CALLS {
                calls.next().await;
            }
        }
        while calls.next().await.is_some() {}
    }

    fn delivery(&mut self, destination: u32, user: u32) -> Addressed {
        let number = self.numbers.entry((destination, user)).or_default();
        let (this, sent) = (*number, self.clock.now().micros());
        *number += 1;
        self.published += 1;
        let url = format!("http://127.0.0.1:{}/{destination}/{user}/{this}/{sent}", self.port);
        let (id, name) = (format!("d{destination}"), format!("user-{user}"));
        let message = format!("message-{}", self.published);
        let request = HttpRequest {
            method: "POST".into(),
            url,
            headers: vec![("Content-Type".into(), "application/json".into())],
            params: Vec::new(),
            body_format: BodyFormat::Json,
            body: vec![b'x'; BODY].into(),
        };
        let delivery = Delivery {
            delivery_id: format!("{:032x}", self.published).as_str().into(),
            workspace: "ws-1".into(),
            source: "src-1".into(),
            destination: id.as_str().into(),
            destination_type: "WEBHOOK".into(),
            user: Some(name.as_str().into()),
            message_id: message.as_str().into(),
            event_type: "track".into(),
            event_name: None,
            received_at: self.clock.now(),
            job_run: None,
            task_run: None,
            record_id: None,
            transform_at: TransformAt::Processor,
            payload: Payload::Request(request),
        };
        let mut headers = Headers::new();
        for (header, value) in [
            (header::SOURCE, "src-1"),
            (header::WORKSPACE, "ws-1"),
            (header::DESTINATION, &id),
            (header::USER, &name),
            (header::MESSAGE_ID, &message),
            (header::DELIVERY_ID, delivery.delivery_id.as_str()),
            (header::CONTENT_TYPE, header::AVRO),
        ] {
            headers.push_text(header, value);
        }
        let value: bytes::Bytes = codec::encode(&delivery).into();
        self.bytes += value.len() as u64;
        let partition = match self.place {
            Place::Usual => self.placement.place(&id, &name),
            Place::One => Partition(0),
        };
        Addressed { topic: Topic::DELIVERIES, partition, key: Some(id.into()), value: Some(value), headers }
    }

    /// Publishes what `next` names, so many a second, for so long.
    pub async fn stream(&mut self, rate: u32, during: Duration, mut next: impl FnMut(u64) -> Vec<(u32, u32)>) {
        let (began, mut round) = (Instant::now(), 0u64);
        while began.elapsed() < during {
            let pairs: Vec<(u32, u32)> = next(round).into_iter().collect();
            self.fill(pairs).await;
            round += 1;
            let due = began + Duration::from_secs_f64(round as f64 / f64::from(rate));
            tokio::time::sleep_until(due.into()).await;
        }
    }

    /// Starts the router and waits until it is ready. Tells how long that took.
    pub async fn start(&mut self) -> Duration {
        let began = Instant::now();
        self.router = Some(self.setting.start("router").await);
        began.elapsed()
    }

    pub fn kill(&mut self) {
        self.router = None;
    }

    fn router(&self) -> &Running {
        self.router.as_ref().expect("a running router")
    }

    /// Seconds of CPU that the router has used.
    pub fn cpu(&self) -> f64 {
        self.router().cpu()
    }

    /// The most memory that the router has had, in MB.
    pub fn peak_memory(&self) -> u64 {
        self.router().peak_memory()
    }

    /// The sum of a metric's series.
    pub async fn metric(&self, name: &str) -> f64 {
        self.router().metric(name).await
    }

    /// Waits until so many have been delivered. False where nothing has come for `patience`.
    pub async fn until(&self, delivered: u64, patience: Duration) -> bool {
        let mut grown = self.sink.grown();
        while *grown.borrow_and_update() < delivered {
            if tokio::time::timeout(patience, grown.changed()).await.is_err() {
                eprintln!("the router said last:\n{}", self.setting.said());
                return false;
            }
        }
        true
    }

    /// The rate at which nothing but a reader gets through partition 0, in bytes of records a second.
    pub async fn bare_reader(&self) -> f64 {
        match &self.log {
            Log::Kafka(log, _) => read_all(log).await,
            Log::Pulsar(log, _) => read_all(log).await,
        }
    }
}

async fn read_all<B: Backend>(log: &B) -> f64 {
    use laneway::log::{Limit, Read, Reader};
    let reader = log.reader(&Topic::DELIVERIES, Partition(0), Default::default()).await;
    let (mut reader, began, mut bytes) = (reader.expect("a reader"), Instant::now(), 0usize);
    while let Ok(Read::Records(records)) = reader.read(Limit { records: 5_000, bytes: 4 << 20 }).await {
        bytes += records.iter().map(|record| record.value.as_ref().map_or(0, bytes::Bytes::len)).sum::<usize>();
    }
    bytes as f64 / began.elapsed().as_secs_f64()
}
