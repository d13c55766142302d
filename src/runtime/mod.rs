//! The runtimes: the only places that poll, commit, pause, retry, drain and react to rebalances. A stage brings pure logic.
//!
//! ```text
//!          poll ──► worker of partition 0 ─┐
//! Session ────────► worker of partition 1 ─┼─ at a tick: collect what each has finished ──► one commit ──► next
//!            …      worker of partition n ─┘      outputs, failures, progress, offsets
//! ```
//!
//! [`driver`] is shared; [`transform`] (topic to topic, exactly once) and [`deliver`] (topic to the outside world, in order per
//! user) are what runs inside a worker. A worker owns its partition: one task, no locks. [`project`] (topic to store, exactly
//! once) and [`watch`] (a topic as it goes by, for people) need no workers.

pub mod deliver;
pub mod driver;
pub mod failure;
pub mod planted;
pub mod project;
pub mod shutdown;
pub mod supervisor;
pub mod tally;
pub mod transform;
pub mod watch;
