//! Launches of `shaders/similarity_sweep.wgsl`.
//!
//! The matrix is cut into panels whose partial statistics, or gradients, fit a workspace that does not grow with it.

use std::ops::Range;

use super::engine::{Bindable, Engine, Launch, Scratch};
use super::matmul::{self, Finish, Operand, Output, Product, tile_size};
use super::partition;
use crate::Result;
use crate::backend::Tensor;
use crate::backend::operations::{
    STATISTICS, SimilarityMatrix, SimilaritySweepBackward, SimilaritySweepForward, SimilaritySweepOneWay,
};
use crate::error::DType;

/// Rows of a workgroup that packs or merges.
const GROUP: usize = 256;
/// Values of a workspace: 32 MiB.
const WORKSPACE: usize = 8 << 20;
/// Planes of what is packed of a side: norm, key, exponent, weight, share.
const PLANES: usize = 5;

/// What is swept, as the shader wants it.
struct Sweep<'a> {
    matrix: SimilarityMatrix<'a>,
    /// The columns, of a Gram the rows.
    columns: &'a Tensor,
    /// (R, C, d)
    extents: (usize, usize, usize),
    tile: usize,
    packed_rows: Scratch,
    /// None for a Gram.
    packed_columns: Option<Scratch>,
}

/// Some tiles.
struct Panel {
    rows: Range<usize>,
    columns: Range<usize>,
}

/// One side's norms, keys and coefficients in one buffer.
fn pack(
    engine: &Engine,
    matrix: &SimilarityMatrix<'_>,
    rows: usize,
    norms: Option<&Tensor>,
    keys: Option<&Tensor>,
    coefficients: Option<&Tensor>,
) -> Result<Scratch> {
    let packed = engine.scratch((PLANES * rows).max(1), DType::U32)?;
    if norms.is_none() && keys.is_none() && coefficients.is_none() {
        return Ok(packed);
    }
    let launch = Launch::new("similarity_sweep", "pack")
        .read_if("NORMS", "norms", norms)
        .read_if("KEYS", "keys", keys)
        .read_if("COEFFICIENTS", "coefficients", coefficients)
        .write("packed", &packed)
        .size("rows", rows)
        .row_of_groups(rows.div_ceil(GROUP));
    engine.launch(if coefficients.is_some() { launch.read("log_scale", matrix.log_scale) } else { launch })?;
    Ok(packed)
}

impl<'a> Sweep<'a> {
    fn new(
        engine: &Engine,
        matrix: SimilarityMatrix<'a>,
        of_rows: Option<&Tensor>,
        of_columns: Option<&Tensor>,
    ) -> Result<Self> {
        let extents = matrix.extents();
        let (rows, columns, _) = extents;
        let (row_norms, column_norms) = matrix.norms.unzip();
        let (row_keys, column_keys) = matrix.keys.unzip();
        let packed_rows = pack(engine, &matrix, rows, row_norms, row_keys, of_rows)?;
        let packed_columns = match matrix.columns {
            Some(_) => Some(pack(engine, &matrix, columns, column_norms, column_keys, of_columns)?),
            None => None,
        };
        Ok(Self {
            columns: matrix.columns.unwrap_or(matrix.rows),
            tile: tile_size(engine, rows, columns),
            matrix,
            extents,
            packed_rows,
            packed_columns,
        })
    }

    fn is_gram(&self) -> bool {
        self.matrix.columns.is_none()
    }

    /// Panels of so many values at most, each as near a square as there are rows; those of some rows alone.
    fn panels(&self, rows: Range<usize>, values: usize) -> Vec<Panel> {
        let (_, columns, d) = self.extents;
        let side = (values.isqrt() / self.tile).max(1) * self.tile;
        let height = side.min(rows.len().next_multiple_of(self.tile)).max(1);
        let width = (values / height / self.tile).max(1) * self.tile;
        // A panel's columns and rows fit a binding, whatever their width.
        let (width, height) = (width.min((1 << 24) / d.max(1) / self.tile * self.tile).max(self.tile), height);
        let size = if self.is_gram() { height.min(width) } else { height };
        let width = if self.is_gram() { size } else { width };
        let mut panels = Vec::new();
        for first in rows.clone().step_by(size) {
            let strip = first..rows.end.min(first + size);
            let from = if self.is_gram() { first } else { 0 };
            for first in (from..columns).step_by(width) {
                panels.push(Panel { rows: strip.clone(), columns: first..columns.min(first + width) });
            }
        }
        panels
    }

