//! Runs a plan: publishes, breaks things, waits until everything has ended, and judges.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use laneway::clock::{Clock, Timestamp};
use laneway::control::commands::{Commands, follow};
use laneway::log::embedded::Embedded;
use laneway::log::embedded::memory::Faults;
use laneway::log::partitioner::{IsolateBy, Placement};
use laneway::log::topic::Topics;
use laneway::log::{Admin, Backend, Limit, Member, Publisher, Read, Reader};
use laneway::model::codec;
use laneway::model::command::{Action, Command};
use laneway::model::progress::{Ledger, Progress, Target};
use laneway::model::record::{Addressed, Headers, Offset, Partition, Record, Topic, header};
use laneway::runtime::deliver::{Deliver, DeliverSettings, DeliverWork, Destinations};
use laneway::runtime::driver;
use laneway::runtime::failure::FailureTopic;
use laneway::runtime::shutdown::Shutdown;
use laneway::runtime::tally::JobTopic;
use laneway::telemetry::server::Readiness;

use crate::gate::{Gate, Gated};
use crate::plan::{Fault, Plan};
use crate::world::{Stage, World};

const GROUP: &str = "laneway.router";
/// After the faults everything has to end within this.
const REST: Duration = Duration::from_secs(3 * 3_600);
/// Every user's next attempt is due within this.
const RETRIES: Duration = Duration::from_secs(600);
const SESSION: Duration = Duration::from_secs(6);
/// The log is read again after so long where it did not answer, and answers within so long, in simulated time.
const AGAIN: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(600);

/// What came of a run.
pub struct Run {
    /// What was wrong; nothing where all properties hold.
    pub violations: Vec<String>,
    /// Stands for everything that was sent, and when.
    pub digest: u64,
}

pub fn run(plan: &Plan) -> Run {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(simulate(plan.clone()))
}

async fn simulate(plan: Plan) -> Run {
    let clock = Clock::derived(Timestamp::from_millis(1_800_000_000_000));
    let log = Embedded::in_memory(Faults::none(), clock.clone()).await.expect("a log");
    let topics = Topics::load(None).expect("topics").with_partitions(plan.partitions);
    for spec in topics.iter() {
        let mut spec = spec.clone();
        if let Some(keep) = plan.retention.filter(|_| spec.topic() == Topic::DELIVERIES) {
            spec.config.insert("retention.ms".into(), keep.as_millis().to_string());
        }
        log.admin().expect("an admin").create(&spec).await.expect("created");
    }
    let world = World::new(plan.clone(), clock.clone());
    let mut engine = Engine { log: log.clone(), world: Arc::clone(&world), processes: BTreeMap::new() };
    for number in 0..plan.processes {
        engine.start(number, &format!("p{number}"));
    }
    log.inject(plan.log);
    let publishing = tokio::spawn(publish(log.clone(), Arc::clone(&world)));
    engine.suffer().await;
    log.inject(Faults { gap: plan.log.gap, ..Faults::none() });
    publishing.await.expect("published");
    let rested = engine.rest().await;
    engine.stop().await;
    let violations = judge(&log, &world, rested).await;
    let digest = world.seen().digest.finish();
    Run { violations, digest }
}

/// Publishes the deliveries, evenly over the plan's span, until the log has each.
async fn publish(log: Embedded, world: Arc<World>) {
    let plan = world.plan.clone();
    let mut random = StdRng::seed_from_u64(plan.seed ^ 0xF00D);
    let publisher = log.publisher().expect("a publisher");
    let placement = Placement { isolate_by: IsolateBy::None, spread: None, partitions: plan.partitions };
    let (mut sent, mut recent): (usize, Vec<Addressed>) = (0, Vec::new());
    while sent < plan.deliveries {
        let count = random.random_range(1..12).min(plan.deliveries - sent);
        let records: Vec<Addressed> = (sent..sent + count)
            .map(|number| {
                let destination = random.random_range(0..plan.destinations.len());
                // Some users are hot.
                let user = random.random_range(0..plan.users).min(random.random_range(0..plan.users));
                let (id, user) = (format!("d{destination}"), format!("u{user}"));
                let mut headers = Headers::new();
                headers.push_text(header::DESTINATION, &id);
                headers.push_text(header::DELIVERY_ID, &number.to_string());
                if !random.random_bool(0.03) {
                    headers.push_text(header::USER, &user);
                }
                let value = Some(vec![0; random.random_range(100..900)].into());
                let partition = placement.place(&id, &user);
                Addressed { topic: Topic::DELIVERIES, partition, key: None, value, headers }
            })
            .collect();
        until_taken(&publisher, &records, &world).await;
        sent += count;
        if plan.repeats > 0.0 {
            recent.extend(records);
            if random.random_bool(plan.repeats) {
                until_taken(&publisher, &recent, &world).await;
                recent.clear();
            }
            recent.drain(..recent.len().saturating_sub(30));
        }
        note_published(&log, &world).await;
        world.clock.sleep(plan.span.div_f64(plan.deliveries as f64 / count as f64)).await;
    }
}

