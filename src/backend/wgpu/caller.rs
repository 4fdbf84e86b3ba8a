//! A caller's own device, buffers and encoder.

use std::sync::Arc;

use ::wgpu;

use super::adapter::{KIND, Request, Settings};
use super::buffer::{self, WgpuBuffer};
use super::engine::Engine;
use super::{Wgpu, adapter};
use crate::backend::{Device, Tensor};
use crate::error::{DType, Shape};
use crate::{Error, Result};

impl Wgpu {
    /// Opens an adapter, by its number among those that `nearfar devices` lists. Every call makes another device;
    /// `"wgpu:0".parse::<Device>()` gives the same one each time.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is no such adapter, [`Error::Device`] if it cannot be opened.
    pub fn open(index: usize, settings: Settings) -> Result<Self> {
        Self::open_request(Request { kind: KIND, index, settings })
    }

    /// Computes on a caller's own device, under a name of the caller's. It may have any limits from WebGPU's default
    /// ones up; its features are used where they help.
    ///
    /// The device's handlers of uncaptured errors and of its loss are set, so that what goes wrong is returned by the
    /// calls here. Who wants handlers of their own sets them afterwards; an error that those see is not returned.
    ///
    /// # Errors
    /// [`Error::Limit`] if a limit is below WebGPU's default, [`Error::OutOfMemory`].
    pub fn from_device(name: impl Into<String>, device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let name = name.into();
        adapter::check_limits(&name, &device.limits())?;
        let info = device.adapter_info();
        let engine = Engine::new(name, Settings::default(), device, queue)?;
        Ok(Self { engine, info })
    }

    /// The device of wgpu.
    pub fn device(&self) -> &wgpu::Device {
        &self.engine.device
    }

    /// Its queue. Operations that were asked for before something else is submitted to it come later, unless
    /// [`Device::submit`] is called in between.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.engine.queue
    }

    /// How often work was handed to the queue so far.
    pub fn submissions(&self) -> usize {
        self.engine.submissions()
    }

    /// How many entry points of shaders were needed so far.
    pub fn pipelines(&self) -> usize {
        self.engine.pipelines.count()
    }

    /// A caller's buffer as a tensor, without a copy. The tensor is the buffer's first elements, row by row.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the device is none of wgpu; [`Error::Value`] if the buffer is too small for the shape or
    /// lacks one of the usages `STORAGE`, `COPY_SRC` and `COPY_DST`.
    pub fn tensor(device: &Device, buffer: wgpu::Buffer, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        Self::of("tensor", "device", device)?;
        let shape = shape.into();
        let bytes = shape.elements() * dtype.size();
        let needed = bytes.next_multiple_of(4).max(4) as u64;
        if buffer.size() < needed {
            let reason = format!("has {} bytes, {shape} of {dtype} takes {needed}", buffer.size());
            return Err(Error::value("tensor", "buffer", reason));
        }
        let wanted = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let missing = wanted - buffer.usage();
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter_names().map(|(name, _)| name).collect();
            return Err(Error::value("tensor", "buffer", format!("lacks the usage {}", names.join(" and "))));
        }
        Ok(Tensor::new(device, shape, dtype, Arc::new(WgpuBuffer::of_caller(buffer, bytes))))
    }

    /// The buffer of a tensor, without a copy. It may be longer than the tensor.
    ///
    /// What was asked for reaches it with [`Device::submit`] or [`record`](Self::record). It is the tensor's: once that
    /// and all its clones are gone it is used for something else, unless it is a caller's own.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the tensor lives on no device of wgpu.
    pub fn buffer(tensor: &Tensor) -> Result<&wgpu::Buffer> {
        Self::of("buffer", "tensor", tensor.device())?;
        let buffer = buffer::raw(tensor.buffer());
        buffer.map(WgpuBuffer::raw).ok_or_else(|| other_device("buffer", "tensor", tensor.device()))
    }

    /// Records everything that `ask` asks for into a caller's encoder, instead of submitting it. It runs when the caller
    /// submits the encoder, in the order in which encoders and other work are submitted, and no more than once. Several
    /// recordings may be pending.
    ///
    /// Work that was asked for before is submitted first. While `ask` runs nothing can be read back, and
    /// [`Device::submit`] does nothing; what other threads ask of the same device meanwhile is recorded too. If `ask`
    /// fails, nothing is recorded.
    ///
    /// ```no_run
    /// # use nearfar::backend::wgpu::Wgpu;
    /// # use nearfar::{Batch, Device, Objective, Tensor, wgpu};
    /// # fn f(device: &Device, queries: &Tensor, documents: &Tensor, mut encoder: wgpu::CommandEncoder,
    /// #     queue: wgpu::Queue) -> nearfar::Result<()> {
    /// let batch = Batch::new(queries, documents);
    /// let out = Wgpu::record(device, &mut encoder, || Objective::samtone().forward_backward(device, batch))?;
    /// queue.submit([encoder.finish()]);
    /// println!("{}", out.loss.to_scalar()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the device is none of wgpu, what `ask` returns, and what the device reports.
    pub fn record<T>(
        device: &Device,
        encoder: &mut wgpu::CommandEncoder,
        ask: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        Self::of("record", "device", device)?.engine.record(encoder, ask)
    }

    pub(super) fn of<'a>(operation: &'static str, argument: &'static str, device: &'a Device) -> Result<&'a Self> {
        device.backend::<Self>().ok_or_else(|| other_device(operation, argument, device))
    }
}

fn other_device(operation: &'static str, argument: &'static str, device: &Device) -> Error {
    Error::OtherDevice { operation, argument, expected: "a device of wgpu".into(), found: device.name() }
}
