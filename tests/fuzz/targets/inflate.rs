//! Compressed bodies: an error, or no more than a request may be.
#![no_main]

use laneway::stages::gateway::inflated;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for encoding in ["gzip", "deflate", "br", "zstd"] {
        if let Ok(body) = inflated(encoding, data) {
            assert!(body.len() <= laneway::stages::gateway::request::MAX_BODY);
        }
    }
});
