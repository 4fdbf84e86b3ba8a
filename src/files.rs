//! Writing files so that nothing is ever lost: what was there stays there until what replaces it is complete.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::{Error, Result};

/// What the names of files begin with that are not finished yet.
const UNFINISHED: &str = ".nearfar-";

/// Writes a file under a temporary name in the same folder, syncs it to disk and renames it to `path`.
///
/// Whatever stood at `path` is replaced in one step or not at all: a full disk, a panic or a power cut half-way leaves
/// the old file as it was.
///
/// # Errors
/// [`Error::File`] if the folder does not exist or cannot be written, if `content` fails, or if the disk is full.
pub fn write_atomically(path: &Path, content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let temporary = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder)
        .map_err(|error| Error::io(path, "create a file next to it", error))?;
    let mut writer = BufWriter::new(temporary);
    content(&mut writer).map_err(|error| Error::io(path, "write it", error))?;
    let temporary = writer.into_inner().map_err(|error| Error::io(path, "write it", error.into_error()))?;
    temporary.as_file().sync_all().map_err(|error| Error::io(path, "write it to disk", error))?;
    #[cfg(unix)]
    {
        // A temporary file is private to its owner; a finished one follows what its user would expect.
        use std::os::unix::fs::PermissionsExt;
        let permissions = std::fs::Permissions::from_mode(0o644);
        temporary
            .as_file()
            .set_permissions(permissions)
            .map_err(|error| Error::io(path, "set its permissions", error))?;
    }
    temporary.persist(path).map_err(|error| Error::io(path, "rename the finished file to it", error.error))?;
    // The rename itself must reach the disk too; a folder that cannot be synced (some file systems) is not an error.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Removes what [`write_atomically`] left in a folder where the process was killed half-way.
///
/// # Errors
/// [`Error::File`] if the folder cannot be read or a file in it cannot be removed.
pub(crate) fn remove_unfinished(folder: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, "read the folder", error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(folder, "read the folder", error))?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            std::fs::remove_file(entry.path()).map_err(|error| Error::io(entry.path(), "remove it", error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_litter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(std::io::Error::other("disk full"))
        });
        assert!(error.unwrap_err().to_string().contains("disk full"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = write_atomically(Path::new("/nonexistent/folder/weights"), |_| Ok(())).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/folder/weights: "), "{error}");
    }
}