/// In doubt means stored: a publisher that tries again is another story, told by the contract suite.
async fn until_taken(publisher: &impl Publisher, records: &[Addressed], world: &World) {
    while publisher.publish(records.to_vec()).await.is_err_and(|error| !error.to_string().contains("nobody was told")) {
        world.clock.sleep(Duration::from_millis(50)).await;
    }
}

/// Takes down what lies in the log.
async fn note_published(log: &Embedded, world: &World) {
    for number in 0..world.plan.partitions {
        let partition = Partition(number);
        let from = {
            let (seen, all) = (world.seen(), (partition, Offset::START)..=(partition, Offset::new(u128::MAX)));
            let last = [&seen.published, &seen.copies].map(|of| of.range(all.clone()).next_back().map(|(at, _)| at.1));
            last.into_iter().max().flatten().map_or(Offset::START, Offset::just_after)
        };
        for record in read(log, &Topic::DELIVERIES, partition, from, false).await {
            let at = (partition, record.offset);
            let destination = record.headers.text(header::DESTINATION).and_then(|id| id[1..].parse().ok()).unwrap_or(0);
            let id = record.headers.text(header::DELIVERY_ID).unwrap_or_default().to_owned();
            let mut seen = world.seen();
            seen.bytes += record.value.as_ref().map_or(0, bytes::Bytes::len) as u64;
            if *seen.ids.entry((partition, id)).or_insert(at) != at {
                seen.copies.insert(at, world.clock.steady());
                continue;
            }
            seen.published.insert(at, world.clock.steady());
            if let Some(user) = record.headers.text(header::USER) {
                seen.keys.entry((destination, user.to_owned())).or_default().push(at);
            }
        }
    }
}

/// What is visible of a partition; with `all`, waits out what is not decided yet.
async fn read(log: &Embedded, topic: &Topic, partition: Partition, from: Offset, all: bool) -> Vec<Record> {
    let mut reader = log.reader(topic, partition, from).await.expect("a reader");
    let (mut found, mut ends) = (Vec::new(), 0);
    // The log's faults: it is asked again until it answers.
    let mut tries = tokio::time::interval_at(Instant::now() + AGAIN, AGAIN);
    tries.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut until = Instant::now() + PATIENCE;
    loop {
        match reader.read(Limit { records: 10_000, bytes: 100 << 20 }).await {
            Ok(Read::Records(records)) => {
                found.extend(records);
                until = Instant::now() + PATIENCE;
            }
            Ok(Read::End) if all && ends < 10 => ends += 1,
            Ok(Read::End) => return found,
            Err(error) => {
                assert!(tries.tick().await < until, "{topic} {partition} cannot be read: {error}");
            }
        }
    }
}

/// Follows the commands, as a process does.
async fn obey(
    log: Gated,
    clock: Clock,
    told: watch::Sender<Arc<Commands>>,
    destinations: Destinations,
    stage: Arc<Stage>,
) {
    let mut current = loop {
        match follow(log.clone(), clock.clone()).await {
            Ok(current) => break current,
            Err(_) => clock.sleep(Duration::from_millis(100)).await,
        }
    };
    loop {
        let commands = Arc::clone(&current.borrow_and_update());
        destinations.pause(&commands.paused(), |id| stage.rules(id));
        told.send_replace(commands);
        if current.changed().await.is_err() {
            return;
        }
    }
}

/// The processes of the stage.
struct Engine {
    log: Embedded,
    world: Arc<World>,
    processes: BTreeMap<usize, Process>,
}

struct Process {
    gate: Gate,
    task: JoinHandle<()>,
    shutdown: Shutdown,
    commands: JoinHandle<()>,
}

impl Process {
    fn kill(self) {
        self.task.abort();
        self.commands.abort();
    }
}

