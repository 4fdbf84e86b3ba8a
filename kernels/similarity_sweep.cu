// Sweeps over a similarity matrix that is never stored: z[r, c] = exp(log_scale) · rows[r] · columns[c], some entries
// left out.
//
//     forward    a panel's tiles: the statistics of each row and each column of every tile
//     merge      the statistics of a row (column) in the tiles of a panel, merged into those of earlier panels
//     backward   a panel's G[r, c] = w_r·exp(z − L_r) − s_r + w_c·exp(z − L_c) − s_c, 0 where left out
//     largest_coefficients   largest[i] = the bits of the largest |w| + |s| in the i-th of 128 shares of the rows' and
//                            of 128 shares of the columns' coefficients
//
// `forward_halves` and `backward_halves` do the same by tensor cores, of embeddings in 16 bits (matmul.cu packs them,
// their norms with them), `forward_hopper` and `backward_hopper` by Hopper's warpgroups; `forward_exact` and
// `backward_exact` of two f16 for each value. Their G is in 16 bits, too, rows padded to a multiple of 8. As L is a
// log-sum-exp over all entries of a row, no exponential is above 1 and G is at most what `largest_coefficients` finds,
// of rows and columns together; largest[256] receives its bits.
//
// The matrix is cut into panels, a panel into TILE × TILE tiles, a block each. The partial statistics of a panel's
// tiles, or its G, are the only workspace, whose size does not depend on the matrix. What a tile says of its rows and
// columns is merged in the order of the tiles. G is multiplied with both sides by matmul.cu.
//
// A Gram, a matrix of embeddings with themselves, is swept by the tiles on and right of its diagonal: what a tile says
// of its columns it says of the rows of its mirror image. On the diagonal a tile is its own image. G of a panel on the
// diagonal is written with its mirror images.
//
// Under cosine similarity no logit is above σ = exp(log_scale). If σ is at most BOUNDED then σ is a reference for every
// row and column alike: one exponential serves both, and nothing is searched for a maximum.
//
// Launch: a block for each tile of the panel, in x; for Hopper as many as there are multiprocessors, or as there are
// pairs of tiles beside each other, if they are fewer, with 214,080 bytes of dynamic shared memory, and
// shared/hopper_tile.cuh says what the maps of all rows and all columns are; of `merge` a thread for each row, 256 a
// block; of `largest_coefficients` 128 blocks in x, in y the two sides.

#include "scales.cuh"
#include "statistics.cuh"
#include "tensor_tile.cuh"
#include "vectors.cuh"
#if defined(FORWARD_HOPPER) || defined(BACKWARD_HOPPER)
#include "hopper_tile.cuh"
#endif

#ifdef MERGE

extern "C" __global__ void __launch_bounds__(256) merge(
    const float *__restrict__ partials, float *__restrict__ statistics,
    // Of the panel, on the side whose statistics these are; in tiles of the other side.
    u32 count, u32 tiles, u32 tile,
    // How many planes a tile's partial statistics have.
    u32 quantities,
    // Where the panel is on the diagonal of a Gram: the first tile that speaks of rows, the last one of columns, are
    // those of the row itself.
    u32 from_own, u32 before_own,
    // Whether there were no earlier panels.
    u32 fresh
) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= count) {
        return;
    }
    float *place = statistics + (size_t)i * STATISTICS;
    Statistics all = fresh ? no_statistics() : load_statistics(place);
    u32 own = i / tile;
    u32 before = before_own ? own : tiles;
    for (u32 one = from_own ? own : 0; one < before; one++) {
        const float *part = partials + (size_t)one * quantities * count + i;
        Statistics more = {part[0], part[count], part[2 * (size_t)count], 0.0f, 0.0f};
        if (quantities == STATISTICS) {
            more.logits = part[3 * (size_t)count];
            more.entries = part[4 * (size_t)count];
        }
        all = merged(all, more);
    }
    store_statistics(place, all);
}

#elif defined(LARGEST_COEFFICIENTS)

constexpr u32 SHARES = 128;

extern "C" __global__ void __launch_bounds__(256) largest_coefficients(
    OPTIONAL const float *__restrict__ row_coefficients, OPTIONAL const float *__restrict__ column_coefficients,
    u32 *__restrict__ largest, u32 rows, u32 columns
) {
    __shared__ float of_warps[8];
    const float4 *coefficients = (const float4 *)(blockIdx.y == 0 ? row_coefficients : column_coefficients);
    u32 count = blockIdx.y == 0 ? rows : columns;
    float most = 0.0f;
    if (coefficients) {
        for (u32 i = blockIdx.x * 256 + threadIdx.x; i < count; i += SHARES * 256) {
            float4 four = __ldg(coefficients + i);
            most = fmaxf(most, fabsf(four.y) + fabsf(four.z));
        }
    }
    float one[1] = {most};
    combine_lanes<Largest, 1, WARP, 1>(one);
    if (threadIdx.x % WARP == 0) {
        of_warps[threadIdx.x / WARP] = one[0];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < 8; warp++) {
            one[0] = fmaxf(one[0], of_warps[warp]);
        }
        largest[blockIdx.y * SHARES + blockIdx.x] = __float_as_uint(one[0]);
    }
}

#else

// The largest σ that is every row's reference: the smallest term, exp(−2σ), is far from where f32 ends.
[[maybe_unused]] constexpr float BOUNDED = 30.0f;

// exp(x) for x of no more than a little above 0, where it counts.
__device__ __forceinline__ float exponential_of(float x) {
    return exp2f(x * 1.4426950408889634f);
}

// What a tile of logits knows of where it is.
struct Panel {
    // Rows and columns, and where they begin in the whole.
    u32 rows;
    u32 columns;
    u32 first_row;
    u32 first_column;
    // Those of the whole, from the panel's first one on.
    const u32 *row_keys;
    const u32 *column_keys;
    // Entries with column = row + diagonal are left out.
    bool has_diagonal;
    i32 diagonal;
};

