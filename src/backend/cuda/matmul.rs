//! Launches of `matmul`: products by ordinary arithmetic, or by tensor cores of matrices that are brought into 16 bits
//! first.

use std::rc::Rc;

use super::engine::Engine;
use super::hopper;
use super::settings::Products;
use crate::Result;
use crate::backend::gpu::matmul::{Finish, Operand, Output, Product};
use crate::backend::gpu::{self, Bindable, Engine as _, Launch, Scratch};
use crate::error::DType;

/// Elements of a block that finishes.
const GROUP: usize = 1024;
/// Inner places that a part has at least.
const SHORTEST_PART: usize = 128;
/// Values of the partial products of one product: 32 MiB at most.
const MOST_PARTIAL: usize = 8 << 20;
/// Multiplications from which on an exact product takes longer by ordinary arithmetic than by tensor cores, with what
/// has to be done before.
const LARGE_PRODUCT: usize = 1 << 28;
/// Shares of a matrix that are searched for its largest magnitude; the word behind them is that of all.
pub(super) const SHARES: usize = 256;
/// Values of a block that packs.
const PACKED: usize = 2048;

/// How products are computed, in words.
pub(super) fn description(engine: &Engine) -> String {
    let products = engine.settings.products;
    if has_tensor_cores(engine) { products.to_string() } else { format!("{products}, without tensor cores") }
}

/// How far products round their factors, as a part of themselves.
pub(super) fn rounding(engine: &Engine) -> f64 {
    match engine.settings.products {
        Products::Exact | Products::Plain => 0.0,
        Products::Bf16 => f64::from(2.0f32.powi(-8)),
        Products::F16 => f64::from(2.0f32.powi(-11)),
    }
}

/// Whether there are tensor cores that kernels know, those of Ampere and later.
fn has_tensor_cores(engine: &Engine) -> bool {
    engine.gpu.properties().capability >= (8, 0)
}

/// How a product is computed.
pub(super) fn way(engine: &Engine, (m, n, k): (usize, usize, usize)) -> Products {
    match engine.settings.products {
        _ if !has_tensor_cores(engine) || m * n * k == 0 => Products::Plain,
        Products::Exact if m * n * k < LARGE_PRODUCT && !engine.settings.tensor_cores => Products::Plain,
        products => products,
    }
}

