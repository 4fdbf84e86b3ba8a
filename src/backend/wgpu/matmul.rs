//! Launches of `shaders/matmul.wgsl`.

use std::ops::Range;

use super::engine::{Engine, Matrices};
use crate::Result;
use crate::backend::gpu::matmul::{Finish, Operand, Output, Product};
use crate::backend::gpu::{Launch, Scratch};
use crate::backend::philox::{philox, uniform};
use crate::error::DType;

/// Elements of a workgroup that finishes.
const GROUP: usize = 256;
/// Inner places that a part has at least.
const SHORTEST_PART: usize = 128;
/// Values of the partial products of one product: 32 MiB at most.
const MOST_PARTIAL: usize = 8 << 20;

/// Multiplications from which on a product takes longer than finding the largest magnitudes of its matrices.
const LARGE_PRODUCT: usize = 1 << 28;

/// Rows and columns of a tile. Large ones read less for each product; small ones are more, and keep a device busy that
/// has hundreds of units. A software driver has few, and is faster with large ones by half.
pub(super) fn tile_size(engine: &Engine, rows: usize, columns: usize) -> usize {
    let tiles = rows.div_ceil(128) * columns.div_ceil(128);
    let enough = if engine.is_hardware() { tiles >= engine.enough_groups() } else { rows > 64 && columns > 64 };
    if enough { 128 } else { 64 }
}

/// Whether a product is computed with cooperative matrices: where the device has them and it is large enough to pay for
/// finding the largest magnitudes first.
pub(super) fn uses_matrices(engine: &Engine, (m, n, k): (usize, usize, usize)) -> bool {
    match engine.matrices {
        Matrices::None => false,
        Matrices::Cooperative => m >= 128 && n >= 64 && m * n * k >= LARGE_PRODUCT,
        // To test it.
        Matrices::Emulated => m * n * k > 0,
    }
}

/// The largest magnitudes of both matrices of a product.
fn largest_magnitudes(
    engine: &Engine,
    product: &Product<'_>,
    rows: &Range<usize>,
    inner: &Range<usize>,
) -> Result<Scratch> {
    let largest = engine.scratch(2, DType::U32)?;
    engine.launch(
        Launch::new("elementwise", "fill")
            .write("output", &largest)
            .size("output_base", 0)
            .float("value", 0.0)
            .size("count", 2)
            .row_of_groups(1),
    )?;
    let columns = 0..product.extents.1;
    for (which, (operand, rows, columns)) in
        [(product.a, rows, inner), (product.b, inner, &columns)].into_iter().enumerate()
    {
        let (stored_rows, stored_columns) =
            if operand.transposed { (columns.len(), rows.len()) } else { (rows.len(), columns.len()) };
        let mut launch = Launch::new("matmul", "largest_magnitudes")
            .read_part("a", operand.buffer, operand.range(rows, columns), "a_base")
            .write("largest", &largest)
            .size("rows", stored_rows)
            .size("columns", stored_columns)
            .size("a_stride", operand.stride)
            .size("which", which)
            .groups([stored_columns.div_ceil(256), stored_rows.div_ceil(16), 1]);
        if let Some((norms, range)) = operand.norms(rows, columns) {
            launch = launch.flag("NORMS_A", true).read_part("norms_a", norms, range, "norms_a_base");
        }
        engine.launch(launch)?;
    }
    Ok(largest)
}

/// Adds parameters and buffers of what happens to a product.
fn finishing<'a>(launch: Launch<'a>, finish: Finish<'a>, columns: usize, rows: &Range<usize>) -> Launch<'a> {
    let launch = launch
        .read_if("FACTOR", "log_scale", finish.log_scale)
        .read_if("BIAS", "bias", finish.bias)
        .flag("GELU", finish.gelu);
    match finish.kept {
        Some(kept) => {
            launch.flag("KEEP", true).write_part("kept", kept, rows.start * columns..rows.end * columns, "kept_base")
        }
        None => launch,
    }
}

/// Runs a product.
pub(super) fn product(engine: &Engine, product: &Product<'_>) -> Result<()> {
    let matrices = if uses_matrices(engine, product.extents) { engine.matrices } else { Matrices::None };
    in_pieces(engine, product, matrices)
}

