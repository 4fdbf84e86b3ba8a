//! Compiled pipelines on disk, where the driver can hand them out.
//!
//! One file for each adapter, driver and version of this crate, in `nearfar` under the user's folder for caches, or in
//! the folder that `NEARFAR_CACHE` names; none if that is empty. A file that cannot be used is ignored, one that cannot
//! be written is not there: a cache is never an error.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::wgpu;

use crate::backend::gpu::cache::{folder, hash, read, write};

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

fn file_name(info: &wgpu::AdapterInfo) -> String {
    let wgpu::AdapterInfo { name, vendor, device, driver, driver_info, backend, .. } = info;
    let driver = hash(format!("{name}\n{driver}\n{driver_info}").as_bytes());
    format!("{backend}-{vendor:x}-{device:x}-{driver:016x}-{}.pipelines", env!("CARGO_PKG_VERSION")).to_lowercase()
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
