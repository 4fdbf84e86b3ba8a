//! Launches of `similarity_sweep`: what `wgpu::similarity_sweep` is to shaders, with embeddings packed for tensor cores
//! and gradients in 16 bits.
//!
//! The matrix is cut into panels whose partial statistics, or gradients, fit a workspace that does not grow with it.

use std::ops::Range;
use std::rc::Rc;

use super::engine::Engine;
use super::hopper;
use super::matmul::{self, Packed, PackedOperand, SHARES};
use super::settings::Products;
use crate::Result;
use crate::backend::Tensor;
use crate::backend::gpu::matmul::{Finish, Operand, Output, Product};
use crate::backend::gpu::{self, Bindable, Engine as _, Launch, Scratch, partition};
use crate::backend::operations::{
    STATISTICS, SimilarityMatrix, SimilaritySweepBackward, SimilaritySweepForward, SimilaritySweepOneWay,
};
use crate::error::DType;

/// Rows of a block that merges.
const GROUP: usize = 256;
/// Values of a workspace: 64 MiB.
const WORKSPACE: usize = 16 << 20;
/// Values of the logits that a pass in one keeps: 64 MiB.
const ONE_WAY_WORKSPACE: usize = 16 << 20;
/// Shares of the coefficients of one side that are searched for the largest.
const SHARES_OF_SIDE: usize = SHARES / 2;

/// The rows of a matrix, or its columns.
struct Side<'a> {
    embeddings: &'a Tensor,
    norms: Option<&'a Tensor>,
    keys: Option<&'a Tensor>,
    count: usize,
    /// The embeddings, times their norms, for tensor cores.
    packed: Option<Packed>,
}

impl<'a> Side<'a> {
    fn new(
        engine: &Engine,
        way: Products,
        embeddings: &'a Tensor,
        (count, width): (usize, usize),
        norms: Option<&'a Tensor>,
        keys: Option<&'a Tensor>,
    ) -> Result<Self> {
        let pack = || {
            let norms = norms.map(|norms| (norms as &dyn Bindable, 0));
            Packed::of(engine, way, (embeddings, 0, width), (count, width), norms, norms.is_some())
        };
        let packed = (way != Products::Plain).then(pack).transpose()?;
        Ok(Self { embeddings, norms, keys, count, packed })
    }
}

/// What is swept.
struct Sweep<'a> {
    engine: &'a Engine,
    matrix: SimilarityMatrix<'a>,
    way: Products,
    /// Whether by Hopper's warpgroups.
    hopper: bool,
    tile: usize,
    width: usize,
    rows: Side<'a>,
    /// None for a Gram, whose columns are its rows.
    columns: Option<Side<'a>>,
}

/// Logits that are kept from a forward pass for the backward pass.
#[derive(Clone, Copy)]
struct Kept<'a> {
    room: &'a dyn Bindable,
    tiles: usize,
    /// The row with whose tiles they begin.
    first_row: usize,
}

/// The coefficients of rows and of columns; those of a Gram are the same.
#[derive(Clone, Copy)]
struct Coefficients<'a> {
    rows: Option<&'a Tensor>,
    columns: Option<&'a Tensor>,
}

/// Some tiles.
struct Panel {
    rows: Range<usize>,
    columns: Range<usize>,
    /// Whether it is on the diagonal of a Gram.
    on_diagonal: bool,
}

impl<'a> Sweep<'a> {
    fn new(engine: &'a Engine, matrix: SimilarityMatrix<'a>) -> Result<Self> {
        let extents = matrix.extents();
        let (rows, columns, width) = extents;
        let (row_norms, column_norms) = matrix.norms.unzip();
        let (row_keys, column_keys) = matrix.keys.unzip();
        let way = matmul::way(engine, extents);
        let hopper = hopper::is_wanted(engine, way);
        let side = |embeddings, count, norms, keys| Side::new(engine, way, embeddings, (count, width), norms, keys);
        Ok(Self {
            engine,
            matrix,
            way,
            hopper,
            tile: if hopper { hopper::SQUARE } else { matmul::tile_size(engine, way, extents) },
            width,
            rows: side(matrix.rows, rows, row_norms, row_keys)?,
            columns: matrix.columns.map(|other| side(other, columns, column_norms, column_keys)).transpose()?,
        })
    }

    fn is_gram(&self) -> bool {
        self.columns.is_none()
    }

