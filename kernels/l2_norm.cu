// Rows divided by their length.
//
//     forward        output = input / max(|input|, 1e-12) ;  inverse_norm = 1 / max(|input|, 1e-12)
//     backward       d_input = (upstream − output · (output · upstream)) · inverse_norm
//     gradient       the same in place, from the input:
//                    output = (output − unit · (unit · output)) / |input|  with  unit = input / |input|
//
// Launch: blocks of 256 threads, which have 8 of `count` rows of `width` values.

#ifdef BACKWARD
#include "rows.cuh"
#else
#include "row_norm.cuh"
#endif

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(256) forward(
    const float *__restrict__ input, float *__restrict__ output, float *__restrict__ inverse_norm, u32 count, u32 width
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const size_t start = size_t(row) * width;
    with_layout(width, have_fours(width, input, output), [&](auto layout) {
        using L = decltype(layout);
        const RowValues<L> x(input + start, width);
        const RowNorm norm = row_norm(layout, x, width);
        for_columns(layout, width, [&](int place, u32 column) {
            Floats<L::N> values = x.at(place, column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                values.v[i] = (values.v[i] * norm.scale) * norm.unit;
            }
            store(output + start + column, values);
        });
        if (lane_of_row() == 0) {
            inverse_norm[row] = norm.scale * norm.unit;
        }
    });
}
#endif

#ifdef BACKWARD
extern "C" __global__ void __launch_bounds__(256, 2) backward(
    const float *__restrict__ upstream, const float *__restrict__ output, const float *__restrict__ inverse_norm,
    float *__restrict__ d_input, u32 count, u32 width
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const size_t start = size_t(row) * width;
    const float inverse = inverse_norm[row];
    with_layout(width, have_fours(width, upstream, output, d_input), [&](auto layout) {
        using L = decltype(layout);
        const RowValues<L> of_upstream(upstream + start, width);
        const RowValues<L> of_output(output + start, width);
        float along = 0.0f;
        for_columns(layout, width, [&](int place, u32 column) {
            const Floats<L::N> u = of_upstream.at(place, column);
            const Floats<L::N> y = of_output.at(place, column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                along = fmaf(y.v[i], u.v[i], along);
            }
        });
        along = row_sum(along);
        for_columns(layout, width, [&](int place, u32 column) {
            Floats<L::N> u = of_upstream.at(place, column);
            const Floats<L::N> y = of_output.at(place, column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                u.v[i] = (u.v[i] - y.v[i] * along) * inverse;
            }
            store(d_input + start + column, u);
        });
    });
}
#endif

#ifdef GRADIENT
extern "C" __global__ void __launch_bounds__(256, 2) gradient(
    const float *__restrict__ input, float *__restrict__ output, u32 count, u32 width
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const size_t start = size_t(row) * width;
    with_layout(width, have_fours(width, input, output), [&](auto layout) {
        using L = decltype(layout);
        const RowValues<L> x(input + start, width);
        const RowValues<L> of_output(output + start, width);
        const RowNorm norm = row_norm(layout, x, width);
        float along = 0.0f;
        for_columns(layout, width, [&](int place, u32 column) {
            const Floats<L::N> values = x.at(place, column);
            const Floats<L::N> upstream = of_output.at(place, column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                along = fmaf((values.v[i] * norm.scale) * norm.unit, upstream.v[i], along);
            }
        });
        along = row_sum(along);
        for_columns(layout, width, [&](int place, u32 column) {
            const Floats<L::N> values = x.at(place, column);
            Floats<L::N> across = of_output.at(place, column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                across.v[i] -= ((values.v[i] * norm.scale) * norm.unit) * along;
                across.v[i] *= norm.scale * norm.unit;
            }
            store(output + start + column, across);
        });
    });
}
#endif
