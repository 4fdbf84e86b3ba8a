//! Launches of `matmul`.

use super::engine::Engine;
use super::settings::Products;
use crate::Result;
use crate::backend::gpu::matmul::{Finish, Product};
use crate::backend::gpu::{self, Engine as _, Launch};
use crate::error::DType;

/// Elements of a block that finishes.
const GROUP: usize = 1024;
/// Inner places that a part has at least.
const SHORTEST_PART: usize = 128;
/// Values of the partial products of one product: 32 MiB at most.
const MOST_PARTIAL: usize = 8 << 20;

/// How products are computed, in words.
pub(super) fn description(engine: &Engine) -> String {
    engine.settings.products.to_string()
}

/// How far products round their factors, as a part of themselves.
pub(super) fn rounding(engine: &Engine) -> f64 {
    match engine.settings.products {
        Products::Exact | Products::Plain => 0.0,
        Products::Bf16 => f64::from(2.0f32.powi(-9)),
        Products::F16 => f64::from(2.0f32.powi(-12)),
    }
}

/// Blocks that keep the device busy.
fn enough_blocks(engine: &Engine) -> usize {
    2 * engine.gpu.properties().multiprocessors as usize
}

/// Rows and columns of a tile. Large ones read less for each product; small ones are more, and keep a device busy.
pub(super) fn tile_size(engine: &Engine, rows: usize, columns: usize) -> usize {
    let tiles = rows.div_ceil(128) * columns.div_ceil(128);
    if tiles >= enough_blocks(engine) { 128 } else { 64 }
}

/// Adds parameters and buffers of what happens to a product.
fn finishing<'a>(launch: Launch<'a>, finish: Finish<'a>, columns: usize, rows: usize) -> Launch<'a> {
    let launch = launch
        .read_if("FACTOR", "log_scale", finish.log_scale)
        .read_if("BIAS", "bias", finish.bias)
        .flag("GELU", finish.gelu);
    match finish.kept {
        Some(kept) => launch.flag("KEEP", true).write_part("kept", kept, 0..rows * columns, "kept_base"),
        None => launch,
    }
}

/// Runs a product, with its inner places in several parts where there would be too few blocks.
pub(super) fn product(engine: &Engine, product: &Product<'_>) -> Result<()> {
    let Product { a, b, extents: (m, n, k), output, finish } = *product;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let tile = tile_size(engine, m, n);
    let tiles = m.div_ceil(tile) * n.div_ceil(tile);
    let parts = (enough_blocks(engine) / tiles).min(k / SHORTEST_PART).min(MOST_PARTIAL / (m * n)).clamp(1, 64);
    let part = k.div_ceil(parts).next_multiple_of(16).max(16);
    let parts = k.div_ceil(part).max(1);
    let mut launch = Launch::new("matmul", "forward")
        .constant("TILE", tile as u32)
        .flag("TRANSPOSE_A", a.transposed)
        .flag("TRANSPOSE_B", b.transposed)
        .read_part("a", a.buffer, a.range(&(0..m), &(0..k)), "a_base")
        .read_part("b", b.buffer, b.range(&(0..k), &(0..n)), "b_base")
        .size("rows", m)
        .size("columns", n)
        .size("inner", k)
        .size("part", part)
        .size("a_stride", a.stride)
        .size("b_stride", b.stride)
        .groups([tiles, parts, 1]);
    if let Some((norms, range)) = a.norms(&(0..m), &(0..k)) {
        launch = launch.read_part("norms_a", norms, range, "norms_a_base");
    }
    if let Some((norms, range)) = b.norms(&(0..k), &(0..n)) {
        launch = launch.read_part("norms_b", norms, range, "norms_b_base");
    }
    let destination = output.first..output.first + (m - 1) * output.stride + n;
    if parts == 1 {
        let launch = launch
            .flag("ACCUMULATE", output.accumulate)
            .write_part("output", output.buffer, destination, "output_base")
            .size("output_stride", output.stride);
        return engine.launch(finishing(launch, finish, n, m));
    }
    let partials = (engine as &dyn gpu::Engine).scratch(parts * m * n, DType::F32)?;
    engine.launch(launch.write("output", &partials).size("output_stride", n))?;
    let launch = Launch::new("matmul", "finish")
        .flag("ACCUMULATE", output.accumulate)
        .read("partials", &partials)
        .write_part("output", output.buffer, destination, "output_base")
        .size("output_stride", output.stride)
        .size("rows", m)
        .size("columns", n)
        .size("parts", parts)
        .groups([(m * n).div_ceil(GROUP), 1, 1]);
    engine.launch(finishing(launch, finish, n, m))
}
