//! A caller's own stream and memory.

use std::any::Any;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};

use super::Cuda;
use super::buffer::{self, CudaBuffer};
use super::driver::Gpu;
use super::engine::Engine;
use super::settings::{KIND, Request, Settings};
use crate::backend::{Device, Element, Tensor};
use crate::error::{DType, Shape};
use crate::{Error, Result};

/// The handle of the default stream of each thread.
const PER_THREAD: usize = 2;

impl Cuda {
    /// Opens a GPU by its number, on a stream of its own. Every call makes another device; `"cuda:0".parse::<Device>()`
    /// gives the same one each time.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is no such GPU, [`Error::Device`] if there is no driver or NVRTC that can be used.
    pub fn open(index: usize, settings: Settings) -> Result<Self> {
        Self::open_request(Request { kind: KIND, index, settings })
    }

    /// Computes on a caller's own stream, under a name of the caller's. Everything is asked for in the stream's order, and
    /// nothing is waited for but what is read back and uploads of more than 1 MiB.
    ///
    /// Any thread may use the device; the stream's context is the current one on a thread that did. What is to be captured
    /// into a graph goes through [`Cuda::capture`]: a graph of the caller's own would copy from memory of the host, and
    /// use memory of the device, that others use by then.
    ///
    /// # Errors
    /// [`Error::Value`] for the default stream of each thread, which is another stream on every thread;
    /// [`Error::Device`] if there is no NVRTC that can be used.
    pub fn from_stream(name: impl Into<String>, stream: Arc<CudaStream>, settings: Settings) -> Result<Self> {
        let name = name.into();
        if stream.cu_stream() as usize == PER_THREAD {
            let reason = "is the default stream of each thread, which is another one on every thread".into();
            return Err(Error::Value { operation: "from_stream", argument: "stream", reason });
        }
        let gpu = Gpu::of_stream(&name, stream)?;
        Ok(Self { engine: Engine::new(name, settings, gpu)? })
    }

    /// The stream that everything runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.engine.gpu.stream()
    }

    /// How many kernels were needed so far.
    pub fn kernels(&self) -> usize {
        self.engine.kernels.entries().len()
    }

    /// A caller's memory as a tensor, without a copy: the elements at an address, row by row.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the device is none of CUDA; [`Error::Value`] if the address is no multiple of the size of
    /// an element.
    ///
    /// # Safety
    /// There are as many elements of the device's memory at the address as the shape says, until the tensor and all its
    /// clones are gone, what was asked for with them is done, and each [`Graph`](super::Graph) that uses them is gone. No tensor that is written shares them with another one.
    /// The device's stream comes after whatever else writes them, and whatever else reads or writes them after it comes
    /// after that.
    pub unsafe fn tensor(device: &Device, address: u64, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let cuda = Self::of("tensor", "device", device)?;
        let shape = shape.into();
        if !address.is_multiple_of(dtype.size() as u64) {
            let reason = format!("is {address:#x}, which is no multiple of the {} bytes of {dtype}", dtype.size());
            return Err(Error::value("tensor", "address", reason));
        }
        let bytes = shape.elements().saturating_mul(dtype.size());
        // SAFETY: as the caller says.
        let buffer = unsafe { CudaBuffer::of_caller(cuda.engine.pool.clone(), address, bytes, None, true) };
        Ok(Tensor::new(device, shape, dtype, Arc::new(buffer)))
    }

    /// A caller's slice as a tensor, without a copy; it goes when the tensor and all its clones have gone. What is under
    /// way on the slice's own stream is waited for by the device, not by the host.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the device is none of CUDA; [`Error::Value`] if the slice is of another context or shorter
    /// than the shape.
    pub fn tensor_of<T>(device: &Device, slice: CudaSlice<T>, shape: impl Into<Shape>) -> Result<Tensor>
    where
        T: DeviceRepr + Element + Send + Sync,
    {
        let cuda = Self::of("tensor_of", "device", device)?;
        let shape = shape.into();
        if slice.len() < shape.elements() {
            let reason = format!("has {} elements, {shape} takes {}", slice.len(), shape.elements());
            return Err(Error::value("tensor_of", "slice", reason));
        }
        if slice.context() != cuda.engine.gpu.context() {
            return Err(Error::value("tensor_of", "slice", format!("is of another context than {}", device.name())));
        }
        let stream = cuda.stream().clone();
        // On one stream it is freed behind what still uses it.
        let ordered = slice.stream() == &stream;
        if !ordered {
            // SAFETY: the slice's stream is of this context and lives as long as it.
            unsafe { cuda.engine.gpu.follow(slice.stream().cu_stream())? };
        }
        let (address, guard) = slice.device_ptr(&stream);
        drop(guard);
        let bytes = shape.elements() * T::DTYPE.size();
        let owner = Some(Box::new(slice) as Box<dyn Any + Send + Sync>);
        // SAFETY: the slice has as many elements and is kept.
        let buffer = unsafe { CudaBuffer::of_caller(cuda.engine.pool.clone(), address, bytes, owner, ordered) };
        Ok(Tensor::new(device, shape, T::DTYPE, Arc::new(buffer)))
    }

    /// The address of a tensor's memory, without a copy.
    ///
    /// What was asked for reaches it in the order of the device's stream. It is the tensor's: once that and all its clones
    /// are gone it is used for something else, unless it is a caller's own.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the tensor lives on no device of CUDA.
    pub fn address(tensor: &Tensor) -> Result<u64> {
        let cuda = Self::of("address", "tensor", tensor.device())?;
        let buffer = buffer::of(tensor.buffer()).map(CudaBuffer::address);
        buffer.ok_or_else(|| cuda.engine.gpu.broken("a tensor of another backend"))
    }

    pub(super) fn of<'a>(operation: &'static str, argument: &'static str, device: &'a Device) -> Result<&'a Self> {
        device.backend::<Self>().ok_or_else(|| Error::OtherDevice {
            operation,
            argument,
            expected: "a device of CUDA".into(),
            found: device.name(),
        })
    }
}
