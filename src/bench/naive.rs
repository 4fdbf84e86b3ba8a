//! The loss as one would write it down: every similarity matrix stored, its softmax, and matrix products for the
//! gradients.
//!
//! It is written with care, so that what it is compared with has something to beat: products are the device's own,
//! the loops over matrices are written for the device as the fused kernels are, nothing is waited for before the end,
//! and the gradient of a matrix replaces the matrix.

mod host;

use super::matrices;
use crate::backend::cpu::buffer::read;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use crate::backend::gpu::{Engine, materialised};
use crate::backend::operations::{Activation, Copy, L2NormBackward, L2NormForward, MatMul, Scale, Sum};
use crate::error::DType;
use crate::objective::plan::{Side, Sweep};
use crate::objective::relations::Relations;
use crate::{Device, Error, Objective, Result, Similarity, Tensor};

const OPERATION: &str = "naive loss";

/// The naive method is left out where its matrices would take more than this.
pub const MAXIMUM_NAIVE_BYTES: usize = 2 << 30;

/// What the similarity matrices of a batch take in single precision; `None` if that is more than can be counted.
pub fn naive_bytes(objective: &Objective, rows: usize) -> Option<usize> {
    rows.checked_mul(rows)?.checked_mul(4)?.checked_mul(matrices(objective).len())
}

/// Who loops over stored matrices; the functions are those of [`host`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Loops {
    /// This program, in memory of its own.
    Host,
    /// Shaders or kernels, on a device.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    Gpu(Device),
}

impl Loops {
    /// Those that can loop over a device's matrices.
    pub(super) fn of(device: &Device) -> Option<Self> {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if crate::backend::engine_of(device).is_some() {
            return Some(Self::Gpu(device.clone()));
        }
        let is_host = device.zeros([1]).is_ok_and(|tensor| read::<f32>(OPERATION, "tensor", &tensor).is_ok());
        is_host.then_some(Self::Host)
    }

    /// The bytes of the largest matrix that they can loop over.
    pub(super) fn most_bytes(&self) -> u64 {
        match self {
            Self::Host => u64::MAX,
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Self::Gpu(device) => crate::backend::engine_of(device).map_or(0, Engine::most_bound_bytes),
        }
    }

    fn omit_diagonal(&self, logits: &mut Tensor) -> Result<()> {
        match self {
            Self::Host => host::omit_diagonal(logits),
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Self::Gpu(device) => materialised::omit_diagonal(engine(device)?, logits),
        }
    }

    fn log_sum_exp(
        &self,
        entries: &[(&Tensor, bool)],
        positives: &Tensor,
        weight: f32,
        log_sum_exp: &mut Tensor,
        losses: &mut Tensor,
    ) -> Result<()> {
        match self {
            Self::Host => host::log_sum_exp(entries, positives, weight, log_sum_exp, losses),
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Self::Gpu(device) => {
                materialised::log_sum_exp(engine(device)?, entries, positives, weight, log_sum_exp, losses)
            }
        }
    }

    fn gradient(
        &self,
        logits: &mut Tensor,
        rows: Option<(&Tensor, f32)>,
        columns: Option<(&Tensor, f32)>,
        positive: f32,
    ) -> Result<()> {
        match self {
            Self::Host => host::gradient(logits, rows, columns, positive),
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Self::Gpu(device) => materialised::gradient(engine(device)?, logits, rows, columns, positive),
        }
    }
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn engine(device: &Device) -> Result<&dyn Engine> {
    crate::backend::engine_of(device).ok_or_else(|| Error::value(OPERATION, "device", "is no GPU"))
}

/// Whether a device's memory is the program's own.
pub(super) fn is_host(device: &Device) -> bool {
    Loops::of(device) == Some(Loops::Host)
}

/// The loss and its gradients.
pub(super) struct Naive {
    pub(super) loss: f32,
    /// (N, d)
    pub(super) d_queries: Tensor,
    /// (N, d)
    pub(super) d_documents: Tensor,
}

/// Embeddings as they are compared, and their gradient.
struct Embeddings {
    unit: Tensor,
    inverse_norm: Option<Tensor>,
    gradient: Tensor,
}

impl Embeddings {
    fn new(device: &Device, input: &Tensor, similarity: Similarity) -> Result<Self> {
        let input = &input.cast(DType::F32)?;
        let gradient = device.zeros(input.shape().clone())?;
        if similarity == Similarity::Dot {
            return Ok(Self { unit: input.clone(), inverse_norm: None, gradient });
        }
        let mut unit = device.empty(input.shape().clone(), DType::F32)?;
        let mut inverse_norm = device.empty([input.shape().rows()], DType::F32)?;
        device.l2_norm_forward(L2NormForward { input, output: &mut unit, inverse_norm: &mut inverse_norm })?;
        Ok(Self { unit, inverse_norm: Some(inverse_norm), gradient })
    }

