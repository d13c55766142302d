//! Writing to the embedded log without reading.

use crate::log::{LogError, Publisher};
use crate::model::record::Addressed;

use super::Embedded;

#[derive(Clone)]
pub struct EmbeddedPublisher(Embedded);

impl EmbeddedPublisher {
    pub(super) fn new(log: Embedded) -> Self {
        Self(log)
    }
}

impl Publisher for EmbeddedPublisher {
    async fn publish(&self, records: Vec<Addressed>) -> Result<(), LogError> {
        self.0.0.writer.write(records, Vec::new(), None, None).await
    }
}
