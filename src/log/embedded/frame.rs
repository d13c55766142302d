//! A batch of records as bytes, as stored in one row: a count, then each record with its distance from the batch's first
//! offset. Little-endian; lengths are u32, an absent key or value has the length `u32::MAX`.

use bytes::{Buf, BufMut, Bytes};

use crate::clock::Timestamp;
use crate::model::record::{Addressed, Headers, Offset, Partition, Record};

const ABSENT: u32 = u32::MAX;
/// A record that is less than one part of this many of its batch does not share the batch's memory.
const MAX_SHARED_PARTS: usize = 4;

pub fn encode(records: &[Addressed], at: Timestamp) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + records.iter().map(Addressed::size).sum::<usize>());
    out.put_u32_le(records.len() as u32);
    for (index, record) in records.iter().enumerate() {
        put_record(&mut out, index as u32, at, record.key.as_ref(), record.value.as_ref(), &record.headers);
    }
    out
}

/// The same for records that keep their offsets (compaction).
pub fn encode_sparse(records: &[Record], first: Offset) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + records.iter().map(Record::weight).sum::<usize>());
    out.put_u32_le(records.len() as u32);
    for record in records {
        let distance = (record.offset.raw() - first.raw()) as u32;
        put_record(&mut out, distance, record.timestamp, record.key.as_ref(), record.value.as_ref(), &record.headers);
    }
    out
}

/// Reads a batch; `None` where the bytes are not one. A record that is a small part of its batch has memory of its own: it may be
/// kept for hours, and must not keep the whole batch.
pub fn decode(body: Vec<u8>, partition: Partition, first: Offset) -> Option<Vec<Record>> {
    let mut body = Bytes::from(body);
    let all = body.len();
    let count = body.try_get_u32_le().ok()?;
    let mut records = Vec::with_capacity(count.min(100_000) as usize);
    for _ in 0..count {
        let mut own = body.split_to(record_len(&body)?);
        if own.len() * MAX_SHARED_PARTS < all {
            own = Bytes::copy_from_slice(&own);
        }
        let distance = own.try_get_u32_le().ok()?;
        let timestamp = Timestamp::from_micros(own.try_get_i64_le().ok()?);
        let key = take(&mut own)?;
        let value = take(&mut own)?;
        let mut headers = Headers::new();
        for _ in 0..own.try_get_u32_le().ok()? {
            let name = String::from_utf8(take(&mut own)??.to_vec()).ok()?;
            headers.push(name, take(&mut own)??);
        }
        let offset = Offset::new(first.raw() + u128::from(distance));
        records.push(Record { partition, offset, timestamp, key, value, headers });
    }
    Some(records)
}

/// How many bytes the first record has; `None` where they are not all there.
fn record_len(body: &[u8]) -> Option<usize> {
    let mut rest = body;
    rest.try_get_u32_le().ok()?;
    rest.try_get_i64_le().ok()?;
    skip(&mut rest)?;
    skip(&mut rest)?;
    for _ in 0..rest.try_get_u32_le().ok()? {
        skip(&mut rest)?;
        skip(&mut rest)?;
    }
    Some(body.len() - rest.len())
}

fn skip(rest: &mut &[u8]) -> Option<()> {
    match rest.try_get_u32_le().ok()? {
        ABSENT => Some(()),
        length => rest.split_off(..length as usize).map(drop),
    }
}

fn put_record(
    out: &mut Vec<u8>,
    distance: u32,
    at: Timestamp,
    key: Option<&Bytes>,
    value: Option<&Bytes>,
    headers: &Headers,
) {
    out.put_u32_le(distance);
    out.put_i64_le(at.micros());
    put(out, key.map(Bytes::as_ref));
    put(out, value.map(Bytes::as_ref));
    out.put_u32_le(headers.len() as u32);
    for (name, value) in headers.iter() {
        put(out, Some(name.as_bytes()));
        put(out, Some(value));
    }
}

fn put(out: &mut Vec<u8>, part: Option<&[u8]>) {
    match part {
        None => out.put_u32_le(ABSENT),
        Some(part) => {
            out.put_u32_le(part.len() as u32);
            out.put_slice(part);
        }
    }
}

fn take(body: &mut Bytes) -> Option<Option<Bytes>> {
    match body.try_get_u32_le().ok()? {
        ABSENT => Some(None),
        length if body.len() >= length as usize => Some(Some(body.split_to(length as usize))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::Topic;

    #[test]
    fn a_batch_comes_back_as_it_went() {
        let mut headers = Headers::new();
        headers.push_text("a", "1");
        headers.push_text("a", "2");
        let record = |key, value| Addressed {
            topic: Topic::EVENTS,
            partition: Partition(2),
            key,
            value,
            headers: headers.clone(),
        };
        let sent = [record(None, Some(Bytes::from_static(b"v"))), record(Some(Bytes::from_static(b"")), None)];
        let body = encode(&sent, Timestamp::from_micros(5));
        let read = decode(body.clone(), Partition(2), Offset::new(40)).expect("readable");
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read[1].offset, read[1].key.as_deref(), read[1].value.as_deref()),
            (Offset::new(41), Some(&b""[..]), None)
        );
        assert_eq!(read[0].headers, headers);
        assert_eq!(encode_sparse(&read, Offset::new(40)), body);
        for cut in 0..body.len() {
            assert!(decode(body[..cut].to_vec(), Partition(2), Offset::new(0)).is_none(), "cut at {cut}");
        }
    }

    #[test]
    fn a_record_that_is_kept_does_not_keep_its_batch() {
        let record = |size: usize| Addressed {
            topic: Topic::EVENTS,
            partition: Partition(0),
            key: None,
            value: Some(vec![7; size].into()),
            headers: Headers::new(),
        };
        let body = encode(&[record(1_000), record(100), record(40_000)], Timestamp::default());
        let batch = body.as_ptr() as usize..body.as_ptr() as usize + body.len();
        let read = decode(body, Partition(0), Offset::START).expect("readable");
        let shares =
            |record: &Record| record.value.as_ref().is_some_and(|value| batch.contains(&(value.as_ptr() as usize)));
        assert_eq!(read.iter().map(shares).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(read[1].value.as_deref(), Some(&[7; 100][..]));
    }
}
