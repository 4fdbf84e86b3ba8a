// Loops over similarity matrices that are stored, of the method that the fused loss is measured against. Of matrices of
// logits z (N, N), N = count:
//
//     omit_diagonal      logits[i, i] = NO_ENTRY
//     row_statistics     statistics[first + i] = max_j z[i, j] and Σ_j exp(z[i, j] − max)
//     column_statistics  statistics[first + part·N + j] = the same of column j, over the rows of a part
//     finish             log_sum_exp[i] = log Σ exp z over all parts of statistics (parts, N)
//                        losses[i] += weight · (log_sum_exp[i] − logits[i, i])
//     gradient           logits[i, j] = w_r·exp(z[i, j] − L_r[i]) + w_c·exp(z[i, j] − L_c[j]) − (positive where i = j)
//
// Launch: blocks of 256 threads; of `row_statistics` a block for each row in x. The others have 256 rows or columns in
// x, and `column_statistics` in y the parts of `part` rows, `gradient` four rows each. A block of `gradient` is 64
// threads with four columns each.

#include "numerics.cuh"
#include "vectors.cuh"
#ifdef ROW_STATISTICS
#include "reduce.cuh"
#endif

#if defined(ROW_STATISTICS) || defined(COLUMN_STATISTICS)
// A reference and a sum of exponentials relative to it, with logits more. As long as none is above the reference, each
// costs one exponential.
template <int N> __device__ __forceinline__ void add(float2 &known, const Floats<N> &logits) {
    float largest = known.x;
#pragma unroll
    for (int i = 0; i < N; i++) {
        largest = fmaxf(largest, logits.v[i]);
    }
    if (largest > known.x) {
        known.y *= exponential(known.x - largest);
        known.x = largest;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        sum += exponential(logits.v[i] - largest);
    }
    known.y += sum;
}
#endif

#ifdef OMIT_DIAGONAL
extern "C" __global__ void __launch_bounds__(256) omit_diagonal(float *__restrict__ logits, u32 count) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i < count) {
        logits[size_t(i) * count + i] = NO_ENTRY;
    }
}
#endif

#ifdef ROW_STATISTICS
// Adds the logits of a row, N side by side at a time and four such runs under way.
template <int N> __device__ __forceinline__ void add_row(float2 &known, const float *row, u32 count) {
    constexpr u32 STEP = 256 * N;
    u32 column = threadIdx.x * N;
    for (; column + 3 * STEP < count; column += 4 * STEP) {
        Floats<4 * N> logits;
#pragma unroll
        for (int run = 0; run < 4; run++) {
            const Floats<N> loaded = load<N>(row + column + run * STEP);
#pragma unroll
            for (int i = 0; i < N; i++) {
                logits.v[run * N + i] = loaded.v[i];
            }
        }
        add(known, logits);
    }
    for (; column < count; column += STEP) {
        add(known, load<N>(row + column));
    }
}

extern "C" __global__ void __launch_bounds__(256) row_statistics(
    const float *__restrict__ logits, float2 *__restrict__ statistics, u32 count, u32 first
) {
    const float *row = logits + size_t(blockIdx.x) * count;
    float2 known = make_float2(NO_ENTRY, 0.0f);
    if (have_fours(count, logits)) {
        add_row<4>(known, row, count);
    } else {
        add_row<1>(known, row, count);
    }
    const float largest = block_max(known.x);
    const float sum = block_sum(known.y * exponential(known.x - largest));
    if (threadIdx.x == 0) {
        statistics[size_t(first) + blockIdx.x] = make_float2(largest, sum);
    }
}
#endif

