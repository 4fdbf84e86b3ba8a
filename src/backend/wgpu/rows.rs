//! What launches have in common whose workgroups work on whole rows, or on several columns: see
//! `shaders/shared/rows.wgsl` and `shaders/shared/columns.wgsl`.

use std::ops::Range;

/// Rows of a workgroup that works on rows.
pub(super) const ROWS: usize = 8;

/// Columns of a workgroup that works on columns.
pub(super) const COLUMNS: usize = 32;

/// The elements of a run of rows.
pub(super) fn elements_of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
