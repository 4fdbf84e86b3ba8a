//! What operations are run with: kernels, memory, and launches that name what they bind.
//!
//! Everything goes onto one stream in the order in which it was asked for; nothing is waited for before a download.

use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::{self, CudaBuffer, Pool};
use super::driver::{self, Gpu, Pinned, TensorMap, Value};
use super::kernel::{Entry, Kernels, Kind};
use super::matmul;
use super::profile::Profile;
use super::settings::Settings;
use crate::backend::Buffer;
use crate::backend::gpu::matmul::Product;
use crate::backend::gpu::{self, Bindable, Bound, Groups, Launch, Scalar};
use crate::error::DType;
use crate::{Error, Result};

/// Blocks in the first direction, and in the others.
const MOST_BLOCKS: [usize; 3] = [i32::MAX as usize, 65_535, 65_535];

/// A device with everything that operations need of it.
pub(super) struct Engine {
    pub(super) name: String,
    pub(super) settings: Settings,
    pub(super) gpu: Arc<Gpu>,
    pub(super) kernels: Kernels,
    pub(super) pool: Arc<Pool>,
    pub(super) profile: Option<Profile>,
    /// What the recording that is under way copies from the host.
    uploads: Mutex<Vec<Pinned>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({})", self.name)
    }
}

impl Engine {
    pub(super) fn new(name: String, settings: Settings, gpu: Gpu) -> Result<Self> {
        let gpu = Arc::new(gpu);
        let kernels = Kernels::new(gpu.clone())?;
        let pool = Arc::new(Pool::new(gpu.clone()));
        let profile = settings.profile.then(Profile::default);
        Ok(Self { name, settings, gpu, kernels, pool, profile, uploads: Mutex::default() })
    }

