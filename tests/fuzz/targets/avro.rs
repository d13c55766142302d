//! Values from a topic: an error, or a value that is written as it was read.
#![no_main]

use bytes::Bytes;
use laneway::model::codec::{self, KnownSchema, Value};
use laneway::model::command::Control;
use laneway::model::delivery::Delivery;
use laneway::model::event::Event;
use laneway::model::failure::Failure;
use laneway::model::progress::Progress;
use laneway::model::seen::Seen;
use libfuzzer_sys::fuzz_target;

fn read<V: Value + PartialEq + std::fmt::Debug>(schema: &str, data: &[u8]) {
    let fingerprint = KnownSchema::named(schema).expect("a schema").fingerprint();
    let value = Bytes::from([&codec::header(fingerprint)[..], data].concat());
    if let Ok(read) = codec::decode::<V>(&value) {
        let written = Bytes::from(codec::encode(&read));
        assert_eq!(codec::decode::<V>(&written).expect("what was written is readable"), read);
    }
    let _ = codec::decode::<V>(&Bytes::copy_from_slice(data));
}

fuzz_target!(|data: &[u8]| {
    read::<Event>("event", data);
    read::<Delivery>("delivery", data);
    read::<Failure>("failure", data);
    read::<Progress>("progress", data);
    read::<Control>("control", data);
    read::<Seen>("seen", data);
});
