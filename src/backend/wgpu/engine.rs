//! What operations are run with: pipelines, the commands recorded so far, and launches that name what they bind.
//!
//! An operation records; nothing reaches the device before [`Engine::submit`], which a download, a full record or the
//! end of a training step asks for. Parameters of all launches of a submission are one uniform buffer, written once.
//!
//! What is recorded between the beginning and the end of [`Engine::record`] goes into a caller's own encoder instead.
//! Nobody knows when that runs, so its parameters and uploads have buffers of their own, and so has the [`Pool`].

#[cfg(test)]
use std::collections::HashMap;
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::wgpu;

use super::adapter::Settings;
use super::buffer::{self, Pool, WgpuBuffer};
use super::matmul;
use super::pipeline::{Pipeline, Pipelines};
use super::profile::Profile;
#[cfg(test)]
use crate::backend::gpu::Permutation;
use crate::backend::gpu::{self, Groups, Launch, MOST_GROUPS, Scratch};
use crate::backend::{Buffer, guards};
use crate::error::DType;
use crate::{Error, Result};

/// Bytes from one launch's parameters to the next's: what WebGPU guarantees an offset may be a multiple of.
const PARAMS_STRIDE: usize = 256;
/// Launches of one submission at most.
const LAUNCHES: usize = 4096;
/// Launches whose parameters share a buffer in a caller's encoder.
const RECORDED_LAUNCHES: usize = 256;
/// Submissions that the host may be ahead of the device.
const AHEAD: usize = 4;
/// Uploads of more bytes than this do not go through the record.
const LARGE_UPLOAD: usize = 1 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a device does not work any more.
#[derive(Debug, Clone)]
enum Failure {
    Lost(String),
    Other(String),
}

/// How products of large matrices are computed; the numbers are those of the shaders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Matrices {
    /// By ordinary arithmetic.
    None = 0,
    /// By cooperative matrices of 16-bit numbers, two for each value.
    Cooperative = 1,
    /// As with cooperative matrices, but by ordinary arithmetic: to test the rest of it.
    Emulated = 2,
}

/// Something the device is to do.
enum Command {
    Launch {
        pipeline: Arc<Pipeline>,
        bind_group: wgpu::BindGroup,
        params: u32,
        groups: [u32; 3],
    },
    /// From the submission's uploads.
    Upload {
        from: u64,
        to: wgpu::Buffer,
        to_offset: u64,
        bytes: u64,
    },
    Copy {
        from: wgpu::Buffer,
        from_offset: u64,
        to: wgpu::Buffer,
        to_offset: u64,
        bytes: u64,
    },
}

/// What was asked for and not submitted yet.
#[derive(Default)]
struct Record {
    commands: Vec<Command>,
    params: Vec<u8>,
    uploads: Vec<u8>,
    in_flight: VecDeque<wgpu::SubmissionIndex>,
    upload_buffer: Option<wgpu::Buffer>,
    download_buffer: Option<wgpu::Buffer>,
    submissions: usize,
    /// Buffers of parameters and what is to be in them, all but the last full, while a caller's encoder is recorded.
    recording: Option<Vec<(wgpu::Buffer, Vec<u8>)>>,
}

/// Forgets what was asked for while a caller's encoder was recorded, unless it has been encoded.
struct Recording<'a>(&'a Engine);

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        let mut record = lock(&self.0.record);
        record.recording = None;
        record.commands.clear();
        record.uploads.clear();
        drop(record);
        self.0.pool.end_recording();
    }
}

/// How a device computes products of large matrices.
fn matrices(settings: &Settings, device: &wgpu::Device) -> Matrices {
    let features = device.features();
    let enough = device.limits().max_compute_workgroup_storage_size >= 32_768;
    if !enough || !features.contains(wgpu::Features::SHADER_F16) {
        return Matrices::None;
    }
    if settings.emulate_matrices {
        return Matrices::Emulated;
    }
    let wanted = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SUBGROUP;
    if features.contains(wanted) { Matrices::Cooperative } else { Matrices::None }
}

