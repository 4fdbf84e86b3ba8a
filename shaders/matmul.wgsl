// Matrix products.
//
//     forward   output (M, N) = activation(op(a) · op(b) + bias), or output += op(a) · op(b)
//     product   output (M, N) (+)= factor · op(norms_a · a) · op(norms_b · b)
//     partial   output (S, M, N) = op(a) · op(b) over the inner places of each of S parts
//     largest_magnitudes   largest[which] = the bits of the largest magnitude of norms_a · a, if they are larger
//     finish    output (M, N) = activation(Σ_S partials + bias), or output (+)= factor · Σ_S partials
//
// op(a) is (M, K) and stored so, or as (K, M) with TRANSPOSE_A; op(b) is (K, N), or stored as (N, K) with TRANSPOSE_B.
// Matrices are parts of larger ones: they begin somewhere and have a stride from row to row. Norms are one factor for
// each row as it is stored. The activation GELU is that of shared/gelu.wgsl; KEEP has its input written too. `factor` is
// exp(log_scale[0]).
//
// Launch: 256 invocations for each TILE × TILE of the output, in x and y by columns and rows, in z by parts; of
// `finish`, 256 elements for each workgroup; of `largest`, 16 rows of 256 columns. With MATRICES tiles are those of
// shared/cooperative_tile.wgsl, which need what `largest` finds.

#ifdef MATRICES_1
#define MATRICES
#endif
#ifdef MATRICES_2
#define MATRICES
#endif

#import groups
#import numerics
#ifdef GELU
#import gelu
#endif

#ifndef FINISH
#ifndef LARGEST_MAGNITUDES
#define TILES
#endif
#endif

struct Params {
    rows: u32,
    columns: u32,
#ifndef LARGEST_MAGNITUDES
    output_base: u32,
    output_stride: u32,
#endif
#ifdef LARGEST_MAGNITUDES
    a_base: u32,
    a_stride: u32,
    which: u32,
#ifdef NORMS_A
    norms_a_base: u32,
#endif
#endif
#ifdef TILES
    inner: u32,
    a_base: u32,
    a_stride: u32,
    b_base: u32,
    b_stride: u32,
    part: u32,
#ifdef NORMS_A
    norms_a_base: u32,
#endif
#ifdef NORMS_B
    norms_b_base: u32,
#endif
#endif
#ifdef FINISH
    groups: u32,
    parts: u32,
#endif
#ifdef KEEP
    kept_base: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read_write> kept: array<f32>;
@group(0) @binding(6) var<storage, read> log_scale: array<f32>;
@group(0) @binding(7) var<storage, read> norms_a: array<f32>;
@group(0) @binding(8) var<storage, read> norms_b: array<f32>;
@group(0) @binding(9) var<storage, read> partials: array<f32>;
#ifdef LARGEST_MAGNITUDES
@group(0) @binding(10) var<storage, read_write> largest: array<atomic<u32>>;
#else
@group(0) @binding(10) var<storage, read> largest: array<u32>;
#endif

#ifdef LARGEST_MAGNITUDES

var<workgroup> largest_here: array<u32, 256>;

// The order of bits is that of magnitudes; the largest of integers is the same in whatever order they come.
@compute @workgroup_size(256)
fn largest_magnitudes(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    var bits = 0u;
    if (column < params.columns) {
        for (var row = id.y * 16u; row < min(id.y * 16u + 16u, params.rows); row++) {
            var value = a[params.a_base + row * params.a_stride + column];
#ifdef NORMS_A
            value *= norms_a[params.norms_a_base + row];
#endif
            bits = max(bits, bitcast<u32>(abs(value)));
        }
    }
    largest_here[lane] = bits;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            largest_here[lane] = max(largest_here[lane], largest_here[lane + step]);
        }
        workgroupBarrier();
    }
    if (lane == 0u) {
        atomicMax(&largest[params.which], largest_here[0]);
    }
}

#else

// What becomes of an element of the product.
fn finished(product: f32, row: u32, column: u32) {
    let place = params.output_base + row * params.output_stride + column;
    var value = product;
#ifdef FACTOR
    value *= exponential(log_scale[0]);
#endif
#ifdef BIAS
    value += bias[column];
#endif
#ifdef KEEP
    kept[params.kept_base + row * params.columns + column] = value;
#endif
#ifdef GELU
    value = gelu(value);
#endif
#ifdef ACCUMULATE
    output[place] += value;
#else
    output[place] = value;
#endif
}

#ifdef FINISH

@compute @workgroup_size(256)
fn finish(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let size = params.rows * params.columns;
    let i = group_number(id, lines) * 256u + lane;
    if (i < size) {
        var total = 0.0;
        for (var part = 0u; part < params.parts; part++) {
            total += partials[part * size + i];
        }
        finished(total, i / params.columns, i % params.columns);
    }
}

#else

#ifndef TRANSPOSE_A
#define LEFT_BY_ROWS
#endif
#ifdef TRANSPOSE_B
#define RIGHT_BY_COLUMNS
#endif
#ifdef MATRICES
#import cooperative_tile
#else
#import tile
#endif

