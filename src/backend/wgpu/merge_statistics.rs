//! Launches of `shaders/merge_statistics.wgsl`.

use std::ops::Range;

use super::engine::{Bindable, Engine, Launch};
use crate::Result;
use crate::backend::operations::{MergeStatistics, STATISTICS};

/// Rows of a workgroup.
const GROUP: usize = 256;

/// Merges the statistics of some rows into others, which begin at the first row.
pub(super) fn merge(engine: &Engine, part: &dyn Bindable, rows: Range<usize>, statistics: &dyn Bindable) -> Result<()> {
    let count = rows.len();
    engine.launch(
        Launch::new("merge_statistics", "forward")
            .read_part("part", part, rows.start * STATISTICS..rows.end * STATISTICS, "part_base")
            .write("statistics", statistics)
            .size("statistics_base", 0)
            .size("rows", count)
            .row_of_groups(count.div_ceil(GROUP)),
    )
}

pub(super) fn forward(engine: &Engine, arguments: MergeStatistics<'_>) -> Result<()> {
    let MergeStatistics { part, statistics } = arguments;
    merge(engine, part, 0..part.shape().rows(), &*statistics)
}