    /// From the gradient of the embeddings as they are compared to that of the input.
    fn backward(self, device: &Device) -> Result<Tensor> {
        let Some(inverse_norm) = &self.inverse_norm else { return Ok(self.gradient) };
        let mut d_input = device.empty(self.unit.shape().clone(), DType::F32)?;
        let (upstream, output) = (&self.gradient, &self.unit);
        device.l2_norm_backward(L2NormBackward { upstream, output, inverse_norm, d_input: &mut d_input })?;
        Ok(d_input)
    }
}

fn product(
    device: &Device,
    a: &Tensor,
    transpose_a: bool,
    b: &Tensor,
    transpose_b: bool,
    output: &mut Tensor,
    accumulate: bool,
) -> Result<()> {
    device.matmul(MatMul {
        a,
        transpose_a,
        b,
        transpose_b,
        bias: None,
        activation: Activation::Identity,
        accumulate,
        output,
    })
}

/// A similarity matrix, and the partitions that its rows and columns stand in.
struct Matrix {
    sweep: Sweep,
    logits: Tensor,
}

impl Matrix {
    /// How its entries stand in the rows of a partition: as they are, or with its columns for rows.
    fn entries(&self, partition: usize) -> impl Iterator<Item = (&Tensor, bool)> {
        let uses = [(self.sweep.row_partition, false), (self.sweep.column_partition, true)];
        uses.into_iter().filter(move |(of, _)| *of == Some(partition)).map(|(_, columns)| (&self.logits, columns))
    }
}

/// Computes the loss of queries and documents (N, d) and its gradients, on a device that [`Loops`] know and for an
/// objective of plain softmaxes over whole blocks.
pub(super) fn forward_backward(
    objective: &Objective,
    device: &Device,
    queries: &Tensor,
    documents: &Tensor,
) -> Result<Naive> {
    let unsupported = || Error::Unsupported { operation: OPERATION, device: device.name() };
    let loops = Loops::of(device).ok_or_else(unsupported)?;
    let n = queries.shape().rows();
    let kind = objective.similarity_kind();
    let mut queries = Embeddings::new(device, queries, kind)?;
    let mut documents = Embeddings::new(device, documents, kind)?;
    let scale = device.tensor(&[objective.log_scale().exp() as f32], [1])?;

    let mut matrices = Vec::new();
    for sweep in objective.plan(false, &Relations::default()).sweeps {
        let unit = |side| if side == Side::Queries { &queries.unit } else { &documents.unit };
        let (input, elements) = (unit(sweep.rows), unit(sweep.rows).elements());
        let mut scaled = device.empty(input.shape().clone(), DType::F32)?;
        let output = &mut scaled;
        device.copy(Copy { input, input_offset: 0, output, output_offset: 0, elements, accumulate: false })?;
        device.scale(Scale { factor: &scale, output: &mut scaled })?;
        let mut logits = device.empty([n, n], DType::F32)?;
        product(device, &scaled, false, unit(sweep.columns), true, &mut logits, false)?;
        if sweep.is_gram() {
            // Nothing is compared with itself.
            loops.omit_diagonal(&mut logits)?;
        }
        matrices.push(Matrix { sweep, logits });
    }
    let Some(rectangle) = matrices.iter().position(|matrix| !matrix.sweep.is_gram()) else {
        return Err(Error::value(OPERATION, "objective", "compares no queries with documents"));
    };

    let mut losses = device.zeros([n])?;
    let mut log_sum_exps = Vec::new();
    let weights: Vec<f64> = objective.partitions().iter().map(|partition| partition.weight / n as f64).collect();
    for (p, weight) in weights.iter().enumerate() {
        let entries: Vec<(&Tensor, bool)> = matrices.iter().flat_map(|matrix| matrix.entries(p)).collect();
        let mut log_sum_exp = device.empty([n], DType::F32)?;
        let positives = &matrices[rectangle].logits;
        loops.log_sum_exp(&entries, positives, *weight as f32, &mut log_sum_exp, &mut losses)?;
        log_sum_exps.push(log_sum_exp);
    }

    // The targets of each partition sum to one, and all of them are positives.
    let target = weights.iter().sum::<f64>() as f32;
    for (number, Matrix { sweep, logits }) in matrices.iter_mut().enumerate() {
        let softmax = |partition: Option<usize>| partition.map(|p| (&log_sum_exps[p], weights[p] as f32));
        let positive = if number == rectangle { target } else { 0.0 };
        loops.gradient(logits, softmax(sweep.row_partition), softmax(sweep.column_partition), positive)?;
        let gradient = &*logits;
        for (side, other, transposed) in [(sweep.rows, sweep.columns, false), (sweep.columns, sweep.rows, true)] {
            let unit = if other == Side::Queries { queries.unit.clone() } else { documents.unit.clone() };
            let output = if side == Side::Queries { &mut queries.gradient } else { &mut documents.gradient };
            product(device, gradient, transposed, &unit, false, output, true)?;
        }
    }
    device.scale(Scale { factor: &scale, output: &mut queries.gradient })?;
    device.scale(Scale { factor: &scale, output: &mut documents.gradient })?;
    let (d_queries, d_documents) = (queries.backward(device)?, documents.backward(device)?);
    let mut loss = device.empty([1], DType::F32)?;
    device.sum(Sum { input: &losses, factor: 1.0, output: &mut loss, accumulate: false })?;
    // Operations run in order: this waits for the gradients too.
    Ok(Naive { loss: loss.to_scalar()?, d_queries, d_documents })
}
