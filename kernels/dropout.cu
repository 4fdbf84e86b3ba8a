// Dropout in place: output[row, column] *= 0 or the scale, by a mask that a counter-based generator makes from where an
// element stands.
//
// Launch: blocks of 128 threads for 256 fours of columns, two that lie side by side each, because these may share their
// random words; `count` rows of `quads` such fours.

#include "dropout.cuh"
#include "vectors.cuh"

#ifdef FORWARD
// Multiplies the columns from a fourth one on.
__device__ __forceinline__ void apply(float *row, u32 column, u32 width, bool fours, const float (&factors)[4]) {
    if (fours) {
        Floats<4> values = load<4>(row + column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            values.v[i] *= factors[i];
        }
        store(row + column, values);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (column + i < width) {
                row[column + i] *= factors[i];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) forward(
    float *__restrict__ output, u32 count, u32 width, u32 quads, u32 dropout_row, u32 dropout_site, u32 dropout_step,
    u32 dropout_key_low, u32 dropout_key_high, u32 dropout_threshold, float dropout_scale
) {
    const Dropout dropout{
        dropout_row, dropout_site, dropout_step, dropout_key_low, dropout_key_high, dropout_threshold, dropout_scale
    };
    const bool fours = have_fours(width, output);
    const u64 first = u64(blockIdx.x) * 256 + 2 * threadIdx.x;
    // Most matrices have no more fours than 32 bits count, and then division is cheap.
    const bool small = u64(count) * quads <= 0xffffff00u;
    u32 row = small ? u32(first) / quads : u32(first / quads);
    u32 quad = small ? u32(first) % quads : u32(first % quads);
    if (quads % 2 == 0) {
        if (row < count) {
            float *values = output + size_t(row) * width;
            const uint4 words = dropout_words(dropout, row, quad / 2);
            const float2 pairs[4] = {
                dropout_pair(dropout, words.x), dropout_pair(dropout, words.y), dropout_pair(dropout, words.z),
                dropout_pair(dropout, words.w)
            };
            apply(values, 4 * quad, width, fours, {pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y});
            apply(values, 4 * quad + 4, width, fours, {pairs[2].x, pairs[2].y, pairs[3].x, pairs[3].y});
        }
        return;
    }
    for (int i = 0; i < 2; i++) {
        if (row < count) {
            const float4 factors = dropout_factors(dropout, row, quad);
            apply(
                output + size_t(row) * width, 4 * quad, width, fours, {factors.x, factors.y, factors.z, factors.w}
            );
        }
        quad++;
        if (quad == quads) {
            quad = 0;
            row++;
        }
    }
}
#endif
