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

// The element of `a` that stands in a row of op(a).
fn left_value(row: u32, k: u32) -> f32 {
    if (row >= params.rows) {
        return 0.0;
    }
#ifdef TRANSPOSE_A
    let stored = k;
    let value = a[params.a_base + k * params.a_stride + row];
#else
    let stored = row;
    let value = a[params.a_base + row * params.a_stride + k];
#endif
#ifdef NORMS_A
    return value * norms_a[params.norms_a_base + stored];
#else
    return value;
#endif
}

fn left_values(row: u32, k: u32) -> vec4<f32> {
    return vec4<f32>(left_value(row, k), left_value(row + 1u, k), left_value(row + 2u, k), left_value(row + 3u, k));
}

fn right_value(column: u32, k: u32) -> f32 {
    if (column >= params.columns) {
        return 0.0;
    }
#ifdef TRANSPOSE_B
    let stored = column;
    let value = b[params.b_base + column * params.b_stride + k];
#else
    let stored = k;
    let value = b[params.b_base + k * params.b_stride + column];
#endif
#ifdef NORMS_B
    return value * norms_b[params.norms_b_base + stored];
#else
    return value;
#endif
}

fn right_values(column: u32, k: u32) -> vec4<f32> {
    return vec4<f32>(
        right_value(column, k),
        right_value(column + 1u, k),
        right_value(column + 2u, k),
        right_value(column + 3u, k),
    );
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

fn multiply_and_finish(id: vec3<u32>, lane: u32, subgroup: vec2<u32>) {
    let first = id.z * params.part;
    let end = min(first + params.part, params.inner);
#ifdef MATRICES
    multiply_and_write_tile(id, first, end, lane, subgroup);
#else
    multiply_tile(id.y * TILE, id.x * TILE, first, end, lane);
    for (var u = 0u; u < SIDES; u++) {
        for (var i = 0u; i < 4u; i++) {
            let row = id.y * TILE + (lane / 16u + 16u * u) * 4u + i;
            for (var v = 0u; v < SIDES; v++) {
                let products = tile_products[(u * SIDES + v) * 4u + i];
                let column = id.x * TILE + (lane % 16u + 16u * v) * 4u;
                for (var j = 0u; j < 4u; j++) {
                    write_product(products[j], row, column + j, id.z);
                }
            }
        }
    }
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