/// A device with everything that operations need of it.
pub(super) struct Engine {
    pub(super) name: String,
    /// The name and what the adapter is called, for errors.
    title: String,
    pub(super) settings: Settings,
    device_type: wgpu::DeviceType,
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) limits: wgpu::Limits,
    pub(super) matrices: Matrices,
    pub(super) pool: Arc<Pool>,
    violations: AtomicUsize,
    failure: Arc<Mutex<Option<Failure>>>,
    pub(super) pipelines: Pipelines,
    params_buffer: wgpu::Buffer,
    pub(super) profile: Option<Profile>,
    record: Mutex<Record>,
    #[cfg(test)]
    trace: Mutex<Trace>,
}

/// Launches to be repeated elsewhere: of each permutation the one that binds the fewest bytes.
#[cfg(test)]
#[derive(Default)]
struct Trace {
    /// Launches that bind more bytes than this are not looked at; by default none is.
    largest: usize,
    launches: HashMap<Permutation, Traced>,
}

/// A launch, and what it has read and written.
#[cfg(test)]
#[derive(Debug, Clone)]
pub(super) struct Traced {
    pub(super) params: Vec<u8>,
    pub(super) groups: [u32; 3],
    pub(super) bindings: Vec<TracedBinding>,
    bytes: usize,
}

#[cfg(test)]
#[derive(Debug, Clone)]
pub(super) struct TracedBinding {
    pub(super) name: &'static str,
    pub(super) number: u32,
    pub(super) before: Vec<u8>,
    /// Of what is written.
    pub(super) after: Option<Vec<u8>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({})", self.name)
    }
}

