// Softmax attention of packed sequences (arXiv 1706.03762, eq. 1), each sequence over itself, and its gradients,
// without a matrix of length × length: scores are computed a tile of 64 × 64 at a time (arXiv 2205.14135). With σ the
// scale and f what dropout multiplies with:
//
//     P = softmax(σ · Q · Kᵀ) ;  D = P ∘ (f ∘ (dO · Vᵀ) − along)  with  along[row] = O[row] · dO[row]
//     forward         O  = (f ∘ P) · V, and the log-sum-exp of each row of scores
//     query_gradient  dQ = σ · D · K
//     key_gradient    dK = σ · Dᵀ · Q
//     value_gradient  dV = (f ∘ P)ᵀ · dO
//
//     projections (T, 3·C): query, key and value of each row; output (T, C), or (T, 3·C) for gradients;
//     upstream (T, C); log_sum_exp and along (T, heads);
//     offsets (sequences + 1): where each sequence begins, and the end of the last
//
// All four are a sum over tiles of 64 rows: tile of weights times rows of a matrix. The rows that a block sums for are
// its own rows, queries or keys; those it sums over are the other ones.
//
// Launch: a row of blocks of 128 threads: `blocks` of them times heads times sequences, `blocks` the number of 32 rows
// in the longest sequence. A block has 64 rows, so only every other one has work, and fewer where lengths differ. A
// launch has the sequences that begin in its `owned_rows` rows from `first_row` on; `count` rows are bound.
//
// A warp has 16 own rows, and leaves out what its rows or the other ones do not need: it shares tiles with the other
// warps, but not its weights. A half of it, 16 lanes, has every second of these rows, so a lane has 8 of them. Of
// scores it has every sixteenth column, of sums 4 columns side by side of each 64 (2 if the head is only 32 wide).
//
// HEAD is the width of a head, rounded up to a power of two from 32 on; columns that are not there count as 0. With
// `vectors` the width of a head is a multiple of 4, and values are read and written four at a time.

#include "dropout.cuh"
#include "numerics.cuh"
#include "reduce.cuh"

constexpr u32 THREADS = 128;
// Blocks that a multiprocessor should have registers for.
constexpr u32 BLOCKS = HEAD <= 64 ? 3 : 2;
// Rows of a tile, and rows that the host counts blocks in.
constexpr u32 TILE = 64;
constexpr u32 HOST_BLOCK = 32;
// Columns of a head that are in shared memory at a time, and how many times these are all.
constexpr u32 SLICE = HEAD < 64 ? HEAD : 64;
constexpr u32 SLICES = HEAD / SLICE;
// A row of a tile, in fours of columns: an odd number, so the same column of 8 rows is in different banks.
constexpr u32 LINE = SLICE / 4 + 1;
// Own rows and other rows of a lane, and columns of its sums in a slice.
constexpr u32 ROWS = 8;
constexpr u32 COLUMNS = 4;
constexpr u32 WIDTH = SLICE / 16;
// Other rows whose weights are in shared memory at a time; the weights of a row and of a half-warp, in fours: the
// halves of a warp begin 16 banks apart.
constexpr u32 HALF = 32;
constexpr u32 WEIGHTS_LINE = HALF / 4 + 1;
constexpr u32 WEIGHTS = ROWS * WEIGHTS_LINE + 4;
// Fours of columns of a slice.
constexpr u32 ROW_FOURS = SLICE / 4;

typedef float Scores[ROWS][COLUMNS];
typedef float Sums[SLICES][ROWS][WIDTH];

// Where this thread stands: in its warp's 16 own rows it has the rows half, half + 2, …
__device__ __forceinline__ u32 lane_of_half() {
    return threadIdx.x % 16;
}

__device__ __forceinline__ u32 half_of_warp() {
    return threadIdx.x / 16 % 2;
}

__device__ __forceinline__ u32 first_of_warp() {
    return threadIdx.x / WARP * 16;
}

