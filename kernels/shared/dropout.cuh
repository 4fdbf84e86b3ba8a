// What dropout multiplies elements with. A kernel has these as arguments:
//
//     u32 dropout_row           where in the random stream row 0 stands
//     u32 dropout_site
//     u32 dropout_step
//     u32 dropout_key_low
//     u32 dropout_key_high
//     u32 dropout_threshold     of 65,536: halves of random words below it drop their element
//     float dropout_scale       for those that stay

#pragma once

#include "philox.cuh"

// The arguments, in the order above.
struct Dropout {
    u32 row;
    u32 site;
    u32 step;
    u32 key_low;
    u32 key_high;
    u32 threshold;
    float scale;
};

// The random words of the columns 8·octet to 8·octet + 7: of each word the low half first.
__device__ __forceinline__ uint4 dropout_words(const Dropout &dropout, u32 row, u32 octet) {
    const uint4 counter = make_uint4(octet, dropout.row + row, dropout.site, dropout.step);
    return philox(counter, make_uint2(dropout.key_low, dropout.key_high));
}

// The factors of the two columns of a word.
__device__ __forceinline__ float2 dropout_pair(const Dropout &dropout, u32 word) {
    return make_float2(
        (word & 0xffffu) < dropout.threshold ? 0.0f : dropout.scale,
        (word >> 16) < dropout.threshold ? 0.0f : dropout.scale
    );
}

// The factors of the columns 4·quad to 4·quad + 3.
__device__ __forceinline__ float4 dropout_factors(const Dropout &dropout, u32 row, u32 quad) {
    const uint4 words = dropout_words(dropout, row, quad / 2);
    const bool second = quad % 2 == 1;
    const float2 low = dropout_pair(dropout, second ? words.z : words.x);
    const float2 high = dropout_pair(dropout, second ? words.w : words.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

// The factor of one column: as much work as for eight.
__device__ __forceinline__ float dropout_factor(const Dropout &dropout, u32 row, u32 column) {
    const uint4 words = dropout_words(dropout, row, column / 8);
    const u32 low = column & 2 ? words.y : words.x;
    const u32 high = column & 2 ? words.w : words.z;
    const float2 pair = dropout_pair(dropout, column & 4 ? high : low);
    return column & 1 ? pair.y : pair.x;
}
