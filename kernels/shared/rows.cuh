// A warp for each row, for blocks of 256 threads that have 8 rows.

#pragma once

#include "reduce.cuh"
#include "vectors.cuh"

// Rows of a block, and lanes of a row.
constexpr u32 ROWS = 8;
constexpr u32 ROW_LANES = WARP;

// The row of this thread's warp, in a grid of one row of blocks.
__device__ __forceinline__ u32 row_of_warp() {
    return blockIdx.x * ROWS + threadIdx.x / ROW_LANES;
}

// The number of this thread among those of its row.
__device__ __forceinline__ u32 lane_of_row() {
    return threadIdx.x % ROW_LANES;
}

// The sum over the lanes of a row, for all of them. Every lane has to call; warps do not wait for each other.
__device__ __forceinline__ float row_sum(float value) {
    return warp_sum(value);
}

// The largest of the lanes of a row, for all of them.
__device__ __forceinline__ float row_max(float value) {
    return warp_max(value);
}

// How the values of a row are dealt to its lanes: N side by side each, one or four. What is read several times stays in
// registers if HELD, as long as a lane has no more than MOST_HELD values.
template <int N_, bool HELD_> struct Layout {
    static constexpr int N = N_;
    static constexpr bool HELD = HELD_;
};

constexpr int MOST_HELD = 32;

// Calls `of_row(Layout<...>())` with the layout that suits rows of `width` values, which all can be read four at a time
// or cannot.
template <class OfRow> __device__ __forceinline__ void with_layout(u32 width, bool fours, OfRow of_row) {
    if (!fours) {
        of_row(Layout<1, false>());
    } else if (width <= MOST_HELD * ROW_LANES) {
        of_row(Layout<4, true>());
    } else {
        of_row(Layout<4, false>());
    }
}

// Calls `of_columns(place, column)` for each of this lane's runs of N columns, where `place` is the number of the run
// if values are held, else 0.
template <class L, class OfColumns>
__device__ __forceinline__ void for_columns(L, u32 width, OfColumns of_columns) {
    if constexpr (L::HELD) {
#pragma unroll
        for (int place = 0; place < MOST_HELD / L::N; place++) {
            const u32 column = L::N * (place * ROW_LANES + lane_of_row());
            if (column < width) {
                of_columns(place, column);
            }
        }
    } else {
        for (u32 column = L::N * lane_of_row(); column < width; column += L::N * ROW_LANES) {
            of_columns(0, column);
        }
    }
}

// The values that a lane has of a row in memory.
template <class L> struct RowValues {
    const float *row;
    Floats<L::N> held[L::HELD ? MOST_HELD / L::N : 1];

    // Of a row whose values are not read yet.
    explicit __device__ __forceinline__ RowValues(const float *row) : row(row) {
    }

    // Of a row of `width` values, which are read if they are to be held.
    __device__ __forceinline__ RowValues(const float *row, u32 width) : row(row) {
        if constexpr (L::HELD) {
            for_columns(L(), width, [&](int place, u32 column) { held[place] = load<L::N>(row + column); });
        }
    }

    // Those of a run of columns.
    __device__ __forceinline__ Floats<L::N> at(int place, u32 column) const {
        if constexpr (L::HELD) {
            return held[place];
        } else {
            return load<L::N>(row + column);
        }
    }
};