// This thread's own row i, counted from the first of the block.
__device__ __forceinline__ u32 own_row(u32 i) {
    return first_of_warp() + 2 * i + half_of_warp();
}

// What a block works on. Rows are counted from the first of the sequence on.
struct Task {
    // The first row of the sequence among those that are bound.
    u32 first;
    u32 length;
    u32 head;
    // The first of the own rows.
    u32 own;
};

__device__ __forceinline__ Task task_of_block(
    const u32 *offsets, u32 blocks, u32 heads, u32 first_row, u32 owned_rows, u32 count
) {
    const u32 group = blockIdx.x;
    const u32 sequence = group / (blocks * heads);
    const u32 block = group % blocks;
    const u32 first = offsets[sequence] - first_row;
    if (first >= owned_rows || block % (TILE / HOST_BLOCK) != 0) {
        return Task{0, 0, 0, 0};
    }
    const u32 end = max(first, min(offsets[sequence + 1] - first_row, count));
    return Task{first, end - first, group / blocks % heads, block * HOST_BLOCK};
}

// The rows of one head of one sequence: `from` is the first value of the first row.
template <class T> struct Matrix {
    T *from;
    u32 stride;
    u32 length;
    u32 head_width;
    bool vectors;
};

typedef Matrix<const float> Input;
typedef Matrix<float> Output;

// Of four columns of a row, of which so many are there, 0 for those that are not.
__device__ __forceinline__ float4 four_of(const float *from, u32 there, bool vectors) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (there > 0) {
        if (vectors) {
            four = *reinterpret_cast<const float4 *>(from);
        } else {
            four.x = from[0];
            four.y = there > 1 ? from[1] : 0.0f;
            four.z = there > 2 ? from[2] : 0.0f;
            four.w = there > 3 ? from[3] : 0.0f;
        }
    }
    return four;
}

// Brings a slice of 64 rows to shared memory; 0 beyond the sequence or the head.
__device__ __forceinline__ void copy(float4 *tile, const Input &matrix, u32 first, u32 slice) {
    const u32 row = threadIdx.x / ROW_FOURS;
    const u32 four = threadIdx.x % ROW_FOURS;
    const u32 column = slice * SLICE + four * 4;
    const u32 there = column < matrix.head_width ? matrix.head_width - column : 0;
    const float *from = matrix.from + size_t(first + row) * matrix.stride + column;
    float4 *to = tile + row * LINE + four;
    constexpr u32 STEP = THREADS / ROW_FOURS;
    // The widest heads leave few registers for values under way.
    constexpr u32 AT_ONCE = HEAD > 128 ? 2 : TILE / STEP;
#pragma unroll AT_ONCE
    for (u32 i = 0; i < TILE; i += STEP) {
        const bool is_row = first + row + i < matrix.length;
        to[i * LINE] = four_of(from + size_t(i) * matrix.stride, is_row ? there : 0, matrix.vectors);
    }
}

// Adds to scores the products of own rows and of the first 16·N other rows, a slice of them.
template <u32 N>
__device__ __forceinline__ void add_products_of(Scores &scores, const float4 *own_tile, const float4 *other_tile) {
    const float4 *own = own_tile + own_row(0) * LINE;
    const float4 *other = other_tile + lane_of_half() * LINE;
#pragma unroll 1
    for (u32 k = 0; k < SLICE / 4; k++) {
        float4 b[N];
#pragma unroll
        for (u32 j = 0; j < N; j++) {
            b[j] = other[16 * j * LINE + k];
        }
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            const float4 a = own[2 * i * LINE + k];
#pragma unroll
            for (u32 j = 0; j < N; j++) {
                scores[i][j] = fmaf(a.x, b[j].x, scores[i][j]);
            }
#pragma unroll
            for (u32 j = 0; j < N; j++) {
                scores[i][j] = fmaf(a.y, b[j].y, scores[i][j]);
            }
#pragma unroll
            for (u32 j = 0; j < N; j++) {
                scores[i][j] = fmaf(a.z, b[j].z, scores[i][j]);
            }
#pragma unroll
            for (u32 j = 0; j < N; j++) {
                scores[i][j] = fmaf(a.w, b[j].w, scores[i][j]);
            }
        }
    }
}

