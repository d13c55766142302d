//! `schemas/failure.avsc`.

use super::avro::{Reader, Unreadable, Writer};
use super::{FAILURE, KnownSchema, Value};
use crate::clock::Timestamp;
use crate::model::failure::{Failure, Try};
use crate::model::outcome::Reason;
use crate::model::record::{Offset, Partition, Topic};

impl Value for Failure {
    fn schema() -> &'static KnownSchema {
        &FAILURE
    }

    fn size(&self) -> usize {
        1_024 + self.value.as_ref().map_or(0, |value| value.len())
    }

    fn write(&self, out: &mut Writer) {
        let write_try = |out: &mut Writer, it: &Try| {
            out.long(it.at.micros());
            out.long(i64::from(it.code));
            out.text(&it.message);
        };
        out.text(&self.stage);
        out.text(self.reason.as_str());
        out.long(i64::from(self.attempts));
        out.option(self.first.as_ref(), write_try);
        out.option(self.last.as_ref(), write_try);
        out.text(self.topic.as_str());
        out.long(i64::from(self.partition.0));
        out.text(&self.offset.to_string());
        out.long(self.timestamp.micros());
        out.option(self.key.as_ref(), |out, key| out.bytes(key));
        out.option(self.value.as_ref(), |out, value| out.bytes(value));
        out.array(&self.headers, |out, (name, value)| {
            out.text(name);
            out.bytes(value);
        });
        out.option(self.destination.as_ref(), |out, id| out.text(id.as_str()));
        out.option(self.source.as_ref(), |out, id| out.text(id.as_str()));
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Unreadable> {
        fn read_try(input: &mut Reader<'_>) -> Result<Try, Unreadable> {
            Ok(Try { at: Timestamp::from_micros(input.long()?), code: input.count()?, message: input.text()? })
        }
        Ok(Failure {
            stage: input.text()?,
            reason: {
                let text = input.str()?;
                match Reason::ALL.iter().find(|reason| reason.as_str() == text) {
                    Some(reason) => *reason,
                    None => return input.fail(format!("unknown reason {text:?}")),
                }
            },
            attempts: input.count()?,
            first: input.option(read_try)?,
            last: input.option(read_try)?,
            topic: Topic::new(input.str()?),
            partition: Partition(input.count()?),
            offset: {
                let text = input.str()?;
                match Offset::parse(text) {
                    Some(offset) => offset,
                    None => return input.fail(format!("not an offset: {text:?}")),
                }
            },
            timestamp: Timestamp::from_micros(input.long()?),
            key: input.option(Reader::bytes)?,
            value: input.option(Reader::bytes)?,
            headers: input.array(|input| Ok((input.text()?, input.bytes()?)))?,
            destination: input.option(Reader::text)?,
            source: input.option(Reader::text)?,
        })
    }
}