    /// A buffer as this backend's.
    fn raw<'b>(&self, buffer: &'b dyn Buffer) -> Result<&'b CudaBuffer> {
        buffer::of(buffer).ok_or_else(|| self.gpu.broken("a buffer lives on another device"))
    }

    /// Copies bytes from the host to a buffer.
    pub(super) fn upload(&self, bytes: &[u8], to: &dyn Buffer) -> Result<()> {
        let to = self.raw(to)?;
        if self.pool.recording() == 0 || bytes.is_empty() {
            return to.upload(bytes, 0);
        }
        to.mark();
        // SAFETY: a tensor's buffer has room for its bytes.
        let kept = unsafe { self.gpu.upload_again(bytes, to.address())? };
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
        Ok(())
    }

    /// What the recording that has ended copies from the host.
    pub(super) fn take_uploads(&self) -> Vec<Pinned> {
        std::mem::take(&mut *self.uploads.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for everything asked for and copies the first bytes of a buffer to the host.
    pub(super) fn download(&self, from: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        let from = self.raw(from)?;
        if self.pool.recording() != 0 && !bytes.is_empty() {
            return Err(Error::value("download", "tensor", "cannot be read while a graph is recorded"));
        }
        from.download(0, bytes)
    }

    /// Where something begins, which is used from now on.
    pub(super) fn address(&self, what: &dyn Bindable) -> Result<u64> {
        let buffer = self.raw(what.bind().0)?;
        buffer.mark();
        Ok(buffer.address())
    }

    /// The number that is given to an argument, by the launch or by a flag or constant of it.
    fn scalar(&self, entry: &Entry, launch: &Launch<'_>, name: &str, wanted: Scalar) -> Result<Option<u64>> {
        match launch.params.iter().find(|(of, ..)| *of == name) {
            Some((_, of, bits)) if *of == wanted => Ok(Some(u64::from(*bits))),
            Some(_) => Err(self.gpu.broken(format!("{}: `{name}` is of another type", entry.label()))),
            None => Ok(Entry::setting(&launch.permutation, name).map(u64::from)),
        }
    }

    /// The address of what a launch binds; the elements of a part are where it begins. No kernel is given more than there
    /// is.
    fn bound(&self, bound: &Bound<'_>) -> Result<u64> {
        let (first, end) = match &bound.part {
            Some((range, _)) => (range.start.saturating_mul(4), range.end.saturating_mul(4)),
            None => (0, bound.bytes),
        };
        let buffer = self.raw(bound.buffer)?;
        // Of nothing, one element may be bound.
        if first > end || end > buffer.size().max(4) {
            let (name, size) = (bound.name, buffer.size());
            return Err(self.gpu.broken(format!("`{name}` is bound to the bytes {first} to {end} of {size}")));
        }
        buffer.mark();
        Ok(buffer.address() + first as u64)
    }

    /// Starts a launch, with so many bytes of dynamic shared memory.
    pub(super) fn launch_with(&self, launch: Launch<'_>, shared: usize) -> Result<()> {
        self.launch_mapped(launch, shared, &[])
    }

    /// The same with tensor maps, of memory that the caller keeps until the launch is asked for, under their names.
    pub(super) fn launch_mapped(
        &self,
        mut launch: Launch<'_>,
        shared: usize,
        maps: &[(&'static str, TensorMap)],
    ) -> Result<()> {
        launch.check()?;
        let grid = match launch.groups {
            Groups::Grid(grid) => grid,
            Groups::Row(count) => [count, 1, 1],
        };
        if grid.contains(&0) {
            return Ok(());
        }
        for (blocks, most) in grid.into_iter().zip(MOST_BLOCKS) {
            if blocks > most {
                let (needed, most) = (blocks as u64, most as u64);
                return Err(Error::Limit { device: self.gpu.title().into(), limit: "blocks of a grid", needed, most });
            }
        }
        let entry = self.kernels.get(&launch.permutation)?;
        let broken = |what: &str| Err(self.gpu.broken(format!("{}: {what}", entry.label())));
        let mut values = Vec::with_capacity(entry.kernel.arguments.len());
        let mut optional = false;
        for argument in &entry.kernel.arguments {
            let name = argument.name.as_str();
            let value = match argument.kind {
                Kind::Pointer { read_only } => match launch.bound.iter().find(|bound| bound.name == name) {
                    Some(bound) if bound.writes == read_only => {
                        return broken(&format!("`{name}` is bound to be written or not"));
                    }
                    Some(bound) => {
                        optional |= argument.optional;
                        Some(self.bound(bound)?)
                    }
                    None => None,
                },
                Kind::Scalar(of) => self.scalar(&entry, &launch, name, of)?,
                Kind::TensorMap => match maps.iter().find(|(of, _)| *of == name) {
                    Some((_, map)) => {
                        values.push(Value::TensorMap(*map));
                        continue;
                    }
                    None => None,
                },
            };
            match value {
                Some(value) => values.push(Value::Word(value)),
                None if argument.optional => values.push(Value::Word(0)),
                None => return broken(&format!("lacks `{name}`")),
            }
        }
        let has = |name: &str| entry.kernel.arguments.iter().any(|argument| argument.name == name);
        if let Some(bound) = launch.bound.iter().find(|bound| !has(bound.name)) {
            return broken(&format!("has no use for `{}`", bound.name));
        }
        if let Some((name, ..)) = launch.params.iter().find(|(name, ..)| !has(name)) {
            return broken(&format!("has no use for `{name}`"));
        }
        // A flag that the kernel does not know says that an optional buffer is bound.
        if let Some(flag) = entry.unknown(&launch.permutation).next().filter(|_| !optional) {
            return broken(&format!("has no use for {flag}"));
        }
        let function = self.kernels.wait(&entry)?;
        let launch = driver::Launch {
            function,
            grid: grid.map(|blocks| blocks as u32),
            threads: entry.kernel.threads,
            shared: u32::try_from(shared).unwrap_or(u32::MAX),
            arguments: &values,
        };
        let run = || {
            // SAFETY: arguments were bound by the names and types that the kernel's text gives them. What is bound lives
            // until it is done, as memory is only given to somebody else on the same stream; and kernels stay within
            // it, which conformance tests with guard words and unmapped pages check.
            unsafe { self.gpu.launch(&launch, entry.label()) }
        };
        match &self.profile {
            // What is recorded takes no time now.
            Some(profile) if self.pool.recording() == 0 => profile.time(&self.gpu, entry.label(), run),
            _ => run(),
        }
    }

    /// How often guarded buffers were written beyond their values, of all that were given back so far.
    pub(super) fn guard_violations(&self) -> usize {
        self.pool.guard_violations()
    }
}

impl gpu::Engine for Engine {
    fn launch(&self, launch: Launch<'_>) -> Result<()> {
        self.launch_with(launch, 0)
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(self.allocate(elements, dtype)?))
    }

    fn copy(&self, from: (&dyn Buffer, usize), to: (&dyn Buffer, usize), bytes: usize) -> Result<()> {
        let (from, first, to, to_first) = (self.raw(from.0)?, from.1, self.raw(to.0)?, to.1);
        from.mark();
        to.mark();
        from.copy(first..first + bytes, to, to_first)
    }

    fn product(&self, product: &Product<'_>) -> Result<()> {
        matmul::product(self, product)
    }

    fn most_bound_bytes(&self) -> u64 {
        // There is no such limit; sizes are counted in 32 bits.
        u64::MAX
    }

    fn workspace(&self, values: usize) -> usize {
        self.settings.workspace.map_or(values, |most| values.min(most))
    }

    fn unbindable(&self, bytes: u64) -> Error {
        Error::Limit { device: self.gpu.title().into(), limit: "bytes of a buffer", needed: bytes, most: u64::MAX }
    }
}

impl Engine {
    /// Room for values.
    pub(super) fn allocate(&self, elements: usize, dtype: DType) -> Result<CudaBuffer> {
        Pool::allocate(&self.pool, elements.saturating_mul(dtype.size()))
    }
}
