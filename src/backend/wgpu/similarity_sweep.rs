//! Launches of `similarity_sweep`.
//!
//! The matrix is cut into panels whose partial statistics, or gradients, fit a workspace that does not grow with it.

use std::ops::Range;

use super::engine::Engine;
use super::matmul;
use crate::Result;
use crate::backend::Tensor;
use crate::backend::gpu::matmul::{Finish, Operand, Output, Product};
use crate::backend::gpu::{Bindable, Engine as _, Launch, Scratch, partition};
use crate::backend::operations::{
    STATISTICS, SimilarityMatrix, SimilaritySweepBackward, SimilaritySweepForward, SimilaritySweepOneWay,
};
use crate::error::DType;

/// Rows of a workgroup that packs or merges.
const GROUP: usize = 256;
/// Values of a workspace: 32 MiB.
const WORKSPACE: usize = 8 << 20;
/// Values of the logits that a pass in one keeps: 64 MiB.
const ONE_WAY_WORKSPACE: usize = 16 << 20;
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

/// Logits that are kept from a forward pass for the backward pass.
#[derive(Clone, Copy)]
struct Kept<'a> {
    room: &'a dyn Bindable,
    tiles: usize,
    /// The row with whose tiles they begin.
    first_row: usize,
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
            tile: matmul::tile_size(engine, rows, columns),
            matrix,
            extents,
            packed_rows,
            packed_columns,
        })
    }

    /// Packs the rows anew, with their coefficients.
    fn pack_rows(&mut self, engine: &Engine, coefficients: &Tensor) -> Result<()> {
        let (norms, _) = self.matrix.norms.unzip();
        let (keys, _) = self.matrix.keys.unzip();
        self.packed_rows = pack(engine, &self.matrix, self.extents.0, norms, keys, Some(coefficients))?;
        Ok(())
    }

    fn is_gram(&self) -> bool {
        self.matrix.columns.is_none()
    }

    /// Panels of so many values at most, as near a square as can be; those of some rows alone.
    fn panels(&self, rows: Range<usize>, values: usize) -> Vec<Panel> {
        let (_, columns, d) = self.extents;
        let whole = |length: usize| (length / self.tile).max(1) * self.tile;
        // What fits a binding, whatever the width.
        let most = whole((1 << 24) / d.max(1));
        let side = whole(values.isqrt()).min(most);
        let (mut height, mut width) = (side.min(rows.len().next_multiple_of(self.tile)), side);
        if !self.is_gram() {
            width = whole(values / height).min(columns.next_multiple_of(self.tile)).min(most);
            height = whole(values / width).min(rows.len().next_multiple_of(self.tile)).min(most);
        } else {
            width = width.min(height);
        }
        let mut panels = Vec::new();
        for first in rows.clone().step_by(height) {
            let strip = first..rows.end.min(first + height);
            let from = if self.is_gram() { first } else { 0 };
            for first in (from..columns).step_by(width) {
                panels.push(Panel { rows: strip.clone(), columns: first..columns.min(first + width) });
            }
        }
        panels
    }

    /// One side of a panel, its norms with it.
    fn operand(&self, tensor: &'a Tensor, range: &Range<usize>, of_rows: bool, transposed: bool) -> Operand<'a> {
        let d = self.extents.2;
        let norms = self.matrix.norms.map(|(rows, columns)| if of_rows { rows } else { columns });
        Operand {
            buffer: tensor,
            first: range.start * d,
            stride: d,
            transposed,
            norms: norms.map(|norms| (norms as &dyn Bindable, range.start)),
        }
    }

    /// The dot products of a panel's rows with its columns, if they are computed before.
    fn products(&self, engine: &Engine, panel: &Panel) -> Result<Option<Scratch>> {
        if !matmul::uses_matrices(engine, self.extents) {
            return Ok(None);
        }
        let (height, width) = (panel.rows.len(), panel.columns.len());
        let products = engine.scratch(height * width, DType::F32)?;
        engine.product(&Product {
            a: self.operand(self.matrix.rows, &panel.rows, true, false),
            b: self.operand(self.columns, &panel.columns, false, true),
            extents: (height, width, self.extents.2),
            output: Output { buffer: &products, first: 0, stride: width, accumulate: false },
            finish: Finish::default(),
        })?;
        Ok(Some(products))
    }

    /// A launch over the tiles of a panel, whose products may have been computed before.
    fn launch<'s>(&'s self, entry: &'static str, panel: &Panel, products: Option<&'s Scratch>) -> Launch<'s> {
        let (rows, columns, d) = self.extents;
        let of = |range: &Range<usize>| range.start * d..range.end * d;
        let launch = match products {
            Some(products) => Launch::new("similarity_sweep", entry).flag("PRODUCTS", true).read("products", products),
            None => Launch::new("similarity_sweep", entry)
                .read_part("rows", self.matrix.rows, of(&panel.rows), "rows_base")
                .read_part("columns", self.columns, of(&panel.columns), "columns_base")
                .size("width", d),
        };
        launch
            .constant("TILE", self.tile as u32)
            .flag("NORMS", self.matrix.norms.is_some())
            .flag("KEYS", self.matrix.keys.is_some())
            .read("packed_rows", &self.packed_rows)
            .read("packed_columns", self.packed_columns.as_ref().unwrap_or(&self.packed_rows))
            .read("log_scale", self.matrix.log_scale)
            .size("rows", panel.rows.len())
            .size("columns", panel.columns.len())
            .size("first_row", panel.rows.start)
            .size("first_column", panel.columns.start)
            .size("all_rows", rows)
            .size("all_columns", columns)
            .bits("has_diagonal", u32::from(self.matrix.diagonal.is_some()))
            .signed("diagonal", self.matrix.diagonal.map_or(0, |offset| i32::try_from(offset).unwrap_or(i32::MAX)))
            .bits("gram", u32::from(self.is_gram()))
            .groups([panel.columns.len().div_ceil(self.tile), panel.rows.len().div_ceil(self.tile), 1])
    }

    /// Logits kept in a tensor of so many values: as many tiles as fit it and a binding.
    fn kept<'k>(&self, engine: &Engine, room: &'k dyn Bindable, values: usize, first_row: usize) -> Kept<'k> {
        let most = usize::try_from(engine.most_bound_bytes() / 4).unwrap_or(usize::MAX);
        Kept { room, tiles: values.min(most) / (self.tile * self.tile), first_row }
    }

    /// Whether all tiles of a panel are kept.
    fn is_kept(&self, panel: &Panel, kept: Option<Kept<'_>>) -> bool {
        let Some(Kept { tiles, first_row, .. }) = kept else { return false };
        let in_row = self.extents.1.div_ceil(self.tile);
        let row = (panel.rows.end - 1) / self.tile - first_row / self.tile;
        let column = (panel.columns.end - 1) / self.tile;
        // As the shader numbers them; the last one comes last.
        let before = if self.is_gram() { row * in_row - row * (row + 1) / 2 } else { row * in_row };
        before + column < tiles
    }

    fn with_kept<'s>(&self, launch: Launch<'s>, kept: Option<Kept<'s>>, writes: bool) -> Launch<'s> {
        let Some(Kept { room, tiles, first_row }) = kept.filter(|kept| kept.tiles > 0) else {
            return launch.size("kept_tiles", 0).size("kept_from", 0);
        };
        let launch = launch.flag("KEPT", true).size("kept_tiles", tiles).size("kept_from", first_row / self.tile);
        let values = tiles * self.tile * self.tile;
        if writes { launch.write_first("kept", room, values) } else { launch.read_first("kept", room, values) }
    }

    /// The statistics of some rows, and of all columns in these rows.
    fn statistics(
        &self,
        engine: &Engine,
        sums: bool,
        rows: Range<usize>,
        of_rows: Option<&dyn Bindable>,
        of_columns: Option<&dyn Bindable>,
        kept: Option<Kept<'_>>,
    ) -> Result<()> {
        let quantities = if sums { STATISTICS } else { 3 };
        let tile = self.tile;
        let of_columns = if self.is_gram() { of_rows } else { of_columns };
        // Each tile has so many values for each of its rows and columns: as many for each entry of its matrix.
        let workspace = engine.workspace(WORKSPACE);
        let values =
            if matmul::uses_matrices(engine, self.extents) { workspace } else { workspace / (2 * quantities) * tile };
        let mut begun: Vec<usize> = Vec::new();
        for panel in self.panels(rows.clone(), values) {
            let (height, width) = (panel.rows.len(), panel.columns.len());
            let tiles = (height.div_ceil(tile), width.div_ceil(tile));
            let column_partials = quantities * height * tiles.1;
            let partials = engine.scratch(column_partials + quantities * width * tiles.0, DType::F32)?;
            let products = self.products(engine, &panel)?;
            let launch = self
                .launch("forward", &panel, products.as_ref())
                .constant("QUANTITIES", quantities as u32)
                .flag("COLUMNS", of_columns.is_some())
                .write("output", &partials)
                .size("column_partials", column_partials);
            let launch = self.with_kept(launch, kept, true);
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
        kept: Option<Kept<'_>>,
        d_rows: Option<&Tensor>,
        d_columns: Option<&Tensor>,
    ) -> Result<()> {
        let d = self.extents.2;
        for panel in self.panels(rows, engine.workspace(WORKSPACE)) {
            let (height, width) = (panel.rows.len(), panel.columns.len());
            let diagonal = self.is_gram() && panel.rows.start == panel.columns.start;
            let gradient = engine.scratch(height * width, DType::F32)?;
            let products = if self.is_kept(&panel, kept) { None } else { self.products(engine, &panel)? };
            let launch = self
                .launch("backward", &panel, products.as_ref())
                .flag("ROWS", sides.0)
                .flag("COLUMNS", sides.1)
                .write("output", &gradient)
                .bits("mirror", u32::from(diagonal))
                .size("output_stride", width);
            engine.launch(self.with_kept(launch, kept, false))?;
            let add = |transposed, other: Operand<'_>, output: &Tensor, range: &Range<usize>, inner: usize| {
                engine.product(&Product {
                    a: Operand { buffer: &gradient, first: 0, stride: width, transposed, norms: None },
                    b: other,
                    extents: (range.len(), d, inner),
                    output: Output { buffer: output, first: range.start * d, stride: d, accumulate: true },
                    finish: Finish { log_scale: Some(self.matrix.log_scale), ..Finish::default() },
                })
            };
            if let Some(d_rows) = d_rows {
                let columns = self.operand(self.columns, &panel.columns, false, false);
                add(false, columns, d_rows, &panel.rows, width)?;
            }
            let below = if self.is_gram() { d_rows.filter(|_| !diagonal) } else { d_columns };
            if let Some(below) = below {
                let rows = self.operand(self.matrix.rows, &panel.rows, true, false);
                add(true, rows, below, &panel.columns, height)?;
            }
        }
        Ok(())
    }
}