/// The name of an entry that does something in a way.
pub(super) fn entry(way: Products, names: [&'static str; 3]) -> &'static str {
    match way {
        Products::Plain => names[0],
        Products::Exact => names[2],
        Products::F16 | Products::Bf16 => names[1],
    }
}

/// Bytes of shared memory for a tile: its stages.
pub(super) fn shared_memory(way: Products, tile: usize) -> usize {
    match way {
        Products::Plain => 0,
        Products::Exact => 768 * tile,
        Products::F16 | Products::Bf16 => 512 * tile,
    }
}

/// About how long blocks take that each have a tile of a product: so many blocks of so many multiplications for each of
/// the tile's elements. In nanoseconds, of a data centre's GPU.
fn time_of_blocks(way: Products, multiprocessors: usize, tile: usize, blocks: usize, inner: usize) -> f64 {
    let large = tile == 128;
    // Of a multiprocessor in a nanosecond. What a small tile reads of shared memory is used for half as much.
    let multiplications = match (way, large) {
        (Products::Plain, true) => 160.0,
        (Products::Plain, false) => 130.0,
        (Products::Exact, true) => 430.0,
        (Products::Exact, false) => 250.0,
        (Products::F16 | Products::Bf16, true) => 1300.0,
        (Products::F16 | Products::Bf16, false) => 750.0,
    };
    // The beginning and the end of a tile, beside what else the multiprocessor does.
    let rest = if large { 700.0 } else { 350.0 };
    let in_turn = blocks.div_ceil(multiprocessors.max(1));
    // One block alone waits for memory.
    let alone = if in_turn == 1 && way != Products::Exact { 1.3 } else { 1.0 };
    in_turn as f64 * (alone * (tile * tile * inner) as f64 / multiplications + rest)
}

fn tiles(tile: usize, rows: usize, columns: usize) -> usize {
    rows.div_ceil(tile) * columns.div_ceil(tile)
}

/// Rows and columns of a tile, and into how many parts the inner places are cut. Large tiles read less for each product;
/// small ones, and parts, are more, and keep a device busy.
fn cut(way: Products, multiprocessors: usize, (m, n, k): (usize, usize, usize)) -> (usize, usize) {
    let most_parts = (k / SHORTEST_PART).min(MOST_PARTIAL / (m * n)).clamp(1, 64);
    let time = |tile: usize, parts: usize| {
        let blocks = tiles(tile, m, n) * parts;
        // One more launch, that reads all parts: 2 TB in a second.
        let merge = if parts == 1 { 0.0 } else { 4000.0 + (4 * m * n * (2 * parts + 1)) as f64 / 2000.0 };
        time_of_blocks(way, multiprocessors, tile, blocks, k.div_ceil(parts)) + merge
    };
    let all = [128, 64].into_iter().flat_map(|tile| (1..=most_parts).map(move |parts| (tile, parts)));
    all.min_by(|a, b| time(a.0, a.1).total_cmp(&time(b.0, b.1))).unwrap_or((64, 1))
}

/// Rows and columns of a tile of a similarity matrix of embeddings of some width.
pub(super) fn tile_size(engine: &Engine, way: Products, (rows, columns, width): (usize, usize, usize)) -> usize {
    let multiprocessors = engine.gpu.properties().multiprocessors as usize;
    let time = |tile| time_of_blocks(way, multiprocessors, tile, tiles(tile, rows, columns), width);
    if time(128) <= time(64) { 128 } else { 64 }
}

/// A matrix in 16 bits: one value each or two, rows padded with zeros.
pub(super) struct Packed {
    high: Scratch,
    low: Option<Scratch>,
    /// Values from row to row.
    stride: usize,
    /// Where the bits of its largest magnitude are, behind those of its shares; not if that is 1, or does not matter.
    largest: Option<Rc<Scratch>>,
}

impl Packed {
    /// Room for so many rows, which are written by other kernels than those that pack.
    pub(super) fn new(
        engine: &Engine,
        way: Products,
        rows: usize,
        columns: usize,
        largest: Option<Rc<Scratch>>,
    ) -> Result<Self> {
        let stride = columns.next_multiple_of(8);
        let room = || (engine as &dyn gpu::Engine).scratch(rows * stride / 2, DType::U32);
        let low = (way == Products::Exact).then(room).transpose()?;
        Ok(Self { high: room()?, low, stride, largest })
    }

    /// What each row of a matrix has from the first element on, times its norm if there are norms. `bounded` says that
    /// no value of it is above 1 in magnitude.
    pub(super) fn of(
        engine: &Engine,
        way: Products,
        (buffer, first, stride): (&dyn Bindable, usize, usize),
        (rows, columns): (usize, usize),
        norms: Option<(&dyn Bindable, usize)>,
        bounded: bool,
    ) -> Result<Self> {
        let searched = way != Products::Bf16 && !bounded;
        let largest = || (engine as &dyn gpu::Engine).scratch(SHARES + 1, DType::U32);
        let largest = searched.then(largest).transpose()?.map(Rc::new);
        let packed = Self::new(engine, way, rows, columns, largest)?;
        let launch = |entry| {
            let launch = Launch::new("matmul", entry)
                .read_part("input", buffer, first..first + (rows.max(1) - 1) * stride + columns, "input_base")
                .size("rows", rows)
                .size("columns", columns)
                .size("input_stride", stride);
            match norms {
                Some((norms, first)) => launch.read_part("norms", norms, first..first + rows, "norms_base"),
                None => launch,
            }
        };
        if let Some(largest) = &packed.largest {
            engine.launch(launch("largest_magnitudes").write("largest", &**largest).groups([SHARES, 1, 1]))?;
        }
        let mut launch = launch("pack_halves")
            .write("high", &packed.high)
            .size("output_stride", packed.stride)
            .bits("bf16", u32::from(way == Products::Bf16))
            .row_of_groups((rows * packed.stride).div_ceil(PACKED));
        if let Some(low) = &packed.low {
            launch = launch.write("low", low);
        }
        if let Some(largest) = &packed.largest {
            launch = launch.write("largest", &**largest);
        }
        engine.launch(launch)?;
        Ok(packed)
    }

    /// The address of a row, of high parts.
    pub(super) fn address(&self, engine: &Engine, row: usize) -> Result<u64> {
        Ok(engine.address(&self.high)? + 2 * (row * self.stride) as u64)
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn largest(&self) -> Option<&Scratch> {
        self.largest.as_deref()
    }

    /// Adds it to what a launch reads, or writes, from a row on, under the names of its high and low parts.
    pub(super) fn bind<'a>(
        &'a self,
        launch: Launch<'a>,
        names: [&'static str; 2],
        first_row: usize,
        writes: bool,
    ) -> Launch<'a> {
        let bind = |launch: Launch<'a>, name, room: &'a Scratch| {
            let part = first_row * self.stride / 2..room.elements;
            if writes {
                launch.write_part(name, room, part, "base")
            } else {
                launch.read_part(name, room, part, "base")
            }
        };
        let launch = bind(launch, names[0], &self.high);
        match &self.low {
            Some(low) => bind(launch, names[1], low),
            None => launch,
        }
    }

    /// Adds the bits of its largest magnitude to what a launch reads.
    pub(super) fn bind_largest<'a>(&'a self, launch: Launch<'a>, name: &'static str) -> Launch<'a> {
        match &self.largest {
            Some(largest) => launch.read_part(name, &**largest, SHARES..SHARES + 1, "base"),
            None => launch,
        }
    }
}

