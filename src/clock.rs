//! Time, and the only door to it: every other module asks a [`Clock`], so that a test can stop or move it.
//!
//! The wall clock may be set, back or forward, at any moment. [`Clock::now`] is for what is stored, shown or compared with other
//! machines' times; what waits or measures inside the process takes [`Clock::steady`], which never jumps.
//!
//! A [`Timestamp`] is a point on the wall in microseconds since 1970 UTC, as Avro's `timestamp-micros`.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// A wall-clock time in microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Timestamp(i64);

impl Timestamp {
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    pub const fn from_millis(millis: i64) -> Self {
        Self(millis.saturating_mul(1_000))
    }

    pub const fn micros(self) -> i64 {
        self.0
    }

    pub const fn millis(self) -> i64 {
        self.0.div_euclid(1_000)
    }

    /// How long after `earlier` this is; zero where it is not after it.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    pub fn plus(self, by: Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX)))
    }

    pub fn minus(self, by: Duration) -> Timestamp {
        Timestamp(self.0.saturating_sub(i64::try_from(by.as_micros()).unwrap_or(i64::MAX)))
    }

    /// Moved by so many microseconds.
    pub fn moved(self, micros: i64) -> Timestamp {
        Timestamp(self.0.saturating_add(micros))
    }

    /// RFC 3339 in UTC with exactly three decimals (`2026-01-01T00:00:02.000Z`), as the SDKs' users expect.
    pub fn rfc3339_millis(self) -> String {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(at) => format!("{at:.3}"),
            Err(_) => String::from("1970-01-01T00:00:00.000Z"),
        }
    }

    /// Reads the date formats that SDKs and servers send: RFC 3339 with any fraction and offset, the same with a space,
    /// without an offset (taken as UTC), or a date alone. `None` for anything else.
    pub fn parse(text: &str) -> Option<Timestamp> {
        let text = text.trim();
        if let Ok(at) = text.parse::<jiff::Timestamp>() {
            return Some(Timestamp(at.as_microsecond()));
        }
        let civil = text.parse::<jiff::civil::DateTime>().ok()?;
        let at = civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
        Some(Timestamp(at.timestamp().as_microsecond()))
    }

    /// Reads an HTTP date in each of its three forms (`Sun, 06 Nov 1994 08:49:37 GMT`, RFC 9110 section 5.6.7), or one of a mail (RFC 2822),
    /// which some servers send instead.
    pub fn parse_http_date(text: &str) -> Option<Timestamp> {
        if let Ok(at) = httpdate::parse_http_date(text.trim()) {
            let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
            return Some(Timestamp(i64::try_from(since.as_micros()).unwrap_or(i64::MAX)));
        }
        let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text.trim()).ok()?;
        Some(Timestamp(at.as_microsecond()))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.rfc3339_millis())
    }
}

/// Where a part of the engine gets the time from.
///
/// Timers run on tokio's clock in both forms, so a test that pauses tokio's time stops or moves them too.
#[derive(Clone, Debug)]
pub struct Clock(Kind);

#[derive(Clone, Debug)]
enum Kind {
    System,
    /// Wall time derived from tokio's clock: whole runs on paused time repeat exactly.
    Derived {
        wall: Timestamp,
        at: Instant,
        /// By how many microseconds the wall clock has been set.
        set: Arc<AtomicI64>,
    },
}

/// When the system's clock was first asked: the wall's time and [`Clock::uptime`] then.
static BEGAN: OnceLock<(Timestamp, Duration)> = OnceLock::new();

impl Clock {
    pub fn system() -> Self {
        Self(Kind::System)
    }

    /// A clock that reads `wall` now and moves with tokio's time.
    #[allow(clippy::disallowed_methods, reason = "see now")]
    pub fn derived(wall: Timestamp) -> Self {
        Self(Kind::Derived { wall, at: Instant::now(), set: Arc::default() })
    }

    /// Sets the wall clock of this derived clock and its clones by so many microseconds; the system's stays as it is.
    pub fn set_wall(&self, by: i64) {
        if let Kind::Derived { set, .. } = &self.0 {
            set.fetch_add(by, Ordering::Relaxed);
        }
    }

    /// What the wall clock would read if nobody had set it since the process began. It never goes back, never jumps, and goes
    /// on while the machine is suspended.
    pub fn steady(&self) -> Timestamp {
        match &self.0 {
            Kind::System => {
                let uptime = self.uptime();
                let (wall, began) = BEGAN.get_or_init(|| (self.now(), uptime));
                wall.plus(uptime.saturating_sub(*began))
            }
            Kind::Derived { wall, at, .. } => wall.plus(at.elapsed()),
        }
    }

    #[allow(clippy::disallowed_methods, reason = "this is the one place that reads the system's clock")]
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Kind::System => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Timestamp(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
            }
            Kind::Derived { set, .. } => self.steady().moved(set.load(Ordering::Relaxed)),
        }
    }

    /// A monotonic reading, for measuring how long something took.
    #[allow(clippy::disallowed_methods, reason = "see now")]
    pub fn instant(&self) -> Instant {
        Instant::now()
    }

    /// Time since some fixed point, which goes on while the machine or the process is suspended.
    pub fn uptime(&self) -> Duration {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Kind::System => {
                let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
                Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
            }
            #[cfg(not(target_os = "linux"))]
            Kind::System => Duration::from_micros(self.now().micros().try_into().unwrap_or(0)),
            // Not zero: that is before everything.
            Kind::Derived { at, .. } => at.elapsed() + Duration::from_secs(1),
        }
    }

    #[allow(clippy::disallowed_methods, reason = "see now")]
    pub async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    #[allow(clippy::disallowed_methods, reason = "see now")]
    pub async fn sleep_until(&self, at: Instant) {
        tokio::time::sleep_until(at).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formats_that_sdks_send_are_read() {
        let cases = [
            ("2026-11-23T16:50:34.866Z", Some(1_795_452_634_866_000)),
            ("2026-11-23T16:37:35.615986+00:00", Some(1_795_451_855_615_986)),
            ("2026-11-23T16:43:19.484257564Z", Some(1_795_452_199_484_257)),
            ("2026-11-23T18:43:19+02:00", Some(1_795_452_199_000_000)),
            ("2026-01-01T00:00:00", Some(1_767_225_600_000_000)),
            ("2026-01-01 00:00:00", Some(1_767_225_600_000_000)),
            ("2026-01-01", Some(1_767_225_600_000_000)),
            ("yesterday", None),
            ("", None),
        ];
        for (text, micros) in cases {
            assert_eq!(Timestamp::parse(text).map(Timestamp::micros), micros, "{text}");
        }
    }

    #[test]
    fn millis_are_printed_with_three_decimals() {
        assert_eq!(Timestamp::from_millis(1_767_225_602_000).to_string(), "2026-01-01T00:00:02.000Z");
        assert_eq!(Timestamp::from_micros(1_767_225_602_999_999).to_string(), "2026-01-01T00:00:02.999Z");
    }

    #[test]
    fn http_dates_are_read() {
        let at = Timestamp::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").map(Timestamp::millis);
        assert_eq!(at, Some(784_111_777_000));
    }
}
