// Layer normalisation (arXiv 1607.06450), with dropout and the residual connection before it.
//
//     forward      x = residual + dropout(input) ;  normalised = (x − mean) · rstd ;  output = normalised · gain + bias
//     backward     with u = upstream · gain:
//                  d_residual = rstd · (u − mean(u) − normalised · mean(u · normalised))
//                  d_input = dropout(d_residual)
//     column_sums  partial[part, 0] = Σ upstream · normalised and partial[part, 1] = Σ upstream over the rows of a part
//     finish       d_gain += Σ_part partial[part, 0] ;  d_bias += Σ_part partial[part, 1]
//
// Launch: blocks of 256 threads. Forward and backward they have 8 of `count` rows of `width` values, and each lane
// fours of columns that lie side by side, because these share their random words. In `column_sums` and `finish` they
// have 32 columns; `column_sums` has as many lines of blocks as there are parts of `part` rows.

#if defined(FORWARD) || defined(BACKWARD)
#include "dropout.cuh"
#include "rows.cuh"
#else
#include "columns.cuh"
#endif

#if defined(FORWARD) || defined(BACKWARD)
// Multiplies the values of a run of columns with their factors.
template <int N>
__device__ __forceinline__ void drop(Floats<N> &values, const Dropout &mask, u32 row, u32 column) {
    if constexpr (N == 4) {
        const float4 factors = dropout_factors(mask, row, column / 4);
        values.v[0] *= factors.x;
        values.v[1] *= factors.y;
        values.v[2] *= factors.z;
        values.v[3] *= factors.w;
    } else {
        values.v[0] *= dropout_factor(mask, row, column);
    }
}
#endif

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(256, 3) forward(
    const float *__restrict__ input, OPTIONAL const float *__restrict__ residual, const float *__restrict__ gain,
    const float *__restrict__ bias, float *__restrict__ output, OPTIONAL float *__restrict__ normalised,
    OPTIONAL float *__restrict__ rstd, u32 count, u32 width, u32 first_row, float epsilon, OPTIONAL u32 dropout,
    OPTIONAL u32 dropout_row, OPTIONAL u32 dropout_site, OPTIONAL u32 dropout_step, OPTIONAL u32 dropout_key_low,
    OPTIONAL u32 dropout_key_high, OPTIONAL u32 dropout_threshold, OPTIONAL float dropout_scale
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const Dropout mask{
        dropout_row, dropout_site, dropout_step, dropout_key_low, dropout_key_high, dropout_threshold, dropout_scale
    };
    const size_t start = size_t(row) * width;
    const bool fours = have_fours(width, input, residual, gain, bias, output, normalised);
    with_layout(width, fours, [&](auto layout) {
        using L = decltype(layout);
        constexpr int N = L::N;
        // Where x is not held, the output holds it meanwhile; each lane reads only what it wrote.
        RowValues<L> x = L::HELD ? RowValues<L>(input + start, width) : RowValues<L>(output + start);
        const auto connect = [&](Floats<N> &values, u32 column) {
            const Floats<N> before = load<N>(residual + start + column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                values.v[i] += before.v[i];
            }
        };
        if constexpr (L::HELD) {
            // In loops of their own, so that a lane's reads are under way together.
            if (dropout) {
                for_columns(layout, width, [&](int place, u32 column) { drop(x.held[place], mask, row, column); });
            }
            if (residual) {
                for_columns(layout, width, [&](int place, u32 column) { connect(x.held[place], column); });
            }
        } else {
            for_columns(layout, width, [&](int, u32 column) {
                Floats<N> values = load<N>(input + start + column);
                if (dropout) {
                    drop(values, mask, row, column);
                }
                if (residual) {
                    connect(values, column);
                }
                store(output + start + column, values);
            });
        }
        float sum = 0.0f;
        for_columns(layout, width, [&](int place, u32 column) {
            const Floats<N> values = x.at(place, column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                sum += values.v[i];
            }
        });
        const float mean = row_sum(sum) / float(width);
        float square = 0.0f;
        for_columns(layout, width, [&](int place, u32 column) {
            const Floats<N> values = x.at(place, column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float deviation = values.v[i] - mean;
                square = fmaf(deviation, deviation, square);
            }
        });
        const float row_rstd = 1.0f / sqrtf(row_sum(square) / float(width) + epsilon);
        for_columns(layout, width, [&](int place, u32 column) {
            Floats<N> values = x.at(place, column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                values.v[i] = (values.v[i] - mean) * row_rstd;
            }
            if (normalised) {
                store(normalised + start + column, values);
            }
            const Floats<N> factor = load<N>(gain + column);
            const Floats<N> offset = load<N>(bias + column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                values.v[i] = fmaf(values.v[i], factor.v[i], offset.v[i]);
            }
            store(output + start + column, values);
        });
        if (rstd && lane_of_row() == 0) {
            rstd[size_t(first_row) + row] = row_rstd;
        }
    });
}
#endif

