// Matrix products.
//
//     forward              output (M, N) = activation(factor · op(norms_a · a) · op(norms_b · b) + bias), or added to
//                          output, or of several parts of the inner places, each part's product: output (S, M, N)
//     multiply_halves      the same of matrices of 16-bit values by tensor cores
//     multiply_exact       the same of matrices of two f16 for each value
//     multiply_hopper      the same as multiply_halves by Hopper's warpgroups, without bias and activation: factor · op(a) ·
//                          op(b), or added to output, or each part's product
//     finish               output (M, N) = activation(factor · Σ_S partials + bias), or added to output
//     largest_magnitudes   largest[i] = the bits of the largest magnitude of norms · input in the i-th of 256 shares
//     pack_halves          norms · input in 16 bits, as in shared/tensor_tile.cuh; largest[256] = the largest bits
//
// op(a) is (M, K) and stored so, or as (K, M) with TRANSPOSE_A; op(b) is (K, N), or stored as (N, K) with TRANSPOSE_B.
// Matrices are parts of larger ones: they have a stride from row to row. Norms are one factor for each row as it is
// stored. The activation is that of shared/gelu.cuh; `kept` (M, N) receives its input. The factor is exp(log_scale[0]).
//
// f16 values are scaled by a power of two found from the largest magnitude of their matrix; where it is not given it is
// 1, that of embeddings over their lengths. bf16 values are not scaled.
//
// Launch: a block for each TILE × TILE of the output, in x, and for each part, in y; of `multiply_hopper` as many blocks
// as there are multiprocessors, or as there are tiles of 128 × 256 (128 with NARROW) of all parts, if they are fewer: a
// block has every gridDim.x-th of them, a part is a multiple of 64 inner places, dynamic shared memory is 197,696 bytes
// (197,728 with NARROW) and shared/hopper_tile.cuh says what the tensor maps `a` and `b` are; of `finish`, 1,024 elements a
// block; of `largest_magnitudes` 256 blocks; of `pack_halves` 2,048 values a block, whole rows of `output_stride`.

#include "gelu.cuh"
#include "numerics.cuh"
#include "scales.cuh"
#include "tensor_tile.cuh"
#include "vectors.cuh"

// N values next to each other, read and written at once.
template <int N> struct alignas(4 * N) Run {
    float values[N];
};

// What becomes of a product, and where it goes.
struct Finish {
    float *output;
    size_t output_stride;
    const float *bias;
    float *kept;
    // Both multiply the product, one after the other.
    float2 factors;
    bool gelu;
    bool accumulate;
    u32 rows;
    u32 columns;
};

__device__ __forceinline__ float factor_of(const float *log_scale) {
    return log_scale ? exponential(log_scale[0]) : 1.0f;
}

// Reads a run of which so many values are inside, 0 where they are not, or writes it; at once if that can be.

template <int N> __device__ __forceinline__ Run<N> read_run(const float *from, u32 inside, bool at_once) {
    Run<N> run = {};
    if (at_once && inside >= N) {
        return *(const Run<N> *)from;
    }
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        if (i < inside) {
            run.values[i] = from[i];
        }
    }
    return run;
}

template <int N> __device__ __forceinline__ void write_run(float *to, const Run<N> &run, u32 inside, bool at_once) {
    if (at_once && inside >= N) {
        *(Run<N> *)to = run;
        return;
    }
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        if (i < inside) {
            to[i] = run.values[i];
        }
    }
}

// Whether runs of N of both outputs can be read and written at once.
template <int N> __device__ __forceinline__ bool are_at_once(const Finish &to) {
    return to.output_stride % N == 0 && (!to.kept || to.columns % N == 0) && are_aligned(to.output, to.kept);
}

// What a run of products that begins inside is added to.
template <int N>
__device__ __forceinline__ Run<N> before_run(const Finish &to, u32 row, u32 column, bool at_once) {
    if (!to.accumulate) {
        return {};
    }
    return read_run<N>(to.output + row * to.output_stride + column, to.columns - column, at_once);
}

