// Totals of several values at a time over the 256 threads of a block, the same for all of them, always in the same
// order.
//
// Every thread has to call. The memory comes from the caller and is good for one call: another one needs other memory,
// or a barrier between them.

#pragma once

#include "types.cuh"

constexpr int BLOCK_WARPS = 8;

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Largest {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Smallest {
    __device__ __forceinline__ u32 operator()(u32 a, u32 b) const { return min(a, b); }
};

// Replaces N values of each thread, 1, 2, 4 or 8 of them, by their totals over the block.
template <class Combine, class T, int N>
__device__ __forceinline__ void block_totals(T (&values)[N], T (&parts)[BLOCK_WARPS * N]) {
    constexpr u32 SHARERS = WARP / N;
    const Combine combine{};
    const u32 lane = threadIdx.x % WARP;
    // The lanes of a pair swap halves of their values, and each goes on with the other half, until every lane has one
    // value, which SHARERS lanes side by side share.
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
        const int step = half * SHARERS;
        const bool is_upper = (lane & step) != 0;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const T given = is_upper ? values[i] : values[i + half];
            const T kept = is_upper ? values[i + half] : values[i];
            values[i] = combine(kept, __shfl_xor_sync(WHOLE_WARP, given, step));
        }
    }
#pragma unroll
    for (int step = SHARERS / 2; step > 0; step /= 2) {
        values[0] = combine(values[0], __shfl_xor_sync(WHOLE_WARP, values[0], step));
    }
    if (lane % SHARERS == 0) {
        parts[lane / SHARERS * BLOCK_WARPS + threadIdx.x / WARP] = values[0];
    }
    __syncthreads();
    // Each warp finishes four values at a time, with a lane for each warp's part.
#pragma unroll
    for (int first = 0; first < N; first += 4) {
        T part = parts[(first * BLOCK_WARPS + lane) % (BLOCK_WARPS * N)];
#pragma unroll
        for (int step = BLOCK_WARPS / 2; step > 0; step /= 2) {
            part = combine(part, __shfl_xor_sync(WHOLE_WARP, part, step));
        }
#pragma unroll
        for (int i = first; i < N && i < first + 4; i++) {
            values[i] = __shfl_sync(WHOLE_WARP, part, (i - first) * BLOCK_WARPS);
        }
    }
}
