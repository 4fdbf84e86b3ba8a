// A tile of a matrix product by ordinary arithmetic, SIDE × SIDE with SIDE 64 or 128, by a block of 256 threads, and
// what tiles of every kind share: how sums over their rows and columns are put together.
//
// A kind of tile is a struct that says which places a thread holds: ROWS × COLUMNS of them, `at(u, v)`, in row `row(u)`
// and column `column(v)` of the tile, of which VECTOR next to each other are in columns next to each other. The 32
// threads of a warp are LANES_ACROSS beside each other and the others below; warps are WARPS_ACROSS × WARPS_DOWN. So
// rows are shared by lanes that differ in their low bits, and columns by those that differ in their high bits.
//
// Each step of the product brings STEP inner places of both matrices into shared memory, while the values of the next
// step are on their way to registers.

#pragma once

#include "types.cuh"

// A matrix whose lines, rows of the left side or columns of the right one, are multiplied: `lines` of them. By lines
// each one's inner places are next to each other, otherwise lines are. What is stored as a row may have a factor.
struct Lines {
    const float *values;
    size_t stride;
    const float *norms;
    u32 count;
    bool vectors;
};

__device__ __forceinline__ Lines lines_of(const float *values, size_t stride, const float *norms, u32 count) {
    return {values, stride, norms, count, ((size_t)values & 15) == 0 && stride % 4 == 0};
}

// Four values of a line from an inner place on, or of four lines at one inner place; 0 outside.
template <bool BY_LINES> __device__ __forceinline__ float4 four_values(const Lines &lines, u32 line, u32 k, u32 end) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (line >= lines.count || k >= end) {
        return four;
    }
    const float *from = BY_LINES ? lines.values + line * lines.stride + k : lines.values + k * lines.stride + line;
    u32 left = BY_LINES ? end - k : lines.count - line;
    if (lines.vectors && left >= 4) {
        four = __ldg((const float4 *)from);
    } else {
        four.x = __ldg(from);
        four.y = left > 1 ? __ldg(from + 1) : 0.0f;
        four.z = left > 2 ? __ldg(from + 2) : 0.0f;
        four.w = left > 3 ? __ldg(from + 3) : 0.0f;
    }
    if (lines.norms) {
        float norm = __ldg(lines.norms + (BY_LINES ? line : k));
        four.x *= norm;
        four.y *= norm;
        four.z *= norm;
        four.w *= norm;
    }
    return four;
}

