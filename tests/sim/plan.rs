//! What a run consists of, decided by its seed.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use laneway::log::embedded::memory::Faults;
use laneway::runtime::deliver::Bounds;

/// How a destination behaves while faults last. Afterwards all are well.
#[derive(Clone, Debug, PartialEq)]
pub enum Manner {
    Well,
    /// Answers after so long.
    Slow(Duration),
    /// Refuses so many of a hundred requests for now.
    Flaky(u32),
    /// These users of a hundred fail.
    FailingUsers(u32),
    /// Answers nothing but 500 until faults end.
    Dead,
    /// On and off.
    Flapping(Duration),
    /// So many of a hundred events are refused for good.
    Refusing(u32),
    /// Never answers: the client gives up after its time-out.
    Hanging,
}

/// What happens to the engine.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// A process ends at whatever it is doing, and starts again a while later.
    Crash { process: usize, away: Duration },
    /// A process stops in order and starts again.
    Restart { process: usize },
    /// A process's session is taken for dead although it lives.
    CutOff { process: usize },
    /// A process gets nothing through to the log, nor hears of it, while its requests go on.
    Stall { process: usize, during: Duration },
    /// The log refuses everything to everybody.
    Away { during: Duration },
    /// A second process of the same id takes the session over, and ends again.
    Twin { process: usize },
    /// An admin ends what is pending of a destination.
    Drain { destination: usize },
    /// An admin pauses a destination for a while.
    Pause { destination: usize, during: Duration },
    /// The wall clock of all processes is set by so many seconds.
    SetClock { by: i64 },
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub partitions: u32,
    pub processes: usize,
    pub destinations: Vec<Destination>,
    pub users: usize,
    pub deliveries: usize,
    /// After a batch, the chance that it and those just before it are published once more: a processor has died.
    pub repeats: f64,
    /// Nothing waits for anybody: every owner knows what lies in the log twice.
    pub is_flowing: bool,
    /// All of them are published within this.
    pub span: Duration,
    pub bounds: Bounds,
    /// For how long a delivery is tried.
    pub retry_window: Duration,
    /// For how long the log keeps a delivery; none: for longer than the run.
    pub retention: Option<Duration>,
    /// The engine is away for longer than that: some deliveries are deleted before they are read.
    pub deletes: bool,
    pub in_flight: usize,
    pub log: Faults,
    pub faults: Vec<(Duration, Fault)>,
    /// Faults end here.
    pub trouble: Duration,
    pub commit_interval: Duration,
    /// Of the published bytes, so many times may be read by cursors and directly; none where faults of the engine repeat it.
    pub reading: Option<f64>,
    /// Waiting time of healthy destinations' deliveries that no fault of the engine explains; none where faults do.
    pub isolation: Option<Duration>,
}

#[derive(Clone, Debug)]
pub struct Destination {
    pub manner: Manner,
    pub ordered: bool,
    pub batch: usize,
    pub rate: Option<f64>,
}

impl Destination {
    pub fn new(manner: Manner) -> Self {
        Self { manner, ordered: true, batch: 1, rate: None }
    }
}

