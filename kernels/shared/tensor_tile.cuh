// A tile of a matrix product by tensor cores, SIDE × SIDE with SIDE 64 or 128, of 16-bit values with f32 sums.
//
// Both matrices have been brought into 16 bits before, their rows padded with zeros to a multiple of 8 values, or 16
// bytes. A value is one f16 or bf16; or, as exact as f32, the sum of two f16, high + low / 2^11: 22 bits of it. A product of
// two such values is high·high + (high·low + low·high) / 2^11; what is left out is below the rounding of f32. f16 are
// scaled by a power of two for each matrix that brings its largest magnitude near the end of their range.
//
// A stage in shared memory is STEP inner places of both matrices. Copies of the next stages are under way in the
// background while warps multiply what is there. Pieces of 16 bytes are put where neither copies nor `ldmatrix` meet in
// a memory bank: in a row of 64 bytes at piece ^ row / 2, in longer ones at piece ^ row, of which the last bits count.
//
// A warp has SIDE/2 × SIDE/2 of the tile, so that what it reads of shared memory is used by 8 products of small
// matrices in a row: shared memory keeps up with the tensor cores. Exact ones need twice the sums, so that a warp has
// half as much, and twice the warps.

#pragma once

#include "instructions.cuh"
#include "tile.cuh"

// The bits of what f16 matrices have as their largest magnitude where nothing else is known.
constexpr u32 BITS_OF_ONE = 0x3f800000u;
// What low parts are multiplied with.
constexpr float LOW = 2048.0f;

// The low parts of two values whose f16 are given.
__device__ __forceinline__ u32 low_f16x2_of(float2 values, u32 high) {
    float x = values.x - of_f16((u16)high);
    float y = values.y - of_f16((u16)(high >> 16));
    return f16x2_of(x * LOW, y * LOW);
}

#if __CUDA_ARCH__ >= 800

// A matrix of 16-bit values: `count` lines are multiplied. By lines each one's inner places are next to each other.
struct HalfLines {
    const u16 *high;
    const u16 *low;
    size_t stride;
    u32 count;
};

struct F16 {
    static constexpr bool SCALED = true;

    __device__ __forceinline__ static u32 pack(float2 two) {
        return f16x2_of(two.x, two.y);
    }

    __device__ __forceinline__ static void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        mma_f16(d, a, b);
    }
};

struct Bf16 {
    static constexpr bool SCALED = false;

    __device__ __forceinline__ static u32 pack(float2 two) {
        return bf16x2_of(two.x, two.y);
    }

    __device__ __forceinline__ static void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        mma_bf16(d, a, b);
    }
};

// Places of one matrix in shared memory, and the way there.
template <int SIDE, int THREADS, bool BY_LINES> struct StagedLines {
    static constexpr int STEP = 32;
    // Bytes of a stage, and of a row in it: of inner places by lines, otherwise of lines.
    static constexpr u32 BYTES = SIDE * STEP * 2;
    static constexpr u32 ROW = BY_LINES ? STEP * 2 : SIDE * 2;
    static constexpr u32 PIECES = ROW / 16;
    // A thread copies so many pieces, that are so many rows apart.
    static constexpr u32 COPIES = BYTES / 16 / THREADS;
    static constexpr u32 APART = THREADS / PIECES;

    __device__ __forceinline__ static u32 place(u32 row, u32 piece) {
        return row * ROW + ((piece ^ (BY_LINES ? row / 2 % 4 : row % 8)) * 16);
    }

    // Asks for a stage, whose first inner place is given, of the lines from a first one on.
    __device__ __forceinline__ static void
    copy(char *stage, const u16 *values, size_t stride, u32 first_line, u32 count, u32 k, u32 end) {
        u32 row = threadIdx.x / PIECES;
        u32 piece = threadIdx.x % PIECES;
        u32 first_row = BY_LINES ? first_line : k;
        u32 first_column = BY_LINES ? k : first_line;
        u32 rows = BY_LINES ? count : end;
        u32 columns = BY_LINES ? end : count;
        const u16 *from = values + (first_row + row) * stride + first_column + piece * 8;
        char *to = stage + place(row, piece);
        bool inside = first_column + piece * 8 < columns;
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) {
            bool valid = inside && first_row + row + i * APART < rows;
            cp_async_16(to + i * APART * ROW, from + i * APART * stride, valid);
        }
    }

    // Where a lane points for the first of the 16 × 16 matrices of the left side (8 × 16 of the right one, of which two
    // are read at once) that begin at a line, of the first 16 inner places of a stage.
    template <bool LEFT> __device__ __forceinline__ static u32 first_place(u32 line) {
        u32 lane = threadIdx.x % 32;
        // Which half of the lines, and of the inner places, a lane's row of 8 values is in.
        u32 in_lines = LEFT ? lane / 8 % 2 : lane / 16;
        u32 in_places = LEFT ? lane / 16 : lane / 8 % 2;
        return BY_LINES ? place(line + in_lines * 8 + lane % 8, in_places)
                        : place(in_places * 8 + lane % 8, line / 8 + in_lines);
    }

    // The same for the 16 lines with a number, and the 16 inner places with a number.
    __device__ __forceinline__ static u32 next_place(u32 first, u32 lines, u32 places) {
        return BY_LINES ? (first ^ places * 32) + lines * (16 * ROW) : (first ^ lines * 32) + places * (16 * ROW);
    }

    __device__ __forceinline__ static void load(u32 (&r)[4], const char *stage, u32 first, u32 lines, u32 places) {
        const char *from = stage + next_place(first, lines, places);
        if constexpr (BY_LINES) {
            ldmatrix_x4(r, from);
        } else {
            ldmatrix_x4_trans(r, from);
        }
    }
};

