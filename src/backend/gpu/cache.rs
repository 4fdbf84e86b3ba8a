//! Files of what was compiled. One that cannot be used is ignored, one that cannot be written is not there: a cache is
//! never an error.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3))
}

/// The user's folder for what is compiled, or the one that `NEARFAR_CACHE` names; none if that is empty.
pub(crate) fn folder() -> Option<PathBuf> {
    match std::env::var_os("NEARFAR_CACHE") {
        Some(folder) => (!folder.is_empty()).then(|| folder.into()),
        None => dirs::cache_dir().map(|folder| folder.join("nearfar")),
    }
}

/// What a file holds behind its length and the hash of it, if both are right.
pub(crate) fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (length, rest) = bytes.split_first_chunk()?;
    let (expected, data) = rest.split_first_chunk()?;
    let whole = u64::from_le_bytes(*length) == data.len() as u64 && u64::from_le_bytes(*expected) == hash(data);
    (whole && !data.is_empty()).then(|| data.to_vec())
}

/// Writes a file under a name of its own and renames it, so that nobody reads half of one.
pub(crate) fn write(path: &Path, data: &[u8]) -> std::io::Result<()> {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let unfinished = path.with_extension(format!("{}-{number}.unfinished", std::process::id()));
    let head = [(data.len() as u64).to_le_bytes(), hash(data).to_le_bytes()].concat();
    let written = std::fs::File::create(&unfinished)
        .and_then(|mut file| file.write_all(&head).and_then(|()| file.write_all(data)))
        .and_then(|()| std::fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/kernels");
        assert_eq!(read(&path), None);
        write(&path, b"compiled").unwrap();
        write(&path, b"compiled again").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"compiled again"[..]));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.pop();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), None);
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(read(&path), None);
    }
}
