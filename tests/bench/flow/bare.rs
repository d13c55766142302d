//! The least that could do a stage's work: what the stages are measured against. No checks, no users, no errors.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use axum::routing::{get, post};
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{
    BaseRecord, DeliveryResult, FutureProducer, FutureRecord, Producer, ProducerContext, ThreadedProducer,
};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::value::RawValue;
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};

use crate::process::bootstrap;

fn client() -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", bootstrap());
    config
}

/// What goes along with an event in Laneway's format, of the same length.
const HEADERS: [(&str, &str); 5] = [
    ("lw-source", "src-1"),
    ("lw-workspace", "ws-1"),
    ("lw-user", "user-12345"),
    ("lw-message-id", "message-1234567"),
    ("content-type", "application/avro"),
];

/// axum and a producer: the body as it is, or each member of a batch; 200 when all replicas have it.
pub async fn gateway(port: u16, topic: &str, headers: bool) {
    let producer: FutureProducer = client()
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("linger.ms", "2")
        .create()
        .expect("a producer");
    let (topic, turn) = (topic.to_owned(), Arc::new(AtomicUsize::new(0)));
    let single = {
        let (producer, topic, turn) = (producer.clone(), topic.clone(), Arc::clone(&turn));
        async move |body: bytes::Bytes| {
            send(&producer, &topic, &turn, &body, headers).await;
            "OK"
        }
    };
    let batch = async move |body: bytes::Bytes| {
        let parsed: HashMap<&str, Vec<&RawValue>> = serde_json::from_slice(&body).expect("a batch");
        let events = &parsed["batch"];
        let events = events.iter().map(|event| send(&producer, &topic, &turn, event.get().as_bytes(), headers));
        futures_util::future::join_all(events).await;
        "OK"
    };
    let routes = axum::Router::new()
        .route("/", get(async || "OK"))
        .route("/v1/track", post(single))
        .route("/v1/batch", post(batch));
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a listener");
    axum::serve(listener, routes).await.expect("served");
}

async fn send(producer: &FutureProducer, topic: &str, turn: &AtomicUsize, body: &[u8], headers: bool) {
    let partition = (turn.fetch_add(1, Ordering::Relaxed) % 12) as i32;
    let mut record = FutureRecord::to(topic).partition(partition).key("wk-1").payload(body);
    if headers {
        let all = OwnedHeaders::new_with_capacity(HEADERS.len());
        let add = |all: OwnedHeaders, (key, value)| all.insert(Header { key, value: Some(value) });
        record = record.headers(HEADERS.into_iter().fold(all, add));
    }
    producer.send(record, Duration::from_secs(10)).await.expect("stored");
}

/// Counts what is still on its way.
#[derive(Default)]
struct Reports {
    waiting: AtomicUsize,
    lock: Mutex<()>,
    none_left: Condvar,
}

impl Reports {
    fn wait(&self, at_most: Duration) {
        let lock = self.lock.lock().expect("no poison");
        let some_left = |_: &mut ()| self.waiting.load(Ordering::Acquire) > 0;
        let waited = self.none_left.wait_timeout_while(lock, at_most, some_left).expect("no poison");
        assert!(!waited.1.timed_out(), "not stored within {at_most:?}");
    }
}

impl ClientContext for Reports {}

impl ProducerContext for Reports {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok(), "not stored");
        if self.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            drop(self.lock.lock().expect("no poison"));
            self.none_left.notify_one();
        }
    }
}

/// Reads `events` and writes each record as it is to `deliveries`, in transactions of what twenty milliseconds bring.
pub fn processor(prefix: &str, count: u64) {
    const CALL: Duration = Duration::from_secs(10);
    let consumer: BaseConsumer = client()
        .set("group.id", format!("{prefix}bare"))
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("fetch.queue.backoff.ms", "5")
        .set("fetch.wait.max.ms", "100")
        .create()
        .expect("a consumer");
    let producer: ThreadedProducer<Reports> = client()
        .set("transactional.id", format!("{prefix}bare"))
        .set("linger.ms", "1")
        .set("queue.buffering.max.messages", "200000")
        .set("retry.backoff.ms", "5")
        .create_with_context(Reports::default())
        .expect("a producer");
    let (from, to) = (format!("{prefix}events"), format!("{prefix}deliveries"));
    producer.init_transactions(CALL).expect("a transactional id");
    consumer.subscribe(&[&from]).expect("subscribed");
    let (mut done, deadline) = (Done::default(), Instant::now() + crate::PATIENCE);
    while done.seen < count {
        let (mut offsets, mut is_open, mut until) = (HashMap::<i32, i64>::new(), false, None::<Instant>);
        let mut copied = 0;
        while until.is_none_or(|until| Instant::now() < until) {
            assert!(Instant::now() < deadline, "{} of {count} have come", done.seen);
            let Some(Ok(message)) = consumer.poll(Duration::from_millis(5)) else { continue };
            if !is_open {
                producer.begin_transaction().expect("begun");
                (is_open, until) = (true, Some(Instant::now() + Duration::from_millis(20)));
            }
            offsets.insert(message.partition(), message.offset() + 1);
            copied += 1;
            producer.context().waiting.fetch_add(1, Ordering::Release);
            let record: BaseRecord<'_, [u8], [u8]> =
                BaseRecord::to(&to).partition(message.partition()).payload(message.payload().unwrap_or_default());
            if let Err((error, _)) = producer.send(record.key(message.key().unwrap_or_default())) {
                panic!("not taken: {error}");
            }
        }
        // What `commit_transaction` would flush takes a tenth of a second there.
        producer.context().wait(CALL);
        let mut list = TopicPartitionList::new();
        for (partition, offset) in offsets {
            list.add_partition_offset(&from, partition, Offset::Offset(offset)).expect("added");
        }
        let group = consumer.group_metadata().expect("a member");
        producer.send_offsets_to_transaction(&list, &group, CALL).expect("offsets");
        producer.commit_transaction(CALL).expect("committed");
        done.more(copied);
    }
    done.tell(count);
}

