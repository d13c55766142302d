//! Memory bounds of the deliver runtime, and the counts of what is used.
//!
//! Bytes are counted by tokens ([`Charge`], [`HeldCharge`]) that release themselves when they are dropped, so a count cannot
//! drift from what is in memory. Each token counts for its lane, its destination, its partition and the process.
//!
//! Two budgets, so that neither can use up the other:
//!
//! - **held keys** take at most a quarter of the process's bound and half of a partition's. A destination may hold half of what
//!   is free of it, and [`Bounds::held_reserve_keys`] keys always;
//! - **records** (and the keys that are not held) take the rest. Those in flight cannot be shed, so they may take half of it: a
//!   destination half of what is free of that half, and one request always.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bounds of a partition's state. Bytes are weights of records ([`crate::model::record::Record::weight`]) and keys.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of the queue of one user; the rest is parked.
    pub key_bytes: usize,
    /// Records in the queue of one user, however small they are.
    pub key_records: usize,
    /// Followers of a held key that stay as offsets when memory is short. They are read one by one; the rest is read by a
    /// cursor.
    pub listed_followers: usize,
    /// Of follower offsets in a key's progress record: some hundred of them.
    pub mark_bytes: usize,
    /// Of one lane; above it the lane is detached.
    pub lane_bytes: usize,
    /// Of a lane whose destination cannot run: its records are read again when it can.
    pub down_lane_bytes: usize,
    /// Records that a lane keeps for probes while its destination is down, each of another key where there are as many.
    pub probes: usize,
    /// The most of a lane that is never shed. All lanes together keep an eighth of memory, so with many lanes it is less.
    pub lane_floor_bytes: usize,
    pub partition_bytes: usize,
    pub process_bytes: usize,
    /// Of the held keys of one lane. Above it the lane starts no key that is not held.
    pub held_bytes: usize,
    /// Keys that a destination may hold whatever others hold.
    pub held_reserve_keys: usize,
    /// Runs in the progress record of the partition, or of a lane: each costs a few bytes in every commit.
    pub holes: usize,
    /// A lane is attached again with fewer pending records: each of their keys costs a progress record then.
    pub attach: usize,
    /// Records between the lowest pending one and the read position: a few words each.
    pub window_records: usize,
    /// Cursors of a partition.
    pub cursors: usize,
    /// Cursors of the process: each has a reader with a queue of its own. A partition's first one does not count.
    pub process_cursors: usize,
    /// A lane or key does not use a cursor that is more records than this behind it, if it may open one.
    pub near: u64,
    /// Final outcomes that wait for a commit; above it nothing starts, since after a crash all of them would be repeated.
    pub uncommitted: usize,
    /// Of dead letters that wait for a commit: one transaction, and memory until then, has to hold them.
    pub uncommitted_bytes: usize,
    /// Single records that are read at a time.
    pub fetches: usize,
    /// Bytes that a lane may send before it is another's turn.
    pub turn_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            key_bytes: 1 << 20,
            key_records: 4_096,
            listed_followers: 256,
            mark_bytes: 1_024,
            lane_bytes: 8 << 20,
            down_lane_bytes: 1 << 20,
            probes: 8,
            lane_floor_bytes: 64 << 10,
            partition_bytes: 64 << 20,
            process_bytes: 256 << 20,
            held_bytes: 16 << 20,
            held_reserve_keys: 64,
            holes: 1_000,
            attach: 100,
            window_records: 200_000,
            cursors: 4,
            process_cursors: 16,
            near: 50_000,
            uncommitted: 10_000,
            uncommitted_bytes: 8 << 20,
            fetches: 64,
            turn_bytes: 16 << 10,
        }
    }
}

/// The memory of a process that runs deliveries.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Process>);

#[derive(Debug)]
struct Process {
    bound: usize,
    most_cursors: usize,
    used: Used,
    cursors: AtomicUsize,
    partitions: AtomicUsize,
}

/// What is used by records and by held keys, and by how many.
#[derive(Debug, Default)]
struct Used {
    records: AtomicUsize,
    held: AtomicUsize,
    held_keys: AtomicUsize,
    /// Of the records: those in flight.
    in_flight: AtomicUsize,
    /// Lanes that have records in memory.
    busy_lanes: AtomicUsize,
}

impl Used {
    fn records(&self) -> usize {
        self.records.load(Ordering::Relaxed)
    }

    fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    fn busy_lanes(&self) -> usize {
        self.busy_lanes.load(Ordering::Relaxed).max(1)
    }
}

/// What a destination uses in all partitions of the process.
#[derive(Debug, Default)]
pub struct DestinationUse(Used);

