//! Compiled pipelines on disk, where the driver can hand them out.
//!
//! One file for each adapter, driver and version of this crate, in `nearfar` under the user's folder for caches, or in
//! the folder that `NEARFAR_CACHE` names; none if that is empty. A file that cannot be used is ignored, one that cannot
//! be written is not there: a cache is never an error.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::wgpu;

/// So long after a save nothing is saved again.
const PAUSE: Duration = Duration::from_secs(2);

/// The pipelines of a device.
pub(super) struct Cache {
    pipelines: wgpu::PipelineCache,
    path: PathBuf,
    compiled: AtomicUsize,
    /// When the file was last written, and how many had been compiled then.
    saved: Mutex<(Option<Instant>, usize)>,
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3))
}

fn folder() -> Option<PathBuf> {
    match std::env::var_os("NEARFAR_CACHE") {
        Some(folder) => (!folder.is_empty()).then(|| folder.into()),
        None => dirs::cache_dir().map(|folder| folder.join("nearfar")),
    }
}

fn file_name(info: &wgpu::AdapterInfo) -> String {
    let wgpu::AdapterInfo { name, vendor, device, driver, driver_info, backend, .. } = info;
    let driver = hash(format!("{name}\n{driver}\n{driver_info}").as_bytes());
    format!("{backend}-{vendor:x}-{device:x}-{driver:016x}-{}.pipelines", env!("CARGO_PKG_VERSION")).to_lowercase()
}

/// What a file holds behind the hash of it, if that is right.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (expected, data) = bytes.split_first_chunk()?;
    (u64::from_le_bytes(*expected) == hash(data)).then(|| data.to_vec())
}

/// Writes a file under another name and renames it, so that nobody reads half of one.
fn write(path: &Path, data: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
    let written = std::fs::File::create(&unfinished)
        .and_then(|mut file| file.write_all(&hash(data).to_le_bytes()).and_then(|()| file.write_all(data)))
        .and_then(|()| std::fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    written
}

impl Cache {
    /// The cache of a device, if it can have one.
    pub(super) fn open(device: &wgpu::Device) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let path = folder()?.join(file_name(&device.adapter_info()));
        let data = read(&path);
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        // SAFETY: the data is what `get_data` has returned for this adapter and driver, as the file's name and the hash
        // in front of it say.
        let pipelines = unsafe {
            device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
                label: Some("nearfar"),
                data: data.as_deref(),
                fallback: true,
            })
        };
        if pollster::block_on(scope.pop()).is_some() {
            return None;
        }
        Some(Self { pipelines, path, compiled: AtomicUsize::new(0), saved: Mutex::default() })
    }

    pub(super) fn pipelines(&self) -> &wgpu::PipelineCache {
        &self.pipelines
    }

    /// One more was compiled.
    pub(super) fn grew(&self) {
        self.compiled.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes the file if there is something new, but not again and again.
    pub(super) fn save(&self) {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let compiled = self.compiled.load(Ordering::Relaxed);
        if compiled == saved.1 || saved.0.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        if let Some(data) = self.pipelines.get_data() {
            // Without a cache everything works, only later.
            let _ = write(&self.path, &data);
        }
        *saved = (Some(Instant::now()), compiled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/vulkan.pipelines");
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