/// A packed matrix from a row on, as it is stored.
#[derive(Clone, Copy)]
pub(super) struct PackedOperand<'a> {
    pub(super) packed: &'a Packed,
    pub(super) first_row: usize,
    /// Whether it is stored with its columns as rows.
    pub(super) transposed: bool,
}

/// A product whose tiles are launched alike, however they are multiplied.
struct Tiles<'a> {
    way: Products,
    /// (M, N, K)
    extents: (usize, usize, usize),
    transposed: (bool, bool),
    output: Output<'a>,
    finish: Finish<'a>,
}

impl Tiles<'_> {
    /// Adds parameters and buffers of what happens to a product.
    fn finishing<'s>(&'s self, launch: Launch<'s>) -> Launch<'s> {
        let (Output { buffer, first, stride, accumulate }, finish) = (self.output, self.finish);
        let (m, n, _) = self.extents;
        let launch = launch
            .read_if("FACTOR", "log_scale", finish.log_scale)
            .read_if("BIAS", "bias", finish.bias)
            .flag("GELU", finish.gelu)
            .flag("ACCUMULATE", accumulate)
            .write_part("output", buffer, first..first + (m - 1) * stride + n, "output_base")
            .size("output_stride", stride);
        match finish.kept {
            Some(kept) => launch.flag("KEEP", true).write_part("kept", kept, 0..m * n, "kept_base"),
            None => launch,
        }
    }

    /// Runs it, with its inner places in several parts where there would be too few blocks. `operands` adds both
    /// matrices to a launch.
    fn run<'s>(&'s self, engine: &Engine, operands: impl FnOnce(Launch<'s>) -> Launch<'s>) -> Result<()> {
        let (m, n, k) = self.extents;
        let (tile, parts) = cut(self.way, engine.gpu.properties().multiprocessors as usize, self.extents);
        let part = k.div_ceil(parts).next_multiple_of(32).max(32);
        let parts = k.div_ceil(part).max(1);
        let launch = Launch::new("matmul", entry(self.way, ["forward", "multiply_halves", "multiply_exact"]))
            .constant("TILE", tile as u32)
            .flag("BF16", self.way == Products::Bf16)
            .flag("TRANSPOSE_A", self.transposed.0)
            .flag("TRANSPOSE_B", self.transposed.1)
            .size("rows", m)
            .size("columns", n)
            .size("inner", k)
            .size("part", part)
            .groups([tiles(tile, m, n), parts, 1]);
        let launch = operands(launch);
        let shared = shared_memory(self.way, tile);
        if parts == 1 {
            return engine.launch_with(self.finishing(launch), shared);
        }
        let partials = (engine as &dyn gpu::Engine).scratch(parts * m * n, DType::F32)?;
        engine.launch_with(launch.write("output", &partials).size("output_stride", n), shared)?;
        self.finish_parts(engine, &partials, parts)
    }

    /// Adds the products of parts.
    fn finish_parts(&self, engine: &Engine, partials: &Scratch, parts: usize) -> Result<()> {
        let (m, n, _) = self.extents;
        let launch = Launch::new("matmul", "finish")
            .read("partials", partials)
            .size("rows", m)
            .size("columns", n)
            .size("parts", parts)
            .row_of_groups((m * n).div_ceil(GROUP));
        engine.launch(self.finishing(launch))
    }

    /// Runs it by Hopper's warpgroups. What is more than a factor comes after them.
    fn run_hopper(&self, engine: &Engine, sides: (PackedOperand<'_>, PackedOperand<'_>)) -> Result<()> {
        let (m, n, _) = self.extents;
        let Output { buffer, first, stride, accumulate } = self.output;
        let multiprocessors = engine.gpu.properties().multiprocessors as usize;
        let cut = hopper::Cut::of(multiprocessors, self.extents, MOST_PARTIAL / (m * n));
        let Finish { log_scale, bias, gelu, kept } = self.finish;
        let launch = Launch::new("matmul", "multiply_hopper");
        if cut.parts == 1 && bias.is_none() && !gelu && kept.is_none() {
            let launch = launch
                .read_if("FACTOR", "log_scale", log_scale)
                .flag("ACCUMULATE", accumulate)
                .write_part("output", buffer, first..first + (m - 1) * stride + n, "output_base")
                .size("output_stride", stride);
            return hopper::multiply(engine, self.way, cut, sides, self.extents, launch);
        }
        let partials = (engine as &dyn gpu::Engine).scratch(cut.parts * m * n, DType::F32)?;
        let launch = launch.write("output", &partials).size("output_stride", n);
        hopper::multiply(engine, self.way, cut, sides, self.extents, launch)?;
        self.finish_parts(engine, &partials, cut.parts)
    }
}

