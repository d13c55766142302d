//! Questions to whoever leads a partition.
//!
//! librdkafka finds the leader in what it knows of the topic. A partition that had none when it last looked, since its
//! node had just died, is an unknown partition to it until it looks again by itself: five minutes later.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::topic_partition_list::TopicPartitionList;

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
