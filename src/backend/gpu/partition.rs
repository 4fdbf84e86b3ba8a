//! Launches of `partition`.

use std::ops::Range;

use super::merge_statistics::merge;
use super::{Bindable, Engine, Launch};
use crate::Result;
use crate::backend::operations::{Partition, STATISTICS};
use crate::error::DType;

/// Rows of a workgroup.
const GROUP: usize = 256;

/// Finishes some rows, with the statistics of further blocks, which are those of these rows alone.
pub(crate) fn rows(
    engine: &dyn Engine,
    arguments: &Partition<'_>,
    range: Range<usize>,
    further: &[&dyn Bindable],
) -> Result<()> {
    // A shader cannot bind as many buffers as there may be blocks: their statistics are merged first.
    let count = range.len();
    let merged = engine.scratch(count * STATISTICS, DType::F32)?;
    let blocks = arguments.statistics.iter().map(|&block| (block as &dyn Bindable, range.clone()));
    let blocks: Vec<_> = blocks.chain(further.iter().map(|&block| (block, 0..count))).collect();
    for (number, (block, of)) in blocks.iter().enumerate() {
        if number == 0 {
            engine.copy_elements((*block, of.start * STATISTICS), (&merged, 0), count * STATISTICS)?;
        } else {
            merge(engine, *block, of.clone(), &merged)?;
        }
    }
    let launch = Launch::new("partition", "forward")
        .read("similarity", arguments.similarity)
        .read("log_scale", arguments.log_scale)
        .read_if("ROW_WEIGHTS", "row_weights", arguments.row_weights)
        .write("coefficients", &*arguments.coefficients)
        .write("losses", &*arguments.losses)
        .write("gradient", &*arguments.gradient)
        .write("d_log_scale", &*arguments.d_log_scale)
        .size("rows", count)
        .size("first_row", range.start)
        .float("positives", arguments.positives as f32)
        .float("smoothing", arguments.label_smoothing)
        .float("margin", arguments.margin)
        .float("weight", arguments.weight)
        .float("average", arguments.average)
        .row_of_groups(count.div_ceil(GROUP));
    engine.launch(launch.read_if("BLOCKS", "statistics", (!blocks.is_empty()).then_some(&merged)))
}

pub(crate) fn forward(engine: &dyn Engine, arguments: Partition<'_>) -> Result<()> {
    rows(engine, &arguments, 0..arguments.similarity.elements(), &[])
}
