//! Memory of a CUDA device, used again when a tensor is gone.
//!
//! Sizes are rounded up to four steps an octave, so that batches of changing length find a buffer that fits. Everything
//! runs on one stream: what still uses a buffer comes before its next user. While somebody wants guards, a buffer ends
//! with guard words and is not used again before they were looked at.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::Gpu;
use crate::backend::{Buffer, guards};
use crate::{Error, Result};

/// Guard words begin where the values end and are at least so many bytes.
const GUARD: usize = 256;

/// A run of the device's bytes.
#[derive(Debug, Clone, Copy)]
struct Memory {
    address: u64,
    size: usize,
}

#[derive(Default)]
struct Free {
    /// Memory that nobody uses, by size.
    memory: HashMap<usize, Vec<u64>>,
    /// That of the recording that is under way, which only it can use.
    recorded: HashMap<usize, Vec<u64>>,
    /// That with guard words that nobody has looked at, and where the guard words begin.
    guarded: Vec<(Memory, usize)>,
    /// That which only recordings use any more.
    kept: Vec<(Memory, Vec<u64>)>,
    /// That of callers which only recordings use any more.
    owners: Vec<(Owner, Vec<u64>)>,
    /// What is dropped when nothing is being recorded any more.
    later: Vec<Box<dyn Any + Send>>,
    /// Recordings that may run again.
    recordings: Vec<u64>,
}

/// Where buffers come from and go back to.
pub(super) struct Pool {
    gpu: Arc<Gpu>,
    free: Mutex<Free>,
    taken: AtomicUsize,
    violations: AtomicUsize,
    /// The number of the recording that is under way; 0 if there is none.
    recording: AtomicU64,
    begun: AtomicU64,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({:?}, {} bytes)", self.gpu, self.taken())
    }
}

/// The size of the buffer that so many bytes get.
fn class(bytes: usize) -> usize {
    let bytes = bytes.max(256);
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.next_multiple_of(step)
}

