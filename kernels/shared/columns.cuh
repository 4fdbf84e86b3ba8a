// Sums of columns, for blocks of 256 threads that have 32 columns and 8 lines of threads, one warp each, which share
// the terms of a sum. Always in the same order.

#pragma once

#include "types.cuh"

constexpr u32 COLUMNS = 32;
constexpr u32 COLUMN_LINES = 8;

// This thread's column among those of its block.
__device__ __forceinline__ u32 column_of_lane() {
    return threadIdx.x % COLUMNS;
}

// This thread's line.
__device__ __forceinline__ u32 line_of_column() {
    return threadIdx.x / COLUMNS;
}

// The sum over the lines of a column, for all of them. Every thread of the block has to call; the memory is free for
// the next call.
__device__ __forceinline__ float column_sum(float value) {
    __shared__ float of_lines[COLUMN_LINES][COLUMNS];
    of_lines[line_of_column()][column_of_lane()] = value;
    __syncthreads();
    float total = of_lines[0][column_of_lane()];
#pragma unroll
    for (u32 line = 1; line < COLUMN_LINES; line++) {
        total += of_lines[line][column_of_lane()];
    }
    __syncthreads();
    return total;
}
