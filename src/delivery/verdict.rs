//! What an answer means for a delivery: one table.

use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::outcome::Reason;

/// `Retry-After` is believed up to here.
pub const RETRY_AFTER_CAP: Duration = Duration::from_secs(3_600);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Delivered {
        code: u16,
    },
    Filtered {
        code: u16,
    },
    /// Not now. `code` is 0 where no answer came.
    Retry {
        code: u16,
        message: String,
        not_before: Option<Duration>,
    },
    /// Never.
    Abort {
        reason: Reason,
        code: u16,
        message: String,
    },
}

impl Verdict {
    /// Of an answer. `message` is what the destination said, for people.
    pub fn of_status(code: u16, message: String, retry_after: Option<&str>, now: Timestamp) -> Self {
        match code {
            200..=299 => Verdict::Delivered { code },
            408 | 429 | 500..=599 => {
                Verdict::Retry { code, message, not_before: retry_after.and_then(|text| parse_retry_after(text, now)) }
            }
            _ => Verdict::Abort { reason: Reason::Rejected, code, message },
        }
    }

    /// Of no answer: no connection, a time-out, a broken body.
    pub fn of_silence(message: String) -> Self {
        Verdict::Retry { code: 0, message, not_before: None }
    }

    /// The status code, 0 where none came.
    pub fn code(&self) -> u16 {
        match self {
            Verdict::Delivered { code }
            | Verdict::Filtered { code }
            | Verdict::Retry { code, .. }
            | Verdict::Abort { code, .. } => *code,
        }
    }
}

/// `Retry-After` in seconds, with or without a fraction, or as a date (RFC 9110 section 10.2.3), at most an hour.
fn parse_retry_after(text: &str, now: Timestamp) -> Option<Duration> {
    let text = text.trim();
    let is_number = text.starts_with(|first: char| first.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let wait = match text.parse::<f64>() {
        Ok(seconds) if is_number => Duration::try_from_secs_f64(seconds).unwrap_or(RETRY_AFTER_CAP),
        _ => Timestamp::parse_http_date(text)?.since(now),
    };
    Some(wait.min(RETRY_AFTER_CAP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_outcome() {
        let of = |code| Verdict::of_status(code, String::new(), None, Timestamp::default());
        for code in [200, 201, 202, 204, 298, 299] {
            assert!(matches!(of(code), Verdict::Delivered { .. }), "{code}");
        }
        for code in [408, 429, 500, 502, 503, 504, 599] {
            assert!(matches!(of(code), Verdict::Retry { .. }), "{code}");
        }
        for code in [100, 101, 300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 410, 413, 422, 499] {
            assert!(matches!(of(code), Verdict::Abort { reason: Reason::Rejected, .. }), "{code}");
        }
    }

    #[test]
    fn retry_after_is_read_in_both_forms_and_capped() {
        let now = Timestamp::from_millis(784_111_777_000);
        let wait = |text| parse_retry_after(text, now).map(|wait| wait.as_secs());
        assert_eq!(wait("120"), Some(120));
        assert_eq!(wait("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        assert_eq!(wait("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0), "a date that is past");
        assert_eq!(wait("Sunday, 06-Nov-94 08:50:07 GMT"), Some(30), "RFC 850");
        assert_eq!(wait("Sun Nov  6 08:50:07 1994"), Some(30), "asctime");
        assert_eq!(wait(" 1.5 "), Some(1));
        for large in ["999999", "99999999999999999999999999", "Fri, 01 Jan 2100 00:00:00 GMT"] {
            assert_eq!(wait(large), Some(3_600), "{large}");
        }
        for wrong in ["soon", "", "-1", "inf", "NaN", "1e3", "1.2.3"] {
            assert_eq!(wait(wrong), None, "{wrong}");
        }
    }
}
