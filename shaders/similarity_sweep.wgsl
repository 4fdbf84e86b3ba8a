// Sweeps over a similarity matrix that is never stored: z[r, c] = exp(log_scale) · rows[r] · columns[c], some entries
// left out.
//
//     pack      what is known of each row of one side, planes of so many words one after the other
//     forward   a panel's tiles: the statistics of each row and each column of every tile
//     merge     the statistics of a row (column) in the tiles of a panel, merged into those of earlier panels
//     backward  a panel's G[r, c] = w_r·exp(z − L_r) − s_r + w_c·exp(z − L_c) − s_c, 0 where left out
//
// The matrix is cut into panels, a panel into TILE × TILE tiles, a workgroup each. The partial statistics of a panel's
// tiles, or its G, are the only workspace, whose size does not depend on the matrix. What a tile says of its rows and
// columns is merged in the order of the tiles. G is multiplied with both sides by matmul.wgsl.
//
// A Gram, a matrix of embeddings with themselves, is swept by the tiles on and right of its diagonal: what a tile says
// of its columns it says of the rows of its mirror image. On the diagonal a tile is its own image. G of a panel on the
// diagonal is written with its mirror images.
//
// With PRODUCTS the dot products of a panel have been computed before, by matmul.wgsl, and only their logits are here.
//
// Under cosine similarity no logit is above σ = exp(log_scale). If σ is at most BOUNDED then σ is a reference for every
// row and column alike: one exponential serves both, and nothing is searched for a maximum.
//
// Launch: 256 invocations for each tile, in x by columns and y by rows of the panel; of `pack` and `merge` an invocation
// for each row.

#import groups
#import numerics
#import statistics

// The largest σ that is every row's reference: the smallest term, exp(−2σ), is far from where f32 ends.
const BOUNDED: f32 = 30.0;

// What `pack` knows of a row. Norm and key: what it is multiplied with to be compared, and what is left out where it
// equals that of the other side. Exponent: L, or w·exp(σ − L) where σ is the reference. Weight and share: w and s.
const NORM: u32 = 0u;
const KEY: u32 = 1u;
const EXPONENT: u32 = 2u;
const WEIGHT: u32 = 3u;
const SHARE: u32 = 4u;

#ifdef PACK

