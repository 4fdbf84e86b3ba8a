// Values that lie side by side, of which a thread has one or four: four go through memory in one access of 16 bytes.

#pragma once

#include "types.cuh"

// N floats side by side, N 1 or 4.
template <int N> struct Floats {
    float v[N];
};

// Of these pointers, null or not, all can be read 16 bytes at a time.
template <class... Pointers> __device__ __forceinline__ bool are_aligned(Pointers... pointers) {
    return ((size_t(pointers) | ...) & 15) == 0;
}

// Rows of `width` floats from these pointers on can be read four values at a time.
template <class... Pointers> __device__ __forceinline__ bool have_fours(u32 width, Pointers... pointers) {
    return width % 4 == 0 && are_aligned(pointers...);
}

// The N floats from a place on, which is a multiple of 16 bytes if they are four.
template <int N> __device__ __forceinline__ Floats<N> load(const float *from) {
    Floats<N> values;
    if constexpr (N == 4) {
        const float4 four = *reinterpret_cast<const float4 *>(from);
        values.v[0] = four.x;
        values.v[1] = four.y;
        values.v[2] = four.z;
        values.v[3] = four.w;
    } else {
        values.v[0] = *from;
    }
    return values;
}

// Writes N floats to a place.
template <int N> __device__ __forceinline__ void store(float *to, const Floats<N> &values) {
    if constexpr (N == 4) {
        *reinterpret_cast<float4 *>(to) = make_float4(values.v[0], values.v[1], values.v[2], values.v[3]);
    } else {
        *to = values.v[0];
    }
}