/// The statistics of rows without entries.
fn clear(engine: &Engine, statistics: &dyn Bindable, rows: usize) -> Result<()> {
    engine.launch(
        Launch::new("similarity_sweep", "merge")
            .constant("QUANTITIES", 3)
            .read("partials", &engine.scratch(1, DType::F32)?)
            .write("statistics", statistics)
            .size("statistics_base", 0)
            .size("count", rows)
            .size("tiles", 0)
            .size("tile", 1)
            .bits("from_own", 0)
            .bits("before_own", 0)
            .size("partials_base", 0)
            .bits("fresh", 1)
            .row_of_groups(rows.div_ceil(GROUP)),
    )
}

fn bindable(tensor: Option<&Tensor>) -> Option<&dyn Bindable> {
    tensor.map(|tensor| tensor as &dyn Bindable)
}

pub(super) fn forward(engine: &Engine, arguments: SimilaritySweepForward<'_>) -> Result<()> {
    let SimilaritySweepForward { matrix, sums, row_statistics, column_statistics, kept } = arguments;
    let (rows, columns, _) = matrix.extents();
    let (of_rows, of_columns) = (row_statistics.as_deref(), column_statistics.as_deref());
    if rows == 0 || columns == 0 {
        for statistics in [of_rows, of_columns].into_iter().flatten() {
            clear(engine, statistics, statistics.shape().rows())?;
        }
        return Ok(());
    }
    let sweep = Sweep::new(engine, matrix, None, None)?;
    let kept = kept.as_deref().map(|kept| sweep.kept(engine, kept, kept.elements(), 0));
    sweep.statistics(engine, sums, 0..rows, bindable(of_rows), bindable(of_columns), kept)
}