// Finishes a run of products that begins inside and writes it, added to what was there before.
template <int N>
__device__ __forceinline__ void
finish_run(const Finish &to, Run<N> run, const Run<N> &before, u32 row, u32 column, bool at_once) {
    u32 inside = to.columns - column;
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        float bias = to.bias && i < inside ? __ldg(to.bias + column + i) : 0.0f;
        run.values[i] = run.values[i] * to.factors.x * to.factors.y + bias;
    }
    if (to.kept) {
        write_run(to.kept + (size_t)row * to.columns + column, run, inside, at_once);
    }
    if (to.gelu) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            run.values[i] = gelu(run.values[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        run.values[i] += before.values[i];
    }
    write_run(to.output + row * to.output_stride + column, run, inside, at_once);
}

#ifdef TRANSPOSE_A
[[maybe_unused]] constexpr bool LEFT_BY_LINES = false;
#else
[[maybe_unused]] constexpr bool LEFT_BY_LINES = true;
#endif
#ifdef TRANSPOSE_B
[[maybe_unused]] constexpr bool RIGHT_BY_LINES = true;
#else
[[maybe_unused]] constexpr bool RIGHT_BY_LINES = false;
#endif

#ifdef FORWARD

// Finishes a tile of products from where they are, in registers.
template <typename Tile>
__device__ __forceinline__ void finish_tile(Tile &tile, const Finish &to, u32 first_row, u32 first_column) {
    constexpr int N = Tile::VECTOR;
    bool at_once = are_at_once<N>(to);
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        u32 row = first_row + Tile::row(u);
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v += N) {
            u32 column = first_column + Tile::column(v);
            if (row < to.rows && column < to.columns) {
                Run<N> run;
#pragma unroll
                for (int i = 0; i < N; i++) {
                    run.values[i] = tile.at(u, v + i);
                }
                finish_run(to, run, before_run<N>(to, row, column, at_once), row, column, at_once);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) forward(
    const float *__restrict__ a, const float *__restrict__ b, OPTIONAL const float *__restrict__ norms_a,
    OPTIONAL const float *__restrict__ norms_b, OPTIONAL const float *__restrict__ log_scale,
    OPTIONAL const float *__restrict__ bias, OPTIONAL float *__restrict__ kept, float *__restrict__ output, u32 rows,
    u32 columns, u32 inner, u32 part, u32 a_stride, u32 b_stride, u32 output_stride, OPTIONAL u32 gelu,
    OPTIONAL u32 accumulate
) {
    __shared__ float4 memory[PlainTile<TILE>::MEMORY / 4];
    uint2 place = place_of_tile(blockIdx.x, (rows + TILE - 1) / TILE, (columns + TILE - 1) / TILE);
    u32 first = blockIdx.y * part;
    u32 end = min(first + part, inner);
    PlainTile<TILE> tile;
    tile.multiply<LEFT_BY_LINES, RIGHT_BY_LINES>(
        lines_of(a, a_stride, norms_a, rows), lines_of(b, b_stride, norms_b, columns), place.x * TILE, place.y * TILE,
        first, end, (float *)memory
    );
    // Of several parts the output is this one's product.
    Finish to = {output + (size_t)blockIdx.y * rows * columns, output_stride, bias, kept,
                 make_float2(1.0f, factor_of(log_scale)), gelu != 0, accumulate != 0, rows, columns};
    finish_tile(tile, to, place.x * TILE, place.y * TILE);
}

#endif
#ifdef FINISH

extern "C" __global__ void __launch_bounds__(256, 4) finish(
    const float *__restrict__ partials, OPTIONAL const float *__restrict__ log_scale,
    OPTIONAL const float *__restrict__ bias, OPTIONAL float *__restrict__ kept, float *__restrict__ output, u32 rows,
    u32 columns, u32 parts, u32 output_stride, OPTIONAL u32 gelu,
    OPTIONAL u32 accumulate
) {
    Finish to = {output, output_stride, bias, kept, make_float2(1.0f, factor_of(log_scale)),
                 gelu != 0, accumulate != 0, rows, columns};
    size_t size = (size_t)rows * columns;
    size_t first = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (first >= size) {
        return;
    }
    // Runs that are read at once are of one row.
    if (have_fours(columns, partials)) {
        bool at_once = are_at_once<4>(to);
        Run<4> total = *(const Run<4> *)(partials + first);
        for (u32 part = 1; part < parts; part++) {
            Run<4> one = *(const Run<4> *)(partials + part * size + first);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total.values[i] += one.values[i];
            }
        }
        u32 row = first / columns;
        u32 column = first % columns;
        finish_run(to, total, before_run<4>(to, row, column, at_once), row, column, at_once);
        return;
    }
    for (size_t i = first; i < min(first + 4, size); i++) {
        Run<1> total = {partials[i]};
        for (u32 part = 1; part < parts; part++) {
            total.values[0] += partials[part * size + i];
        }
        u32 row = i / columns;
        u32 column = i % columns;
        finish_run(to, total, before_run<1>(to, row, column, true), row, column, true);
    }
}

