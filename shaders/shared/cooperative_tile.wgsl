// A tile of a matrix product, 128 × 128, by cooperative matrices of 16-bit numbers with f32 sums, as exact as f32.
//
// Each value, scaled by a power of two, is the sum of two 16-bit numbers, high + low / 2^11: 22 bits of it. A product
// of two values is high·high + (high·low + low·high) / 2^11; what is left out is below the rounding of f32. `scales`
// brings the largest magnitude of each matrix to between 2^14 and 2^15: values down to 2^−50 of it are there.
//
// The interface is that of tile.wgsl: `left_values`, `right_values`, `prepare`, LEFT_BY_ROWS, RIGHT_BY_COLUMNS. The
// importing file's `write_product` takes the elements. A subgroup of 32 invocations has 32 rows of 64 columns. With MATRICES 2
// the fragments are computed by ordinary arithmetic, for devices without cooperative matrices: to test the rest.

enable f16;
#ifdef MATRICES_1
enable wgpu_cooperative_matrix;
#endif

#import scales

const TILE: u32 = 128u;
const STEP: u32 = 16u;
const GROUPS: u32 = TILE / 4u;
// From row to row of a matrix in workgroup memory; 8 more than needed, against conflicts of memory banks.
const LINE: u32 = STEP + 8u;
// What low parts are multiplied with.
const LOW: f32 = 2048.0;

var<workgroup> left_high: array<f16, TILE * LINE>;
var<workgroup> left_low: array<f16, TILE * LINE>;
var<workgroup> right_high: array<f16, TILE * LINE>;
var<workgroup> right_low: array<f16, TILE * LINE>;
#ifdef MATRICES_1
var<workgroup> fragments: array<f32, 8u * 256u>;
#else
var<private> tile_products: array<vec4<f32>, 16>;
var<private> tile_rests: array<vec4<f32>, 16>;
#endif

struct Places {
    row: u32,
    left_k: u32,
    left_step: u32,
    column: u32,
    right_k: u32,
    right_step: u32,
}

// Where in the tile the first of the two groups of four values stands that an invocation brings, of each matrix, and
// how far the second is in k; where it is 0 the second is 64 rows (columns) further.
fn places(lane: u32) -> Places {
    var here: Places;
#ifdef LEFT_BY_ROWS
    here.row = 4u * (lane / STEP);
    here.left_k = lane % STEP;
    here.left_step = 0u;
#else
    here.row = 4u * (lane % GROUPS);
    here.left_k = lane / GROUPS;
    here.left_step = 8u;
#endif
#ifdef RIGHT_BY_COLUMNS
    here.column = 4u * (lane / STEP);
    here.right_k = lane % STEP;
    here.right_step = 0u;
#else
    here.column = 4u * (lane % GROUPS);
    here.right_k = lane / GROUPS;
    here.right_step = 8u;
#endif
    return here;
}

fn put_left(row: u32, k: u32, values: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        let high = f16(values[i]);
        left_high[(row + i) * LINE + k] = high;
        left_low[(row + i) * LINE + k] = f16((values[i] - f32(high)) * LOW);
    }
}

fn put_right(column: u32, k: u32, values: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        let high = f16(values[i]);
        right_high[(column + i) * LINE + k] = high;
        right_low[(column + i) * LINE + k] = f16((values[i] - f32(high)) * LOW);
    }
}

fn left_at(row: u32, k: u32, end: u32) -> vec4<f32> {
    if (k < end) {
        return left_values(row, k);
    }
    return vec4<f32>();
}

fn right_at(column: u32, k: u32, end: u32) -> vec4<f32> {
    if (k < end) {
        return right_values(column, k);
    }
    return vec4<f32>();
}

// Brings the values of the inner places from k on into workgroup memory.
fn fill_tile(first_row: u32, first_column: u32, k: u32, end: u32, here: Places, scales: vec2<f32>) {
    let second_row = here.row + select(0u, 64u, here.left_step == 0u);
    let second_column = here.column + select(0u, 64u, here.right_step == 0u);
    let left = left_at(first_row + here.row, k + here.left_k, end);
    let left_second = left_at(first_row + second_row, k + here.left_k + here.left_step, end);
    let right = right_at(first_column + here.column, k + here.right_k, end);
    let right_second = right_at(first_column + second_column, k + here.right_k + here.right_step, end);
    workgroupBarrier();
    put_left(here.row, here.left_k, scales.x * left);
    put_left(second_row, here.left_k + here.left_step, scales.x * left_second);
    put_right(here.column, here.right_k, scales.y * right);
    put_right(second_column, here.right_k + here.right_step, scales.y * right_second);
    workgroupBarrier();
}

