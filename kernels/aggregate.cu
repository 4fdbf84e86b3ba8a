// Rows that are put together, at one width: of N rows with losses f and weights w, and a the weight of all,
//
//     aggregate 0, a mean            loss += a · Σ w·f / N                  upstream = a·w / N
//     aggregate 1, mean of entries   loss += a · Σ w·f / K                  upstream = a·w / K
//     aggregate 2, log-mean-exp      loss += a · log(Σ w·exp f / rows)      upstream = a·w·exp f / Σ w·exp f
//
// where K is the number of all negatives; the last is over the rows that have entries, as many as `rows`.
//
// Launch: one block of 1024 threads.

#include "numerics.cuh"
#include "reduce.cuh"

#ifdef AGGREGATE
constexpr u32 THREADS = 1024;
constexpr u32 MEAN_OF_ENTRIES = 1;
constexpr u32 LOG_MEAN_EXP = 2;
// Numbers of a row, of which these are its loss, whether it has entries, and how many negatives.
constexpr u32 ROW_STATISTICS = 8;
constexpr u32 LOSS = 0;
constexpr u32 PRESENT = 2;
constexpr u32 NEGATIVES = 3;

extern "C" __global__ void __launch_bounds__(1024) aggregate(
    const float *__restrict__ statistics, OPTIONAL const float *__restrict__ row_weights, float *__restrict__ upstream,
    float *__restrict__ loss, u32 count, u32 first, float weight, u32 aggregate
) {
    const float *rows = statistics + size_t(first) * ROW_STATISTICS;
    const bool is_exponential = aggregate == LOG_MEAN_EXP;
    const auto statistic = [&](u32 row, u32 which) { return rows[size_t(row) * ROW_STATISTICS + which]; };
    // What a row counts among those it is divided by.
    const auto counts = [&](u32 row) {
        if (aggregate == MEAN_OF_ENTRIES) {
            return statistic(row, NEGATIVES);
        }
        return !is_exponential || statistic(row, PRESENT) > 0.0f ? 1.0f : 0.0f;
    };
    float count_sum = 0.0f;
    float largest = NO_ENTRY;
    for (u32 row = threadIdx.x; row < count; row += THREADS) {
        const float counted = counts(row);
        count_sum += counted;
        if (counted > 0.0f) {
            largest = fmaxf(largest, statistic(row, LOSS));
        }
    }
    count_sum = block_sum<THREADS>(count_sum);
    largest = block_max<THREADS>(largest);

    // A row's share, before it is divided.
    const auto share = [&](u32 row) {
        const float of_row = row_weights ? row_weights[row] : 1.0f;
        return is_exponential ? counts(row) * of_row * exponential(statistic(row, LOSS) - largest) : of_row;
    };
    float sum = 0.0f;
    for (u32 row = threadIdx.x; row < count; row += THREADS) {
        sum += is_exponential ? share(row) : share(row) * statistic(row, LOSS);
    }
    sum = block_sum<THREADS>(sum);

    float divisor = fmaxf(count_sum, 1.0f);
    float result = sum / divisor;
    if (is_exponential) {
        result = sum > 0.0f ? largest + logarithm(sum / count_sum) : 0.0f;
        divisor = sum > 0.0f ? sum : 1.0f;
    }
    for (u32 row = threadIdx.x; row < count; row += THREADS) {
        upstream[size_t(first) + row] = weight * share(row) / divisor;
    }
    if (threadIdx.x == 0) {
        loss[0] += weight * result;
    }
}
#endif