#endif
#if (defined(MULTIPLY_HALVES) || defined(MULTIPLY_EXACT)) && __CUDA_ARCH__ >= 800

// Finishes a tile of products by way of shared memory, TILE × TILE floats: a thread has few at a time, and threads
// beside each other write rows. Against conflicts of memory banks, eight columns next to each other are put elsewhere in
// each of four rows.
template <typename Tile>
__device__ __forceinline__ void
finish_tile(Tile &tile, const Finish &to, u32 first_row, u32 first_column, float *memory) {
    auto place = [](u32 row, u32 column) { return row * TILE + (column ^ row % 4 * 8); };
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
#pragma unroll
        for (int v = 0; v < Tile::COLUMNS; v += 2) {
            float2 two = make_float2(tile.at(u, v), tile.at(u, v + 1));
            *(float2 *)(memory + place(Tile::row(u), Tile::column(v))) = two;
        }
    }
    __syncthreads();
    bool at_once = are_at_once<4>(to);
    // Runs that a thread reads before it writes any: what they are added to takes long.
    constexpr u32 BATCH = 1024 / Tile::THREADS;
#pragma unroll 1
    for (u32 first = threadIdx.x; first < TILE * TILE / 4; first += BATCH * Tile::THREADS) {
        Run<4> before[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            u32 row = first_row + (first + i * Tile::THREADS) / (TILE / 4);
            u32 column = first_column + (first + i * Tile::THREADS) % (TILE / 4) * 4;
            before[i] = {};
            if (row < to.rows && column < to.columns) {
                before[i] = before_run<4>(to, row, column, at_once);
            }
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            u32 row = (first + i * Tile::THREADS) / (TILE / 4);
            u32 column = (first + i * Tile::THREADS) % (TILE / 4) * 4;
            if (first_row + row < to.rows && first_column + column < to.columns) {
                Run<4> run = *(const Run<4> *)(memory + place(row, column));
                finish_run(to, run, before[i], first_row + row, first_column + column, at_once);
            }
        }
    }
}

// Multiplies a tile of a part of the inner places. A matrix of f16 without its largest magnitude has a 1 there.
template <typename Tile, bool SCALED>
__device__ __forceinline__ void multiply_tile(
    const HalfLines &left, const HalfLines &right, const u32 *largest_a, const u32 *largest_b, Finish to, u32 inner,
    u32 part
) {
    extern __shared__ float4 dynamic[];
    uint2 place = place_of_tile(blockIdx.x, (to.rows + TILE - 1) / TILE, (to.columns + TILE - 1) / TILE);
    u32 first = blockIdx.y * part;
    Tile tile;
    tile.template multiply<LEFT_BY_LINES, RIGHT_BY_LINES>(
        left, right, place.x * TILE, place.y * TILE, first, min(first + part, inner), (char *)dynamic
    );
    if (SCALED) {
        to.factors.x = 1.0f / scale_of(largest_a ? __ldg(largest_a) : BITS_OF_ONE);
        to.factors.y /= scale_of(largest_b ? __ldg(largest_b) : BITS_OF_ONE);
    }
    finish_tile(tile, to, place.x * TILE, place.y * TILE, (float *)dynamic);
}

