//! `schemas/seen.avsc`. The events are one after the other: the identity's 16 bytes, then the step from the offset before, as LEB128.

use super::avro::{Reader, Unreadable, Writer};
use super::progress::step;
use super::{KnownSchema, SEEN, Value};
use crate::clock::Timestamp;
use crate::model::record::Offset;
use crate::model::seen::{Identity, Seen};

impl Value for Seen {
    fn schema() -> &'static KnownSchema {
        &SEEN
    }

    fn size(&self) -> usize {
        64 + self.events.len() * 20
    }

    fn write(&self, out: &mut Writer) {
        out.long(self.at.micros());
        let mut list = Writer::with_capacity(self.events.len() * 18);
        let mut last = 0;
        for (identity, offset) in &self.events {
            list.raw(&identity.to_be_bytes());
            list.unsigned(offset.raw().saturating_sub(last));
            last = offset.raw();
        }
        out.bytes(&list.into_bytes());
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Unreadable> {
        let at = Timestamp::from_micros(input.long()?);
        let list = input.bytes()?;
        let mut list = Reader::new(&list, 0);
        let (mut events, mut last) = (Vec::new(), 0_u128);
        while !list.is_empty() {
            let identity = Identity::from_be_bytes(list.array_of()?);
            last = step(&mut list, last)?;
            events.push((identity, Offset::new(last)));
        }
        Ok(Self { at, events })
    }
}
