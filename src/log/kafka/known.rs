//! Which partitions know a producer. The first record in one that does not goes alone.
//!
//! A leader that has nothing of a producer takes whatever sequence number comes first. If the first batch fails because the
//! leader is just moving, and the second, sent right behind it, is taken, librdkafka concludes from the second's success
//! that the first is stored, and acknowledges it: its records are lost. Seen when a broker came back after kill -9. A leader
//! that knows the producer refuses such a gap, and what failed is sent again.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::record::{Addressed, Partition, Topic};

/// Brokers forget a producer that wrote nothing for `producer.id.expiration.ms`: a day, unless somebody makes that shorter.
const REMEMBERED: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquaintance {
    Unknown,
    /// Its first record is under way.
    Introduced,
    /// Something was sent then, after a first acknowledgement.
    Known(Instant),
}

/// What one producer has sent where: few topics, looked for with every record.
#[derive(Debug, Default)]
pub struct Known(Vec<(Topic, Vec<Acquaintance>)>);

impl Known {
    /// Of the partition that a record is about to be sent to.
    pub fn of(&mut self, record: &Addressed, now: Instant) -> Acquaintance {
        let topic = self.0.iter_mut().find(|(topic, _)| *topic == record.topic);
        let Some(found) = topic.and_then(|(_, all)| all.get_mut(record.partition.0 as usize)) else {
            return Acquaintance::Unknown;
        };
        if let Acquaintance::Known(since) = found {
            let is_fresh = now.saturating_duration_since(*since) < REMEMBERED;
            *found = if is_fresh { Acquaintance::Known(now) } else { Acquaintance::Unknown };
        }
        *found
    }

