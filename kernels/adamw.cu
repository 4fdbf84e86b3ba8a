// A step of AdamW (arXiv 1711.05101), with g the gradient, scaled down to a norm of `clip` at most if its square norm
// is given:
//
//     first = β₁·first + (1 − β₁)·g ;  second = β₂·second + (1 − β₂)·g²
//     parameter = min( parameter · keep − rate · first / (√second · second_scale + ε), largest )
//
// with keep = 1 − η·decay, rate = η / (1 − β₁ᵗ) and second_scale = 1 / √(1 − β₂ᵗ).
//
// Launch: blocks of 64 threads for 256 elements, `count` elements in all.

#include "elements.cuh"

#ifdef UPDATE
extern "C" __global__ void __launch_bounds__(64) update(
    float *__restrict__ parameter, const float *__restrict__ gradient, float *__restrict__ first_moment,
    float *__restrict__ second_moment, OPTIONAL const float *__restrict__ square_norm, u32 count, float keep_first,
    float add_first, float keep_second, float add_second, float rate, float second_scale, float epsilon, float keep,
    float largest, OPTIONAL float clip
) {
    float gradient_scale = 1.0f;
    if (square_norm) {
        const float norm = sqrtf(square_norm[0]);
        if (norm > clip) {
            gradient_scale = clip / norm;
        }
    }
    const bool aligned = are_aligned(parameter, gradient, first_moment, second_moment);
    for_elements(count, aligned, [&](auto together, size_t at) {
        constexpr int N = decltype(together)::N;
        const Floats<N> g = load<N>(gradient + at);
        Floats<N> first = load<N>(first_moment + at);
        Floats<N> second = load<N>(second_moment + at);
        Floats<N> values = load<N>(parameter + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float scaled = g.v[i] * gradient_scale;
            first.v[i] = keep_first * first.v[i] + add_first * scaled;
            second.v[i] = keep_second * second.v[i] + add_second * scaled * scaled;
            const float step = rate * first.v[i] / (sqrtf(second.v[i]) * second_scale + epsilon);
            const float moved = values.v[i] * keep - step;
            // Not a minimum, which would hide what is no number.
            values.v[i] = moved > largest ? largest : moved;
        }
        store(first_moment + at, first);
        store(second_moment + at, second);
        store(parameter + at, values);
    });
}
#endif
