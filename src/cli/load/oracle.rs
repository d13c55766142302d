//! The judge: what was accepted, what arrived, and in which order. Pure, so that its own tests can show that it notices a lost,
//! a doubled and a swapped event.

use hdrhistogram::Histogram;

/// One arrival at the sink.
#[derive(Clone, Debug)]
pub struct Arrival<'a> {
    pub message_id: &'a str,
    pub delivery_id: &'a str,
    pub user: usize,
    pub seq: u64,
    /// Microseconds from sending the event to its arrival.
    pub latency_us: u64,
}

#[derive(Clone, Copy, Default)]
struct Event {
    accepted: bool,
    arrivals: u32,
    /// A hash of the delivery id that it arrived with first.
    delivery: u64,
}

pub struct Oracle {
    prefix: String,
    events: Vec<Event>,
    /// The highest place that each user's events have reached.
    reached: Vec<u64>,
    failing_users: usize,
    pub refused: u64,
    pub retried: u64,
    /// Arrivals beyond the first of a message.
    pub doubled: u64,
    /// Of those, the ones with another delivery id: never right.
    pub doubled_otherwise: u64,
    pub out_of_order: u64,
    /// Arrivals that are not of this run.
    pub foreign: u64,
    accepted: usize,
    delivered: usize,
    /// Accepted, and arrived.
    settled: usize,
    arrivals: u64,
    pub accept: Histogram<u64>,
    /// Of users that the sink does not fail.
    pub end_to_end: Histogram<u64>,
}

impl Oracle {
    pub fn new(prefix: String, events: usize, users: usize, failing_users: usize) -> Self {
        let histogram = || Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("bounds in order");
        Self {
            prefix,
            events: vec![Event::default(); events],
            reached: vec![0; users],
            failing_users,
            refused: 0,
            retried: 0,
            doubled: 0,
            doubled_otherwise: 0,
            out_of_order: 0,
            foreign: 0,
            accepted: 0,
            delivered: 0,
            settled: 0,
            arrivals: 0,
            accept: histogram(),
            end_to_end: histogram(),
        }
    }

    /// The endpoint answered 200 for this event.
    pub fn accepted(&mut self, number: usize, latency_us: u64) {
        let event = &mut self.events[number];
        if !event.accepted {
            event.accepted = true;
            self.accepted += 1;
            self.settled += usize::from(event.arrivals > 0);
        }
        self.accept.saturating_record(latency_us.max(1));
    }

    /// The sink took it with 200.
    pub fn arrived(&mut self, arrival: &Arrival<'_>) {
        self.arrivals += 1;
        let number = arrival.message_id.strip_prefix(&self.prefix).and_then(|number| number.parse::<usize>().ok());
        let event = number.and_then(|number| self.events.get_mut(number));
        let (Some(event), true) = (event, arrival.user < self.reached.len()) else {
            self.foreign += 1;
            return;
        };
        let delivery = xxhash_rust::xxh3::xxh3_64(arrival.delivery_id.as_bytes());
        event.arrivals += 1;
        if event.arrivals > 1 {
            self.doubled += 1;
            self.doubled_otherwise += u64::from(event.delivery != delivery);
            return;
        }
        event.delivery = delivery;
        self.delivered += 1;
        self.settled += usize::from(event.accepted);
        let reached = &mut self.reached[arrival.user];
        if arrival.seq < *reached {
            self.out_of_order += 1;
        }
        *reached = (*reached).max(arrival.seq);
        if arrival.user >= self.failing_users {
            self.end_to_end.saturating_record(arrival.latency_us.max(1));
        }
    }

    pub fn accepted_count(&self) -> usize {
        self.accepted
    }

    pub fn delivered_count(&self) -> usize {
        self.delivered
    }

    pub fn arrivals(&self) -> u64 {
        self.arrivals
    }

    /// Accepted events that have not arrived.
    pub fn missing(&self) -> usize {
        self.accepted - self.settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arrivals: &[(usize, usize, u64, &str)]) -> Oracle {
        let mut oracle = Oracle::new("p-".into(), 4, 2, 0);
        for number in 0..4 {
            oracle.accepted(number, 10);
        }
        for (number, user, seq, delivery_id) in arrivals {
            let message_id = &format!("p-{number}");
            oracle.arrived(&Arrival { message_id, delivery_id, user: *user, seq: *seq, latency_us: 5 });
        }
        oracle
    }

    const ALL: [(usize, usize, u64, &str); 4] = [(0, 0, 1, "a"), (1, 1, 1, "b"), (2, 0, 2, "c"), (3, 1, 2, "d")];

    fn findings(oracle: &Oracle) -> (usize, u64, u64, u64) {
        (oracle.missing(), oracle.doubled, oracle.doubled_otherwise, oracle.out_of_order)
    }

    #[test]
    fn a_clean_run_has_no_findings() {
        assert_eq!(findings(&run(&ALL)), (0, 0, 0, 0));
    }

    #[test]
    fn a_lost_event_is_noticed() {
        assert_eq!(findings(&run(&ALL[..3])), (1, 0, 0, 0));
    }

    #[test]
    fn a_doubled_event_is_noticed_and_told_by_its_delivery_id() {
        let same = [&ALL[..], &[(2, 0, 2, "c")]].concat();
        assert_eq!(findings(&run(&same)), (0, 1, 0, 0));
        let other = [&ALL[..], &[(2, 0, 2, "x")]].concat();
        assert_eq!(findings(&run(&other)), (0, 1, 1, 0));
    }

    #[test]
    fn a_swapped_pair_is_noticed_per_user_only() {
        assert_eq!(findings(&run(&[ALL[2], ALL[1], ALL[0], ALL[3]])), (0, 0, 0, 1));
        assert_eq!(findings(&run(&[ALL[1], ALL[0], ALL[3], ALL[2]])), (0, 0, 0, 0), "users do not wait for each other");
    }

    #[test]
    fn another_runs_events_are_not_taken_for_this_ones() {
        let mut oracle = run(&ALL);
        oracle.arrived(&Arrival { message_id: "q-1", delivery_id: "z", user: 0, seq: 9, latency_us: 1 });
        assert_eq!((oracle.foreign, findings(&oracle)), (1, (0, 0, 0, 0)));
    }
}
