//! What any GPU does for an operation: which entry points run, over how much, and with what, in shaders or in kernels.
//!
//! One file an operation, named as its shader under `shaders/`, its kernel under `kernels/` and its twin in
//! [`cpu`](super::cpu). An [`Engine`] runs what is launched here; how it compiles, binds and multiplies matrices is its
//! own.

pub(super) mod cache;
mod launch;
mod permutations;
mod request;

pub(super) mod adamw;
pub(super) mod aggregate;
pub(super) mod attention;
pub(super) mod cast;
pub(super) mod dropout;
pub(super) mod elementwise;
pub(super) mod embedding;
pub(super) mod gelu;
pub(super) mod l2_norm;
pub(super) mod layer_norm;
#[cfg(feature = "train")]
pub(crate) mod materialised;
pub(super) mod matmul;
pub(super) mod merge_statistics;
pub(super) mod pair_scores;
pub(super) mod partition;
pub(super) mod pooling;
pub(super) mod positives;
pub(super) mod prefix_norms;
pub(super) mod reduce;
pub(super) mod row_function;
pub(super) mod row_sweep;
mod rows;

use std::ops::Range;

use super::Buffer;
use crate::error::DType;
use crate::{Error, Result};
pub(crate) use launch::{Bindable, Bound, Groups, Launch, Permutation, Scalar, Scratch};
use matmul::Product;
#[cfg(test)]
pub(crate) use permutations::permutations;
pub(crate) use permutations::{Listed, listed};
pub(crate) use request::Request;

/// Workgroups in one direction that every device allows.
pub(crate) const MOST_GROUPS: usize = 65_535;

/// A device with everything that operations need of it. What is asked for happens in the order in which it was asked for.
pub(crate) trait Engine {
    /// Asks for a launch.
    fn launch(&self, launch: Launch<'_>) -> Result<()>;

    /// Room for values, which hold anything.
    fn allocate(&self, elements: usize, dtype: DType) -> Result<Box<dyn Buffer>>;

    /// Asks for a copy of bytes, from and to some byte: all are multiples of 4.
    fn copy(&self, from: (&dyn Buffer, usize), to: (&dyn Buffer, usize), bytes: usize) -> Result<()>;

    /// Asks for a product of matrices.
    fn product(&self, product: &Product<'_>) -> Result<()>;

    /// The most bytes that can be bound at once.
    fn most_bound_bytes(&self) -> u64;

    /// Values of a workspace: so many, or fewer if the device was opened with fewer.
    fn workspace(&self, values: usize) -> usize;

    /// That something is beyond what can be bound.
    fn unbindable(&self, bytes: u64) -> Error;
}

impl dyn Engine + '_ {
    /// Room for values that an operation needs while it runs.
    pub(crate) fn scratch(&self, elements: usize, dtype: DType) -> Result<Scratch> {
        Ok(Scratch { buffer: self.allocate(elements, dtype)?, elements })
    }

    /// Cuts rows of some width, of f32, into runs that fit one binding each. Runs begin at multiples of 4,096 rows.
    pub(crate) fn parts(&self, rows: usize, width: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        // A binding may begin up to 63 elements before its run.
        let most = (self.most_bound_bytes() / 4) as usize - 64;
        let fit = (most / width.max(1)).min(1 << 28);
        let step = if fit > 4096 { fit - fit % 4096 } else { fit.max(1) };
        (0..rows).step_by(step).map(move |first| first..rows.min(first + step))
    }

    /// Asks for a copy of elements of 4 bytes.
    pub(crate) fn copy_elements(
        &self,
        (from, first): (&dyn Bindable, usize),
        (to, to_first): (&dyn Bindable, usize),
        elements: usize,
    ) -> Result<()> {
        if elements == 0 {
            return Ok(());
        }
        self.copy((from.bind().0, 4 * first), (to.bind().0, 4 * to_first), 4 * elements)
    }
}

/// The methods of a backend for operations, of a list of them and the functions, under `backend`, that launch them.
macro_rules! delegate {
    ($($operation:ident($arguments:ident) => $($function:ident)::+;)*) => {
        fn supported() -> &'static [&'static str] {
            &[$(stringify!($operation)),*]
        }

        fn operations(&self) -> &'static [&'static str] {
            Self::supported()
        }

        $(
            fn $operation(&self, arguments: $crate::backend::operations::$arguments<'_>) -> $crate::Result<()> {
                $crate::backend::$($function)::+(&self.engine, arguments)
            }
        )*
    };
}
pub(super) use delegate;

/// The methods of a backend for all operations of a GPU, run by its field `engine`; similarity sweeps are those of a
/// module.
macro_rules! implement_operations {
    ($($sweeps:ident)::+) => {
        $crate::backend::gpu::delegate! {
            fill(Fill) => gpu::elementwise::fill;
            copy(Copy) => gpu::elementwise::copy;
            cast(Cast) => gpu::cast::forward;
            add(Add) => gpu::elementwise::add;
            scale(Scale) => gpu::elementwise::scale;
            sum(Sum) => gpu::reduce::sum;
            square_sum(SquareSum) => gpu::reduce::square_sum;
            column_sum(ColumnSum) => gpu::reduce::column_sum;
            matmul(MatMul) => gpu::matmul::forward;
            gelu_backward(GeluBackward) => gpu::gelu::backward;
            dropout(DropoutInPlace) => gpu::dropout::forward;
            layer_norm_forward(LayerNormForward) => gpu::layer_norm::forward;
            layer_norm_backward(LayerNormBackward) => gpu::layer_norm::backward;
            embedding_forward(EmbeddingForward) => gpu::embedding::forward;
            embedding_backward(EmbeddingBackward) => gpu::embedding::backward;
            attention_forward(AttentionForward) => gpu::attention::forward;
            attention_backward(AttentionBackward) => gpu::attention::backward;
            pooling_forward(PoolingForward) => gpu::pooling::forward;
            pooling_backward(PoolingBackward) => gpu::pooling::backward;
            l2_norm_forward(L2NormForward) => gpu::l2_norm::forward;
            l2_norm_backward(L2NormBackward) => gpu::l2_norm::backward;
            l2_norm_gradient(L2NormGradient) => gpu::l2_norm::gradient;
            positives_forward(PositivesForward) => gpu::positives::forward;
            positives_backward(PositivesBackward) => gpu::positives::backward;
            similarity_sweep_forward(SimilaritySweepForward) => $($sweeps)::+::forward;
            similarity_sweep_backward(SimilaritySweepBackward) => $($sweeps)::+::backward;
            similarity_sweep_one_way(SimilaritySweepOneWay) => $($sweeps)::+::one_way;
            merge_statistics(MergeStatistics) => gpu::merge_statistics::forward;
            partition(Partition) => gpu::partition::forward;
            prefix_norms_forward(PrefixNormsForward) => gpu::prefix_norms::forward;
            prefix_norms_backward(PrefixNormsBackward) => gpu::prefix_norms::backward;
            column(Column) => gpu::elementwise::column;
            clamp(Clamp) => gpu::elementwise::clamp;
            clamp_backward(ClampBackward) => gpu::elementwise::clamp_backward;
            row_sweep(RowSweep) => gpu::row_sweep::forward_backward;
            aggregate(AggregateRows) => gpu::aggregate::forward;
            adamw(AdamW) => gpu::adamw::step;
            pair_scores(PairScores) => gpu::pair_scores::forward;
        }
    };
}
pub(super) use implement_operations;