impl Engine {
    pub(super) fn new(name: String, settings: Settings, device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let info = device.adapter_info();
        let title = format!("{name} ({})", info.name);
        let failure: Arc<Mutex<Option<Failure>>> = Arc::default();
        let of_errors = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&of_errors).get_or_insert(Failure::Other(error.to_string()));
        }));
        let of_loss = failure.clone();
        device.set_device_lost_callback(move |reason, message| {
            let message = if message.is_empty() { format!("{reason:?}") } else { message };
            // That it is lost is behind whatever else may have gone wrong.
            *lock(&of_loss) = Some(Failure::Lost(message));
        });
        let limits = device.limits();
        let matrices = matrices(&settings, &device);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let size = (PARAMS_STRIDE * LAUNCHES) as u64;
        let params_buffer = buffer::create(&device, &title, Some("params"), size, usage, false)?;
        let pool = Arc::new(Pool::new(title.clone(), device.clone()));
        let pipelines = Pipelines::new(device.clone(), settings.checked)
            .map_err(|reason| Error::Device { device: title.clone(), reason })?;
        let profile = if settings.profile { Profile::new(&device, &queue) } else { None };
        let mut engine = Self {
            name,
            title,
            settings,
            device_type: info.device_type,
            device,
            queue,
            limits,
            matrices,
            pool,
            violations: AtomicUsize::new(0),
            failure,
            pipelines,
            params_buffer,
            profile,
            record: Mutex::default(),
            #[cfg(test)]
            trace: Mutex::default(),
        };
        if matrices != Matrices::None && !engine.tried(matmul::matrices_hold(&engine, matrices)).unwrap_or(false) {
            engine.matrices = Matrices::None;
        }
        if engine.device.features().contains(wgpu::Features::SUBGROUP) {
            engine.pipelines.use_subgroups(engine.tried(engine.probe_subgroups()).unwrap_or(0));
        }
        engine.check()?;
        Ok(engine)
    }

    /// What came of trying a way of computing; none if the driver refuses it, which is forgotten then: there are others.
    pub(super) fn tried<T>(&self, found: Result<T>) -> Option<T> {
        if found.is_err() {
            let mut record = lock(&self.record);
            record.commands.clear();
            record.params.clear();
            record.uploads.clear();
            lock(&self.failure).take_if(|failure| matches!(failure, Failure::Other(_)));
        }
        found.ok()
    }

    /// How many invocations the device's subgroups have; 0 if shaders cannot use them: they count on subgroups of one
    /// size, with invocations in their order, and on shuffles that do what they should.
    fn probe_subgroups(&self) -> Result<u32> {
        let found = self.scratch(768, DType::U32)?;
        self.launch(Launch::new("subgroups", "probe").write("found", &found))?;
        let mut words = vec![0u32; 768];
        self.read(&found, bytemuck::cast_slice_mut(&mut words))?;
        let size = words[0];
        let holds = (0..256).all(|lane| {
            let place = lane as u32 % size.max(1);
            words[lane] == size && words[256 + lane] == place && words[512 + lane] == lane as u32 - place + size - 1
        });
        Ok(if size.is_power_of_two() && (4..=128).contains(&size) && holds { size } else { 0 })
    }

    /// A buffer as this backend's.
    fn raw<'b>(&self, buffer: &'b dyn Buffer) -> Result<&'b WgpuBuffer> {
        buffer::raw(buffer).ok_or_else(|| self.broken("a buffer lives on another device"))
    }

    /// Something that should not have happened.
    pub(super) fn broken(&self, reason: impl Into<String>) -> Error {
        Error::Device { device: self.title.clone(), reason: reason.into() }
    }

    /// What the device has reported since it was opened.
    fn check(&self) -> Result<()> {
        match lock(&self.failure).clone() {
            None => Ok(()),
            Some(Failure::Lost(reason)) => Err(Error::DeviceLost { device: self.title.clone(), reason }),
            Some(Failure::Other(reason)) => Err(self.broken(reason)),
        }
    }

    /// How often work was submitted so far.
    pub(super) fn submissions(&self) -> usize {
        lock(&self.record).submissions
    }

    /// Room for values that an operation needs while it runs.
    pub(super) fn scratch(&self, elements: usize, dtype: DType) -> Result<Scratch> {
        Ok(Scratch { buffer: Box::new(self.allocate(elements, dtype)?), elements })
    }

    /// Room for values.
    pub(super) fn allocate(&self, elements: usize, dtype: DType) -> Result<WgpuBuffer> {
        let bytes = elements.saturating_mul(dtype.size());
        let buffer = Pool::allocate(&self.pool, bytes, guards::are_wanted())?;
        if let Some(guard) = buffer.guard() {
            let words = vec![guards::PATTERN; (guard.end - guard.start) as usize];
            self.upload(&words, &buffer, guard.start)?;
        }
        Ok(buffer)
    }

    /// How many guarded buffers were written beyond their values, of all that were given back so far.
    pub(super) fn guard_violations(&self) -> usize {
        // A device that cannot copy any more reports that to whoever asks it for something next.
        let new = self.new_guard_violations().unwrap_or(0);
        new + self.violations.fetch_add(new, Ordering::SeqCst)
    }

    fn new_guard_violations(&self) -> Result<usize> {
        let buffers = self.pool.guarded();
        let bytes = buffers.iter().map(|(raw, end)| (raw.size() - end) as usize);
        let guards = Pool::allocate(&self.pool, bytes.clone().sum(), false)?;
        let mut to = 0;
        let mut record = lock(&self.record);
        for (from, end) in &buffers {
            let bytes = from.size() - end;
            let (from, to_buffer) = (from.clone(), guards.raw().clone());
            record.commands.push(Command::Copy { from, from_offset: *end, to: to_buffer, to_offset: to, bytes });
            to += bytes;
        }
        drop(record);
        let mut words = vec![0; to as usize];
        self.download(&guards, &mut words)?;
        let mut rest = words.as_slice();
        let violated = bytes.filter(|&bytes| {
            let (guard, behind) = rest.split_at(bytes);
            rest = behind;
            !guards::hold(guard)
        });
        let violated = violated.count();
        self.pool.keep(buffers.into_iter().map(|(raw, _)| raw));
        Ok(violated)
    }

    /// Whether the device is hardware of its own, not a program on the processor.
    pub(super) fn is_hardware(&self) -> bool {
        self.device_type != wgpu::DeviceType::Cpu
    }

    /// So many workgroups keep the device busy. WebGPU does not tell how many a device runs at a time.
    pub(super) fn enough_groups(&self) -> usize {
        if self.is_hardware() { 256 } else { 8 }
    }

    /// Records a launch.
    pub(super) fn launch(&self, mut launch: Launch<'_>) -> Result<()> {
        launch.check()?;
        let mut bound = Vec::with_capacity(launch.bound.len());
        for gpu::Bound { name, buffer, bytes, part, writes, .. } in std::mem::take(&mut launch.bound) {
            let buffer = self.raw(buffer)?;
            let whole = (bytes.next_multiple_of(4) as u64).max(4);
            let (offset, bytes) = match part {
                None => (0, whole),
                Some((range, base)) => {
                    // Offsets of bindings are multiples of 256 bytes; what lies between is an offset of elements.
                    let first = range.start - range.start % 64;
                    launch = launch.size(base, range.start - first);
                    (4 * first as u64, (4 * (range.end - first) as u64).max(4))
                }
            };
            // Guard words that follow can be written then, and that is noticed.
            let guard = buffer.guard().filter(|guard| guard.start == offset + bytes);
            let bytes = guard.map_or(bytes, |guard| guard.end - offset);
            bound.push(Bound { name, buffer, offset, bytes, writes });
        }
        let groups = match launch.groups {
            Groups::Grid(groups) => groups,
            // They are numbered `workgroup_id.x + workgroup_id.y * num_workgroups.x`, and those beyond the parameter
            // `groups` have nothing to do.
            Groups::Row(count) => {
                launch = launch.size("groups", count);
                let y = count.div_ceil(MOST_GROUPS).max(1);
                [count.div_ceil(y), y, usize::from(count > 0)]
            }
        };
        launch.check()?;
        if groups.contains(&0) {
            return Ok(());
        }
        let most = self.limits.max_compute_workgroups_per_dimension;
        if let Some(&groups) = groups.iter().find(|&&groups| groups > most as usize) {
            return Err(self.limit("max_compute_workgroups_per_dimension", groups as u64, u64::from(most)));
        }
        let groups = groups.map(|groups| groups as u32);
        let names = bound.iter().map(|bound| bound.name);
        let pipeline = self.pipelines.get(&launch.permutation, names).map_err(|reason| self.broken(reason))?;
        let permutation = &launch.permutation;
        let mut params = [0u8; PARAMS_STRIDE];
        for (i, (name, scalar)) in pipeline.params.iter().enumerate() {
            let value = launch.params.iter().find(|(of, ..)| of == name);
            let bits = match value {
                Some((_, of, bits)) if of == scalar => bits,
                Some(_) => return Err(self.broken(format!("{permutation}: `{name}` is of another type"))),
                None => return Err(self.broken(format!("{permutation} lacks `{name}`"))),
            };
            params[4 * i..4 * i + 4].copy_from_slice(&bits.to_ne_bytes());
        }
        if launch.params.len() != pipeline.params.len() {
            return Err(self.broken(format!("{permutation} has no room for all of its parameters")));
        }
        #[cfg(test)]
        let mut traced = self.before(&launch.permutation, &bound, &pipeline, (&params, groups))?;
        let mut record = lock(&self.record);
        let (params_buffer, at) = self.push_params(&mut record, &params)?;
        let mut entries = Vec::with_capacity(pipeline.bindings.len() + 1);
        if !pipeline.params.is_empty() {
            entries.push(wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &params_buffer,
                    offset: 0,
                    size: NonZeroU64::new((4 * pipeline.params.len()).next_multiple_of(16) as u64),
                }),
            });
        }
        for binding in &pipeline.bindings {
            let Some(Bound { buffer, offset, bytes, writes, .. }) =
                bound.iter().find(|bound| bound.name == binding.name)
            else {
                return Err(self.broken(format!("{permutation} lacks `{}`", binding.name)));
            };
            if *writes == binding.read_only {
                return Err(self.broken(format!("{permutation}: `{}` is bound to be written or not", binding.name)));
            }
            let most = self.limits.max_storage_buffer_binding_size;
            if *bytes > most {
                return Err(self.limit("max_storage_buffer_binding_size", *bytes, most));
            }
            buffer.mark();
            entries.push(wgpu::BindGroupEntry {
                binding: binding.number,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: buffer.raw(),
                    offset: *offset,
                    size: NonZeroU64::new(*bytes),
                }),
            });
        }
        if bound.len() != pipeline.bindings.len() {
            return Err(self.broken(format!("{permutation} has no use for all of its buffers")));
        }
        let bind_group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.layout,
            entries: &entries,
        });
        record.commands.push(Command::Launch { pipeline, bind_group, params: at, groups });
        #[cfg(test)]
        {
            drop(record);
            self.after(&launch.permutation, &bound, traced.take())?;
        }
        Ok(())
    }

    /// Puts a launch's parameters into the record, which is submitted first if it is full. Returns the buffer they will
    /// be in, and their place in it.
    fn push_params(&self, record: &mut Record, params: &[u8; PARAMS_STRIDE]) -> Result<(wgpu::Buffer, u32)> {
        let Some(buffers) = &mut record.recording else {
            if record.params.len() == PARAMS_STRIDE * LAUNCHES {
                self.submit_record(record)?;
            }
            let at = record.params.len() as u32;
            record.params.extend_from_slice(params);
            return Ok((self.params_buffer.clone(), at));
        };
        let full = PARAMS_STRIDE * RECORDED_LAUNCHES;
        if buffers.last().is_none_or(|(_, bytes)| bytes.len() == full) {
            let usage = wgpu::BufferUsages::UNIFORM;
            let buffer = buffer::create(&self.device, &self.title, Some("params"), full as u64, usage, true)?;
            buffers.push((buffer, Vec::with_capacity(full)));
        }
        let (buffer, bytes) = buffers.last_mut().ok_or_else(|| self.broken("no parameters"))?;
        let at = bytes.len() as u32;
        bytes.extend_from_slice(params);
        Ok((buffer.clone(), at))
    }

    pub(super) fn limit(&self, limit: &'static str, needed: u64, most: u64) -> Error {
        Error::Limit { device: self.title.clone(), limit, needed, most }
    }

    /// Records a copy of bytes from the host, to a place that is a multiple of 4.
    pub(super) fn upload(&self, bytes: &[u8], to: &WgpuBuffer, to_offset: u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        to.mark();
        let mut record = lock(&self.record);
        if bytes.len() > LARGE_UPLOAD && record.recording.is_none() {
            // Writes of the queue come before whatever is submitted later, and after what was before.
            self.submit_record(&mut record)?;
            let whole = bytes.len() - bytes.len() % 4;
            self.queue.write_buffer(to.raw(), to_offset, &bytes[..whole]);
            if whole < bytes.len() {
                let mut last = [0u8; 4];
                last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
                self.queue.write_buffer(to.raw(), to_offset + whole as u64, &last);
            }
            return self.check();
        }
        let from = record.uploads.len() as u64;
        record.uploads.extend_from_slice(bytes);
        let padded = record.uploads.len().next_multiple_of(16);
        record.uploads.resize(padded, 0);
        let (to, bytes) = (to.raw().clone(), bytes.len().next_multiple_of(4) as u64);
        record.commands.push(Command::Upload { from, to, to_offset, bytes });
        Ok(())
    }

    /// Records a copy of bytes, multiples of 4, from one buffer to another.
    pub(super) fn copy(&self, from: (&WgpuBuffer, u64), to: (&WgpuBuffer, u64), bytes: u64) {
        from.0.mark();
        to.0.mark();
        lock(&self.record).commands.push(Command::Copy {
            from: from.0.raw().clone(),
            from_offset: from.1,
            to: to.0.raw().clone(),
            to_offset: to.1,
            bytes,
        });
    }

    /// Waits for everything asked for and copies bytes to the host.
    pub(super) fn download(&self, from: &WgpuBuffer, bytes: &mut [u8]) -> Result<()> {
        self.download_from(from, 0, bytes)
    }

    fn download_from(&self, from: &WgpuBuffer, from_offset: u64, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return self.submit();
        }
        let size = bytes.len().next_multiple_of(4) as u64;
        let mut record = lock(&self.record);
        if record.recording.is_some() {
            let reason = "cannot be read before the encoder that is being recorded is submitted";
            return Err(Error::value("download", "tensor", reason));
        }
        let staging = match record.download_buffer.take().filter(|buffer| buffer.size() >= size) {
            Some(staging) => staging,
            None => {
                let room = size.next_power_of_two().max(4096).min(self.limits.max_buffer_size);
                let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                buffer::create(&self.device, &self.title, Some("download"), room, usage, false)?
            }
        };
        record.commands.push(Command::Copy {
            from: from.raw().clone(),
            from_offset,
            to: staging.clone(),
            to_offset: 0,
            bytes: size,
        });
        self.submit_record(&mut record)?;
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, 0..size, move |result| {
            // Nobody waits any more only if waiting has failed.
            let _ = sender.send(result);
        });
        let waited = self.device.poll(wgpu::PollType::wait_indefinitely());
        self.check()?;
        waited.map_err(|error| self.broken(error.to_string()))?;
        match receiver.try_recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(self.broken(error.to_string())),
            Err(_) => return Err(self.broken("a copy to the host was not finished")),
        }
        let view = staging.get_mapped_range(0..size).map_err(|error| self.broken(error.to_string()))?;
        bytes.copy_from_slice(&view[..bytes.len()]);
        drop(view);
        staging.unmap();
        record.in_flight.clear();
        record.download_buffer = Some(staging);
        drop(record);
        self.pipelines.save();
        self.check()
    }

    /// Copies bytes from the host.
    pub(super) fn write(&self, to: &Scratch, bytes: &[u8]) -> Result<()> {
        self.upload(bytes, self.raw(&*to.buffer)?, 0)
    }

    /// Copies bytes to the host.
    pub(super) fn read(&self, from: &Scratch, bytes: &mut [u8]) -> Result<()> {
        self.download(self.raw(&*from.buffer)?, bytes)
    }

    /// Hands everything recorded to the device, without waiting for it. While a caller's encoder is recorded there is
    /// nothing to hand over.
    pub(super) fn submit(&self) -> Result<()> {
        let mut record = lock(&self.record);
        if record.recording.is_some() { Ok(()) } else { self.submit_record(&mut record) }
    }

    /// Puts everything that is asked for meanwhile into a caller's encoder.
    pub(super) fn record<T>(&self, encoder: &mut wgpu::CommandEncoder, ask: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut record = lock(&self.record);
        if record.recording.is_some() {
            return Err(Error::value("record", "encoder", "cannot be recorded while another one is"));
        }
        self.submit_record(&mut record)?;
        record.recording = Some(Vec::new());
        self.pool.begin_recording();
        drop(record);
        let recording = Recording(self);
        let value = ask()?;
        let mut record = lock(&self.record);
        for (buffer, bytes) in record.recording.take().unwrap_or_default() {
            self.fill_mapped(&buffer, &bytes)?;
        }
        let mut uploads = None;
        if !record.uploads.is_empty() {
            let size = record.uploads.len() as u64;
            if size > self.limits.max_buffer_size {
                return Err(self.limit("max_buffer_size", size, self.limits.max_buffer_size));
            }
            let usage = wgpu::BufferUsages::COPY_SRC;
            let buffer = buffer::create(&self.device, &self.title, Some("uploads"), size, usage, true)?;
            self.fill_mapped(&buffer, &record.uploads)?;
            uploads = Some(buffer);
        }
        self.encode(&record.commands, uploads.as_ref(), encoder, None)?;
        drop(record);
        drop(recording);
        self.check()?;
        Ok(value)
    }

    /// Writes a buffer that is still mapped from when it was made.
    fn fill_mapped(&self, buffer: &wgpu::Buffer, bytes: &[u8]) -> Result<()> {
        if !bytes.is_empty() {
            let range = buffer.get_mapped_range_mut(0..bytes.len() as u64);
            range.map_err(|error| self.broken(error.to_string()))?.copy_from_slice(bytes);
        }
        buffer.unmap();
        Ok(())
    }

    fn submit_record(&self, record: &mut Record) -> Result<()> {
        self.check()?;
        if record.commands.is_empty() {
            return Ok(());
        }
        if !record.params.is_empty() {
            self.queue.write_buffer(&self.params_buffer, 0, &record.params);
        }
        if !record.uploads.is_empty() {
            let size = record.uploads.len() as u64;
            if record.upload_buffer.as_ref().is_none_or(|buffer| buffer.size() < size) {
                let usage = wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
                let room = size.next_power_of_two().min(self.limits.max_buffer_size);
                record.upload_buffer =
                    Some(buffer::create(&self.device, &self.title, Some("uploads"), room, usage, false)?);
            }
            if let Some(buffer) = &record.upload_buffer {
                self.queue.write_buffer(buffer, 0, &record.uploads);
            }
        }
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        self.encode(&record.commands, record.upload_buffer.as_ref(), &mut encoder, self.profile.as_ref())?;
        let index = self.queue.submit([encoder.finish()]);
        if let Some(profile) = &self.profile {
            let launches = record.commands.iter().filter_map(|command| match command {
                Command::Launch { pipeline, .. } => Some(pipeline.label()),
                _ => None,
            });
            profile.collect(&self.device, launches.collect::<Vec<_>>().into_iter());
        }
        record.commands.clear();
        record.params.clear();
        record.uploads.clear();
        record.submissions += 1;
        record.in_flight.push_back(index);
        let poll = if record.in_flight.len() > AHEAD {
            wgpu::PollType::Wait { submission_index: record.in_flight.pop_front(), timeout: None }
        } else {
            wgpu::PollType::Poll
        };
        let polled = self.device.poll(poll);
        self.check()?;
        polled.map(|_| ()).map_err(|error| self.broken(error.to_string()))
    }

    /// Writes commands into an encoder, when their pipelines are compiled; launches that follow each other share a
    /// pass.
    fn encode(
        &self,
        commands: &[Command],
        uploads: Option<&wgpu::Buffer>,
        encoder: &mut wgpu::CommandEncoder,
        profile: Option<&Profile>,
    ) -> Result<()> {
        let mut rest = commands;
        let mut launches = 0;
        while let Some(first) = rest.first() {
            match first {
                Command::Launch { .. } => {
                    let timestamp_writes = profile.and_then(|profile| profile.stamps_of(launches));
                    let description = wgpu::ComputePassDescriptor { label: None, timestamp_writes };
                    let mut pass = encoder.begin_compute_pass(&description);
                    while let Some(Command::Launch { pipeline, bind_group, params, groups: [x, y, z] }) = rest.first() {
                        pass.set_pipeline(self.pipelines.wait(pipeline).map_err(|reason| self.broken(reason))?);
                        let offsets: &[u32] = if pipeline.params.is_empty() { &[] } else { &[*params] };
                        pass.set_bind_group(0, bind_group, offsets);
                        pass.dispatch_workgroups(*x, *y, *z);
                        rest = &rest[1..];
                        launches += 1;
                        if profile.is_some() {
                            break;
                        }
                    }
                    continue;
                }
                Command::Upload { from, to, to_offset, bytes } => {
                    if let Some(uploads) = uploads {
                        encoder.copy_buffer_to_buffer(uploads, *from, to, *to_offset, *bytes);
                    }
                }
                Command::Copy { from, from_offset, to, to_offset, bytes } => {
                    encoder.copy_buffer_to_buffer(from, *from_offset, to, *to_offset, *bytes);
                }
            }
            rest = &rest[1..];
        }
        if let Some(profile) = profile {
            profile.resolve(launches, encoder);
        }
        Ok(())
    }
}

