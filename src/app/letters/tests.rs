//! Redrives over the log in memory.

use std::time::Duration;

use super::*;
use crate::clock::Clock;
use crate::log::embedded::Embedded;
use crate::log::embedded::memory::Faults;
use crate::log::topic::Topics;
use crate::model::codec;
use crate::model::delivery::{Delivery, Payload, TransformAt};
use crate::model::failure::Failure;
use crate::model::outcome::Reason;
use crate::model::record::{Headers, header};
use crate::runtime::shutdown::Shutdown;

async fn log() -> (Embedded, Topics) {
    let log = Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a log");
    let topics = Topics::load(None).expect("the compiled-in topics");
    for spec in topics.iter() {
        log.admin().expect("an admin").create(spec).await.expect("created");
    }
    (log, topics)
}

fn letter(n: u32) -> Addressed {
    let delivery = Delivery {
        delivery_id: format!("{n}").into(),
        workspace: "w".into(),
        source: "s".into(),
        destination: "d".into(),
        destination_type: "WEBHOOK".into(),
        user: Some("u".into()),
        message_id: format!("m{n}").into(),
        event_type: "track".into(),
        event_name: None,
        received_at: Timestamp::from_millis(1),
        job_run: None,
        task_run: None,
        record_id: None,
        transform_at: TransformAt::Nowhere,
        payload: Payload::Event("{}".into()),
    };
    let failure = Failure {
        stage: "router".into(),
        reason: Reason::Rejected,
        attempts: 1,
        first: None,
        last: None,
        topic: Topic::DELIVERIES,
        partition: Partition(0),
        offset: Offset::new(u128::from(n)),
        timestamp: Timestamp::from_millis(1),
        key: Some("d".into()),
        value: Some(codec::encode(&delivery).into()),
        headers: vec![(header::REPLAY_ID.to_owned(), "old".into()), (header::DELIVERY_ID.to_owned(), "x".into())],
        destination: Some("d".into()),
        source: None,
    };
    Addressed {
        topic: Topic::DEAD_LETTERS,
        partition: Partition(3),
        key: Some("d".into()),
        value: Some(codec::encode(&failure).into()),
        headers: Headers::new(),
    }
}

async fn publish(log: &Embedded, records: Vec<Addressed>) {
    log.publisher().expect("a publisher").publish(records).await.expect("published");
}

async fn plan(log: &Embedded, id: &str) -> Plan {
    let known = plans(log, Shelf::DeadLetters).await.expect("plans");
    let survey = survey(log, Shelf::DeadLetters, &Filter::default(), false, &known).await.expect("a survey");
    Plan {
        id: id.into(),
        shelf: Shelf::DeadLetters,
        filter: Filter::default(),
        spans: survey.spans,
        letters: survey.letters,
        earlier: known.into_iter().map(|plan| plan.id).collect(),
        again: false,
        rate: 100_000,
        at: Clock::system().now(),
        by: "me".into(),
        finished_at: None,
    }
}

async fn run(log: &Embedded, topics: &Topics, plan: &Plan, shutdown: Shutdown) -> Result<Sent, RedriveError> {
    let known = plans(log, Shelf::DeadLetters).await.expect("plans");
    let placement = topics.get(&Topic::DELIVERIES).expect("declared").placement();
    let resend = Resend::Deliveries(placement);
    let (clock, session_timeout) = (Clock::system(), Duration::from_secs(6));
    let redrive = Redrive { log, clock: &clock, plan, known: &known, resend: &resend, session_timeout, shutdown };
    redrive.run(|_| {}).await
}

/// What lies on `deliveries`: its number, and its replay.
async fn deliveries(log: &Embedded) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for partition in (0..12).map(Partition) {
        let mut reader = log.reader(&Topic::DELIVERIES, partition, Offset::START).await.expect("a reader");
        while let Read::Records(records) = reader.read(READ).await.expect("records") {
            for record in records {
                let delivery: Delivery = codec::decode(&record.value.expect("a value")).expect("a delivery");
                let replays: Vec<String> = record
                    .headers
                    .iter()
                    .filter(|(name, _)| *name == header::REPLAY_ID)
                    .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
                    .collect();
                found.push((delivery.delivery_id.to_string(), replays.join(" ")));
            }
        }
    }
    found
}