    fn of_columns(&self) -> &Side<'a> {
        self.columns.as_ref().unwrap_or(&self.rows)
    }

    fn scratch(&self, values: usize) -> Result<Scratch> {
        (self.engine as &dyn gpu::Engine).scratch(values, DType::F32)
    }

    /// Panels of so many entries at most, as near a square as can be; those of some rows alone.
    fn panels(&self, rows: Range<usize>, entries: usize) -> Vec<Panel> {
        let columns = self.of_columns().count;
        let whole = |length: usize| (length / self.tile).max(1) * self.tile;
        let side = whole(entries.isqrt());
        let (mut height, mut width) = (side.min(rows.len().next_multiple_of(self.tile)), side);
        if self.is_gram() {
            width = width.min(height);
        } else {
            width = whole(entries / height).min(columns.next_multiple_of(self.tile));
            height = whole(entries / width).min(rows.len().next_multiple_of(self.tile));
        }
        let mut panels = Vec::new();
        for first in rows.clone().step_by(height) {
            let strip = first..rows.end.min(first + height);
            let from = if self.is_gram() { first } else { 0 };
            for first in (from..columns).step_by(width) {
                let columns = first..columns.min(first + width);
                let on_diagonal = self.is_gram() && columns.start == strip.start;
                panels.push(Panel { rows: strip.clone(), columns, on_diagonal });
            }
        }
        panels
    }

    /// A launch over the tiles of a panel.
    fn launch(&self, names: [&'static str; 4], panel: &Panel) -> Launch<'_> {
        let (rows, columns) = (&self.rows, self.of_columns());
        let [plain, halves, exact, by_hopper] = names;
        let entry = if self.hopper { by_hopper } else { matmul::entry(self.way, [plain, halves, exact]) };
        let tiles = if self.hopper {
            hopper::squares(self.engine, panel.rows.len(), panel.columns.len())
        } else {
            panel.rows.len().div_ceil(self.tile) * panel.columns.len().div_ceil(self.tile)
        };
        let mut launch = Launch::new("similarity_sweep", entry)
            .constant("TILE", self.tile as u32)
            .flag("BF16", self.way == Products::Bf16)
            .read("log_scale", self.matrix.log_scale)
            .size("rows", panel.rows.len())
            .size("columns", panel.columns.len())
            .size("first_row", panel.rows.start)
            .size("first_column", panel.columns.start)
            .size("width", self.width)
            .size("all_columns", columns.count)
            .bits("has_diagonal", u32::from(self.matrix.diagonal.is_some()))
            .signed("diagonal", self.matrix.diagonal.map_or(0, |offset| i32::try_from(offset).unwrap_or(i32::MAX)))
            .bits("gram", u32::from(self.is_gram()))
            .groups([tiles, 1, 1]);
        if let (Some(of_rows), Some(of_columns)) = (rows.keys, columns.keys) {
            launch = launch.read("row_keys", of_rows).read("column_keys", of_columns);
        }
        if let (Some(of_rows), Some(of_columns)) = (&rows.packed, &columns.packed) {
            launch = launch.bits("cosines", u32::from(rows.norms.is_some()));
            if !self.hopper {
                launch = launch.size("stride", of_rows.stride());
                launch = of_rows.bind(launch, ["packed_rows", "low_rows"], 0, false);
                launch = of_columns.bind(launch, ["packed_columns", "low_columns"], 0, false);
            }
            launch = of_columns.bind_largest(of_rows.bind_largest(launch, "largest_row"), "largest_column");
        } else {
            launch = launch.read("row_values", rows.embeddings).read("column_values", columns.embeddings);
            if let (Some(of_rows), Some(of_columns)) = (rows.norms, columns.norms) {
                launch = launch.read("row_norms", of_rows).read("column_norms", of_columns);
            }
        }
        launch
    }

    fn run(&self, launch: Launch<'_>) -> Result<()> {
        match (&self.rows.packed, &self.of_columns().packed) {
            (Some(rows), Some(columns)) if self.hopper => {
                let counts = (self.rows.count, self.of_columns().count, self.width);
                hopper::sweep(self.engine, self.way, (rows, columns), counts, launch)
            }
            _ => self.engine.launch_with(launch, matmul::shared_memory(self.way, self.tile)),
        }
    }

    /// Logits kept in a tensor of so many values: as many tiles as fit it.
    fn kept<'k>(&self, room: &'k dyn Bindable, values: usize, first_row: usize) -> Kept<'k> {
        Kept { room, tiles: values / (self.tile * self.tile), first_row }
    }

    fn with_kept<'s>(&self, launch: Launch<'s>, kept: Option<Kept<'s>>, writes: bool) -> Launch<'s> {
        // Warpgroups compute them again sooner than they read them.
        let Some(Kept { room, tiles, first_row }) = kept.filter(|kept| kept.tiles > 0 && !self.hopper) else {
            return launch.size("kept_tiles", 0).size("kept_from", 0);
        };
        let launch = launch.size("kept_tiles", tiles).size("kept_from", first_row / self.tile);
        if writes { launch.write("kept", room) } else { launch.read("kept", room) }
    }

    /// The statistics of some rows, and of all columns in these rows.
    fn statistics(
        &self,
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
        let entries = self.engine.workspace(WORKSPACE) / (2 * quantities) * tile;
        let mut begun: Vec<usize> = Vec::new();
        for panel in self.panels(rows.clone(), entries) {
            let (height, width) = (panel.rows.len(), panel.columns.len());
            let tiles = (height.div_ceil(tile), width.div_ceil(tile));
            let column_partials = quantities * height * tiles.1;
            let partials = self.scratch(column_partials + quantities * width * tiles.0)?;
            let launch = self
                .launch(["forward", "forward_halves", "forward_exact", "forward_hopper"], &panel)
                .write("partials", &partials)
                .bits("of_columns", u32::from(of_columns.is_some()))
                .size("column_partials", column_partials)
                .size("quantities", quantities);
            self.run(self.with_kept(launch, kept, true))?;
            let merge = |statistics: &dyn Bindable, range: Range<usize>, of_rows: bool, fresh: bool| {
                let first = if of_rows { 0 } else { column_partials };
                let range = range.start * STATISTICS..range.end * STATISTICS;
                let launch = merge(quantities, range.len() / STATISTICS, fresh)
                    .read_part("partials", &partials, first..partials.elements, "partials_base")
                    .write_part("statistics", statistics, range, "statistics_base")
                    .size("tiles", if of_rows { tiles.1 } else { tiles.0 })
                    .size("tile", tile)
                    .bits("from_own", u32::from(panel.on_diagonal && of_rows))
                    .bits("before_own", u32::from(panel.on_diagonal && !of_rows));
                self.engine.launch(launch)
            };
            // A Gram's columns are rows further down, whose statistics begin with the first panel above them.
            let mut begin = |first: usize| {
                let fresh = !begun.contains(&first);
                begun.push(first);
                fresh
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

    /// What bounds the gradients of some rows: the largest coefficients, by shares, and room for what becomes of them.
    fn largest_coefficients(&self, rows: &Range<usize>, coefficients: Coefficients<'_>) -> Result<Scratch> {
        let largest = (self.engine as &dyn gpu::Engine).scratch(SHARES + 1, DType::U32)?;
        let mut launch = Launch::new("similarity_sweep", "largest_coefficients")
            .write("largest", &largest)
            .size("rows", rows.len())
            .size("columns", self.of_columns().count)
            .groups([SHARES_OF_SIDE, 2, 1]);
        if let Some(of_rows) = coefficients.rows {
            launch = launch.read_part("row_coefficients", of_rows, 4 * rows.start..4 * rows.end, "base");
        }
        if let Some(of_columns) = coefficients.columns {
            launch = launch.read("column_coefficients", of_columns);
        }
        self.engine.launch(launch)?;
        Ok(largest)
    }

    /// Adds the gradients of some rows.
    fn gradients(
        &self,
        rows: Range<usize>,
        coefficients: Coefficients<'_>,
        kept: Option<Kept<'_>>,
        d_rows: Option<&Tensor>,
        d_columns: Option<&Tensor>,
    ) -> Result<()> {
        // Those in f16 are scaled by what bounds them.
        let scaled = matches!(self.way, Products::F16 | Products::Exact);
        let largest = scaled.then(|| self.largest_coefficients(&rows, coefficients)).transpose()?.map(Rc::new);
        let values = self.engine.workspace(WORKSPACE);
        // One number of 16 bits for each entry, or two of them, or one of 32.
        let entries = if matches!(self.way, Products::F16 | Products::Bf16) { 2 * values } else { values };
        for panel in self.panels(rows, entries) {
            let mut launch = self.launch(["backward", "backward_halves", "backward_exact", "backward_hopper"], &panel);
            if let Some(of_rows) = coefficients.rows {
                launch = launch.read("row_coefficients", of_rows);
            }
            if let Some(of_columns) = coefficients.columns {
                launch = launch.read("column_coefficients", of_columns);
            }
            let launch = self.with_kept(launch.bits("mirror", u32::from(panel.on_diagonal)), kept, false);
            // Those of a Gram are added to its rows, which the columns of other panels are.
            let of_columns = if self.is_gram() { d_rows.filter(|_| !panel.on_diagonal) } else { d_columns };
            match (&self.rows.packed, &self.of_columns().packed) {
                (Some(packed_rows), Some(packed_columns)) => {
                    let gradients =
                        Packed::new(self.engine, self.way, panel.rows.len(), panel.columns.len(), largest.clone())?;
                    let sides = (packed_rows, packed_columns);
                    self.packed_gradients(launch, &panel, &gradients, sides, d_rows, of_columns)?;
                }
                _ => self.plain_gradients(launch, &panel, d_rows, of_columns)?,
            }
        }
        Ok(())
    }

    fn output<'t>(&self, tensor: &'t Tensor, first_row: usize) -> Output<'t> {
        Output { buffer: tensor, first: first_row * self.width, stride: self.width, accumulate: true }
    }

    fn finish(&self) -> Finish<'_> {
        Finish { log_scale: Some(self.matrix.log_scale), ..Finish::default() }
    }

    /// The gradients of a panel by ordinary arithmetic.
    fn plain_gradients(
        &self,
        launch: Launch<'_>,
        panel: &Panel,
        d_rows: Option<&Tensor>,
        d_columns: Option<&Tensor>,
    ) -> Result<()> {
        let (height, width) = (panel.rows.len(), panel.columns.len());
        let gradients = self.scratch(height * width)?;
        self.run(launch.write("gradients", &gradients).size("gradient_stride", width))?;
        let add = |transposed, side: &Side<'_>, of_side: &Range<usize>, output, lines: usize| {
            let gradients = Operand { buffer: &gradients, first: 0, stride: width, transposed, norms: None };
            let embeddings = Operand {
                buffer: side.embeddings,
                first: of_side.start * self.width,
                stride: self.width,
                transposed: false,
                norms: side.norms.map(|norms| (norms as &dyn Bindable, of_side.start)),
            };
            let extents = (lines, self.width, of_side.len());
            self.engine.product(&Product { a: gradients, b: embeddings, extents, output, finish: self.finish() })
        };
        if let Some(d_rows) = d_rows {
            add(false, self.of_columns(), &panel.columns, self.output(d_rows, panel.rows.start), height)?;
        }
        if let Some(d_columns) = d_columns {
            add(true, &self.rows, &panel.rows, self.output(d_columns, panel.columns.start), width)?;
        }
        Ok(())
    }

    /// The gradients of a panel by tensor cores.
    fn packed_gradients(
        &self,
        launch: Launch<'_>,
        panel: &Panel,
        gradients: &Packed,
        (rows, columns): (&Packed, &Packed),
        d_rows: Option<&Tensor>,
        d_columns: Option<&Tensor>,
    ) -> Result<()> {
        let (height, width) = (panel.rows.len(), panel.columns.len());
        let launch = gradients.bind(launch, ["gradients", "low_gradients"], 0, true);
        let launch = launch.size("gradient_stride", gradients.stride());
        self.run(match gradients.largest() {
            Some(largest) => launch.write("largest", largest),
            None => launch,
        })?;
        let add = |transposed, packed, of_side: &Range<usize>, output, lines: usize| {
            let gradients = PackedOperand { packed: gradients, first_row: 0, transposed };
            let embeddings = PackedOperand { packed, first_row: of_side.start, transposed: false };
            let extents = (lines, self.width, of_side.len());
            matmul::packed_product(self.engine, self.way, (gradients, embeddings), extents, output, self.finish())
        };
        if let Some(d_rows) = d_rows {
            add(false, columns, &panel.columns, self.output(d_rows, panel.rows.start), height)?;
        }
        if let Some(d_columns) = d_columns {
            add(true, rows, &panel.rows, self.output(d_columns, panel.columns.start), width)?;
        }
        Ok(())
    }
}