// Puts a tile's logits in place of its products, which are multiplied by one factor and then the other: NO_ENTRY where
// they are left out.
template <typename Tile>
__device__ __forceinline__ void make_logits(Tile &tile, const Panel &panel, u32 row, u32 column, float2 factors) {
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v++) {
            tile.at(u, v) = tile.at(u, v) * factors.x * factors.y;
        }
    }
    // How far the tile's first entry is below the diagonal.
    i32 below = (i32)(panel.first_row + row) + panel.diagonal - (i32)(panel.first_column + column);
    bool crosses = panel.has_diagonal && below > -TILE && below < TILE;
    if (!crosses && !panel.row_keys && row + TILE <= panel.rows && column + TILE <= panel.columns) {
        return;
    }
    u32 keys[Tile::ROWS];
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        keys[u] = panel.row_keys ? __ldg(panel.row_keys + min(row + Tile::row(u), panel.rows - 1)) : 1;
    }
#pragma unroll
    for (int v = 0; v < Tile::COLUMNS; v++) {
        u32 c = Tile::column(v);
        u32 key = panel.row_keys ? __ldg(panel.column_keys + min(column + c, panel.columns - 1)) : 0;
#pragma unroll
        for (int u = 0; u < Tile::ROWS; u++) {
            u32 r = Tile::row(u);
            bool outside = row + r >= panel.rows || column + c >= panel.columns;
            bool left_out = key == keys[u] || (crosses && (i32)c - (i32)r == below);
            if (outside || left_out) {
                tile.at(u, v) = NO_ENTRY;
            }
        }
    }
}

// The number of a tile among all that are swept, row after row of tiles; in a Gram the rows of tiles above have in_row,
// in_row − 1, … tiles.
__device__ __forceinline__ u32 number_of_tile(u32 row, u32 column, u32 in_row, bool gram) {
    u64 number = (u64)row * in_row + column - (gram ? (u64)row * (row + 1) / 2 : 0);
    // So many are never kept.
    return number < 0xffffffffu ? (u32)number : 0xffffffffu;
}

// Where a thread's values of a kept tile are, four at a time.
template <typename Tile> __device__ __forceinline__ float4 *kept_values(float *kept, u32 number) {
    return (float4 *)(kept + (size_t)number * (TILE * TILE)) + Tile::thread();
}

template <typename Tile> __device__ __forceinline__ void keep(Tile &tile, float *kept, u32 number) {
    float4 *to = kept_values<Tile>(kept, number);
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v += 4) {
            to[(u * Tile::COLUMNS + v) / 4 * Tile::THREADS] =
                make_float4(tile.at(u, v), tile.at(u, v + 1), tile.at(u, v + 2), tile.at(u, v + 3));
        }
    }
}

template <typename Tile> __device__ __forceinline__ void read_kept(Tile &tile, const float *kept, u32 number) {
    const float4 *from = kept_values<Tile>((float *)kept, number);
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v += 4) {
            float4 four = __ldg(from + (u * Tile::COLUMNS + v) / 4 * Tile::THREADS);
            tile.at(u, v) = four.x;
            tile.at(u, v + 1) = four.y;
            tile.at(u, v + 2) = four.z;
            tile.at(u, v + 3) = four.w;
        }
    }
}

// Partial statistics of a tile's rows or columns: planes of `count` values, of which its own begin at `first`.
struct Side {
    float *planes;
    u32 count;
    u32 first;
};

// Floats of shared memory that belong to one quantity: a tile's lines for each place of a warp.
template <typename Tile>
constexpr int EXCHANGE = TILE * (Tile::WARPS_ACROSS > Tile::WARPS_DOWN ? Tile::WARPS_ACROSS : Tile::WARPS_DOWN);

// Writes a quantity of the rows whose parts are in shared memory, and gives it to the thread of each.
template <typename Operation, typename Tile, int PARTS>
__device__ __forceinline__ float write_quantity(const Side &side, u32 plane, const float *parts) {
    float value = 0.0f;
    if (Tile::thread() < TILE) {
        value = combined<Operation, TILE, PARTS>(parts, Tile::thread());
        if (side.first + Tile::thread() < side.count) {
            (side.planes + (side.first + Tile::thread()))[(size_t)plane * side.count] = value;
        }
    }
    return value;
}

// Writes the references of rows whose sums are given, where they all have the same one.
template <typename Tile> __device__ __forceinline__ void write_reference(const Side &side, float sum, float scale) {
    if (Tile::thread() < TILE && side.first + Tile::thread() < side.count) {
        side.planes[side.first + Tile::thread()] = sum == 0.0f ? NO_ENTRY : scale;
    }
}

// What exponentials are taken relative to in a line whose largest logit is given.
__device__ __forceinline__ float reference_of(float largest) {
    return largest == NO_ENTRY ? 0.0f : largest;
}

// The statistics of both rows and columns with one exponential for each entry.
template <typename Tile>
__device__ __forceinline__ void
bounded_statistics(Tile &tile, const Side &of_rows, const Side &of_columns, bool columns, float scale, float *shared) {
    float column_sums[Tile::COLUMNS];
    float column_along[Tile::COLUMNS];
    float row_sums[Tile::ROWS];
    float row_along[Tile::ROWS];
#pragma unroll
    for (int v = 0; v < Tile::COLUMNS; v++) {
        column_sums[v] = 0.0f;
        column_along[v] = 0.0f;
    }
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        row_sums[u] = 0.0f;
        row_along[u] = 0.0f;
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v++) {
            float logit = tile.at(u, v);
            float e = exponential_of(logit - scale);
            float along = e * logit;
            row_sums[u] += e;
            row_along[u] += along;
            column_sums[v] += e;
            column_along[v] += along;
        }
    }
    combine_rows<Add, TILE, Tile>(row_sums, shared);
    combine_rows<Add, TILE, Tile>(row_along, shared + EXCHANGE<Tile>);
    if (columns) {
        combine_columns<Add, TILE, Tile>(column_sums, shared + 2 * EXCHANGE<Tile>);
        combine_columns<Add, TILE, Tile>(column_along, shared + 3 * EXCHANGE<Tile>);
    }
    Tile::sync();
    float sum = write_quantity<Add, Tile, Tile::WARPS_ACROSS>(of_rows, 1, shared);
    write_quantity<Add, Tile, Tile::WARPS_ACROSS>(of_rows, 2, shared + EXCHANGE<Tile>);
    write_reference<Tile>(of_rows, sum, scale);
    if (columns) {
        sum = write_quantity<Add, Tile, Tile::WARPS_DOWN>(of_columns, 1, shared + 2 * EXCHANGE<Tile>);
        write_quantity<Add, Tile, Tile::WARPS_DOWN>(of_columns, 2, shared + 3 * EXCHANGE<Tile>);
        write_reference<Tile>(of_columns, sum, scale);
    }
}

