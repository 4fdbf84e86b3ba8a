//! What launches have in common whose workgroups work on whole rows, see `shaders/shared/rows.wgsl`.

use std::ops::Range;

/// Rows of a workgroup.
pub(super) const ROWS: usize = 8;

/// The elements of a run of rows.
pub(super) fn elements_of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