/// A launch that merges statistics of so many rows.
fn merge<'a>(quantities: usize, count: usize, fresh: bool) -> Launch<'a> {
    Launch::new("similarity_sweep", "merge")
        .size("quantities", quantities)
        .size("count", count)
        .bits("fresh", u32::from(fresh))
        .row_of_groups(count.div_ceil(GROUP))
}

/// The statistics of rows without entries.
fn clear(engine: &Engine, statistics: &dyn Bindable, rows: usize) -> Result<()> {
    let partials = (engine as &dyn gpu::Engine).scratch(1, DType::F32)?;
    let launch = merge(3, rows, true).read("partials", &partials).write("statistics", statistics);
    engine.launch(launch.size("tiles", 0).size("tile", 1).bits("from_own", 0).bits("before_own", 0))
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
    let sweep = Sweep::new(engine, matrix)?;
    let kept = kept.as_deref().map(|kept| sweep.kept(kept, kept.elements(), 0));
    sweep.statistics(sums, 0..rows, bindable(of_rows), bindable(of_columns), kept)
}

pub(super) fn backward(engine: &Engine, arguments: SimilaritySweepBackward<'_>) -> Result<()> {
    let SimilaritySweepBackward { matrix, row_coefficients, column_coefficients, kept, d_rows, d_columns } = arguments;
    let (rows, columns, width) = matrix.extents();
    if rows == 0 || columns == 0 || width == 0 {
        return Ok(());
    }
    let sweep = Sweep::new(engine, matrix)?;
    let kept = kept.map(|kept| sweep.kept(kept, kept.elements(), 0));
    let of_columns = if sweep.is_gram() { row_coefficients } else { column_coefficients };
    let coefficients = Coefficients { rows: row_coefficients, columns: of_columns };
    sweep.gradients(0..rows, coefficients, kept, d_rows.as_deref(), d_columns.as_deref())
}

