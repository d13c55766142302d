//! A webhook's body, as each kind of form: an error, or JSON that the transformer service can read.
#![no_main]

use bytes::Bytes;
use laneway::stages::gateway::webhook::form;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let body = Bytes::copy_from_slice(data);
    for kind in ["application/x-www-form-urlencoded", "multipart/form-data; boundary=B", "text/plain"] {
        if let Ok(Some(form)) = form(kind, &body) {
            serde_json::from_str::<Value>(&form).expect("JSON");
        }
    }
});
