//! Compiled kernels on disk.
//!
//! One file for each, named by a hash of everything that it was made from, in `cubins` of `nearfar` under the user's
//! folder for caches, or of the folder that `NEARFAR_CACHE` names; none if that is empty. A file that cannot be used is
//! ignored and written anew, one that cannot be written is not there: a cache is never an error.

#[cfg(test)]
use std::path::Path;
use std::path::PathBuf;

use crate::backend::gpu::cache::{folder, read, write};

/// What a kernel is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(u128);

impl Key {
    /// The key of some texts in their order.
    pub(super) fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        // FNV-1a, with the length of each in front of it.
        let byte =
            |hash: u128, byte: &u8| (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013B);
        let part = |hash, part: &str| {
            let length = (part.len() as u64).to_le_bytes();
            part.as_bytes().iter().fold(length.iter().fold(hash, byte), byte)
        };
        Self(parts.into_iter().fold(0x6C62_272E_07BB_0142_62B8_2175_6295_C58D, part))
    }
}

/// The folder of compiled kernels.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The user's, if there is to be one.
    pub(super) fn open() -> Option<Self> {
        folder().map(|folder| Self { folder: folder.join("cubins") })
    }

    /// One in a folder.
    #[cfg(test)]
    pub(super) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn path(&self, key: Key) -> PathBuf {
        self.folder.join(format!("{:032x}.cubin", key.0))
    }

    /// What was kept under a key.
    pub(super) fn get(&self, key: Key) -> Option<Vec<u8>> {
        read(&self.path(key))
    }

    /// Keeps something, if that is possible.
    pub(super) fn put(&self, key: Key, cubin: &[u8]) {
        // Without a cache everything works, only later.
        let _ = write(&self.path(key), cubin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_found_and_what_is_damaged_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: folder.path().join("a/cubins") };
        let (key, other) = (Key::of(["sm_80", "text"]), Key::of(["sm_80t", "ext"]));
        assert_ne!(key, other);
        assert_eq!(cache.get(key), None);
        cache.put(key, b"compiled");
        cache.put(key, b"compiled again");
        assert_eq!((cache.get(key).as_deref(), cache.get(other)), (Some(&b"compiled again"[..]), None));
        assert_eq!(std::fs::read_dir(&cache.folder).unwrap().count(), 1);
        let whole = std::fs::read(cache.path(key)).unwrap();
        for length in 0..whole.len() {
            std::fs::write(cache.path(key), &whole[..length]).unwrap();
            assert_eq!(cache.get(key), None, "{length}");
        }
        for place in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            std::fs::write(cache.path(key), &damaged).unwrap();
            assert_eq!(cache.get(key), None, "{place}");
        }
        cache.put(key, b"compiled");
        assert_eq!(cache.get(key).as_deref(), Some(&b"compiled"[..]));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = Cache { folder: file.path().join("cubins") };
        let key = Key::of(["text"]);
        cache.put(key, b"compiled");
        assert_eq!(cache.get(key), None);
    }

    #[test]
    fn writers_do_not_disturb_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: folder.path().to_owned() };
        let key = Key::of(["text"]);
        cache.put(key, &[0; 5000]);
        std::thread::scope(|scope| {
            for byte in 0..4u8 {
                let cache = &cache;
                scope.spawn(move || {
                    for _ in 0..50 {
                        cache.put(key, &[byte; 5000]);
                        let found = cache.get(key).unwrap();
                        assert!(found.len() == 5000 && found.iter().all(|other| *other == found[0]));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
