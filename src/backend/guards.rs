//! Guard words behind buffers, for those who check that nothing is written beyond one.

use std::sync::atomic::{AtomicUsize, Ordering};

/// How many want buffers guarded.
static WANTED: AtomicUsize = AtomicUsize::new(0);

/// What the bytes behind a guarded buffer hold: as f32 a number so large, 8·10³⁷, that a result shows who has read it.
pub(super) const PATTERN: u8 = 0x7E;

/// While it lives, new buffers of backends that can do so end with guard words.
#[derive(Debug)]
pub(crate) struct Guards(());

impl Guards {
    pub(crate) fn raise() -> Self {
        WANTED.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Guards {
    fn drop(&mut self) {
        WANTED.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(super) fn are_wanted() -> bool {
    WANTED.load(Ordering::SeqCst) > 0
}

/// Marks the bytes behind a buffer.
pub(super) fn set(behind: &mut [u8]) {
    behind.fill(PATTERN);
}

/// Whether nobody has written behind the buffer.
pub(super) fn hold(behind: &[u8]) -> bool {
    behind.iter().all(|&byte| byte == PATTERN)
}
