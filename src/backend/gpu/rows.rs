//! What launches have in common whose workgroups work on whole rows, or on several columns: see
//! `shared/rows` and `shared/columns` of the shaders and kernels.

use std::ops::Range;

/// Rows of a workgroup that works on rows.
pub(crate) const ROWS: usize = 8;

/// Columns of a workgroup that works on columns.
pub(crate) const COLUMNS: usize = 32;

/// The elements of a run of rows.
pub(crate) fn elements_of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