#endif
#ifdef MULTIPLY_HALVES

#ifdef BF16
#define FORMAT Bf16
#else
#define FORMAT F16
#endif

extern "C" __global__ void __launch_bounds__(128, 2) multiply_halves(
    const u16 *__restrict__ a, const u16 *__restrict__ b, OPTIONAL const u32 *__restrict__ largest_a,
    OPTIONAL const u32 *__restrict__ largest_b, OPTIONAL const float *__restrict__ log_scale,
    OPTIONAL const float *__restrict__ bias, OPTIONAL float *__restrict__ kept, float *__restrict__ output, u32 rows,
    u32 columns, u32 inner, u32 part, u32 a_stride, u32 b_stride, u32 output_stride, OPTIONAL u32 gelu,
    OPTIONAL u32 accumulate
) {
#if __CUDA_ARCH__ >= 800
    HalfLines left = {a, nullptr, a_stride, rows};
    HalfLines right = {b, nullptr, b_stride, columns};
    Finish to = {output + (size_t)blockIdx.y * rows * columns, output_stride, bias, kept,
                 make_float2(1.0f, factor_of(log_scale)), gelu != 0, accumulate != 0, rows, columns};
    multiply_tile<TensorTile<TILE, false, FORMAT>, FORMAT::SCALED>(left, right, largest_a, largest_b, to, inner, part);
#endif
}

#endif
#ifdef MULTIPLY_HOPPER

#include "hopper_tile.cuh"

#ifdef BF16
#define FORMAT Bf16
#else
#define FORMAT F16
#endif
// Narrow tiles are for few columns, or few tiles.
#ifdef NARROW
typedef GroupTile<64, 128> Tile;
#else
typedef GroupTile<64, 256> Tile;
#endif
[[maybe_unused]] constexpr int STAGES = Tile::BLOCK_COLUMNS == 256 ? 4 : 6;

