//! How much may be kept in memory, and the process's count of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bounds of what waits in memory. Bytes are weights of records.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// A held key's followers beyond it are kept as offsets where its mark names them.
    pub key_bytes: usize,
    pub partition_bytes: usize,
    pub process_bytes: usize,
    /// Runs in the partition's progress record: each costs a few bytes in every commit.
    pub holes: usize,
    /// Records between the lowest unfinished one and live reading: a few words each.
    pub window_records: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            key_bytes: 1 << 20,
            partition_bytes: 64 << 20,
            process_bytes: 256 << 20,
            holes: 1_000,
            window_records: 1_000_000,
        }
    }
}

/// The bytes that all partitions of the process keep.
#[derive(Clone, Debug)]
pub struct Memory {
    used: Arc<AtomicUsize>,
    bound: usize,
}

impl Memory {
    pub fn new(bound: usize) -> Self {
        Self { used: Arc::default(), bound }
    }

    pub fn is_full(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.bound
    }

    /// Opens a partition's account.
    pub fn account(&self) -> Account {
        Account { memory: self.clone(), used: 0 }
    }
}

/// A partition's share of the count; given back when it is dropped.
#[derive(Debug)]
pub struct Account {
    memory: Memory,
    used: usize,
}

impl Account {
    pub fn add(&mut self, bytes: usize) {
        self.used += bytes;
        self.memory.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn sub(&mut self, bytes: usize) {
        let bytes = bytes.min(self.used);
        self.used -= bytes;
        self.memory.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub fn used(&self) -> usize {
        self.used
    }

    pub fn process_is_full(&self) -> bool {
        self.memory.is_full()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.sub(self.used);
    }
}