impl Pool {
    pub(super) fn new(gpu: Arc<Gpu>) -> Self {
        Self {
            gpu,
            free: Mutex::default(),
            taken: AtomicUsize::new(0),
            violations: AtomicUsize::new(0),
            recording: AtomicU64::new(0),
            begun: AtomicU64::new(0),
        }
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of so many bytes, holding whatever it held before, with guard words behind it if somebody wants them.
    pub(super) fn allocate(pool: &Arc<Self>, bytes: usize) -> Result<CudaBuffer> {
        let most = pool.gpu.properties().memory;
        if bytes > most {
            return Err(Error::OutOfMemory { device: pool.gpu.title().into(), bytes });
        }
        let end = bytes.next_multiple_of(4);
        let recording = pool.recording();
        let guarded = guards::are_wanted() && recording == 0;
        let size = if guarded { end.next_multiple_of(GUARD) + GUARD } else { class(bytes) };
        let mut free = pool.free();
        let recorded = if recording == 0 { None } else { free.recorded.get_mut(&size).and_then(Vec::pop) };
        let found = recorded.or_else(|| free.memory.get_mut(&size).and_then(Vec::pop));
        drop(free);
        let address = match found {
            Some(address) => address,
            None => pool.take(size)?,
        };
        let home = Home::Pool(pool.clone());
        let (memory, recordings) = (Memory { address, size }, Mutex::default());
        let buffer = CudaBuffer { memory, end, guarded, home, born: recording, recordings };
        buffer.mark();
        if let Some(guard) = buffer.guard() {
            buffer.set(guard, guards::PATTERN)?;
        }
        Ok(buffer)
    }

    /// New memory. If there is none, what nobody uses is given up for it.
    fn take(&self, size: usize) -> Result<u64> {
        let address = match self.gpu.allocate(size) {
            Err(Error::OutOfMemory { .. }) if self.trim()? > 0 => self.gpu.allocate(size)?,
            result => result?,
        };
        self.taken.fetch_add(size, Ordering::Relaxed);
        Ok(address)
    }

    /// Frees what nobody uses, and says how many bytes that were. While something is recorded nothing can be waited for,
    /// so nothing is freed.
    pub(super) fn trim(&self) -> Result<usize> {
        if self.recording() != 0 {
            return Ok(0);
        }
        self.look_at_guards()?;
        let all = std::mem::take(&mut self.free().memory);
        if all.is_empty() {
            return Ok(0);
        }
        // What was launched may still use it.
        let waited = self.gpu.synchronize();
        let mut freed = 0;
        for (size, addresses) in all {
            for address in addresses {
                // SAFETY: nobody uses it: it was given back, and what was launched is done, or will never be.
                if unsafe { self.gpu.free(address) }.is_ok() {
                    freed += size;
                }
            }
        }
        self.taken.fetch_sub(freed, Ordering::Relaxed);
        waited?;
        Ok(freed)
    }

    /// Takes memory back that nobody has any more, but perhaps recordings.
    fn give_back(&self, memory: Memory, end: usize, guarded: bool, born: u64, mut recordings: Vec<u64>) {
        let now = self.recording();
        let mut free = self.free();
        recordings.retain(|recording| free.recordings.contains(recording));
        // What was there before holds values that each run of the recording reads.
        if recordings == [now] && born == now {
            free.recorded.entry(memory.size).or_default().push(memory.address);
        } else if !recordings.is_empty() {
            free.kept.push((memory, recordings));
        } else if guarded {
            free.guarded.push((memory, end));
        } else {
            free.memory.entry(memory.size).or_default().push(memory.address);
        }
    }

    /// Drops what keeps a caller's memory, when no recording uses that any more.
    fn give_up(&self, owner: Owner, mut recordings: Vec<u64>) {
        let mut free = self.free();
        recordings.retain(|recording| free.recordings.contains(recording));
        if recordings.is_empty() {
            drop(free);
            self.drop_later(owner);
        } else {
            free.owners.push((owner, recordings));
        }
    }

    /// Drops something that waits for the device then, when nothing is being recorded any more.
    pub(super) fn drop_later(&self, what: impl Any + Send) {
        if self.recording() != 0 {
            self.free().later.push(Box::new(what));
        }
    }

    /// The number of the recording that is under way; 0 if there is none.
    pub(super) fn recording(&self) -> u64 {
        self.recording.load(Ordering::SeqCst)
    }

    /// From now on what is used belongs to a recording, too, which may run at any time. False if one is under way.
    pub(super) fn begin_recording(&self) -> bool {
        let number = 1 + self.begun.fetch_add(1, Ordering::SeqCst);
        let mut free = self.free();
        let begun = self.recording.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if begun {
            free.recordings.push(number);
        }
        begun
    }

    /// Ends a recording, of which nothing is captured any more, and returns its number. What it has used is not used
    /// otherwise.
    pub(super) fn end_recording(&self) -> u64 {
        let mut free = self.free();
        let number = self.recording.swap(0, Ordering::SeqCst);
        let recorded = std::mem::take(&mut free.recorded).into_iter();
        let kept = recorded.flat_map(|(size, addresses)| {
            addresses.into_iter().map(move |address| (Memory { address, size }, vec![number]))
        });
        free.kept.extend(kept);
        let later = std::mem::take(&mut free.later);
        drop(free);
        drop(later);
        number
    }

    /// A recording does not run any more.
    pub(super) fn forget_recording(&self, number: u64) {
        let mut free = self.free();
        free.recordings.retain(|recording| *recording != number);
        for (Memory { address, size }, mut recordings) in std::mem::take(&mut free.kept) {
            recordings.retain(|recording| *recording != number);
            if recordings.is_empty() {
                free.memory.entry(size).or_default().push(address);
            } else {
                free.kept.push((Memory { address, size }, recordings));
            }
        }
        let mut given_up = Vec::new();
        for (owner, mut recordings) in std::mem::take(&mut free.owners) {
            recordings.retain(|recording| *recording != number);
            if recordings.is_empty() {
                given_up.push(owner);
            } else {
                free.owners.push((owner, recordings));
            }
        }
        drop(free);
    }

    /// How many guarded buffers were written beyond their values, of all that were given back so far.
    pub(super) fn guard_violations(&self) -> usize {
        // A device that cannot copy any more reports that to whoever asks it for something next.
        let _ = self.look_at_guards();
        self.violations.load(Ordering::SeqCst)
    }

    /// Looks at the guard words of all buffers that were given back with such, which can be used again then.
    fn look_at_guards(&self) -> Result<()> {
        if self.recording() != 0 {
            return Ok(());
        }
        let buffers = std::mem::take(&mut self.free().guarded);
        let mut words = Vec::new();
        let looked = buffers.iter().try_for_each(|(memory, end)| {
            words.resize(memory.size - end, 0);
            // SAFETY: this is the end of the buffer's memory.
            unsafe { self.gpu.download(memory.address + *end as u64, &mut words)? };
            if !guards::hold(&words) {
                self.violations.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        let mut free = self.free();
        for (Memory { address, size }, _) in buffers {
            free.memory.entry(size).or_default().push(address);
        }
        looked
    }

    /// Bytes of all buffers, in use and free.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let free = self.free.get_mut().unwrap_or_else(PoisonError::into_inner);
        free.guarded.drain(..).for_each(|(memory, _)| free.memory.entry(memory.size).or_default().push(memory.address));
        // A device that cannot free it any more frees it with everything else.
        let _ = self.trim();
    }
}

/// Whose memory it is.
enum Home {
    Pool(Arc<Pool>),
    Caller {
        pool: Arc<Pool>,
        /// What keeps the memory, if the caller does not do so itself.
        owner: Option<Owner>,
    },
}

/// What keeps a caller's memory.
struct Owner {
    _kept: Box<dyn Any + Send + Sync>,
    gpu: Arc<Gpu>,
    /// Whether it takes care itself that the memory is not freed before what is on the stream is done.
    ordered: bool,
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.ordered {
            // A device that fails does not use it any more either.
            let _ = self.gpu.synchronize();
        }
    }
}

/// Memory of one tensor.
pub(super) struct CudaBuffer {
    memory: Memory,
    /// Where its values end, a multiple of 4 unless they are a caller's.
    end: usize,
    guarded: bool,
    home: Home,
    /// The recording during which it was made; 0 for none.
    born: u64,
    /// Those that use it.
    recordings: Mutex<Vec<u64>>,
}

impl CudaBuffer {
    /// A caller's own memory. If the owner is not `ordered`, the stream is waited for before it is dropped.
    ///
    /// # Safety
    /// There are so many bytes of this device's memory at the address, for as long as the owner lives, or else as long
    /// as the buffer, what is launched with it, and the recordings that use it.
    pub(super) unsafe fn of_caller(
        pool: Arc<Pool>,
        address: u64,
        bytes: usize,
        owner: Option<Box<dyn Any + Send + Sync>>,
        ordered: bool,
    ) -> Self {
        let memory = Memory { address, size: bytes };
        let owner = owner.map(|kept| Owner { _kept: kept, gpu: pool.gpu.clone(), ordered });
        let home = Home::Caller { pool, owner };
        Self { memory, end: bytes, guarded: false, home, born: 0, recordings: Mutex::default() }
    }

    fn pool(&self) -> &Pool {
        match &self.home {
            Home::Pool(pool) | Home::Caller { pool, .. } => pool,
        }
    }

    fn gpu(&self) -> &Gpu {
        &self.pool().gpu
    }

    /// Says that it is used: by the recording that is under way, too, if there is one.
    pub(super) fn mark(&self) {
        let now = self.pool().recording();
        if now != 0 {
            let mut recordings = self.recordings.lock().unwrap_or_else(PoisonError::into_inner);
            if !recordings.contains(&now) {
                recordings.push(now);
            }
        }
    }

    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        self.memory.address
    }

    /// How many bytes it has, with what follows its values.
    pub(super) fn size(&self) -> usize {
        self.memory.size
    }

    /// What follows its values and nobody may write, if somebody wants to know.
    pub(super) fn guard(&self) -> Option<Range<usize>> {
        self.guarded.then_some(self.end..self.memory.size)
    }

    /// The address of a range of its bytes.
    fn part(&self, range: &Range<usize>) -> Result<u64> {
        if range.start > range.end || range.end > self.memory.size {
            return Err(self.gpu().broken(format!("bytes {range:?} of a buffer of {}", self.memory.size)));
        }
        Ok(self.memory.address + range.start as u64)
    }

    /// Copies from the host to what begins at some byte, in the stream's order.
    pub(super) fn upload(&self, bytes: &[u8], offset: usize) -> Result<()> {
        let to = self.part(&(offset..offset.saturating_add(bytes.len())))?;
        // SAFETY: the range is one of this buffer.
        unsafe { self.gpu().upload(bytes, to) }
    }

    /// Copies what begins at some byte to the host, when everything before is done.
    pub(super) fn download(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let from = self.part(&(offset..offset.saturating_add(bytes.len())))?;
        // SAFETY: the range is one of this buffer.
        unsafe { self.gpu().download(from, bytes) }
    }

    /// Copies to another buffer, in the stream's order. Within one buffer the ranges may not overlap.
    pub(super) fn copy(&self, range: Range<usize>, to: &Self, offset: usize) -> Result<()> {
        let (from, bytes) = (self.part(&range)?, range.len());
        let to = to.part(&(offset..offset.saturating_add(bytes)))?;
        if from < to + bytes as u64 && to < from + bytes as u64 && bytes > 0 {
            return Err(self.gpu().broken(format!("a copy of bytes {range:?} onto themselves")));
        }
        // SAFETY: the ranges are ones of the buffers, and do not overlap.
        unsafe { self.gpu().copy(from, to, bytes) }
    }

    /// Sets bytes, in the stream's order.
    pub(super) fn set(&self, range: Range<usize>, byte: u8) -> Result<()> {
        let to = self.part(&range)?;
        // SAFETY: the range is one of this buffer.
        unsafe { self.gpu().set(to, byte, range.len()) }
    }
}

impl fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaBuffer({} bytes)", self.memory.size)
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        let recordings = std::mem::take(self.recordings.get_mut().unwrap_or_else(PoisonError::into_inner));
        match &mut self.home {
            Home::Pool(pool) => pool.give_back(self.memory, self.end, self.guarded, self.born, recordings),
            Home::Caller { pool, owner } => {
                if let Some(owner) = owner.take() {
                    pool.give_up(owner, recordings);
                }
            }
        }
    }
}