struct Params {
    groups: u32,
    rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> log_scale: array<f32>;
@group(0) @binding(2) var<storage, read> norms: array<f32>;
@group(0) @binding(3) var<storage, read> keys: array<u32>;
@group(0) @binding(4) var<storage, read> coefficients: array<f32>;
@group(0) @binding(5) var<storage, read_write> packed: array<u32>;

@compute @workgroup_size(256)
fn pack(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_number(id, lines) * 256u + lane;
    if (i >= params.rows) {
        return;
    }
#ifdef NORMS
    packed[NORM * params.rows + i] = bitcast<u32>(norms[i]);
#endif
#ifdef KEYS
    packed[KEY * params.rows + i] = keys[i];
#endif
#ifdef COEFFICIENTS
    let scale = exponential(log_scale[0]);
    var exponent = coefficients[4u * i];
    let weight = coefficients[4u * i + 1u];
#ifdef NORMS
    if (scale <= BOUNDED) {
        exponent = select(weight * exponential(scale - exponent), 0.0, weight == 0.0);
    }
#endif
    packed[EXPONENT * params.rows + i] = bitcast<u32>(exponent);
    packed[WEIGHT * params.rows + i] = bitcast<u32>(weight);
    packed[SHARE * params.rows + i] = bitcast<u32>(coefficients[4u * i + 2u]);
#endif
}

#endif
#ifdef MERGE

struct Params {
    groups: u32,
    // Of the panel, on the side whose statistics these are; in tiles of the other side.
    count: u32,
    tiles: u32,
    tile: u32,
    // Where the panel is on the diagonal of a Gram: the first tile that speaks of rows, the last one of columns, are
    // those of the row itself.
    from_own: u32,
    before_own: u32,
    partials_base: u32,
    statistics_base: u32,
    // Whether there were no earlier panels.
    fresh: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> partials: array<f32>;
@group(0) @binding(2) var<storage, read_write> statistics: array<f32>;

fn partial_of(tile: u32, quantity: u32, i: u32) -> f32 {
    return partials[params.partials_base + (tile * QUANTITIES + quantity) * params.count + i];
}

@compute @workgroup_size(256)
fn merge(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_number(id, lines) * 256u + lane;
    if (i >= params.count) {
        return;
    }
    let place = params.statistics_base + i * STATISTICS;
    var all = Statistics(NO_ENTRY, 0.0, 0.0, 0.0, 0.0);
    if (params.fresh == 0u) {
        all = Statistics(
            statistics[place],
            statistics[place + 1u],
            statistics[place + 2u],
            statistics[place + 3u],
            statistics[place + 4u],
        );
    }
    let own = i / params.tile;
    let first = select(0u, own, params.from_own == 1u);
    let before = select(params.tiles, own, params.before_own == 1u);
    for (var tile = first; tile < before; tile++) {
        var part = Statistics(partial_of(tile, 0u, i), partial_of(tile, 1u, i), partial_of(tile, 2u, i), 0.0, 0.0);
#ifdef QUANTITIES_5
        part.logits = partial_of(tile, 3u, i);
        part.entries = partial_of(tile, 4u, i);
#endif
        all = merged(all, part);
    }
    statistics[place] = all.reference;
    statistics[place + 1u] = all.sum;
    statistics[place + 2u] = all.along;
    statistics[place + 3u] = all.logits;
    statistics[place + 4u] = all.entries;
}

#endif
#ifdef FORWARD
#define TILES
#endif
#ifdef BACKWARD
#define TILES
#endif
#ifdef TILES

struct Params {
    // Of the panel: rows and columns, and where they begin in the whole and in the bindings.
    rows: u32,
    columns: u32,
    first_row: u32,
    first_column: u32,
#ifndef PRODUCTS
    rows_base: u32,
    columns_base: u32,
    width: u32,
#endif
    all_rows: u32,
    all_columns: u32,
    // Entries with column = row + offset are left out, if has_diagonal is 1.
    has_diagonal: u32,
    diagonal: i32,
    // Whether tiles left of the diagonal are not swept.
    gram: u32,
    // How many tiles are kept from the forward pass, from those of a row of tiles on.
    kept_tiles: u32,
    kept_from: u32,
#ifdef FORWARD
    column_partials: u32,
#endif
#ifdef BACKWARD
    mirror: u32,
    output_stride: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
#ifdef PRODUCTS
@group(0) @binding(8) var<storage, read> products: array<f32>;
#else
@group(0) @binding(1) var<storage, read> rows: array<f32>;
@group(0) @binding(2) var<storage, read> columns: array<f32>;
#endif
@group(0) @binding(3) var<storage, read> packed_rows: array<u32>;
@group(0) @binding(4) var<storage, read> packed_columns: array<u32>;
@group(0) @binding(5) var<storage, read> log_scale: array<f32>;
@group(0) @binding(6) var<storage, read_write> output: array<f32>;
#ifdef FORWARD
@group(0) @binding(7) var<storage, read_write> kept: array<f32>;
#else
@group(0) @binding(7) var<storage, read> kept: array<f32>;
#endif

#ifdef PRODUCTS

const SIDES: u32 = TILE / 64u;
const GROUPS: u32 = TILE / 4u;

var<workgroup> tile_memory: array<vec4<f32>, 16u * GROUPS>;
var<private> tile_products: array<vec4<f32>, SIDES * SIDES * 4u>;

fn product_at(row: u32, column: u32) -> f32 {
    return products[min(row, params.rows - 1u) * params.columns + min(column, params.columns - 1u)];
}

fn products_of_row(row: u32, column: u32) -> vec4<f32> {
    return vec4<f32>(
        product_at(row, column),
        product_at(row, column + 1u),
        product_at(row, column + 2u),
        product_at(row, column + 3u),
    );
}

fn read_quarter(at: u32, row: u32, column: u32) {
    tile_products[at] = products_of_row(row, column);
    tile_products[at + 1u] = products_of_row(row + 1u, column);
    tile_products[at + 2u] = products_of_row(row + 2u, column);
    tile_products[at + 3u] = products_of_row(row + 3u, column);
}

#else

#define LEFT_BY_ROWS
#define RIGHT_BY_COLUMNS
#import tile

#endif

fn of_row(plane: u32, row: u32) -> f32 {
    return bitcast<f32>(packed_rows[plane * params.all_rows + params.first_row + min(row, params.rows - 1u)]);
}

fn of_column(plane: u32, column: u32) -> f32 {
    let place = params.first_column + min(column, params.columns - 1u);
    return bitcast<f32>(packed_columns[plane * params.all_columns + place]);
}

// A plane for four rows or columns from one on; those outside have the last one's.
fn of_rows(plane: u32, row: u32) -> vec4<f32> {
    return vec4<f32>(of_row(plane, row), of_row(plane, row + 1u), of_row(plane, row + 2u), of_row(plane, row + 3u));
}

fn of_columns(plane: u32, column: u32) -> vec4<f32> {
    return vec4<f32>(
        of_column(plane, column),
        of_column(plane, column + 1u),
        of_column(plane, column + 2u),
        of_column(plane, column + 3u),
    );
}

#ifndef PRODUCTS

// The norms of the rows and columns whose values this invocation brings into workgroup memory.
var<private> left_norms: vec4<f32>;
var<private> right_norms: vec4<f32>;

fn prepare(row: u32, column: u32) {
#ifdef NORMS
    left_norms = of_rows(NORM, row);
    right_norms = of_columns(NORM, column);
#else
    left_norms = vec4<f32>(1.0);
    right_norms = vec4<f32>(1.0);
#endif
}

// Rows outside are read as the last one: their logits are left out anyway.
fn row_value(row: u32, k: u32) -> f32 {
    return rows[params.rows_base + min(row, params.rows - 1u) * params.width + k];
}

fn column_value(column: u32, k: u32) -> f32 {
    return columns[params.columns_base + min(column, params.columns - 1u) * params.width + k];
}

fn left_values(row: u32, k: u32) -> vec4<f32> {
    return left_norms
        * vec4<f32>(row_value(row, k), row_value(row + 1u, k), row_value(row + 2u, k), row_value(row + 3u, k));
}

fn right_values(column: u32, k: u32) -> vec4<f32> {
    return right_norms
        * vec4<f32>(
            column_value(column, k),
            column_value(column + 1u, k),
            column_value(column + 2u, k),
            column_value(column + 3u, k),
        );
}

#endif

// The logit of an entry, NO_ENTRY if it is left out.
fn entry(logit: f32, row: u32, column: u32) -> f32 {
    var outside = row >= params.rows || column >= params.columns;
    let offset = i32(params.first_column + column) - i32(params.first_row + row);
    outside = outside || (params.has_diagonal == 1u && offset == params.diagonal);
#ifdef KEYS
    let row_key = packed_rows[KEY * params.all_rows + params.first_row + min(row, params.rows - 1u)];
    let place = params.first_column + min(column, params.columns - 1u);
    outside = outside || row_key == packed_columns[KEY * params.all_columns + place];
#endif
    return select(logit, NO_ENTRY, outside);
}

// The number of a tile among all that are swept, row after row of tiles.
fn tile_number(row: u32, column: u32) -> u32 {
    let in_row = (params.all_columns + TILE - 1u) / TILE;
    // In a Gram the rows of tiles above have in_row, in_row − 1, … tiles.
    let gram = row * in_row - row * (row + 1u) / 2u + column;
    return select(row * in_row + column, gram, params.gram == 1u);
}

// Whether a tile's logits are kept, and where.
fn is_kept(id: vec3<u32>) -> bool {
    return kept_number(id) < params.kept_tiles;
}

fn kept_number(id: vec3<u32>) -> u32 {
    return tile_number(params.first_row / TILE + id.y - params.kept_from, params.first_column / TILE + id.x);
}

fn kept_place(id: vec3<u32>, at: u32, lane: u32) -> u32 {
    return kept_number(id) * (TILE * TILE) + at * 256u + lane;
}

// An invocation has four rows of four columns of a tile of 64, and of one of 128 as much of each quarter: rows and
// columns near the beginning, and far ones 64 further. Loops over them are written out, so that what is indexed by
// constants can be in registers.
fn near_row(id: vec3<u32>, lane: u32) -> u32 {
    return id.y * TILE + (lane / 16u) * 4u;
}

fn near_column(id: vec3<u32>, lane: u32) -> u32 {
    return id.x * TILE + (lane % 16u) * 4u;
}

fn logits_of_row(products: vec4<f32>, row: u32, column: u32, scale: f32) -> vec4<f32> {
    let logits = scale * products;
    return vec4<f32>(
        entry(logits.x, row, column),
        entry(logits.y, row, column + 1u),
        entry(logits.z, row, column + 2u),
        entry(logits.w, row, column + 3u),
    );
}

fn compute_quarter(at: u32, row: u32, column: u32, scale: f32) {
#ifdef PRODUCTS
    read_quarter(at, row, column);
#endif
    tile_products[at] = logits_of_row(tile_products[at], row, column, scale);
    tile_products[at + 1u] = logits_of_row(tile_products[at + 1u], row + 1u, column, scale);
    tile_products[at + 2u] = logits_of_row(tile_products[at + 2u], row + 2u, column, scale);
    tile_products[at + 3u] = logits_of_row(tile_products[at + 3u], row + 3u, column, scale);
}

// Puts a tile's logits in place of its products.
fn compute_logits(id: vec3<u32>, scale: f32, lane: u32) {
#ifndef PRODUCTS
    multiply_tile(id.y * TILE, id.x * TILE, 0u, params.width, lane);
#endif
    let row = near_row(id, lane);
    let column = near_column(id, lane);
    compute_quarter(0u, row, column, scale);
#ifndef TILE_64
    compute_quarter(4u, row, column + 64u, scale);
    compute_quarter(8u, row + 64u, column, scale);
    compute_quarter(12u, row + 64u, column + 64u, scale);
#endif
}

fn is_bounded(scale: f32) -> bool {
#ifdef NORMS
    return scale <= BOUNDED;
#else
    return false;
#endif
}

fn exponentials(logits: vec4<f32>, references: vec4<f32>) -> vec4<f32> {
    return select(
        vec4<f32>(
            exponential(logits.x - references.x),
            exponential(logits.y - references.y),
            exponential(logits.z - references.z),
            exponential(logits.w - references.w),
        ),
        vec4<f32>(),
        logits == vec4<f32>(NO_ENTRY),
    );
}

#endif
#ifdef FORWARD

// Something of each of an invocation's rows, or columns.
struct Lines {
    near: vec4<f32>,
    far: vec4<f32>,
}

// Two sums over each of four rows, or columns.
struct Sums {
    first: vec4<f32>,
    second: vec4<f32>,
}

struct Totals {
    first: Lines,
    second: Lines,
}

fn total_of(near: Sums, far: Sums) -> Totals {
    return Totals(Lines(near.first, far.first), Lines(near.second, far.second));
}

fn added(a: Sums, b: Sums) -> Sums {
    return Sums(a.first + b.first, a.second + b.second);
}

fn sum_of(values: vec4<f32>) -> f32 {
    return (values.x + values.y) + (values.z + values.w);
}

fn largest_of(values: vec4<f32>) -> f32 {
    return max(max(values.x, values.y), max(values.z, values.w));
}

// Of one quarter, over its four columns: the largest logit of each row.
fn largest_of_rows(at: u32) -> vec4<f32> {
    return vec4<f32>(
        largest_of(tile_products[at]),
        largest_of(tile_products[at + 1u]),
        largest_of(tile_products[at + 2u]),
        largest_of(tile_products[at + 3u]),
    );
}

fn largest_of_columns(at: u32) -> vec4<f32> {
    return max(
        max(tile_products[at], tile_products[at + 1u]),
        max(tile_products[at + 2u], tile_products[at + 3u]),
    );
}

// (Σ exp(z − reference), Σ exp(z − reference)·z)
fn sums_of_row(logits: vec4<f32>, reference: f32) -> vec2<f32> {
    let e = exponentials(logits, vec4<f32>(reference));
    return vec2<f32>(sum_of(e), sum_of(e * logits));
}

fn sums_of_rows(at: u32, references: vec4<f32>) -> Sums {
    let a = sums_of_row(tile_products[at], references.x);
    let b = sums_of_row(tile_products[at + 1u], references.y);
    let c = sums_of_row(tile_products[at + 2u], references.z);
    let d = sums_of_row(tile_products[at + 3u], references.w);
    return Sums(vec4<f32>(a.x, b.x, c.x, d.x), vec4<f32>(a.y, b.y, c.y, d.y));
}

fn sums_of_columns(at: u32, references: vec4<f32>) -> Sums {
    let a = exponentials(tile_products[at], references);
    let b = exponentials(tile_products[at + 1u], references);
    let c = exponentials(tile_products[at + 2u], references);
    let d = exponentials(tile_products[at + 3u], references);
    return Sums(
        (a + b) + (c + d),
        (a * tile_products[at] + b * tile_products[at + 1u])
            + (c * tile_products[at + 2u] + d * tile_products[at + 3u]),
    );
}

#ifdef QUANTITIES_5

// (Σ z, the number of entries)
fn logits_of(logits: vec4<f32>) -> Sums {
    let outside = logits == vec4<f32>(NO_ENTRY);
    return Sums(select(logits, vec4<f32>(), outside), select(vec4<f32>(1.0), vec4<f32>(), outside));
}

fn counts_of_rows(at: u32) -> Sums {
    let a = logits_of(tile_products[at]);
    let b = logits_of(tile_products[at + 1u]);
    let c = logits_of(tile_products[at + 2u]);
    let d = logits_of(tile_products[at + 3u]);
    return Sums(
        vec4<f32>(sum_of(a.first), sum_of(b.first), sum_of(c.first), sum_of(d.first)),
        vec4<f32>(sum_of(a.second), sum_of(b.second), sum_of(c.second), sum_of(d.second)),
    );
}

fn counts_of_columns(at: u32) -> Sums {
    return added(
        added(logits_of(tile_products[at]), logits_of(tile_products[at + 1u])),
        added(logits_of(tile_products[at + 2u]), logits_of(tile_products[at + 3u])),
    );
}

#endif

// Puts what invocations have of their rows (columns) beside each other: of each row there are 16 parts, GROUPS apart.
fn share(lines: Lines, place: u32) {
    tile_memory[place] = lines.near;
#ifndef TILE_64
    tile_memory[place + 16u] = lines.far;
#endif
    workgroupBarrier();
}

// The largest part of each of four rows (columns).
fn largest_shared(group: u32) -> vec4<f32> {
    var largest = tile_memory[group];
    for (var part = 1u; part < 16u; part++) {
        largest = max(largest, tile_memory[part * GROUPS + group]);
    }
    return largest;
}

// The largest part of each of this invocation's rows (columns).
fn largest_of_all(lines: Lines, place: u32, group: u32) -> Lines {
    share(lines, place);
    var largest = Lines(largest_shared(group), vec4<f32>());
#ifndef TILE_64
    largest.far = largest_shared(group + 16u);
#endif
    workgroupBarrier();
    return largest;
}

// The rows (columns) of a tile among those of the panel, and where this invocation's are in workgroup memory.
struct Side {
    // Where the tile's partial statistics begin, planes of `count` values.
    base: u32,
    count: u32,
    first: u32,
    place: u32,
}

fn write_sums(side: Side, plane: u32, lines: Lines, lane: u32) -> f32 {
    share(lines, side.place);
    var total = 0.0;
    if (lane < TILE && side.first + lane < side.count) {
        var totals = vec4<f32>();
        for (var part = 0u; part < 16u; part++) {
            totals += tile_memory[part * GROUPS + lane / 4u];
        }
        total = totals[lane % 4u];
        output[side.base + plane * side.count + side.first + lane] = total;
    }
    workgroupBarrier();
    return total;
}

fn write_statistics(side: Side, references: Lines, sums: Totals, bounded: bool, scale: f32, lane: u32) {
    let total = write_sums(side, 1u, sums.first, lane);
    write_sums(side, 2u, sums.second, lane);
    let inside = lane < TILE && side.first + lane < side.count;
    let place = side.base + side.first + lane;
    if (bounded) {
        if (inside) {
            output[place] = select(scale, NO_ENTRY, total == 0.0);
        }
    } else {
        // All parts of a row have the same reference.
        share(references, side.place);
        if (inside) {
            output[place] = tile_memory[lane / 4u][lane % 4u];
        }
        workgroupBarrier();
    }
}

#ifdef KEPT

fn keep(id: vec3<u32>, at: u32, lane: u32) {
    let logits = tile_products[at];
    kept[kept_place(id, 4u * at, lane)] = logits.x;
    kept[kept_place(id, 4u * at + 1u, lane)] = logits.y;
    kept[kept_place(id, 4u * at + 2u, lane)] = logits.z;
    kept[kept_place(id, 4u * at + 3u, lane)] = logits.w;
}

fn keep_quarter(id: vec3<u32>, at: u32, lane: u32) {
    keep(id, at, lane);
    keep(id, at + 1u, lane);
    keep(id, at + 2u, lane);
    keep(id, at + 3u, lane);
}

#endif

@compute @workgroup_size(256)
fn forward(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let above_diagonal = params.first_column / TILE + id.x >= params.first_row / TILE + id.y;
    if (params.gram == 1u && !above_diagonal) {
        return;
    }
    let scale = exponential(log_scale[0]);
    let bounded = is_bounded(scale);
    compute_logits(id, scale, lane);
#ifdef KEPT
    if (is_kept(id)) {
        keep_quarter(id, 0u, lane);
#ifndef TILE_64
        keep_quarter(id, 4u, lane);
        keep_quarter(id, 8u, lane);
        keep_quarter(id, 12u, lane);
#endif
    }
#endif

    let y = lane / 16u;
    let x = lane % 16u;
    let row_base = id.x * QUANTITIES * params.rows;
    let of_rows = Side(row_base, params.rows, id.y * TILE, x * GROUPS + y);
    var references = Lines(vec4<f32>(scale), vec4<f32>(scale));
    if (!bounded) {
        var largest = Lines(largest_of_rows(0u), vec4<f32>());
#ifndef TILE_64
        largest.near = max(largest.near, largest_of_rows(4u));
        largest.far = max(largest_of_rows(8u), largest_of_rows(12u));
#endif
        references = largest_of_all(largest, of_rows.place, y);
    }
    var near = sums_of_rows(0u, references.near);
    var far = Sums();
#ifndef TILE_64
    near = added(near, sums_of_rows(4u, references.near));
    far = added(sums_of_rows(8u, references.far), sums_of_rows(12u, references.far));
#endif
    write_statistics(of_rows, references, total_of(near, far), bounded, scale, lane);
#ifdef QUANTITIES_5
    near = counts_of_rows(0u);
#ifndef TILE_64
    near = added(near, counts_of_rows(4u));
    far = added(counts_of_rows(8u), counts_of_rows(12u));
#endif
    let row_counts = total_of(near, far);
    write_sums(of_rows, 3u, row_counts.first, lane);
    write_sums(of_rows, 4u, row_counts.second, lane);
#endif

#ifdef COLUMNS
    let column_base = params.column_partials + id.y * QUANTITIES * params.columns;
    let of_columns = Side(column_base, params.columns, id.x * TILE, y * GROUPS + x);
    if (!bounded) {
        var largest = Lines(largest_of_columns(0u), vec4<f32>());
#ifndef TILE_64
        largest.near = max(largest.near, largest_of_columns(8u));
        largest.far = max(largest_of_columns(4u), largest_of_columns(12u));
#endif
        references = largest_of_all(largest, of_columns.place, x);
    }
    near = sums_of_columns(0u, references.near);
#ifndef TILE_64
    near = added(near, sums_of_columns(8u, references.near));
    far = added(sums_of_columns(4u, references.far), sums_of_columns(12u, references.far));
#endif
    write_statistics(of_columns, references, total_of(near, far), bounded, scale, lane);
#ifdef QUANTITIES_5
    near = counts_of_columns(0u);
#ifndef TILE_64
    near = added(near, counts_of_columns(8u));
    far = added(counts_of_columns(4u), counts_of_columns(12u));
#endif
    let column_counts = total_of(near, far);
    write_sums(of_columns, 3u, column_counts.first, lane);
    write_sums(of_columns, 4u, column_counts.second, lane);
#endif
#endif
}

#endif
#ifdef BACKWARD

// What one side of some entries knows: exponents, weights and shares, as `pack` has them.
struct Known {
    exponents: vec4<f32>,
    weights: vec4<f32>,
    shares: vec4<f32>,
}

// The part of the gradients of some logits that one side has.
fn gradients_of(logits: vec4<f32>, known: Known) -> vec4<f32> {
    let weighted = known.weights * exponentials(logits, known.exponents);
    return select(weighted, vec4<f32>(), known.weights == vec4<f32>()) - known.shares;
}

fn known_of_row(row: u32) -> Known {
    return Known(
        vec4<f32>(of_row(EXPONENT, row)),
        vec4<f32>(of_row(WEIGHT, row)),
        vec4<f32>(of_row(SHARE, row)),
    );
}

fn known_of_columns(column: u32) -> Known {
    return Known(of_columns(EXPONENT, column), of_columns(WEIGHT, column), of_columns(SHARE, column));
}

fn write_gradient(gradient: f32, row: u32, column: u32, mirror: bool) {
    if (row < params.rows && column < params.columns) {
        output[row * params.output_stride + column] = gradient;
        if (mirror) {
            output[column * params.output_stride + row] = gradient;
        }
    }
}

fn write_row(logits: vec4<f32>, row: u32, column: u32, of_columns: Known, scale: f32, mirror: bool) {
    var gradients = vec4<f32>();
#ifdef ROWS
    let of_row = known_of_row(row);
#endif
    if (is_bounded(scale)) {
        var factors = vec4<f32>();
        var shares = vec4<f32>();
#ifdef ROWS
        factors += of_row.exponents;
        shares += of_row.shares;
#endif
#ifdef COLUMNS
        factors += of_columns.exponents;
        shares += of_columns.shares;
#endif
        gradients = factors * exponentials(logits, vec4<f32>(scale)) - shares;
    } else {
#ifdef ROWS
        gradients += gradients_of(logits, of_row);
#endif
#ifdef COLUMNS
        gradients += gradients_of(logits, of_columns);
#endif
    }
    gradients = select(gradients, vec4<f32>(), logits == vec4<f32>(NO_ENTRY));
    write_gradient(gradients.x, row, column, mirror);
    write_gradient(gradients.y, row, column + 1u, mirror);
    write_gradient(gradients.z, row, column + 2u, mirror);
    write_gradient(gradients.w, row, column + 3u, mirror);
}

fn write_quarter(at: u32, row: u32, column: u32, scale: f32, mirror: bool) {
    let of_columns = known_of_columns(column);
    write_row(tile_products[at], row, column, of_columns, scale, mirror);
    write_row(tile_products[at + 1u], row + 1u, column, of_columns, scale, mirror);
    write_row(tile_products[at + 2u], row + 2u, column, of_columns, scale, mirror);
    write_row(tile_products[at + 3u], row + 3u, column, of_columns, scale, mirror);
}

#ifdef KEPT

fn kept_row(id: vec3<u32>, at: u32, lane: u32) -> vec4<f32> {
    return vec4<f32>(
        kept[kept_place(id, 4u * at, lane)],
        kept[kept_place(id, 4u * at + 1u, lane)],
        kept[kept_place(id, 4u * at + 2u, lane)],
        kept[kept_place(id, 4u * at + 3u, lane)],
    );
}

fn read_kept_quarter(id: vec3<u32>, at: u32, lane: u32) {
    tile_products[at] = kept_row(id, at, lane);
    tile_products[at + 1u] = kept_row(id, at + 1u, lane);
    tile_products[at + 2u] = kept_row(id, at + 2u, lane);
    tile_products[at + 3u] = kept_row(id, at + 3u, lane);
}

#endif

@compute @workgroup_size(256)
fn backward(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile_row = params.first_row / TILE + id.y;
    let tile_column = params.first_column / TILE + id.x;
    if (params.gram == 1u && tile_column < tile_row) {
        return;
    }
    let scale = exponential(log_scale[0]);
#ifdef KEPT
    if (is_kept(id)) {
        read_kept_quarter(id, 0u, lane);
#ifndef TILE_64
        read_kept_quarter(id, 4u, lane);
        read_kept_quarter(id, 8u, lane);
        read_kept_quarter(id, 12u, lane);
#endif
    } else {
        compute_logits(id, scale, lane);
    }
#else
    compute_logits(id, scale, lane);
#endif
    let mirror = params.mirror == 1u && tile_row != tile_column;
    let row = near_row(id, lane);
    let column = near_column(id, lane);
    write_quarter(0u, row, column, scale, mirror);
#ifndef TILE_64
    write_quarter(4u, row, column + 64u, scale, mirror);
    write_quarter(8u, row + 64u, column, scale, mirror);
    write_quarter(12u, row + 64u, column + 64u, scale, mirror);
#endif
}

#endif