#ifdef COLUMN_STATISTICS
extern "C" __global__ void __launch_bounds__(256) column_statistics(
    const float *__restrict__ logits, float2 *__restrict__ statistics, u32 count, u32 first, u32 part
) {
    const u32 column = blockIdx.x * 256 + threadIdx.x;
    if (column >= count) {
        return;
    }
    const u32 start = blockIdx.y * part;
    const u32 end = min(start + part, count);
    const float *from = logits + size_t(start) * count + column;
    float2 known = make_float2(NO_ENTRY, 0.0f);
    u32 row = start;
    for (; row + 8 <= end; row += 8) {
        Floats<8> of_rows;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            of_rows.v[i] = from[size_t(i) * count];
        }
        add(known, of_rows);
        from += size_t(8) * count;
    }
    for (; row < end; row++) {
        add(known, load<1>(from));
        from += count;
    }
    statistics[size_t(first) + size_t(blockIdx.y) * count + column] = known;
}
#endif

#ifdef FINISH
extern "C" __global__ void __launch_bounds__(256) finish(
    const float *__restrict__ logits, const float2 *__restrict__ statistics, float *__restrict__ log_sum_exp,
    float *__restrict__ losses, u32 count, u32 parts, float weight
) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= count) {
        return;
    }
    float2 total = make_float2(NO_ENTRY, 0.0f);
#pragma unroll 4
    for (u32 part = 0; part < parts; part++) {
        const float2 more = statistics[size_t(part) * count + i];
        const float largest = fmaxf(total.x, more.x);
        const float known = total.y * exponential(total.x - largest);
        total = make_float2(largest, known + more.y * exponential(more.x - largest));
    }
    const float of_row = total.x + logarithm(total.y);
    log_sum_exp[i] = of_row;
    losses[i] += weight * (of_row - logits[size_t(i) * count + i]);
}
#endif

#ifdef GRADIENT
// Replaces four rows of N columns.
template <int N>
__device__ __forceinline__ void replace(
    float *logits, const float *row_log_sum_exp, const float *column_log_sum_exp, u32 column, u32 count,
    float row_weight, float column_weight, float positive
) {
    const u32 first = blockIdx.y * 4;
    float *from = logits + size_t(first) * count + column;
    Floats<N> of_columns;
    if (column_log_sum_exp) {
        of_columns = load<N>(column_log_sum_exp + column);
    }
    Floats<N> z[4];
#pragma unroll
    for (u32 row = 0; row < 4; row++) {
        if (first + row < count) {
            z[row] = load<N>(from + size_t(row) * count);
        }
    }
#pragma unroll
    for (u32 row = 0; row < 4; row++) {
        if (first + row < count) {
            Floats<N> values;
            const float of_row = row_log_sum_exp ? row_log_sum_exp[first + row] : 0.0f;
#pragma unroll
            for (int i = 0; i < N; i++) {
                float value = first + row == column + i ? -positive : 0.0f;
                if (row_log_sum_exp) {
                    value += row_weight * exponential(z[row].v[i] - of_row);
                }
                if (column_log_sum_exp) {
                    value += column_weight * exponential(z[row].v[i] - of_columns.v[i]);
                }
                values.v[i] = value;
            }
            store(from + size_t(row) * count, values);
        }
    }
}

extern "C" __global__ void __launch_bounds__(64) gradient(
    float *__restrict__ logits, OPTIONAL const float *__restrict__ row_log_sum_exp,
    OPTIONAL const float *__restrict__ column_log_sum_exp, u32 count, OPTIONAL float row_weight,
    OPTIONAL float column_weight, float positive
) {
    if (have_fours(count, logits, column_log_sum_exp)) {
        const u32 column = blockIdx.x * 256 + 4 * threadIdx.x;
        if (column < count) {
            replace<4>(
                logits, row_log_sum_exp, column_log_sum_exp, column, count, row_weight, column_weight, positive
            );
        }
    } else {
        for (u32 i = 0; i < 4; i++) {
            const u32 column = blockIdx.x * 256 + i * 64 + threadIdx.x;
            if (column < count) {
                replace<1>(
                    logits, row_log_sum_exp, column_log_sum_exp, column, count, row_weight, column_weight, positive
                );
            }
        }
    }
}
#endif
