//! Launches of `materialised`: what the method that stores its similarity matrices does beside products,
//! for [`bench`](crate::bench). Nobody else stores such a matrix.

use super::{Engine, Launch};
use crate::Result;
use crate::backend::Tensor;
use crate::error::DType;

/// Columns of a workgroup.
const GROUP: usize = 256;
/// Rows of an invocation that writes gradients.
const GRADIENT_ROWS: usize = 4;

/// Leaves out the diagonal of logits (N, N): nothing is compared with itself.
pub(crate) fn omit_diagonal(engine: &dyn Engine, logits: &mut Tensor) -> Result<()> {
    let count = logits.shape().rows();
    let groups = [count.div_ceil(GROUP), 1, 1];
    let launch = Launch::new("materialised", "omit_diagonal").write("logits", &*logits).size("count", count);
    engine.launch(launch.groups(groups))
}

/// The log-sum-exp of each row of a partition, whose entries are the rows of some matrices (N, N) and the columns of
/// those with a `true`, and what it adds to the losses: `losses[i] += weight · (log_sum_exp[i] − positives[i, i])`.
pub(crate) fn log_sum_exp(
    engine: &dyn Engine,
    entries: &[(&Tensor, bool)],
    positives: &Tensor,
    weight: f32,
    log_sum_exp: &mut Tensor,
    losses: &mut Tensor,
) -> Result<()> {
    let count = positives.shape().rows();
    // An invocation reads four rows of its part at a time, and the one that finishes reads all parts: both wait for
    // memory about as often.
    let part = count.div_ceil(count.isqrt().div_ceil(2).max(1)).next_multiple_of(4).max(4);
    let parts_of = |columns: bool| if columns { count.div_ceil(part) } else { 1 };
    let parts: usize = entries.iter().map(|&(_, columns)| parts_of(columns)).sum();
    let statistics = engine.scratch(2 * parts * count, DType::F32)?;
    let mut first = 0;
    for &(logits, columns) in entries {
        let launch = Launch::new("materialised", if columns { "column_statistics" } else { "row_statistics" })
            .read("logits", logits)
            .write("statistics", &statistics)
            .size("count", count)
            .size("first", first);
        engine.launch(if columns {
            launch.size("part", part).groups([count.div_ceil(GROUP), parts_of(columns), 1])
        } else {
            launch.groups([count, 1, 1])
        })?;
        first += parts_of(columns) * count;
    }
    engine.launch(
        Launch::new("materialised", "finish")
            .read("logits", positives)
            .read("statistics", &statistics)
            .write("log_sum_exp", &*log_sum_exp)
            .write("losses", &*losses)
            .size("count", count)
            .size("parts", parts)
            .float("weight", weight)
            .groups([count.div_ceil(GROUP), 1, 1]),
    )
}

/// Puts in place of logits (N, N) the gradient by them: of the softmaxes of their rows and of their columns, each given
/// by its log-sum-exps and its weight, less `positive` on the diagonal.
pub(crate) fn gradient(
    engine: &dyn Engine,
    logits: &mut Tensor,
    rows: Option<(&Tensor, f32)>,
    columns: Option<(&Tensor, f32)>,
    positive: f32,
) -> Result<()> {
    let count = logits.shape().rows();
    let mut launch = Launch::new("materialised", "gradient")
        .write("logits", &*logits)
        .size("count", count)
        .float("positive", positive)
        .groups([count.div_ceil(GROUP), count.div_ceil(GRADIENT_ROWS), 1]);
    if let Some((log_sum_exp, weight)) = rows {
        launch = launch.flag("ROWS", true).read("row_log_sum_exp", log_sum_exp).float("row_weight", weight);
    }
    if let Some((log_sum_exp, weight)) = columns {
        launch = launch.flag("COLUMNS", true).read("column_log_sum_exp", log_sum_exp).float("column_weight", weight);
    }
    engine.launch(launch)
}
