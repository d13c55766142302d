//! How the last owner of a partition ended, and what that means for its records.
//!
//! A stage that panics is caught. What ends the whole process (native code, memory, a stack) is not, and would do it again at
//! every start. So nothing is run that a committed note does not tell of: the metadata of the partition's offset says that
//! records below some offset may be under way, or that nothing is. Whoever finds such a note from another process knows that
//! this one stopped without saying so. Once is no reason for anything: processes are killed. After a second time over the same
//! records they run one by one, each noted before it runs; one that ends the process twice like that is not run any more.
//! Only one partition of a process does that at a time: two notes that a process leaves would both be believed.
//!
//! The note also says whether the position was set by an operator since (`… rerun <id>`): what is made of the records again is
//! wanted then, and not to be taken for what a crash repeats. A position that an operator has set has no note at all.

use crate::model::record::Offset;

/// A note covers so many more offsets than have come, so that it seldom has to be waited for.
const MARGIN: u64 = 5_000;
/// Or so many entries, of many records each.
const MARGIN_OF_ENTRIES: u64 = 200;
/// So many unclean stops over the same records, and they run one by one.
const STOPS: u32 = 2;
/// So many unclean stops in one record, and it is not run any more.
const TRIES: u32 = 2;

/// What the metadata of a committed offset says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Note {
    Clean,
    /// Records below `until` may be under way; so many stops came before, over the same ones.
    Together {
        until: Offset,
        stops: u32,
        process: String,
    },
    /// This record is under way, for the so-manieth time; those below `until` run one by one.
    One {
        at: Offset,
        tries: u32,
        until: Offset,
        process: String,
    },
}

impl Note {
    fn parse(text: &str) -> Note {
        let words: Vec<&str> = text.split(' ').collect();
        let offset = Offset::parse;
        let note = match words[..] {
            ["together", until, stops, process] => offset(until)
                .zip(stops.parse().ok())
                .map(|(until, stops)| Note::Together { until, stops, process: process.to_owned() }),
            ["one", at, tries, until, process] => offset(at)
                .zip(tries.parse().ok())
                .zip(offset(until))
                .map(|((at, tries), until)| Note::One { at, tries, until, process: process.to_owned() }),
            _ => None,
        };
        note.unwrap_or(Note::Clean)
    }

    fn text(&self) -> String {
        match self {
            Note::Clean => "clean".into(),
            Note::Together { until, stops, process } => format!("together {until} {stops} {process}"),
            Note::One { at, tries, until, process } => format!("one {at} {tries} {until} {process}"),
        }
    }
}

/// What may be done with a record that runs alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alone {
    /// It may run.
    Run,
    /// It may run once a commit has noted it.
    Note,
    /// It has ended the process before: it is not run.
    Poison,
}

/// Between a note and the re-run that it stands in.
const RERUN: &str = " rerun ";

/// The notes of one partition.
pub struct Stops {
    process: String,
    /// The last time that an operator set the position; none where none did.
    rerun: Option<String>,
    /// What the next commit is to say.
    wanted: Note,
    /// What the last one that was handed over says, and the last one that is known to be committed.
    handed: Option<Note>,
    committed: Option<Note>,
    /// Unclean stops over the records below `doubtful`.
    stops: u32,
    doubtful: Offset,
    /// The record that was under way alone when the process ended, and how often that was so.
    suspect: Option<(Offset, u32)>,
}

impl Stops {
    /// `metadata`: that of the committed offset, if there is one; `process`: an id that no other process has, nor this one's
    /// next start.
    pub fn new(metadata: Option<&str>, process: &str) -> Self {
        let (mut stops, mut doubtful, mut suspect) = (0, Offset::START, None);
        let (note, rerun) = match metadata {
            // Nothing runs before a commit has told, so that the next owner says the same.
            Some("") => ("", Some(uuid::Uuid::new_v4().simple().to_string())),
            Some(text) => text.split_once(RERUN).map_or((text, None), |(note, rerun)| (note, Some(rerun.to_owned()))),
            None => ("", None),
        };
        match Note::parse(note) {
            Note::Clean => {}
            Note::Together { until, stops: before, process: by } => {
                // A session that this process has built anew is no stop.
                (stops, doubtful) = (before + u32::from(by != process), until);
            }
            Note::One { at, tries, until, process: by } => {
                (stops, doubtful) = (STOPS, until);
                suspect = Some((at, tries - u32::from(by == process).min(tries)));
            }
        }
        let wanted = Note::Clean;
        Self { process: process.to_owned(), rerun, wanted, handed: None, committed: None, stops, doubtful, suspect }
    }

