// Sums of word, position and token-type embeddings, and their gradients without atomics.
//
//     forward    output[row] = word[tokens[row]] + position[positions[row]] + token_type[0]
//     runs       adds upstream[row] to output[tokens[row]], for tokens that are within one run
//     joins      the same for tokens of several runs
//     positions  output[p] += Σ upstream[offsets[s] + p] over the sequences s that are longer than p
//
// `order` brings equal tokens together. It is cut into runs of 32 rows; what a run has of a token that has begun in an
// earlier one becomes its head, what it has of one that begins in it and goes on its tail. So a token's sum is that of
// one run, or a tail and the heads of all runs that follow, however often it occurs.
//
// The tables and the rows may be parts of larger ones, which several launches have in turn: a launch leaves out the
// tokens and rows that are not of its parts.
//
// Launch: blocks of 256 threads. Forward they have 8 of `count` rows. Else they have 32 columns, of `columns` times as
// many: 8 runs in `runs`, one run in `joins` and one position in `positions`.

#ifdef FORWARD
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(256) forward(
    const u32 *__restrict__ tokens, const u32 *__restrict__ positions, const float *__restrict__ word,
    const float *__restrict__ position, const float *__restrict__ token_type, float *__restrict__ output, u32 first_row,
    u32 count, u32 width, u32 first_token, u32 table_rows, u32 vocabulary, u32 position_rows
) {
    const u32 row = row_of_warp();
    if (row >= count) {
        return;
    }
    // What is beyond a table is not there to be read.
    const u32 token = min(tokens[size_t(first_row) + row], vocabulary - 1) - first_token;
    if (token >= table_rows) {
        return;
    }
    const u32 place = min(positions[size_t(first_row) + row], position_rows - 1);
    const float *of_word = word + size_t(token) * width;
    const float *of_position = position + size_t(place) * width;
    float *to = output + size_t(row) * width;
    with_layout(width, have_fours(width, word, position, token_type, output), [&](auto layout) {
        using L = decltype(layout);
        for_columns(layout, width, [&](int, u32 column) {
            Floats<L::N> values = load<L::N>(of_word + column);
            const Floats<L::N> second = load<L::N>(of_position + column);
            const Floats<L::N> third = load<L::N>(token_type + column);
#pragma unroll
            for (int i = 0; i < L::N; i++) {
                values.v[i] = values.v[i] + second.v[i] + third.v[i];
            }
            store(to + column, values);
        });
    });
}
#else
#include "columns.cuh"
#endif

#if defined(RUNS) || defined(JOINS)
// Rows of a run: one for each lane of a warp.
constexpr u32 RUN = WARP;

// Which token is where in the order, of `rows` rows.
struct Order {
    const u32 *tokens;
    const u32 *order;
    u32 rows;

    // The token that comes at a place. What is beyond the tokens is not there to be read.
    __device__ __forceinline__ u32 token_at(u32 place) const {
        return tokens[min(order[place], rows - 1)];
    }
};

// The part of the table that a launch writes.
struct Table {
    float *output;
    u32 first_token;
    u32 rows;
    u32 width;

    __device__ __forceinline__ void add(u32 token, u32 column, float value) const {
        const u32 row = token - first_token;
        if (row < rows) {
            output[size_t(row) * width + column] += value;
        }
    }
};
#endif

#ifdef RUNS
// Rows that are read at a time.
constexpr u32 AHEAD = 8;

