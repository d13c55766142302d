//! How much may be kept in memory, and the process's count of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bounds of what waits in memory. Bytes are weights of records.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of one user's queue: the rest is parked.
    pub key_bytes: usize,
    /// Of one lane: beyond it the lane is detached.
    pub lane_bytes: usize,
    pub partition_bytes: usize,
    pub process_bytes: usize,
    /// Of the held keys of one lane; those of all lanes together take a quarter of the process's bound, and half of their
    /// partition's. Beyond it no key is started that could become one more.
    pub held_bytes: usize,
    /// Runs in the partition's progress record, or a lane's: each costs a few bytes in every commit.
    pub holes: usize,
    /// A lane is attached again with fewer unfinished records: each of their keys costs a progress record then.
    pub attach: usize,
    /// Records between the lowest unfinished one and the place of reading: a few words each.
    pub window_records: usize,
    /// Cursors of a partition.
    pub cursors: usize,
    /// A cursor further away than this from where a lane wants to go on is no help to it.
    pub near: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            key_bytes: 1 << 20,
            lane_bytes: 8 << 20,
            partition_bytes: 64 << 20,
            process_bytes: 256 << 20,
            held_bytes: 16 << 20,
            holes: 1_000,
            attach: 100,
            window_records: 200_000,
            cursors: 4,
            near: 50_000,
        }
    }
}

/// The bytes that all partitions of the process keep.
#[derive(Clone, Debug)]
pub struct Memory {
    counts: Arc<Counts>,
    bound: usize,
}

#[derive(Debug, Default)]
struct Counts {
    used: AtomicUsize,
    held: AtomicUsize,
    cursors: AtomicUsize,
}

/// Cursors of a process: each has a reader with a queue of its own. A partition's first one does not wait for others.
const CURSORS: usize = 16;

impl Memory {
    pub fn new(bound: usize) -> Self {
        Self { counts: Arc::default(), bound }
    }

    /// Opens a partition's account.
    pub fn account(&self) -> Account {
        Account { memory: self.clone(), used: 0, held: 0, cursors: 0 }
    }
}

/// A partition's share of the count; given back when it is dropped.
#[derive(Debug)]
pub struct Account {
    memory: Memory,
    used: usize,
    held: usize,
    cursors: usize,
}

impl Account {
    pub fn add(&mut self, bytes: usize) {
        self.used += bytes;
        self.memory.counts.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn sub(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.used, "more is given back than was taken");
        let bytes = bytes.min(self.used);
        self.used -= bytes;
        self.memory.counts.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Held keys are counted twice: as memory, and among themselves.
    pub fn add_held(&mut self, bytes: usize) {
        self.add(bytes);
        self.held += bytes;
        self.memory.counts.held.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn sub_held(&mut self, bytes: usize) {
        self.sub(bytes);
        self.held -= bytes.min(self.held);
        self.memory.counts.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether one more cursor may be opened; it counts from now on.
    pub fn open_cursor(&mut self, is_first: bool) -> bool {
        let open = self.memory.counts.cursors.fetch_add(1, Ordering::Relaxed);
        if open >= CURSORS && !is_first {
            self.memory.counts.cursors.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        self.cursors += 1;
        true
    }

    /// So many of this partition's are left.
    pub fn close_cursors(&mut self, left: usize) {
        let gone = self.cursors.saturating_sub(left);
        self.cursors -= gone;
        self.memory.counts.cursors.fetch_sub(gone, Ordering::Relaxed);
    }

    pub fn used(&self) -> usize {
        self.used
    }

    /// What the process may still take.
    pub fn free(&self) -> usize {
        self.memory.bound.saturating_sub(self.memory.counts.used.load(Ordering::Relaxed))
    }

    /// Less than a tenth is free.
    pub fn process_is_short(&self) -> bool {
        self.free() < self.memory.bound / 10
    }

    pub fn held(&self) -> usize {
        self.held
    }

    pub fn held_is_full(&self) -> bool {
        self.memory.counts.held.load(Ordering::Relaxed) >= self.memory.bound / 4
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.memory.counts.held.fetch_sub(held, Ordering::Relaxed);
        self.sub(self.used);
        self.close_cursors(0);
    }
}
