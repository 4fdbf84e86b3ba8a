//! Work that is recorded once and run again and again.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaGraph, sys};

use super::Cuda;
use super::buffer::Pool;
use super::driver::{Gpu, Pinned};
use crate::backend::Device;
use crate::{Error, Result};

/// Work of a device that was recorded, see [`Cuda::capture`].
///
/// It reads and writes the same memory each time it runs: tensors that existed before, whose values may have changed in
/// the meantime, and those that were made while it was recorded. All of that is kept for it.
pub struct Graph {
    /// There until it is dropped.
    work: Option<Work>,
}

struct Work {
    graph: CudaGraph,
    gpu: Arc<Gpu>,
    pool: Arc<Pool>,
    recording: u64,
    /// What was copied from the host.
    _uploads: Vec<Pinned>,
    /// With the kernels that run.
    _device: Device,
}

// SAFETY: every thread may use the driver's handles, if not two at once.
unsafe impl Send for Work {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.work {
            Some(work) => write!(f, "Graph({:?}, {})", work.gpu, work.recording),
            None => f.write_str("Graph"),
        }
    }
}

impl Graph {
    /// Runs it, behind everything that was asked of the device before, without waiting for it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn launch(&self) -> Result<()> {
        let Some(work) = &self.work else { return Ok(()) };
        work.graph.launch().map_err(|error| work.gpu.refused("running a graph", error))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            work.pool.clone().drop_later(work);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // A device that fails does not run it any more either.
        let _ = self.gpu.synchronize();
        self.pool.forget_recording(self.recording);
    }
}

/// Ends a recording that failed.
struct Recording<'a> {
    cuda: &'a Cuda,
    /// Whether the stream is captured.
    captures: bool,
    ended: bool,
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if !self.ended {
            if self.captures {
                // What was recorded is dropped; that it could not be is why it failed.
                let _ = self.cuda.stream().end_capture(flags());
            }
            let number = self.cuda.engine.pool.end_recording();
            self.cuda.engine.take_uploads();
            self.cuda.engine.pool.forget_recording(number);
        }
    }
}

fn flags() -> sys::CUgraphInstantiate_flags {
    sys::CUgraphInstantiate_flags(0)
}

impl Cuda {
    /// Records everything that `ask` asks of the device, instead of running it, as a graph that runs with one call as
    /// often as one likes. That takes the time out of launching, which small computations mostly consist of.
    ///
    /// While `ask` runs nothing can be read back, and nobody else may use the device. Kernels that were never used before
    /// are compiled meanwhile; who asks for the same once before has memory and kernels at hand.
    ///
    /// ```no_run
    /// # use nearfar::backend::cuda::Cuda;
    /// # use nearfar::{Batch, Device, Objective, Tensor};
    /// # fn f(device: &Device, queries: &Tensor, documents: &Tensor) -> nearfar::Result<()> {
    /// let loss = || Objective::samtone().forward_backward(device, Batch::new(queries, documents));
    /// let (graph, out) = Cuda::capture(device, loss)?;
    /// for _ in 0..100 {
    ///     // Values of `queries` and `documents` change here …
    ///     graph.launch()?;
    /// }
    /// println!("{}", out.loss.to_scalar()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the device is none of CUDA, [`Error::Value`] if it is being recorded already or was opened
    /// with `profile`, what `ask` returns, and what the device reports.
    pub fn capture<T>(device: &Device, ask: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        let cuda = Self::of("capture", "device", device)?;
        let (gpu, pool) = (&cuda.engine.gpu, &cuda.engine.pool);
        if cuda.engine.profile.is_some() {
            return Err(Error::value("capture", "device", "is opened with `profile`, which waits for every launch"));
        }
        if !pool.begin_recording() {
            return Err(Error::value("capture", "device", "is being recorded already"));
        }
        let mut recording = Recording { cuda, captures: false, ended: false };
        // Other threads and this one may allocate and compile meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        cuda.stream().begin_capture(mode).map_err(|error| gpu.refused("recording a graph", error))?;
        recording.captures = true;
        let value = ask()?;
        recording.captures = false;
        let captured = cuda.stream().end_capture(flags()).map_err(|error| gpu.refused("recording a graph", error))?;
        let graph = captured.ok_or_else(|| gpu.broken("recording a graph: there is none"))?;
        recording.ended = true;
        let (number, uploads) = (pool.end_recording(), cuda.engine.take_uploads());
        let (gpu, pool, device) = (gpu.clone(), pool.clone(), device.clone());
        let work = Work { graph, gpu, pool, recording: number, _uploads: uploads, _device: device };
        Ok((Graph { work: Some(work) }, value))
    }
}