// Of the other rows there are so many left.
__device__ __forceinline__ void add_products(
    Scores &scores, const float4 *own_tile, const float4 *other_tile, u32 left
) {
    if (left > HALF) {
        add_products_of<4>(scores, own_tile, other_tile);
    } else {
        add_products_of<2>(scores, own_tile, other_tile);
    }
}

__device__ __forceinline__ void clear(Scores &scores) {
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) {
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j++) {
            scores[i][j] = 0.0f;
        }
    }
}

__device__ __forceinline__ void clear(Sums &sums) {
#pragma unroll
    for (u32 slice = 0; slice < SLICES; slice++) {
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
#pragma unroll
            for (u32 c = 0; c < WIDTH; c++) {
                sums[slice][i][c] = 0.0f;
            }
        }
    }
}

// Adds weights times other rows, of which so many are left, to the sums of a slice. Only this half-warp's threads touch
// its part of `weights`.
__device__ __forceinline__ void add_weighted(
    float (&sums)[ROWS][WIDTH], const Scores &scores, float4 *weights, const float4 *other_tile, u32 left
) {
    float4 *of_half = weights + threadIdx.x / 16 * WEIGHTS;
    float *single = reinterpret_cast<float *>(of_half) + lane_of_half();
    const float *values = reinterpret_cast<const float *>(other_tile) + lane_of_half() * WIDTH;
#pragma unroll
    for (u32 half = 0; half < TILE / HALF; half++) {
        if (half * HALF < left) {
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                single[i * WEIGHTS_LINE * 4] = scores[i][2 * half];
                single[i * WEIGHTS_LINE * 4 + 16] = scores[i][2 * half + 1];
            }
            __syncwarp();
#pragma unroll 1
            for (u32 k = 0; k < HALF / 4; k++) {
                float v[4][WIDTH];
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const float *row = values + (half * HALF + 4 * k + j) * LINE * 4;
                    if constexpr (WIDTH == 4) {
                        const float4 four = *reinterpret_cast<const float4 *>(row);
                        v[j][0] = four.x;
                        v[j][1] = four.y;
                        v[j][2] = four.z;
                        v[j][3] = four.w;
                    } else {
                        const float2 two = *reinterpret_cast<const float2 *>(row);
                        v[j][0] = two.x;
                        v[j][1] = two.y;
                    }
                }
#pragma unroll
                for (u32 i = 0; i < ROWS; i++) {
                    const float4 weight = of_half[i * WEIGHTS_LINE + k];
#pragma unroll
                    for (u32 c = 0; c < WIDTH; c++) {
                        sums[i][c] = fmaf(weight.x, v[0][c], sums[i][c]);
                    }
#pragma unroll
                    for (u32 c = 0; c < WIDTH; c++) {
                        sums[i][c] = fmaf(weight.y, v[1][c], sums[i][c]);
                    }
#pragma unroll
                    for (u32 c = 0; c < WIDTH; c++) {
                        sums[i][c] = fmaf(weight.z, v[2][c], sums[i][c]);
                    }
#pragma unroll
                    for (u32 c = 0; c < WIDTH; c++) {
                        sums[i][c] = fmaf(weight.w, v[3][c], sums[i][c]);
                    }
                }
            }
        }
    }
}