/// Runs a product, in pieces where its matrices are larger than a binding.
fn in_pieces(engine: &Engine, product: &Product<'_>, matrices: Matrices) -> Result<()> {
    let (m, n, k) = product.extents;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let most = (engine.limits.max_storage_buffer_binding_size / 4) as usize - 64;
    let fits =
        |operand: &Operand<'_>, rows: usize, columns: usize| operand.range(&(0..rows), &(0..columns)).len() <= most;
    let output = Operand {
        buffer: product.output.buffer,
        first: product.output.first,
        stride: product.output.stride,
        transposed: false,
        norms: None,
    };
    // Rows of the output in one piece: their part of `a` has to fit too, if it is stored by them.
    let (mut rows, mut inner) = (m, k);
    while rows > 1 && !(fits(&output, rows, n) && (product.a.transposed || fits(&product.a, rows, k))) {
        rows = rows.div_ceil(2).next_multiple_of(64).min(rows - 1);
    }
    // Inner places in one piece: matrices stored by them have to fit.
    let by_inner = |inner: usize| {
        (!product.a.transposed || fits(&product.a, rows, inner)) && (product.b.transposed || fits(&product.b, inner, n))
    };
    while inner > 1 && !by_inner(inner) {
        inner = inner.div_ceil(2).next_multiple_of(64).min(inner - 1);
    }
    for first in (0..m).step_by(rows) {
        let of_rows = first..m.min(first + rows);
        let pieces = k.div_ceil(inner.max(1)).max(1);
        for piece in 0..pieces {
            let of_inner = piece * inner..k.min((piece + 1) * inner);
            // Earlier pieces are added to; bias and activation would have to come last, but what has them is never
            // stored by inner places.
            let accumulate = product.output.accumulate || piece > 0;
            one_piece(engine, product, matrices, &output, of_rows.clone(), of_inner, accumulate)?;
        }
    }
    Ok(())
}

fn one_piece(
    engine: &Engine,
    product: &Product<'_>,
    matrices: Matrices,
    output: &Operand<'_>,
    rows: Range<usize>,
    inner: Range<usize>,
    accumulate: bool,
) -> Result<()> {
    let Product { a, b, finish, .. } = *product;
    let (m, n, k) = (rows.len(), product.extents.1, inner.len());
    let columns = 0..n;
    let largest = match matrices {
        Matrices::None => None,
        _ => Some(largest_magnitudes(engine, product, &rows, &inner)?),
    };
    let tile = if largest.is_some() { 128 } else { tile_size(engine, m, n) };
    let tiles = [n.div_ceil(tile), m.div_ceil(tile)];
    let parts = (engine.enough_groups() / (tiles[0] * tiles[1]).max(1))
        .min(k / SHORTEST_PART)
        .min(MOST_PARTIAL / (m * n))
        .clamp(1, 64);
    let plain = finish.bias.is_none() && !finish.gelu && finish.kept.is_none();
    let (norms_a, norms_b) = (a.norms(&rows, &inner), b.norms(&inner, &columns));
    let entry = match (parts, plain) {
        (2.., _) => "partial",
        (_, true) => "product",
        (_, false) => "forward",
    };
    let part = k.div_ceil(parts).next_multiple_of(16);
    let parts = k.div_ceil(part).max(1);
    let launch = Launch::new("matmul", entry);
    let mut launch = match &largest {
        Some(largest) => launch.constant("MATRICES", matrices as u32).read("largest", largest),
        None => launch.constant("TILE", tile as u32),
    };
    launch = launch
        .flag("TRANSPOSE_A", a.transposed)
        .flag("TRANSPOSE_B", b.transposed)
        .read_part("a", a.buffer, a.range(&rows, &inner), "a_base")
        .read_part("b", b.buffer, b.range(&inner, &columns), "b_base")
        .size("rows", m)
        .size("columns", n)
        .size("inner", k)
        .size("part", part)
        .size("a_stride", a.stride)
        .size("b_stride", b.stride)
        .groups([tiles[0], tiles[1], parts]);
    if let Some((norms, range)) = norms_a {
        launch = launch.flag("NORMS_A", true).read_part("norms_a", norms, range, "norms_a_base");
    }
    if let Some((norms, range)) = norms_b {
        launch = launch.flag("NORMS_B", true).read_part("norms_b", norms, range, "norms_b_base");
    }
    let destination = output.range(&rows, &columns);
    if entry != "partial" {
        launch = launch
            .flag("ACCUMULATE", accumulate)
            .write_part("output", output.buffer, destination, "output_base")
            .size("output_stride", output.stride);
        return engine.launch(finishing(launch, finish, n, &rows));
    }
    let partials = engine.scratch(parts * m * n, DType::F32)?;
    engine.launch(launch.write("output", &partials).size("output_base", 0).size("output_stride", n))?;
    let launch = Launch::new("matmul", "finish")
        .flag("ACCUMULATE", accumulate)
        .read("partials", &partials)
        .write_part("output", output.buffer, destination, "output_base")
        .size("output_stride", output.stride)
        .size("rows", m)
        .size("columns", n)
        .size("parts", parts)
        .row_of_groups((m * n).div_ceil(GROUP));
    engine.launch(finishing(launch, finish, n, &rows))
}