    /// Nobody asks what is a re-run, where what a crash leaves is undone.
    pub fn forget_rerun(&mut self) {
        self.rerun = None;
    }

    /// What the outputs are marked with.
    pub fn rerun(&self) -> Option<&str> {
        self.rerun.as_deref()
    }

    /// Whether records may have been under way when another process ended.
    pub fn is_unclean(&self) -> bool {
        self.stops > 0
    }

    /// The log ended here when the partition was assigned: what a note covers beyond that had never come. `start`: the first
    /// record that is to run.
    pub fn bound(&mut self, start: Offset, end: Offset) {
        self.doubtful = self.doubtful.min(end);
        if self.doubtful <= start {
            (self.stops, self.suspect) = (0, None);
        }
    }

    /// Whether a note of a single record stands, or is about to: should the process end now, that record is taken for the
    /// reason.
    pub fn is_alone(&self) -> bool {
        let is_one = |note: &Note| matches!(note, Note::One { .. });
        is_one(&self.wanted) || self.handed.as_ref().is_some_and(is_one) || self.committed.as_ref().is_some_and(is_one)
    }

    /// Everything below `position` has ended, and nothing is under way: once that covers the doubtful ones, no note of a single
    /// record is to stand.
    pub fn ended(&mut self, position: Offset) {
        if matches!(self.wanted, Note::One { .. }) && position >= self.doubtful {
            self.wanted = Note::Clean;
        }
    }

    /// Unclean stops over the records that come first.
    pub fn count(&self) -> u32 {
        self.stops
    }

    /// Up to where records run one by one, if `at` does.
    pub fn alone(&self, at: Offset) -> Option<Offset> {
        (self.stops >= STOPS && at < self.doubtful).then_some(self.doubtful)
    }

    /// Records up to and including `last` are to run together. False: not before the next commit.
    pub fn together(&mut self, last: Offset) -> bool {
        let stops = if last < self.doubtful { self.stops } else { 0 };
        let reach = |note: &Note| match note {
            Note::Together { until, stops: noted, .. } if *noted >= stops => *until,
            _ => Offset::START,
        };
        let margin = if last.entry().is_some() { MARGIN_OF_ENTRIES } else { MARGIN };
        if reach(&self.wanted) < last.forward(margin / 2) {
            // What is doubtful stays so until it is behind.
            let until = last.forward(margin).max(if stops > 0 { self.doubtful } else { Offset::START });
            self.wanted = Note::Together { until, stops, process: self.process.clone() };
        }
        self.committed.as_ref().is_some_and(|note| reach(note) > last)
    }

    /// This record is to run alone.
    pub fn one(&mut self, at: Offset) -> Alone {
        let before = self.suspect.filter(|(suspect, _)| *suspect == at).map_or(0, |(_, tries)| tries);
        if before >= TRIES {
            return Alone::Poison;
        }
        let (until, process) = (self.doubtful, self.process.clone());
        self.wanted = Note::One { at, tries: before + 1, until, process };
        if self.committed.as_ref() == Some(&self.wanted) { Alone::Run } else { Alone::Note }
    }

    /// Nothing is under way, and nothing will be.
    pub fn rest(&mut self) {
        self.wanted = Note::Clean;
    }

    /// Whether a commit is needed for what it says alone.
    pub fn is_news(&self) -> bool {
        match &self.handed {
            Some(handed) => *handed != self.wanted,
            None => self.wanted != Note::Clean,
        }
    }

    /// The metadata of the next commit.
    pub fn hand_over(&mut self) -> String {
        self.handed = Some(self.wanted.clone());
        let note = self.wanted.text();
        self.rerun.as_ref().map_or_else(|| note.clone(), |rerun| format!("{note}{RERUN}{rerun}"))
    }