#ifdef MATRICES_1

// Writes one fragment of each subgroup, whose first row and column are given.
fn write_fragment(
    products: coop_mat16x16<f32, C>,
    rests: coop_mat16x16<f32, C>,
    row: u32,
    column: u32,
    factors: vec2<f32>,
    part: u32,
    subgroup: vec2<u32>,
) {
    let first = subgroup.x * 256u;
    var all: array<f32, 8>;
    coopStoreT(rests, &fragments[first], 16u);
    workgroupBarrier();
    for (var i = 0u; i < 8u; i++) {
        all[i] = fragments[first + 32u * i + subgroup.y] / LOW;
    }
    workgroupBarrier();
    coopStoreT(products, &fragments[first], 16u);
    workgroupBarrier();
    for (var i = 0u; i < 8u; i++) {
        let place = 32u * i + subgroup.y;
        let product = (fragments[first + place] + all[i]) * factors.x * factors.y;
        write_product(product, row + place / 16u, column + place % 16u, part);
    }
    workgroupBarrier();
}

// Multiplies and writes a tile: `write_product(product, row, column, part)` of the importing file takes its elements.
fn multiply_and_write_tile(
    id: vec3<u32>,
    first: u32,
    end: u32,
    lane: u32,
    subgroup: vec2<u32>,
) {
    let first_row = id.y * TILE;
    let first_column = id.x * TILE;
    prepare(first_row, first_column);
    let here = places(lane);
    let of_matrices = matrix_scales();
    let row = 32u * (subgroup.x / 2u);
    let column = 64u * (subgroup.x % 2u);
    var c00 = coop_mat16x16<f32, C>();
    var r00 = coop_mat16x16<f32, C>();
    var c01 = coop_mat16x16<f32, C>();
    var r01 = coop_mat16x16<f32, C>();
    var c02 = coop_mat16x16<f32, C>();
    var r02 = coop_mat16x16<f32, C>();
    var c03 = coop_mat16x16<f32, C>();
    var r03 = coop_mat16x16<f32, C>();
    var c10 = coop_mat16x16<f32, C>();
    var r10 = coop_mat16x16<f32, C>();
    var c11 = coop_mat16x16<f32, C>();
    var r11 = coop_mat16x16<f32, C>();
    var c12 = coop_mat16x16<f32, C>();
    var r12 = coop_mat16x16<f32, C>();
    var c13 = coop_mat16x16<f32, C>();
    var r13 = coop_mat16x16<f32, C>();
    for (var k = first; k < end; k += STEP) {
        fill_tile(first_row, first_column, k, end, here, of_matrices);
        let high0 = coopLoadT<coop_mat16x16<f16, A>>(&left_high[row * LINE], LINE);
        let high1 = coopLoadT<coop_mat16x16<f16, A>>(&left_high[(row + 16u) * LINE], LINE);
        let low0 = coopLoadT<coop_mat16x16<f16, A>>(&left_low[row * LINE], LINE);
        let low1 = coopLoadT<coop_mat16x16<f16, A>>(&left_low[(row + 16u) * LINE], LINE);

        let high_b0 = coopLoad<coop_mat16x16<f16, B>>(&right_high[column * LINE], LINE);
        let low_b0 = coopLoad<coop_mat16x16<f16, B>>(&right_low[column * LINE], LINE);
        c00 = coopMultiplyAdd(high0, high_b0, c00);
        r00 = coopMultiplyAdd(low0, high_b0, coopMultiplyAdd(high0, low_b0, r00));
        c10 = coopMultiplyAdd(high1, high_b0, c10);
        r10 = coopMultiplyAdd(low1, high_b0, coopMultiplyAdd(high1, low_b0, r10));
        let high_b1 = coopLoad<coop_mat16x16<f16, B>>(&right_high[(column + 16u) * LINE], LINE);
        let low_b1 = coopLoad<coop_mat16x16<f16, B>>(&right_low[(column + 16u) * LINE], LINE);
        c01 = coopMultiplyAdd(high0, high_b1, c01);
        r01 = coopMultiplyAdd(low0, high_b1, coopMultiplyAdd(high0, low_b1, r01));
        c11 = coopMultiplyAdd(high1, high_b1, c11);
        r11 = coopMultiplyAdd(low1, high_b1, coopMultiplyAdd(high1, low_b1, r11));
        let high_b2 = coopLoad<coop_mat16x16<f16, B>>(&right_high[(column + 32u) * LINE], LINE);
        let low_b2 = coopLoad<coop_mat16x16<f16, B>>(&right_low[(column + 32u) * LINE], LINE);
        c02 = coopMultiplyAdd(high0, high_b2, c02);
        r02 = coopMultiplyAdd(low0, high_b2, coopMultiplyAdd(high0, low_b2, r02));
        c12 = coopMultiplyAdd(high1, high_b2, c12);
        r12 = coopMultiplyAdd(low1, high_b2, coopMultiplyAdd(high1, low_b2, r12));
        let high_b3 = coopLoad<coop_mat16x16<f16, B>>(&right_high[(column + 48u) * LINE], LINE);
        let low_b3 = coopLoad<coop_mat16x16<f16, B>>(&right_low[(column + 48u) * LINE], LINE);
        c03 = coopMultiplyAdd(high0, high_b3, c03);
        r03 = coopMultiplyAdd(low0, high_b3, coopMultiplyAdd(high0, low_b3, r03));
        c13 = coopMultiplyAdd(high1, high_b3, c13);
        r13 = coopMultiplyAdd(low1, high_b3, coopMultiplyAdd(high1, low_b3, r13));
    }
    let factors = 1.0 / of_matrices;
    let in_rows = first_row + row;
    let in_columns = first_column + column;
    write_fragment(c00, r00, in_rows, in_columns, factors, id.z, subgroup);
    write_fragment(c01, r01, in_rows, in_columns + 16u, factors, id.z, subgroup);
    write_fragment(c02, r02, in_rows, in_columns + 32u, factors, id.z, subgroup);
    write_fragment(c03, r03, in_rows, in_columns + 48u, factors, id.z, subgroup);
    write_fragment(c10, r10, in_rows + 16u, in_columns, factors, id.z, subgroup);
    write_fragment(c11, r11, in_rows + 16u, in_columns + 16u, factors, id.z, subgroup);
    write_fragment(c12, r12, in_rows + 16u, in_columns + 32u, factors, id.z, subgroup);
    write_fragment(c13, r13, in_rows + 16u, in_columns + 48u, factors, id.z, subgroup);
}