template <int SIDE, bool EXACT, typename Format> struct TensorTile {
    static constexpr int WARPS_ACROSS = EXACT ? 4 : 2;
    static constexpr int WARPS_DOWN = 2;
    static constexpr int THREADS = 32 * WARPS_ACROSS * WARPS_DOWN;
    static constexpr int LANES_ACROSS = 4;
    static constexpr int VECTOR = 2;
    // Of a warp: 16 × 8 products down and across.
    static constexpr int DOWN = SIDE / WARPS_DOWN / 16;
    static constexpr int ACROSS = SIDE / WARPS_ACROSS / 8;
    static constexpr int ROWS = 2 * DOWN;
    static constexpr int COLUMNS = 2 * ACROSS;
    static constexpr int STEP = 32;
    static constexpr int PARTS = EXACT ? 2 : 1;
    static constexpr int STAGES = EXACT ? 3 : 4;
    static constexpr u32 STAGE_BYTES = 2 * PARTS * SIDE * STEP * 2;

    float values[DOWN][ACROSS][4];

    __device__ __forceinline__ float &at(int u, int v) {
        return values[u / 2][v / 2][u % 2 * 2 + v % 2];
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
        return warp_down() * (SIDE / WARPS_DOWN) + 8 * u + threadIdx.x % 32 / 4;
    }

    __device__ __forceinline__ static u32 column(int v) {
        return warp_across() * (SIDE / WARPS_ACROSS) + 8 * (v / 2) + threadIdx.x % 4 * 2 + v % 2;
    }

    // The products of inner places from `first`, a multiple of STEP, to `end` of the lines from a row and a column on.
    // `memory` is STAGES stages of shared memory, free for other use afterwards.
    template <bool LEFT_BY_LINES, bool RIGHT_BY_LINES>
    __device__ __forceinline__ void multiply(
        const HalfLines &left, const HalfLines &right, u32 first_row, u32 first_column, u32 first, u32 end, char *memory
    ) {
        using Left = StagedLines<SIDE, THREADS, LEFT_BY_LINES>;
        using Right = StagedLines<SIDE, THREADS, RIGHT_BY_LINES>;
        constexpr u32 RIGHT = PARTS * Left::BYTES;
        // What low parts add, before it is divided.
        float rests[EXACT ? DOWN : 1][EXACT ? ACROSS : 1][4];
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    values[i][j][e] = 0.0f;
                    if constexpr (EXACT) {
                        rests[i][j][e] = 0.0f;
                    }
                }
            }
        }
        u32 left_place = Left::template first_place<true>(warp_down() * (SIDE / WARPS_DOWN));
        u32 right_place = Right::template first_place<false>(warp_across() * (SIDE / WARPS_ACROSS));

        auto copy = [&](u32 slot, u32 k) {
            char *stage = memory + slot * STAGE_BYTES;
            if (k < end) {
                Left::copy(stage, left.high, left.stride, first_row, left.count, k, end);
                Right::copy(stage + RIGHT, right.high, right.stride, first_column, right.count, k, end);
                if constexpr (EXACT) {
                    Left::copy(stage + Left::BYTES, left.low, left.stride, first_row, left.count, k, end);
                    Right::copy(
                        stage + RIGHT + Right::BYTES, right.low, right.stride, first_column, right.count, k, end
                    );
                }
            }
            // A group for each stage, empty or not: the number of groups tells which stages are there.
            cp_async_commit();
        };