impl Engine {
    fn start(&mut self, number: usize, instance: &str) {
        let plan = &self.world.plan;
        let (world, clock) = (Arc::clone(&self.world), self.world.clock.clone());
        let gate = Gate::new(clock.clone(), Arc::clone(&world.read));
        let log = Gated { log: self.log.clone(), gate: gate.clone() };
        let placement = Placement { isolate_by: IsolateBy::None, spread: None, partitions: 1 };
        let settings = DeliverSettings {
            input: Topic::DELIVERIES,
            progress: Topic::PROGRESS_ROUTER,
            failures: FailureTopic {
                topic: Topic::DEAD_LETTERS,
                placement,
                stage: "router",
                input: Topic::DELIVERIES,
                input_name: "deliveries".into(),
                group: GROUP.into(),
            },
            jobs: JobTopic(placement),
            bounds: plan.bounds,
            stage: "router",
            repeats: if plan.repeats > 0.0 { 1_000 } else { 0 },
            retention: plan.retention,
            seed: plan.seed,
        };
        let spread = Placement { isolate_by: IsolateBy::None, spread: None, partitions: plan.partitions };
        let destinations = Destinations::new(plan.in_flight, plan.in_flight, spread);
        let driver_settings = driver::Settings {
            partitions: plan.partitions,
            member: Member {
                group: GROUP.into(),
                instance: instance.into(),
                topic: Topic::DELIVERIES,
                outputs: Vec::new(),
                state: None,
                session_timeout: SESSION,
                revoke_drain: Duration::from_secs(1),
            },
            commit_interval: plan.commit_interval,
            stage: "router",
        };
        let shutdown = Shutdown::new(Duration::from_secs(5));
        let (stop, ready) = (shutdown.clone(), Readiness::default().part());
        let (told, heard) = watch::channel(Arc::new(Commands::default()));
        let paused = destinations.clone();
        let stage = Arc::new(Stage(world));
        let commands = tokio::spawn(obey(log.clone(), clock.clone(), told, paused, Arc::clone(&stage)));
        let task = tokio::spawn(async move {
            let work = DeliverWork::new(log.clone(), stage, settings, destinations, heard, clock.clone());
            let work = Arc::new(work.expect("an admin"));
            // Fatal: two of one id, which a person would end. Here it starts again.
            while !stop.has_begun() {
                let part = Readiness::default().part();
                let ended = driver::run(
                    log.clone(),
                    Arc::clone(&work),
                    driver_settings.clone(),
                    clock.clone(),
                    stop.clone(),
                    part,
                );
                if ended.await.is_ok() {
                    break;
                }
                clock.sleep(Duration::from_secs(1)).await;
            }
            drop(ready);
        });
        self.processes.insert(number, Process { gate, task, shutdown, commands });
    }

    /// Everything that the plan has for the engine, at its time.
    async fn suffer(&mut self) {
        let world = Arc::clone(&self.world);
        let end = world.start.plus(world.plan.trouble);
        for (at, fault) in world.plan.faults.clone() {
            world.clock.sleep(world.start.plus(at).since(world.clock.steady())).await;
            let harms = !matches!(fault, Fault::Pause { .. } | Fault::Drain { .. } | Fault::SetClock { .. });
            if harms {
                world.seen().hurt.push(world.clock.steady());
            }
            self.strike(fault).await;
            if harms {
                world.seen().hurt.push(world.clock.steady());
            }
        }
        world.clock.sleep(end.since(world.clock.steady())).await;
    }

    async fn strike(&mut self, fault: Fault) {
        let clock = self.world.clock.clone();
        match fault {
            Fault::Crash { process, away } => {
                if let Some(process) = self.processes.remove(&process) {
                    process.kill();
                }
                clock.sleep(away).await;
                self.start(process, &format!("p{process}"));
            }
            Fault::Restart { process } => {
                if let Some(Process { task, shutdown, commands, .. }) = self.processes.remove(&process) {
                    shutdown.begin();
                    // Bounded by its own budget.
                    let _ = task.await;
                    commands.abort();
                }
                self.start(process, &format!("p{process}"));
            }
            Fault::CutOff { process } => {
                self.log.cut_off(GROUP, &Topic::DELIVERIES, &format!("p{process}").as_str().into());
            }
            Fault::Stall { process, during } => {
                if let Some(process) = self.processes.get(&process) {
                    process.gate.shut(during);
                }
                clock.sleep(during).await;
            }
            Fault::Away { during } => {
                let log = self.world.plan.log;
                self.log.inject(Faults { write_refused: 1.0, read_refused: 1.0, ..log });
                clock.sleep(during).await;
                self.log.inject(log);
            }
            Fault::Twin { process } => {
                self.start(1_000, &format!("p{process}"));
                clock.sleep(Duration::from_secs(2)).await;
                if let Some(twin) = self.processes.remove(&1_000) {
                    twin.kill();
                }
            }
            Fault::SetClock { by } => clock.set_wall(by * 1_000_000),
            Fault::Drain { destination } => {
                self.world.seen().drained = true;
                self.command(Action::Drain, destination).await;
            }
            Fault::Pause { destination, during } => {
                self.command(Action::Pause, destination).await;
                clock.sleep(during).await;
                self.command(Action::Resume, destination).await;
            }
        }
    }