// Writes the sums of the own rows, times a factor for each.
__device__ __forceinline__ void store_sums(
    const Sums &sums, const float (&factors)[ROWS], const Output &matrix, u32 own
) {
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) {
        const u32 row = own + own_row(i);
        if (row < matrix.length) {
            float *to = matrix.from + size_t(row) * matrix.stride;
#pragma unroll
            for (u32 slice = 0; slice < SLICES; slice++) {
                const u32 column = slice * SLICE + lane_of_half() * WIDTH;
                float values[WIDTH];
#pragma unroll
                for (u32 c = 0; c < WIDTH; c++) {
                    values[c] = sums[slice][i][c] * factors[i];
                }
                if (!matrix.vectors) {
#pragma unroll
                    for (u32 c = 0; c < WIDTH; c++) {
                        if (column + c < matrix.head_width) {
                            to[column + c] = values[c];
                        }
                    }
                } else if (column < matrix.head_width) {
                    if constexpr (WIDTH == 4) {
                        *reinterpret_cast<float4 *>(to + column) =
                            make_float4(values[0], values[1], values[2], values[3]);
                    } else {
                        *reinterpret_cast<float2 *>(to + column) = make_float2(values[0], values[1]);
                    }
                }
            }
        }
    }
}

// Which keys are dropped of a tile of 64 queries × 64 keys, a bit each: 8 of them in a byte, from one set of random
// words. `query` is the first query's row among those that are bound, `key` the first key, a multiple of 64.
struct Mask {
    u64 of_queries[TILE];
};

__device__ __forceinline__ void draw(Mask &mask, const Dropout &dropout, u32 head, u32 query, u32 key) {
    u8 *bytes = reinterpret_cast<u8 *>(mask.of_queries);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < TILE * 8; i += THREADS) {
        const uint4 words = dropout_words(dropout, query + i / 8, head * 8192 + key / 8 + i % 8);
        const u32 each[4] = {words.x, words.y, words.z, words.w};
        u32 dropped = 0;
#pragma unroll
        for (u32 w = 0; w < 4; w++) {
            dropped |= u32((each[w] & 0xffffu) < dropout.threshold) << (2 * w);
            dropped |= u32((each[w] >> 16) < dropout.threshold) << (2 * w + 1);
        }
        bytes[i] = u8(dropped);
    }
}

