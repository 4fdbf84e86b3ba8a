//! Launches of `row_function`.

use std::ops::Range;

use super::{Bindable, Engine, Launch};
use crate::Result;
use crate::backend::Tensor;
use crate::objective::RowFunction;

/// Rows of a workgroup that collects.
const GROUP: usize = 256;
/// Values of an outcome: a row's statistics, its loss, and two gradients.
pub(crate) const OUTCOME: usize = 11;

/// The number of a row function in the shader, and its numbers.
fn numbered(function: RowFunction) -> (u32, [f64; 2]) {
    match function {
        RowFunction::CrossEntropy => (0, [0.0; 2]),
        RowFunction::LogSumPositives => (1, [0.0; 2]),
        RowFunction::EachPositive => (2, [0.0; 2]),
        RowFunction::Decoupled => (3, [0.0; 2]),
        RowFunction::Debiased { prior } => (4, [prior, 0.0]),
        RowFunction::HybridNce { alpha, hardness } => (5, [alpha, hardness]),
        RowFunction::Sigmoid => (6, [0.0; 2]),
        RowFunction::Hinge { margin } => (7, [margin, 0.0]),
        RowFunction::HardestNegative { margin } => (8, [margin, 0.0]),
        RowFunction::LogMeanExp => (9, [0.0; 2]),
        RowFunction::Alignment => (10, [0.0; 2]),
    }
}

/// The rows of a strip and what they hold.
pub(crate) struct Rows<'a> {
    pub(crate) rows: Range<usize>,
    /// Rows of the batch.
    pub(crate) pairs: usize,
    /// Columns of a row at each of so many widths.
    pub(crate) stride: usize,
    pub(crate) widths: usize,
    pub(crate) logits: &'a dyn Bindable,
    pub(crate) similarities: &'a dyn Bindable,
    pub(crate) positives: &'a dyn Bindable,
    pub(crate) outcomes: &'a dyn Bindable,
}

/// What a row function is evaluated with.
pub(crate) struct Evaluation<'a> {
    pub(crate) function: RowFunction,
    pub(crate) at_width: usize,
    /// Of each row's loss, beside its own.
    pub(crate) weight: f64,
    pub(crate) average: f32,
    pub(crate) smoothing: f64,
    /// A teacher's logits by row and column, where those of the strip begin, and what they are multiplied with.
    pub(crate) teacher: Option<(&'a dyn Bindable, usize, f64)>,
    pub(crate) log_scale: &'a Tensor,
    pub(crate) row_weights: Option<&'a Tensor>,
    pub(crate) upstream: Option<&'a Tensor>,
    /// Whether logits become gradients.
    pub(crate) backward: bool,
}

/// Evaluates the rows of a strip at one width.
pub(crate) fn evaluate(engine: &dyn Engine, rows: &Rows<'_>, evaluation: &Evaluation<'_>) -> Result<()> {
    let (function, [parameter, hardness]) = numbered(evaluation.function);
    let mut launch = Launch::new("row_function", "evaluate")
        .constant("FUNCTION", function)
        .flag("BACKWARD", evaluation.backward)
        .write("logits", rows.logits)
        .read("positives", rows.positives)
        .write("outcomes", rows.outcomes)
        .read("log_scale", evaluation.log_scale)
        .read_if("ROW_WEIGHTS", "row_weights", evaluation.row_weights)
        .size("rows", rows.rows.len())
        .size("first_row", rows.rows.start)
        .size("pairs", rows.pairs)
        .size("widths", rows.widths)
        .size("at_width", evaluation.at_width)
        .size("stride", rows.stride)
        .float("weight", evaluation.weight as f32)
        .float("average", evaluation.average)
        .float("parameter", parameter as f32)
        .float("hardness", hardness as f32)
        .float("smoothing", evaluation.smoothing as f32)
        .groups([rows.rows.len(), 1, 1]);
    if evaluation.backward {
        launch = launch.read("similarities", rows.similarities).read_if("UPSTREAM", "upstream", evaluation.upstream);
    }
    if let Some((teacher, first, scale)) = evaluation.teacher {
        let range = first..first + rows.rows.len() * rows.stride;
        launch = launch
            .flag("TEACHER", true)
            .read_part("teacher", teacher, range, "teacher_base")
            .float("teacher_scale", scale as f32);
    }
    engine.launch(launch)
}

/// What outcomes are collected into.
pub(crate) struct Collected<'a> {
    pub(crate) losses: Option<&'a Tensor>,
    pub(crate) statistics: Option<&'a Tensor>,
    pub(crate) d_log_scale: Option<&'a Tensor>,
    pub(crate) d_bias: Option<&'a Tensor>,
}

/// Adds the outcomes of a strip, of all widths, to what is wanted of them.
pub(crate) fn collect(engine: &dyn Engine, rows: &Rows<'_>, into: &Collected<'_>) -> Result<()> {
    engine.launch(
        Launch::new("row_function", "collect")
            .read("outcomes", rows.outcomes)
            .write_if("GIVE_LOSSES", "losses", into.losses)
            .write_if("GIVE_STATISTICS", "statistics", into.statistics)
            .write_if("GIVE_D_LOG_SCALE", "d_log_scale", into.d_log_scale)
            .write_if("GIVE_D_BIAS", "d_bias", into.d_bias)
            .size("rows", rows.rows.len())
            .size("first_row", rows.rows.start)
            .size("pairs", rows.pairs)
            .size("widths", rows.widths)
            .row_of_groups(rows.rows.len().div_ceil(GROUP)),
    )
}
