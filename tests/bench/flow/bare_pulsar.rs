//! The least that could do a processor's work with Pulsar's client.

use std::time::Duration;

use futures_util::StreamExt;
use laneway::log::pulsar::PulsarConfig;
use pulsar::consumer::{ConsumerOptions, InitialPosition};
use pulsar::producer::Message;
use pulsar::{Consumer, ProducerOptions, Pulsar, SubType, TokioExecutor};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::PATIENCE;
use crate::bare::Done;

/// Reads `events` and writes each record as it is to `deliveries`; every twenty milliseconds it waits for the receipts and acknowledges what
/// it has read. Prints how long that took, and its CPU.
pub async fn processor(config: &PulsarConfig, count: u64) {
    let client: Pulsar<_> = Pulsar::builder(&config.service_url, TokioExecutor).build().await.expect("a broker");
    let (done, mut told) = unbounded_channel();
    let mut tasks = tokio::task::JoinSet::new();
    for partition in 0..12 {
        let name = |topic: &str| format!("persistent://public/default/{}{topic}-partition-{partition}", config.prefix);
        tasks.spawn(copy(client.clone(), name("events"), name("deliveries"), done.clone()));
    }
    let mut next = async || {
        let some = tokio::time::timeout(PATIENCE, told.recv()).await;
        some.expect("it goes on").expect("a task")
    };
    let mut seen = Done::default();
    while seen.seen < count {
        seen.more(next().await);
    }
    seen.tell(count);
    std::process::exit(0);
}

async fn copy(client: Pulsar<TokioExecutor>, from: String, to: String, done: UnboundedSender<u64>) {
    let options = ConsumerOptions::default().with_initial_position(InitialPosition::Earliest);
    let mut consumer: Consumer<Vec<u8>, _> = client
        .consumer()
        .with_topic(from)
        .with_subscription("bare")
        .with_subscription_type(SubType::Exclusive)
        .with_options(options)
        .build()
        .await
        .expect("a consumer");
    let options = ProducerOptions {
        batch_size: Some(1_000),
        batch_byte_size: Some(128 * 1024),
        batch_timeout: Some(Duration::from_millis(1)),
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let mut producer = client.producer().with_topic(to).with_options(options).build().await.expect("a producer");
    loop {
        let until = tokio::time::Instant::now() + Duration::from_millis(20);
        let (mut receipts, mut last) = (Vec::new(), None);
        // What is there is taken without a look at the clock.
        while tokio::time::Instant::now() < until
            && let Ok(Some(message)) = tokio::time::timeout_at(until, consumer.next()).await
        {
            let message = message.expect("a message");
            let copied = Message {
                payload: message.payload.data.clone(),
                partition_key: message.payload.metadata.partition_key.clone(),
                ..Message::default()
            };
            receipts.push(producer.send_non_blocking(copied).await.expect("sent"));
            last = Some(message);
        }
        let Some(last) = last else { continue };
        let count = receipts.len() as u64;
        for receipt in receipts {
            receipt.await.expect("stored");
        }
        consumer.cumulative_ack(&last).await.expect("acknowledged");
        done.send(count).expect("somebody counts");
    }
}
