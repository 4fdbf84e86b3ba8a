// Row functions: what each row's logits cost, and the gradient of that by each of them.
//
//     evaluate   logits (rows, W, stride) → factor · gradient, in place and only if `backward`; an outcome for each row
//     collect    losses, statistics and gradients of parameters from the outcomes
//
// A row holds logits z, NO_ENTRY where there is no entry, and weights ω: above 0 on positives, 0 on negatives. With L⁻
// and L⁺ the log-sum-exps of negatives and positives and L that of all, the functions are:
//
//     CROSS_ENTROPY      Σ y·(L − z)                      g = exp(z − L) − y
//     LOG_SUM_POSITIVES  L − L⁺                           g = exp(z − L) − exp(z − L⁺)
//     EACH_POSITIVE      mean log(1 + exp(L⁻ − z⁺))       g⁻ = mean h · exp(z − L⁻), g⁺ = −h / |P|, h = σ(L⁻ − z⁺)
//     DECOUPLED          L⁻ − mean z⁺                     g⁻ = exp(z − L⁻), g⁺ = −1 / |P|
//     DEBIASED           log(exp z⁺ + max(estimate, bound)) − z⁺
//     HYBRID_NCE         log(α·exp L⁺ + n·Σ⁻ exp((1+β)z) / Σ⁻ exp(βz)) − L⁺
//     SIGMOID            Σ log(1 + exp(±z))
//     HINGE              Σ⁻ max(0, ρ − z⁺ + z)
//     HARDEST_NEGATIVE   max(0, ρ − z⁺ + max⁻ z)
//     LOG_MEAN_EXP       L − log K                        g = exp(z − L)
//     ALIGNMENT          −mean z⁺
//
// Nothing is subtracted that is almost equal: a loss near zero keeps its digits. The target y is ω / Σω, or with a
// teacher the softmax of its logits, in either case smoothed: (1 − ε)·y + ε / K over the K entries.
//
// An outcome is the row's statistics, as `RowSweep` lists them, its weighted loss, and its parts of the gradients of
// log_scale and of the bias.
//
// Launch: blocks of 256 threads; of `evaluate` one for each row, at one width; of `collect` a thread for each row.
//
// `evaluate` takes a row twice: sums of exponentials are relative to the largest logit so far and follow it as it grows
// (online softmax, arXiv 1805.02867), then come the gradients. Functions whose gradients depend on a sum over what was
// found first, such as HINGE, take it once more between the two.

#include "types.cuh"

// Values of an outcome.
constexpr u32 OUTCOME = 11;

#ifdef EVALUATE
#include "block_totals.cuh"
#include "numerics.cuh"
#include "quads.cuh"

constexpr u32 CROSS_ENTROPY = 0;
constexpr u32 LOG_SUM_POSITIVES = 1;
constexpr u32 EACH_POSITIVE = 2;
constexpr u32 DECOUPLED = 3;
constexpr u32 DEBIASED = 4;
constexpr u32 HYBRID_NCE = 5;
constexpr u32 SIGMOID = 6;
constexpr u32 HINGE = 7;
constexpr u32 HARDEST_NEGATIVE = 8;
constexpr u32 LOG_MEAN_EXP = 9;
constexpr u32 ALIGNMENT = 10;

// Gradients depend on sums over the row, or on a place in it, that need what is known of the row.
constexpr bool GRADIENT_HAS_TERMS =
    FUNCTION == EACH_POSITIVE || FUNCTION == HYBRID_NCE || FUNCTION == HINGE || FUNCTION == HARDEST_NEGATIVE;

// The numbers of a function, and whether a teacher tells its targets.
struct Settings {
    // ρ, τ⁺ or α; β
    float parameter;
    float hardness;
    float smoothing;
    bool has_teacher;
};

// What is known of a row before its function is evaluated.
struct Row {
    // How many.
    float positives;
    float negatives;
    float entries;
    float mean_positive;
    // The largest logits; NO_ENTRY without any.
    float best;
    float hardest;
    // L⁺, L⁻ and L
    float of_positives;
    float of_negatives;
    float all;
    // Targets are exp(teacher − largest), or without a teacher ω, times a factor, and a share that each entry has.
    float teacher_largest;
    float target_factor;
    float share;
    // Of HYBRID_NCE: log Σ⁺ ω·exp z
    float together;
    // The logit of an anchor with itself.
    float own;
};