    /// A launch over the tiles of a panel.
    fn launch<'s>(&'s self, entry: &'static str, panel: &Panel) -> Launch<'s> {
        let (rows, columns, d) = self.extents;
        let of = |range: &Range<usize>| range.start * d..range.end * d;
        Launch::new("similarity_sweep", entry)
            .constant("TILE", self.tile as u32)
            .flag("NORMS", self.matrix.norms.is_some())
            .flag("KEYS", self.matrix.keys.is_some())
            .read_part("rows", self.matrix.rows, of(&panel.rows), "rows_base")
            .read_part("columns", self.columns, of(&panel.columns), "columns_base")
            .read("packed_rows", &self.packed_rows)
            .read("packed_columns", self.packed_columns.as_ref().unwrap_or(&self.packed_rows))
            .read("log_scale", self.matrix.log_scale)
            .size("rows", panel.rows.len())
            .size("columns", panel.columns.len())
            .size("first_row", panel.rows.start)
            .size("first_column", panel.columns.start)
            .size("width", d)
            .size("all_rows", rows)
            .size("all_columns", columns)
            .bits("has_diagonal", u32::from(self.matrix.diagonal.is_some()))
            .signed("diagonal", self.matrix.diagonal.map_or(0, |offset| i32::try_from(offset).unwrap_or(i32::MAX)))
            .bits("gram", u32::from(self.is_gram()))
            .groups([panel.columns.len().div_ceil(self.tile), panel.rows.len().div_ceil(self.tile), 1])
    }

    /// Values of whole tiles that fit into what is kept and into a binding.
    fn kept_values(&self, engine: &Engine, kept: usize) -> usize {
        let most = (engine.limits.max_storage_buffer_binding_size / 4) as usize;
        let tile = self.tile * self.tile;
        kept.min(most) / tile * tile
    }

    /// The statistics of some rows, and of all columns in these rows. `kept` receives the logits of those rows' tiles, as
    /// many as have room.
    fn statistics(
        &self,
        engine: &Engine,
        sums: bool,
        rows: Range<usize>,
        of_rows: Option<&dyn Bindable>,
        of_columns: Option<&dyn Bindable>,
        kept: Option<(&dyn Bindable, usize)>,
    ) -> Result<()> {
        let quantities = if sums { STATISTICS } else { 3 };
        let tile = self.tile;
        let of_columns = if self.is_gram() { of_rows } else { of_columns };
        // Each tile has so many values for each of its rows and columns: as many for each entry of its matrix.
        let values = WORKSPACE / (2 * quantities) * tile;
        let mut begun: Vec<usize> = Vec::new();
        for panel in self.panels(rows.clone(), values) {
            let (height, width) = (panel.rows.len(), panel.columns.len());
            let tiles = (height.div_ceil(tile), width.div_ceil(tile));
            let column_partials = quantities * height * tiles.1;
            let partials = engine.scratch(column_partials + quantities * width * tiles.0, DType::F32)?;
            let mut launch = self
                .launch("forward", &panel)
                .constant("QUANTITIES", quantities as u32)
                .flag("COLUMNS", of_columns.is_some())
                .write("output", &partials)
                .size("column_partials", column_partials);
            launch = match kept {
                Some((kept, values)) if values > 0 => {
                    launch.flag("KEPT", true).write_part_whole("kept", kept, values).size("kept_values", values)
                }
                _ => launch.size("kept_values", 0),
            };
            engine.launch(launch)?;
            let diagonal = self.is_gram() && panel.rows.start == panel.columns.start;
            let merge = |statistics: &dyn Bindable, range: Range<usize>, of_rows: bool, fresh: bool| {
                engine.launch(
                    Launch::new("similarity_sweep", "merge")
                        .constant("QUANTITIES", quantities as u32)
                        .read("partials", &partials)
                        .write_part(
                            "statistics",
                            statistics,
                            range.start * STATISTICS..range.end * STATISTICS,
                            "statistics_base",
                        )
                        .size("count", range.len())
                        .size("tiles", if of_rows { tiles.1 } else { tiles.0 })
                        .size("tile", tile)
                        .bits("from_own", u32::from(diagonal && of_rows))
                        .bits("before_own", u32::from(diagonal && !of_rows))
                        .size("partials_base", if of_rows { 0 } else { column_partials })
                        .bits("fresh", u32::from(fresh))
                        .row_of_groups(range.len().div_ceil(GROUP)),
                )
            };
            // A Gram's columns are rows further down, whose statistics begin with the first panel above them.
            let mut begin = |number: usize| {
                let first = !begun.contains(&number);
                begun.push(number);
                first
            };
            if let Some(statistics) = of_rows {
                let fresh = begin(panel.rows.start);
                merge(statistics, panel.rows.start - rows.start..panel.rows.end - rows.start, true, fresh)?;
            }
            if let Some(statistics) = of_columns {
                let fresh = if self.is_gram() { begin(panel.columns.start) } else { panel.rows.start == rows.start };
                merge(statistics, panel.columns.clone(), false, fresh)?;
            }
        }
        Ok(())
    }

