// The inverse length of a row, in two factors: squares of long or short rows leave single precision, so the row is
// multiplied first with the power of two that brings its largest value near 1.

#pragma once

#include "rows.cuh"

// Shorter rows are treated as if they had this length.
constexpr float SHORTEST = 1e-12f;

// 1 / length = scale · unit; a value of the unit row is (x · scale) · unit.
struct RowNorm {
    float scale;
    float unit;
};

// Of the first `width` values of a row, by all lanes of its warp.
template <class L> __device__ __forceinline__ RowNorm row_norm(L layout, const RowValues<L> &input, u32 width) {
    float largest = 0.0f;
    for_columns(layout, width, [&](int place, u32 column) {
        const Floats<L::N> x = input.at(place, column);
#pragma unroll
        for (int i = 0; i < L::N; i++) {
            largest = fmaxf(largest, fabsf(x.v[i]));
        }
    });
    const u32 exponent = max(1u, min(253u, __float_as_uint(row_max(largest)) >> 23));
    const float scale = __uint_as_float((254u - exponent) << 23);
    float square = 0.0f;
    for_columns(layout, width, [&](int place, u32 column) {
        const Floats<L::N> x = input.at(place, column);
#pragma unroll
        for (int i = 0; i < L::N; i++) {
            const float scaled = x.v[i] * scale;
            square = fmaf(scaled, scaled, square);
        }
    });
    const float length = fmaxf(sqrtf(row_sum(square)), SHORTEST * scale);
    return RowNorm{scale, 1.0f / length};
}