    /// What was handed over is committed.
    pub fn committed(&mut self) {
        self.committed.clone_from(&self.handed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: fn(u128) -> Offset = Offset::new;

    /// Commits what is wanted; the metadata.
    fn commit(stops: &mut Stops) -> String {
        let text = stops.hand_over();
        stops.committed();
        text
    }

    #[test]
    fn notes_survive_and_garbage_is_clean() {
        for text in
            ["clean", "together 17 1 abc", "one 5 2 900 abc", "together 7:12:0 1 abc", "one 7:12:3 1 7:900:0 abc"]
        {
            assert_eq!(Note::parse(text).text(), text);
        }
        for text in ["", "together", "together x 1 abc", "one 1 2 abc", "4711"] {
            assert_eq!(Note::parse(text), Note::Clean, "{text}");
        }
    }

    #[test]
    fn nothing_runs_that_is_not_noted() {
        let mut stops = Stops::new(None, "a");
        assert!(!stops.is_news() && !stops.together(AT(10)) && stops.is_news());
        assert_eq!(commit(&mut stops), "together 5010 0 a");
        assert!(stops.together(AT(10)) && !stops.is_news());
        assert!(stops.together(AT(3_000)), "covered, and asks for more in time");
        assert!(stops.is_news() && !stops.together(AT(5_010)));
        stops.rest();
        assert_eq!(commit(&mut stops), "clean");
    }

    #[test]
    fn a_position_that_was_set_by_hand_is_told_by_every_later_note() {
        let mut first = Stops::new(None, "a");
        assert!(first.rerun().is_none() && !first.together(AT(10)));
        assert_eq!(commit(&mut first), "together 5010 0 a");
        let mut reset = Stops::new(Some(""), "b");
        let which = reset.rerun().expect("a re-run").to_owned();
        assert!(!reset.together(AT(10)), "told before anything runs");
        let note = commit(&mut reset);
        assert_eq!(note, format!("together 5010 0 b rerun {which}"));
        assert_ne!(Stops::new(Some(""), "b").rerun(), Some(which.as_str()), "each is another");
        let mut next = Stops::new(Some(&note), "c");
        assert_eq!((next.rerun(), next.count()), (Some(which.as_str()), 1));
        next.rest();
        assert_eq!(commit(&mut next), format!("clean rerun {which}"));
    }

    #[test]
    fn one_kill_changes_nothing_and_a_second_over_the_same_records_isolates_them() {
        let mut second = Stops::new(Some("together 5010 0 a"), "b");
        assert_eq!((second.count(), second.alone(AT(7))), (1, None));
        assert!(!second.together(AT(10)));
        assert_eq!(commit(&mut second), "together 5010 1 b");
        assert!(second.together(AT(10)));
        // Behind them all is forgotten.
        assert!(!second.together(AT(5_010)));
        assert_eq!(commit(&mut second), "together 10010 0 b");

        let mut third = Stops::new(Some("together 5010 1 b"), "c");
        assert_eq!((third.alone(AT(7)), third.alone(AT(5_010))), (Some(AT(5_010)), None));
        assert_eq!(third.one(AT(7)), Alone::Note);
        assert_eq!(commit(&mut third), "one 7 1 5010 c");
        assert_eq!(third.one(AT(7)), Alone::Run);
        assert_eq!(third.one(AT(8)), Alone::Note);
    }

    #[test]
    fn a_record_that_ends_the_process_twice_alone_is_poison_and_a_new_session_is_no_end() {
        let mut again = Stops::new(Some("one 7 1 5010 c"), "c");
        assert_eq!((again.one(AT(7)), commit(&mut again)), (Alone::Note, "one 7 1 5010 c".into()));
        let mut fourth = Stops::new(Some("one 7 1 5010 c"), "d");
        assert_eq!((fourth.one(AT(7)), commit(&mut fourth)), (Alone::Note, "one 7 2 5010 d".into()));
        let mut fifth = Stops::new(Some("one 7 2 5010 d"), "e");
        assert_eq!((fifth.one(AT(7)), fifth.one(AT(8))), (Alone::Poison, Alone::Note));
        assert_eq!(Stops::new(Some("together 5010 1 e"), "e").count(), 1, "a session built anew");
    }

    #[test]
    fn a_note_says_nothing_of_records_that_had_never_come() {
        let mut idle = Stops::new(Some("together 5010 1 a"), "b");
        idle.bound(AT(10), AT(10));
        assert!(!idle.is_unclean() && idle.alone(AT(10)).is_none());
        let mut some = Stops::new(Some("together 5010 1 a"), "b");
        some.bound(AT(10), AT(12));
        assert_eq!((some.alone(AT(11)), some.alone(AT(12))), (Some(AT(12)), None));
        assert_eq!((some.one(AT(11)), commit(&mut some)), (Alone::Note, "one 11 1 12 b".into()));
        some.ended(AT(11));
        assert!(some.is_alone() && !some.is_news());
        some.ended(AT(12));
        assert!(some.is_news() && some.is_alone(), "until that is committed");
        assert_eq!(commit(&mut some), "clean");
        assert!(!some.is_alone());
    }
}
