//! The processor: the backend that is always there.
//!
//! One file an operation, named as its shader and its kernel. Work is cut into pieces by shape alone, never by the
//! number of threads, and partial sums are added in a fixed order, so results are the same bits on one thread and on
//! a hundred.

mod adamw;
mod aggregate;
mod attention;
pub(crate) mod buffer;
mod cast;
mod dropout;
mod elementwise;
mod embedding;
mod gelu;
mod gemm;
mod l2_norm;
mod layer_norm;
mod matmul;
mod merge_statistics;
mod pair_scores;
mod partition;
mod pooling;
mod positives;
mod prefix_norms;
mod reduce;
mod row_function;
mod row_sweep;
pub(crate) mod simd;
mod similarity_sweep;

use std::sync::Arc;

use super::{Backend, Buffer, Tensor, operations};
use crate::Result;
use crate::error::DType;
use buffer::Pool;

/// The processor this program runs on.
#[derive(Debug, Default)]
pub struct Cpu {
    pool: Arc<Pool>,
}

impl Cpu {
    /// The processor, with a memory pool of its own.
    pub fn new() -> Self {
        Self::default()
    }
}

macro_rules! delegate {
    ($($operation:ident($arguments:ident) => $module:ident::$function:ident;)*) => {
        fn supported() -> &'static [&'static str] {
            &[$(stringify!($operation)),*]
        }

        fn operations(&self) -> &'static [&'static str] {
            Self::supported()
        }

        $(
            fn $operation(&self, arguments: operations::$arguments<'_>) -> Result<()> {
                $module::$function(arguments)
            }
        )*
    };
}

impl Backend for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn description(&self) -> String {
        format!("{} threads, {}", rayon::current_num_threads(), simd::level())
    }

    fn is_synchronous(&self) -> bool {
        true
    }

    fn prefers_one_way(&self, columns: usize) -> bool {
        similarity_sweep::is_one_way_worth_it(columns)
    }

    fn guard_violations(&self) -> usize {
        self.pool.guard_violations()
    }

    fn held_bytes(&self) -> Option<usize> {
        Some(self.pool.taken())
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(Pool::allocate(&self.pool, elements.saturating_mul(dtype.size()))?))
    }

    fn upload(&self, bytes: &[u8], tensor: &mut Tensor) -> Result<()> {
        buffer::write::<u8>("upload", "tensor", tensor)?.copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, tensor: &Tensor, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(buffer::read::<u8>("download", "tensor", tensor)?);
        Ok(())
    }

    delegate! {
        fill(Fill) => elementwise::fill;
        copy(Copy) => elementwise::copy;
        cast(Cast) => cast::forward;
        add(Add) => elementwise::add;
        scale(Scale) => elementwise::scale;
        sum(Sum) => reduce::sum;
        square_sum(SquareSum) => reduce::square_sum;
        column_sum(ColumnSum) => reduce::column_sum;
        matmul(MatMul) => matmul::forward;
        gelu_backward(GeluBackward) => gelu::backward;
        dropout(DropoutInPlace) => dropout::forward;
        layer_norm_forward(LayerNormForward) => layer_norm::forward;
        layer_norm_backward(LayerNormBackward) => layer_norm::backward;
        embedding_forward(EmbeddingForward) => embedding::forward;
        embedding_backward(EmbeddingBackward) => embedding::backward;
        attention_forward(AttentionForward) => attention::forward;
        attention_backward(AttentionBackward) => attention::backward;
        pooling_forward(PoolingForward) => pooling::forward;
        pooling_backward(PoolingBackward) => pooling::backward;
        l2_norm_forward(L2NormForward) => l2_norm::forward;
        l2_norm_backward(L2NormBackward) => l2_norm::backward;
        l2_norm_gradient(L2NormGradient) => l2_norm::gradient;
        positives_forward(PositivesForward) => positives::forward;
        positives_backward(PositivesBackward) => positives::backward;
        similarity_sweep_forward(SimilaritySweepForward) => similarity_sweep::forward;
        similarity_sweep_backward(SimilaritySweepBackward) => similarity_sweep::backward;
        similarity_sweep_one_way(SimilaritySweepOneWay) => similarity_sweep::one_way;
        merge_statistics(MergeStatistics) => merge_statistics::forward;
        partition(Partition) => partition::forward;
        prefix_norms_forward(PrefixNormsForward) => prefix_norms::forward;
        prefix_norms_backward(PrefixNormsBackward) => prefix_norms::backward;
        column(Column) => elementwise::column;
        clamp(Clamp) => elementwise::clamp;
        clamp_backward(ClampBackward) => elementwise::clamp_backward;
        row_sweep(RowSweep) => row_sweep::forward_backward;
        aggregate(AggregateRows) => aggregate::forward;
        adamw(AdamW) => adamw::step;
        pair_scores(PairScores) => pair_scores::forward;
    }
}

/// Rows that one task of a row-wise operation works on. Fixed, so that the order of partial sums is.
const TASK_ROWS: usize = 128;

/// Elements that one task of an elementwise operation works on.
const TASK_ELEMENTS: usize = 1 << 15;

/// Checks that offsets of a packed batch rise from 0 to `rows`, and returns the bounds of each sequence.
fn sequences(
    operation: &'static str,
    offsets: &[u32],
    rows: usize,
) -> Result<impl ExactSizeIterator<Item = std::ops::Range<usize>> + Clone> {
    let rise = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    if !rise || offsets.first() != Some(&0) || offsets.last().map(|&end| end as usize) != Some(rows) {
        return Err(crate::Error::value(operation, "offsets", format!("must rise from 0 to the {rows} rows")));
    }
    Ok(offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize))
}

/// Cuts a matrix of rows of some width at the bounds of consecutive sequences.
fn split_rows(
    mut data: &mut [f32],
    width: usize,
    sequences: impl Iterator<Item = std::ops::Range<usize>>,
) -> Vec<&mut [f32]> {
    let cut = |rows: std::ops::Range<usize>| {
        let (piece, rest) = std::mem::take(&mut data).split_at_mut(rows.len() * width);
        data = rest;
        piece
    };
    sequences.map(cut).collect()
}
