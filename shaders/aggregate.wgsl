// Rows that are put together, at one width: of N rows with losses f and weights w, and a the weight of all,
//
//     AGGREGATE 0, a mean            loss += a · Σ w·f / N                  upstream = a·w / N
//     AGGREGATE 1, mean of entries   loss += a · Σ w·f / K                  upstream = a·w / K
//     AGGREGATE 2, log-mean-exp      loss += a · log(Σ w·exp f / rows)      upstream = a·w·exp f / Σ w·exp f
//
// where K is the number of all negatives; the last is over the rows that have entries, as many as `rows`.
//
// Launch: one workgroup of 256 invocations.

#import numerics
#import reduce

struct Params {
    // N, and the first of them.
    count: u32,
    first: u32,
    weight: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> statistics: array<f32>;
@group(0) @binding(2) var<storage, read> row_weights: array<f32>;
@group(0) @binding(3) var<storage, read_write> upstream: array<f32>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;

const MEAN_OF_ENTRIES: u32 = 1u;
const LOG_MEAN_EXP: u32 = 2u;

fn statistic(row: u32, which: u32) -> f32 {
    return statistics[(params.first + row) * 8u + which];
}

fn weight_of(row: u32) -> f32 {
#ifdef ROW_WEIGHTS
    return row_weights[row];
#else
    return 1.0;
#endif
}

// What a row counts among those it is divided by.
fn counts(row: u32) -> f32 {
    if (AGGREGATE == MEAN_OF_ENTRIES) {
        return statistic(row, 3u);
    }
    if (AGGREGATE == LOG_MEAN_EXP) {
        return select(0.0, 1.0, statistic(row, 2u) > 0.0);
    }
    return 1.0;
}

// A row's share, before it is divided.
fn share(row: u32, largest: f32) -> f32 {
    if (AGGREGATE != LOG_MEAN_EXP) {
        return weight_of(row);
    }
    return counts(row) * weight_of(row) * exponential(statistic(row, 0u) - largest);
}

@compute @workgroup_size(256)
fn aggregate(@builtin(local_invocation_index) lane: u32) {
    var count = 0.0;
    var largest = NO_ENTRY;
    for (var row = lane; row < params.count; row += 256u) {
        let counted = counts(row);
        count += counted;
        if (counted > 0.0) {
            largest = max(largest, statistic(row, 0u));
        }
    }
    count = workgroup_sum(count, lane);
    largest = workgroup_max(largest, lane);

    var sum = 0.0;
    for (var row = lane; row < params.count; row += 256u) {
        if (AGGREGATE == LOG_MEAN_EXP) {
            sum += share(row, largest);
        } else {
            sum += share(row, largest) * statistic(row, 0u);
        }
    }
    sum = workgroup_sum(sum, lane);

    var divisor = max(count, 1.0);
    var result = sum / divisor;
    if (AGGREGATE == LOG_MEAN_EXP) {
        result = 0.0;
        divisor = 1.0;
        if (sum > 0.0) {
            result = largest + logarithm(sum / count);
            divisor = sum;
        }
    }
    for (var row = lane; row < params.count; row += 256u) {
        upstream[params.first + row] = params.weight * share(row, largest) / divisor;
    }
    if (lane == 0u) {
        loss[0] += params.weight * result;
    }
}
