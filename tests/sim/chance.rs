//! Takes the system's randomness away: the keys of hash maps, what tokio's `watch` draws, identifiers.
//!
//! All of them ask `getrandom` of the C library. This one answers instead, with the same numbers in every process.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static IS_FIXED: AtomicBool = AtomicBool::new(false);
static GIVEN: AtomicU64 = AtomicU64::new(0);

/// From now on this process is told the same numbers in every run.
pub fn fix() {
    IS_FIXED.store(true, Ordering::Relaxed);
}

/// See getrandom(2).
///
/// # Safety
/// `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    // SAFETY: the caller's promise, which is getrandom(2)'s.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer, length) };
    if IS_FIXED.load(Ordering::Relaxed) {
        for byte in bytes {
            // The finish of splitmix64, over a counter.
            let mixed = GIVEN.fetch_add(1, Ordering::Relaxed).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            *byte = ((mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as u8;
        }
    } else if std::fs::File::open("/dev/urandom").and_then(|mut device| device.read_exact(bytes)).is_err() {
        return -1;
    }
    isize::try_from(length).unwrap_or(isize::MAX)
}