// Writes a group's products. Places are said from the thread's first one on, so that they are numbers in the
// instructions: as sums for each place, they would stay in registers from tile to tile.
__device__ __forceinline__ void write_products(
    Tile &tile, float *output, u32 stride, u32 rows, u32 columns, u32 first_row, u32 first_column, float2 factors,
    bool accumulate
) {
    // Of values that are read before they are written many are asked for at once: one after the other, each would be
    // waited for.
    constexpr int AT_ONCE = 32;
    bool whole = first_row + Tile::HEIGHT <= rows && first_column + Tile::WIDTH <= columns;
    bool twos = stride % 2 == 0 && ((size_t)output & 7) == 0;
    first_row += Tile::row(0);
    first_column += Tile::column(0);
    i32 rows_left = (i32)(rows - first_row);
    i32 columns_left = (i32)(columns - first_column);
#pragma unroll
    for (int u = 0; u < Tile::ROWS; u++) {
        float *row = output + (size_t)(first_row + Tile::down(u)) * stride + first_column;
        if (whole && twos) {
#pragma unroll
            for (int part = 0; part < Tile::COLUMNS; part += AT_ONCE) {
                float2 old[AT_ONCE / 2];
#pragma unroll
                for (int v = 0; v < AT_ONCE; v += 2) {
                    old[v / 2] = accumulate ? *(float2 *)(row + Tile::right(part + v)) : make_float2(0.0f, 0.0f);
                }
#pragma unroll
                for (int v = 0; v < AT_ONCE; v += 2) {
                    *(float2 *)(row + Tile::right(part + v)) = make_float2(
                        factors.y * (factors.x * tile.at(u, part + v)) + old[v / 2].x, factors.y * (factors.x * tile.at(u, part + v + 1)) + old[v / 2].y
                    );
                }
            }
        } else if ((i32)Tile::down(u) < rows_left) {
#pragma unroll
            for (int v = 0; v < Tile::COLUMNS; v++) {
                if ((i32)Tile::right(v) < columns_left) {
                    float *to = row + Tile::right(v);
                    *to = factors.y * (factors.x * tile.at(u, v)) + (accumulate ? *to : 0.0f);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) multiply_hopper(
    const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
    OPTIONAL const u32 *__restrict__ largest_a, OPTIONAL const u32 *__restrict__ largest_b,
    OPTIONAL const float *__restrict__ log_scale, float *__restrict__ output, u32 rows, u32 columns, u32 inner,
    u32 part, u32 output_stride, OPTIONAL u32 accumulate
) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ float4 dynamic[];
    u32 down = (rows + Tile::BLOCK_ROWS - 1) / Tile::BLOCK_ROWS;
    u32 across = (columns + Tile::BLOCK_COLUMNS - 1) / Tile::BLOCK_COLUMNS;
    u32 parts = max(1u, (inner + part - 1) / part);
    u32 tiles = down * across;
    HopperRing<FORMAT, LEFT_BY_LINES, RIGHT_BY_LINES, Tile, STAGES> ring;
    ring.begin(dynamic, a, b);
    if (ring.is_of_copies()) {
        lower_registers<24>();
        if (ring.copies()) {
            for (u32 number = blockIdx.x; number < parts * tiles; number += gridDim.x) {
                uint2 place = place_of_hopper_tile(number % tiles, down, across);
                u32 first = number / tiles * part;
                u32 end = min(first + part, inner);
                ring.copy(a, b, place.x * Tile::BLOCK_ROWS, place.y * Tile::BLOCK_COLUMNS, first, end);
            }
        }
    } else {
        raise_registers<240>();
        float2 factors = make_float2(1.0f, factor_of(log_scale));
        if (FORMAT::SCALED) {
            factors.x = 1.0f / scale_of(largest_a ? __ldg(largest_a) : BITS_OF_ONE);
            factors.y /= scale_of(largest_b ? __ldg(largest_b) : BITS_OF_ONE);
        }
        for (u32 number = blockIdx.x; number < parts * tiles; number += gridDim.x) {
            // Of this tile only, so that sums of the one before are not kept for it.
            Tile tile;
            uint2 place = place_of_hopper_tile(number % tiles, down, across);
            u32 first = number / tiles * part;
            u32 end = min(first + part, inner);
            ring.multiply(tile, (end - first + HOPPER_STEP - 1) / HOPPER_STEP);
            write_products(
                tile, output + (size_t)(number / tiles) * rows * columns, output_stride, rows, columns,
                place.x * Tile::BLOCK_ROWS + Tile::first_row(),
                place.y * Tile::BLOCK_COLUMNS + Tile::first_column(), factors, accumulate != 0
            );
        }
    }
#endif
}

#endif
#ifdef MULTIPLY_EXACT

extern "C" __global__ void __launch_bounds__(256, 1) multiply_exact(
    const u16 *__restrict__ a, const u16 *__restrict__ low_a, const u16 *__restrict__ b,
    const u16 *__restrict__ low_b, OPTIONAL const u32 *__restrict__ largest_a,
    OPTIONAL const u32 *__restrict__ largest_b, OPTIONAL const float *__restrict__ log_scale,
    OPTIONAL const float *__restrict__ bias, OPTIONAL float *__restrict__ kept, float *__restrict__ output, u32 rows,
    u32 columns, u32 inner, u32 part, u32 a_stride, u32 b_stride, u32 output_stride, OPTIONAL u32 gelu,
    OPTIONAL u32 accumulate
) {
#if __CUDA_ARCH__ >= 800
    HalfLines left = {a, low_a, a_stride, rows};
    HalfLines right = {b, low_b, b_stride, columns};
    Finish to = {output + (size_t)blockIdx.y * rows * columns, output_stride, bias, kept,
                 make_float2(1.0f, factor_of(log_scale)), gelu != 0, accumulate != 0, rows, columns};
    multiply_tile<TensorTile<TILE, true, F16>, true>(left, right, largest_a, largest_b, to, inner, part);
#endif
}

#endif
// Shares of a matrix that are searched for its largest magnitude.
[[maybe_unused]] constexpr u32 SHARES = 256;

// The largest of the bits that a block's threads have: the order of bits is that of magnitudes.
__device__ __forceinline__ u32 largest_of_block(u32 bits) {
    __shared__ u32 of_warps[8];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        bits = max(bits, __shfl_xor_sync(WHOLE_WARP, bits, step));
    }
    if (threadIdx.x % WARP == 0) {
        of_warps[threadIdx.x / WARP] = bits;
    }
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < 8; warp++) {
        bits = max(bits, of_warps[warp]);
    }
    return bits;
}

__device__ __forceinline__ u32 magnitude_bits(float value) {
    return __float_as_uint(value) & 0x7fffffffu;
}

#ifdef LARGEST_MAGNITUDES

extern "C" __global__ void __launch_bounds__(256) largest_magnitudes(
    const float *__restrict__ input, OPTIONAL const float *__restrict__ norms, u32 *__restrict__ largest, u32 rows,
    u32 columns, u32 input_stride
) {
    // Threads beside each other have a row, if it is short several rows.
    bool fours = input_stride % 4 == 0 && have_fours(columns, input);
    u32 runs = fours ? columns / 4 : columns;
    u32 across = 256;
    while (across > 1 && across / 2 >= runs) {
        across /= 2;
    }
    u32 down = 256 / across;
    u32 bits = 0;
    for (u32 row = blockIdx.x * down + threadIdx.x / across; row < rows; row += SHARES * down) {
        const float *values = input + (size_t)row * input_stride;
        float norm = norms ? __ldg(norms + row) : 1.0f;
        for (u32 i = threadIdx.x % across; i < runs; i += across) {
            if (fours) {
                float4 four = __ldg((const float4 *)values + i);
                u32 low = max(magnitude_bits(norm * four.x), magnitude_bits(norm * four.y));
                u32 high = max(magnitude_bits(norm * four.z), magnitude_bits(norm * four.w));
                bits = max(bits, max(low, high));
            } else {
                bits = max(bits, magnitude_bits(norm * __ldg(values + i)));
            }
        }
    }
    bits = largest_of_block(bits);
    if (threadIdx.x == 0) {
        largest[blockIdx.x] = bits;
    }
}

#endif
#ifdef PACK_HALVES

extern "C" __global__ void __launch_bounds__(256) pack_halves(
    const float *__restrict__ input, OPTIONAL const float *__restrict__ norms, OPTIONAL u32 *__restrict__ largest,
    u16 *__restrict__ high, OPTIONAL u16 *__restrict__ low, u32 rows, u32 columns, u32 input_stride, u32 output_stride,
    u32 bf16
) {
    float scale = bf16 ? 1.0f : scale_of(BITS_OF_ONE);
    if (largest) {
        u32 bits = largest_of_block(largest[threadIdx.x]);
        scale = scale_of(bits);
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            largest[SHARES] = bits;
        }
    }
    u32 pieces = output_stride / 8;
    u32 i = blockIdx.x * 256 + threadIdx.x;
    u32 row = i / pieces;
    u32 column = i % pieces * 8;
    if (row >= rows) {
        return;
    }
    const float *from = input + (size_t)row * input_stride + column;
    float values[8];
    if (column + 8 <= columns && input_stride % 4 == 0 && are_aligned(input)) {
        *(float4 *)values = __ldg((const float4 *)from);
        *(float4 *)(values + 4) = __ldg((const float4 *)from + 1);
    } else {
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            values[j] = column + j < columns ? __ldg(from + j) : 0.0f;
        }
    }
    if (norms) {
        float norm = __ldg(norms + row);
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            values[j] *= norm;
        }
    }
    u32 pairs[4];
    u32 low_pairs[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        float2 two = make_float2(scale * values[2 * j], scale * values[2 * j + 1]);
        pairs[j] = bf16 ? bf16x2_of(two.x, two.y) : f16x2_of(two.x, two.y);
        low_pairs[j] = low_f16x2_of(two, pairs[j]);
    }
    size_t place = (size_t)row * output_stride + column;
    *(uint4 *)(high + place) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    if (low) {
        *(uint4 *)(low + place) = make_uint4(low_pairs[0], low_pairs[1], low_pairs[2], low_pairs[3]);
    }
}

#endif
