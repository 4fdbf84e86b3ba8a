//! Launches of `merge_statistics`.

use std::ops::Range;

use super::{Bindable, Engine, Launch};
use crate::Result;
use crate::backend::operations::{MergeStatistics, STATISTICS};

/// Rows of a workgroup.
const GROUP: usize = 256;

/// Merges the statistics of some rows into others, which begin at the first row.
pub(crate) fn merge(
    engine: &dyn Engine,
    part: &dyn Bindable,
    rows: Range<usize>,
    statistics: &dyn Bindable,
) -> Result<()> {
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

pub(crate) fn forward(engine: &dyn Engine, arguments: MergeStatistics<'_>) -> Result<()> {
    let MergeStatistics { part, statistics } = arguments;
    merge(engine, part, 0..part.shape().rows(), &*statistics)
}
