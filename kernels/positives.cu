// The similarity of each query with its own document, and what it adds to the gradients. Embeddings are multiplied
// with their norms, where there are any, before anything else: plain products of long or short ones leave single
// precision.
//
//     forward             similarity[row] = queries[row] · documents[row]
//     backward            output[row] += σ · gradient[row] · input[row], of one side: input is the other side
//     log_scale_gradient  output[row] += σ · gradient[row] · similarity[row]
//
// with σ = exp(log_scale). Launch: blocks of 256 threads, which have 8 of `count` rows of `width` values; one row each
// in `log_scale_gradient`.

#include "numerics.cuh"
#include "rows.cuh"

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(256) forward(
    const float *__restrict__ queries, const float *__restrict__ documents,
    OPTIONAL const float *__restrict__ query_norms, OPTIONAL const float *__restrict__ document_norms,
    float *__restrict__ similarity, u32 count, u32 width, u32 first_row
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const size_t place = size_t(first_row) + row;
    const float of_query = query_norms ? query_norms[place] : 1.0f;
    const float of_document = document_norms ? document_norms[place] : 1.0f;
    const float *query = queries + size_t(row) * width;
    const float *document = documents + size_t(row) * width;
    float sum = 0.0f;
    with_layout(width, have_fours(width, queries, documents), [&](auto layout) {
        using L = decltype(layout);
        for_columns(layout, width, [&](int, u32 column) {
            const Floats<L::N> q = load<L::N>(query + column);
            const Floats<L::N> d = load<L::N>(document + column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                sum = fmaf(q.v[i] * of_query, d.v[i] * of_document, sum);
            }
        });
    });
    sum = row_sum(sum);
    if (lane_of_row() == 0) {
        similarity[place] = sum;
    }
}
#endif

#ifdef BACKWARD
extern "C" __global__ void __launch_bounds__(256) backward(
    const float *__restrict__ input, OPTIONAL const float *__restrict__ norms, const float *__restrict__ log_scale,
    const float *__restrict__ gradient, float *__restrict__ output, u32 count, u32 width, u32 first_row
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const size_t place = size_t(first_row) + row;
    const float factor = exponential(log_scale[0]) * gradient[place];
    const float norm = norms ? norms[place] : 1.0f;
    const float *from = input + size_t(row) * width;
    float *to = output + size_t(row) * width;
    with_layout(width, have_fours(width, input, output), [&](auto layout) {
        using L = decltype(layout);
        for_columns(layout, width, [&](int, u32 column) {
            const Floats<L::N> x = load<L::N>(from + column);
            Floats<L::N> values = load<L::N>(to + column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                values.v[i] = fmaf(factor, x.v[i] * norm, values.v[i]);
            }
            store(to + column, values);
        });
    });
}
#endif

#ifdef LOG_SCALE_GRADIENT
extern "C" __global__ void __launch_bounds__(256) log_scale_gradient(
    const float *__restrict__ log_scale, const float *__restrict__ gradient, const float *__restrict__ similarity,
    float *__restrict__ output, u32 count
) {
    const u32 row = blockIdx.x * 256 + threadIdx.x;
    if (row < count) {
        output[row] += gradient[row] * exponential(log_scale[0]) * similarity[row];
    }
}
#endif