template <typename Tile>
__device__ __forceinline__ void unbounded_row_statistics(Tile &tile, const Side &side, float *shared) {
    float largest[Tile::ROWS];
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        largest[u] = tile.at(u, 0);
#pragma unroll
        for (int v = 1; v < Tile::COLUMNS; v++) {
            largest[u] = fmaxf(largest[u], tile.at(u, v));
        }
    }
    combine_rows<Largest, TILE, Tile>(largest, shared);
    Tile::sync();
    float sums[Tile::ROWS];
    float along[Tile::ROWS];
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        float reference = reference_of(combined<Largest, TILE, Tile::WARPS_ACROSS>(shared, Tile::row(u)));
        sums[u] = 0.0f;
        along[u] = 0.0f;
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v++) {
            float logit = tile.at(u, v);
            float e = exponential_of(logit - reference);
            sums[u] += e;
            along[u] += e * logit;
        }
    }
    combine_rows<Add, TILE, Tile>(sums, shared + EXCHANGE<Tile>);
    combine_rows<Add, TILE, Tile>(along, shared + 2 * EXCHANGE<Tile>);
    Tile::sync();
    write_quantity<Largest, Tile, Tile::WARPS_ACROSS>(side, 0, shared);
    write_quantity<Add, Tile, Tile::WARPS_ACROSS>(side, 1, shared + EXCHANGE<Tile>);
    write_quantity<Add, Tile, Tile::WARPS_ACROSS>(side, 2, shared + 2 * EXCHANGE<Tile>);
}

template <typename Tile>
__device__ __forceinline__ void unbounded_column_statistics(Tile &tile, const Side &side, float *shared) {
    float largest[Tile::COLUMNS];
#pragma unroll
    for (int v = 0; v < Tile::COLUMNS; v++) {
        largest[v] = tile.at(0, v);
#pragma unroll
        for (int u = 1; u < Tile::ROWS; u++) {
            largest[v] = fmaxf(largest[v], tile.at(u, v));
        }
    }
    combine_columns<Largest, TILE, Tile>(largest, shared);
    Tile::sync();
    float sums[Tile::COLUMNS];
    float along[Tile::COLUMNS];
#pragma unroll
    for (int v = 0; v < Tile::COLUMNS; v++) {
        float reference = reference_of(combined<Largest, TILE, Tile::WARPS_DOWN>(shared, Tile::column(v)));
        sums[v] = 0.0f;
        along[v] = 0.0f;
#pragma unroll
        for (int u = 0; u < Tile::ROWS; u++) {
            float logit = tile.at(u, v);
            float e = exponential_of(logit - reference);
            sums[v] += e;
            along[v] += e * logit;
        }
    }
    combine_columns<Add, TILE, Tile>(sums, shared + EXCHANGE<Tile>);
    combine_columns<Add, TILE, Tile>(along, shared + 2 * EXCHANGE<Tile>);
    Tile::sync();
    write_quantity<Largest, Tile, Tile::WARPS_DOWN>(side, 0, shared);
    write_quantity<Add, Tile, Tile::WARPS_DOWN>(side, 1, shared + EXCHANGE<Tile>);
    write_quantity<Add, Tile, Tile::WARPS_DOWN>(side, 2, shared + 2 * EXCHANGE<Tile>);
}

// Σ z and the number of entries, of rows and columns.
template <typename Tile>
__device__ __forceinline__ void
sums_of_logits(Tile &tile, const Side &of_rows, const Side &of_columns, bool columns, float *shared) {
    float column_logits[Tile::COLUMNS];
    float column_entries[Tile::COLUMNS];
    float row_logits[Tile::ROWS];
    float row_entries[Tile::ROWS];
#pragma unroll
    for (int v = 0; v < Tile::COLUMNS; v++) {
        column_logits[v] = 0.0f;
        column_entries[v] = 0.0f;
    }
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        row_logits[u] = 0.0f;
        row_entries[u] = 0.0f;
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v++) {
            bool inside = tile.at(u, v) != NO_ENTRY;
            float logit = inside ? tile.at(u, v) : 0.0f;
            float entry = inside ? 1.0f : 0.0f;
            row_logits[u] += logit;
            row_entries[u] += entry;
            column_logits[v] += logit;
            column_entries[v] += entry;
        }
    }
    combine_rows<Add, TILE, Tile>(row_logits, shared);
    combine_rows<Add, TILE, Tile>(row_entries, shared + EXCHANGE<Tile>);
    combine_columns<Add, TILE, Tile>(column_logits, shared + 2 * EXCHANGE<Tile>);
    combine_columns<Add, TILE, Tile>(column_entries, shared + 3 * EXCHANGE<Tile>);
    Tile::sync();
    write_quantity<Add, Tile, Tile::WARPS_ACROSS>(of_rows, 3, shared);
    write_quantity<Add, Tile, Tile::WARPS_ACROSS>(of_rows, 4, shared + EXCHANGE<Tile>);
    if (columns) {
        write_quantity<Add, Tile, Tile::WARPS_DOWN>(of_columns, 3, shared + 2 * EXCHANGE<Tile>);
        write_quantity<Add, Tile, Tile::WARPS_DOWN>(of_columns, 4, shared + 3 * EXCHANGE<Tile>);
    }
}

// The statistics of a tile's rows and, if they are wanted, its columns. `shared` is four times EXCHANGE, free for use.
template <typename Tile>
__device__ __forceinline__ void write_statistics(
    Tile &tile, const Side &of_rows, const Side &of_columns, bool columns, u32 quantities, bool bounded, float scale,
    float *shared
) {
    if (bounded) {
        bounded_statistics(tile, of_rows, of_columns, columns, scale, shared);
    } else {
        unbounded_row_statistics(tile, of_rows, shared);
        if (columns) {
            Tile::sync();
            unbounded_column_statistics(tile, of_columns, shared);
        }
    }
    if (quantities == STATISTICS) {
        Tile::sync();
        sums_of_logits(tile, of_rows, of_columns, columns, shared);
    }
}

// What a row or column knows of its gradients: L, or w·exp(σ − L) where σ is the reference; w; s. 0 of no coefficients.
struct Known {
    float exponent;
    float weight;
    float share;
};

