// The gradient of the Gaussian error linear unit: gradient[i] *= Φ(input[i]) + input[i] · φ(input[i]).
//
// Launch: blocks of 64 threads for 256 elements, `count` elements in all.

#include "elements.cuh"
#include "gelu.cuh"

#ifdef BACKWARD
extern "C" __global__ void __launch_bounds__(64) backward(
    const float *__restrict__ input, float *__restrict__ gradient, u32 count
) {
    for_elements(count, are_aligned(input, gradient), [&](auto together, size_t at) {
        constexpr int N = decltype(together)::N;
        const Floats<N> x = load<N>(input + at);
        Floats<N> values = load<N>(gradient + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            values.v[i] *= gelu_derivative(x.v[i]);
        }
        store(gradient + at, values);
    });
}
#endif