#else

// Four values of a matrix in workgroup memory, of rows next to each other.
fn left_part(high: bool, row: u32, k: u32) -> vec4<f32> {
    let at = row * LINE + k;
    if (high) {
        return vec4<f32>(vec4<f16>(left_high[at], left_high[at + LINE], left_high[at + 2u * LINE], left_high[at + 3u * LINE]));
    }
    return vec4<f32>(vec4<f16>(left_low[at], left_low[at + LINE], left_low[at + 2u * LINE], left_low[at + 3u * LINE]));
}

fn right_part(high: bool, column: u32, k: u32) -> vec4<f32> {
    let at = column * LINE + k;
    if (high) {
        return vec4<f32>(vec4<f16>(right_high[at], right_high[at + LINE], right_high[at + 2u * LINE], right_high[at + 3u * LINE]));
    }
    return vec4<f32>(vec4<f16>(right_low[at], right_low[at + LINE], right_low[at + 2u * LINE], right_low[at + 3u * LINE]));
}

fn multiply_and_write_tile(
    id: vec3<u32>,
    first: u32,
    end: u32,
    lane: u32,
    subgroup: vec2<u32>,
) {
    let first_row = id.y * TILE;
    let first_column = id.x * TILE;
    prepare(first_row, first_column);
    let here = places(lane);
    let of_matrices = matrix_scales();
    let row = 4u * (lane / 16u);
    let column = 4u * (lane % 16u);
    for (var k = first; k < end; k += STEP) {
        fill_tile(first_row, first_column, k, end, here, of_matrices);
        for (var i = 0u; i < STEP; i++) {
            for (var u = 0u; u < 2u; u++) {
                let high = left_part(true, row + 64u * u, i);
                let low = left_part(false, row + 64u * u, i);
                for (var v = 0u; v < 2u; v++) {
                    let right_high = right_part(true, column + 64u * v, i);
                    let right_low = right_part(false, column + 64u * v, i);
                    for (var j = 0u; j < 4u; j++) {
                        let at = (2u * u + v) * 4u + j;
                        tile_products[at] += high[j] * right_high;
                        tile_rests[at] += high[j] * right_low + low[j] * right_high;
                    }
                }
            }
        }
    }
    let factors = 1.0 / of_matrices;
    for (var at = 0u; at < 16u; at++) {
        for (var j = 0u; j < 4u; j++) {
            let in_rows = first_row + row + 64u * (at / 8u) + at % 4u;
            let in_columns = first_column + column + 64u * (at / 4u % 2u) + j;
            let product = tile_products[at][j] + tile_rests[at][j] / LOW;
            write_product(product * factors.x * factors.y, in_rows, in_columns, id.z);
        }
    }
}

#endif
