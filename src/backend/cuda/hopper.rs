//! Matrix products and similarity sweeps by Hopper's warpgroups.
//!
//! They have run in the emulation alone, on no GPU: who wants them says so when a device is opened.

use cudarc::driver::sys::{CUtensorMapDataType, CUtensorMapSwizzle};

use super::driver::{TensorMap, Tiled};
use super::engine::Engine;
use super::matmul::{Packed, PackedOperand};
use super::settings::Products;
use crate::Result;
use crate::backend::gpu::Launch;

/// Inner places of a stage, and lines or inner places of a box.
const STEP: usize = 64;
/// Rows of a tile, and columns of a wide and of a narrow one.
const ROWS: usize = 128;
const WIDE: usize = 256;
const NARROW: usize = 128;

/// Rows and columns of a tile of a similarity matrix; a block has two beside each other.
pub(super) const SQUARE: usize = 128;
/// Bytes of shared memory of a block that sweeps.
const OF_SWEEPS: usize = 214_080;

/// Whether a device multiplies so.
pub(super) fn is_wanted(engine: &Engine, way: Products) -> bool {
    engine.settings.wgmma
        && matches!(way, Products::F16 | Products::Bf16)
        && engine.gpu.properties().capability == (9, 0)
        && engine.kernels.architecture().is_specific()
}

/// A product as it is cut into tiles and parts of the inner places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    columns: usize,
    /// Inner places of a part.
    pub(super) part: usize,
    pub(super) parts: usize,
    blocks: usize,
}

impl Cut {
    pub(super) fn of(multiprocessors: usize, (m, n, k): (usize, usize, usize), most_parts: usize) -> Self {
        let tiles = |columns: usize| m.div_ceil(ROWS) * n.div_ceil(columns);
        let columns = if n <= NARROW || tiles(WIDE) < multiprocessors { NARROW } else { WIDE };
        let parts = (multiprocessors / tiles(columns)).min(k / (2 * STEP)).clamp(1, most_parts.max(1));
        let part = k.div_ceil(parts).next_multiple_of(STEP).max(STEP);
        let parts = k.div_ceil(part).max(1);
        Self { columns, part, parts, blocks: (tiles(columns) * parts).min(multiprocessors) }
    }

    /// Bytes of shared memory of a block.
    fn shared(self) -> usize {
        if self.columns == WIDE { 197_696 } else { 197_728 }
    }
}

/// A side of a product as the tensor memory accelerator sees it: `lines` of so many inner places, of which a tile has
/// so many.
fn map(
    engine: &Engine,
    way: Products,
    operand: PackedOperand<'_>,
    by_lines: bool,
    (lines, inner): (usize, usize),
    of_tile: usize,
) -> Result<TensorMap> {
    let (extents, tile) = if by_lines { ([inner, lines], [STEP, of_tile]) } else { ([lines, inner], [STEP, STEP]) };
    engine.gpu.tensor_map(&Tiled {
        data_type: match way {
            Products::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        },
        address: operand.packed.address(engine, operand.first_row)?,
        extents: &extents.map(|extent| extent as u64),
        strides: &[2 * operand.packed.stride() as u64],
        tile: &tile.map(|extent| extent as u32),
        swizzle: CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    })
}

/// Runs a launch that has its parameters and its output, but no sides yet.
pub(super) fn multiply<'a>(
    engine: &Engine,
    way: Products,
    cut: Cut,
    (a, b): (PackedOperand<'a>, PackedOperand<'a>),
    (m, n, k): (usize, usize, usize),
    launch: Launch<'a>,
) -> Result<()> {
    let maps = [
        ("a", map(engine, way, a, !a.transposed, (m, k), ROWS)?),
        ("b", map(engine, way, b, b.transposed, (n, k), cut.columns)?),
    ];
    let launch = launch
        .flag("BF16", way == Products::Bf16)
        .flag("NARROW", cut.columns == NARROW)
        .flag("TRANSPOSE_A", a.transposed)
        .flag("TRANSPOSE_B", b.transposed)
        .size("rows", m)
        .size("columns", n)
        .size("inner", k)
        .size("part", cut.part)
        .row_of_groups(cut.blocks);
    let launch = a.packed.bind_largest(launch, "largest_a");
    let launch = b.packed.bind_largest(launch, "largest_b");
    engine.launch_mapped(launch, cut.shared(), &maps)
}

/// How many blocks sweep a panel.
pub(super) fn squares(engine: &Engine, rows: usize, columns: usize) -> usize {
    let pairs = rows.div_ceil(SQUARE) * columns.div_ceil(2 * SQUARE);
    pairs.min(engine.gpu.properties().multiprocessors as usize)
}

/// Runs a sweep over a panel of a matrix (R, C) of embeddings d wide, which are all mapped.
pub(super) fn sweep(
    engine: &Engine,
    way: Products,
    (rows, columns): (&Packed, &Packed),
    (of_rows, of_columns, width): (usize, usize, usize),
    launch: Launch<'_>,
) -> Result<()> {
    let operand = |packed| PackedOperand { packed, first_row: 0, transposed: false };
    let maps = [
        ("row_map", map(engine, way, operand(rows), true, (of_rows, width), SQUARE)?),
        ("column_map", map(engine, way, operand(columns), true, (of_columns, width), 2 * SQUARE)?),
    ];
    engine.launch_mapped(launch, OF_SWEEPS, &maps)
}
