// The Gaussian error linear unit x · Φ(x), with the exact normal distribution function Φ (arXiv 1606.08415).
//
// For a ≥ 0, Φ(−a) = exp(−a²/2) · u · P(u) with u = 1 / (1 + 0.35·a) and a minimax polynomial P: good to about 1e-7 of
// itself also in the lower tail, where 1 + erf would leave nothing, and the derivative needs no second exponential.

#pragma once

#include "types.cuh"

// |x|, but at most 14: beyond, all is 0 or 1 already, and the square stays a number.
__device__ __forceinline__ float gelu_distance(float x) {
    return fabsf(x) > 14.0f ? 14.0f : fabsf(x);
}

// Of |x|: exp(−x²/2), and what it is multiplied with to give Φ(−|x|).
__device__ __forceinline__ float2 gelu_tail(float distance) {
    const float u = __fdividef(1.0f, fmaf(0.35f, distance, 1.0f));
    float p = fmaf(-0.029146722f, u, 0.14397545f);
    p = fmaf(p, u, -0.25572178f);
    p = fmaf(p, u, 0.15918244f);
    p = fmaf(p, u, -0.023115296f);
    p = fmaf(p, u, 0.1055102f);
    p = fmaf(p, u, 0.119832344f);
    p = fmaf(p, u, 0.13986194f);
    p = fmaf(p, u, 0.1396214f);
    return make_float2(expf(-0.5f * distance * distance), u * p);
}

// x · Φ(x)
__device__ __forceinline__ float gelu(float x) {
    const float distance = gelu_distance(x);
    const float2 tail = gelu_tail(distance);
    // Φ may be below what is a number where x · Φ(x) is not yet: the exponential comes last.
    return x > 0.0f ? x * fmaf(-tail.x, tail.y, 1.0f) : -distance * tail.y * tail.x;
}

// Φ(x) + x · φ(x)
__device__ __forceinline__ float gelu_derivative(float x) {
    const float distance = gelu_distance(x);
    const float2 tail = gelu_tail(distance);
    // φ(x) = exp(−x²/2) / √(2π)
    const float density = distance * 0.3989423f;
    return x > 0.0f ? fmaf(tail.x, density - tail.y, 1.0f) : tail.x * (tail.y - density);
}