#pragma unroll
        for (int slot = 0; slot < STAGES - 1; slot++) {
            copy(slot, first + slot * STEP);
        }
        u32 slot = 0;
        for (u32 k = first; k < end; k += STEP) {
            cp_async_wait<STAGES - 2>();
            // All threads' copies of this stage are there, and all have read the stage before, whose place is free.
            __syncthreads();
            const char *stage = memory + slot * STAGE_BYTES;
            u32 behind = slot == 0 ? STAGES - 1 : slot - 1;
            slot = slot == STAGES - 1 ? 0 : slot + 1;
            if constexpr (EXACT) {
#pragma unroll
                for (int places = 0; places < STEP / 16; places++) {
                    u32 a[DOWN][4];
                    u32 low_a[DOWN][4];
#pragma unroll
                    for (int i = 0; i < DOWN; i++) {
                        Left::load(a[i], stage, left_place, i, places);
                        Left::load(low_a[i], stage + Left::BYTES, left_place, i, places);
                    }
                    if (places == 0) {
                        copy(behind, k + (STAGES - 1) * STEP);
                    }
#pragma unroll
                    for (int j = 0; j < ACROSS; j += 2) {
                        u32 b[4];
                        u32 low_b[4];
                        Right::load(b, stage + RIGHT, right_place, j / 2, places);
                        Right::load(low_b, stage + RIGHT + Right::BYTES, right_place, j / 2, places);
#pragma unroll
                        for (int second = 0; second < 2; second++) {
                            u32 one[2] = {b[2 * second], b[2 * second + 1]};
                            u32 low[2] = {low_b[2 * second], low_b[2 * second + 1]};
#pragma unroll
                            for (int i = 0; i < DOWN; i++) {
                                Format::multiply(values[i][j + second], a[i], one);
                            }
#pragma unroll
                            for (int i = 0; i < DOWN; i++) {
                                Format::multiply(rests[i][j + second], a[i], low);
                            }
#pragma unroll
                            for (int i = 0; i < DOWN; i++) {
                                Format::multiply(rests[i][j + second], low_a[i], one);
                            }
                        }
                    }
                }
            } else {
                u32 a[STEP / 16][DOWN][4];
                u32 b[STEP / 16][ACROSS / 2][4];
#pragma unroll
                for (int places = 0; places < STEP / 16; places++) {
#pragma unroll
                    for (int i = 0; i < DOWN; i++) {
                        Left::load(a[places][i], stage, left_place, i, places);
                    }
#pragma unroll
                    for (int j = 0; j < ACROSS / 2; j++) {
                        Right::load(b[places][j], stage + RIGHT, right_place, j, places);
                    }
                    if (places == 0) {
                        copy(behind, k + (STAGES - 1) * STEP);
                    }
                }
#pragma unroll
                for (int places = 0; places < STEP / 16; places++) {
#pragma unroll
                    for (int j = 0; j < ACROSS; j++) {
                        u32 one[2] = {b[places][j / 2][j % 2 * 2], b[places][j / 2][j % 2 * 2 + 1]};
#pragma unroll
                        for (int i = 0; i < DOWN; i++) {
                            Format::multiply(values[i][j], a[places][i], one);
                        }
                    }
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if constexpr (EXACT) {
#pragma unroll
            for (int i = 0; i < DOWN; i++) {
#pragma unroll
                for (int j = 0; j < ACROSS; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        values[i][j][e] += rests[i][j][e] * (1.0f / LOW);
                    }
                }
            }
        }
    }
};

#endif
