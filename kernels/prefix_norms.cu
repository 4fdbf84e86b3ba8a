// Lengths of the first values of every row, for nested widths and squared distances.
//
//     forward   output[row] = 1 / max(|x|, 1e-12), or |x|² / 2, with x the first `prefix` values of the row
//     backward  d_input[row, c] −= input[row, c] · Σ_w along[w, row] · inverse_norms[w, row]²
//               over the prefixes w that hold column c, without the norms if there are none; a launch has the columns
//               of one segment, which all are in the same prefixes: those from `first_prefix` on
//
// Launch: blocks of 256 threads, which have 8 of `count` rows of `width` values. One launch a prefix.

#include "row_norm.cuh"

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(256) forward(
    const float *__restrict__ input, float *__restrict__ output, u32 count, u32 width, u32 prefix,
    OPTIONAL u32 half_square
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const float *start = input + size_t(row) * width;
    with_layout(prefix, have_fours(width, input) && prefix % 4 == 0, [&](auto layout) {
        using L = decltype(layout);
        const RowValues<L> x(start, prefix);
        float value;
        if (half_square) {
            float square = 0.0f;
            for_columns(layout, prefix, [&](int place, u32 column) {
                const Floats<L::N> values = x.at(place, column);
#pragma unroll
                for (int i = 0; i < L::N; i++) {
                    square = fmaf(values.v[i], values.v[i], square);
                }
            });
            value = 0.5f * row_sum(square);
        } else {
            const RowNorm norm = row_norm(layout, x, prefix);
            value = norm.scale * norm.unit;
        }
        if (lane_of_row() == 0) {
            output[row] = value;
        }
    });
}
#endif

#ifdef BACKWARD
extern "C" __global__ void __launch_bounds__(256) backward(
    const float *__restrict__ input, const float *__restrict__ along, OPTIONAL const float *__restrict__ inverse_norms,
    float *__restrict__ d_input, u32 count, u32 width, u32 first_row, u32 rows, u32 first_prefix, u32 prefixes,
    u32 first_column, u32 end_column
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    float factor = 0.0f;
    for (u32 w = first_prefix; w < prefixes; w++) {
        const size_t i = size_t(w) * rows + first_row + row;
        const float norm = inverse_norms ? inverse_norms[i] : 1.0f;
        factor += along[i] * norm * norm;
    }
    const float *from = input + size_t(row) * width + first_column;
    float *to = d_input + size_t(row) * width + first_column;
    const u32 columns = end_column - first_column;
    const auto subtract = [&](auto layout) {
        using L = decltype(layout);
        for_columns(layout, columns, [&](int, u32 column) {
            const Floats<L::N> x = load<L::N>(from + column);
            Floats<L::N> gradient = load<L::N>(to + column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                gradient.v[i] -= factor * x.v[i];
            }
            store(to + column, gradient);
        });
    };
    if (have_fours(width, input, d_input) && first_column % 4 == 0 && columns % 4 == 0) {
        subtract(Layout<4, false>());
    } else {
        subtract(Layout<1, false>());
    }
}
#endif