    async fn command(&self, action: Action, destination: usize) {
        let target = Target::Destination(format!("d{destination}").as_str().into());
        let at = self.world.clock.now();
        let (id, by, mut ends) = (format!("{action:?}-{}", at.micros()), "sim".into(), BTreeMap::new());
        // Every other drain knows where the partitions end, as one of the command line does.
        if action == Action::Drain && at.micros() % 2 == 0 {
            let admin = self.log.admin().expect("an admin");
            for number in (0..self.world.plan.partitions).map(Partition) {
                let marks = admin.watermarks(&Topic::DELIVERIES, number).await.expect("watermarks");
                ends.insert(number, marks.end);
            }
        }
        let command = Command { id, action, target, at, by, ends };
        let control = command.to_control();
        let key = Some(format!("{}/{}", control.kind, control.id).into());
        let value = Some(codec::encode(&control).into());
        let record = Addressed { topic: Topic::CONTROL, partition: Partition(0), key, value, headers: Headers::new() };
        let publisher = self.log.publisher().expect("a publisher");
        while publisher.publish(vec![record.clone()]).await.is_err() {
            self.world.clock.sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until the group has committed everything. False where that takes too long.
    async fn rest(&self) -> bool {
        let (clock, until) = (&self.world.clock, self.world.clock.steady().plus(REST));
        let admin = self.log.admin().expect("an admin");
        if self.world.plan.deletes {
            // Where the log is empty the position says nothing.
            clock.sleep(RETRIES).await;
        }
        while clock.steady() < until {
            clock.sleep(Duration::from_millis(500)).await;
            let Ok(committed) = admin.committed(GROUP, &Topic::DELIVERIES).await else { continue };
            let mut all = true;
            for number in 0..self.world.plan.partitions {
                let marks = admin.watermarks(&Topic::DELIVERIES, Partition(number)).await.expect("watermarks");
                let last = read(&self.log, &Topic::DELIVERIES, Partition(number), Offset::START, false).await;
                let end = last.last().map_or(marks.start, |record| record.offset.just_after());
                all &= marks.start == marks.end || committed.get(&Partition(number)).is_some_and(|it| it.offset >= end);
            }
            if all {
                return true;
            }
        }
        false
    }

    async fn stop(&mut self) {
        for (_, Process { task, shutdown, commands, .. }) in std::mem::take(&mut self.processes) {
            shutdown.begin();
            // Bounded by its own budget.
            let _ = task.await;
            commands.abort();
        }
    }
}

/// Every property that can be judged at the end.
async fn judge(log: &Embedded, world: &World, rested: bool) -> Vec<String> {
    note_published(log, world).await;
    let mut wrong = Vec::new();
    let mut ledger = Ledger::default();
    let mut marks: BTreeSet<String> = BTreeSet::new();
    for number in 0..world.plan.partitions {
        let mut newest: BTreeMap<bytes::Bytes, Option<bytes::Bytes>> = BTreeMap::new();
        let mut last_seq = 0;
        for record in read(log, &Topic::PROGRESS_ROUTER, Partition(number), Offset::START, true).await {
            let Some(key) = record.key else { continue };
            if let Some(Ok(Progress::Partition(own))) = record.value.as_ref().map(codec::decode::<Progress>) {
                if own.seq <= last_seq {
                    wrong.push(format!("partition {number}: seq {} comes after {last_seq}", own.seq));
                }
                last_seq = own.seq;
                if own.runs.len() > world.plan.bounds.holes + 40 {
                    wrong.push(format!("partition {number}: {} runs in its record", own.runs.len()));
                }
            }
            newest.insert(key, record.value);
        }
        for (key, value) in newest {
            let Some(value) = value else { continue };
            match codec::decode::<Progress>(&value) {
                Ok(Progress::Ledger(_, own)) => {
                    ledger.taken += own.taken;
                    ledger.delivered += own.delivered;
                    ledger.filtered += own.filtered;
                    ledger.aborted += own.aborted;
                    ledger.drained += own.drained;
                }
                Ok(Progress::Key(_)) => drop(marks.insert(String::from_utf8_lossy(&key).into_owned())),
                Ok(Progress::Lane(_) | Progress::Partition(_)) => {}
                Err(error) => wrong.push(format!("unreadable progress: {error}")),
            }
        }
    }
    let mut dead = 0;
    for number in 0..12 {
        dead += read(log, &Topic::DEAD_LETTERS, Partition(number), Offset::START, true).await.len() as u64;
    }
    let mut seen = world.seen();
    let published = seen.published.len() as u64;
    if !rested {
        let open: Vec<_> = seen.published.keys().filter(|at| !seen.finals.contains_key(*at)).take(5).collect();
        wrong.push(format!("it does not come to rest; not final are {open:?} …; {ledger:?}"));
    }
    if published != world.plan.deliveries as u64 {
        wrong.push(format!("{published} published of {}: the simulation is wrong", world.plan.deliveries));
    }
    let ended = ledger.delivered + ledger.filtered + ledger.aborted + ledger.drained;
    // What was sent again is a delivery of its own to the ledger.
    let copies = seen.copies.keys().filter(|at| seen.first_sent.contains_key(at)).count() as u64;
    let most = published + if seen.drained { seen.copies.len() as u64 } else { copies };
    if ledger.taken != ended || !(published..=most).contains(&ended) {
        wrong.push(format!("the ledger does not close: {published} published, {copies} sent again, {ledger:?}"));
    }
    // Of what the log deleted there is nothing that a dead letter could hold.
    if dead > ledger.aborted || (dead < ledger.aborted && !world.plan.deletes) {
        wrong.push(format!("{dead} dead letters, {} aborted", ledger.aborted));
    }
    wrong.extend(judge_ends(&seen, world, ledger, rested && !marks.is_empty()));
    let mut found = std::mem::take(&mut seen.violations);
    found.extend(wrong);
    found
}

/// What ended how.
fn judge_ends(seen: &crate::world::Seen, world: &World, ledger: Ledger, marks_left: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let refusals = world.plan.destinations.iter().any(|it| matches!(it.manner, crate::plan::Manner::Refusing(_)));
    let expires = world.plan.retention.is_some();
    if expires && ledger.aborted == 0 {
        wrong.push("nothing was given up before the log deleted it".into());
    }
    if ledger.aborted > 0 && !refusals && !expires {
        wrong.push(format!("{} were given up, though no destination refused for good", ledger.aborted));
    }
    let lost = seen.published.keys().filter(|at| !seen.finals.contains_key(*at)).count() as u64;
    if lost > ledger.drained + if expires { ledger.aborted } else { 0 } {
        let which: Vec<_> = seen.published.keys().filter(|at| !seen.finals.contains_key(*at)).take(5).collect();
        wrong.push(format!("{lost} never reached a final verdict ({} drained): {which:?} …", ledger.drained));
    }
    if marks_left {
        wrong.push("marks are left".into());
    }
    let (read, bytes) = (world.read.load(Ordering::Relaxed), seen.bytes);
    if world.plan.reading.is_some_and(|bound| read as f64 > bytes as f64 * bound) {
        wrong.push(format!("{read} bytes read by cursors, of {bytes} that there are"));
    }
    if let Some(bound) = world.plan.isolation {
        wrong.extend(isolation(seen, bound));
    }
    wrong
}

/// The first destination is well: nothing of it waits for the others.
fn isolation(seen: &crate::world::Seen, bound: Duration) -> Option<String> {
    let own: BTreeSet<_> =
        seen.keys.iter().filter(|((destination, _), _)| *destination == 0).flat_map(|(_, at)| at).collect();
    let waits = own.into_iter().filter_map(|at| Some(seen.first_sent.get(at)?.since(*seen.published.get(at)?)));
    let worst = waits.max()?;
    (worst > bound).then(|| format!("a delivery to a destination that is well waited for {worst:?}"))
}
