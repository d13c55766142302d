//! Every id is its own type, so that one is never given where another is meant. Cheap to clone.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

macro_rules! text_id {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn new(text: impl Into<Arc<str>>) -> Self {
                Self(text.into())
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self("".into())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    )*};
}

text_id! {
    /// A tenant.
    WorkspaceId;
    /// Where events come from.
    SourceId;
    /// One configured place events go to.
    DestinationId;
    /// What a destination is an instance of (`WEBHOOK`, `S3`, …).
    DestinationType;
    /// The key that SDKs authenticate with: it names a source.
    WriteKey;
    /// The event's own id, given by the SDK or by the gateway.
    MessageId;
    /// Who the event is about: what stays in order (topics/README.md).
    User;
    /// The deterministic id of a delivery (schemas/README.md): the receiver's idempotency key.
    DeliveryId;
    /// A reverse-ETL job run or task run.
    JobRunId;
    /// What tells this process from the others of its stage: stable over restarts.
    InstanceId;
}

/// Without invisible and non-printing characters, trimmed. For keys only; the event keeps what it came with.
pub fn clean(text: &str) -> Cow<'_, str> {
    if text.bytes().all(|byte| (b' '..0x7F).contains(&byte)) {
        return Cow::Borrowed(text.trim());
    }
    let visible: String = text.chars().filter(|character| !is_invisible(*character)).collect();
    Cow::Owned(visible.trim().to_owned())
}

/// Control and format characters, spaces other than the plain one, fillers that render as nothing, private use.
fn is_invisible(character: char) -> bool {
    if character == ' ' {
        return false;
    }
    character.is_control()
        || character.is_whitespace()
        || matches!(u32::from(character),
            0xAD | 0x34F | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x8E2 | 0x115F..=0x1160 | 0x17B4..=0x17B5
            | 0x180B..=0x180F | 0x200B..=0x200F | 0x202A..=0x202E | 0x2060..=0x206F | 0x2800 | 0x3164 | 0xFEFF | 0xFFA0
            | 0xFFF0..=0xFFFB | 0xE000..=0xF8FF | 0x110BD | 0x110CD | 0x1BCA0..=0x1BCA3 | 0x1D173..=0x1D17A
            | 0xE0000..=0xE0FFF | 0xF0000..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_taken_out() {
        let cases = [
            (" anon-1 ", "anon-1"),
            ("a\u{200B}b\u{FEFF}c", "abc"),
            ("\u{A0}x\t\u{AD}", "x"),
            ("two words", "two words"),
            ("ünï→😀", "ünï→😀"),
            ("\u{3164}\u{2800}", ""),
            ("e\u{301}", "e\u{301}"),
        ];
        for (text, expected) in cases {
            assert_eq!(clean(text), expected, "{text:?}");
        }
    }
}
