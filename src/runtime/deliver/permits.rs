//! Requests in flight, shared by all partitions of the process. A destination may hold half of what is free at that moment, and
//! one is always kept for each: a destination that only answers slowly cannot take the process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use crate::model::id::DestinationId;
use crate::telemetry::metrics::metrics;

#[derive(Clone)]
pub struct Permits(Arc<Shared>);

struct Shared {
    total: usize,
    per_destination: usize,
    held: Mutex<Held>,
    freed: watch::Sender<u64>,
}

#[derive(Default)]
struct Held {
    all: usize,
    of: HashMap<DestinationId, usize>,
}

impl Permits {
    pub fn new(total: usize, per_destination: usize) -> Self {
        Self(Arc::new(Shared { total, per_destination, held: Mutex::default(), freed: watch::Sender::new(0) }))
    }

    /// A permit for one request to `destination`, if it may have one now.
    pub fn try_acquire(&self, destination: &DestinationId) -> Option<Permit> {
        let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        let own = held.of.get(destination).copied().unwrap_or(0);
        let free = self.0.total.saturating_sub(held.all);
        let fair = (free + own) / 2;
        if own > 0 && own >= fair.min(self.0.per_destination) {
            return None;
        }
        held.all += 1;
        *held.of.entry(destination.clone()).or_default() += 1;
        metrics().router_in_flight.with_label_values::<&str>(&[]).set(held.all as i64);
        Some(Permit { shared: Arc::clone(&self.0), destination: destination.clone() })
    }

    /// Tells when permits are given back.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.freed.subscribe()
    }
}

/// One request in flight.
pub struct Permit {
    shared: Arc<Shared>,
    destination: DestinationId,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.all -= 1;
        if let Some(own) = held.of.get_mut(&self.destination) {
            *own -= 1;
            if *own == 0 {
                held.of.remove(&self.destination);
            }
        }
        metrics().router_in_flight.with_label_values::<&str>(&[]).set(held.all as i64);
        drop(held);
        self.shared.freed.send_modify(|version| *version += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_destination_takes_half_and_leaves_one_for_each() {
        let permits = Permits::new(100, 1_000);
        let slow: DestinationId = "slow".into();
        let taken: Vec<Permit> = std::iter::from_fn(|| permits.try_acquire(&slow)).collect();
        assert_eq!(taken.len(), 50);
        let others: Vec<Permit> =
            (0..200).filter_map(|n| permits.try_acquire(&format!("other-{n}").as_str().into())).collect();
        assert_eq!(others.len(), 200, "the first request of a destination always goes");
        drop(taken);
        drop(others);
        let next: Vec<Permit> = std::iter::from_fn(|| permits.try_acquire(&slow)).collect();
        assert_eq!(next.len(), 50, "everything was given back");
    }

    #[test]
    fn a_destination_has_a_cap_of_its_own() {
        let permits = Permits::new(10_000, 3);
        let one: DestinationId = "one".into();
        assert_eq!(std::iter::from_fn(|| permits.try_acquire(&one)).collect::<Vec<_>>().len(), 3);
    }
}