__device__ __forceinline__ Known known_of(const float *coefficients, u32 line, bool bounded, float scale) {
    if (!coefficients) {
        return {0.0f, 0.0f, 0.0f};
    }
    float4 four = __ldg((const float4 *)coefficients + line);
    Known known = {four.x, four.y, four.z};
    if (bounded) {
        known.exponent = known.weight == 0.0f ? 0.0f : known.weight * exponential(scale - known.exponent);
    }
    return known;
}

// The part of a logit's gradient that a row or column has.
__device__ __forceinline__ float gradient_of(float logit, const Known &known) {
    return (known.weight == 0.0f ? 0.0f : known.weight * exponential_of(logit - known.exponent)) - known.share;
}

// Puts gradients in place of a tile's logits, whose first row and column in the panel are given. Coefficients are those
// of the whole.
template <typename Tile>
__device__ __forceinline__ void make_gradients(
    Tile &tile, const float *row_coefficients, const float *column_coefficients, const Panel &panel, u32 row,
    u32 column, bool bounded, float scale
) {
    Known rows[Tile::ROWS];
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        u32 place = panel.first_row + min(row + Tile::row(u), panel.rows - 1);
        rows[u] = known_of(row_coefficients, place, bounded, scale);
    }
    if (bounded) {
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v++) {
            u32 place = panel.first_column + min(column + Tile::column(v), panel.columns - 1);
            Known known = known_of(column_coefficients, place, bounded, scale);
#pragma unroll
            for (int u = 0; u < Tile::ROWS; u++) {
                float logit = tile.at(u, v);
                float factor = rows[u].exponent + known.exponent;
                float gradient = factor * exponential_of(logit - scale) - (rows[u].share + known.share);
                tile.at(u, v) = logit == NO_ENTRY ? 0.0f : gradient;
            }
        }
        return;
    }
#pragma unroll
    for (int v = 0; v < Tile::COLUMNS; v++) {
        u32 place = panel.first_column + min(column + Tile::column(v), panel.columns - 1);
        Known known = known_of(column_coefficients, place, bounded, scale);
#pragma unroll
        for (int u = 0; u < Tile::ROWS; u++) {
            float logit = tile.at(u, v);
            tile.at(u, v) = logit == NO_ENTRY ? 0.0f : gradient_of(logit, rows[u]) + gradient_of(logit, known);
        }
    }
}

// Which tile a block has.
struct Place {
    // Its first row and column in the panel.
    u32 row;
    u32 column;
    // Whether it is swept at all, and whether it is its own mirror image in a Gram.
    bool swept;
    bool on_diagonal;
    // Its number among those that are kept.
    u32 number;
};

__device__ __forceinline__ Place place_of_block(const Panel &panel, u32 all_columns, bool gram, u32 kept_from) {
    uint2 place = place_of_tile(blockIdx.x, (panel.rows + TILE - 1) / TILE, (panel.columns + TILE - 1) / TILE);
    u32 row = panel.first_row / TILE + place.x;
    u32 column = panel.first_column / TILE + place.y;
    u32 number = number_of_tile(row - kept_from, column, (all_columns + TILE - 1) / TILE, gram);
    return {place.x * TILE, place.y * TILE, !gram || column >= row, gram && column == row, number};
}

__device__ __forceinline__ Panel panel_of(
    u32 rows, u32 columns, u32 first_row, u32 first_column, const u32 *row_keys, const u32 *column_keys,
    u32 has_diagonal, i32 diagonal
) {
    return {rows, columns, first_row, first_column, row_keys ? row_keys + first_row : nullptr,
            row_keys ? column_keys + first_column : nullptr, has_diagonal != 0, diagonal};
}

// The products of a tile by ordinary arithmetic, of embeddings of the whole.
[[maybe_unused]] __device__ __forceinline__ void multiply_plain(
    PlainTile<TILE> &tile, const float *row_values, const float *column_values, const float *row_norms,
    const float *column_norms, const Panel &panel, const Place &place, u32 width
) {
    __shared__ float4 memory[PlainTile<TILE>::MEMORY / 4];
    const float *norms = row_norms ? row_norms + panel.first_row : nullptr;
    Lines left = lines_of(row_values + (size_t)panel.first_row * width, width, norms, panel.rows);
    norms = row_norms ? column_norms + panel.first_column : nullptr;
    Lines right = lines_of(column_values + (size_t)panel.first_column * width, width, norms, panel.columns);
    tile.template multiply<true, true>(left, right, place.row, place.column, 0, width, (float *)memory);
}

#if __CUDA_ARCH__ >= 800

// The products of a tile by tensor cores, of packed embeddings of the whole.
template <typename Tile>
__device__ __forceinline__ void multiply_packed(
    Tile &tile, const u16 *rows, const u16 *low_rows, const u16 *columns, const u16 *low_columns, u32 stride,
    const Panel &panel, const Place &place, u32 width, char *memory
) {
    size_t first_row = (size_t)panel.first_row * stride;
    size_t first_column = (size_t)panel.first_column * stride;
    HalfLines left = {rows + first_row, low_rows + first_row, stride, panel.rows};
    HalfLines right = {columns + first_column, low_columns + first_column, stride, panel.columns};
    tile.template multiply<true, true>(left, right, place.row, place.column, 0, width, memory);
}

// What products are multiplied with, one after the other, for logits. f16 are scaled.
template <typename Format>
__device__ __forceinline__ float2 factors_of(const u32 *largest_row, const u32 *largest_column, float scale) {
    if (!Format::SCALED) {
        return make_float2(1.0f, scale);
    }
    return make_float2(
        1.0f / scale_of(largest_row ? __ldg(largest_row) : BITS_OF_ONE),
        scale / scale_of(largest_column ? __ldg(largest_column) : BITS_OF_ONE)
    );
}

#endif

#if defined(FORWARD_HOPPER) || defined(FORWARD) || defined(FORWARD_HALVES) || defined(FORWARD_EXACT)

// What is made of a tile's logits in the forward pass.
template <typename Tile>
__device__ __forceinline__ void finish_forward(
    Tile &tile, const Panel &panel, const Place &place, float *partials, float *kept, u32 kept_tiles, bool of_columns,
    u32 column_partials, u32 quantities, bool bounded, float scale, float *shared
) {
    if (place.number < kept_tiles) {
        keep(tile, kept, place.number);
    }
    size_t across = place.column / TILE;
    size_t down = place.row / TILE;
    Side side_of_rows = {partials + across * quantities * panel.rows, panel.rows, place.row};
    Side side_of_columns = {
        partials + column_partials + down * quantities * panel.columns, panel.columns, place.column
    };
    write_statistics(tile, side_of_rows, side_of_columns, of_columns, quantities, bounded, scale, shared);
}

