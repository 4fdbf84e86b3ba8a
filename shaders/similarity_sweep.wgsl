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

// Reads the products as multiply_tile leaves them; those outside are left out anyway.
fn read_tile(id: vec3<u32>, lane: u32) {
    for (var u = 0u; u < SIDES; u++) {
        for (var v = 0u; v < SIDES; v++) {
            let row = id.y * TILE + (lane / 16u + 16u * u) * 4u;
            let column = id.x * TILE + (lane % 16u + 16u * v) * 4u;
            for (var i = 0u; i < 4u; i++) {
                tile_products[(u * SIDES + v) * 4u + i] = vec4<f32>(
                    product_at(row + i, column),
                    product_at(row + i, column + 1u),
                    product_at(row + i, column + 2u),
                    product_at(row + i, column + 3u),
                );
            }
        }
    }
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

// Puts a tile's logits in place of its products.
fn compute_logits(id: vec3<u32>, scale: f32, lane: u32) {
#ifdef PRODUCTS
    read_tile(id, lane);
#else
    multiply_tile(id.y * TILE, id.x * TILE, 0u, params.width, lane);
#endif
    for (var u = 0u; u < SIDES; u++) {
        for (var v = 0u; v < SIDES; v++) {
            let row = id.y * TILE + (lane / 16u + 16u * u) * 4u;
            let column = id.x * TILE + (lane % 16u + 16u * v) * 4u;
            for (var i = 0u; i < 4u; i++) {
                let at = (u * SIDES + v) * 4u + i;
                let logits = scale * tile_products[at];
                tile_products[at] = vec4<f32>(
                    entry(logits.x, row + i, column),
                    entry(logits.y, row + i, column + 1u),
                    entry(logits.z, row + i, column + 2u),
                    entry(logits.w, row + i, column + 3u),
                );
            }
        }
    }
}

fn is_bounded(scale: f32) -> bool {
#ifdef NORMS
    return scale <= BOUNDED;
#else
    return false;
#endif
}

#endif
#ifdef FORWARD

// What each invocation has of its rows (columns): (u, v) is 4u + v for rows u and columns v of the tile's quarters.
var<private> parts: array<vec4<f32>, SIDES>;

// Puts the parts that invocations have of their rows beside each other: those of a row are GROUPS apart.
fn share_by_rows(lane: u32) {
    for (var u = 0u; u < SIDES; u++) {
        tile_memory[(lane % 16u) * GROUPS + lane / 16u + 16u * u] = parts[u];
    }
    workgroupBarrier();
}

fn share_by_columns(lane: u32) {
    for (var v = 0u; v < SIDES; v++) {
        tile_memory[(lane / 16u) * GROUPS + lane % 16u + 16u * v] = parts[v];
    }
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

// The sum of the parts of one row (column).
fn sum_shared(line: u32) -> f32 {
    var total = vec4<f32>();
    for (var part = 0u; part < 16u; part++) {
        total += tile_memory[part * GROUPS + line / 4u];
    }
    return total[line % 4u];
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

fn sum_of(values: vec4<f32>) -> f32 {
    return values.x + values.y + values.z + values.w;
}

// Writes the sums of the parts, a row (column) an invocation, into a plane of the partial statistics.
fn write_sums(base: u32, quantity: u32, count: u32, first: u32, lane: u32) {
    if (lane < TILE && first + lane < count) {
        output[base + quantity * count + first + lane] = sum_shared(lane);
    }
    workgroupBarrier();
}

@compute @workgroup_size(256)
fn forward(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let above_diagonal = params.first_column / TILE + id.x >= params.first_row / TILE + id.y;
    if (params.gram == 1u && !above_diagonal) {
        return;
    }
    let scale = exponential(log_scale[0]);
    compute_logits(id, scale, lane);
#ifdef KEPT
    if (is_kept(id)) {
        for (var at = 0u; at < 4u * SIDES * SIDES; at++) {
            for (var j = 0u; j < 4u; j++) {
                kept[kept_place(id, 4u * at + j, lane)] = tile_products[at][j];
            }
        }
    }
#endif
    let bounded = is_bounded(scale);

    // Rows.
    var references: array<vec4<f32>, SIDES>;
    if (bounded) {
        for (var u = 0u; u < SIDES; u++) {
            references[u] = vec4<f32>(scale);
        }
    } else {
        for (var u = 0u; u < SIDES; u++) {
            for (var i = 0u; i < 4u; i++) {
                var largest = vec4<f32>(NO_ENTRY);
                for (var v = 0u; v < SIDES; v++) {
                    largest = max(largest, tile_products[(u * SIDES + v) * 4u + i]);
                }
                parts[u][i] = max(max(largest.x, largest.y), max(largest.z, largest.w));
            }
        }
        share_by_rows(lane);
        for (var u = 0u; u < SIDES; u++) {
            references[u] = largest_shared(lane / 16u + 16u * u);
        }
        workgroupBarrier();
    }
    var along: array<vec4<f32>, SIDES>;
    for (var u = 0u; u < SIDES; u++) {
        for (var i = 0u; i < 4u; i++) {
            var sums = vec4<f32>();
            var products = vec4<f32>();
            for (var v = 0u; v < SIDES; v++) {
                let logits = tile_products[(u * SIDES + v) * 4u + i];
                let e = exponentials(logits, vec4<f32>(references[u][i]));
                sums += e;
                products += e * logits;
            }
            parts[u][i] = sum_of(sums);
            along[u][i] = sum_of(products);
        }
    }
    let first_row = id.y * TILE;
    let row_base = id.x * QUANTITIES * params.rows;
    if (lane % 16u == 0u) {
        for (var u = 0u; u < SIDES; u++) {
            for (var i = 0u; i < 4u; i++) {
                let row = first_row + (lane / 16u + 16u * u) * 4u + i;
                if (row < params.rows) {
                    output[row_base + row] = references[u][i];
                }
            }
        }
    }
    share_by_rows(lane);
    if (lane < TILE && first_row + lane < params.rows) {
        let total = sum_shared(lane);
        output[row_base + params.rows + first_row + lane] = total;
        if (bounded && total == 0.0) {
            output[row_base + first_row + lane] = NO_ENTRY;
        }
    }
    workgroupBarrier();
    parts = along;
    share_by_rows(lane);
    write_sums(row_base, 2u, params.rows, first_row, lane);
#ifdef QUANTITIES_5
    for (var quantity = 3u; quantity < 5u; quantity++) {
        for (var u = 0u; u < SIDES; u++) {
            for (var i = 0u; i < 4u; i++) {
                var sums = vec4<f32>();
                for (var v = 0u; v < SIDES; v++) {
                    let logits = tile_products[(u * SIDES + v) * 4u + i];
                    let values = select(vec4<f32>(1.0), logits, quantity == 3u);
                    sums += select(values, vec4<f32>(), logits == vec4<f32>(NO_ENTRY));
                }
                parts[u][i] = sum_of(sums);
            }
        }
        share_by_rows(lane);
        write_sums(row_base, quantity, params.rows, first_row, lane);
    }
#endif

#ifdef COLUMNS
    // Columns, the same across.
    let first_column = id.x * TILE;
    let column_base = params.column_partials + id.y * QUANTITIES * params.columns;
    if (!bounded) {
        for (var v = 0u; v < SIDES; v++) {
            parts[v] = vec4<f32>(NO_ENTRY);
            for (var u = 0u; u < SIDES; u++) {
                for (var i = 0u; i < 4u; i++) {
                    parts[v] = max(parts[v], tile_products[(u * SIDES + v) * 4u + i]);
                }
            }
        }
        share_by_columns(lane);
        for (var v = 0u; v < SIDES; v++) {
            references[v] = largest_shared(lane % 16u + 16u * v);
        }
        workgroupBarrier();
    }
    for (var v = 0u; v < SIDES; v++) {
        parts[v] = vec4<f32>();
        along[v] = vec4<f32>();
        for (var u = 0u; u < SIDES; u++) {
            for (var i = 0u; i < 4u; i++) {
                let logits = tile_products[(u * SIDES + v) * 4u + i];
                let e = exponentials(logits, references[v]);
                parts[v] += e;
                along[v] += e * logits;
            }
        }
    }
    if (lane < 16u) {
        for (var v = 0u; v < SIDES; v++) {
            for (var j = 0u; j < 4u; j++) {
                let column = first_column + (lane + 16u * v) * 4u + j;
                if (column < params.columns) {
                    output[column_base + column] = references[v][j];
                }
            }
        }
    }
    share_by_columns(lane);
    if (lane < TILE && first_column + lane < params.columns) {
        let total = sum_shared(lane);
        output[column_base + params.columns + first_column + lane] = total;
        if (bounded && total == 0.0) {
            output[column_base + first_column + lane] = NO_ENTRY;
        }
    }
    workgroupBarrier();
    parts = along;
    share_by_columns(lane);
    write_sums(column_base, 2u, params.columns, first_column, lane);
#ifdef QUANTITIES_5
    for (var quantity = 3u; quantity < 5u; quantity++) {
        for (var v = 0u; v < SIDES; v++) {
            parts[v] = vec4<f32>();
            for (var u = 0u; u < SIDES; u++) {
                for (var i = 0u; i < 4u; i++) {
                    let logits = tile_products[(u * SIDES + v) * 4u + i];
                    let values = select(vec4<f32>(1.0), logits, quantity == 3u);
                    parts[v] += select(values, vec4<f32>(), logits == vec4<f32>(NO_ENTRY));
                }
            }
        }
        share_by_columns(lane);
        write_sums(column_base, quantity, params.columns, first_column, lane);
    }
#endif
#endif
}

#endif
#ifdef BACKWARD

// The part of an entry's gradient that one side has.
fn of_side(logit: f32, log_sum_exp: f32, weight: f32, share: f32) -> f32 {
    return select(weight * exponential(logit - log_sum_exp), 0.0, weight == 0.0) - share;
}

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
        for (var at = 0u; at < 4u * SIDES * SIDES; at++) {
            for (var j = 0u; j < 4u; j++) {
                tile_products[at][j] = kept[kept_place(id, 4u * at + j, lane)];
            }
        }
    } else {
        compute_logits(id, scale, lane);
    }
#else
    compute_logits(id, scale, lane);
#endif
    let bounded = is_bounded(scale);
    let mirror = params.mirror == 1u && tile_row != tile_column;
    for (var u = 0u; u < SIDES; u++) {
        for (var v = 0u; v < SIDES; v++) {
            let row = id.y * TILE + (lane / 16u + 16u * u) * 4u;
            let column = id.x * TILE + (lane % 16u + 16u * v) * 4u;
#ifdef COLUMNS
            let column_exponents = of_columns(EXPONENT, column);
            let column_weights = of_columns(WEIGHT, column);
            let column_shares = of_columns(SHARE, column);
#endif
            for (var i = 0u; i < 4u; i++) {
                if (row + i >= params.rows) {
                    break;
                }
#ifdef ROWS
                let row_exponent = of_row(EXPONENT, row + i);
                let row_weight = of_row(WEIGHT, row + i);
                let row_share = of_row(SHARE, row + i);
#endif
                let logits = tile_products[(u * SIDES + v) * 4u + i];
                for (var j = 0u; j < 4u; j++) {
                    if (column + j >= params.columns) {
                        break;
                    }
                    let logit = logits[j];
                    var gradient = 0.0;
                    if (logit != NO_ENTRY) {
                        if (bounded) {
                            let e = exponential(logit - scale);
#ifdef ROWS
                            gradient += e * row_exponent - row_share;
#endif
#ifdef COLUMNS
                            gradient += e * column_exponents[j] - column_shares[j];
#endif
                        } else {
#ifdef ROWS
                            gradient += of_side(logit, row_exponent, row_weight, row_share);
#endif
#ifdef COLUMNS
                            gradient += of_side(logit, column_exponents[j], column_weights[j], column_shares[j]);
#endif
                        }
                    }
                    output[(row + i) * params.output_stride + column + j] = gradient;
                    if (mirror) {
                        output[(column + j) * params.output_stride + row + i] = gradient;
                    }
                }
            }
        }
    }
}

#endif
