// Operations that touch each element once.
//
//     fill            output = value
//     copy            output[i] (+)= input[i]
//     scale           output *= factor[0]
//     column          output[i] = input[i·width]
//     clamp_largest   output = min(input, largest)
//     clamp_backward  output = 0 where input > largest
//
// Launch: blocks of 64 threads for 256 elements, `count` elements in all.

#include "elements.cuh"

#ifdef FILL
extern "C" __global__ void __launch_bounds__(64) fill(float *__restrict__ output, u32 count, float value) {
    for_elements(count, are_aligned(output), [&](auto together, size_t at) {
        constexpr int N = decltype(together)::N;
        Floats<N> values;
#pragma unroll
        for (int i = 0; i < N; i++) {
            values.v[i] = value;
        }
        store(output + at, values);
    });
}
#endif

#ifdef COPY
extern "C" __global__ void __launch_bounds__(64) copy(
    const float *__restrict__ input, float *__restrict__ output, u32 count, OPTIONAL u32 accumulate
) {
    for_elements(count, are_aligned(input, output), [&](auto together, size_t at) {
        constexpr int N = decltype(together)::N;
        Floats<N> values = load<N>(input + at);
        if (accumulate) {
            const Floats<N> before = load<N>(output + at);
#pragma unroll
            for (int i = 0; i < N; i++) {
                values.v[i] += before.v[i];
            }
        }
        store(output + at, values);
    });
}
#endif

#ifdef SCALE
extern "C" __global__ void __launch_bounds__(64) scale(
    const float *__restrict__ factor, float *__restrict__ output, u32 count
) {
    for_elements(count, are_aligned(output), [&](auto together, size_t at) {
        constexpr int N = decltype(together)::N;
        Floats<N> values = load<N>(output + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            values.v[i] *= factor[0];
        }
        store(output + at, values);
    });
}
#endif

#ifdef COLUMN
extern "C" __global__ void __launch_bounds__(64) column(
    const float *__restrict__ input, float *__restrict__ output, u32 count, u32 width
) {
    for_elements(count, false, [&](auto, size_t at) { output[at] = input[at * width]; });
}
#endif

#ifdef CLAMP_LARGEST
extern "C" __global__ void __launch_bounds__(64) clamp_largest(
    const float *__restrict__ input, float *__restrict__ output, u32 count, float largest
) {
    for_elements(count, are_aligned(input, output), [&](auto together, size_t at) {
        constexpr int N = decltype(together)::N;
        Floats<N> values = load<N>(input + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            values.v[i] = fminf(values.v[i], largest);
        }
        store(output + at, values);
    });
}
#endif

#ifdef CLAMP_BACKWARD
extern "C" __global__ void __launch_bounds__(64) clamp_backward(
    const float *__restrict__ input, float *__restrict__ output, u32 count, float largest
) {
    for_elements(count, are_aligned(input, output), [&](auto together, size_t at) {
        constexpr int N = decltype(together)::N;
        const Floats<N> values = load<N>(input + at);
        Floats<N> gradient = load<N>(output + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            gradient.v[i] = values.v[i] > largest ? 0.0f : gradient.v[i];
        }
        store(output + at, gradient);
    });
}
#endif