/// Everything near its bound, so that a few hundred records meet all of them.
pub fn near() -> Bounds {
    Bounds {
        key_bytes: 2_500,
        key_records: 8,
        listed_followers: 3,
        mark_bytes: 6,
        lane_bytes: 14_000,
        down_lane_bytes: 7_000,
        probes: 3,
        lane_floor_bytes: 1_500,
        partition_bytes: 80_000,
        process_bytes: 160_000,
        held_bytes: 20_000,
        held_reserve_keys: 4,
        holes: 12,
        attach: 4,
        window_records: 120,
        cursors: 4,
        process_cursors: 6,
        near: 20,
        uncommitted: 60,
        uncommitted_bytes: 20_000,
        fetches: 4,
        turn_bytes: 1_000,
    }
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let seconds = |random: &mut StdRng, from: u64, to: u64| Duration::from_millis(random.random_range(from..to));
        let mut destinations: Vec<Destination> = (0..random.random_range(2..6))
            .map(|index| Destination {
                manner: if index == 0 { Manner::Well } else { manner(&mut random) },
                ordered: random.random_bool(0.85),
                batch: if random.random_bool(0.2) { 4 } else { 1 },
                rate: random.random_bool(0.1).then(|| random.random_range(2.0..50.0)),
            })
            .collect();
        let mut processes = random.random_range(1..4);
        let mut trouble = seconds(&mut random, 20_000, 90_000);
        let calm = random.random_bool(0.2);
        let chance = |random: &mut StdRng, most: f64| {
            if calm || random.random_bool(0.5) { 0.0 } else { random.random_range(0.0..most) }
        };
        let log = Faults {
            seed,
            write_refused: chance(&mut random, 0.08),
            write_in_doubt: chance(&mut random, 0.08),
            read_refused: chance(&mut random, 0.05),
            gap: if random.random_bool(0.5) { 0.2 } else { 0.0 },
            late: chance(&mut random, 0.3),
        };
        let mut faults =
            if calm { Vec::new() } else { random_faults(&mut random, trouble, processes, destinations.len()) };
        faults.extend(clock_faults(seed, trouble));
        faults.sort_by_key(|(at, _)| *at);
        let (mut users, mut retry_window) = (random.random_range(3..30), Duration::from_secs(3_600));
        let mut deliveries = random.random_range(100..500);
        if random.random_bool(0.15) {
            // Down for far longer than the window, which only counts while the breaker is not open: nothing is given up.
            (users, deliveries, retry_window) = (users + 15, deliveries + 300, Duration::from_secs(150));
            (processes, trouble) = (1, Duration::from_secs(500));
            // A new process learns anew that it is down, and tries until it knows.
            faults = vec![
                (trouble / 2, Fault::Restart { process: 0 }),
                (trouble * 3 / 4, Fault::Crash { process: 0, away: Duration::from_secs(9) }),
            ];
            for destination in destinations.iter_mut().filter(|it| it.manner != Manner::Well) {
                (destination.manner, destination.rate) = (Manner::Dead, None);
            }
        }
        Self {
            seed,
            partitions: random.random_range(1..4),
            processes,
            users,
            retry_window,
            retention: None,
            deletes: false,
            deliveries,
            repeats: repeats(seed),
            is_flowing: false,
            span: trouble.mul_f64(random.random_range(0.2..0.9)),
            bounds: if random.random_bool(0.8) { near() } else { Bounds::default() },
            in_flight: random.random_range(8..60),
            log,
            faults,
            trouble,
            commit_interval: Duration::from_millis(random.random_range(20..400)),
            isolation: None,
            reading: None,
            destinations,
        }
    }

    /// Without faults of the engine: for named traces.
    fn calm(destinations: Vec<Destination>, deliveries: usize, span: Duration) -> Self {
        Self {
            seed: 1,
            partitions: 1,
            processes: 1,
            destinations,
            users: 40,
            retry_window: Duration::from_secs(3_600),
            retention: None,
            deletes: false,
            deliveries,
            repeats: 0.0,
            is_flowing: false,
            span,
            bounds: near(),
            in_flight: 40,
            log: Faults::none(),
            faults: Vec::new(),
            trouble: span * 2,
            commit_interval: Duration::from_millis(100),
            isolation: None,
            reading: None,
        }
    }
}

/// By chances of its own, so that it moves nothing else.
fn repeats(seed: u64) -> f64 {
    if StdRng::seed_from_u64(seed ^ 0xD0B1E).random_bool(0.4) { 0.2 } else { 0.0 }
}

/// By chances of its own, as [`repeats`].
fn clock_faults(seed: u64, trouble: Duration) -> Vec<(Duration, Fault)> {
    let mut random = StdRng::seed_from_u64(seed ^ 0xC10C);
    let count = if random.random_bool(0.3) { random.random_range(1..4) } else { 0 };
    let mut one = || {
        let at = trouble.mul_f64(random.random_range(0.02..0.95));
        (at, Fault::SetClock { by: random.random_range(-7_200..10_800) })
    };
    (0..count).map(|_| one()).collect()
}

fn manner(random: &mut StdRng) -> Manner {
    match random.random_range(0..9) {
        0 | 1 => Manner::Well,
        2 => Manner::Slow(Duration::from_millis(random.random_range(200..29_000))),
        3 => Manner::Flaky(random.random_range(5..60)),
        4 => Manner::FailingUsers(random.random_range(5..60)),
        5 => Manner::Dead,
        6 => Manner::Flapping(Duration::from_millis(random.random_range(500..15_000))),
        7 => Manner::Refusing(random.random_range(5..50)),
        _ => Manner::Hanging,
    }
}