extern "C" __global__ void __launch_bounds__(256) runs(
    const float *__restrict__ upstream, const u32 *__restrict__ tokens, const u32 *__restrict__ order,
    float *__restrict__ output, float *__restrict__ heads, float *__restrict__ tails, u32 first_row, u32 count,
    u32 rows, u32 width, u32 columns, u32 first_token, u32 table_rows
) {
    const u32 column = blockIdx.x % columns * COLUMNS + column_of_lane();
    const u32 run = blockIdx.x / columns * COLUMN_LINES + line_of_column();
    const u32 first = run * RUN;
    // The same for the whole warp.
    if (first >= rows) {
        return;
    }
    const Order all{tokens, order, rows};
    const Table table{output, first_token, table_rows, width};
    const u32 end = min(first + RUN, rows);
    // Each lane reads where one row is; places beyond the end have what the last one has.
    const u32 place = min(first + column_of_lane(), end - 1);
    const u32 own_row = order[place] - first_row;
    const u32 own_token = all.token_at(place);
    bool is_head = first > 0 && all.token_at(first - 1) == all.token_at(first);
    const bool goes_on = end < rows && all.token_at(end - 1) == all.token_at(end);
    u32 token = __shfl_sync(WHOLE_WARP, own_token, 0);
    float sum = 0.0f;
    for (u32 begin = 0; begin < end - first; begin += AHEAD) {
        float values[AHEAD];
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            const u32 row = __shfl_sync(WHOLE_WARP, own_row, begin + i);
            const bool is_there = first + begin + i < end && row < count && column < width;
            values[i] = is_there ? upstream[size_t(row) * width + column] : 0.0f;
        }
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            const u32 next = __shfl_sync(WHOLE_WARP, own_token, begin + i);
            if (next != token) {
                if (column < width) {
                    if (is_head) {
                        heads[size_t(run) * width + column] = sum;
                    } else {
                        table.add(token, column, sum);
                    }
                }
                is_head = false;
                token = next;
                sum = 0.0f;
            }
            sum += values[i];
        }
    }
    if (column < width) {
        if (is_head) {
            heads[size_t(run) * width + column] = sum;
        } else if (goes_on) {
            tails[size_t(run) * width + column] = sum;
        } else {
            table.add(token, column, sum);
        }
    }
}
#endif

#ifdef JOINS
extern "C" __global__ void __launch_bounds__(256) joins(
    const u32 *__restrict__ tokens, const u32 *__restrict__ order, const float *__restrict__ heads,
    const float *__restrict__ tails, float *__restrict__ output, u32 first_row, u32 count, u32 rows, u32 width,
    u32 columns, u32 first_token, u32 table_rows
) {
    const Order all{tokens, order, rows};
    const Table table{output, first_token, table_rows, width};
    const u32 run = blockIdx.x / columns;
    const u32 first = run * RUN;
    const u32 end = first + RUN;
    // Only where a token begins that goes on in the next run. All of this is the same for the whole block.
    if (end >= rows) {
        return;
    }
    const u32 token = all.token_at(end);
    if (all.token_at(end - 1) != token || (first > 0 && all.token_at(first - 1) == token)) {
        return;
    }
    const u32 column = blockIdx.x % columns * COLUMNS + column_of_lane();
    const u32 line = line_of_column();
    float sum = 0.0f;
    if (column < width) {
        if (line == 0) {
            sum = tails[size_t(run) * width + column];
        }
        for (u32 next = run + 1 + line; next * RUN < rows && all.token_at(next * RUN) == token; next += COLUMN_LINES) {
            sum += heads[size_t(next) * width + column];
        }
    }
    sum = column_sum(sum);
    if (column < width && line == 0) {
        table.add(token, column, sum);
    }
}
#endif

#ifdef POSITIONS
extern "C" __global__ void __launch_bounds__(256) positions(
    const float *__restrict__ upstream, const u32 *__restrict__ offsets, float *__restrict__ output, u32 first_row,
    u32 count, u32 width, u32 columns, u32 sequences
) {
    const u32 place = blockIdx.x / columns;
    const u32 column = blockIdx.x % columns * COLUMNS + column_of_lane();
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 4
        for (u32 s = line_of_column(); s < sequences; s += COLUMN_LINES) {
            const u32 row = offsets[s] + place;
            const u32 here = row - first_row;
            if (row < offsets[s + 1] && here < count) {
                sum += upstream[size_t(here) * width + column];
            }
        }
    }
    sum = column_sum(sum);
    if (column < width && line_of_column() == 0) {
        output[size_t(place) * width + column] += sum;
    }
}
#endif
