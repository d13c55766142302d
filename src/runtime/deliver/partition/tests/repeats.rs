//! What lies in the log twice is sent once, and counted once.

use super::*;
use crate::model::delivery::{Delivery, Payload, TransformAt};
use crate::model::id::DeliveryId;
use crate::model::job_status::JobStatus;

fn delivery(id: &str) -> Delivery {
    Delivery {
        delivery_id: DeliveryId::new(id.to_owned()),
        workspace: "w".into(),
        source: "s".into(),
        destination: "d0".into(),
        destination_type: "WEBHOOK".into(),
        user: Some("u".into()),
        message_id: id.into(),
        event_type: "track".into(),
        event_name: None,
        received_at: Timestamp::default(),
        job_run: Some("j1".into()),
        task_run: None,
        record_id: None,
        transform_at: TransformAt::Nowhere,
        payload: Payload::Event("{}".into()),
    }
}

/// A partition with these deliveries of one user, by their ids, and what it starts.
struct Twice {
    state: PartitionState,
    now: Timestamp,
}

impl Twice {
    fn new() -> Self {
        let settings = settings(Bounds::default());
        let restored = Restored { repeats: Repeats::new(100), ..Restored::default() };
        let given = Given {
            partition: Partition(0),
            epoch: Epoch(1),
            memory: Memory::new(&settings.bounds),
            settings,
            destinations: World::destinations(),
            rules: Arc::new(rules),
            seed: 1,
            wall_offset: 0,
        };
        let now = Timestamp::from_millis(1_000);
        Self { state: PartitionState::new(given, restored, now), now }
    }

    fn come(&mut self, from: u128, ids: &[&str]) {
        let record = |(at, id): (usize, &&str)| {
            let mut headers = Headers::new();
            headers.push_text(header::DESTINATION, "d0");
            headers.push_text(header::USER, "u");
            headers.push_text(header::JOB_RUN, "j1");
            headers.push_text(header::DELIVERY_ID, id);
            let (partition, offset) = (Partition(0), Offset::new(from + at as u128));
            let value = Some(codec::encode(&delivery(id)).into());
            Record { partition, offset, timestamp: self.now, key: None, value, headers }
        };
        let records = ids.iter().enumerate().map(record).collect();
        self.state.admit_all(records, self.now);
    }

    /// Sends what may be sent, until nothing may: the offsets.
    fn send(&mut self) -> Vec<u128> {
        let mut sent = Vec::new();
        while let Some(Start::Attempt { key, records, permit }) = self.state.next_start(self.now, true) {
            sent.extend(records.iter().map(|record| record.offset.raw()));
            let verdicts = records.iter().map(|_| Verdict::Delivered { code: 200 }).collect();
            self.state.settle(&key, verdicts, permit, self.now);
        }
        sent
    }

    fn ledger(&self) -> (u64, u64) {
        let ledger = self.state.lanes.at(0).ledger;
        (ledger.taken, ledger.delivered)
    }
}

#[test]
fn a_repeat_is_ended_when_it_comes_whether_the_first_is_sent_or_not() {
    let mut twice = Twice::new();
    twice.come(1, &["a", "b"]);
    assert_eq!(twice.send(), [1, 2]);
    twice.come(3, &["b", "c", "c"]);
    twice.come(6, &["a", "d"]);
    assert_eq!(twice.send(), [4, 7]);
    assert_eq!((twice.ledger(), twice.state.pending), ((4, 4), 0));
    let changes = twice.state.collect(false, false).expect("something changed");
    assert_eq!(changes.position.offset, Offset::new(8), "all of it is over");
    let status = changes.outputs.iter().filter(|output| output.topic == Topic::JOB_STATUS);
    let passed = status.map(|output| {
        let status: JobStatus = codec::decode(output.value.as_ref().expect("a value")).expect("readable");
        status.counts.passed
    });
    assert_eq!(passed.collect::<Vec<_>>(), [4], "rows of the run");
}

#[test]
fn a_new_owner_knows_what_lies_just_before() {
    let mut twice = Twice::new();
    twice.come(1, &["a", "b"]);
    assert_eq!(twice.send(), [1, 2]);
    let known = std::mem::take(&mut twice.state.repeats);
    let mut next = Twice::new();
    next.state.repeats = known;
    next.come(3, &["a", "b", "c"]);
    assert_eq!((next.send(), next.ledger()), (vec![5], (1, 1)));
}