// Multiplies scores by the factors of dropout: own rows are queries, or else keys.
template <bool OWN_ARE_QUERIES>
__device__ __forceinline__ void drop(Scores &scores, const Mask &mask, float scale) {
    if constexpr (OWN_ARE_QUERIES) {
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            const u64 bits = mask.of_queries[own_row(i)] >> lane_of_half();
#pragma unroll
            for (u32 j = 0; j < COLUMNS; j++) {
                scores[i][j] *= bits >> (16 * j) & 1 ? 0.0f : scale;
            }
        }
    } else {
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j++) {
            const u32 bits = u32(mask.of_queries[lane_of_half() + 16 * j] >> own_row(0));
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                scores[i][j] *= bits >> (2 * i) & 1 ? 0.0f : scale;
            }
        }
    }
}

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(128, BLOCKS) forward(
    const u32 *__restrict__ offsets, const float *__restrict__ projections, float *__restrict__ output,
    OPTIONAL float *__restrict__ log_sum_exp, u32 blocks, u32 heads, u32 head_width, u32 width, u32 first_row,
    u32 owned_rows, u32 count, OPTIONAL u32 vectors, float scale, OPTIONAL u32 dropout, OPTIONAL u32 dropout_row,
    OPTIONAL u32 dropout_site, OPTIONAL u32 dropout_step, OPTIONAL u32 dropout_key_low, OPTIONAL u32 dropout_key_high,
    OPTIONAL u32 dropout_threshold, OPTIONAL float dropout_scale
) {
    const Task here = task_of_block(offsets, blocks, heads, first_row, owned_rows, count);
    if (here.own >= here.length) {
        return;
    }
    __shared__ float4 own_tile[TILE * LINE];
    __shared__ float4 other_tile[TILE * LINE];
    __shared__ float4 weights[THREADS / 16 * WEIGHTS];
    __shared__ Mask mask;
    const Dropout dropped{
        dropout_row, dropout_site, dropout_step, dropout_key_low, dropout_key_high, dropout_threshold, dropout_scale
    };
    const float *first = projections + size_t(here.first) * 3 * width + size_t(here.head) * head_width;
    const Input queries{first, 3 * width, here.length, head_width, vectors != 0};
    const Input keys{first + width, 3 * width, here.length, head_width, vectors != 0};
    const Input values{first + 2 * size_t(width), 3 * width, here.length, head_width, vectors != 0};
    const bool works = here.own + first_of_warp() < here.length;

    // The online softmax (arXiv 1805.02867); totals are of the keys of this lane only.
    float largest[ROWS];
    float total[ROWS];
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) {
        largest[i] = NO_ENTRY;
        total[i] = 0.0f;
    }
    Sums sums;
    clear(sums);
    for (u32 other = 0; other < here.length; other += TILE) {
        const u32 left = here.length - other;
        Scores scores;
        clear(scores);
#pragma unroll 1
        for (u32 slice = 0; slice < SLICES; slice++) {
            __syncthreads();
            // The queries of heads that are one slice stay there.
            if (SLICES > 1 || other == 0) {
                copy(own_tile, queries, here.own, slice);
            }
            copy(other_tile, keys, other, slice);
            if (dropout != 0 && slice == 0) {
                draw(mask, dropped, here.head, here.first + here.own, other);
            }
            __syncthreads();
            if (works) {
                add_products(scores, own_tile, other_tile, left);
            }
        }
        if (works) {
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                float reference = largest[i];
#pragma unroll
                for (u32 j = 0; j < COLUMNS; j++) {
                    scores[i][j] = lane_of_half() + 16 * j < left ? scale * scores[i][j] : NO_ENTRY;
                    reference = fmaxf(reference, scores[i][j]);
                }
                reference = warp_max<16>(reference);
                const float correction = expf(largest[i] - reference);
                largest[i] = reference;
                total[i] *= correction;
#pragma unroll
                for (u32 j = 0; j < COLUMNS; j++) {
                    scores[i][j] = expf(scores[i][j] - reference);
                    total[i] += scores[i][j];
                }
#pragma unroll
                for (u32 slice = 0; slice < SLICES; slice++) {
#pragma unroll
                    for (u32 c = 0; c < WIDTH; c++) {
                        sums[slice][i][c] *= correction;
                    }
                }
            }
            if (dropout != 0) {
                drop<true>(scores, mask, dropout_scale);
            }
        }
#pragma unroll
        for (u32 slice = 0; slice < SLICES; slice++) {
            __syncthreads();
            copy(other_tile, values, other, slice);
            __syncthreads();
            if (works) {
                add_weighted(sums[slice], scores, weights, other_tile, left);
            }
        }
    }
    if (works) {
        float factors[ROWS];
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            total[i] = warp_sum<16>(total[i]);
            factors[i] = 1.0f / total[i];
        }
        const size_t at = size_t(here.first) * width + size_t(here.head) * head_width;
        store_sums(sums, factors, Output{output + at, width, here.length, head_width, vectors != 0}, here.own);
        if (log_sum_exp && lane_of_half() == 0) {
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                const u32 query = here.own + own_row(i);
                if (query < here.length) {
                    log_sum_exp[size_t(first_row + here.first + query) * heads + here.head] =
                        largest[i] + logf(total[i]);
                }
            }
        }
    }
}
#endif

#ifndef FORWARD
// Where the rows of a block begin in the matrices that gradients are made of.
struct Inputs {
    Input queries;
    Input keys;
    Input values;
    Input upstream;
};

