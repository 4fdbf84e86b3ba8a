//! Sweeps over a similarity matrix that is never stored.
//!
//! The matrix is cut into blocks of [`STRIP`] rows by at most [`PANEL`] columns, and a block into tiles of [`TILE`]
//! columns. Blocks follow each other in a fixed order; the tiles of a block are tasks. A tile owns the statistics and
//! the gradient of its columns, so nothing is added up by more than one task, and rows are finished after the tiles,
//! in their order. A block's logits are the only workspace: [`STRIP`] × [`PANEL`] numbers, whatever the batch.
//!
//! A Gram is swept by the blocks on and right of its diagonal: what a block says about its columns it says about the
//! rows of the mirrored block.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{read, write};
use super::gemm::{MatMut, MatRef, multiply};
use super::simd::{LANES, exp, largest_of, multiply_add, total, vectorised};
use crate::Result;
use crate::backend::operations::{NO_ENTRY, SimilarityMatrix, SimilaritySweepBackward, SimilaritySweepForward};

/// Rows of a block.
const STRIP: usize = 256;
/// Columns of a tile: with [`STRIP`] rows a quarter of a MiB, which fits in a core's own cache.
const TILE: usize = 256;
/// Columns of a block at most: with [`STRIP`] rows a workspace of 8 MiB.
const PANEL: usize = 32 * TILE;
/// Rows whose gradient one task computes from a block's coefficients.
const TASK_ROWS: usize = 64;

/// The matrix in host memory.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    rows: &'a [f32],
    columns: &'a [f32],
    /// (R, C, d)
    extents: (usize, usize, usize),
    gram: bool,
    scale: f32,
    exclude_diagonal: bool,
    keys: Option<(&'a [u32], &'a [u32])>,
}

/// A rectangle of the matrix.
#[derive(Debug, Clone, PartialEq)]
struct Block {
    rows: Range<usize>,
    columns: Range<usize>,
    /// Whether it lies on the diagonal of a Gram: then it is symmetric and its rows say everything.
    symmetric: bool,
}

impl<'a> Matrix<'a> {
    fn new(operation: &'static str, matrix: SimilarityMatrix<'a>) -> Result<Self> {
        let rows = read::<f32>(operation, "rows", matrix.rows)?;
        let key = |argument, keys| read::<u32>(operation, argument, keys);
        Ok(Self {
            rows,
            columns: matrix.columns.map(|columns| read(operation, "columns", columns)).transpose()?.unwrap_or(rows),
            extents: matrix.extents(),
            gram: matrix.columns.is_none(),
            scale: read::<f32>(operation, "log_scale", matrix.log_scale)?[0].exp(),
            exclude_diagonal: matrix.exclude_diagonal,
            keys: match matrix.keys {
                Some((rows, columns)) => Some((key("row keys", rows)?, key("column keys", columns)?)),
                None => None,
            },
        })
    }

    fn blocks(&self) -> Vec<Block> {
        let (rows, columns, _) = self.extents;
        let mut blocks = Vec::new();
        for first in (0..rows).step_by(STRIP) {
            let strip = first..rows.min(first + STRIP);
            if self.gram {
                blocks.push(Block { rows: strip.clone(), columns: strip.clone(), symmetric: true });
            }
            let start = if self.gram { strip.end } else { 0 };
            for first in (start..columns).step_by(PANEL) {
                blocks.push(Block {
                    rows: strip.clone(),
                    columns: first..columns.min(first + PANEL),
                    symmetric: false,
                });
            }
        }
        blocks
    }

    /// The logits of a tile, [`NO_ENTRY`] where an entry is left out.
    fn logits(&self, rows: &Range<usize>, columns: &Range<usize>, output: &mut [f32]) {
        let (.., d) = self.extents;
        let width = columns.len();
        let rows_view = MatRef::new(&self.rows[rows.start * d..rows.end * d], rows.len(), d, d);
        let columns_view = MatRef::new(&self.columns[columns.start * d..columns.end * d], width, d, d);
        multiply(
            MatMut::new(output, rows.len(), width, width),
            rows_view,
            columns_view.transposed(),
            self.scale,
            false,
        );
        if let Some((row_keys, column_keys)) = self.keys {
            for (&row, output) in row_keys[rows.clone()].iter().zip(output.chunks_exact_mut(width)) {
                for (&column, output) in column_keys[columns.clone()].iter().zip(output) {
                    *output = if row == column { NO_ENTRY } else { *output };
                }
            }
        }
        if self.exclude_diagonal {
            for row in rows.start.max(columns.start)..rows.end.min(columns.end) {
                output[(row - rows.start) * width + row - columns.start] = NO_ENTRY;
            }
        }
    }
}

