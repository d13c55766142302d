//! Confluent's wire format: a zero byte, the id of the writer's schema in big endian, the value.

use bytes::Bytes;

use crate::model::codec::{self, Fingerprint, HEADER};
use crate::model::record::{Headers, header};

const PREFIX: usize = 5;
const SINGLE_OBJECT: &str = "application/avro";
const CONFLUENT: &str = "application/vnd.confluent.avro";

/// The schema id of a value in the wire format; none where it is something else.
pub fn id_of(value: &[u8]) -> Option<u32> {
    let id = value.strip_prefix(&[0])?.first_chunk()?;
    // Ids are Java's positive integers.
    u32::try_from(i32::from_be_bytes(*id)).ok()
}

/// The same value in single-object encoding.
pub fn to_single_object(value: &[u8], fingerprint: Fingerprint) -> Bytes {
    let mut out = Vec::with_capacity(HEADER + value.len());
    out.extend_from_slice(&codec::header(fingerprint));
    out.extend_from_slice(&value[PREFIX..]);
    out.into()
}

/// A value in single-object encoding, in the wire format.
pub fn to_confluent(value: &[u8], id: u32) -> Bytes {
    let mut out = Vec::with_capacity(PREFIX + value.len());
    out.push(0);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&value[HEADER..]);
    out.into()
}

/// What the headers say of a value follows it.
pub fn say_confluent(headers: &mut Headers) {
    headers.replace(header::CONTENT_TYPE, SINGLE_OBJECT, CONFLUENT);
}

pub fn say_single_object(headers: &mut Headers) {
    headers.replace(header::CONTENT_TYPE, CONFLUENT, SINGLE_OBJECT);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_goes_there_and_back() {
        let single = Bytes::from([&codec::header(*b"12345678")[..], b"datum"].concat());
        let confluent = to_confluent(&single, 0x0102_0304);
        assert_eq!(&confluent[..], b"\0\x01\x02\x03\x04datum");
        assert_eq!(id_of(&confluent), Some(0x0102_0304));
        assert_eq!(to_single_object(&confluent, *b"12345678"), single);
        assert_eq!(codec::fingerprint_of(&single), Some(*b"12345678"));
    }

    #[test]
    fn what_is_no_wire_format_has_no_id() {
        for value in
            [&b""[..], b"\0", b"\0\xff\xff\xff\xffx", b"\0\0\0\0", b"\x01\0\0\0\x01x", &codec::header(*b"12345678")]
        {
            assert_eq!(id_of(value), None, "{value:?}");
        }
    }

    #[test]
    fn the_content_type_follows() {
        let mut headers = Headers::new();
        headers.push_text(header::CONTENT_TYPE, SINGLE_OBJECT);
        headers.push_text("other", SINGLE_OBJECT);
        let before = headers.clone();
        say_confluent(&mut headers);
        let values: Vec<_> = headers.iter().map(|(_, value)| value.as_ref()).collect();
        assert_eq!(values, [CONFLUENT.as_bytes(), SINGLE_OBJECT.as_bytes()]);
        say_single_object(&mut headers);
        assert_eq!(headers, before);
    }
}