#endif
#ifdef FORWARD

extern "C" __global__ void __launch_bounds__(256) forward(
    const float *__restrict__ row_values, const float *__restrict__ column_values,
    OPTIONAL const float *__restrict__ row_norms, OPTIONAL const float *__restrict__ column_norms,
    OPTIONAL const u32 *__restrict__ row_keys, OPTIONAL const u32 *__restrict__ column_keys,
    const float *__restrict__ log_scale, float *__restrict__ partials, OPTIONAL float *__restrict__ kept,
    // Of the panel.
    u32 rows, u32 columns, u32 first_row, u32 first_column, u32 width,
    // Of the whole.
    u32 all_columns, u32 has_diagonal, i32 diagonal, u32 gram,
    // How many tiles are kept, from those of a row of tiles on.
    u32 kept_tiles, u32 kept_from,
    // Whether columns' statistics are wanted, and where their parts begin.
    u32 of_columns, u32 column_partials, u32 quantities
) {
    __shared__ float exchange[4 * EXCHANGE<PlainTile<TILE>>];
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    Place place = place_of_block(panel, all_columns, gram != 0, kept_from);
    if (!place.swept) {
        return;
    }
    PlainTile<TILE> tile;
    multiply_plain(tile, row_values, column_values, row_norms, column_norms, panel, place, width);
    float scale = exponential(log_scale[0]);
    make_logits(tile, panel, place.row, place.column, make_float2(1.0f, scale));
    finish_forward(tile, panel, place, partials, kept, kept_tiles, of_columns != 0, column_partials, quantities,
                   row_norms && scale <= BOUNDED, scale, exchange);
}

#endif
#ifdef FORWARD_HALVES

#ifdef BF16
#define FORMAT Bf16
#else
#define FORMAT F16
#endif

extern "C" __global__ void __launch_bounds__(128, 2) forward_halves(
    const u16 *__restrict__ packed_rows, const u16 *__restrict__ packed_columns,
    OPTIONAL const u32 *__restrict__ largest_row, OPTIONAL const u32 *__restrict__ largest_column,
    OPTIONAL const u32 *__restrict__ row_keys, OPTIONAL const u32 *__restrict__ column_keys,
    const float *__restrict__ log_scale, float *__restrict__ partials, OPTIONAL float *__restrict__ kept,
    // As of `forward`; from row to row of what is packed; whether similarities are cosines.
    u32 rows, u32 columns, u32 first_row, u32 first_column, u32 width, u32 stride, u32 all_columns, u32 has_diagonal,
    i32 diagonal, u32 gram, u32 cosines, u32 kept_tiles, u32 kept_from, u32 of_columns, u32 column_partials,
    u32 quantities
) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ float4 dynamic[];
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    Place place = place_of_block(panel, all_columns, gram != 0, kept_from);
    if (!place.swept) {
        return;
    }
    TensorTile<TILE, false, FORMAT> tile;
    multiply_packed(tile, packed_rows, packed_rows, packed_columns, packed_columns, stride, panel, place, width,
                    (char *)dynamic);
    float scale = exponential(log_scale[0]);
    make_logits(tile, panel, place.row, place.column, factors_of<FORMAT>(largest_row, largest_column, scale));
    finish_forward(tile, panel, place, partials, kept, kept_tiles, of_columns != 0, column_partials, quantities,
                   cosines && scale <= BOUNDED, scale, (float *)dynamic);
#endif
}

#endif
#ifdef FORWARD_EXACT

extern "C" __global__ void __launch_bounds__(256, 1) forward_exact(
    const u16 *__restrict__ packed_rows, const u16 *__restrict__ low_rows, const u16 *__restrict__ packed_columns,
    const u16 *__restrict__ low_columns, OPTIONAL const u32 *__restrict__ largest_row,
    OPTIONAL const u32 *__restrict__ largest_column, OPTIONAL const u32 *__restrict__ row_keys,
    OPTIONAL const u32 *__restrict__ column_keys, const float *__restrict__ log_scale, float *__restrict__ partials,
    OPTIONAL float *__restrict__ kept,
    // As of `forward_halves`.
    u32 rows, u32 columns, u32 first_row, u32 first_column, u32 width, u32 stride, u32 all_columns, u32 has_diagonal,
    i32 diagonal, u32 gram, u32 cosines, u32 kept_tiles, u32 kept_from, u32 of_columns, u32 column_partials,
    u32 quantities
) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ float4 dynamic[];
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    Place place = place_of_block(panel, all_columns, gram != 0, kept_from);
    if (!place.swept) {
        return;
    }
    TensorTile<TILE, true, F16> tile;
    multiply_packed(tile, packed_rows, low_rows, packed_columns, low_columns, stride, panel, place, width,
                    (char *)dynamic);
    float scale = exponential(log_scale[0]);
    make_logits(tile, panel, place.row, place.column, factors_of<F16>(largest_row, largest_column, scale));
    finish_forward(tile, panel, place, partials, kept, kept_tiles, of_columns != 0, column_partials, quantities,
                   cosines && scale <= BOUNDED, scale, (float *)dynamic);
#endif
}

#endif
#ifdef BACKWARD