fn random_faults(
    random: &mut StdRng,
    trouble: Duration,
    processes: usize,
    destinations: usize,
) -> Vec<(Duration, Fault)> {
    let count = random.random_range(0..9);
    let mut one = || (trouble.mul_f64(random.random_range(0.02..0.95)), fault(random, processes, destinations));
    (0..count).map(|_| one()).collect()
}

fn fault(random: &mut StdRng, processes: usize, destinations: usize) -> Fault {
    let process = random.random_range(0..processes);
    let during = Duration::from_millis(random.random_range(500..20_000));
    match random.random_range(0..24) {
        0..8 => Fault::Crash { process, away: Duration::from_millis(random.random_range(0..8_000)) },
        8..11 => Fault::Restart { process },
        11..14 => Fault::CutOff { process },
        14..16 => Fault::Twin { process },
        16 | 17 => Fault::Drain { destination: random.random_range(0..destinations) },
        18 | 19 => Fault::Pause { destination: random.random_range(0..destinations), during },
        20..23 => Fault::Stall { process, during },
        _ => Fault::Away { during },
    }
}

const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn well() -> Destination {
    Destination::new(Manner::Well)
}

/// When, which process, and for how long, in seconds.
fn crash(at: u64, process: usize, away: u64) -> (Duration, Fault) {
    (seconds(at), Fault::Crash { process, away: seconds(away) })
}

/// The trace in which a new owner has to look at what lies before.
pub const LOOKS_BACK: &str = "what a processor wrote twice, while routers come and go";

/// Traces that broke earlier versions of the design.
pub fn traces() -> Vec<(&'static str, Plan)> {
    vec![
        (
            "a record passed by live but not stored before a crash",
            Plan {
                faults: (1..12).map(|n| crash(n * 2, 0, 0)).collect(),
                commit_interval: seconds(1),
                ..Plan::calm(vec![well(), Destination::new(Manner::Flaky(30))], 400, seconds(20))
            },
        ),
        (
            "a parked key without head after a restart",
            Plan {
                users: 2,
                faults: (1..10).map(|n| crash(n * 3, 0, 1)).collect(),
                ..Plan::calm(vec![Destination::new(Manner::Slow(Duration::from_millis(300))), well()], 400, seconds(10))
            },
        ),
        (
            "a key scan and a lane scan meeting",
            Plan {
                users: 4,
                faults: vec![crash(30, 0, 2)],
                ..Plan::calm(
                    vec![Destination::new(Manner::Flapping(seconds(4))), Destination::new(Manner::FailingUsers(50))],
                    500,
                    seconds(20),
                )
            },
        ),
        (
            "a drain read again after new data came",
            Plan {
                faults: vec![(seconds(10), Fault::Drain { destination: 1 }), crash(14, 0, 1), crash(18, 0, 1)],
                ..Plan::calm(vec![well(), Destination::new(Manner::Dead)], 400, seconds(30))
            },
        ),
    ]
    .into_iter()
    .chain(more_traces())
    .chain(traces_of_isolation())
    .chain(traces_of_repeats())
    .chain(traces_of_time())
    .collect()
}

fn more_traces() -> Vec<(&'static str, Plan)> {
    let two_hundred = (0..200).map(|_| Destination::new(Manner::Dead)).collect();
    vec![
        (
            "two hundred lanes catching up at once",
            Plan {
                // The probes of two hundred breakers find their destinations up one after the other: not all of them share a
                // cursor.
                reading: Some(16.0),
                // Each destination has a few failing keys, which need memory for as many marks.
                bounds: Bounds {
                    partition_bytes: 800_000,
                    process_bytes: 1_600_000,
                    held_reserve_keys: 16,
                    fetches: 64,
                    uncommitted: 10_000,
                    probes: 8,
                    ..near()
                },
                ..Plan::calm(two_hundred, 2_000, seconds(30))
            },
        ),
        (
            "a new owner reading progress before the old one's last commit is visible",
            Plan {
                processes: 2,
                log: Faults { late: 0.8, gap: 0.5, seed: 7, ..Faults::none() },
                faults: (1..10).map(|n| crash(n * 3, n as usize % 2, 1)).collect(),
                ..Plan::calm(vec![well(), Destination::new(Manner::Flaky(40))], 300, seconds(30))
            },
        ),
        (
            "a progress-only transaction of a zombie",
            Plan {
                processes: 2,
                faults: (1..12).map(|n| (seconds(n * 3), Fault::CutOff { process: n as usize % 2 })).collect(),
                ..Plan::calm(vec![well(), Destination::new(Manner::Slow(seconds(5)))], 300, seconds(30))
            },
        ),
        (
            "what the log is about to delete",
            Plan {
                retention: Some(seconds(120)),
                faults: vec![crash(140, 0, 1), crash(170, 0, 1)],
                ..Plan::calm(vec![well(), Destination::new(Manner::Dead)], 500, seconds(150))
            },
        ),
        (
            "what the log deleted while no owner was there",
            Plan {
                retention: Some(seconds(60)),
                deletes: true,
                faults: vec![crash(50, 0, 200)],
                ..Plan::calm(vec![well(), Destination::new(Manner::Dead)], 500, seconds(40))
            },
        ),
    ]
}

