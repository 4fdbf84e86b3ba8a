//! Any device that wgpu finds, driven by handwritten WGSL: Vulkan, Metal, Direct3D 12, or a software driver.
//!
//! Shaders stand under `shaders/`, one file an operation, named as the file in `backend::gpu` that launches it and as
//! its twin in [`cpu`](super::cpu). Operations are recorded and handed to the device together, see [`Device::submit`]; nothing is
//! copied to the host before it is asked for. Sums are always added in the same order, and nothing is added
//! atomically, so that results are the same bits on one device.
//!
//! [`Wgpu`] computes on a caller's own device, buffers and encoder, too; the crate `wgpu` is
//! [`nearfar::wgpu`](crate::wgpu).

mod adapter;
#[cfg(all(test, feature = "train"))]
mod browser;
mod buffer;
mod cache;
mod caller;
mod engine;
mod matmul;
mod pipeline;
mod profile;
mod shader;
mod similarity_sweep;
#[cfg(test)]
mod small_bindings;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use ::wgpu;

use super::{Backend, Buffer, Device, Tensor, Timing, gpu};
use crate::Result;
use crate::error::DType;
pub use adapter::Settings;
use adapter::{KIND, Request};
use engine::{Engine, Matrices};
use profile::Profile;

/// A device of wgpu.
pub struct Wgpu {
    engine: Engine,
    info: wgpu::AdapterInfo,
}

impl fmt::Debug for Wgpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wgpu({}, {})", self.engine.name, self.info.name)
    }
}

impl Wgpu {
    /// What runs its launches.
    #[cfg(feature = "train")]
    pub(super) fn engine(&self) -> &dyn gpu::Engine {
        &self.engine
    }

    fn open_request(request: Request) -> Result<Self> {
        let (info, device, queue) = adapter::open(request)?;
        let engine = Engine::new(request.to_string(), request.settings, device, queue)?;
        Ok(Self { engine, info })
    }
}

impl Backend for Wgpu {
    fn name(&self) -> String {
        self.engine.name.clone()
    }

    fn description(&self) -> String {
        let wgpu::AdapterInfo { name, driver, driver_info, backend, .. } = &self.info;
        format!("{name}, {backend:?}, {driver} {driver_info}")
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn submit(&self) -> Result<()> {
        self.engine.submit()
    }

    fn properties(&self) -> Vec<(&'static str, String)> {
        let mut properties = adapter::properties(&self.info, &self.engine.device, self.engine.settings);
        let products = match self.engine.matrices {
            Matrices::None => "in f32",
            Matrices::Cooperative => "of large matrices with cooperative matrices of two f16 a value, else in f32",
            Matrices::Emulated => "of two f16 a value, as with cooperative matrices",
        };
        let sums = match self.engine.pipelines.subgroup() {
            0 => "through workgroup memory".to_owned(),
            invocations => format!("by subgroups of {invocations}"),
        };
        properties.extend([("products", products.to_owned()), ("sums", sums)]);
        properties
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
        let buffer = buffer::raw(tensor.buffer()).ok_or_else(|| self.engine.broken("a tensor of another backend"))?;
        self.engine.upload(bytes, buffer, 0)
    }

    fn download(&self, tensor: &Tensor, bytes: &mut [u8]) -> Result<()> {
        let buffer = buffer::raw(tensor.buffer()).ok_or_else(|| self.engine.broken("a tensor of another backend"))?;
        self.engine.download(buffer, bytes)
    }

    gpu::implement_operations! { wgpu::similarity_sweep }
}

/// Devices that were opened, so that one name is one device.
static OPENED: LazyLock<Mutex<HashMap<Request, Device>>> = LazyLock::new(Mutex::default);

fn opened(request: Request) -> Result<Device> {
    let mut devices = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&request) {
        return Ok(device.clone());
    }
    let device = Device::new(Wgpu::open_request(request)?);
    devices.insert(request, device.clone());
    Ok(device)
}

/// The device of a name, if the name is one of this backend's.
pub(super) fn by_name(name: &str) -> Option<Result<Device>> {
    Request::named(KIND, name).map(|request| request.and_then(opened))
}

/// All devices that can be opened.
pub(super) fn available() -> Vec<Device> {
    let requests =
        (0..adapter::adapters().len()).map(|index| Request { kind: KIND, index, settings: Settings::default() });
    requests.filter_map(|request| opened(request).ok()).collect()
}

/// The first device that is hardware of its own, if there is one.
pub fn hardware() -> Option<Result<Device>> {
    let index = adapter::adapters().iter().position(adapter::is_hardware)?;
    Some(opened(Request { kind: KIND, index, settings: Settings::default() }))
}