/// What a bare loop has done, from its first step on: what that brought does not count.
#[derive(Default)]
pub struct Done {
    pub seen: u64,
    first: u64,
    began: Option<(Instant, f64)>,
}

impl Done {
    pub fn more(&mut self, copied: u64) {
        self.seen += copied;
        if self.began.is_none() && copied > 0 {
            (self.first, self.began) = (self.seen, Some((Instant::now(), cpu())));
        }
    }

    /// Prints seconds and CPU that all of it would have taken.
    pub fn tell(self, count: u64) {
        let (began, before) = self.began.expect("it has begun");
        let of_all = count as f64 / (self.seen - self.first).max(1) as f64;
        let (seconds, cpu) = (began.elapsed().as_secs_f64() * of_all, (cpu() - before) * of_all);
        println!("{}", serde_json::json!({"seconds": seconds, "cpu": cpu}));
    }
}

/// Seconds of CPU that this process has used.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Batches of this many records in a row of their own, as many as twenty milliseconds bring in a transaction.
const BATCH: usize = 100;

async fn durable(file: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    SqliteConnection::connect_with(&options).await.expect("a file")
}

/// Fills `events`, then reads them and writes each batch as it is to `deliveries`, with the position in the same transaction.
pub async fn sqlite_processor(file: &Path, count: u64) {
    let mut connection = durable(file).await;
    for table in ["events", "deliveries"] {
        let create = format!("create table {table} (id integer primary key, body blob not null)");
        sqlx::query(sqlx::AssertSqlSafe(create)).execute(&mut connection).await.expect("created");
    }
    sqlx::query("create table position (at integer not null)").execute(&mut connection).await.expect("created");
    sqlx::query("insert into position values (0)").execute(&mut connection).await.expect("begun");
    let mut filling = connection.begin().await.expect("begun");
    for first in (0..count).step_by(BATCH) {
        let body: String = (first..(first + BATCH as u64).min(count)).map(crate::event).collect();
        let insert = sqlx::query("insert into events (body) values (?)").bind(body.into_bytes());
        insert.execute(&mut *filling).await.expect("written");
    }
    filling.commit().await.expect("filled");
    let (mut done, mut at) = (Done::default(), 0_i64);
    while done.seen < count {
        let until = Instant::now() + Duration::from_millis(20);
        let (mut copied, mut transaction) = (0, connection.begin().await.expect("begun"));
        while Instant::now() < until {
            let next =
                sqlx::query_as::<_, (i64, Vec<u8>)>("select id, body from events where id > ? order by id limit 10");
            let some = next.bind(at).fetch_all(&mut *transaction).await.expect("read");
            let Some((last, _)) = some.last() else { break };
            at = *last;
            for (_, body) in some {
                let insert = sqlx::query("insert into deliveries (body) values (?)").bind(body);
                insert.execute(&mut *transaction).await.expect("written");
                copied += BATCH as u64;
            }
        }
        let moved = sqlx::query("update position set at = ?").bind(at);
        moved.execute(&mut *transaction).await.expect("moved");
        transaction.commit().await.expect("committed");
        done.more(copied);
    }
    done.tell(count);
}

/// Records a second that one connection writes durably: a thousand of 1 KB in a row, a transaction for each.
pub async fn sqlite(file: &Path, during: Duration) -> f64 {
    let mut connection = durable(file).await;
    sqlx::query("create table batches (id integer primary key, body blob not null)")
        .execute(&mut connection)
        .await
        .expect("created");
    let (began, mut written, body) = (Instant::now(), 0_u64, vec![b'x'; 100 * 1_000]);
    while began.elapsed() < during {
        let mut transaction = connection.begin().await.expect("begun");
        for _ in 0..10 {
            sqlx::query("insert into batches (body) values (?)")
                .bind(&body)
                .execute(&mut *transaction)
                .await
                .expect("written");
        }
        transaction.commit().await.expect("committed");
        written += 1_000;
    }
    written as f64 / began.elapsed().as_secs_f64()
}