#[cfg(test)]
impl Engine {
    /// From now on keeps launches that bind so many bytes at most.
    pub(super) fn trace(&self, largest: usize) {
        lock(&self.trace).largest = largest;
    }

    /// What was kept.
    pub(super) fn traced(&self) -> HashMap<Permutation, Traced> {
        lock(&self.trace).launches.clone()
    }

    fn read_bound(&self, bound: &Bound<'_>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; bound.bytes as usize];
        self.download_from(bound.buffer, bound.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// What a launch binds, if it is to be kept.
    fn before(
        &self,
        permutation: &Permutation,
        bound: &[Bound<'_>],
        pipeline: &Pipeline,
        (params, groups): (&[u8; PARAMS_STRIDE], [u32; 3]),
    ) -> Result<Option<Traced>> {
        let bytes = bound.iter().map(|bound| bound.bytes as usize).sum();
        let trace = lock(&self.trace);
        if bytes > trace.largest || trace.launches.get(permutation).is_some_and(|kept| kept.bytes <= bytes) {
            return Ok(None);
        }
        drop(trace);
        let mut bindings = Vec::new();
        for bound in bound {
            let number = pipeline.bindings.iter().find(|binding| binding.name == bound.name).map(|found| found.number);
            let before = self.read_bound(bound)?;
            bindings.push(TracedBinding { name: bound.name, number: number.unwrap_or(0), before, after: None });
        }
        let size = if pipeline.params.is_empty() { 0 } else { (4 * pipeline.params.len()).next_multiple_of(16) };
        Ok(Some(Traced { params: params[..size].to_vec(), groups, bindings, bytes }))
    }

    fn after(&self, permutation: &Permutation, bound: &[Bound<'_>], traced: Option<Traced>) -> Result<()> {
        let Some(mut traced) = traced else { return Ok(()) };
        for (bound, binding) in bound.iter().zip(&mut traced.bindings) {
            if bound.writes {
                binding.after = Some(self.read_bound(bound)?);
            }
        }
        lock(&self.trace).launches.insert(permutation.clone(), traced);
        Ok(())
    }
}

/// A buffer of a launch, and what of it is bound.
struct Bound<'a> {
    name: &'static str,
    buffer: &'a WgpuBuffer,
    offset: u64,
    bytes: u64,
    writes: bool,
}

impl gpu::Engine for Engine {
    fn launch(&self, launch: Launch<'_>) -> Result<()> {
        self.launch(launch)
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(self.allocate(elements, dtype)?))
    }

    fn copy(&self, from: (&dyn Buffer, usize), to: (&dyn Buffer, usize), bytes: usize) -> Result<()> {
        self.copy((self.raw(from.0)?, from.1 as u64), (self.raw(to.0)?, to.1 as u64), bytes as u64);
        Ok(())
    }

    fn product(&self, product: &gpu::matmul::Product<'_>) -> Result<()> {
        matmul::product(self, product)
    }

    fn most_bound_bytes(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size
    }

    fn workspace(&self, values: usize) -> usize {
        self.settings.workspace.map_or(values, |most| values.min(most))
    }

    fn unbindable(&self, bytes: u64) -> Error {
        self.limit("max_storage_buffer_binding_size", bytes, self.limits.max_storage_buffer_binding_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::backend::guards::Guards;
    use crate::backend::wgpu::{Settings, Wgpu};

    fn open() -> Option<Device> {
        match Wgpu::open(0, Settings::default()) {
            Ok(opened) => Some(Device::new(opened)),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    #[test]
    fn a_write_beyond_a_guarded_buffer_is_noticed() {
        let Some(device) = open() else { return };
        let engine = &device.backend::<Wgpu>().unwrap().engine;
        let guards = Guards::raise();
        for elements in [0, 1, 63, 64, 65, 1000] {
            let buffer = engine.allocate(elements, DType::F32).unwrap();
            engine.upload(&vec![7; 4 * elements], &buffer, 0).unwrap();
        }
        assert_eq!(device.guard_violations(), 0);
        for elements in [1, 63, 64, 1000] {
            let before = device.guard_violations();
            let buffer = engine.allocate(elements, DType::F32).unwrap();
            let (end, size) = ((4 * elements) as u64, buffer.raw().size());
            assert!((256..512).contains(&(size - end)));
            engine.upload(&[7; 4], &buffer, if elements == 63 { size - 4 } else { end }).unwrap();
            drop(buffer);
            assert_eq!(device.guard_violations(), before + 1, "{elements}");
        }
        // A shader that writes one element too many.
        let before = device.guard_violations();
        let values = engine.scratch(100, DType::F32).unwrap();
        let fill = Launch::new("elementwise", "fill").write_part("output", &values, 0..100, "output_base");
        engine.launch(fill.float("value", 1.0).size("count", 101).row_of_groups(1)).unwrap();
        drop(values);
        assert_eq!(device.guard_violations(), before + 1);
        drop(guards);
        let unguarded = engine.allocate(100, DType::F32).unwrap();
        assert!(unguarded.guard().is_none());
    }

    #[test]
    fn launches_that_do_not_fit_their_shader_are_refused() {
        let Some(device) = open() else { return };
        let engine = &device.backend::<Wgpu>().unwrap().engine;
        let values = engine.scratch(64, DType::F32).unwrap();
        let fill = || Launch::new("elementwise", "fill").write_part("output", &values, 0..64, "output_base");
        // What it binds is known by its first launch.
        engine.launch(fill().size("count", 64).float("value", 1.0).row_of_groups(1)).unwrap();
        for (launch, expected) in [
            (fill().size("count", 64).row_of_groups(1), "lacks `value`"),
            (fill().size("count", 64).size("value", 1).row_of_groups(1), "`value` is of another type"),
            (fill().size("count", 64).float("value", 1.0).size("more", 1).row_of_groups(1), "no room for all"),
            (fill().flag("ACCUMULATE", true), "not among shaders/permutations"),
            (fill().size("count", usize::MAX).float("value", 1.0), "beyond 32 bits"),
            (fill().groups([1 << 16, 1, 1]), "max_compute_workgroups_per_dimension"),
            (Launch::new("elementwise", "scale").read("input", &values), "lacks"),
            (Launch::new("elementwise", "column").read("nothing", &values), "no buffer `nothing`"),
        ] {
            let error = engine.launch(launch).unwrap_err().to_string();
            assert!(error.contains(expected), "no `{expected}` in: {error}");
        }
        device.submit().unwrap();
    }
}