// What a row costs, and of its gradient what does not depend on the entry.
struct Result {
    float loss;
    // Unless the function says otherwise, the gradient of a positive, and what exp(z − shift) is multiplied with in
    // that of a negative.
    float of_positive;
    float of_negative;
    float shift;
    // By the logit of an anchor with itself.
    float own;
    // Of HYBRID_NCE: what exp((1+β)(z − hardest)) and exp(β(z − hardest)) are multiplied with.
    float of_harder;
    float of_softer;
};

// Sums over a row of what needs to be known of it first.
struct Terms {
    // See add_terms().
    float first;
    float second;
    // Negatives above the best positive.
    float above;
};

// log(1 + x) for x ≥ 0
__device__ __forceinline__ float log_one_plus(float x) {
    return x > 1.0f ? logarithm(1.0f + x) : logarithm_of_one_plus(x);
}

// A largest logit becomes `to` if that is larger, and a sum of exponentials relative to it follows.
__device__ __forceinline__ void raise(float &largest, float &sum, float to) {
    if (to > largest) {
        sum *= exponential(largest - to);
        largest = to;
    }
}

// y
__device__ __forceinline__ float target_of(float teacher, float weight, const Row &known, const Settings &settings) {
    const float y = settings.has_teacher ? exponential(teacher - known.teacher_largest) : weight;
    return y * known.target_factor + known.share;
}

// Where negatives of a hinge begin to cost.
__device__ __forceinline__ float hinge(const Row &known, const Settings &settings) {
    return (known.positives > 0.0f ? known.mean_positive : known.own) - settings.parameter;
}

// An entry's terms of sums over the row; finish() says what becomes of the sums.
__device__ __forceinline__ void add_terms(
    Terms &terms, float z, float weight, float y, const Row &known, const Settings &settings
) {
    const bool positive = weight > 0.0f;
    if (!positive && z > known.best) {
        terms.above += 1.0f;
    }
    switch (FUNCTION) {
    case CROSS_ENTROPY:
        terms.first += y * (known.all - z);
        terms.second += known.share * (known.all - z);
        break;
    case EACH_POSITIVE:
        if (positive) {
            terms.first += softplus(known.of_negatives - z);
            terms.second += sigmoid(known.of_negatives - z);
        }
        break;
    case HYBRID_NCE:
        if (!positive) {
            const float gap = z - known.hardest;
            terms.first += exponential((1.0f + settings.hardness) * gap);
            terms.second += exponential(settings.hardness * gap);
        }
        break;
    case SIGMOID:
        terms.first += softplus(positive ? -z : z);
        break;
    case HINGE: {
        const float excess = z - hinge(known, settings);
        if (!positive && excess > 0.0f) {
            terms.first += excess;
            terms.second += 1.0f;
        }
        break;
    }
    default:
        break;
    }
}