    /// Adds the gradients of some rows.
    fn gradients(
        &self,
        engine: &Engine,
        rows: Range<usize>,
        sides: (bool, bool),
        kept: Option<(&dyn Bindable, usize)>,
        d_rows: Option<&Tensor>,
        d_columns: Option<&Tensor>,
    ) -> Result<()> {
        let d = self.extents.2;
        for panel in self.panels(rows, WORKSPACE) {
            let (height, width) = (panel.rows.len(), panel.columns.len());
            let diagonal = self.is_gram() && panel.rows.start == panel.columns.start;
            let gradient = engine.scratch(height * width, DType::F32)?;
            let launch = self
                .launch("backward", &panel)
                .flag("ROWS", sides.0)
                .flag("COLUMNS", sides.1)
                .write("output", &gradient)
                .bits("mirror", u32::from(diagonal))
                .size("output_stride", width);
            engine.launch(match kept {
                Some((kept, values)) if values > 0 => {
                    launch.flag("KEPT", true).read_part_whole("kept", kept, values).size("kept_values", values)
                }
                _ => launch.size("kept_values", 0),
            })?;
            let (row_norms, column_norms) = self.matrix.norms.unzip();
            let side = |tensor: &'a Tensor, range: &Range<usize>, norms: Option<&'a Tensor>| Operand {
                buffer: tensor,
                first: range.start * d,
                stride: d,
                transposed: false,
                norms: norms.map(|norms| (norms as &dyn Bindable, range.start)),
            };
            let add = |transposed, other: Operand<'_>, output: &Tensor, range: &Range<usize>, inner: usize| {
                matmul::product(
                    engine,
                    &Product {
                        a: Operand { buffer: &gradient, first: 0, stride: width, transposed, norms: None },
                        b: other,
                        extents: (range.len(), d, inner),
                        output: Output { buffer: output, first: range.start * d, stride: d, accumulate: true },
                        finish: Finish { log_scale: Some(self.matrix.log_scale), ..Finish::default() },
                    },
                )
            };
            if let Some(d_rows) = d_rows {
                add(false, side(self.columns, &panel.columns, column_norms), d_rows, &panel.rows, width)?;
            }
            let below = if self.is_gram() { d_rows.filter(|_| !diagonal) } else { d_columns };
            if let Some(below) = below {
                add(true, side(self.matrix.rows, &panel.rows, row_norms), below, &panel.columns, height)?;
            }
        }
        Ok(())
    }
}

pub(super) fn forward(engine: &Engine, arguments: SimilaritySweepForward<'_>) -> Result<()> {
    let SimilaritySweepForward { matrix, sums, row_statistics, column_statistics, kept } = arguments;
    let (rows, columns, _) = matrix.extents();
    if rows == 0 || columns == 0 {
        for statistics in [row_statistics, column_statistics].into_iter().flatten() {
            engine.clear_statistics(&*statistics, statistics.shape().rows())?;
        }
        return Ok(());
    }
    let sweep = Sweep::new(engine, matrix, None, None)?;
    let kept = kept.as_deref().map(|kept| (kept as &dyn Bindable, sweep.kept_values(engine, kept.elements())));
    let of = |statistics: Option<&'_ Tensor>| statistics.map(|statistics| statistics as &dyn Bindable).is_some();
    let _ = of;
    sweep.statistics(
        engine,
        sums,
        0..rows,
        row_statistics.as_deref().map(|statistics| statistics as &dyn Bindable),
        column_statistics.as_deref().map(|statistics| statistics as &dyn Bindable),
        kept,
    )
}

pub(super) fn backward(engine: &Engine, arguments: SimilaritySweepBackward<'_>) -> Result<()> {
    let SimilaritySweepBackward { matrix, row_coefficients, column_coefficients, kept, d_rows, d_columns } = arguments;
    let (rows, columns, d) = matrix.extents();
    if rows == 0 || columns == 0 || d == 0 {
        return Ok(());
    }
    let sweep = Sweep::new(engine, matrix, row_coefficients, column_coefficients)?;
    let kept = kept.map(|kept| (kept as &dyn Bindable, sweep.kept_values(engine, kept.elements())));
    let sides = match sweep.is_gram() {
        true => (row_coefficients.is_some(), row_coefficients.is_some()),
        false => (row_coefficients.is_some(), column_coefficients.is_some()),
    };
    sweep.gradients(engine, 0..rows, sides, kept, d_rows.as_deref(), d_columns.as_deref())
}

pub(super) fn one_way(engine: &Engine, arguments: SimilaritySweepOneWay<'_>) -> Result<()> {
    let SimilaritySweepOneWay { matrices, partition, d_rows, d_columns } = arguments;
    todo!()
}
