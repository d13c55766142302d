//! Text for a terminal. What a command or a process prints may have been written by a destination, a client or an operator of another system,
//! so no character of it reaches the terminal that moves the cursor, changes colours or the title, or reorders what is read.

use std::borrow::Cow;
use std::fmt::Write;

/// The text with such characters written as escapes, as JSON writes them (`\n`, `\u001b`), so that JSON stays JSON.
pub fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if acts(character) => {
                // All of them are below U+10000, and a String takes every write.
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            _ => out.push(character),
        }
    }
    Cow::Owned(out)
}

/// Controls (C0, DEL, C1), line and paragraph separators, and what changes the direction of text.
fn acts(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_acts_on_the_terminal() {
        assert_eq!(plain("Zoë, 北京 🎉 a\\b"), "Zoë, 北京 🎉 a\\b");
        assert_eq!(plain("a\nb\r\tc"), "a\\nb\\r\\tc");
        assert_eq!(
            plain("\u{1b}[31m\u{7}\u{7f}\u{9b}2J\u{202e}x\u{2028}"),
            "\\u001b[31m\\u0007\\u007f\\u009b2J\\u202ex\\u2028"
        );
        let json = serde_json::json!({"a": "\u{9b}\u{202e}\n\u{1b}"}).to_string();
        let read: serde_json::Value = serde_json::from_str(&plain(&json)).expect("JSON");
        assert_eq!(read["a"], "\u{9b}\u{202e}\n\u{1b}");
    }
}