// Writes one value for each place of a tile, runs of four of them at once where they can be: those of rows below each
// other if mirrored.
template <bool MIRRORED>
__device__ __forceinline__ void write_tile(PlainTile<TILE> &tile, float *output, u32 stride, u32 rows, u32 columns) {
    constexpr int LINES = MIRRORED ? PlainTile<TILE>::COLUMNS : PlainTile<TILE>::ROWS;
    constexpr int PLACES = MIRRORED ? PlainTile<TILE>::ROWS : PlainTile<TILE>::COLUMNS;
    bool fours = stride % 4 == 0 && are_aligned(output);
#pragma unroll
    for (int u = 0; u < LINES; u++) {
        u32 row = MIRRORED ? tile.column(u) : tile.row(u);
#pragma unroll
        for (int v = 0; v < PLACES; v += 4) {
            u32 column = MIRRORED ? tile.row(v) : tile.column(v);
            float four[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                four[i] = MIRRORED ? tile.at(v + i, u) : tile.at(u, v + i);
            }
            float *to = output + (size_t)row * stride + column;
            if (row < rows && fours && column + 4 <= columns) {
                *(float4 *)to = make_float4(four[0], four[1], four[2], four[3]);
            } else if (row < rows) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (column + i < columns) {
                        to[i] = four[i];
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) backward(
    const float *__restrict__ row_values, const float *__restrict__ column_values,
    OPTIONAL const float *__restrict__ row_norms, OPTIONAL const float *__restrict__ column_norms,
    OPTIONAL const u32 *__restrict__ row_keys, OPTIONAL const u32 *__restrict__ column_keys,
    const float *__restrict__ log_scale, OPTIONAL const float *__restrict__ row_coefficients,
    OPTIONAL const float *__restrict__ column_coefficients, OPTIONAL const float *__restrict__ kept,
    float *__restrict__ gradients,
    // As of `forward`.
    u32 rows, u32 columns, u32 first_row, u32 first_column, u32 width, u32 all_columns, u32 has_diagonal, i32 diagonal,
    u32 gram, u32 kept_tiles, u32 kept_from,
    // Whether tiles off the diagonal are written a second time, mirrored; from row to row of what is written.
    u32 mirror, u32 gradient_stride
) {
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    Place place = place_of_block(panel, all_columns, gram != 0, kept_from);
    if (!place.swept) {
        return;
    }
    float scale = exponential(log_scale[0]);
    PlainTile<TILE> tile;
    if (place.number < kept_tiles) {
        read_kept(tile, kept, place.number);
    } else {
        multiply_plain(tile, row_values, column_values, row_norms, column_norms, panel, place, width);
        make_logits(tile, panel, place.row, place.column, make_float2(1.0f, scale));
    }
    make_gradients(tile, row_coefficients, column_coefficients, panel, place.row, place.column,
                   row_norms && scale <= BOUNDED, scale);
    float *output = gradients + (size_t)place.row * gradient_stride + place.column;
    write_tile<false>(tile, output, gradient_stride, rows - place.row, columns - place.column);
    if (mirror && !place.on_diagonal) {
        output = gradients + (size_t)place.column * gradient_stride + place.row;
        write_tile<true>(tile, output, gradient_stride, columns - place.column, rows - place.row);
    }
}

#endif
#if defined(BACKWARD_HOPPER) || defined(BACKWARD_HALVES) || defined(BACKWARD_EXACT)
#if __CUDA_ARCH__ >= 800

// What gradients are scaled with before they are rounded to f16: the parts of the bound of rows and of columns are put
// together by each block, and by the first one left for the products.
template <int THREADS> __device__ __forceinline__ float scale_of_gradients(u32 *largest) {
    __shared__ float of_warps[2][THREADS / WARP];
    constexpr u32 SHARES = 128;
    float sides[2] = {__uint_as_float(largest[threadIdx.x % SHARES]),
                      __uint_as_float(largest[SHARES + threadIdx.x % SHARES])};
#pragma unroll
    for (int side = 0; side < 2; side++) {
        float one[1] = {sides[side]};
        combine_lanes<Largest, 1, WARP, 1>(one);
        if (threadIdx.x % WARP == 0) {
            of_warps[side][threadIdx.x / WARP] = one[0];
        }
    }
    __syncthreads();
    float bound = 0.0f;
#pragma unroll
    for (int side = 0; side < 2; side++) {
        float most = of_warps[side][0];
#pragma unroll
        for (int warp = 1; warp < THREADS / WARP; warp++) {
            most = fmaxf(most, of_warps[side][warp]);
        }
        bound += most;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        largest[2 * SHARES] = __float_as_uint(bound);
    }
    return scale_of(__float_as_uint(bound));
}

// Writes a tile in 16 bits by way of shared memory, 16 bytes at a time, mirrored or not; zeros where rows are padded.
template <bool MIRRORED, bool LOW_PART, typename Format, typename Tile>
__device__ __forceinline__ void
write_packed(Tile &tile, u16 *output, u32 stride, u32 rows, u32 columns, float scale, char *memory) {
    constexpr u32 PIECES = TILE / 8;
    auto at = [&](u32 row, u32 column) {
        return memory + (row * PIECES + (column / 8 ^ row % 8)) * 16 + column % 8 * 2;
    };
    Tile::sync();
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v += 2) {
            float2 two = make_float2(scale * tile.at(u, v), scale * tile.at(u, v + 1));
            u32 pair = Format::pack(two);
            if (LOW_PART) {
                pair = low_f16x2_of(two, pair);
            }
            u32 row = Tile::row(u);
            u32 column = Tile::column(v);
            if (MIRRORED) {
                *(u16 *)at(column, row) = (u16)pair;
                *(u16 *)at(column + 1, row) = (u16)(pair >> 16);
            } else {
                *(u32 *)at(row, column) = pair;
            }
        }
    }
    Tile::sync();
#pragma unroll
    for (u32 i = Tile::thread(); i < TILE * PIECES; i += Tile::THREADS) {
        u32 row = i / PIECES;
        u32 column = i % PIECES * 8;
        if (row < rows && column < columns) {
            *(uint4 *)(output + (size_t)row * stride + column) = *(const uint4 *)at(row, column);
        }
    }
}

// What is made of a tile's logits in the backward pass.
template <bool LOW_PART, typename Format, typename Tile>
__device__ __forceinline__ void write_gradients(
    Tile &tile, const Panel &panel, const Place &place, u16 *output, u32 stride, bool mirror, float scale, char *memory
) {
    size_t straight = (size_t)place.row * stride + place.column;
    size_t mirrored = (size_t)place.column * stride + place.row;
    u32 rows = panel.rows - place.row;
    u32 columns = panel.columns - place.column;
    write_packed<false, LOW_PART, Format>(tile, output + straight, stride, rows, columns, scale, memory);
    if (mirror && !place.on_diagonal) {
        write_packed<true, LOW_PART, Format>(tile, output + mirrored, stride, columns, rows, scale, memory);
    }
}

#endif
#endif
#ifdef BACKWARD_HALVES

#ifdef BF16
#define FORMAT Bf16
#else
#define FORMAT F16
#endif

extern "C" __global__ void __launch_bounds__(128, 2) backward_halves(
    const u16 *__restrict__ packed_rows, const u16 *__restrict__ packed_columns,
    OPTIONAL const u32 *__restrict__ largest_row, OPTIONAL const u32 *__restrict__ largest_column,
    OPTIONAL const u32 *__restrict__ row_keys, OPTIONAL const u32 *__restrict__ column_keys,
    const float *__restrict__ log_scale, OPTIONAL const float *__restrict__ row_coefficients,
    OPTIONAL const float *__restrict__ column_coefficients, OPTIONAL const float *__restrict__ kept,
    OPTIONAL u32 *__restrict__ largest, u16 *__restrict__ gradients,
    // As of `forward_halves` and `backward`.
    u32 rows, u32 columns, u32 first_row, u32 first_column, u32 width, u32 stride, u32 all_columns, u32 has_diagonal,
    i32 diagonal, u32 gram, u32 cosines, u32 kept_tiles, u32 kept_from, u32 mirror, u32 gradient_stride
) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ float4 dynamic[];
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    Place place = place_of_block(panel, all_columns, gram != 0, kept_from);
    if (!place.swept) {
        return;
    }
    float scale = exponential(log_scale[0]);
    TensorTile<TILE, false, FORMAT> tile;
    if (place.number < kept_tiles) {
        read_kept(tile, kept, place.number);
    } else {
        multiply_packed(tile, packed_rows, packed_rows, packed_columns, packed_columns, stride, panel, place, width,
                        (char *)dynamic);
        make_logits(tile, panel, place.row, place.column, factors_of<FORMAT>(largest_row, largest_column, scale));
    }
    make_gradients(tile, row_coefficients, column_coefficients, panel, place.row, place.column,
                   cosines && scale <= BOUNDED, scale);
    float to_halves = FORMAT::SCALED ? scale_of_gradients<128>(largest) : 1.0f;
    write_gradients<false, FORMAT>(tile, panel, place, gradients, gradient_stride, mirror != 0, to_halves,
                                   (char *)dynamic);
#endif
}

