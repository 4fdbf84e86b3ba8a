// Four columns for each thread of a block of 256 threads, which walks along rows in tiles of 1,024 columns.
//
// Where all rows begin at multiples of 16 bytes the four lie side by side and go through memory in one access.
// Elsewhere they are 256 columns apart, so that a warp touches whole lines of memory either way.

#pragma once

#include "vectors.cuh"

// Columns of a tile, and threads that share it.
constexpr u32 TILE_COLUMNS = 1024;
constexpr u32 TILE_THREADS = TILE_COLUMNS / 4;

// A thread's columns of a tile, as far as they are below `end`.
struct Quad {
    u32 first;
    u32 step;
    u32 end;

    __device__ __forceinline__ u32 column(int i) const { return first + u32(i) * step; }
    __device__ __forceinline__ bool holds(int i) const { return column(i) < end; }
    // Whether the four are one access.
    __device__ __forceinline__ bool is_whole() const { return step == 1 && first + 3 < end; }
};

// This thread's columns of the tile that begins at a column.
__device__ __forceinline__ Quad quad_of(u32 tile, u32 end, bool fours) {
    return fours ? Quad{tile + 4 * threadIdx.x, 1, end} : Quad{tile + threadIdx.x, TILE_THREADS, end};
}

// A row's values in these columns; something else where there is no column.
__device__ __forceinline__ Floats<4> read_quad(const float *row, const Quad &quad, float otherwise) {
    if (quad.is_whole()) {
        return load<4>(row + quad.first);
    }
    Floats<4> values;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values.v[i] = quad.holds(i) ? row[quad.column(i)] : otherwise;
    }
    return values;
}

__device__ __forceinline__ void write_quad(float *row, const Quad &quad, const Floats<4> &values) {
    if (quad.is_whole()) {
        store<4>(row + quad.first, values);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (quad.holds(i)) {
            row[quad.column(i)] = values.v[i];
        }
    }
}