/// Statistics of a row or column: largest logit, sum of exponentials, sum of logits, number of entries.
type Statistics = [f32; 4];

const NOTHING: Statistics = [NO_ENTRY, 0.0, 0.0, 0.0];

/// The statistics of two sets of entries together.
fn merge(a: Statistics, b: Statistics) -> Statistics {
    let maximum = a[0].max(b[0]);
    if maximum == NO_ENTRY {
        return NOTHING;
    }
    let part = |x: Statistics| if x[0] == NO_ENTRY { 0.0 } else { x[1] * (x[0] - maximum).exp() };
    [maximum, part(a) + part(b), a[2] + b[2], a[3] + b[3]]
}

vectorised! {
    fn row_statistics(logits: &[f32]) -> Statistics {
        let n = logits.len();
        let maximum = largest_of(n, NO_ENTRY, |i| logits[i]);
        let (mut exponentials, mut sums, mut counts) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for logits in logits.chunks(LANES) {
            for (lane, z) in logits.iter().enumerate() {
                let counts_here = *z > NO_ENTRY;
                exponentials[lane] += if counts_here { exp::<FUSED>(*z - maximum) } else { 0.0 };
                sums[lane] += if counts_here { *z } else { 0.0 };
                counts[lane] += if counts_here { 1.0 } else { 0.0 };
            }
        }
        [maximum, total(exponentials), total(sums), total(counts)]
    }
}

vectorised! {
    /// The statistics of each column of a tile, merged into those of the tiles above it.
    fn merge_column_statistics(logits: &[f32], width: usize, statistics: &mut [Statistics], scratch: &mut [f32]) {
        let (maximum, rest) = scratch.split_at_mut(width);
        let (exponentials, rest) = rest.split_at_mut(width);
        let (sums, rest) = rest.split_at_mut(width);
        let counts = &mut rest[..width];
        maximum.fill(NO_ENTRY);
        for row in logits.chunks_exact(width) {
            for (maximum, z) in maximum.iter_mut().zip(row) {
                *maximum = if *z > *maximum { *z } else { *maximum };
            }
        }
        exponentials.fill(0.0);
        sums.fill(0.0);
        counts.fill(0.0);
        for row in logits.chunks_exact(width) {
            let columns = row.iter().zip(&*maximum).zip(&mut *exponentials).zip(&mut *sums).zip(&mut *counts);
            for ((((z, maximum), exponential), sum), count) in columns {
                let counts_here = *z > NO_ENTRY;
                *exponential += if counts_here { exp::<FUSED>(*z - *maximum) } else { 0.0 };
                *sum += if counts_here { *z } else { 0.0 };
                *count += if counts_here { 1.0 } else { 0.0 };
            }
        }
        for (c, statistics) in statistics.iter_mut().enumerate() {
            *statistics = merge(*statistics, [maximum[c], exponentials[c], sums[c], counts[c]]);
        }
    }
}

pub(super) fn forward(arguments: SimilaritySweepForward<'_>) -> Result<()> {
    const OPERATION: &str = "similarity_sweep_forward";
    let matrix = Matrix::new(OPERATION, arguments.matrix)?;
    let statistics = |argument, tensor: Option<_>| -> Result<Option<&mut [Statistics]>> {
        let Some(tensor) = tensor else { return Ok(None) };
        let statistics = write::<f32>(OPERATION, argument, tensor)?.as_chunks_mut().0;
        statistics.fill(NOTHING);
        Ok(Some(statistics))
    };
    let mut of_rows = statistics("row_statistics", arguments.row_statistics)?;
    let mut of_columns = statistics("column_statistics", arguments.column_statistics)?;
    let rows_wanted = of_rows.is_some();
    for block in matrix.blocks() {
        // In a Gram the columns of a block right of the diagonal are rows further down.
        let mut nobody = Vec::new();
        let columns: &mut [Statistics] = match (&mut of_rows, &mut of_columns) {
            _ if block.symmetric => &mut nobody,
            (Some(rows), _) if matrix.gram => &mut rows[block.columns.clone()],
            (_, Some(columns)) => &mut columns[block.columns.clone()],
            _ => &mut nobody,
        };
        let tiles = block.columns.len().div_ceil(TILE);
        let wanted: Vec<Option<&mut [Statistics]>> = if columns.is_empty() {
            (0..tiles).map(|_| None).collect()
        } else {
            columns.chunks_mut(TILE).map(Some).collect()
        };
        let parts: Vec<Vec<Statistics>> = wanted
            .into_par_iter()
            .enumerate()
            .map_init(
                || (vec![0.0; STRIP * TILE], vec![0.0; 4 * TILE]),
                |(logits, scratch), (tile, columns)| {
                    let first = block.columns.start + tile * TILE;
                    let range = first..block.columns.end.min(first + TILE);
                    let logits = &mut logits[..block.rows.len() * range.len()];
                    matrix.logits(&block.rows, &range, logits);
                    if let Some(columns) = columns {
                        merge_column_statistics(logits, range.len(), columns, scratch);
                    }
                    if rows_wanted {
                        logits.chunks_exact(range.len()).map(row_statistics).collect()
                    } else {
                        Vec::new()
                    }
                },
            )
            .collect();
        if let Some(of_rows) = &mut of_rows {
            for part in parts {
                for (statistics, part) in of_rows[block.rows.clone()].iter_mut().zip(part) {
                    *statistics = merge(*statistics, part);
                }
            }
        }
    }
    Ok(())
}

