// Powers of two that bring the largest magnitude of each of two matrices to between 2^14 and 2^15, from the bits of
// these magnitudes.

#pragma once

#include "types.cuh"

// For one matrix. Nothing is lost of a matrix of zeros, and nothing is gained beyond what a power of two can be.
__device__ __forceinline__ float scale_of(u32 bits) {
    const i32 exponent = max(-100, min(100, i32(bits >> 23) - 127));
    return bits == 0 ? 1.0f : __uint_as_float(u32(127 + 14 - exponent) << 23);
}

// For both, from the two words of `largest`.
__device__ __forceinline__ float2 matrix_scales(const u32 *largest) {
    return make_float2(scale_of(largest[0]), scale_of(largest[1]));
}
