//! `schemas/control.avsc`.

use super::avro::{Reader, Unreadable, Writer};
use super::{CONTROL, KnownSchema, Value};
use crate::model::command::Control;

impl Value for Control {
    fn schema() -> &'static KnownSchema {
        &CONTROL
    }

    fn write(&self, out: &mut Writer) {
        out.text(&self.kind);
        out.text(&self.id);
        out.count(self.version);
        out.bytes(&self.payload);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Unreadable> {
        Ok(Control { kind: input.text()?, id: input.text()?, version: input.count()?, payload: input.bytes()? })
    }
}