__device__ __forceinline__ Inputs inputs_of(
    const Task &here, const float *projections, const float *upstream, u32 width, u32 head_width, bool vectors
) {
    const size_t column = size_t(here.head) * head_width;
    const float *row = projections + size_t(here.first) * 3 * width + column;
    return Inputs{
        Input{row, 3 * width, here.length, head_width, vectors},
        Input{row + width, 3 * width, here.length, head_width, vectors},
        Input{row + 2 * size_t(width), 3 * width, here.length, head_width, vectors},
        Input{upstream + size_t(here.first) * width + column, width, here.length, head_width, vectors},
    };
}

// The gradients of queries, keys or values: matrix 0, 1 or 2.
__device__ __forceinline__ Output output_of(
    const Task &here, float *output, u32 matrix, u32 width, u32 head_width, bool vectors
) {
    float *row = output + (size_t(here.first) * 3 + matrix) * width + size_t(here.head) * head_width;
    return Output{row, 3 * width, here.length, head_width, vectors};
}

// Of 64 queries, from one on, a number each; 0 beyond the sequence. `from` is that of the sequence's first.
__device__ __forceinline__ void copy_numbers(float *to, const float *from, u32 first, u32 length, u32 heads) {
    if (threadIdx.x < TILE) {
        const u32 query = first + threadIdx.x;
        to[threadIdx.x] = query < length ? from[size_t(query) * heads] : 0.0f;
    }
}

// The products of own rows of one matrix and other rows of another, of which so many are left. If heads are one slice,
// the tiles hold these rows afterwards; if `stays`, they have the own ones already.
template <class With>
__device__ __forceinline__ void products(
    Scores &scores, float4 *own_tile, float4 *other_tile, const Input &own_matrix, const Input &other_matrix, u32 own,
    u32 other, bool works, bool stays, With with
) {
    clear(scores);
#pragma unroll 1
    for (u32 slice = 0; slice < SLICES; slice++) {
        __syncthreads();
        if (SLICES > 1 || !stays) {
            copy(own_tile, own_matrix, own, slice);
        }
        copy(other_tile, other_matrix, other, slice);
        if (slice == 0) {
            with();
        }
        __syncthreads();
        if (works) {
            add_products(scores, own_tile, other_tile, own_matrix.length - other);
        }
    }
}

// Adds weights times other rows to the sums. If heads are one slice and `stays`, the tile has these rows already.
__device__ __forceinline__ void add_rows(
    Sums &sums, const Scores &scores, float4 *weights, float4 *other_tile, const Input &matrix, u32 other, bool works,
    bool stays
) {
#pragma unroll
    for (u32 slice = 0; slice < SLICES; slice++) {
        if (SLICES > 1 || !stays) {
            __syncthreads();
            copy(other_tile, matrix, other, slice);
            __syncthreads();
        }
        if (works) {
            add_weighted(sums[slice], scores, weights, other_tile, matrix.length - other);
        }
    }
}

__device__ __forceinline__ void store_scaled(const Sums &sums, float scale, const Output &matrix, u32 own) {
    float factors[ROWS];
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) {
        factors[i] = scale;
    }
    store_sums(sums, factors, matrix, own);
}
#endif