    pub fn set(&mut self, topic: &Topic, partition: Partition, to: Acquaintance) {
        let known = self.0.iter().position(|(known, _)| known == topic).unwrap_or_else(|| {
            self.0.push((topic.clone(), Vec::new()));
            self.0.len() - 1
        });
        let all = &mut self.0[known].1;
        let index = partition.0 as usize;
        if all.len() <= index {
            all.resize(index + 1, Acquaintance::Unknown);
        }
        all[index] = to;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use rdkafka::consumer::{BaseConsumer, Consumer};
    use rdkafka::error::KafkaError;
    use rdkafka::message::Message;
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::DefaultProducerContext;
    use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
    use rdkafka::{Offset, TopicPartitionList};

    use super::*;
    use crate::clock::Clock;
    use crate::log::kafka::{Kafka, KafkaConfig};
    use crate::log::{Backend, Commit, Member, Publisher, Session};
    use crate::model::record::Headers;

    fn record(partition: u32, value: u32) -> Addressed {
        let (partition, value, headers) = (Partition(partition), Some(value.to_string().into()), Headers::new());
        Addressed { topic: Topic::EVENTS, partition, key: None, value, headers }
    }

    #[test]
    fn a_partition_is_known_while_it_is_written_to() {
        let (record, other) = (record(3, 0), record(9, 0));
        let (mut known, start) = (Known::default(), Clock::system().instant());
        assert_eq!(known.of(&record, start), Acquaintance::Unknown);
        known.set(&Topic::EVENTS, Partition(3), Acquaintance::Introduced);
        assert_eq!(known.of(&record, start), Acquaintance::Introduced);
        known.set(&Topic::EVENTS, Partition(3), Acquaintance::Known(start));
        let later = start + REMEMBERED / 2;
        assert_eq!(known.of(&record, later), Acquaintance::Known(later));
        let later = later + REMEMBERED / 2;
        assert_eq!(known.of(&record, later), Acquaintance::Known(later));
        assert_eq!(known.of(&record, later + REMEMBERED), Acquaintance::Unknown);
        assert_eq!(known.of(&other, later), Acquaintance::Unknown);
    }

    /// What a real broker does only in the moment in which its leadership returns: it refuses a producer's first batch and
    /// takes the one right behind it. librdkafka's own broker does it when told.
    struct Moving(MockCluster<'static, DefaultProducerContext>);

    impl Moving {
        /// With every record a batch of its own.
        fn new(properties: &[(&str, &str)]) -> (Self, Kafka, KafkaConfig) {
            let cluster = MockCluster::new(1).expect("librdkafka's broker");
            cluster.create_topic("events", 2, 1).expect("a topic");
            cluster.broker_round_trip_time(1, Duration::from_millis(50)).expect("a slow link");
            let properties = [("batch.num.messages", "1")].iter().chain(properties);
            let properties = properties.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let config =
                KafkaConfig { bootstrap_servers: cluster.bootstrap_servers(), prefix: String::new(), properties };
            (Self(cluster), Kafka::new(config.clone()), config)
        }

        fn refuse_next(&self) {
            let refusal = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION;
            self.0.request_errors(RDKafkaApiKey::Produce, &[refusal]);
        }
    }

    async fn stored(config: KafkaConfig) -> BTreeSet<String> {
        let read = move || {
            let consumer: BaseConsumer = config
                .observer("reader", "read_uncommitted")
                .set("enable.partition.eof", "true")
                .create()
                .expect("made");
            let mut at = TopicPartitionList::new();
            at.add_partition_offset("events", 0, Offset::Beginning).expect("an offset");
            consumer.assign(&at).expect("assigned");
            let mut found = BTreeSet::new();
            loop {
                match consumer.poll(Duration::from_secs(5)).expect("an answer") {
                    Ok(message) => {
                        found.insert(String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned());
                    }
                    Err(KafkaError::PartitionEOF(_)) => return found,
                    Err(error) => panic!("{error}"),
                }
            }
        };
        tokio::task::spawn_blocking(read).await.expect("it ends")
    }

    fn numbers(count: u32) -> BTreeSet<String> {
        (0..count).map(|n| n.to_string()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_first_batch_that_is_refused_is_not_acknowledged_by_the_next_ones_success() {
        let (cluster, log, config) = Moving::new(&[]);
        let publisher = log.publisher().expect("a publisher");
        // With a connection nothing waits, and all go out at once.
        publisher.publish(vec![record(1, 0)]).await.expect("acknowledged");
        cluster.refuse_next();
        let call = |n: u32| {
            let publisher = publisher.clone();
            tokio::spawn(async move { publisher.publish(vec![record(0, 2 * n), record(0, 2 * n + 1)]).await })
        };
        for call in (0..10).map(call).collect::<Vec<_>>() {
            call.await.expect("it ends").expect("acknowledged");
        }
        assert_eq!(stored(config).await, numbers(20), "all that is acknowledged is stored");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn while_the_broker_is_away_nobody_waits_for_several_first_records_in_turn() {
        let (cluster, log, config) = Moving::new(&[("message.timeout.ms", "1500")]);
        cluster.0.broker_down(1).expect("down");
        let publisher = log.publisher().expect("a publisher");
        let call = |n: u32| {
            let publisher = publisher.clone();
            tokio::spawn(async move { publisher.publish(vec![record(0, n), record(1, n)]).await })
        };
        let calls: Vec<_> = (0..20).map(call).collect();
        let all = async {
            for call in calls {
                assert!(call.await.expect("it ends").is_err(), "nothing is stored");
            }
        };
        // Twenty times the patience of one would be thirty seconds.
        tokio::time::timeout(Duration::from_secs(15), all).await.expect("they share a fate");
        cluster.0.broker_up(1).expect("up");
        while publisher.publish(vec![record(0, 0)]).await.is_err() {}
        assert!(stored(config).await.contains("0"), "it goes on");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nor_is_it_committed() {
        let (cluster, log, config) = Moving::new(&[]);
        let member = Member {
            group: "g".into(),
            instance: "one".into(),
            topic: Topic::EVENTS,
            outputs: Vec::new(),
            state: None,
            session_timeout: Duration::from_secs(6),
            revoke_drain: Duration::from_secs(1),
        };
        let mut session = log.session(member).await.expect("a session");
        let outputs = |outputs| Arc::new(Commit { outputs, ..Commit::default() });
        session.commit(outputs(vec![record(1, 0)])).await.expect("committed");
        cluster.refuse_next();
        session.commit(outputs((0..5).map(|n| record(0, n)).collect())).await.expect("committed");
        session.close().await;
        assert_eq!(stored(config).await, numbers(5), "all that is committed is stored");
    }
}
