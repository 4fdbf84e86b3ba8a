// Losses of graded pairs: of similarities s and gold scores y, with z = σ·s and σ = exp(log_scale).
//
//     cosent    log(1 + Σ_{y_i > y_j} exp(z_j − z_i))
//     pearson   1 − r(s, y)
//     rank_kl   1/N · Σ p·(log p − log q), q = softmax(z), p = softmax(σ · rank / (N − 1)), rank from the lowest y
//
// Pairs are sorted by gold score, then by number. With B_i the log-sum-exp of the z below y_i and A_i that of the −z
// above it, Σ_{y_i > y_j} exp(z_j − z_i) = Σ_i exp(B_i − z_i), and the gradient of cosent by z_i, with its loss l, is
// exp(z_i + A_i − l) − exp(B_i − z_i − l). A sum of exponentials is two numbers: the largest exponent and the sum
// relative to it; so nothing overflows, and no logarithm is taken that would have to be undone.
//
//     keys             order[i] = (key of score i, i), behind them the highest there is
//     sort_within      sorts and merges runs of up to 1,024 in shared memory
//     sort_across      one step of merging longer runs
//     ties             ties_of[p] = (first, end) of the places whose score is that of place p
//     exponents        sums[p] = exp(z) of place p, or if `reversed` exp(−z) of place N − 1 − p
//     scan             sums of each 256 → running ones; totals = the last of each
//     add_before       running sums += the total of all 256s before
//     cosent           the loss, and 1 + Σ for cosent_gradient
//
// Launch: cosent, pearson and rank_kl are one block of 1,024 threads: it is a few numbers a pair. Others have blocks
// for 256 elements; a block of sort_within has 1,024 elements, one of sort_across 512.

#include "numerics.cuh"
#include "reduce.cuh"

#if defined(COSENT) || defined(PEARSON) || defined(RANK_KL)
// Threads of what is one block.
constexpr u32 WHOLE = 1024;
#endif

// The sum of no exponentials. Far below every exponent, but not so far that differences would leave single precision.
__device__ __forceinline__ float2 nothing() {
    return make_float2(-2e38f, 0.0f);
}

// Of sums of exponentials.
__device__ __forceinline__ float2 add_sums(float2 a, float2 b) {
    const float largest = fmaxf(a.x, b.x);
    return make_float2(largest, a.y * exponential(a.x - largest) + b.y * exponential(b.x - largest));
}

#ifdef KEYS
extern "C" __global__ void __launch_bounds__(256) keys(
    const float *__restrict__ scores, uint2 *__restrict__ order, u32 count, u32 padded
) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i < count) {
        // −0 and 0 are one score.
        const u32 bits = scores[i] == 0.0f ? 0 : __float_as_uint(scores[i]);
        order[i] = make_uint2(bits >> 31 ? ~bits : bits | 0x80000000u, i);
    } else if (i < padded) {
        order[i] = make_uint2(0xffffffffu, 0xffffffffu);
    }
}
#endif

// A key and a number, in one that orders as both do.
__device__ __forceinline__ u64 packed(uint2 place) {
    return u64(place.x) << 32 | place.y;
}

#ifdef SORT_WITHIN
// Elements of a block.
constexpr u32 RUN = 1024;

