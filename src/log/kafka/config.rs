//! How the clients are set up. What users give in `log.kafka.properties` wins over defaults, but not over what the engine's
//! guarantees rest on.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;

use crate::log::Member;
use crate::model::record::Topic;

/// A transaction of a dead process holds up everyone who reads what it wrote, so it may not live long.
pub const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub struct KafkaConfig {
    pub bootstrap_servers: String,
    /// Stands before every topic, group and transactional id.
    pub prefix: String,
    /// librdkafka settings, passed through.
    pub properties: BTreeMap<String, String>,
}

impl std::fmt::Debug for KafkaConfig {
    /// Without the properties' values, which may be secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KafkaConfig")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("prefix", &self.prefix)
            .field("properties", &self.properties.keys().collect::<Vec<_>>())
            .finish()
    }
}

impl KafkaConfig {
    pub fn topic(&self, topic: &Topic) -> String {
        format!("{}{topic}", self.prefix)
    }

    pub fn group(&self, group: &str) -> String {
        format!("{}{group}", self.prefix)
    }

    fn client(&self, defaults: &[(&str, &str)], fixed: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set_log_level(RDKafkaLogLevel::Warning);
        // A broker that comes back is found again quickly.
        config.set("reconnect.backoff.max.ms", "1000");
        for (key, value) in defaults {
            config.set(*key, *value);
        }
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        config.set("bootstrap.servers", &self.bootstrap_servers);
        for (key, value) in fixed {
            config.set(*key, *value);
        }
        config
    }

    /// A client without a role: metadata, watermarks, committed offsets.
    pub fn observer(&self, group: &str, isolation: &str) -> ClientConfig {
        let group = self.group(group);
        self.client(&[], &[("group.id", &group), ("isolation.level", isolation), ("enable.auto.commit", "false")])
    }

    /// The `group.instance.id`.
    pub fn member(member: &Member) -> String {
        format!("{}.{}", member.group, member.instance)
    }

    pub fn consumer(&self, member: &Member) -> ClientConfig {
        let group = self.group(&member.group);
        let instance = Self::member(member);
        let session = member.session_timeout.as_millis().to_string();
        let heartbeat = (member.session_timeout.as_millis() / 10).clamp(100, 3_000).to_string();
        self.client(
            &[
                ("queued.max.messages.kbytes", "8192"),
                // Without it a consumer whose queue was full looks again only after a second.
                ("fetch.queue.backoff.ms", "5"),
                ("fetch.wait.max.ms", "100"),
                ("heartbeat.interval.ms", &heartbeat),
            ],
            &[
                ("group.id", &group),
                ("group.instance.id", &instance),
                ("session.timeout.ms", &session),
                ("partition.assignment.strategy", "cooperative-sticky"),
                ("isolation.level", "read_committed"),
                ("enable.auto.commit", "false"),
                ("enable.auto.offset.store", "false"),
                ("auto.offset.reset", "error"),
            ],
        )
    }

    pub fn transactional(&self, member: &Member) -> ClientConfig {
        let id = format!("{}.{}", self.group(&member.group), member.instance);
        let timeout = TRANSACTION_TIMEOUT.as_millis().to_string();
        self.client(
            &[
                ("linger.ms", "1"),
                ("queue.buffering.max.messages", "200000"),
                // A transaction that follows at once finds the last one still writing its markers; the default waits 100 ms.
                ("retry.backoff.ms", "5"),
                ("retry.backoff.max.ms", "100"),
                // A call that sends offsets waits for its request however long it was told to; the default is a minute.
                ("socket.timeout.ms", &timeout),
            ],
            &[
                ("transactional.id", &id),
                ("transaction.timeout.ms", &timeout),
                ("message.timeout.ms", &timeout),
                ("message.max.bytes", "5242880"),
            ],
        )
    }

    pub fn publisher(&self) -> ClientConfig {
        self.client(
            &[
                ("linger.ms", "2"),
                ("queue.buffering.max.kbytes", "65536"),
                // Whoever waits for an acknowledgement is told to come back after so long.
                ("message.timeout.ms", "10000"),
            ],
            &[("enable.idempotence", "true"), ("acks", "all"), ("message.max.bytes", "5242880")],
        )
    }

    pub fn reader(&self) -> ClientConfig {
        let group = self.group("laneway.reader");
        self.client(
            &[("queued.max.messages.kbytes", "1024"), ("fetch.wait.max.ms", "50"), ("fetch.queue.backoff.ms", "5")],
            &[
                ("group.id", &group),
                ("isolation.level", "read_committed"),
                ("enable.auto.commit", "false"),
                ("enable.partition.eof", "true"),
                // A reader names its offset; one that is gone means the earliest that is left.
                ("auto.offset.reset", "earliest"),
            ],
        )
    }
}