#endif
#ifdef BACKWARD_EXACT

extern "C" __global__ void __launch_bounds__(256, 1) backward_exact(
    const u16 *__restrict__ packed_rows, const u16 *__restrict__ low_rows, const u16 *__restrict__ packed_columns,
    const u16 *__restrict__ low_columns, OPTIONAL const u32 *__restrict__ largest_row,
    OPTIONAL const u32 *__restrict__ largest_column, OPTIONAL const u32 *__restrict__ row_keys,
    OPTIONAL const u32 *__restrict__ column_keys, const float *__restrict__ log_scale,
    OPTIONAL const float *__restrict__ row_coefficients, OPTIONAL const float *__restrict__ column_coefficients,
    OPTIONAL const float *__restrict__ kept, u32 *__restrict__ largest, u16 *__restrict__ gradients,
    u16 *__restrict__ low_gradients,
    // As of `forward_halves` and `backward`.
    u32 rows, u32 columns, u32 first_row, u32 first_column, u32 width, u32 stride, u32 all_columns, u32 has_diagonal,
    i32 diagonal, u32 gram, u32 cosines, u32 kept_tiles, u32 kept_from, u32 mirror, u32 gradient_stride
) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ float4 dynamic[];
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    Place place = place_of_block(panel, all_columns, gram != 0, kept_from);
    if (!place.swept) {
        return;
    }
    float scale = exponential(log_scale[0]);
    TensorTile<TILE, true, F16> tile;
    if (place.number < kept_tiles) {
        read_kept(tile, kept, place.number);
    } else {
        multiply_packed(tile, packed_rows, low_rows, packed_columns, low_columns, stride, panel, place, width,
                        (char *)dynamic);
        make_logits(tile, panel, place.row, place.column, factors_of<F16>(largest_row, largest_column, scale));
    }
    make_gradients(tile, row_coefficients, column_coefficients, panel, place.row, place.column,
                   cosines && scale <= BOUNDED, scale);
    float to_halves = scale_of_gradients<256>(largest);
    write_gradients<false, F16>(tile, panel, place, gradients, gradient_stride, mirror != 0, to_halves,
                                (char *)dynamic);
    write_gradients<true, F16>(tile, panel, place, low_gradients, gradient_stride, mirror != 0, to_halves,
                               (char *)dynamic);
#endif
}

#endif
#if defined(FORWARD_HOPPER) || defined(BACKWARD_HOPPER)

#ifdef BF16
#define FORMAT Bf16
#else
#define FORMAT F16
#endif

// Tiles of the two groups of a block, beside each other.
typedef GroupTile<128, 128> Square;

// Where a group's tile is, of the block's that has a place among those of 128 × 256.
__device__ __forceinline__ Place
place_of_square(const Panel &panel, uint2 block, u32 all_columns, bool gram, u32 kept_from) {
    u32 across = 2 * block.y + Square::group();
    u32 row = panel.first_row / TILE + block.x;
    u32 column = panel.first_column / TILE + across;
    u32 number = number_of_tile(row - kept_from, column, (all_columns + TILE - 1) / TILE, gram);
    bool swept = (!gram || column >= row) && across * TILE < panel.columns;
    return {block.x * TILE, across * TILE, swept, gram && column == row, number};
}

