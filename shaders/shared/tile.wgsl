// A tile of a matrix product, TILE × TILE with TILE 64 or 128, by the 256 invocations of a workgroup.
//
// The file that imports this defines `left_values(row, k)` and `right_values(column, k)`: the values of four rows of
// the left matrix, or four columns of the right one, from a multiple of four on, at one place of the inner extent; 0
// outside. Before the first of them `prepare(row, column)` is called, with the row and the column for which this
// invocation will ask. The flags LEFT_BY_ROWS and RIGHT_BY_COLUMNS say that values next to each other in memory have inner places
// next to each other, so that neighbouring invocations read neighbouring values.
//
// Each step brings STEP inner places of both matrices into workgroup memory, 16 KiB / 2 with a column of padding
// against conflicts of memory banks, while the values of the next one are on their way. Invocation (x, y) holds rows
// (y + 16u)·4 … +3 and columns (x + 16v)·4 … +3 of the tile, for u and v below SIDES: `tile_products` has, for
// each (u, v), four rows of four columns.

const SIDES: u32 = TILE / 64u;
const STEP: u32 = 1024u / TILE;
const GROUPS: u32 = TILE / 4u;
const STRIDE: u32 = GROUPS + 1u;
const RIGHT: u32 = STEP * STRIDE;

var<workgroup> tile_memory: array<vec4<f32>, 2u * STEP * STRIDE>;
var<private> tile_products: array<vec4<f32>, SIDES * SIDES * 4u>;

fn add_outer_product(at: u32, left: vec4<f32>, right: vec4<f32>) {
    tile_products[at] += left.x * right;
    tile_products[at + 1u] += left.y * right;
    tile_products[at + 2u] += left.z * right;
    tile_products[at + 3u] += left.w * right;
}

// Adds the products of inner places from `first` to `end` to `tile_products`, which are 0 at the start.
fn multiply_tile(first_row: u32, first_column: u32, first: u32, end: u32, lane: u32) {
#ifdef LEFT_BY_ROWS
    let left_k = lane % STEP;
    let left_group = lane / STEP;
#else
    let left_k = lane / GROUPS;
    let left_group = lane % GROUPS;
#endif
#ifdef RIGHT_BY_COLUMNS
    let right_k = lane % STEP;
    let right_group = lane / STEP;
#else
    let right_k = lane / GROUPS;
    let right_group = lane % GROUPS;
#endif
    let row = first_row + 4u * left_group;
    let column = first_column + 4u * right_group;
    let left_place = left_k * STRIDE + left_group;
    let right_place = RIGHT + right_k * STRIDE + right_group;
    let x = lane % 16u;
    let y = lane / 16u;
    prepare(row, column);

    var left = vec4<f32>();
    var right = vec4<f32>();
    if (first + left_k < end) {
        left = left_values(row, first + left_k);
    }
    if (first + right_k < end) {
        right = right_values(column, first + right_k);
    }
    for (var k = first; k < end; k += STEP) {
        tile_memory[left_place] = left;
        tile_memory[right_place] = right;
        workgroupBarrier();
        left = vec4<f32>();
        right = vec4<f32>();
        if (k + STEP + left_k < end) {
            left = left_values(row, k + STEP + left_k);
        }
        if (k + STEP + right_k < end) {
            right = right_values(column, k + STEP + right_k);
        }
        for (var i = 0u; i < STEP; i++) {
            let line = i * STRIDE;
#ifdef TILE_64
            add_outer_product(0u, tile_memory[line + y], tile_memory[RIGHT + line + x]);
#else
            let upper = tile_memory[line + y];
            let lower = tile_memory[line + y + 16u];
            let near = tile_memory[RIGHT + line + x];
            let far = tile_memory[RIGHT + line + x + 16u];
            add_outer_product(0u, upper, near);
            add_outer_product(4u, upper, far);
            add_outer_product(8u, lower, near);
            add_outer_product(12u, lower, far);
#endif
        }
        workgroupBarrier();
    }
}