impl Buffer for CudaBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// A tensor's memory as this backend's, if it is.
pub(super) fn of(buffer: &dyn Buffer) -> Option<&CudaBuffer> {
    buffer.as_any().downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::driver::Driver;
    use crate::backend::guards::Guards;

    #[test]
    fn sizes_are_rounded_up_a_little() {
        assert_eq!([0, 1, 256, 257, 1024, 1025].map(class), [256, 256, 256, 512, 1024, 1280]);
        for bytes in [3000, 100_000, 1_000_001, 123_456_789] {
            let size = class(bytes);
            assert!(size >= bytes && size <= bytes + bytes / 4 + 256 && size.is_multiple_of(256), "{bytes}: {size}");
        }
    }

    /// A device's pool, where there is one.
    fn pool() -> Option<Arc<Pool>> {
        Driver::get().ok().filter(|driver| driver.devices() > 0)?;
        Some(Arc::new(Pool::new(Arc::new(Gpu::open("cuda:0", 0).unwrap()))))
    }

    #[test]
    fn memory_is_used_again() {
        let Some(pool) = pool() else { return };
        let first = Pool::allocate(&pool, 1000).unwrap();
        let address = first.address();
        let second = Pool::allocate(&pool, 1000).unwrap();
        assert_ne!(second.address(), address);
        assert_eq!((first.size(), pool.taken()), (1024, 2048));
        drop(first);
        assert_eq!(Pool::allocate(&pool, 900).unwrap().address(), address);
        assert_eq!(pool.taken(), 2048);
        assert_eq!(pool.trim().unwrap(), 1024);
        assert_eq!(pool.taken(), 1024);
        assert!(second.upload(&[0; 1025], 0).is_err() && second.set(1000..1025, 0).is_err());
        second.upload(&[1, 2, 3], 1000).unwrap();
        second.copy(1000..1003, &second, 0).unwrap();
        assert!(second.copy(1000..1003, &second, 1001).is_err());
        let mut found = [0; 3];
        second.download(0, &mut found).unwrap();
        assert_eq!(found, [1, 2, 3]);
        assert!(matches!(Pool::allocate(&pool, usize::MAX), Err(Error::OutOfMemory { .. })));
        let most = pool.gpu.properties().memory;
        assert!(matches!(Pool::allocate(&pool, most), Err(Error::OutOfMemory { bytes, .. }) if bytes >= most));
    }

    #[test]
    fn memory_that_nobody_uses_makes_room() {
        let Some(pool) = pool() else { return };
        let free = pool.gpu.free_memory().unwrap().0;
        // What is freed leaves room for something larger, that is not of its size.
        drop(Pool::allocate(&pool, free / 8 * 5).unwrap());
        let large = Pool::allocate(&pool, free / 8 * 6).unwrap();
        assert_eq!(pool.taken(), large.size());
    }

    #[test]
    fn writes_beyond_a_buffer_are_noticed() {
        let Some(pool) = pool() else { return };
        let guards = Guards::raise();
        for (bytes, beyond) in [(1000, 1000), (999, 1003), (1024, 1279)] {
            let before = pool.guard_violations();
            let buffer = Pool::allocate(&pool, bytes).unwrap();
            buffer.set(0..bytes, 0).unwrap();
            drop(buffer);
            assert_eq!(pool.guard_violations(), before, "{bytes}");
            let buffer = Pool::allocate(&pool, bytes).unwrap();
            buffer.set(beyond..beyond + 1, 0).unwrap();
            drop(buffer);
            assert_eq!(pool.guard_violations(), before + 1, "{bytes}");
        }
        drop(guards);
    }

    #[test]
    fn an_owner_outlives_its_buffer() {
        let Some(pool) = pool() else { return };
        let kept = Arc::new(());
        let own = Pool::allocate(&pool, 400).unwrap();
        let owner: Box<dyn Any + Send + Sync> = Box::new(kept.clone());
        // SAFETY: the memory is that of a buffer that lives longer.
        let buffer = unsafe { CudaBuffer::of_caller(pool.clone(), own.address(), 400, Some(owner), false) };
        buffer.upload(&[7; 400], 0).unwrap();
        assert!(buffer.guard().is_none() && Arc::strong_count(&kept) == 2);
        assert!(of(&buffer).is_some());
        drop(buffer);
        assert_eq!(Arc::strong_count(&kept), 1);
        let mut found = [0; 400];
        own.download(0, &mut found).unwrap();
        assert_eq!(found, [7; 400]);
    }
}
