// Blocks that touch each element once: 64 threads for 256 elements, four each.

#pragma once

#include "vectors.cuh"

// Threads of a block, and elements.
constexpr u32 ELEMENT_THREADS = 64;
constexpr u32 BLOCK_ELEMENTS = 256;

// Says how many elements lie side by side.
template <int N_> struct Together {
    static constexpr int N = N_;
};

// Calls `of_elements(Together<N>(), first)` for this thread's runs of elements, of `count` in all: once for four, or
// four times for one if they are not aligned or there are fewer.
template <class OfElements>
__device__ __forceinline__ void for_elements(u32 count, bool aligned, OfElements of_elements) {
    const size_t first = size_t(blockIdx.x) * BLOCK_ELEMENTS;
    if (aligned && first + BLOCK_ELEMENTS <= count) {
        of_elements(Together<4>(), first + 4 * threadIdx.x);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < BLOCK_ELEMENTS; i += ELEMENT_THREADS) {
        const size_t at = first + i + threadIdx.x;
        if (at < count) {
            of_elements(Together<1>(), at);
        }
    }
}