// The loss and the gradient from what is known of the row and the sums of terms.
__device__ __forceinline__ Result finish(const Row &known, const Terms &terms, const Settings &settings) {
    Result result{0.0f, 0.0f, 1.0f, known.all, 0.0f, 0.0f, 0.0f};
    switch (FUNCTION) {
    case CROSS_ENTROPY:
        result.loss = terms.first;
        if (!settings.has_teacher && known.positives == 1.0f) {
            // Without cancelling.
            result.loss = (1.0f - settings.smoothing) * softplus(known.of_negatives - known.best) + terms.second;
        }
        break;
    case LOG_SUM_POSITIVES:
        result.loss = softplus(known.of_negatives - known.of_positives);
        break;
    case EACH_POSITIVE:
        if (known.negatives > 0.0f) {
            result.loss = terms.first / known.positives;
        }
        result.of_negative = terms.second / known.positives;
        result.shift = known.of_negatives;
        break;
    case DECOUPLED:
        if (known.negatives > 0.0f) {
            result.loss = known.of_negatives - known.mean_positive;
            result.of_positive = -1.0f / known.positives;
        }
        result.shift = known.of_negatives;
        break;
    case DEBIASED: {
        // Everything relative to L.
        const float prior = settings.parameter;
        const float positive = exponential(known.mean_positive - known.all);
        const float sum = exponential(known.of_negatives - known.all);
        const float believed = known.negatives * prior * positive;
        const float estimate = (sum - believed) / (1.0f - prior);
        const float bound = known.negatives * exponential(-known.own - known.all);
        const bool is_free = estimate > bound;
        const float rest = is_free ? estimate : bound;
        const float all = positive + rest;
        result.of_negative = 0.0f;
        if (known.negatives > 0.0f) {
            result.loss = positive > 1e-30f ? log_one_plus(rest / positive)
                                            : known.all + logarithm(all) - known.mean_positive;
            float of_positive = -rest / all;
            if (is_free) {
                of_positive -= believed / (1.0f - prior) / all;
                result.of_negative = 1.0f / ((1.0f - prior) * all);
            } else {
                result.own = -bound / all;
            }
            result.of_positive = of_positive / known.positives;
        }
        break;
    }
    case HYBRID_NCE: {
        const float of_alpha = settings.parameter > 0.0f ? logarithm(settings.parameter) : NO_ENTRY;
        // The share of the negatives in what stands in the logarithm.
        float share = 0.0f;
        if (known.negatives > 0.0f) {
            const float rest = known.hardest + logarithm(known.negatives * (terms.first / terms.second));
            // What stands in the logarithm, relative to the positives.
            result.loss = log_add_exp(of_alpha, rest - known.together);
            share = exponential(rest - known.together - result.loss);
            result.of_harder = share * (1.0f + settings.hardness) / terms.first;
            result.of_softer = share * settings.hardness / terms.second;
        } else if (settings.parameter > 0.0f) {
            result.loss = of_alpha;
        }
        result.of_positive = -share;
        break;
    }
    case SIGMOID:
        result.loss = terms.first;
        break;
    case HINGE:
        result.loss = terms.first;
        if (known.positives > 0.0f) {
            result.of_positive = -terms.second / known.positives;
        } else {
            result.own = -terms.second;
        }
        break;
    case HARDEST_NEGATIVE: {
        const float excess = settings.parameter - known.mean_positive + known.hardest;
        result.of_negative = 0.0f;
        if (known.negatives > 0.0f && excess > 0.0f) {
            result.loss = excess;
            result.of_negative = 1.0f;
            result.of_positive = -1.0f / known.positives;
        }
        break;
    }
    case LOG_MEAN_EXP:
        result.loss = known.all - logarithm(known.entries);
        break;
    case ALIGNMENT:
        result.loss = -known.mean_positive;
        result.of_negative = 0.0f;
        result.of_positive = -1.0f / known.positives;
        break;
    }
    return result;
}

__device__ __forceinline__ float gradient_of_positive(
    float z, float weight, float y, const Row &known, const Result &result, const Settings &settings
) {
    switch (FUNCTION) {
    case CROSS_ENTROPY:
        if (!settings.has_teacher && known.positives == 1.0f) {
            // p − 1, and what smoothing takes from the target.
            return settings.smoothing - known.share - exponential(known.of_negatives - known.all);
        }
        return exponential(z - known.all) - y;
    case LOG_SUM_POSITIVES:
        return -exponential(known.of_negatives - known.all) * exponential(z - known.of_positives);
    case EACH_POSITIVE:
        return -sigmoid(known.of_negatives - z) / known.positives;
    case HYBRID_NCE:
        return result.of_positive * weight * exponential(z - known.together);
    case SIGMOID:
        return -sigmoid(-z);
    case LOG_MEAN_EXP:
        return exponential(z - known.all);
    default:
        return result.of_positive;
    }
}