/// Whether cooperative matrices give what ordinary arithmetic gives on this device. What is experimental in wgpu, and
/// new in drivers, is tried before it is trusted.
pub(super) fn matrices_hold(engine: &Engine, matrices: Matrices) -> Result<bool> {
    // No multiples of a tile, several steps and several workgroups.
    const EXTENTS: (usize, usize, usize) = (150, 203, 77);
    let (m, n, k) = EXTENTS;
    let uploaded = |count: usize, seed: u32| -> Result<Scratch> {
        let words = |i| philox([i as u32, 0, 0, 0], [seed, 0])[0];
        let values: Vec<f32> = (0..count).map(|i| uniform(words(i)) - 0.5).collect();
        let buffer = engine.scratch(count, DType::F32)?;
        engine.write(&buffer, bytemuck::cast_slice(&values))?;
        Ok(buffer)
    };
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        let (a, b) = (uploaded(m * k, 1)?, uploaded(k * n, 2)?);
        let operand = |buffer, transposed, rows: usize, columns: usize| Operand {
            buffer,
            first: 0,
            stride: if transposed { rows } else { columns },
            transposed,
            norms: None,
        };
        let run = |matrices| -> Result<Vec<f32>> {
            let output = engine.scratch(m * n, DType::F32)?;
            let product = Product {
                a: operand(&a, transpose_a, m, k),
                b: operand(&b, transpose_b, k, n),
                extents: EXTENTS,
                output: Output { buffer: &output, first: 0, stride: n, accumulate: false },
                finish: Finish::default(),
            };
            in_pieces(engine, &product, matrices)?;
            let mut values = vec![0.0f32; m * n];
            engine.read(&output, bytemuck::cast_slice_mut(&mut values))?;
            Ok(values)
        };
        let (expected, found) = (run(Matrices::None)?, run(matrices)?);
        // Sums of 77 products of at most 1/4, good to a few units in the last place of their size.
        let holds = expected.iter().zip(&found).all(|(expected, found)| (expected - found).abs() < 2e-6);
        if !holds {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use ::wgpu;

    use super::*;
    use crate::Device;
    use crate::backend::wgpu::{Settings, Wgpu};

    #[test]
    fn matrices_that_the_driver_refuses_leave_the_device_usable() {
        let Ok(opened) = Wgpu::open(0, Settings::default()) else { return println!("skipped: there is no device") };
        let engine = &opened.engine;
        let has = engine.device.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        let found = engine.tried(matrices_hold(engine, Matrices::Cooperative));
        assert_eq!(found.is_some(), has);
        assert!(matrices_hold(engine, Matrices::None).unwrap());
        let device = Device::new(opened);
        assert_eq!(device.tensor(&[1.0f32, 2.0], [2]).unwrap().to_host::<f32>().unwrap(), [1.0, 2.0]);
    }
}