#[tokio::test]
async fn each_letter_is_sent_by_the_first_plan_that_means_it() {
    let (log, topics) = log().await;
    publish(&log, (0..5).map(letter).collect()).await;
    let first = plan(&log, "p1").await;
    assert!(announce(&log, &first).await.expect("announced"));
    // Made before the first one was known: neither may send.
    let blind = Plan { id: "p2".into(), earlier: Vec::new(), ..first.clone() };
    assert!(!announce(&log, &blind).await.expect("answered"));
    assert_eq!(plans(&log, Shelf::DeadLetters).await.expect("plans").len(), 1, "it is taken back");
    publish(&log, (5..8).map(letter).collect()).await;
    let second = plan(&log, "p3").await;
    assert_eq!((first.letters, second.letters), (5, 3));
    assert!(announce(&log, &second).await.expect("announced"));
    let open = || Shutdown::new(Duration::from_secs(1));
    for it in [&second, &first, &first] {
        let sent = run(&log, &topics, it, open()).await.expect("sent");
        assert_eq!(sent, Sent { letters: it.letters, failed_again: 0, is_finished: true }, "{}", it.id);
    }
    let mut found = deliveries(&log).await;
    found.sort();
    let expected = (0..8).map(|n| (n.to_string(), if n < 5 { "p1" } else { "p3" }.to_owned()));
    assert_eq!(found, expected.collect::<Vec<_>>(), "each once, under its plan's id alone");
}

#[tokio::test]
async fn a_plan_that_is_abandoned_leaves_the_rest_to_others() {
    let (log, topics) = log().await;
    publish(&log, (0..6).map(letter).collect()).await;
    let slow = Plan { rate: 1, ..plan(&log, "p1").await };
    announce(&log, &slow).await.expect("announced");
    let shutdown = Shutdown::new(Duration::from_secs(1));
    let (stop, mut last) = (shutdown.clone(), Sent::default());
    let known = plans(&log, Shelf::DeadLetters).await.expect("plans");
    let placement = topics.get(&Topic::DELIVERIES).expect("declared").placement();
    let resend = Resend::Deliveries(placement);
    let (clock, session_timeout) = (Clock::system(), Duration::from_secs(6));
    let redrive =
        Redrive { log: &log, clock: &clock, plan: &slow, known: &known, resend: &resend, session_timeout, shutdown };
    let ended = redrive.run(|sent| {
        last = sent;
        if sent.letters > 0 {
            stop.begin();
        }
    });
    assert!(!ended.await.expect("stopped").is_finished);
    let ended = abandon(&log, &clock, &slow, session_timeout).await.expect("abandoned");
    assert_eq!((ended.letters, ended.finished_at.is_some()), (last.letters, true));
    let rest = plan(&log, "p2").await;
    assert_eq!(rest.letters, 6 - last.letters);
    announce(&log, &rest).await.expect("announced");
    run(&log, &topics, &rest, Shutdown::new(Duration::from_secs(1))).await.expect("sent");
    let mut found: Vec<String> = deliveries(&log).await.into_iter().map(|(id, _)| id).collect();
    found.sort();
    assert_eq!(found, ["0", "1", "2", "3", "4", "5"], "each once");
}

#[tokio::test(start_paused = true)]
async fn what_the_log_has_deleted_is_not_waited_for() {
    let clock = Clock::derived(Timestamp::from_millis(1_000_000));
    let log = Embedded::in_memory(Faults::none(), clock.clone()).await.expect("a log");
    let topics = Topics::load(None).expect("the compiled-in topics");
    for spec in topics.iter() {
        log.admin().expect("an admin").create(spec).await.expect("created");
    }
    publish(&log, (0..3).map(letter).collect()).await;
    let it = plan(&log, "p1").await;
    announce(&log, &it).await.expect("announced");
    let kept = BTreeMap::from([("retention.ms".to_owned(), "1000".to_owned())]);
    log.admin().expect("an admin").configure(&Topic::DEAD_LETTERS, &kept).await.expect("configured");
    let gone = async || {
        let marks = log.admin().expect("an admin").watermarks(&Topic::DEAD_LETTERS, Partition(3)).await.expect("marks");
        marks.start >= it.spans[&Partition(3)].until
    };
    while !gone().await {
        clock.sleep(Duration::from_secs(10)).await;
    }
    let sent = run(&log, &topics, &it, Shutdown::new(Duration::from_secs(1))).await.expect("finished");
    assert_eq!(sent, Sent { letters: 0, failed_again: 0, is_finished: true });
    forget(&log, &[Plan { finished_at: Some(clock.now()), ..it }]).await.expect("forgotten");
    assert!(plans(&log, Shelf::DeadLetters).await.expect("plans").is_empty(), "it excludes nothing any more");
}
