// Sums: of all elements, of their squares, of columns.
//
//     sum             output[base + g] = Σ of part g of the input (or of its squares)
//     finish          output[0] (+)= factor · Σ input
//     column_sum      output[part·width + c] = Σ_r input[r, c] over the rows of a part
//     finish_columns  output[c] (+)= Σ_part input[part·width + c]
//
// Launch: a block of `sum` adds `part` elements, one of `finish` all there are. A block of `column_sum` and
// `finish_columns` has 256 columns, and four lines of threads that share the terms; `column_sum` as many lines of
// blocks as there are parts.

#include "reduce.cuh"
#include "vectors.cuh"

#ifdef SUM
// From four values of a thread to its next four.
constexpr u32 STRIDE = 4 * 256;

extern "C" __global__ void __launch_bounds__(256) sum(
    const float *__restrict__ input, float *__restrict__ output, u32 count, u32 part, u32 output_base,
    OPTIONAL u32 squares
) {
    const size_t first = size_t(blockIdx.x) * part;
    const u32 here = u32(min(size_t(part), count - first));
    const float *values = input + first;
    // Four sums a thread, so that none has to wait for the one before.
    float sums[4] = {};
    const auto add = [&](int i, float value) { sums[i] = fmaf(value, squares ? value : 1.0f, sums[i]); };
    const auto add_four = [&](const Floats<4> &four) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            add(i, four.v[i]);
        }
    };
    u32 done = 0;
    if (are_aligned(values)) {
        done = here / 4 * 4;
        u32 i = 4 * threadIdx.x;
        for (; i + 3 * STRIDE < done; i += 4 * STRIDE) {
            Floats<4> fours[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                fours[j] = load<4>(values + i + j * STRIDE);
            }
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                add_four(fours[j]);
            }
        }
        for (; i < done; i += STRIDE) {
            add_four(load<4>(values + i));
        }
    }
    for (u32 i = done + threadIdx.x; i < here; i += 256) {
        add(0, values[i]);
    }
    const float total = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (threadIdx.x == 0) {
        output[output_base + blockIdx.x] = total;
    }
}
#endif

#ifdef FINISH
extern "C" __global__ void __launch_bounds__(256) finish(
    const float *__restrict__ input, float *__restrict__ output, u32 count, float factor, OPTIONAL u32 accumulate
) {
    float total = 0.0f;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += 256) {
        total += input[i];
    }
    total = block_sum(total) * factor;
    if (threadIdx.x == 0) {
        output[0] = accumulate ? output[0] + total : total;
    }
}
#endif

#if defined(COLUMN_SUM) || defined(FINISH_COLUMNS)
constexpr u32 BLOCK_COLUMNS = 256;
constexpr u32 LINES = 4;

// The sum of a column over some rows, for the first line of threads. Every thread of the block has to call.
__device__ __forceinline__ float sum_of_rows(const float *input, size_t first, size_t end, u32 width, u32 column) {
    __shared__ float of_lines[LINES][BLOCK_COLUMNS];
    const u32 line = threadIdx.x / BLOCK_COLUMNS;
    float total = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (size_t row = first + line; row < end; row += LINES) {
            total += input[row * width + column];
        }
    }
    of_lines[line][threadIdx.x % BLOCK_COLUMNS] = total;
    __syncthreads();
    total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < LINES; i++) {
        total += of_lines[i][threadIdx.x % BLOCK_COLUMNS];
    }
    return total;
}
#endif

#ifdef COLUMN_SUM
extern "C" __global__ void __launch_bounds__(1024) column_sum(
    const float *__restrict__ input, float *__restrict__ output, u32 count, u32 width, u32 part, u32 output_base
) {
    const u32 column = blockIdx.x * BLOCK_COLUMNS + threadIdx.x % BLOCK_COLUMNS;
    const size_t first = size_t(blockIdx.y) * part;
    const float total = sum_of_rows(input, first, min(first + part, size_t(count)), width, column);
    if (column < width && threadIdx.x < BLOCK_COLUMNS) {
        output[output_base + size_t(blockIdx.y) * width + column] = total;
    }
}
#endif

#ifdef FINISH_COLUMNS
extern "C" __global__ void __launch_bounds__(1024) finish_columns(
    const float *__restrict__ input, float *__restrict__ output, u32 count, u32 width, OPTIONAL u32 accumulate
) {
    const u32 column = blockIdx.x * BLOCK_COLUMNS + threadIdx.x % BLOCK_COLUMNS;
    const float total = sum_of_rows(input, 0, count, width, column);
    if (column < width && threadIdx.x < BLOCK_COLUMNS) {
        output[column] = accumulate ? output[column] + total : total;
    }
}
#endif
