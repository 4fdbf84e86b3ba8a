//! Memory of a wgpu device, used again when a tensor is gone.
//!
//! Sizes are rounded up to four steps an octave, so that batches of changing length find a buffer that fits.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ::wgpu;

use crate::backend::Buffer;
use crate::{Error, Result};

/// Buffers that are free, by size.
pub(super) struct Pool {
    device: String,
    maker: wgpu::Device,
    free: Mutex<HashMap<u64, Vec<wgpu::Buffer>>>,
    taken: AtomicUsize,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({}, {} bytes)", self.device, self.taken())
    }
}

/// The size of the buffer that so many bytes get.
fn class(bytes: usize) -> u64 {
    let bytes = (bytes as u64).max(256);
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.next_multiple_of(step)
}

impl Pool {
    pub(super) fn new(device: String, maker: wgpu::Device) -> Self {
        Self { device, maker, free: Mutex::default(), taken: AtomicUsize::new(0) }
    }

    pub(super) fn allocate(pool: &Arc<Self>, bytes: usize, most: u64) -> Result<WgpuBuffer> {
        let device = || pool.device.clone();
        let size = class(bytes).min(most.max(bytes as u64));
        if bytes as u64 > most {
            return Err(Error::Limit { device: device(), limit: "max_buffer_size", needed: bytes as u64, most });
        }
        let found = pool.free.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&size).and_then(Vec::pop);
        let raw = match found {
            Some(raw) => raw,
            None => {
                let memory = pool.maker.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
                let validation = pool.maker.push_error_scope(wgpu::ErrorFilter::Validation);
                let raw = pool.maker.create_buffer(&wgpu::BufferDescriptor {
                    label: None,
                    size,
                    usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                });
                let invalid = pollster::block_on(validation.pop());
                if pollster::block_on(memory.pop()).is_some() {
                    return Err(Error::OutOfMemory { device: device(), bytes });
                }
                if let Some(error) = invalid {
                    return Err(Error::Device { device: device(), reason: error.to_string() });
                }
                pool.taken.fetch_add(size as usize, Ordering::Relaxed);
                raw
            }
        };
        Ok(WgpuBuffer { raw, home: Some((pool.clone(), size)) })
    }

    /// Bytes of all buffers, in use and free.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

/// Memory of one tensor.
pub(super) struct WgpuBuffer {
    raw: wgpu::Buffer,
    /// Where it goes when it is free; nowhere if it is a caller's.
    home: Option<(Arc<Pool>, u64)>,
}

impl WgpuBuffer {
    /// A caller's own buffer.
    pub(super) fn of_caller(raw: wgpu::Buffer) -> Self {
        Self { raw, home: None }
    }

    pub(super) fn raw(&self) -> &wgpu::Buffer {
        &self.raw
    }
}

impl std::fmt::Debug for WgpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WgpuBuffer({} bytes)", self.raw.size())
    }
}

impl Drop for WgpuBuffer {
    fn drop(&mut self) {
        // Commands that still use it come before those of its next user.
        if let Some((pool, size)) = self.home.take() {
            pool.free.lock().unwrap_or_else(PoisonError::into_inner).entry(size).or_default().push(self.raw.clone());
        }
    }
}

impl Buffer for WgpuBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// The wgpu buffer of a tensor's memory, if it is of this backend.
pub(super) fn raw(buffer: &dyn Buffer) -> Option<&wgpu::Buffer> {
    buffer.as_any().downcast_ref::<WgpuBuffer>().map(WgpuBuffer::raw)
}

#[cfg(test)]
mod tests {
    use super::class;

    #[test]
    fn sizes_are_rounded_up_a_little() {
        assert_eq!([0, 1, 256, 257, 1024, 1025].map(class), [256, 256, 256, 512, 1024, 1280]);
        for bytes in [3000, 100_000, 1_000_001, 123_456_789] {
            let size = class(bytes) as usize;
            assert!(size >= bytes && size <= bytes + bytes / 4 + 256 && size.is_multiple_of(256), "{bytes}: {size}");
        }
    }
}
