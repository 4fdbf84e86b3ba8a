// Exponentials and logarithms as the other devices have them: nothing here gets infinite of finite numbers, and what
// is no number stays none.

#pragma once

#include "types.cuh"

// The largest of no entries, and the logit of what is left out. The lowest f32.
constexpr float NO_ENTRY = -3.4028234663852886e38f;

// exp(x); 0 far below, that of 88.7 above it.
__device__ __forceinline__ float exponential(float x) {
    return expf(x > 88.7f ? 88.7f : x);
}

// log(x) for normal x > 0; about -88 for anything smaller.
__device__ __forceinline__ float logarithm(float x) {
    return logf(x < 1.17549435e-38f ? 1.17549435e-38f : x);
}

// log(1 + x) for x from 0 to 1, where 1 + x would round x away.
__device__ __forceinline__ float logarithm_of_one_plus(float x) {
    return log1pf(x);
}

// log(1 + exp x)
__device__ __forceinline__ float softplus(float x) {
    return (x < 0.0f ? 0.0f : x) + log1pf(expf(-fabsf(x)));
}

// 1 / (1 + exp(-x))
__device__ __forceinline__ float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x > 0.0f ? 1.0f : e) / (1.0f + e);
}

// log(exp a + exp b), of which either may be NO_ENTRY.
__device__ __forceinline__ float log_add_exp(float a, float b) {
    // fmaxf would drop what is no number.
    const bool ordered = a < b;
    const float high = ordered ? b : a;
    const float low = ordered ? a : b;
    return low == NO_ENTRY ? high : high + log1pf(expf(low - high));
}