#ifdef QUERY_GRADIENT
extern "C" __global__ void __launch_bounds__(128, BLOCKS) query_gradient(
    const u32 *__restrict__ offsets, const float *__restrict__ projections, const float *__restrict__ log_sum_exp,
    const float *__restrict__ along, const float *__restrict__ upstream, float *__restrict__ output, u32 blocks,
    u32 heads, u32 head_width, u32 width, u32 first_row, u32 owned_rows, u32 count, OPTIONAL u32 vectors, float scale,
    OPTIONAL u32 dropout, OPTIONAL u32 dropout_row, OPTIONAL u32 dropout_site, OPTIONAL u32 dropout_step,
    OPTIONAL u32 dropout_key_low, OPTIONAL u32 dropout_key_high, OPTIONAL u32 dropout_threshold,
    OPTIONAL float dropout_scale
) {
    const Task here = task_of_block(offsets, blocks, heads, first_row, owned_rows, count);
    if (here.own >= here.length) {
        return;
    }
    __shared__ float4 own_tile[TILE * LINE];
    __shared__ float4 other_tile[TILE * LINE];
    __shared__ float4 weights[THREADS / 16 * WEIGHTS];
    __shared__ Mask mask;
    __shared__ float of_scores[TILE];
    __shared__ float of_output[TILE];
    const Dropout dropped{
        dropout_row, dropout_site, dropout_step, dropout_key_low, dropout_key_high, dropout_threshold, dropout_scale
    };
    const Inputs inputs = inputs_of(here, projections, upstream, width, head_width, vectors != 0);
    const size_t statistics = size_t(first_row + here.first) * heads + here.head;
    copy_numbers(of_scores, log_sum_exp + statistics, here.own, here.length, heads);
    copy_numbers(of_output, along + statistics, here.own, here.length, heads);
    const bool works = here.own + first_of_warp() < here.length;
    Sums sums;
    clear(sums);
    for (u32 other = 0; other < here.length; other += TILE) {
        Scores gradients;
        products(
            gradients, own_tile, other_tile, inputs.upstream, inputs.values, here.own, other, works, false, [&]() {
                if (dropout != 0) {
                    draw(mask, dropped, here.head, here.first + here.own, other);
                }
            }
        );
        if (works && dropout != 0) {
            drop<true>(gradients, mask, dropout_scale);
        }
        Scores scores;
        products(scores, own_tile, other_tile, inputs.queries, inputs.keys, here.own, other, works, false, []() {});
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            const float known = of_scores[own_row(i)];
            const float product = of_output[own_row(i)];
#pragma unroll
            for (u32 j = 0; j < COLUMNS; j++) {
                const bool is_key = other + lane_of_half() + 16 * j < here.length;
                const float weight = exponential(scale * scores[i][j] - known);
                scores[i][j] = is_key ? weight * (gradients[i][j] - product) : 0.0f;
            }
        }
        add_rows(sums, scores, weights, other_tile, inputs.keys, other, works, true);
    }
    store_scaled(sums, scale, output_of(here, output, 0, width, head_width, vectors != 0), here.own);
}
#endif

#ifdef KEY_GRADIENT
extern "C" __global__ void __launch_bounds__(128, BLOCKS) key_gradient(
    const u32 *__restrict__ offsets, const float *__restrict__ projections, const float *__restrict__ log_sum_exp,
    const float *__restrict__ along, const float *__restrict__ upstream, float *__restrict__ output, u32 blocks,
    u32 heads, u32 head_width, u32 width, u32 first_row, u32 owned_rows, u32 count, OPTIONAL u32 vectors, float scale,
    OPTIONAL u32 dropout, OPTIONAL u32 dropout_row, OPTIONAL u32 dropout_site, OPTIONAL u32 dropout_step,
    OPTIONAL u32 dropout_key_low, OPTIONAL u32 dropout_key_high, OPTIONAL u32 dropout_threshold,
    OPTIONAL float dropout_scale
) {
    const Task here = task_of_block(offsets, blocks, heads, first_row, owned_rows, count);
    if (here.own >= here.length) {
        return;
    }
    __shared__ float4 own_tile[TILE * LINE];
    __shared__ float4 other_tile[TILE * LINE];
    __shared__ float4 weights[THREADS / 16 * WEIGHTS];
    __shared__ Mask mask;
    __shared__ float of_scores[TILE];
    __shared__ float of_output[TILE];
    const Dropout dropped{
        dropout_row, dropout_site, dropout_step, dropout_key_low, dropout_key_high, dropout_threshold, dropout_scale
    };
    const Inputs inputs = inputs_of(here, projections, upstream, width, head_width, vectors != 0);
    const size_t statistics = size_t(first_row + here.first) * heads + here.head;
    const bool works = here.own + first_of_warp() < here.length;
    Sums sums;
    clear(sums);
    for (u32 other = 0; other < here.length; other += TILE) {
        Scores gradients;
        products(
            gradients, own_tile, other_tile, inputs.values, inputs.upstream, here.own, other, works, false, [&]() {
                copy_numbers(of_scores, log_sum_exp + statistics, other, here.length, heads);
                copy_numbers(of_output, along + statistics, other, here.length, heads);
                if (dropout != 0) {
                    draw(mask, dropped, here.head, here.first + other, here.own);
                }
            }
        );
        if (works && dropout != 0) {
            drop<false>(gradients, mask, dropout_scale);
        }
        Scores scores;
        products(scores, own_tile, other_tile, inputs.keys, inputs.queries, here.own, other, works, false, []() {});
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j++) {
            const u32 query = lane_of_half() + 16 * j;
            const float known = of_scores[query];
            const float product = of_output[query];
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                const float weight = exponential(scale * scores[i][j] - known);
                scores[i][j] = other + query < here.length ? weight * (gradients[i][j] - product) : 0.0f;
            }
        }
        add_rows(sums, scores, weights, other_tile, inputs.queries, other, works, true);
    }
    store_scaled(sums, scale, output_of(here, output, 1, width, head_width, vectors != 0), here.own);
}
#endif

