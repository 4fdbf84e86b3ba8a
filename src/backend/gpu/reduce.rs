//! Launches of `reduce`.

use super::{Engine, Launch};
use crate::Result;
use crate::backend::Tensor;
use crate::backend::operations::{ColumnSum, SquareSum, Sum};
use crate::error::DType;

/// Elements that a workgroup adds, and rows of columns.
const PART: usize = 4096;
const PART_ROWS: usize = 128;
/// Columns of a workgroup.
const GROUP: usize = 256;

/// `output (+)= factor · Σ input`, or of its squares.
fn reduce(
    engine: &dyn Engine,
    input: &Tensor,
    squares: bool,
    factor: f32,
    output: &Tensor,
    accumulate: bool,
) -> Result<()> {
    let count = input.elements();
    // More than a line of workgroups would make parts longer.
    let part_size = PART.max(count.div_ceil(super::MOST_GROUPS).next_multiple_of(PART));
    let parts = count.div_ceil(part_size);
    let partial = engine.scratch(parts.max(1), DType::F32)?;
    let mut done = 0;
    for part in engine.parts(count, 1) {
        let groups = part.len().div_ceil(part_size);
        engine.launch(
            Launch::new("reduce", "sum")
                .flag("SQUARES", squares)
                .read_part("input", input, part.clone(), "input_base")
                .write("output", &partial)
                .size("count", part.len())
                .size("part", part_size)
                .size("output_base", done)
                .groups([groups, 1, 1]),
        )?;
        done += groups;
    }
    engine.launch(
        Launch::new("reduce", "finish")
            .flag("ACCUMULATE", accumulate)
            .read("input", &partial)
            .write("output", output)
            .size("count", done)
            .float("factor", factor),
    )
}

pub(crate) fn sum(engine: &dyn Engine, arguments: Sum<'_>) -> Result<()> {
    let Sum { input, factor, output, accumulate } = arguments;
    reduce(engine, input, false, factor, output, accumulate)
}

pub(crate) fn square_sum(engine: &dyn Engine, arguments: SquareSum<'_>) -> Result<()> {
    let SquareSum { input, output, accumulate } = arguments;
    reduce(engine, input, true, 1.0, output, accumulate)
}

/// `output[c] (+)= Σ_r input[r, c]`
pub(crate) fn column_sum_of(
    engine: &dyn Engine,
    input: &Tensor,
    rows: usize,
    width: usize,
    output: &Tensor,
    accumulate: bool,
) -> Result<()> {
    let columns = width.div_ceil(GROUP);
    let part_rows = PART_ROWS.max(rows.div_ceil(super::MOST_GROUPS));
    let partial = engine.scratch((rows.div_ceil(part_rows) + 8).max(1) * width, DType::F32)?;
    let mut done = 0;
    for part in engine.parts(rows, width) {
        let groups = part.len().div_ceil(part_rows);
        engine.launch(
            Launch::new("reduce", "column_sum")
                .read_part("input", input, part.start * width..part.end * width, "input_base")
                .write("output", &partial)
                .size("count", part.len())
                .size("width", width)
                .size("part", part_rows)
                .size("output_base", done * width)
                .groups([columns, groups, 1]),
        )?;
        done += groups;
    }
    engine.launch(
        Launch::new("reduce", "finish_columns")
            .flag("ACCUMULATE", accumulate)
            .read("input", &partial)
            .write("output", output)
            .size("count", done)
            .size("width", width)
            .groups([columns, 1, 1]),
    )
}

pub(crate) fn column_sum(engine: &dyn Engine, arguments: ColumnSum<'_>) -> Result<()> {
    let ColumnSum { input, output, accumulate } = arguments;
    let (rows, width) = (input.shape().rows(), input.shape().width());
    column_sum_of(engine, input, rows, width, output, accumulate)
}