/// The coefficients of a row or column: log-sum-exp, weight, smoothing, 0.
type Coefficients = [f32; 4];

/// What a side without a partition has: no weight.
const NO_WEIGHT: Coefficients = [0.0; 4];

vectorised! {
    /// Replaces the logits of a row by the gradient of the loss with respect to them; returns Σ gradient · logit.
    ///
    /// `columns` are the log-sum-exps, weights and smoothings of the columns, empty if they have no partition.
    fn row_gradient(logits: &mut [f32], row: Coefficients, columns: [&[f32]; 3]) -> f32 {
        let [log_sum_exp, weight, smoothing, _] = row;
        let mut along = [0.0; LANES];
        if columns[0].is_empty() {
            for logits in logits.chunks_mut(LANES) {
                for (lane, z) in logits.iter_mut().enumerate() {
                    let g = multiply_add::<FUSED>(weight, exp::<FUSED>(*z - log_sum_exp), -smoothing);
                    let g = if *z > NO_ENTRY { g } else { 0.0 };
                    let finite = if *z > NO_ENTRY { *z } else { 0.0 };
                    along[lane] = multiply_add::<FUSED>(g, finite, along[lane]);
                    *z = g;
                }
            }
        } else {
            let [sums, weights, smoothings] = columns;
            let chunks = sums.chunks(LANES).zip(weights.chunks(LANES)).zip(smoothings.chunks(LANES));
            for (logits, ((sums, weights), smoothings)) in logits.chunks_mut(LANES).zip(chunks) {
                let columns = sums.iter().zip(weights).zip(smoothings).enumerate();
                for (z, (lane, ((column_sum, column_weight), column_smoothing))) in logits.iter_mut().zip(columns) {
                    let of_row = multiply_add::<FUSED>(weight, exp::<FUSED>(*z - log_sum_exp), -smoothing);
                    let of_column =
                        multiply_add::<FUSED>(*column_weight, exp::<FUSED>(*z - *column_sum), -*column_smoothing);
                    let g = if *z > NO_ENTRY { of_row + of_column } else { 0.0 };
                    let finite = if *z > NO_ENTRY { *z } else { 0.0 };
                    along[lane] = multiply_add::<FUSED>(g, finite, along[lane]);
                    *z = g;
                }
            }
        }
        total(along)
    }
}