/// Strip by strip: logits, which are kept, and statistics; the partition of the strip's rows; gradients.
pub(super) fn one_way(engine: &Engine, arguments: SimilaritySweepOneWay<'_>) -> Result<()> {
    let SimilaritySweepOneWay { matrices, partition, d_rows, d_columns } = arguments;
    let mut sweeps = Vec::with_capacity(matrices.len());
    for (matrix, d_columns) in matrices.iter().zip(&d_columns) {
        if matrix.extents().1 > 0 {
            sweeps.push((Sweep::new(engine, *matrix)?, &**d_columns));
        }
    }
    let rows = partition.similarity.elements();
    let tile = sweeps.iter().map(|(sweep, _)| sweep.tile).max().unwrap_or(64);
    let padded = |sweep: &Sweep<'_>| sweep.of_columns().count.next_multiple_of(sweep.tile);
    let across: usize = sweeps.iter().map(|(sweep, _)| padded(sweep)).sum();
    let height = (engine.workspace(ONE_WAY_WORKSPACE) / across.max(1) / tile).max(1) * tile;
    for first in (0..rows).step_by(height) {
        let strip = first..rows.min(first + height);
        let count = strip.len();
        let mut rooms = Vec::with_capacity(sweeps.len());
        let mut statistics = Vec::with_capacity(sweeps.len());
        for (sweep, _) in &sweeps {
            let room = sweep.scratch(count.next_multiple_of(tile) * padded(sweep))?;
            let of_rows = sweep.scratch(count * STATISTICS)?;
            let kept = sweep.kept(&room, room.elements, first);
            sweep.statistics(false, strip.clone(), Some(&of_rows), None, Some(kept))?;
            rooms.push(room);
            statistics.push(of_rows);
        }
        let further: Vec<&dyn Bindable> = statistics.iter().map(|statistics| statistics as &dyn Bindable).collect();
        partition::rows(engine, &partition, strip.clone(), &further)?;
        let coefficients = Coefficients { rows: Some(&*partition.coefficients), columns: None };
        for ((sweep, d_columns), room) in sweeps.iter().zip(&rooms) {
            let kept = sweep.kept(room, room.elements, first);
            sweep.gradients(strip.clone(), coefficients, Some(kept), Some(&*d_rows), Some(d_columns))?;
        }
    }
    Ok(())
}
