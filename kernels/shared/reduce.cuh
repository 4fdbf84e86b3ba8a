// Sums and maxima over the lanes of a warp and over the threads of a block, the same for all of them, always in the
// same order.
//
// Every lane of the warp, and every thread of the block, has to call.

#pragma once

#include "types.cuh"

// The sum over each LANES lanes that lie side by side, a power of two. Both of a pair add the same two numbers, so all
// have the same bits.
template <int LANES = WARP> __device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        value += __shfl_xor_sync(WHOLE_WARP, value, step);
    }
    return value;
}

// The largest of each LANES lanes; what is no number is passed over.
template <int LANES = WARP> __device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, step));
    }
    return value;
}

// The sum of whole numbers over each LANES lanes.
template <int LANES = WARP> __device__ __forceinline__ u32 warp_sum_u32(u32 value) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        value += __shfl_xor_sync(WHOLE_WARP, value, step);
    }
    return value;
}

// The sum over a block of THREADS threads, a multiple of 32. The memory is free for the next call.
template <int THREADS = 256> __device__ __forceinline__ float block_sum(float value) {
    __shared__ float of_warps[THREADS / WARP];
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) {
        of_warps[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    float total = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / WARP; warp++) {
        total += of_warps[warp];
    }
    __syncthreads();
    return total;
}

// The largest of a block of THREADS threads. The memory is free for the next call.
template <int THREADS = 256> __device__ __forceinline__ float block_max(float value) {
    __shared__ float of_warps[THREADS / WARP];
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) {
        of_warps[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    float largest = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / WARP; warp++) {
        largest = fmaxf(largest, of_warps[warp]);
    }
    __syncthreads();
    return largest;
}
