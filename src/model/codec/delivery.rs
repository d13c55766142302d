//! `schemas/delivery.avsc`.

use super::avro::{Reader, Unreadable, Writer};
use super::{DELIVERY, KnownSchema, Value};
use crate::clock::Timestamp;
use crate::model::delivery::{BodyFormat, Delivery, HttpRequest, Payload, TransformAt};

impl Value for Delivery {
    fn schema() -> &'static KnownSchema {
        &DELIVERY
    }

    fn size(&self) -> usize {
        let payload = match &self.payload {
            Payload::Request(request) => 256 + request.url.len() + request.body.len(),
            Payload::Event(json) => json.len(),
        };
        512 + payload
    }

    fn write(&self, out: &mut Writer) {
        out.text(self.delivery_id.as_str());
        out.text(self.workspace.as_str());
        out.text(self.source.as_str());
        out.text(self.destination.as_str());
        out.text(self.destination_type.as_str());
        out.option(self.user.as_ref(), |out, user| out.text(user.as_str()));
        out.text(self.message_id.as_str());
        out.text(&self.event_type);
        out.option(self.event_name.as_ref(), |out, name| out.text(name));
        out.long(self.received_at.micros());
        out.option(self.job_run.as_ref(), |out, id| out.text(id.as_str()));
        out.option(self.task_run.as_ref(), |out, id| out.text(id.as_str()));
        out.option(self.record_id.as_ref(), |out, id| out.bytes(id));
        out.long(TransformAt::ALL.iter().position(|at| *at == self.transform_at).unwrap_or_default() as i64);
        match &self.payload {
            Payload::Request(request) => {
                out.long(0);
                write_request(request, out);
            }
            Payload::Event(json) => {
                out.long(1);
                out.bytes(json);
            }
        }
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Unreadable> {
        Ok(Delivery {
            delivery_id: input.text()?,
            workspace: input.text()?,
            source: input.text()?,
            destination: input.text()?,
            destination_type: input.text()?,
            user: input.option(Reader::text)?,
            message_id: input.text()?,
            event_type: input.text()?,
            event_name: input.option(Reader::text)?,
            received_at: Timestamp::from_micros(input.long()?),
            job_run: input.option(Reader::text)?,
            task_run: input.option(Reader::text)?,
            record_id: input.option(Reader::bytes)?,
            transform_at: input.symbol(&TransformAt::ALL)?,
            payload: match input.long()? {
                0 => Payload::Request(read_request(input)?),
                1 => Payload::Event(input.bytes()?),
                other => return input.fail(format!("no branch {other} in request")),
            },
        })
    }
}

fn write_request(request: &HttpRequest, out: &mut Writer) {
    let pair = |out: &mut Writer, (name, value): &(String, String)| {
        out.text(name);
        out.text(value);
    };
    out.text(&request.method);
    out.text(&request.url);
    out.array(&request.headers, pair);
    out.array(&request.params, pair);
    out.long(BodyFormat::ALL.iter().position(|format| *format == request.body_format).unwrap_or_default() as i64);
    out.bytes(&request.body);
}

fn read_request(input: &mut Reader<'_>) -> Result<HttpRequest, Unreadable> {
    fn pair(input: &mut Reader<'_>) -> Result<(String, String), Unreadable> {
        Ok((input.text()?, input.text()?))
    }
    Ok(HttpRequest {
        method: input.text()?,
        url: input.text()?,
        headers: input.array(pair)?,
        params: input.array(pair)?,
        body_format: input.symbol(&BodyFormat::ALL)?,
        body: input.bytes()?,
    })
}
