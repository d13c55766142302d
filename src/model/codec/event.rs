//! `schemas/event.avsc`.

use super::avro::{Reader, Unreadable, Writer};
use super::{EVENT, KnownSchema, Value};
use crate::clock::Timestamp;
use crate::model::event::{Channel, Event};

impl Value for Event {
    fn schema() -> &'static KnownSchema {
        &EVENT
    }

    fn size(&self) -> usize {
        512 + self.payload.len()
    }

    fn write(&self, out: &mut Writer) {
        out.text(self.workspace.as_str());
        out.text(self.source.as_str());
        out.text(self.write_key.as_str());
        out.option(self.user.as_ref(), |out, user| out.text(user.as_str()));
        out.text(self.message_id.as_str());
        out.text(&self.event_type);
        out.long(self.received_at.micros());
        out.text(&self.request_ip);
        out.option(self.job_run.as_ref(), |out, id| out.text(id.as_str()));
        out.option(self.task_run.as_ref(), |out, id| out.text(id.as_str()));
        out.long(Channel::ALL.iter().position(|channel| *channel == self.channel).unwrap_or_default() as i64);
        out.bytes(&self.payload);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Unreadable> {
        Ok(Event {
            workspace: input.text()?,
            source: input.text()?,
            write_key: input.text()?,
            user: input.option(Reader::text)?,
            message_id: input.text()?,
            event_type: input.text()?,
            received_at: Timestamp::from_micros(input.long()?),
            request_ip: input.text()?,
            job_run: input.option(Reader::text)?,
            task_run: input.option(Reader::text)?,
            channel: input.symbol(&Channel::ALL)?,
            payload: input.bytes()?,
        })
    }
}