template <int SIDE> struct PlainTile {
    static constexpr int ROWS = SIDE / 16;
    static constexpr int COLUMNS = SIDE / 16;
    static constexpr int VECTOR = 4;
    static constexpr int LANES_ACROSS = 8;
    static constexpr int WARPS_ACROSS = 2;
    static constexpr int WARPS_DOWN = 4;
    static constexpr int THREADS = 256;
    static constexpr int STEP = 1024 / SIDE;
    // From one inner place to the next in shared memory; 4 more than needed, against conflicts of memory banks.
    static constexpr int LINE = SIDE + 4;
    // Floats of shared memory.
    static constexpr int MEMORY = 4 * STEP * LINE;

    float values[ROWS][COLUMNS];

    __device__ __forceinline__ float &at(int u, int v) {
        return values[u][v];
    }

    __device__ __forceinline__ static u32 thread() {
        return threadIdx.x;
    }

    __device__ __forceinline__ static void sync() {
        __syncthreads();
    }

    __device__ __forceinline__ static u32 warp_across() {
        return threadIdx.x / 32 % WARPS_ACROSS;
    }

    __device__ __forceinline__ static u32 warp_down() {
        return threadIdx.x / 32 / WARPS_ACROSS;
    }

    __device__ __forceinline__ static u32 row(int u) {
        return warp_down() * (SIDE / 4) + 16 * (u / 4) + threadIdx.x % 32 / 8 * 4 + u % 4;
    }

    __device__ __forceinline__ static u32 column(int v) {
        return warp_across() * (SIDE / 2) + 32 * (v / 4) + threadIdx.x % 8 * 4 + v % 4;
    }

    // Puts four values where products read them.
    template <bool BY_LINES> __device__ __forceinline__ static void put(float *memory, u32 line, u32 k, float4 four) {
        float *to = memory + k * LINE + line;
        if (BY_LINES) {
            to[0] = four.x;
            to[LINE] = four.y;
            to[2 * LINE] = four.z;
            to[3 * LINE] = four.w;
        } else {
            *(float4 *)to = four;
        }
    }

    // The products of inner places from `first` to `end` of the lines from a row and a column on.
    template <bool LEFT_BY_LINES, bool RIGHT_BY_LINES>
    __device__ __forceinline__ void multiply(
        const Lines &left, const Lines &right, u32 first_row, u32 first_column, u32 first, u32 end, float *memory
    ) {
        constexpr u32 BY_K = STEP / 4;
        constexpr u32 BY_LINE = SIDE / 4;
        u32 left_line = LEFT_BY_LINES ? threadIdx.x / BY_K : threadIdx.x % BY_LINE * 4;
        u32 left_k = LEFT_BY_LINES ? threadIdx.x % BY_K * 4 : threadIdx.x / BY_LINE;
        u32 right_line = RIGHT_BY_LINES ? threadIdx.x / BY_K : threadIdx.x % BY_LINE * 4;
        u32 right_k = RIGHT_BY_LINES ? threadIdx.x % BY_K * 4 : threadIdx.x / BY_LINE;
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
#pragma unroll
            for (int v = 0; v < COLUMNS; v++) {
                values[u][v] = 0.0f;
            }
        }
        float4 next_left = four_values<LEFT_BY_LINES>(left, first_row + left_line, first + left_k, end);
        float4 next_right = four_values<RIGHT_BY_LINES>(right, first_column + right_line, first + right_k, end);
        u32 half = 0;
        for (u32 k = first; k < end; k += STEP) {
            float *rows = memory + half * (MEMORY / 2);
            float *columns = rows + MEMORY / 4;
            put<LEFT_BY_LINES>(rows, left_line, left_k, next_left);
            put<RIGHT_BY_LINES>(columns, right_line, right_k, next_right);
            __syncthreads();
            if (k + STEP < end) {
                next_left = four_values<LEFT_BY_LINES>(left, first_row + left_line, k + STEP + left_k, end);
                next_right = four_values<RIGHT_BY_LINES>(right, first_column + right_line, k + STEP + right_k, end);
            }
#pragma unroll
            for (int i = 0; i < STEP; i++) {
                float of_rows[ROWS];
                float of_columns[COLUMNS];
#pragma unroll
                for (int u = 0; u < ROWS; u += 4) {
                    *(float4 *)(of_rows + u) = *(const float4 *)(rows + i * LINE + row(u));
                }
#pragma unroll
                for (int v = 0; v < COLUMNS; v += 4) {
                    *(float4 *)(of_columns + v) = *(const float4 *)(columns + i * LINE + column(v));
                }
#pragma unroll
                for (int u = 0; u < ROWS; u++) {
#pragma unroll
                    for (int v = 0; v < COLUMNS; v++) {
                        values[u][v] = fmaf(of_rows[u], of_columns[v], values[u][v]);
                    }
                }
            }
            // The other half is free: all threads have passed the barrier after its last reads.
            half ^= 1;
        }
        // What is in shared memory may be replaced by others now.
        __syncthreads();
    }
};

// Which tile of a matrix of down × across tiles a block has. Blocks near each other in time have tiles near each other
// in both directions, so that what they read is in the cache: bands of 8 rows of tiles, column after column.
__device__ __forceinline__ uint2 place_of_tile(u32 number, u32 down, u32 across) {
    u32 band = number / (8 * across);
    u32 height = min(8u, down - 8 * band);
    u32 in_band = number - 8 * band * across;
    return make_uint2(8 * band + in_band % height, in_band / height);
}