pub(super) fn backward(engine: &Engine, arguments: SimilaritySweepBackward<'_>) -> Result<()> {
    let SimilaritySweepBackward { matrix, row_coefficients, column_coefficients, kept, d_rows, d_columns } = arguments;
    let (rows, columns, d) = matrix.extents();
    if rows == 0 || columns == 0 || d == 0 {
        return Ok(());
    }
    let sweep = Sweep::new(engine, matrix, row_coefficients, column_coefficients)?;
    let kept = kept.map(|kept| sweep.kept(engine, kept, kept.elements(), 0));
    let of_columns = if sweep.is_gram() { row_coefficients } else { column_coefficients };
    let sides = (row_coefficients.is_some(), of_columns.is_some());
    sweep.gradients(engine, 0..rows, sides, kept, d_rows.as_deref(), d_columns.as_deref())
}

/// Strip by strip: logits, which are kept, and statistics; the partition of the strip's rows; gradients.
pub(super) fn one_way(engine: &Engine, arguments: SimilaritySweepOneWay<'_>) -> Result<()> {
    let SimilaritySweepOneWay { matrices, partition, d_rows, d_columns } = arguments;
    let mut sweeps =
        matrices.iter().map(|matrix| Sweep::new(engine, *matrix, None, None)).collect::<Result<Vec<_>>>()?;
    sweeps.retain(|sweep| sweep.extents.1 > 0);
    let d_columns: Vec<&Tensor> =
        d_columns.iter().map(|tensor| &**tensor).filter(|tensor| tensor.elements() > 0).collect();
    let rows = partition.similarity.elements();
    let tile = sweeps.iter().map(|sweep| sweep.tile).max().unwrap_or(64);
    let padded: Vec<usize> = sweeps.iter().map(|sweep| sweep.extents.1.next_multiple_of(sweep.tile)).collect();
    let height = (engine.workspace(ONE_WAY_WORKSPACE) / padded.iter().sum::<usize>().max(1) / tile).max(1) * tile;
    for first in (0..rows).step_by(height) {
        let strip = first..rows.min(first + height);
        let count = strip.len();
        let mut kept = Vec::with_capacity(sweeps.len());
        let mut statistics = Vec::with_capacity(sweeps.len());
        for (sweep, padded) in sweeps.iter().zip(&padded) {
            let values = count.next_multiple_of(tile) * padded;
            let room = engine.scratch(values, DType::F32)?;
            let of_rows = engine.scratch(count * STATISTICS, DType::F32)?;
            let here = sweep.kept(engine, &room, values, first);
            sweep.statistics(engine, false, strip.clone(), Some(&of_rows), None, Some(here))?;
            kept.push((room, values));
            statistics.push(of_rows);
        }
        let further: Vec<&dyn Bindable> = statistics.iter().map(|statistics| statistics as &dyn Bindable).collect();
        partition::rows(engine, &partition, strip.clone(), &further)?;
        for ((sweep, (room, values)), d_columns) in sweeps.iter_mut().zip(&kept).zip(&d_columns) {
            sweep.pack_rows(engine, &*partition.coefficients)?;
            let here = sweep.kept(engine, room, *values, first);
            sweep.gradients(engine, strip.clone(), (true, false), Some(here), Some(&*d_rows), Some(d_columns))?;
        }
    }
    Ok(())
}