__device__ __forceinline__ float gradient_of_negative(
    float z, float y, bool is_hardest, const Row &known, const Result &result, const Settings &settings
) {
    switch (FUNCTION) {
    case CROSS_ENTROPY:
        return exponential(z - known.all) - y;
    case HYBRID_NCE: {
        const float gap = z - known.hardest;
        return result.of_harder * exponential((1.0f + settings.hardness) * gap)
            - result.of_softer * exponential(settings.hardness * gap);
    }
    case SIGMOID:
        return sigmoid(z);
    case HINGE:
        return z - hinge(known, settings) > 0.0f ? 1.0f : 0.0f;
    case HARDEST_NEGATIVE:
        return is_hardest ? result.of_negative : 0.0f;
    case ALIGNMENT:
        return 0.0f;
    default:
        return result.of_negative * exponential(z - result.shift);
    }
}

// Whether a row without positives costs nothing.
__device__ __forceinline__ bool needs_positive(const Settings &settings) {
    return !settings.has_teacher && FUNCTION != HINGE && FUNCTION != LOG_MEAN_EXP;
}

extern "C" __global__ void __launch_bounds__(256) evaluate(
    float *__restrict__ logits, OPTIONAL const float *__restrict__ similarities, const float *__restrict__ positives,
    const float *__restrict__ log_scale, OPTIONAL const float *__restrict__ teacher,
    OPTIONAL const float *__restrict__ row_weights, OPTIONAL const float *__restrict__ upstream,
    float *__restrict__ outcomes, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 at_width, u32 stride,
    float weight, float average, float parameter, float hardness, float smoothing, OPTIONAL float teacher_scale,
    OPTIONAL u32 backward
) {
    __shared__ float of_maxima[4 * BLOCK_WARPS];
    __shared__ float of_sums[8 * BLOCK_WARPS];
    __shared__ float of_terms[4 * BLOCK_WARPS];
    __shared__ float of_gradients[8 * BLOCK_WARPS];
    __shared__ u32 of_places[BLOCK_WARPS];

    const u32 row = blockIdx.x;
    const u32 pair = first_row + row;
    const Settings settings{parameter, hardness, smoothing, teacher != nullptr};
    const size_t line = size_t(row) * widths + at_width;
    float *const row_logits = logits + line * stride;
    const float *const row_positives = positives + size_t(row) * stride;
    const float *const row_similarities = backward ? similarities + line * stride : nullptr;
    const float *const row_teacher = teacher ? teacher + size_t(row) * stride : nullptr;
    const bool fours = have_fours(stride, logits, similarities, positives, teacher);

    // Counts, largest logits and sums of exponentials relative to the largest.
    float best = NO_ENTRY;
    float hardest = NO_ENTRY;
    float teacher_largest = NO_ENTRY;
    float positive_count = 0.0f;
    float negative_count = 0.0f;
    float weight_sum = 0.0f;
    float positive_sum = 0.0f;
    float positive_exponentials = 0.0f;
    float negative_exponentials = 0.0f;
    float teacher_exponentials = 0.0f;
    float weighted_exponentials = 0.0f;
    for (u32 tile = 0; tile < stride; tile += TILE_COLUMNS) {
        const Quad quad = quad_of(tile, stride, fours);
        const Floats<4> z = read_quad(row_logits, quad, NO_ENTRY);
        const Floats<4> weights = read_quad(row_positives, quad, 0.0f);
        float best_here = best;
        float hardest_here = hardest;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool positive = weights.v[i] > 0.0f;
            best_here = positive ? fmaxf(best_here, z.v[i]) : best_here;
            hardest_here = positive ? hardest_here : fmaxf(hardest_here, z.v[i]);
        }
        if (FUNCTION == HYBRID_NCE) {
            float largest = best;
            raise(largest, weighted_exponentials, best_here);
        }
        raise(best, positive_exponentials, best_here);
        raise(hardest, negative_exponentials, hardest_here);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (z.v[i] != NO_ENTRY && weights.v[i] > 0.0f) {
                const float e = exponential(z.v[i] - best);
                positive_count += 1.0f;
                positive_sum += z.v[i];
                weight_sum += weights.v[i];
                positive_exponentials += e;
                weighted_exponentials += FUNCTION == HYBRID_NCE ? weights.v[i] * e : 0.0f;
            } else if (z.v[i] != NO_ENTRY) {
                negative_count += 1.0f;
                negative_exponentials += exponential(z.v[i] - hardest);
            }
        }
        if (FUNCTION == CROSS_ENTROPY && teacher) {
            const Floats<4> values = read_quad(row_teacher, quad, 0.0f);
            float largest_here = teacher_largest;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                largest_here = z.v[i] != NO_ENTRY ? fmaxf(largest_here, teacher_scale * values.v[i]) : largest_here;
            }
            raise(teacher_largest, teacher_exponentials, largest_here);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (z.v[i] != NO_ENTRY) {
                    teacher_exponentials += exponential(teacher_scale * values.v[i] - teacher_largest);
                }
            }
        }
    }
    float maxima[4] = {best, hardest, teacher_largest, NO_ENTRY};
    block_totals<Largest>(maxima, of_maxima);
    const float of_best = exponential(best - maxima[0]);
    float sums[8] = {
        positive_count,
        negative_count,
        weight_sum,
        positive_sum,
        positive_exponentials * of_best,
        negative_exponentials * exponential(hardest - maxima[1]),
        teacher_exponentials * exponential(teacher_largest - maxima[2]),
        weighted_exponentials * of_best,
    };
    block_totals<Sum>(sums, of_sums);

    Row known{};
    known.positives = sums[0];
    known.negatives = sums[1];
    known.entries = sums[0] + sums[1];
    known.mean_positive = sums[3] / fmaxf(sums[0], 1.0f);
    known.best = maxima[0];
    known.hardest = maxima[1];
    known.of_positives = NO_ENTRY;
    known.of_negatives = NO_ENTRY;
    if (known.positives > 0.0f) {
        known.of_positives = known.best + logarithm(sums[4]);
        known.together = known.best + logarithm(sums[7]);
    }
    if (known.negatives > 0.0f) {
        known.of_negatives = known.hardest + logarithm(sums[5]);
    }
    known.all = log_add_exp(known.of_positives, known.of_negatives);
    known.teacher_largest = maxima[2];
    known.target_factor = (1.0f - smoothing) / (teacher ? sums[6] : sums[2]);
    known.share = smoothing / known.entries;
    known.own = exponential(log_scale[0]);
    const bool lacking = known.entries == 0.0f || (needs_positive(settings) && known.positives == 0.0f);

    // Terms of the loss, now or together with the gradients.
    Terms terms{};
    u32 hardest_place = stride;
    const bool terms_first = GRADIENT_HAS_TERMS || !backward;
    if (terms_first) {
        for (u32 tile = 0; tile < stride; tile += TILE_COLUMNS) {
            const Quad quad = quad_of(tile, stride, fours);
            const Floats<4> z = read_quad(row_logits, quad, NO_ENTRY);
            const Floats<4> weights = read_quad(row_positives, quad, 0.0f);
            Floats<4> values{};
            if (FUNCTION == CROSS_ENTROPY && teacher) {
                values = read_quad(row_teacher, quad, 0.0f);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (z.v[i] != NO_ENTRY) {
                    const float y = target_of(teacher_scale * values.v[i], weights.v[i], known, settings);
                    add_terms(terms, z.v[i], weights.v[i], y, known, settings);
                    if (FUNCTION == HARDEST_NEGATIVE && z.v[i] == known.hardest && !(weights.v[i] > 0.0f)) {
                        hardest_place = min(hardest_place, quad.column(i));
                    }
                }
            }
        }
        float totals[4] = {terms.first, terms.second, terms.above, 0.0f};
        block_totals<Sum>(totals, of_terms);
        terms = Terms{totals[0], totals[1], totals[2]};
        if (FUNCTION == HARDEST_NEGATIVE) {
            u32 places[1] = {hardest_place};
            block_totals<Smallest>(places, of_places);
            hardest_place = places[0];
        }
    }
    Result result = finish(known, terms, settings);

    const float weight_of_loss = (row_weights ? row_weights[pair] : 1.0f) * weight;
    float of_log_scale = 0.0f;
    float of_bias = 0.0f;
    if (backward) {
        const float factor = upstream ? upstream[size_t(at_width) * pairs + pair] : weight_of_loss * average;
        for (u32 tile = 0; tile < stride; tile += TILE_COLUMNS) {
            const Quad quad = quad_of(tile, stride, fours);
            const Floats<4> z = read_quad(row_logits, quad, NO_ENTRY);
            const Floats<4> weights = read_quad(row_positives, quad, 0.0f);
            const Floats<4> similarity = read_quad(row_similarities, quad, 0.0f);
            Floats<4> values{};
            if (FUNCTION == CROSS_ENTROPY && teacher) {
                values = read_quad(row_teacher, quad, 0.0f);
            }
            Floats<4> gradient{};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (z.v[i] != NO_ENTRY) {
                    const float y = target_of(teacher_scale * values.v[i], weights.v[i], known, settings);
                    if (!terms_first) {
                        add_terms(terms, z.v[i], weights.v[i], y, known, settings);
                    }
                    const bool is_hardest = quad.column(i) == hardest_place;
                    const float g = weights.v[i] > 0.0f
                        ? gradient_of_positive(z.v[i], weights.v[i], y, known, result, settings)
                        : gradient_of_negative(z.v[i], y, is_hardest, known, result, settings);
                    gradient.v[i] = lacking ? 0.0f : g * factor;
                }
                of_log_scale += gradient.v[i] * similarity.v[i];
                of_bias += gradient.v[i];
            }
            write_quad(row_logits, quad, gradient);
        }
        float totals[8] = {of_log_scale, of_bias, terms.first, terms.second, terms.above, 0.0f, 0.0f, 0.0f};
        block_totals<Sum>(totals, of_gradients);
        of_log_scale = known.own * (totals[0] + (lacking ? 0.0f : factor * result.own));
        of_bias = totals[1];
        if (!terms_first) {
            terms = Terms{totals[2], totals[3], totals[4]};
            result = finish(known, terms, settings);
        }
    }

    if (threadIdx.x == 0) {
        const float loss = lacking ? 0.0f : result.loss;
        float *const outcome = outcomes + line * OUTCOME;
        outcome[0] = loss;
        outcome[1] = known.all;
        outcome[2] = known.entries;
        outcome[3] = known.negatives;
        outcome[4] = known.best;
        outcome[5] = known.hardest;
        outcome[6] = known.positives > 0.0f ? 1.0f + terms.above : 0.0f;
        outcome[7] = 0.0f;
        outcome[8] = weight_of_loss * loss;
        outcome[9] = of_log_scale;
        outcome[10] = of_bias;
    }
}
#endif

