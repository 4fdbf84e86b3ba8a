//! Memory of a wgpu device, used again when a tensor is gone.
//!
//! Sizes are rounded up to four steps an octave, so that batches of changing length find a buffer that fits. While
//! somebody wants guards, a buffer ends with guard words and is not used again before they were looked at.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::wgpu;

use crate::backend::Buffer;
use crate::{Error, Result};

/// Guard words begin where the values end and are at least so many bytes.
const GUARD: u64 = 256;

/// Buffers that nobody uses, by size.
type BySize = HashMap<u64, Vec<wgpu::Buffer>>;

#[derive(Default)]
struct Free {
    buffers: BySize,
    /// Those of the recording that is under way, which only it can use: it runs when its caller likes.
    recorded: BySize,
    /// Those with guard words that nobody has looked at, and where the guard words begin.
    guarded: Vec<(wgpu::Buffer, u64)>,
}

/// Where buffers come from and go back to.
pub(super) struct Pool {
    device: String,
    maker: wgpu::Device,
    /// The size of the largest buffer.
    most: u64,
    free: Mutex<Free>,
    taken: AtomicUsize,
    /// The number of the recording that is under way; 0 if there is none.
    recording: AtomicU64,
    recordings: AtomicU64,
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
        let most = maker.limits().max_buffer_size;
        Self {
            device,
            maker,
            most,
            free: Mutex::default(),
            taken: AtomicUsize::new(0),
            recording: AtomicU64::new(0),
            recordings: AtomicU64::new(0),
        }
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of so many bytes, holding whatever it held before. If it is guarded, the guard words are still to be
    /// written.
    pub(super) fn allocate(pool: &Arc<Self>, bytes: usize, guarded: bool) -> Result<WgpuBuffer> {
        let end = bytes.checked_next_multiple_of(4).unwrap_or(usize::MAX) as u64;
        if end > pool.most {
            let (device, limit) = (pool.device.clone(), "max_buffer_size");
            return Err(Error::Limit { device, limit, needed: bytes as u64, most: pool.most });
        }
        let recording = pool.recording.load(Ordering::SeqCst);
        let guarded = guarded && recording == 0 && end + 2 * GUARD <= pool.most;
        let size = if guarded { end.next_multiple_of(GUARD) + GUARD } else { class(bytes).min(pool.most) };
        let mut free = pool.free();
        let mut found = None;
        if recording != 0 {
            found = free.recorded.get_mut(&size).and_then(Vec::pop);
        }
        let found = found.or_else(|| free.buffers.get_mut(&size).and_then(Vec::pop));
        drop(free);
        let raw = match found {
            Some(raw) => raw,
            None => {
                let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
                let raw = create(&pool.maker, &pool.device, None, size, usage, false)?;
                pool.taken.fetch_add(size as usize, Ordering::Relaxed);
                raw
            }
        };
        Ok(WgpuBuffer { raw, end, guarded, home: Some(pool.clone()), recording: AtomicU64::new(recording) })
    }

    /// Takes a buffer back that nobody has any more.
    fn give_back(&self, raw: wgpu::Buffer, end: u64, guarded: bool, recording: u64) {
        let size = raw.size();
        let mut free = self.free();
        if guarded {
            free.guarded.push((raw, end));
        } else if recording == 0 {
            // Commands that still use it come before those of its next user.
            free.buffers.entry(size).or_default().push(raw);
        } else if recording == self.recording.load(Ordering::SeqCst) {
            free.recorded.entry(size).or_default().push(raw);
        } else {
            // Its recording may run at any time, so nobody else can have it. The driver frees it when it is done.
            self.taken.fetch_sub(size as usize, Ordering::Relaxed);
        }
    }

    /// From now on buffers belong to a recording that runs when its caller likes.
    pub(super) fn begin_recording(&self) {
        self.recording.store(1 + self.recordings.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
    }

    pub(super) fn end_recording(&self) {
        self.recording.store(0, Ordering::SeqCst);
        for (size, buffers) in self.free().recorded.drain() {
            self.taken.fetch_sub(size as usize * buffers.len(), Ordering::Relaxed);
        }
    }

    /// Guarded buffers that were given back since the last call, and where their guard words begin. They are to be
    /// [kept](Self::keep) when they have been looked at.
    pub(super) fn guarded(&self) -> Vec<(wgpu::Buffer, u64)> {
        std::mem::take(&mut self.free().guarded)
    }

    /// Keeps buffers to be used again.
    pub(super) fn keep(&self, buffers: impl Iterator<Item = wgpu::Buffer>) {
        let mut free = self.free();
        for raw in buffers {
            free.buffers.entry(raw.size()).or_default().push(raw);
        }
    }

    /// Bytes of all buffers, in use and free.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

/// Makes a buffer, or says that there is no room for it.
pub(super) fn create(
    maker: &wgpu::Device,
    device: &str,
    label: Option<&str>,
    size: u64,
    usage: wgpu::BufferUsages,
    mapped_at_creation: bool,
) -> Result<wgpu::Buffer> {
    let memory = maker.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let validation = maker.push_error_scope(wgpu::ErrorFilter::Validation);
    let raw = maker.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation });
    let invalid = pollster::block_on(validation.pop());
    if pollster::block_on(memory.pop()).is_some() {
        return Err(Error::OutOfMemory { device: device.into(), bytes: size as usize });
    }
    match invalid {
        Some(error) => Err(Error::Device { device: device.into(), reason: error.to_string() }),
        None => Ok(raw),
    }
}

/// Memory of one tensor.
pub(super) struct WgpuBuffer {
    raw: wgpu::Buffer,
    /// Where its values end, a multiple of 4.
    end: u64,
    guarded: bool,
    /// Where it goes when it is free; nowhere if it is a caller's.
    home: Option<Arc<Pool>>,
    /// The number of the last recording that uses it; 0 if there is none.
    recording: AtomicU64,
}

impl WgpuBuffer {
    /// A caller's own buffer, of which so many bytes are meant.
    pub(super) fn of_caller(raw: wgpu::Buffer, bytes: usize) -> Self {
        let end = bytes.next_multiple_of(4) as u64;
        Self { raw, end, guarded: false, home: None, recording: AtomicU64::new(0) }
    }

    pub(super) fn raw(&self) -> &wgpu::Buffer {
        &self.raw
    }

    /// What follows its values and nobody may write, if somebody wants to know.
    pub(super) fn guard(&self) -> Option<std::ops::Range<u64>> {
        self.guarded.then(|| self.end..self.raw.size())
    }

    /// Marks it as used by the recording that is under way, if there is one.
    pub(super) fn mark(&self) {
        let recording = self.home.as_ref().map_or(0, |pool| pool.recording.load(Ordering::SeqCst));
        if recording != 0 {
            self.recording.store(recording, Ordering::SeqCst);
        }
    }
}

impl std::fmt::Debug for WgpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WgpuBuffer({} bytes)", self.raw.size())
    }
}

impl Drop for WgpuBuffer {
    fn drop(&mut self) {
        if let Some(pool) = self.home.take() {
            pool.give_back(self.raw.clone(), self.end, self.guarded, self.recording.load(Ordering::SeqCst));
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

/// A tensor's memory as this backend's, if it is.
pub(super) fn raw(buffer: &dyn Buffer) -> Option<&WgpuBuffer> {
    buffer.as_any().downcast_ref()
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
