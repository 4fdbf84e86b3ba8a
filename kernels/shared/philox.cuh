// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011):
// the four random words of a counter under a key, the same as everywhere.

#pragma once

#include "types.cuh"

__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 first_low = 0xd2511f53u * counter.x;
        const u32 first_high = __umulhi(0xd2511f53u, counter.x);
        const u32 second_low = 0xcd9e8d57u * counter.z;
        const u32 second_high = __umulhi(0xcd9e8d57u, counter.z);
        counter = make_uint4(second_high ^ counter.y ^ key.x, second_low, first_high ^ counter.w ^ key.y, first_low);
        key.x += 0x9e3779b9u;
        key.y += 0xbb67ae85u;
    }
    return counter;
}