fn prepare(row: u32, column: u32) {}

// The element of op(a) without its norm; 0 outside.
fn left_value(row: u32, k: u32) -> f32 {
    if (row >= params.rows) {
        return 0.0;
    }
#ifdef TRANSPOSE_A
    return a[params.a_base + k * params.a_stride + row];
#else
    return a[params.a_base + row * params.a_stride + k];
#endif
}

#ifdef NORMS_A
fn left_norm(row: u32) -> f32 {
    return norms_a[params.norms_a_base + min(row, params.rows - 1u)];
}
#endif

fn left_values(row: u32, k: u32) -> vec4<f32> {
    let values =
        vec4<f32>(left_value(row, k), left_value(row + 1u, k), left_value(row + 2u, k), left_value(row + 3u, k));
#ifdef NORMS_A
#ifdef TRANSPOSE_A
    return values * norms_a[params.norms_a_base + k];
#else
    return values * vec4<f32>(left_norm(row), left_norm(row + 1u), left_norm(row + 2u), left_norm(row + 3u));
#endif
#else
    return values;
#endif
}

// The element of op(b) without its norm; 0 outside.
fn right_value(column: u32, k: u32) -> f32 {
    if (column >= params.columns) {
        return 0.0;
    }
#ifdef TRANSPOSE_B
    return b[params.b_base + column * params.b_stride + k];
#else
    return b[params.b_base + k * params.b_stride + column];
#endif
}

#ifdef NORMS_B
fn right_norm(column: u32) -> f32 {
    return norms_b[params.norms_b_base + min(column, params.columns - 1u)];
}
#endif

fn right_values(column: u32, k: u32) -> vec4<f32> {
    let values = vec4<f32>(
        right_value(column, k),
        right_value(column + 1u, k),
        right_value(column + 2u, k),
        right_value(column + 3u, k),
    );
#ifdef NORMS_B
#ifdef TRANSPOSE_B
    let of_columns =
        vec4<f32>(right_norm(column), right_norm(column + 1u), right_norm(column + 2u), right_norm(column + 3u));
    return values * of_columns;
#else
    return values * norms_b[params.norms_b_base + k];
#endif
#else
    return values;
#endif
}

// An element of the product of one part.
fn write_product(product: f32, row: u32, column: u32, part: u32) {
    if (row < params.rows && column < params.columns) {
#ifdef PARTIAL
        output[(part * params.rows + row) * params.columns + column] = product;
#else
        finished(product, row, column);
#endif
    }
}

#ifndef MATRICES

fn write_row(at: u32, row: u32, column: u32, part: u32) {
    let products = tile_products[at];
    write_product(products.x, row, column, part);
    write_product(products.y, row, column + 1u, part);
    write_product(products.z, row, column + 2u, part);
    write_product(products.w, row, column + 3u, part);
}

fn write_quarter(at: u32, row: u32, column: u32, part: u32) {
    write_row(at, row, column, part);
    write_row(at + 1u, row + 1u, column, part);
    write_row(at + 2u, row + 2u, column, part);
    write_row(at + 3u, row + 3u, column, part);
}

#endif

fn multiply_and_finish(id: vec3<u32>, lane: u32, subgroup: vec2<u32>) {
    let first = id.z * params.part;
    let end = min(first + params.part, params.inner);
#ifdef MATRICES
    multiply_and_write_tile(id, first, end, lane, subgroup);
#else
    multiply_tile(id.y * TILE, id.x * TILE, first, end, lane);
    let row = id.y * TILE + (lane / 16u) * 4u;
    let column = id.x * TILE + (lane % 16u) * 4u;
    write_quarter(0u, row, column, id.z);
#ifndef TILE_64
    write_quarter(4u, row, column + 64u, id.z);
    write_quarter(8u, row + 64u, column, id.z);
    write_quarter(12u, row + 64u, column + 64u, id.z);
#endif
#endif
}

#endif
#endif

#ifdef FORWARD
@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
#ifdef MATRICES_1
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
#endif
) {
#ifdef MATRICES_1
    multiply_and_finish(id, lane, vec2<u32>(subgroup, invocation));
#else
    multiply_and_finish(id, lane, vec2<u32>());
#endif
}
#endif

#ifdef PRODUCT
@compute @workgroup_size(256)
fn product(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
#ifdef MATRICES_1
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
#endif
) {
#ifdef MATRICES_1
    multiply_and_finish(id, lane, vec2<u32>(subgroup, invocation));
#else
    multiply_and_finish(id, lane, vec2<u32>());
#endif
}
#endif

#ifdef PARTIAL
@compute @workgroup_size(256)
fn partial(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
#ifdef MATRICES_1
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
#endif
) {
#ifdef MATRICES_1
    multiply_and_finish(id, lane, vec2<u32>(subgroup, invocation));
#else
    multiply_and_finish(id, lane, vec2<u32>());
#endif
}
#endif
