//! Who an event is about: ids as text, cleaned of what cannot be seen, and what is made of them.

use std::borrow::Cow;

use md5::{Digest, Md5};
use uuid::Uuid;

use crate::control::workspace::OrderBy;
use crate::model::id::User;

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

/// The user of an event by the source's rule; none where both ids are empty.
pub fn user(order_by: OrderBy, anonymous: &str, user: &str) -> Option<User> {
    let (first, second) = match order_by {
        OrderBy::AnonymousId => (anonymous, user),
        OrderBy::UserId => (user, anonymous),
        OrderBy::Both if anonymous.is_empty() && user.is_empty() => return None,
        OrderBy::Both => return Some(format!("{anonymous}:{user}").into()),
    };
    let text = if first.is_empty() { second } else { first };
    (!text.is_empty()).then(|| text.into())
}

/// MD5 of `userId:anonymousId` as an UUID with version 4 and the RFC's variant.
pub fn rudder_id(user: &str, anonymous: &str) -> Uuid {
    let mut digest = Md5::new();
    digest.update(user);
    digest.update(":");
    digest.update(anonymous);
    let mut bytes: [u8; 16] = digest.finalize().into();
    bytes[6] = (bytes[6] & 0x0F) | 0x40;
    bytes[8] = (bytes[8] & 0x3F) | 0x80;
    Uuid::from_bytes(bytes)
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

    #[test]
    fn the_sources_rule_decides_who_stays_in_order() {
        let of = |rule, anonymous, known| user(rule, anonymous, known).map(|user| user.to_string());
        assert_eq!(of(OrderBy::AnonymousId, "a", "u").as_deref(), Some("a"));
        assert_eq!(of(OrderBy::AnonymousId, "", "u").as_deref(), Some("u"));
        assert_eq!(of(OrderBy::UserId, "a", "u").as_deref(), Some("u"));
        assert_eq!(of(OrderBy::Both, "a", "u").as_deref(), Some("a:u"));
        assert_eq!(of(OrderBy::Both, "", ""), None);
    }

    /// Computed with another implementation (Python's hashlib and uuid).
    #[test]
    fn rudder_ids_are_the_known_ones() {
        assert_eq!(
            rudder_id("user-1", "anon-1").to_string(),
            include_str!("../../../tests/fixtures/rudder_id.txt").trim()
        );
    }
}
