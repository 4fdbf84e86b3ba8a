//! Host memory for tensors, recycled: a training step asks for the same sizes again and again, and fresh memory from
//! the operating system costs a page fault every 4 KiB.

use std::any::Any;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::LocalKey;

use bytemuck::{Pod, Zeroable};

use crate::backend::{Buffer, Tensor, guards};
use crate::{Error, Result};

/// A cache line: buffers begin at one, so that no vector load straddles two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Freed buffers by size.
#[derive(Default)]
pub(super) struct Pool {
    free: Mutex<BTreeMap<usize, Vec<Vec<Line>>>>,
    /// Guarded buffers that were written beyond their end.
    violations: AtomicUsize,
    /// Bytes that were taken from the operating system.
    taken: AtomicUsize,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

impl Pool {
    /// Sizes are rounded up by at most an eighth, so that batches of slightly different length share buffers.
    fn class(lines: usize) -> usize {
        let step = (lines.next_power_of_two() / 16).max(1);
        lines.div_ceil(step) * step
    }

    /// A buffer of so many bytes, holding whatever it held before.
    pub(super) fn allocate(pool: &Arc<Self>, bytes: usize) -> Result<CpuBuffer> {
        let guarded = guards::are_wanted();
        let lines = Self::class(bytes.div_ceil(64) + usize::from(guarded));
        let recycled =
            pool.free.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&lines).and_then(|list| list.pop());
        let memory = match recycled {
            Some(memory) => memory,
            None => {
                let mut memory = Vec::new();
                let out_of_memory = |_| Error::OutOfMemory { device: "cpu".into(), bytes };
                memory.try_reserve_exact(lines).map_err(out_of_memory)?;
                memory.resize(lines, Line::zeroed());
                pool.taken.fetch_add(lines * size_of::<Line>(), Ordering::Relaxed);
                memory
            }
        };
        let mut buffer = CpuBuffer { memory, bytes, guarded, pool: pool.clone() };
        if guarded {
            guards::set(&mut bytemuck::cast_slice_mut::<Line, u8>(&mut buffer.memory)[bytes..]);
        }
        Ok(buffer)
    }

    /// How many guarded buffers were found written beyond their end when they were dropped.
    pub(super) fn guard_violations(&self) -> usize {
        self.violations.load(Ordering::SeqCst)
    }

    /// How many bytes were taken from the operating system; none is given back before the pool goes.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

/// Memory of one tensor.
pub(super) struct CpuBuffer {
    memory: Vec<Line>,
    bytes: usize,
    guarded: bool,
    pool: Arc<Pool>,
}

impl std::fmt::Debug for CpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuBuffer({} bytes)", self.bytes)
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if self.guarded && !guards::hold(&bytemuck::cast_slice::<Line, u8>(&memory)[self.bytes..]) {
            self.pool.violations.fetch_add(1, Ordering::SeqCst);
        }
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(memory.len()).or_default().push(memory);
    }
}

impl Buffer for CpuBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Scratch memory that a thread lends for as long as this lives, so that a task does not take it from the operating
/// system anew. Whatever it held before is still in it.
pub(super) struct Lent<T: Default + 'static> {
    value: T,
    home: &'static LocalKey<Cell<T>>,
}

impl<T: Default> Lent<T> {
    /// What this thread keeps under a key; the default if it is lent already.
    pub(super) fn from(home: &'static LocalKey<Cell<T>>) -> Self {
        Self { value: home.take(), home }
    }
}

impl<T: Default> Deref for Lent<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Default> DerefMut for Lent<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: Default> Drop for Lent<T> {
    fn drop(&mut self) {
        self.home.set(std::mem::take(&mut self.value));
    }
}

/// The elements of a tensor.
pub(crate) fn read<'a, T: Pod>(operation: &'static str, argument: &'static str, tensor: &'a Tensor) -> Result<&'a [T]> {
    let buffer = tensor.buffer().as_any().downcast_ref::<CpuBuffer>().ok_or_else(|| Error::OtherDevice {
        operation,
        argument,
        expected: "cpu".into(),
        found: tensor.device().name(),
    })?;
    Ok(bytemuck::cast_slice(&bytemuck::cast_slice::<Line, u8>(&buffer.memory)[..buffer.bytes]))
}

/// The elements of a tensor, to be written.
pub(crate) fn write<'a, T: Pod>(
    operation: &'static str,
    argument: &'static str,
    tensor: &'a mut Tensor,
) -> Result<&'a mut [T]> {
    let found = tensor.device().name();
    let buffer = tensor.buffer_mut().ok_or(Error::Shared { operation, argument })?;
    let buffer = buffer.as_any_mut().downcast_mut::<CpuBuffer>().ok_or(Error::OtherDevice {
        operation,
        argument,
        expected: "cpu".into(),
        found,
    })?;
    Ok(bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<Line, u8>(&mut buffer.memory)[..buffer.bytes]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_recycled_and_aligned() {
        let pool = Arc::new(Pool::default());
        let first = Pool::allocate(&pool, 1000).unwrap();
        let address = first.memory.as_ptr() as usize;
        assert_eq!(address % 64, 0);
        drop(first);
        let second = Pool::allocate(&pool, 1001).unwrap();
        assert_eq!(second.memory.as_ptr() as usize, address);
        assert_eq!(pool.taken(), 1024);
    }

    #[test]
    fn threads_lend_the_same_memory_again() {
        thread_local! { static HERE: Cell<Vec<f32>> = Cell::default(); }
        let mut first = Lent::from(&HERE);
        first.resize(100, 1.0);
        let address = first.as_ptr();
        // Of two at a time the second is another.
        assert!(Lent::from(&HERE).is_empty());
        drop(first);
        let again = Lent::from(&HERE);
        assert_eq!((again.as_ptr(), again.len()), (address, 100));
    }

    #[test]
    fn a_write_beyond_a_guarded_buffer_is_noticed() {
        let pool = Arc::new(Pool::default());
        let guards = guards::Guards::raise();
        for bytes in [0, 1, 64, 1000] {
            let mut buffer = Pool::allocate(&pool, bytes).unwrap();
            bytemuck::cast_slice_mut::<Line, u8>(&mut buffer.memory)[..bytes].fill(7);
            drop(buffer);
            assert_eq!(pool.guard_violations(), 0);
        }
        let mut buffer = Pool::allocate(&pool, 1000).unwrap();
        bytemuck::cast_slice_mut::<Line, u8>(&mut buffer.memory)[1000] = 7;
        drop(buffer);
        assert_eq!(pool.guard_violations(), 1);
        drop(guards);
    }

    #[test]
    fn too_large_a_buffer_is_an_error() {
        for bytes in [usize::MAX / 4, usize::MAX] {
            let error = Pool::allocate(&Arc::new(Pool::default()), bytes).unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { .. }));
        }
    }
}