/// Runs a product.
pub(super) fn product(engine: &Engine, product: &Product<'_>) -> Result<()> {
    let Product { a, b, extents, output, finish } = *product;
    let (m, n, k) = extents;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let way = way(engine, extents);
    if way == Products::Plain {
        let tiles = Tiles { way, extents, transposed: (a.transposed, b.transposed), output, finish };
        return tiles.run(engine, |launch| {
            let launch = launch
                .read_part("a", a.buffer, a.range(&(0..m), &(0..k)), "a_base")
                .read_part("b", b.buffer, b.range(&(0..k), &(0..n)), "b_base")
                .size("a_stride", a.stride)
                .size("b_stride", b.stride);
            let launch = match a.norms(&(0..m), &(0..k)) {
                Some((norms, range)) => launch.read_part("norms_a", norms, range, "norms_a_base"),
                None => launch,
            };
            match b.norms(&(0..k), &(0..n)) {
                Some((norms, range)) => launch.read_part("norms_b", norms, range, "norms_b_base"),
                None => launch,
            }
        });
    }
    let pack = |operand: &Operand<'_>, rows: usize, columns: usize| {
        let stored = if operand.transposed { (columns, rows) } else { (rows, columns) };
        Packed::of(engine, way, (operand.buffer, operand.first, operand.stride), stored, operand.norms, false)
    };
    let (packed_a, packed_b) = (pack(&a, m, k)?, pack(&b, k, n)?);
    let a = PackedOperand { packed: &packed_a, first_row: 0, transposed: a.transposed };
    let b = PackedOperand { packed: &packed_b, first_row: 0, transposed: b.transposed };
    packed_product(engine, way, (a, b), extents, output, finish)
}

/// Runs a product of matrices that are packed.
pub(super) fn packed_product(
    engine: &Engine,
    way: Products,
    (a, b): (PackedOperand<'_>, PackedOperand<'_>),
    extents: (usize, usize, usize),
    output: Output<'_>,
    finish: Finish<'_>,
) -> Result<()> {
    let tiles = Tiles { way, extents, transposed: (a.transposed, b.transposed), output, finish };
    if hopper::is_wanted(engine, way) {
        return tiles.run_hopper(engine, (a, b));
    }
    tiles.run(engine, |launch| {
        let launch = a.packed.bind(launch, ["a", "low_a"], a.first_row, false);
        let launch = b.packed.bind(launch, ["b", "low_b"], b.first_row, false);
        let launch = a.packed.bind_largest(launch, "largest_a").size("a_stride", a.packed.stride);
        b.packed.bind_largest(launch, "largest_b").size("b_stride", b.packed.stride)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_keep_a_device_busy() {
        for way in [Products::Plain, Products::Exact, Products::F16, Products::Bf16] {
            // More than enough tiles, of either size.
            assert_eq!(cut(way, 132, (65_536, 3072, 768)), (128, 1), "{way}");
            // Too few of them, and hardly anything to do.
            assert_eq!(cut(way, 132, (7, 5, 3)), (64, 1), "{way}");
            assert_eq!(cut(way, 132, (64, 64, 0)), (64, 1), "{way}");
            // One tile, that takes long.
            let (tile, parts) = cut(way, 132, (64, 64, 100_000));
            assert!(tile == 64 && parts > 16, "{way}: {tile}, {parts}");
            // A few large tiles rather than many small ones.
            let (tile, parts) = cut(way, 132, (1024, 768, 16_384));
            assert!(tile == 128 && parts > 1, "{way}: {tile}, {parts}");
        }
    }
}