#ifdef COLLECT
// The first values of an outcome.
constexpr u32 STATISTICS = 8;

extern "C" __global__ void __launch_bounds__(256) collect(
    const float *__restrict__ outcomes, OPTIONAL float *__restrict__ losses, OPTIONAL float *__restrict__ statistics,
    OPTIONAL float *__restrict__ d_log_scale, OPTIONAL float *__restrict__ d_bias, u32 rows, u32 first_row, u32 pairs,
    u32 widths
) {
    const u32 row = blockIdx.x * 256 + threadIdx.x;
    if (row >= rows) {
        return;
    }
    const u32 pair = first_row + row;
    float loss = 0.0f;
    float of_log_scale = 0.0f;
    float of_bias = 0.0f;
    for (u32 w = 0; w < widths; w++) {
        const float *const outcome = outcomes + (size_t(row) * widths + w) * OUTCOME;
        if (statistics) {
            float *const to = statistics + (size_t(w) * pairs + pair) * STATISTICS;
#pragma unroll
            for (u32 i = 0; i < STATISTICS; i++) {
                to[i] = outcome[i];
            }
        }
        loss += outcome[8];
        of_log_scale += outcome[9];
        of_bias += outcome[10];
    }
    if (losses) {
        losses[pair] += loss;
    }
    if (d_log_scale) {
        d_log_scale[pair] += of_log_scale;
    }
    if (d_bias) {
        d_bias[pair] += of_bias;
    }
}
#endif
