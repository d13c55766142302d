//! Who an event is about: ids as text, cleaned of what cannot be seen, and what is made of them.

use md5::{Digest, Md5};
use uuid::Uuid;

use crate::control::workspace::OrderBy;
use crate::model::id::User;

pub use crate::model::id::clean;

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