struct Add {
    __device__ __forceinline__ static float of(float a, float b) {
        return a + b;
    }
};

struct Largest {
    __device__ __forceinline__ static float of(float a, float b) {
        return fmaxf(a, b);
    }
};

// Puts N values of each of LANES lanes, `STRIDE` apart, together: each lane gives half of its values away for the
// other lane's half as long as it has more than one. Value i of the N is then value `i % (N / LANES)` of the lane whose
// place among the LANES is i / (N / LANES); with fewer values than lanes several lanes have the same one.
template <typename Operation, int N, int LANES, int STRIDE>
__device__ __forceinline__ void combine_lanes(float (&values)[N]) {
    constexpr int HALF = N / 2;
    if constexpr (LANES == 1) {
        return;
    } else if constexpr (N == 1) {
        values[0] = Operation::of(values[0], __shfl_xor_sync(WHOLE_WARP, values[0], STRIDE * (LANES / 2)));
        combine_lanes<Operation, 1, LANES / 2, STRIDE>(values);
    } else {
        bool upper = threadIdx.x & STRIDE * (LANES / 2);
        float mine[HALF];
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            float theirs = upper ? values[i] : values[i + HALF];
            float own = upper ? values[i + HALF] : values[i];
            mine[i] = Operation::of(own, __shfl_xor_sync(WHOLE_WARP, theirs, STRIDE * (LANES / 2)));
        }
        combine_lanes<Operation, HALF, LANES / 2, STRIDE>(mine);
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            values[i] = mine[i];
        }
    }
}

// The place among a lane's N values of the first that it has after `combine_lanes`.
template <int N, int LANES, int STRIDE> __device__ __forceinline__ int first_combined() {
    constexpr int OWNERS = N < LANES ? N : LANES;
    return threadIdx.x % 32 / STRIDE % LANES / (LANES / OWNERS) * (N / OWNERS);
}

// Puts what a tile's threads have of their rows (columns) together, over the lanes that share them: `parts` gets SIDE
// values for each place of a warp across (down) the tile. What is shared is read after a barrier.

template <typename Operation, int SIDE, typename Tile>
__device__ __forceinline__ void combine_rows(float (&values)[Tile::ROWS], float *parts) {
    constexpr int N = Tile::ROWS;
    constexpr int LANES = Tile::LANES_ACROSS;
    combine_lanes<Operation, N, LANES, 1>(values);
    int first = first_combined<N, LANES, 1>();
#pragma unroll
    for (int i = 0; i < (N > LANES ? N / LANES : 1); i++) {
        parts[Tile::warp_across() * SIDE + Tile::row(first + i)] = values[i];
    }
}

template <typename Operation, int SIDE, typename Tile>
__device__ __forceinline__ void combine_columns(float (&values)[Tile::COLUMNS], float *parts) {
    constexpr int N = Tile::COLUMNS;
    constexpr int LANES = WARP / Tile::LANES_ACROSS;
    combine_lanes<Operation, N, LANES, Tile::LANES_ACROSS>(values);
    int first = first_combined<N, LANES, Tile::LANES_ACROSS>();
#pragma unroll
    for (int i = 0; i < (N > LANES ? N / LANES : 1); i++) {
        parts[Tile::warp_down() * SIDE + Tile::column(first + i)] = values[i];
    }
}

// A row's (column's) parts put together, in their order.
template <typename Operation, int SIDE, int PARTS>
__device__ __forceinline__ float combined(const float *parts, u32 line) {
    float all = parts[line];
#pragma unroll
    for (int part = 1; part < PARTS; part++) {
        all = Operation::of(all, parts[part * SIDE + line]);
    }
    return all;
}