impl Memory {
    pub fn new(bounds: &Bounds) -> Self {
        Self(Arc::new(Process {
            bound: bounds.process_bytes,
            most_cursors: bounds.process_cursors,
            used: Used::default(),
            cursors: AtomicUsize::new(0),
            partitions: AtomicUsize::new(0),
        }))
    }

    /// Opens the account of a partition.
    pub fn account(&self, bounds: &Bounds) -> Account {
        self.0.partitions.fetch_add(1, Ordering::Relaxed);
        let partition =
            PartitionUse { bound: bounds.partition_bytes, used: Used::default(), process: Arc::clone(&self.0) };
        Account { partition: Arc::new(partition), bounds: *bounds, cursors: 0 }
    }
}

impl Process {
    /// What records may use: held keys have a quarter of the bound for themselves.
    fn room(&self) -> usize {
        self.bound - self.used.held().min(self.bound / 4)
    }

    fn free(&self) -> usize {
        self.room().saturating_sub(self.used.records())
    }

    fn is_short(&self) -> bool {
        self.free() < self.bound / 10
    }
}

#[derive(Debug)]
struct PartitionUse {
    bound: usize,
    used: Used,
    process: Arc<Process>,
}

impl PartitionUse {
    fn room(&self) -> usize {
        self.bound - self.used.held().min(self.bound / 2)
    }

    fn free(&self) -> usize {
        self.room().saturating_sub(self.used.records())
    }

    fn is_short(&self) -> bool {
        self.free() < self.bound / 10
    }
}

/// A partition's share of the process's memory.
#[derive(Debug)]
pub struct Account {
    partition: Arc<PartitionUse>,
    bounds: Bounds,
    cursors: usize,
}

impl Account {
    /// Opens the account of a lane, whose records and keys count for `destination` too.
    pub fn lane(&self, destination: Arc<DestinationUse>) -> LaneAccount {
        let (partition, used) = (Arc::clone(&self.partition), Used::default());
        LaneAccount(Arc::new(LaneUse { used, partition, destination }))
    }