extern "C" __global__ void __launch_bounds__(512) sort_within(
    uint2 *__restrict__ order, u32 count, u32 shortest, u32 longest
) {
    __shared__ u64 run[RUN];
    const u32 first = blockIdx.x * RUN;
    if (first >= count) {
        return;
    }
    for (u32 i = threadIdx.x; i < RUN; i += RUN / 2) {
        run[i] = packed(order[size_t(first) + i]);
    }
    __syncthreads();
    // Lengths of runs after each merge.
    for (u32 length = shortest; length <= longest; length *= 2) {
        for (u32 distance = min(length, RUN) / 2; distance > 0; distance /= 2) {
            const u32 a = 2 * threadIdx.x - (threadIdx.x & (distance - 1));
            const u32 b = a + distance;
            const bool descends = ((first + a) & length) != 0;
            const u64 one = run[a];
            const u64 other = run[b];
            if ((one > other) != descends) {
                run[a] = other;
                run[b] = one;
            }
            // In steps of up to 32 a warp stays among its own 64 elements.
            const u32 next = distance > 1 ? distance / 2 : length;
            if (max(distance, next) > WARP) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < RUN; i += RUN / 2) {
        order[size_t(first) + i] = make_uint2(u32(run[i] >> 32), u32(run[i]));
    }
}
#endif

#ifdef SORT_ACROSS
extern "C" __global__ void __launch_bounds__(256) sort_across(
    uint2 *__restrict__ order, u32 count, u32 longest, u32 distance
) {
    const u32 element = blockIdx.x * 256 + threadIdx.x;
    if (element < count) {
        const u32 a = 2 * element - (element & (distance - 1));
        const uint2 first = order[a];
        const uint2 second = order[a + distance];
        if ((packed(first) > packed(second)) != ((a & longest) != 0)) {
            order[a] = second;
            order[a + distance] = first;
        }
    }
}
#endif

#ifdef TIES
// The first place from which on keys are at least that one, or above it.
__device__ __forceinline__ u32 first_place(const uint2 *order, u32 count, u32 key, bool above) {
    u32 low = 0;
    u32 high = count;
    while (low < high) {
        const u32 middle = low + (high - low) / 2;
        const u32 found = order[middle].x;
        if (found > key || (found == key && !above)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(256) ties(
    uint2 *__restrict__ order, uint2 *__restrict__ ties_of, u32 count
) {
    const u32 place = blockIdx.x * 256 + threadIdx.x;
    if (place < count) {
        const u32 key = order[place].x;
        // Most scores have few ties: neighbours tell.
        const bool is_first = place == 0 || order[place - 1].x != key;
        const bool is_last = place + 1 == count || order[place + 1].x != key;
        ties_of[place] = make_uint2(
            is_first ? place : first_place(order, count, key, false),
            is_last ? place + 1 : first_place(order, count, key, true)
        );
    }
}
#endif

#ifdef EXPONENTS
extern "C" __global__ void __launch_bounds__(256) exponents(
    const float *__restrict__ similarity, const float *__restrict__ log_scale, uint2 *__restrict__ order,
    float2 *__restrict__ sums, u32 count, OPTIONAL u32 reversed
) {
    const u32 place = blockIdx.x * 256 + threadIdx.x;
    if (place < count) {
        const u32 pair = order[reversed ? count - 1 - place : place].y;
        const float z = exponential(log_scale[0]) * similarity[pair];
        sums[place] = make_float2(reversed ? -z : z, 1.0f);
    }
}
#endif

#ifdef SCAN
extern "C" __global__ void __launch_bounds__(256) scan(
    float2 *__restrict__ sums, float2 *__restrict__ totals, u32 count
) {
    __shared__ float2 of_warps[256 / WARP];
    const u32 place = blockIdx.x * 256 + threadIdx.x;
    const u32 lane = threadIdx.x % WARP;
    const u32 warp = threadIdx.x / WARP;
    float2 sum = place < count ? sums[place] : nothing();
#pragma unroll
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        const float2 before = make_float2(
            __shfl_up_sync(WHOLE_WARP, sum.x, distance), __shfl_up_sync(WHOLE_WARP, sum.y, distance)
        );
        if (lane >= distance) {
            sum = add_sums(before, sum);
        }
    }
    if (lane == WARP - 1) {
        of_warps[warp] = sum;
    }
    __syncthreads();
    if (warp > 0) {
        float2 before = of_warps[0];
        for (u32 i = 1; i < warp; i++) {
            before = add_sums(before, of_warps[i]);
        }
        sum = add_sums(before, sum);
    }
    if (place < count) {
        sums[place] = sum;
    }
    if (threadIdx.x == 255) {
        totals[blockIdx.x] = sum;
    }
}
#endif

#ifdef ADD_BEFORE
extern "C" __global__ void __launch_bounds__(256) add_before(
    float2 *__restrict__ sums, float2 *__restrict__ totals, u32 count
) {
    const u32 place = blockIdx.x * 256 + threadIdx.x;
    if (blockIdx.x > 0 && place < count) {
        sums[place] = add_sums(totals[blockIdx.x - 1], sums[place]);
    }
}
#endif

#if defined(COSENT) || defined(COSENT_GRADIENT)
// The exponentials of the z below a place's score.
__device__ __forceinline__ float2 sum_below(const float2 *below, uint2 tie) {
    return tie.x == 0 ? nothing() : below[tie.x - 1];
}
#endif

#ifdef COSENT
extern "C" __global__ void __launch_bounds__(1024) cosent(
    const float *__restrict__ similarity, const float *__restrict__ log_scale, uint2 *__restrict__ order,
    uint2 *__restrict__ ties_of, const float2 *__restrict__ below, float2 *__restrict__ totals,
    float *__restrict__ loss, u32 count
) {
    __shared__ float2 of_warps[WHOLE / WARP];
    const float scale = exponential(log_scale[0]);
    const u32 lane = threadIdx.x % WARP;
    float2 sum = nothing();
    for (u32 place = threadIdx.x; place < count; place += WHOLE) {
        const float2 lower = sum_below(below, ties_of[place]);
        sum = add_sums(sum, make_float2(lower.x - scale * similarity[order[place].y], lower.y));
    }
    // The warps' sums, then the sum of these, in the first lane.
    for (u32 round = 0; round < 2; round++) {
#pragma unroll
        for (u32 step = WARP / 2; step > 0; step /= 2) {
            const float2 other = make_float2(
                __shfl_down_sync(WHOLE_WARP, sum.x, step), __shfl_down_sync(WHOLE_WARP, sum.y, step)
            );
            sum = add_sums(sum, other);
        }
        if (round == 0) {
            if (lane == 0) {
                of_warps[threadIdx.x / WARP] = sum;
            }
            __syncthreads();
            sum = of_warps[lane];
        }
    }
    if (threadIdx.x == 0) {
        // log(1 + sum), precise also where the sum is small.
        const float2 total = add_sums(sum, make_float2(0.0f, 1.0f));
        const float plain = sum.x <= 0.0f ? sum.y * exponential(sum.x) : 2.0f;
        loss[0] = plain <= 1.0f ? logarithm_of_one_plus(plain) : total.x + logarithm(total.y);
        totals[0] = total;
    }
}
#endif

#ifdef COSENT_GRADIENT
extern "C" __global__ void __launch_bounds__(256) cosent_gradient(
    const float *__restrict__ similarity, const float *__restrict__ log_scale, uint2 *__restrict__ order,
    uint2 *__restrict__ ties_of, const float2 *__restrict__ below, const float2 *__restrict__ above,
    float2 *__restrict__ totals, float *__restrict__ gradient, u32 count
) {
    const u32 place = blockIdx.x * 256 + threadIdx.x;
    if (place < count) {
        const u32 pair = order[place].y;
        const uint2 tie = ties_of[place];
        const float z = exponential(log_scale[0]) * similarity[pair];
        const float2 total = totals[0];
        const float2 lower = sum_below(below, tie);
        // Of the −z above this place's score.
        const float2 higher = tie.y == count ? nothing() : above[count - 1 - tie.y];
        gradient[pair] = (higher.y * exponential(z + higher.x - total.x)
            - lower.y * exponential(lower.x - z - total.x)) / total.y;
    }
}
#endif

#ifdef PEARSON
// Similarities that are off their mean by no more than that part of it are equal.
constexpr float SAME_SIMILARITY = 1.0f / 1048576.0f;

extern "C" __global__ void __launch_bounds__(1024) pearson(
    const float *__restrict__ similarity, const float *__restrict__ scores, const float *__restrict__ log_scale,
    float *__restrict__ loss, float *__restrict__ gradient, u32 count
) {
    const float n = float(count);
    // Means, then what rounding has left of them; and the range of the gold scores.
    float mean_s = 0.0f;
    float mean_y = 0.0f;
    float highest = NO_ENTRY;
    float lowest = NO_ENTRY;
    for (u32 pass = 0; pass < 2; pass++) {
        float sum_s = 0.0f;
        float sum_y = 0.0f;
        for (u32 i = threadIdx.x; i < count; i += WHOLE) {
            const float score = scores[i];
            sum_s += (similarity[i] - mean_s) / n;
            sum_y += (score - mean_y) / n;
            highest = fmaxf(highest, score);
            lowest = fmaxf(lowest, -score);
        }
        mean_s += block_sum<WHOLE>(sum_s);
        mean_y += block_sum<WHOLE>(sum_y);
    }
    highest = block_max<WHOLE>(highest);
    lowest = block_max<WHOLE>(lowest);
    float farthest_s = 0.0f;
    float farthest_y = 0.0f;
    for (u32 i = threadIdx.x; i < count; i += WHOLE) {
        farthest_s = fmaxf(farthest_s, fabsf(similarity[i] - mean_s));
        farthest_y = fmaxf(farthest_y, fabsf(scores[i] - mean_y));
    }
    farthest_s = block_max<WHOLE>(farthest_s);
    farthest_y = block_max<WHOLE>(farthest_y);

    // Relative to the farthest, squares stay in single precision.
    const float unit_s = 1.0f / fmaxf(farthest_s, 1e-37f);
    const float unit_y = 1.0f / fmaxf(farthest_y, 1e-37f);
    float square_s = 0.0f;
    float square_y = 0.0f;
    float product = 0.0f;
    for (u32 i = threadIdx.x; i < count; i += WHOLE) {
        const float s = (similarity[i] - mean_s) * unit_s;
        const float y = (scores[i] - mean_y) * unit_y;
        square_s += s * s;
        square_y += y * y;
        product += s * y;
    }
    const float length_s = fmaxf(sqrtf(block_sum<WHOLE>(square_s)), 1e-18f);
    const float length_y = fmaxf(sqrtf(block_sum<WHOLE>(square_y)), 1e-18f);
    float r = block_sum<WHOLE>(product) / (length_s * length_y);
    // What is no number stays none.
    r = r < -1.0f ? -1.0f : r > 1.0f ? 1.0f : r;

    const bool asks_nothing = highest == -lowest;
    const bool is_flat = farthest_s <= SAME_SIMILARITY * fabsf(mean_s);
    const float scale = exponential(log_scale[0]);
    for (u32 i = threadIdx.x; i < count; i += WHOLE) {
        const float s = (similarity[i] - mean_s) * unit_s / length_s;
        const float y = (scores[i] - mean_y) * unit_y / length_y;
        const float derivative = (r * s - y) / (length_s * scale) * unit_s;
        gradient[i] = asks_nothing || is_flat ? 0.0f : derivative;
    }
    if (threadIdx.x == 0) {
        loss[0] = asks_nothing ? 0.0f : is_flat ? 1.0f : 1.0f - r;
    }
}
#endif

#ifdef RANK_KL
extern "C" __global__ void __launch_bounds__(1024) rank_kl(
    const float *__restrict__ similarity, const float *__restrict__ log_scale, uint2 *__restrict__ order,
    uint2 *__restrict__ ties_of, float *__restrict__ loss, float *__restrict__ gradient, u32 count
) {
    const float scale = exponential(log_scale[0]);
    const float most = float(max(count, 2u) - 1);
    // The logit of a place, and that of its rank: equal scores have the mean of theirs.
    const auto logits_of = [&](u32 place) {
        const uint2 tie = ties_of[place];
        const float rank = float(tie.x) + 0.5f * float(tie.y - tie.x - 1);
        return make_float2(scale * similarity[order[place].y], scale * (rank / most));
    };
    float2 largest = make_float2(NO_ENTRY, NO_ENTRY);
    for (u32 place = threadIdx.x; place < count; place += WHOLE) {
        const float2 logits = logits_of(place);
        largest.x = fmaxf(largest.x, logits.x);
        largest.y = fmaxf(largest.y, logits.y);
    }
    largest.x = block_max<WHOLE>(largest.x);
    largest.y = block_max<WHOLE>(largest.y);
    float2 sum = make_float2(0.0f, 0.0f);
    for (u32 place = threadIdx.x; place < count; place += WHOLE) {
        const float2 logits = logits_of(place);
        sum.x += exponential(logits.x - largest.x);
        sum.y += exponential(logits.y - largest.y);
    }
    sum.x = block_sum<WHOLE>(sum.x);
    sum.y = block_sum<WHOLE>(sum.y);
    const float2 logarithms = make_float2(logarithm(sum.x), logarithm(sum.y));
    const float n = float(count);
    float divergence = 0.0f;
    for (u32 place = threadIdx.x; place < count; place += WHOLE) {
        const float2 logits = logits_of(place);
        const float2 relative = make_float2(logits.x - largest.x, logits.y - largest.y);
        const float q = exponential(relative.x) / sum.x;
        const float p = exponential(relative.y) / sum.y;
        divergence += p * ((relative.y - logarithms.y) - (relative.x - logarithms.x));
        gradient[order[place].y] = (q - p) / n;
    }
    divergence = block_sum<WHOLE>(divergence);
    if (threadIdx.x == 0) {
        loss[0] = divergence / n;
    }
}
#endif
