//! Deliberate mistakes, for proving that the simulation (tests/sim) finds such. They exist in debug builds only: elsewhere
//! [`is_planted`] is a constant `false`.

use std::cell::Cell;

/// A mistake, and in its name what is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// A scan passes over the first record that it should give to a parked key.
    SkipParked,
    /// A mark says nothing of what is parked.
    ForgetParkedInMark,
    /// The committed offset does not look at the keys' marks.
    CommitPastMark,
    /// A key whose head failed lets the next one go.
    FreeKeyTooEarly,
    /// A lane is attached before its cursor has reached live reading.
    AttachTooEarly,
    /// What is unfinished when a lane is attached is not marked.
    LoseTailAtAttach,
    /// A cursor hands over what live reading will bring too.
    ScanPastLive,
    /// A lane forgets what was finished when it is detached.
    ForgetFinishedAtDetach,
    /// What memory let go of is not read again.
    ForgetForgotten,
    /// A restored partition does not pass over what was finished.
    ForgetRunsAtRestore,
    /// A mark outlives its key.
    KeepMarks,
    /// A parked key takes the lane's place of reading for its own frontier.
    DissolveTooEarly,
    /// Time counts while the breaker is open.
    SpendWhileOpen,
    /// A restored lane starts behind its finished runs.
    RestoreLaneBehindRuns,
    /// The ledger begins anew after a restart.
    ForgetLedger,
    /// The driver commits what an older assignment has left.
    ForgetEpoch,
    /// A failed commit's content is not committed again.
    DropAfterFailedCommit,
    /// A repeat stays in the ledger as taken.
    CountRepeats,
    /// A new owner does not look at what lies before.
    ForgetLookBack,
}

impl Mistake {
    pub const ALL: [Mistake; 19] = [
        Mistake::SkipParked,
        Mistake::ForgetParkedInMark,
        Mistake::CommitPastMark,
        Mistake::FreeKeyTooEarly,
        Mistake::AttachTooEarly,
        Mistake::LoseTailAtAttach,
        Mistake::ScanPastLive,
        Mistake::ForgetFinishedAtDetach,
        Mistake::ForgetForgotten,
        Mistake::ForgetRunsAtRestore,
        Mistake::KeepMarks,
        Mistake::DissolveTooEarly,
        Mistake::SpendWhileOpen,
        Mistake::RestoreLaneBehindRuns,
        Mistake::ForgetLedger,
        Mistake::ForgetEpoch,
        Mistake::DropAfterFailedCommit,
        Mistake::CountRepeats,
        Mistake::ForgetLookBack,
    ];
}

thread_local! {
    static PLANTED: Cell<Option<Mistake>> = const { Cell::new(None) };
    static CHECKED: Cell<bool> = const { Cell::new(false) };
}

/// Switches the check of a partition's invariants after each of its steps on or off, for everything that runs on this thread.
/// It exists in debug builds only.
pub fn check_invariants(is_on: bool) {
    CHECKED.set(is_on);
}

#[inline]
pub fn are_invariants_checked() -> bool {
    cfg!(debug_assertions) && CHECKED.get()
}

/// Plants a mistake in everything that runs on this thread, or takes it away.
pub fn plant(mistake: Option<Mistake>) {
    PLANTED.set(mistake);
}

#[inline]
pub fn is_planted(mistake: Mistake) -> bool {
    cfg!(debug_assertions) && PLANTED.get() == Some(mistake)
}
