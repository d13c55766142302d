//! A session's place in its group: it speaks, it listens, and keeps what follows from both.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Clock;
use crate::log::{LogError, Member, Publisher};
use crate::model::record::{Addressed, Headers, Partition, Topic};
use crate::telemetry::seldom;

use super::config::Client;
use super::members;
use super::members::{Meaning, View, Word};
use super::positions::{Lock, Place};
use super::publisher::PulsarPublisher;
use super::reader::{Feed, From};

/// After an error it is tried again after so long.
const AGAIN: Duration = Duration::from_millis(200);
/// So long after it joined a member listens who else is there, before it takes what nobody has.
const SETTLE: Duration = Duration::from_millis(250);

/// What a session, its committer and what runs beside them have in common.
pub struct Own {
    pub place: Place,
    pub member: Member,
    pub partitions: u32,
    pub publisher: PulsarPublisher,
    pub clock: Clock,
    state: Mutex<State>,
    /// Of what it owns. A commit holds all of them.
    pub locks: tokio::sync::Mutex<BTreeMap<Partition, Lock>>,
    /// Something has changed for the session.
    pub bell: Notify,
    /// Something is to be said at once.
    nudge: Notify,
}

struct State {
    view: View,
    word: Word,
    is_fenced: bool,
    stolen: BTreeSet<Partition>,
    /// When what it said last was stored: others believe that it lives from then on.
    said_at: Instant,
    /// It was not heard for too long, and has not let go of what it had.
    was_silent: bool,
    /// When it heard its own word last: until then it hears the others too.
    heard_at: Instant,
}

