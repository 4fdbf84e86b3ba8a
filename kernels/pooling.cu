// From the rows of each sequence to one vector: their mean, or if `cls` the first of them.
//
//     forward   output[s] = Σ input[row] / length over the rows of sequence s
//     backward  d_input[row] = upstream[s] / length
//
// The rows may be a part of all, which several launches have in turn: a launch leaves out those of other parts, and
// if `accumulate` adds to what the earlier ones gave.
//
// Launch: blocks of 256 threads, which have 32 columns of a sequence; `columns` blocks a sequence.

#include "columns.cuh"

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(256) forward(
    const u32 *__restrict__ offsets, const float *__restrict__ input, float *__restrict__ output, u32 first_row,
    u32 count, u32 width, u32 columns, OPTIONAL u32 cls, OPTIONAL u32 accumulate
) {
    const u32 sequence = blockIdx.x / columns;
    const u32 column = blockIdx.x % columns * COLUMNS + column_of_lane();
    const u32 begin = offsets[sequence];
    const u32 length = cls ? 1 : max(offsets[sequence + 1], begin + 1) - begin;
    const u32 first = max(begin, first_row);
    const u32 end = min(begin + length, first_row + count);
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 4
        for (u32 row = first + line_of_column(); row < end; row += COLUMN_LINES) {
            sum += input[size_t(row - first_row) * width + column];
        }
    }
    sum = column_sum(sum) / float(length);
    if (column < width && line_of_column() == 0) {
        float *to = output + size_t(sequence) * width + column;
        *to = accumulate ? *to + sum : sum;
    }
}
#endif

#ifdef BACKWARD
extern "C" __global__ void __launch_bounds__(256) backward(
    const u32 *__restrict__ offsets, const float *__restrict__ upstream, float *__restrict__ d_input, u32 first_row,
    u32 count, u32 width, u32 columns, OPTIONAL u32 cls
) {
    const u32 sequence = blockIdx.x / columns;
    const u32 column = blockIdx.x % columns * COLUMNS + column_of_lane();
    if (column >= width) {
        return;
    }
    const u32 begin = offsets[sequence];
    const u32 stop = offsets[sequence + 1];
    const float gradient = upstream[size_t(sequence) * width + column];
    // Of the first row, and of the others.
    const float of_first = cls ? gradient : gradient / float(max(stop, begin + 1) - begin);
    const float of_others = cls ? 0.0f : of_first;
    const u32 first = max(begin, first_row);
    const u32 end = min(stop, first_row + count);
    for (u32 row = first + line_of_column(); row < end; row += COLUMN_LINES) {
        d_input[size_t(row - first_row) * width + column] = row == begin ? of_first : of_others;
    }
}
#endif