/// What one destination does delays no other.
fn traces_of_isolation() -> Vec<(&'static str, Plan)> {
    let isolated = |plan: Plan| Plan { isolation: Some(seconds(15)), ..plan };
    vec![
        (
            "a 29-second destination taking all permits",
            isolated(Plan::calm(vec![well(), Destination::new(Manner::Slow(seconds(29)))], 500, seconds(60))),
        ),
        (
            "30 % of users failing below the breaker",
            isolated(Plan::calm(vec![well(), Destination::new(Manner::FailingUsers(30))], 500, seconds(60))),
        ),
        (
            "more failing users than may be held, beside a destination that is well",
            isolated(Plan {
                users: 200,
                ..Plan::calm(vec![well(), Destination::new(Manner::FailingUsers(40))], 1_200, seconds(60))
            }),
        ),
        (
            "sixty destinations that answer after five seconds filling memory, beside one that is well",
            Plan {
                isolation: Some(seconds(2)),
                in_flight: 400,
                bounds: Bounds { partition_bytes: 200_000, process_bytes: 200_000, ..near() },
                ..Plan::calm(
                    std::iter::once(well())
                        .chain((0..60).map(|_| Destination::new(Manner::Slow(seconds(5)))))
                        .collect(),
                    4_800,
                    seconds(40),
                )
            },
        ),
        (
            "a dead destination beside a well one",
            isolated(Plan::calm(vec![well(), Destination::new(Manner::Dead)], 500, seconds(60))),
        ),
    ]
}

fn traces_of_repeats() -> Vec<(&'static str, Plan)> {
    vec![
        (
            "what a processor wrote twice, for destinations and users that wait",
            Plan {
                repeats: 0.5,
                users: 6,
                ..Plan::calm(
                    vec![
                        well(),
                        Destination::new(Manner::Dead),
                        Destination::new(Manner::FailingUsers(40)),
                        Destination { batch: 4, ..Destination::new(Manner::Slow(seconds(2))) },
                        Destination { ordered: false, ..Destination::new(Manner::Flapping(seconds(4))) },
                    ],
                    500,
                    seconds(30),
                )
            },
        ),
        (
            LOOKS_BACK,
            Plan {
                repeats: 0.5,
                is_flowing: true,
                bounds: Bounds::default(),
                faults: (1..10)
                    .map(
                        |n| {
                            if n % 2 == 0 {
                                crash(n * 3, 0, 1)
                            } else {
                                (seconds(n * 3), Fault::Restart { process: 0 })
                            }
                        },
                    )
                    .collect(),
                ..Plan::calm(vec![well(), well()], 400, seconds(30))
            },
        ),
    ]
}

/// The wall clock is set while the engine runs.
fn traces_of_time() -> Vec<(&'static str, Plan)> {
    let limited = || Destination { rate: Some(20.0), ..well() };
    vec![
        (
            "the wall clock set back by an hour, with rate limits, retries and an open breaker",
            Plan {
                isolation: Some(seconds(15)),
                faults: (1..6).map(|n| (seconds(n * 9), Fault::SetClock { by: -3_600 })).collect(),
                ..Plan::calm(
                    vec![limited(), Destination::new(Manner::FailingUsers(30)), Destination::new(Manner::Dead)],
                    500,
                    seconds(60),
                )
            },
        ),
        (
            "the wall clock set forward by three hours while requests are under way",
            Plan {
                isolation: Some(seconds(15)),
                retry_window: seconds(3_600),
                faults: (1..6).map(|n| (seconds(n * 9), Fault::SetClock { by: 10_800 })).collect(),
                ..Plan::calm(
                    vec![limited(), Destination::new(Manner::Flaky(40)), Destination::new(Manner::Hanging)],
                    500,
                    seconds(60),
                )
            },
        ),
    ]
}