// Calls `visit` with the place of each of a block's tiles of which something is swept: those who copy and those who
// multiply go through the same.
template <typename Visit> __device__ __forceinline__ void for_squares(const Panel &panel, bool gram, Visit visit) {
    u32 down = (panel.rows + Square::BLOCK_ROWS - 1) / Square::BLOCK_ROWS;
    u32 across = (panel.columns + Square::BLOCK_COLUMNS - 1) / Square::BLOCK_COLUMNS;
    for (u32 number = blockIdx.x; number < down * across; number += gridDim.x) {
        uint2 block = place_of_hopper_tile(number, down, across);
        u32 last_column = panel.first_column + block.y * Square::BLOCK_COLUMNS + Square::BLOCK_COLUMNS - 1;
        if (!gram || last_column >= panel.first_row + block.x * Square::BLOCK_ROWS) {
            visit(block);
        }
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Asks for what a block multiplies.
template <typename Ring>
__device__ __forceinline__ void copy_squares(
    Ring &ring, const CUtensorMap &row_map, const CUtensorMap &column_map, const Panel &panel, bool gram, u32 width
) {
    lower_registers<24>();
    if (ring.copies()) {
        for_squares(panel, gram, [&](uint2 block) {
            u32 row = panel.first_row + block.x * Square::BLOCK_ROWS;
            u32 column = panel.first_column + block.y * Square::BLOCK_COLUMNS;
            ring.copy(row_map, column_map, row, column, 0, width);
        });
    }
}
#endif

#endif
#ifdef FORWARD_HOPPER

extern "C" __global__ void __launch_bounds__(384, 1) forward_hopper(
    const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap column_map,
    OPTIONAL const u32 *__restrict__ largest_row, OPTIONAL const u32 *__restrict__ largest_column,
    OPTIONAL const u32 *__restrict__ row_keys, OPTIONAL const u32 *__restrict__ column_keys,
    const float *__restrict__ log_scale, float *__restrict__ partials, u32 rows, u32 columns, u32 first_row,
    u32 first_column, u32 width, u32 all_columns, u32 has_diagonal, i32 diagonal, u32 gram, u32 cosines,
    u32 kept_tiles, u32 kept_from, u32 of_columns, u32 column_partials, u32 quantities
) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ float4 dynamic[];
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    HopperRing<FORMAT, true, true, Square, 4> ring;
    ring.begin(dynamic, row_map, column_map);
    if (ring.is_of_copies()) {
        copy_squares(ring, row_map, column_map, panel, gram != 0, width);
        return;
    }
    raise_registers<240>();
    float scale = exponential(log_scale[0]);
    float *exchange = (float *)ring.rest(dynamic) + Square::group() * 4 * EXCHANGE<Square>;
    for_squares(panel, gram != 0, [&](uint2 block) {
        Square tile;
        ring.multiply(tile, (width + HOPPER_STEP - 1) / HOPPER_STEP);
        Place place = place_of_square(panel, block, all_columns, gram != 0, kept_from);
        if (!place.swept) {
            return;
        }
        make_logits(tile, panel, place.row, place.column, factors_of<FORMAT>(largest_row, largest_column, scale));
        finish_forward(
            tile, panel, place, partials, nullptr, kept_tiles, of_columns != 0, column_partials, quantities,
            cosines && scale <= BOUNDED, scale, exchange
        );
        Square::sync();
    });
#endif
}

#endif
#ifdef BACKWARD_HOPPER

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// As make_gradients, of what rows and columns know in shared memory: found by one thread each, not by all who need it.
__device__ __forceinline__ void make_staged_gradients(
    Square &tile, const float *row_coefficients, const float *column_coefficients, const Panel &panel, u32 row,
    u32 column, bool bounded, float scale, float4 *known
) {
    u32 thread = Square::thread();
    Square::sync();
    Known one = known_of(row_coefficients, panel.first_row + min(row + thread, panel.rows - 1), bounded, scale);
    known[thread] = make_float4(one.exponent, one.weight, one.share, 0.0f);
    one = known_of(column_coefficients, panel.first_column + min(column + thread, panel.columns - 1), bounded, scale);
    known[TILE + thread] = make_float4(one.exponent, one.weight, one.share, 0.0f);
    Square::sync();
    float4 rows[Square::ROWS];
#pragma unroll
    for (int u = 0; u < Square::ROWS; u++) {
        rows[u] = known[Square::row(u)];
    }
    if (bounded) {
#pragma unroll
        for (int v = 0; v < Square::COLUMNS; v++) {
            float4 other = known[TILE + Square::column(v)];
#pragma unroll
            for (int u = 0; u < Square::ROWS; u++) {
                float logit = tile.at(u, v);
                float factor = rows[u].x + other.x;
                float gradient = factor * exponential_of(logit - scale) - (rows[u].z + other.z);
                tile.at(u, v) = logit == NO_ENTRY ? 0.0f : gradient;
            }
        }
        return;
    }
#pragma unroll
    for (int v = 0; v < Square::COLUMNS; v++) {
        float4 other = known[TILE + Square::column(v)];
        Known of_column = {other.x, other.y, other.z};
#pragma unroll
        for (int u = 0; u < Square::ROWS; u++) {
            float logit = tile.at(u, v);
            Known of_row = {rows[u].x, rows[u].y, rows[u].z};
            tile.at(u, v) = logit == NO_ENTRY ? 0.0f : gradient_of(logit, of_row) + gradient_of(logit, of_column);
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1) backward_hopper(
    const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap column_map,
    OPTIONAL const u32 *__restrict__ largest_row, OPTIONAL const u32 *__restrict__ largest_column,
    OPTIONAL const u32 *__restrict__ row_keys, OPTIONAL const u32 *__restrict__ column_keys,
    const float *__restrict__ log_scale, OPTIONAL const float *__restrict__ row_coefficients,
    OPTIONAL const float *__restrict__ column_coefficients, OPTIONAL u32 *__restrict__ largest,
    u16 *__restrict__ gradients, u32 rows, u32 columns, u32 first_row, u32 first_column, u32 width, u32 all_columns,
    u32 has_diagonal, i32 diagonal, u32 gram, u32 cosines, u32 kept_tiles, u32 kept_from, u32 mirror,
    u32 gradient_stride
) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ float4 dynamic[];
    Panel panel = panel_of(rows, columns, first_row, first_column, row_keys, column_keys, has_diagonal, diagonal);
    HopperRing<FORMAT, true, true, Square, 3> ring;
    ring.begin(dynamic, row_map, column_map);
    float to_halves = FORMAT::SCALED ? scale_of_gradients<384>(largest) : 1.0f;
    if (ring.is_of_copies()) {
        copy_squares(ring, row_map, column_map, panel, gram != 0, width);
        return;
    }
    raise_registers<240>();
    float scale = exponential(log_scale[0]);
    char *memory = ring.rest(dynamic) + Square::group() * (TILE * TILE * 2);
    for_squares(panel, gram != 0, [&](uint2 block) {
        Square tile;
        ring.multiply(tile, (width + HOPPER_STEP - 1) / HOPPER_STEP);
        Place place = place_of_square(panel, block, all_columns, gram != 0, kept_from);
        if (!place.swept) {
            return;
        }
        make_logits(tile, panel, place.row, place.column, factors_of<FORMAT>(largest_row, largest_column, scale));
        make_staged_gradients(
            tile, row_coefficients, column_coefficients, panel, place.row, place.column, cosines && scale <= BOUNDED,
            scale, (float4 *)memory
        );
        write_gradients<false, FORMAT>(
            tile, panel, place, gradients, gradient_stride, mirror != 0, to_halves, memory
        );
    });
#endif
}

#endif
#endif
