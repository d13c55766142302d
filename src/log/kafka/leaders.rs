//! Questions to whoever leads a partition.
//!
//! librdkafka finds the leader in what it knows of the topic. A partition that had none when it last looked, since its
//! node had just died, is an unknown partition to it until it looks again by itself: five minutes later.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::topic_partition_list::TopicPartitionList;

/// How often a topic that was just created is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Where a partition begins and ends.
pub fn watermarks<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    partition: i32,
    patience: Duration,
) -> Result<(i64, i64), KafkaError> {
    looking_again(client, topic, patience, || client.fetch_watermarks(topic, partition, patience))
}

/// The first offsets at or behind the times that stand in the list in the place of offsets. All of one topic.
pub fn offsets_for_times<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    times: &TopicPartitionList,
    patience: Duration,
) -> Result<TopicPartitionList, KafkaError> {
    looking_again(client, topic, patience, || client.offsets_for_times(times.clone(), patience))
}

/// Waits until each partition of a topic has a leader. The broker that creates a topic answers before the brokers that
/// will lead its partitions, or even its own listener, know of it.
///
/// The inner error says what still has none after `timeout`.
#[allow(clippy::disallowed_methods, reason = "it runs where librdkafka's calls block")]
pub fn wait_for_all<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    timeout: Duration,
) -> Result<Result<(), String>, KafkaError> {
    let until = Instant::now() + timeout;
    loop {
        let metadata = client.fetch_metadata(Some(topic), timeout)?;
        let partitions = metadata.topics().iter().filter(|it| it.error().is_none()).flat_map(|it| it.partitions());
        let (led, without): (Vec<_>, Vec<_>) = partitions.partition(|it| it.leader() >= 0);
        if !led.is_empty() && without.is_empty() {
            return Ok(Ok(()));
        }
        if Instant::now() > until {
            let numbers: Vec<String> = without.iter().map(|it| it.id().to_string()).collect();
            let which =
                if numbers.is_empty() { "any partition".into() } else { format!("partition {}", numbers.join(", ")) };
            return Ok(Err(format!("topic {topic} was created, but after {timeout:?} there is no leader of {which}")));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn looking_again<T, C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    patience: Duration,
    ask: impl Fn() -> Result<T, KafkaError>,
) -> Result<T, KafkaError> {
    let answer = ask();
    let code = answer.as_ref().err().and_then(KafkaError::rdkafka_error_code);
    if !matches!(code, Some(Code::UnknownPartition | Code::LeaderNotAvailable)) {
        return answer;
    }
    client.fetch_metadata(Some(topic), patience)?;
    ask()
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;
    use rdkafka::mocking::MockCluster;
    use rdkafka::topic_partition_list::Offset;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn a_topic_is_ready_when_each_partition_has_a_leader() {
        let cluster = MockCluster::new(2).unwrap();
        cluster.create_topic("t", 2, 1).unwrap();
        cluster.partition_leader("t", 1, None).unwrap();
        let client: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", cluster.bootstrap_servers()).create().unwrap();
        let refused = wait_for_all(&client, "t", Duration::from_millis(200)).unwrap().unwrap_err();
        assert!(refused.ends_with("there is no leader of partition 1"), "{refused}");
        let waits = std::thread::spawn(move || wait_for_all(&client, "t", PATIENCE).unwrap());
        cluster.partition_leader("t", 1, Some(2)).unwrap();
        assert_eq!(waits.join().unwrap(), Ok(()));
    }

    #[test]
    fn a_partition_without_a_leader_is_known_again_as_soon_as_it_has_one() {
        let cluster = MockCluster::new(2).unwrap();
        cluster.create_topic("t", 1, 1).unwrap();
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", cluster.bootstrap_servers());
        let client: BaseConsumer = config.create().unwrap();
        cluster.partition_leader("t", 0, None).unwrap();
        client.fetch_metadata(Some("t"), PATIENCE).unwrap();
        let refused = watermarks(&client, "t", 0, PATIENCE).unwrap_err();
        assert_eq!(refused.rdkafka_error_code(), Some(Code::UnknownPartition));
        cluster.partition_leader("t", 0, Some(2)).unwrap();
        assert!(client.fetch_watermarks("t", 0, PATIENCE).is_err(), "librdkafka looks again by itself by now");
        assert_eq!(watermarks(&client, "t", 0, PATIENCE).unwrap(), (0, 0));
        cluster.partition_leader("t", 0, None).unwrap();
        client.fetch_metadata(Some("t"), PATIENCE).unwrap();
        cluster.partition_leader("t", 0, Some(1)).unwrap();
        let mut times = TopicPartitionList::new();
        times.add_partition_offset("t", 0, Offset::Offset(1)).unwrap();
        let found = offsets_for_times(&client, "t", &times, PATIENCE).unwrap();
        assert!(found.elements()[0].error().is_ok());
    }
}
