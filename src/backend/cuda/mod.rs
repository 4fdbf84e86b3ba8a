//! NVIDIA GPUs, driven by handwritten CUDA kernels.
//!
//! Kernels stand under `kernels/`, one file an operation, named as the file in `backend::gpu` that launches it and as
//! its twins in WGSL and in [`cpu`](super::cpu). Building needs no CUDA: the driver and NVRTC, which compiles the kernels
//! for the GPU that is there, are looked for when a device is opened, and what was compiled is kept on disk.
//!
//! Everything runs on one stream, in the order in which it was asked for; nothing is copied to the host before it is
//! asked for. Sums are always added in the same order, and nothing is added atomically, so that results are the same
//! bits on one device.
//!
//! [`Cuda`] computes on a caller's own stream and memory, too; the crate `cudarc` is [`nearfar::cudarc`](crate::cudarc).

mod buffer;
mod cache;
mod caller;
mod driver;
mod engine;
mod graph;
mod hopper;
mod kernel;
mod matmul;
mod nvrtc;
mod profile;
mod settings;
mod similarity_sweep;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use super::{Backend, Buffer, Device, Tensor, Timing, gpu};
use crate::error::DType;
use crate::{Error, Result};
use driver::{Driver, Gpu};
use engine::Engine;
pub use graph::Graph;
use profile::Profile;
use settings::{KIND, Request};
pub use settings::{Products, Settings};

/// A device of CUDA.
pub struct Cuda {
    engine: Engine,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda({}, {})", self.engine.name, self.engine.gpu.properties().name)
    }
}

impl Cuda {
    /// What runs its launches.
    #[cfg(feature = "train")]
    pub(super) fn engine(&self) -> &dyn gpu::Engine {
        &self.engine
    }

    fn open_request(request: Request) -> Result<Self> {
        let name = request.to_string();
        if let Ok(count) = devices() {
            if count == 0 {
                return Err(Error::Device { device: name, reason: "the NVIDIA driver finds no GPU here".into() });
            }
            if request.index >= count {
                let available = (0..count).map(|index| format!("cuda:{index}"));
                let available = std::iter::once("cpu".to_owned()).chain(available).collect();
                return Err(Error::NoDevice { requested: name, available });
            }
        }
        let gpu = Gpu::open(&name, request.index)?;
        Ok(Self { engine: Engine::new(name, request.settings, gpu)? })
    }
}

impl Backend for Cuda {
    fn name(&self) -> String {
        self.engine.name.clone()
    }

    fn description(&self) -> String {
        let (driver, (major, minor)) = (self.engine.gpu.driver().version(), self.engine.gpu.properties().capability);
        let name = &self.engine.gpu.properties().name;
        format!("{name}, compute capability {major}.{minor}, driver for CUDA {}.{}", driver.0, driver.1)
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn properties(&self) -> Vec<(&'static str, String)> {
        let of = self.engine.gpu.properties();
        let (major, minor) = self.engine.kernels.nvrtc().version();
        let mebibytes = |bytes: usize| format!("{} MiB", bytes >> 20);
        let free = self.engine.gpu.free_memory().map_or_else(|_| "unknown".to_owned(), |(free, _)| mebibytes(free));
        vec![
            ("multiprocessors", of.multiprocessors.to_string()),
            ("memory", mebibytes(of.memory)),
            ("free memory", free),
            ("shared memory of a block", format!("{} KiB", of.shared >> 10)),
            ("L2 cache", mebibytes(of.l2_cache as usize)),
            ("compiler", format!("NVRTC {major}.{minor} for {}", self.engine.kernels.architecture())),
            ("products", matmul::description(&self.engine)),
        ]
    }

    fn product_rounding(&self) -> f64 {
        matmul::rounding(&self.engine)
    }

    fn timings(&self) -> Vec<Timing> {
        self.engine.profile.as_ref().map(Profile::timings).unwrap_or_default()
    }

    fn guard_violations(&self) -> usize {
        self.engine.guard_violations()
    }

    fn held_bytes(&self) -> Option<usize> {
        Some(self.engine.pool.taken())
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(self.engine.allocate(elements, dtype)?))
    }

    fn upload(&self, bytes: &[u8], tensor: &mut Tensor) -> Result<()> {
        self.engine.upload(bytes, tensor.buffer())
    }

    fn download(&self, tensor: &Tensor, bytes: &mut [u8]) -> Result<()> {
        self.engine.download(tensor.buffer(), bytes)
    }

    gpu::implement_operations! { cuda::similarity_sweep }
}

/// Devices that were opened, so that one name is one device.
static OPENED: LazyLock<Mutex<HashMap<Request, Device>>> = LazyLock::new(Mutex::default);

fn opened(request: Request) -> Result<Device> {
    let mut devices = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&request) {
        return Ok(device.clone());
    }
    let device = Device::new(Cuda::open_request(request)?);
    devices.insert(request, device.clone());
    Ok(device)
}

/// The device of a name, if the name is one of this backend's.
pub(super) fn by_name(name: &str) -> Option<Result<Device>> {
    Request::named(KIND, name).map(|request| request.and_then(opened))
}

/// How many devices there are; an error if there is no driver for them.
fn devices() -> std::result::Result<usize, driver::Unavailable> {
    Driver::get().map(Driver::devices)
}

/// All devices that can be opened.
pub(super) fn available() -> Vec<Device> {
    let requests =
        (0..devices().unwrap_or(0)).map(|index| Request { kind: KIND, index, settings: Settings::default() });
    requests.filter_map(|request| opened(request).ok()).collect()
}

/// The first device, if there is one. An error is one of a GPU that cannot be used; a machine without a driver has none.
pub fn hardware() -> Option<Result<Device>> {
    match devices() {
        Ok(0) | Err(driver::Unavailable::Driver) => None,
        Ok(_) => Some(opened(Request { kind: KIND, index: 0, settings: Settings::default() })),
        Err(error) => Some(Err(Error::Device { device: "cuda:0".into(), reason: error.to_string() })),
    }
}