pub(super) fn backward(arguments: SimilaritySweepBackward<'_>) -> Result<()> {
    const OPERATION: &str = "similarity_sweep_backward";
    let matrix = Matrix::new(OPERATION, arguments.matrix)?;
    let (rows, columns, d) = matrix.extents;
    let coefficients = |argument, tensor: Option<_>| -> Result<Option<&[Coefficients]>> {
        tensor.map(|tensor| Ok(read::<f32>(OPERATION, argument, tensor)?.as_chunks().0)).transpose()
    };
    let of_rows = coefficients("row_coefficients", arguments.row_coefficients)?;
    let of_columns = coefficients("column_coefficients", arguments.column_coefficients)?;
    let of_columns = if matrix.gram { of_rows } else { of_columns };
    // Column coefficients one kind after the other, as vector code reads them.
    let split: [Vec<f32>; 3] = std::array::from_fn(|kind| of_columns.unwrap_or(&[]).iter().map(|c| c[kind]).collect());
    let d_rows = write::<f32>(OPERATION, "d_rows", arguments.d_rows)?;
    let mut d_columns = arguments.d_columns.map(|tensor| write::<f32>(OPERATION, "d_columns", tensor)).transpose()?;
    let d_log_scale = write::<f32>(OPERATION, "d_log_scale", arguments.d_log_scale)?;
    if rows == 0 || columns == 0 || d == 0 {
        return Ok(());
    }

    let widest = columns.min(if matrix.gram { PANEL.max(STRIP) } else { PANEL });
    let mut workspace = vec![0.0f32; rows.min(STRIP) * widest];
    let mut along = vec![0.0f64; rows];
    for block in matrix.blocks() {
        let strip = block.rows.len();
        let (above, below) = match &mut d_columns {
            Some(d_columns) => (&mut d_rows[..], &mut d_columns[block.columns.start * d..block.columns.end * d]),
            None if block.symmetric => (&mut d_rows[..], &mut [][..]),
            None => {
                let (above, below) = d_rows.split_at_mut(block.columns.start * d);
                (above, &mut below[..block.columns.len() * d])
            }
        };
        let strip_view = MatRef::new(&matrix.rows[block.rows.start * d..block.rows.end * d], strip, d, d);
        let mut of_tiles: Vec<&mut [f32]> = below.chunks_mut(TILE * d).collect();
        of_tiles.resize_with(block.columns.len().div_ceil(TILE), || &mut []);
        let parts: Vec<Vec<f32>> = workspace
            .par_chunks_mut(strip * TILE)
            .zip(of_tiles)
            .enumerate()
            .map(|(tile, (logits, d_columns))| {
                let first = block.columns.start + tile * TILE;
                let range = first..block.columns.end.min(first + TILE);
                let width = range.len();
                let logits = &mut logits[..strip * width];
                matrix.logits(&block.rows, &range, logits);
                let side = |kind: usize| if split[kind].is_empty() { &[][..] } else { &split[kind][range.clone()] };
                let columns = [side(0), side(1), side(2)];
                let parts = logits
                    .chunks_exact_mut(width)
                    .zip(block.rows.clone())
                    .map(|(logits, row)| row_gradient(logits, of_rows.map_or(NO_WEIGHT, |rows| rows[row]), columns))
                    .collect();
                if !d_columns.is_empty() {
                    let gradient = MatRef::new(logits, strip, width, width).transposed();
                    multiply(MatMut::new(d_columns, width, d, d), gradient, strip_view, matrix.scale, true);
                }
                parts
            })
            .collect();
        // A diagonal block of a Gram holds each pair of entries twice.
        let share = if block.symmetric { 0.5 } else { 1.0 };
        for part in parts {
            for (along, part) in along[block.rows.clone()].iter_mut().zip(part) {
                *along += share * f64::from(part);
            }
        }
        let workspace = &workspace;
        let d_strip = &mut above[block.rows.start * d..block.rows.end * d];
        d_strip.par_chunks_mut(TASK_ROWS * d).enumerate().for_each(|(task, d_rows)| {
            let first = task * TASK_ROWS;
            let count = d_rows.len() / d;
            for (tile, gradient) in workspace.chunks(strip * TILE).enumerate() {
                let start = block.columns.start + tile * TILE;
                if start >= block.columns.end {
                    break;
                }
                let width = block.columns.end.min(start + TILE) - start;
                let gradient = MatRef::new(&gradient[first * width..(first + count) * width], count, width, width);
                let columns = MatRef::new(&matrix.columns[start * d..(start + width) * d], width, d, d);
                multiply(MatMut::new(d_rows, count, d, d), gradient, columns, matrix.scale, true);
            }
        });
    }
    for (output, along) in d_log_scale.iter_mut().zip(along) {
        *output += along as f32;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_entry_once() {
        for (rows, columns, gram) in
            [(1, 1, true), (300, 300, true), (700, 700, true), (300, 9000, false), (5, 1, false)]
        {
            let matrix = Matrix {
                rows: &[],
                columns: &[],
                extents: (rows, columns, 1),
                gram,
                scale: 1.0,
                exclude_diagonal: true,
                keys: None,
            };
            let mut seen = vec![0u8; rows * columns];
            for block in matrix.blocks() {
                for r in block.rows.clone() {
                    for c in block.columns.clone() {
                        seen[r * columns + c] += 1;
                        if gram && !block.symmetric {
                            seen[c * columns + r] += 1;
                        }
                    }
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "{rows}×{columns}");
        }
    }

    #[test]
    fn statistics_merge_like_sets() {
        let (a, b) = (row_statistics(&[1.0, NO_ENTRY, 3.0]), row_statistics(&[2.0]));
        let [maximum, sum, logits, entries] = merge(a, b);
        assert_eq!((maximum, logits, entries), (3.0, 6.0, 3.0));
        let exact = f64::exp(-2.0) + 1.0 + f64::exp(-1.0);
        assert!((f64::from(sum) - exact).abs() < 1e-6);
        assert_eq!(merge(NOTHING, b), b);
        assert_eq!(merge(NOTHING, NOTHING), NOTHING);
        assert_eq!(row_statistics(&[NO_ENTRY; 3]), NOTHING);
    }
}
