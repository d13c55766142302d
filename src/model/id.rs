//! Every id is its own type, so that one is never given where another is meant. Cheap to clone.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

macro_rules! text_id {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn new(text: impl Into<Arc<str>>) -> Self {
                Self(text.into())
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self("".into())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    )*};
}

text_id! {
    /// A tenant.
    WorkspaceId;
    /// Where events come from.
    SourceId;
    /// One configured place events go to.
    DestinationId;
    /// What a destination is an instance of (`WEBHOOK`, `S3`, …).
    DestinationType;
    /// The key that SDKs authenticate with: it names a source.
    WriteKey;
    /// The event's own id, given by the SDK or by the gateway.
    MessageId;
    /// Who the event is about: what stays in order (topics/README.md).
    User;
    /// The deterministic id of a delivery (schemas/README.md): the receiver's idempotency key.
    DeliveryId;
    /// A reverse-ETL job run or task run.
    JobRunId;
    /// What tells this process from the others of its stage: stable over restarts.
    InstanceId;
}