#ifdef VALUE_GRADIENT
extern "C" __global__ void __launch_bounds__(128, BLOCKS) value_gradient(
    const u32 *__restrict__ offsets, const float *__restrict__ projections, const float *__restrict__ log_sum_exp,
    const float *__restrict__ upstream, float *__restrict__ output, u32 blocks, u32 heads, u32 head_width, u32 width,
    u32 first_row, u32 owned_rows, u32 count, OPTIONAL u32 vectors, float scale, OPTIONAL u32 dropout,
    OPTIONAL u32 dropout_row, OPTIONAL u32 dropout_site, OPTIONAL u32 dropout_step, OPTIONAL u32 dropout_key_low,
    OPTIONAL u32 dropout_key_high, OPTIONAL u32 dropout_threshold, OPTIONAL float dropout_scale
) {
    const Task here = task_of_block(offsets, blocks, heads, first_row, owned_rows, count);
    if (here.own >= here.length) {
        return;
    }
    __shared__ float4 own_tile[TILE * LINE];
    __shared__ float4 other_tile[TILE * LINE];
    __shared__ float4 weights[THREADS / 16 * WEIGHTS];
    __shared__ Mask mask;
    __shared__ float of_scores[TILE];
    const Dropout dropped{
        dropout_row, dropout_site, dropout_step, dropout_key_low, dropout_key_high, dropout_threshold, dropout_scale
    };
    const Inputs inputs = inputs_of(here, projections, upstream, width, head_width, vectors != 0);
    const size_t statistics = size_t(first_row + here.first) * heads + here.head;
    const bool works = here.own + first_of_warp() < here.length;
    Sums sums;
    clear(sums);
    for (u32 other = 0; other < here.length; other += TILE) {
        Scores scores;
        products(
            scores, own_tile, other_tile, inputs.keys, inputs.queries, here.own, other, works, other > 0, [&]() {
                copy_numbers(of_scores, log_sum_exp + statistics, other, here.length, heads);
                if (dropout != 0) {
                    draw(mask, dropped, here.head, here.first + other, here.own);
                }
            }
        );
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j++) {
            const u32 query = lane_of_half() + 16 * j;
            const float known = of_scores[query];
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                scores[i][j] = other + query < here.length ? exponential(scale * scores[i][j] - known) : 0.0f;
            }
        }
        if (dropout != 0) {
            drop<false>(scores, mask, dropout_scale);
        }
        add_rows(sums, scores, weights, other_tile, inputs.upstream, other, works, false);
    }
    store_scaled(sums, 1.0f, output_of(here, output, 2, width, head_width, vectors != 0), here.own);
}
#endif