#ifdef BACKWARD
extern "C" __global__ void __launch_bounds__(256, 2) backward(
    const float *__restrict__ upstream, const float *__restrict__ normalised, const float *__restrict__ rstd,
    const float *__restrict__ gain, float *__restrict__ d_input, OPTIONAL float *__restrict__ d_residual, u32 count,
    u32 width, u32 first_row, OPTIONAL u32 dropout, OPTIONAL u32 dropout_row, OPTIONAL u32 dropout_site,
    OPTIONAL u32 dropout_step, OPTIONAL u32 dropout_key_low, OPTIONAL u32 dropout_key_high,
    OPTIONAL u32 dropout_threshold, OPTIONAL float dropout_scale
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    const Dropout mask{
        dropout_row, dropout_site, dropout_step, dropout_key_low, dropout_key_high, dropout_threshold, dropout_scale
    };
    const size_t start = size_t(row) * width;
    const float row_rstd = rstd[size_t(first_row) + row];
    const bool fours = have_fours(width, upstream, normalised, gain, d_input, d_residual);
    with_layout(width, fours, [&](auto layout) {
        using L = decltype(layout);
        constexpr int N = L::N;
        RowValues<L> of_upstream(upstream + start, width);
        const RowValues<L> of_normalised(normalised + start, width);
        float sum = 0.0f;
        float sum_along = 0.0f;
        for_columns(layout, width, [&](int place, u32 column) {
            Floats<N> u = of_upstream.at(place, column);
            const Floats<N> values = of_normalised.at(place, column);
            const Floats<N> factor = load<N>(gain + column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                u.v[i] *= factor.v[i];
                sum += u.v[i];
                sum_along = fmaf(u.v[i], values.v[i], sum_along);
            }
            if constexpr (L::HELD) {
                of_upstream.held[place] = u;
            }
        });
        const float mean = row_sum(sum) / float(width);
        const float along = row_sum(sum_along) / float(width);
        for_columns(layout, width, [&](int place, u32 column) {
            Floats<N> gradient = of_upstream.at(place, column);
            const Floats<N> values = of_normalised.at(place, column);
            if constexpr (!L::HELD) {
                const Floats<N> factor = load<N>(gain + column);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    gradient.v[i] *= factor.v[i];
                }
            }
#pragma unroll
            for (int i = 0; i < N; i++) {
                gradient.v[i] = row_rstd * (gradient.v[i] - mean - values.v[i] * along);
            }
            if (d_residual) {
                store(d_residual + start + column, gradient);
            }
            if (dropout) {
                drop(gradient, mask, row, column);
            }
            store(d_input + start + column, gradient);
        });
    });
}
#endif

#ifdef COLUMN_SUMS
extern "C" __global__ void __launch_bounds__(256) column_sums(
    const float *__restrict__ upstream, const float *__restrict__ normalised, float *__restrict__ partial, u32 count,
    u32 width, u32 part, u32 first_part
) {
    const u32 column = blockIdx.x * COLUMNS + column_of_lane();
    float of_gain = 0.0f;
    float of_bias = 0.0f;
    if (column < width) {
        const size_t end = min((size_t(blockIdx.y) + 1) * part, size_t(count));
#pragma unroll 4
        for (size_t row = size_t(blockIdx.y) * part + line_of_column(); row < end; row += COLUMN_LINES) {
            const float gradient = upstream[row * width + column];
            of_gain = fmaf(gradient, normalised[row * width + column], of_gain);
            of_bias += gradient;
        }
    }
    of_gain = column_sum(of_gain);
    of_bias = column_sum(of_bias);
    if (column < width && line_of_column() == 0) {
        const size_t at = 2 * (size_t(first_part) + blockIdx.y) * width + column;
        partial[at] = of_gain;
        partial[at + width] = of_bias;
    }
}
#endif

#ifdef FINISH
extern "C" __global__ void __launch_bounds__(256) finish(
    const float *__restrict__ partial, float *__restrict__ d_gain, float *__restrict__ d_bias, u32 count, u32 width
) {
    const u32 column = blockIdx.x * COLUMNS + column_of_lane();
    float of_gain = 0.0f;
    float of_bias = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (u32 part = line_of_column(); part < count; part += COLUMN_LINES) {
            const size_t at = 2 * size_t(part) * width + column;
            of_gain += partial[at];
            of_bias += partial[at + width];
        }
    }
    of_gain = column_sum(of_gain);
    of_bias = column_sum(of_bias);
    if (column < width && line_of_column() == 0) {
        d_gain[column] += of_gain;
        d_bias[column] += of_bias;
    }
}
#endif