    /// Whether one more cursor may be opened; it counts from now on.
    pub fn open_cursor(&mut self, is_first: bool) -> bool {
        let process = &self.partition.process;
        let open = process.cursors.fetch_add(1, Ordering::Relaxed);
        if open >= process.most_cursors && !is_first {
            process.cursors.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        self.cursors += 1;
        true
    }

    /// This many cursors of the partition are left.
    pub fn close_cursors(&mut self, left: usize) {
        let gone = self.cursors.saturating_sub(left);
        self.cursors -= gone;
        self.partition.process.cursors.fetch_sub(gone, Ordering::Relaxed);
    }

    /// Of records and keys that are not held.
    pub fn records(&self) -> usize {
        self.partition.used.records()
    }

    pub fn held(&self) -> usize {
        self.partition.used.held()
    }

    /// Less than a tenth is free for records, of the partition's bound or the process's.
    pub fn is_short(&self) -> bool {
        self.partition.is_short() || self.partition.process.is_short()
    }

    /// The process's memory is short, though this partition's own is not.
    pub fn has_others_short(&self) -> bool {
        self.partition.process.is_short() && !self.partition.is_short()
    }

    /// Live reading may take a batch. A partition that uses less than its share of half of the process's memory may always:
    /// the memory of another one must not shut it out.
    pub fn has_room(&self) -> bool {
        let process = &self.partition.process;
        let share = process.bound / 2 / process.partitions.load(Ordering::Relaxed).max(1);
        !self.partition.is_short() && (!process.is_short() || self.records() < share)
    }

    /// The part of a lane that is not shed. All lanes together keep at most an eighth of memory.
    pub fn lane_floor(&self) -> usize {
        let of_partition = self.partition.bound / 8 / self.partition.used.busy_lanes();
        let of_process = self.partition.process.bound / 8 / self.partition.process.used.busy_lanes();
        self.bounds.lane_floor_bytes.min(of_partition).min(of_process)
    }

    /// The most that a lane may keep: its bound, and half of what is free above the mark at which memory counts as short, for
    /// its destination and in its partition. So lanes that only fill slowly never make memory short.
    pub fn lane_limit(&self, lane: &LaneAccount) -> usize {
        let LaneUse { used, destination, .. } = &*lane.0;
        let (own, process) = (used.records(), &self.partition.process);
        let others = destination.0.records().saturating_sub(own);
        let of_process = process.free().saturating_sub(process.bound / 10) + destination.0.records();
        let of_partition = self.partition.free().saturating_sub(self.partition.bound / 10) + own;
        let share = (of_process / 2).saturating_sub(others).min(of_partition / 2);
        self.bounds.lane_bytes.min(share.max(self.lane_floor()))
    }

    /// A key of the lane that is not held may start: if it fails it becomes held. A destination above its share of the memory
    /// for held keys waits for its own keys; it never makes another one wait.
    pub fn may_hold(&self, lane: &LaneAccount) -> bool {
        self.holds_below(lane, 1)
    }

    /// One more request of the lane may start: what is in flight cannot be shed.
    pub fn may_send(&self, lane: &LaneAccount) -> bool {
        let LaneUse { used, destination, .. } = &*lane.0;
        let process = &self.partition.process;
        let free_of_process = (process.room() / 2).saturating_sub(process.used.in_flight());
        let free_of_partition = (self.partition.room() / 2).saturating_sub(self.partition.used.in_flight());
        used.in_flight() == 0 || (destination.0.in_flight() < free_of_process && used.in_flight() < free_of_partition)
    }

    /// At most half of what the lane's destination may hold is used: it is worth reading more records for it.
    pub fn may_hold_many(&self, lane: &LaneAccount) -> bool {
        self.holds_below(lane, 2)
    }

    /// What the lane's destination holds is below this part of what it may.
    fn holds_below(&self, lane: &LaneAccount, part: usize) -> bool {
        let LaneUse { used, destination, .. } = &*lane.0;
        if destination.0.held_keys.load(Ordering::Relaxed) * part < self.bounds.held_reserve_keys {
            return true;
        }
        let process = &self.partition.process;
        let free_of_process = (process.bound / 4).saturating_sub(process.used.held());
        let free_of_partition = (self.partition.bound / 2).saturating_sub(self.held());
        let (of_lane, of_destination) = (used.held() * part, destination.0.held() * part);
        of_lane < self.bounds.held_bytes && of_destination < free_of_process && of_lane < free_of_partition
    }

    /// What contradicts the bounds: a lane alone may exceed them by one record.
    #[cfg(any(test, debug_assertions))]
    pub fn check(&self, records: usize, held: usize) -> Result<(), String> {
        let counted = (self.records(), self.held());
        if counted == (records, held) {
            return Ok(());
        }
        Err(format!("the account counts {counted:?} bytes of records and held keys; there are {:?}", (records, held)))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.close_cursors(0);
        self.partition.process.partitions.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A lane's share of its partition's memory.
#[derive(Clone, Debug)]
pub struct LaneAccount(Arc<LaneUse>);

#[derive(Debug)]
struct LaneUse {
    used: Used,
    partition: Arc<PartitionUse>,
    destination: Arc<DestinationUse>,
}

impl LaneUse {
    fn all(&self) -> [&Used; 4] {
        [&self.used, &self.destination.0, &self.partition.used, &self.partition.process.used]
    }
}

impl LaneAccount {
    /// Counts `bytes` of a record, or of a key that is not held, until the token is dropped.
    pub fn charge(&self, bytes: usize) -> Charge {
        if self.0.used.records.fetch_add(bytes, Ordering::Relaxed) == 0 && bytes > 0 {
            for used in &self.0.all()[1..] {
                used.busy_lanes.fetch_add(1, Ordering::Relaxed);
            }
        }
        for used in &self.0.all()[1..] {
            used.records.fetch_add(bytes, Ordering::Relaxed);
        }
        Charge { lane: Arc::clone(&self.0), bytes }
    }

    /// Counts `bytes` of a held key until the token is dropped.
    pub fn charge_held(&self, bytes: usize) -> HeldCharge {
        for used in self.0.all() {
            used.held.fetch_add(bytes, Ordering::Relaxed);
            used.held_keys.fetch_add(1, Ordering::Relaxed);
        }
        HeldCharge { lane: Arc::clone(&self.0), bytes }
    }

    /// Counts `bytes` as in flight until the token is dropped.
    pub fn charge_in_flight(&self, bytes: usize) -> InFlightCharge {
        for used in self.0.all() {
            used.in_flight.fetch_add(bytes, Ordering::Relaxed);
        }
        InFlightCharge { lane: Arc::clone(&self.0), bytes }
    }

    /// Of records and keys that are not held.
    pub fn bytes(&self) -> usize {
        self.0.used.records()
    }

    pub fn held(&self) -> usize {
        self.0.used.held()
    }

    pub fn in_flight(&self) -> usize {
        self.0.used.in_flight()
    }

    #[cfg(test)]
    pub fn for_tests(memory: &Memory) -> Self {
        memory.account(&Bounds::default()).lane(Arc::default())
    }
}

/// Bytes of a record, or of a key that is not held.
#[derive(Debug)]
pub struct Charge {
    lane: Arc<LaneUse>,
    bytes: usize,
}

impl Charge {
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let was_last = self.lane.used.records.fetch_sub(self.bytes, Ordering::Relaxed) == self.bytes;
        for used in &self.lane.all()[1..] {
            used.records.fetch_sub(self.bytes, Ordering::Relaxed);
            if was_last && self.bytes > 0 {
                used.busy_lanes.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Bytes of records that are being sent.
#[derive(Debug)]
pub struct InFlightCharge {
    lane: Arc<LaneUse>,
    bytes: usize,
}

impl Drop for InFlightCharge {
    fn drop(&mut self) {
        for used in self.lane.all() {
            used.in_flight.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

/// Bytes of a held key.
#[derive(Debug)]
pub struct HeldCharge {
    lane: Arc<LaneUse>,
    bytes: usize,
}

impl HeldCharge {
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for HeldCharge {
    fn drop(&mut self) {
        for used in self.lane.all() {
            used.held.fetch_sub(self.bytes, Ordering::Relaxed);
            used.held_keys.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds() -> Bounds {
        Bounds {
            process_bytes: 80_000,
            partition_bytes: 40_000,
            held_bytes: 40_000,
            held_reserve_keys: 2,
            ..Bounds::default()
        }
    }

    #[test]
    fn tokens_release_what_they_count_everywhere() {
        let memory = Memory::new(&bounds());
        let account = memory.account(&bounds());
        let destination = Arc::<DestinationUse>::default();
        let (one, two) = (account.lane(Arc::clone(&destination)), account.lane(Arc::clone(&destination)));
        let charges = [one.charge(100), two.charge(50), one.charge(7)];
        let held = two.charge_held(900);
        assert_eq!((one.bytes(), two.bytes(), destination.0.records(), account.records()), (107, 50, 157, 157));
        assert_eq!((account.held(), destination.0.held(), memory.0.used.held()), (900, 900, 900));
        assert_eq!(memory.0.used.busy_lanes.load(Ordering::Relaxed), 2);
        drop((charges, held));
        assert_eq!((one.bytes(), account.records(), account.held(), memory.0.used.records()), (0, 0, 0, 0));
        assert_eq!(memory.0.used.busy_lanes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_destination_holds_half_of_what_is_free_and_never_keeps_another_from_starting() {
        let memory = Memory::new(&bounds());
        let accounts = [memory.account(&bounds()), memory.account(&bounds())];
        let failing = Arc::<DestinationUse>::default();
        let lanes: Vec<LaneAccount> = accounts.iter().map(|account| account.lane(Arc::clone(&failing))).collect();
        let mut held = Vec::new();
        for at in (0..2).cycle() {
            if !accounts[at].may_hold(&lanes[at]) {
                break;
            }
            held.push(lanes[at].charge_held(500));
        }
        assert_eq!(held.len(), 20, "half of a quarter of the process's 80,000 bytes");
        let other = accounts[0].lane(Arc::default());
        let others: Vec<HeldCharge> =
            (0..10).map_while(|_| accounts[0].may_hold(&other).then(|| other.charge_held(500))).collect();
        assert_eq!(others.len(), 10, "half of what is left");
        for _ in 0..30 {
            let late = accounts[0].lane(Arc::default());
            for _ in 0..2 {
                assert!(accounts[0].may_hold(&late), "its reserve");
                held.push(late.charge_held(500));
            }
        }
        assert!(!accounts[0].may_hold(&other), "there is nothing left of the quarter");
        assert!(accounts[0].has_room() && !accounts[0].is_short(), "held keys never stop reading");
    }

    #[test]
    fn lanes_that_are_never_shed_do_not_fill_memory_however_many_there_are() {
        let memory = Memory::new(&bounds());
        let account = memory.account(&bounds());
        let lanes: Vec<LaneAccount> = (0..300).map(|_| account.lane(Arc::default())).collect();
        // Each takes what it may.
        let mut kept: Vec<Vec<Charge>> = Vec::new();
        for lane in &lanes {
            let mut own = Vec::new();
            while lane.bytes() < account.lane_limit(lane) {
                own.push(lane.charge(20));
            }
            kept.push(own);
        }
        assert!(account.is_short(), "three hundred floors of different sizes: {}", account.records());
        for (lane, own) in lanes.iter().zip(&mut kept) {
            while lane.bytes() > account.lane_floor() {
                own.pop();
            }
        }
        assert!(account.records() <= 5_000 && account.has_room(), "{}", account.records());
        let newcomer = account.lane(Arc::default());
        assert!(account.lane_limit(&newcomer) > 10_000, "half of what is free");
    }
}