impl Own {
    pub fn new(place: Place, member: Member, partitions: u32, publisher: PulsarPublisher) -> Self {
        let clock = Clock::system();
        let word = Word {
            instance: member.instance.to_string(),
            session: uuid::Uuid::new_v4().simple().to_string(),
            since: clock.now().micros(),
            owned: BTreeMap::new(),
            asks: true,
            leaves: false,
        };
        let state = State {
            view: View::default(),
            word,
            is_fenced: false,
            stolen: BTreeSet::new(),
            said_at: clock.instant(),
            was_silent: false,
            heard_at: clock.instant(),
        };
        Self {
            place,
            member,
            partitions,
            publisher,
            clock,
            state: Mutex::new(state),
            locks: tokio::sync::Mutex::default(),
            bell: Notify::new(),
            nudge: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_fenced(&self) -> bool {
        self.state().is_fenced
    }

    /// Whether others may believe that it is gone, or did since [`Own::lives_again`].
    pub fn is_silent(&self) -> bool {
        let mut state = self.state();
        state.was_silent |= self.is_past(state.said_at);
        state.was_silent
    }

    /// It has let go of what it had when it was silent.
    pub fn lives_again(&self) {
        let mut state = self.state();
        state.was_silent = self.is_past(state.said_at);
    }

    /// Whether it knows who else is there: who hears nobody must cut nobody off.
    pub fn hears(&self) -> bool {
        let heard_at = self.state().heard_at;
        !self.is_past(heard_at)
    }

    fn is_past(&self, at: Instant) -> bool {
        self.clock.instant().saturating_duration_since(at) >= self.member.session_timeout
    }

    /// Refuses what only a member may do that others believe to live.
    pub fn check(&self) -> Result<(), LogError> {
        if self.is_fenced() {
            return Err(LogError::fenced(format!("another session of {} has joined", self.member.instance)));
        }
        if self.is_silent() {
            return Err(LogError::transient("the group has not heard of this member for a session time-out"));
        }
        Ok(())
    }

    pub fn share(&self) -> BTreeSet<Partition> {
        let mut state = self.state();
        let now = self.clock.instant();
        state.view.forget(now, self.member.session_timeout);
        let State { view, word, .. } = &*state;
        view.share(word, self.partitions)
    }

    pub fn is_owned_by_another(&self, partition: Partition) -> bool {
        self.state().view.is_owned(partition)
    }

    pub fn take_stolen(&self) -> BTreeSet<Partition> {
        std::mem::take(&mut self.state().stolen)
    }

    /// Says what it owns now.
    pub fn owns(&self, change: impl FnOnce(&mut BTreeMap<Partition, u64>)) {
        change(&mut self.state().word.owned);
        self.nudge.notify_one();
    }

    /// Somebody else has it.
    pub fn lose(&self, partitions: impl IntoIterator<Item = Partition>) {
        let mut state = self.state();
        for partition in partitions {
            state.word.owned.remove(&partition);
            state.stolen.insert(partition);
        }
        drop(state);
        self.nudge.notify_one();
        self.bell.notify_one();
    }

    fn topic(&self) -> Topic {
        members::topic(&self.member.group, &self.member.topic)
    }

    async fn say(&self, word: &Word) -> Result<(), LogError> {
        let began = self.clock.instant();
        let value = serde_json::to_vec(word).map_err(LogError::fatal)?;
        let record = Addressed {
            topic: self.topic(),
            partition: Partition(0),
            key: None,
            value: Some(value.into()),
            headers: Headers::new(),
        };
        self.publisher.publish(vec![record]).await?;
        // Whoever was silent before is not heard again before it knows.
        self.is_silent();
        self.state().said_at = began;
        Ok(())
    }

    /// Says that it goes, so that nobody waits.
    pub async fn leave(&self) {
        let word = Word { leaves: true, owned: BTreeMap::new(), ..self.state().word.clone() };
        if let Err(error) = self.say(&word).await {
            tracing::debug!(%error, "the group was not told that this member leaves");
        }
    }

    /// Waits for nothing: who is deaf while something is committed would take others for gone.
    fn hear(self: &Arc<Self>, word: Word) {
        let now = self.clock.instant();
        let meaning = {
            let mut state = self.state();
            let State { view, word: own, heard_at, .. } = &mut *state;
            if word.session == own.session {
                *heard_at = now;
            }
            view.hear(own, word, now)
        };
        match meaning {
            Meaning::Known => {}
            Meaning::Asked => self.nudge.notify_one(),
            Meaning::Stolen(partitions) => {
                self.lose(partitions.iter().copied());
                self.release(move |locks| locks.retain(|partition, _| !partitions.contains(partition)));
            }
            Meaning::Fenced => {
                self.state().is_fenced = true;
                // Another one waits for them.
                self.release(BTreeMap::clear);
            }
        }
        self.bell.notify_one();
    }

    /// Lets go of locks, behind a commit that is under way.
    pub fn release(self: &Arc<Self>, which: impl FnOnce(&mut BTreeMap<Partition, Lock>) + Send + 'static) {
        let own = Arc::clone(self);
        tokio::spawn(async move { which(&mut *own.locks.lock().await) });
    }
}

/// Speaks and listens until it is dropped.
pub struct Membership {
    _speaks: AbortOnDropHandle<()>,
    _listens: AbortOnDropHandle<()>,
}

impl Membership {
    pub async fn join(own: &Arc<Own>) -> Result<Self, LogError> {
        let topic = own.topic();
        own.place.rest.put(&format!("{}/partitions", own.place.rest.topic(&topic)), &1).await?;
        let feed = listen(&own.place.client, &topic).await?;
        let hello = own.state().word.clone();
        own.say(&hello).await?;
        own.state().word.asks = false;
        let speaks = AbortOnDropHandle::new(tokio::spawn(speak(Arc::clone(own))));
        let listens = AbortOnDropHandle::new(tokio::spawn(hear_all(Arc::clone(own), feed)));
        own.clock.sleep(SETTLE).await;
        Ok(Self { _speaks: speaks, _listens: listens })
    }
}

async fn listen(client: &Client, topic: &Topic) -> Result<Feed, LogError> {
    Feed::open(client, topic, Partition(0), From::Latest).await
}

async fn speak(own: Arc<Own>) {
    let pause = (own.member.session_timeout / 10).clamp(Duration::from_millis(100), Duration::from_secs(3));
    loop {
        let nudged = own.nudge.notified();
        // Whichever comes first.
        let _ = tokio::time::timeout(pause, nudged).await;
        let word = own.state().word.clone();
        if let Err(error) = own.say(&word).await {
            if let Some(left_out) = seldom::due("pulsar member", &own.member.group) {
                tracing::warn!(%error, left_out, group = own.member.group, "the group cannot be told that this member lives");
            }
            own.clock.sleep(AGAIN).await;
        }
    }
}

async fn hear_all(own: Arc<Own>, first: Feed) {
    let mut feed = Some(first);
    loop {
        let Some(listening) = &mut feed else {
            match listen(&own.place.client, &own.topic()).await {
                Ok(again) => {
                    feed = Some(again);
                    // Who came meanwhile has to be asked.
                    own.state().word.asks = true;
                    own.nudge.notify_one();
                }
                Err(error) => {
                    tracing::debug!(%error, group = own.member.group, "the group cannot be heard");
                    own.clock.sleep(AGAIN).await;
                }
            }
            continue;
        };
        // Its own words come at least.
        match tokio::time::timeout(own.member.session_timeout / 2, listening.next()).await {
            Ok(Ok(record)) => {
                let word = record.value.as_ref().and_then(|value| serde_json::from_slice::<Word>(value).ok());
                match word {
                    Some(word) => own.hear(word),
                    None => tracing::debug!(offset = %record.offset, "not a member's word"),
                }
            }
            Ok(Err(_)) | Err(_) => feed = None,
        }
    }
}
