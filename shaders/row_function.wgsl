// Row functions: what each row's logits cost, and the gradient of that by each of them.
//
//     evaluate   logits (rows, W, stride) → factor · gradient, in place and only if BACKWARD; an outcome for each row
//     collect    losses, statistics and gradients of parameters from the outcomes
//
// A row holds logits z, NO_ENTRY where there is no entry, and weights ω: above 0 on positives, 0 on negatives. The
// formulas are those of `RowFunction`, with L⁻ and L⁺ the log-sum-exps of negatives and positives and L that of all:
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
// Nothing is subtracted that is almost equal: a loss near zero keeps its digits. The target y is ω / Σω, or with TEACHER
// the softmax of the teacher's logits, in either case smoothed: (1 − ε)·y + ε / K over the K entries.
//
// An outcome is the row's statistics, as `RowSweep` lists them, its weighted loss, and its parts of the gradients of
// log_scale and of the bias.
//
// Launch: 256 invocations a workgroup; of `evaluate` one for each row in x, at one width; of `collect` an invocation for
// each row.

#import groups
#import numerics

struct Params {
    rows: u32,
    first_row: u32,
    // Rows of the batch.
    pairs: u32,
    widths: u32,
#ifdef COLLECT
    groups: u32,
#endif
#ifdef EVALUATE
    at_width: u32,
    stride: u32,
    // Of the row's loss, before its own weight; and what gradients are multiplied with beside.
    weight: f32,
    average: f32,
    // ρ, τ⁺ or α; β
    parameter: f32,
    hardness: f32,
    smoothing: f32,
#ifdef TEACHER
    teacher_scale: f32,
    teacher_base: u32,
#endif
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;
@group(0) @binding(2) var<storage, read> similarities: array<f32>;
@group(0) @binding(3) var<storage, read> positives: array<f32>;
@group(0) @binding(4) var<storage, read> log_scale: array<f32>;
@group(0) @binding(5) var<storage, read> teacher: array<f32>;
@group(0) @binding(6) var<storage, read> row_weights: array<f32>;
@group(0) @binding(7) var<storage, read> upstream: array<f32>;
#ifdef EVALUATE
@group(0) @binding(8) var<storage, read_write> outcomes: array<f32>;
#else
@group(0) @binding(8) var<storage, read> outcomes: array<f32>;
#endif
@group(0) @binding(9) var<storage, read_write> losses: array<f32>;
@group(0) @binding(10) var<storage, read_write> statistics: array<f32>;
@group(0) @binding(11) var<storage, read_write> d_log_scale: array<f32>;
@group(0) @binding(12) var<storage, read_write> d_bias: array<f32>;

const STATISTICS: u32 = 8u;
const OUTCOME: u32 = 11u;

#ifdef EVALUATE
const CROSS_ENTROPY: u32 = 0u;
const LOG_SUM_POSITIVES: u32 = 1u;
const EACH_POSITIVE: u32 = 2u;
const DECOUPLED: u32 = 3u;
const DEBIASED: u32 = 4u;
const HYBRID_NCE: u32 = 5u;
const SIGMOID: u32 = 6u;
const HINGE: u32 = 7u;
const HARDEST_NEGATIVE: u32 = 8u;
const LOG_MEAN_EXP: u32 = 9u;
const ALIGNMENT: u32 = 10u;

// What is known of a row before its function is evaluated.
struct Row {
    // How many.
    positives: f32,
    negatives: f32,
    entries: f32,
    // Σω
    weight: f32,
    mean_positive: f32,
    // The largest logits; NO_ENTRY without any.
    best: f32,
    hardest: f32,
    // L⁺, L⁻ and L
    of_positives: f32,
    of_negatives: f32,
    all: f32,
    // The teacher's largest logit, and Σ exp(teacher − largest).
    teacher_largest: f32,
    teacher_sum: f32,
    // Of HYBRID_NCE: Σ⁻ exp((1+β)(z − hardest)), Σ⁻ exp(β(z − hardest)), log Σ⁺ ω·exp z
    harder: f32,
    softer: f32,
    together: f32,
    // The logit of an anchor with itself.
    own: f32,
}

// What a row costs, and of its gradient what does not depend on the entry.
struct Result {
    loss: f32,
    // Unless the function says otherwise, the gradient of a positive, and what exp(z − shift) is multiplied with in that
    // of a negative.
    of_positive: f32,
    of_negative: f32,
    shift: f32,
    // By the logit of an anchor with itself.
    own: f32,
}

var<workgroup> sums: array<vec4<f32>, 256>;
var<workgroup> places: array<u32, 256>;

fn workgroup_sums(values: vec4<f32>, lane: u32) -> vec4<f32> {
    sums[lane] = values;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            sums[lane] += sums[lane + step];
        }
        workgroupBarrier();
    }
    let total = sums[0];
    workgroupBarrier();
    return total;
}

fn workgroup_maxima(values: vec4<f32>, lane: u32) -> vec4<f32> {
    sums[lane] = values;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            sums[lane] = max(sums[lane], sums[lane + step]);
        }
        workgroupBarrier();
    }
    let largest = sums[0];
    workgroupBarrier();
    return largest;
}

fn workgroup_first(value: u32, lane: u32) -> u32 {
    places[lane] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            places[lane] = min(places[lane], places[lane + step]);
        }
        workgroupBarrier();
    }
    let first = places[0];
    workgroupBarrier();
    return first;
}

// log(1 + x) for x ≥ 0
fn log_one_plus(x: f32) -> f32 {
    if (x > 1.0) {
        return logarithm(1.0 + x);
    }
    return logarithm_of_one_plus(x);
}

fn teacher_logit(row: u32, column: u32) -> f32 {
#ifdef TEACHER
    return params.teacher_scale * teacher[params.teacher_base + row * params.stride + column];
#else
    return 0.0;
#endif
}

// y
fn target_of(row: u32, column: u32, weight: f32, known: Row) -> f32 {
    var y = 0.0;
#ifdef TEACHER
    y = exponential(teacher_logit(row, column) - known.teacher_largest) / known.teacher_sum;
#else
    if (weight > 0.0) {
        y = weight / known.weight;
    }
#endif
    return (1.0 - params.smoothing) * y + params.smoothing / known.entries;
}

// Where negatives of a hinge begin to cost.
fn hinge(known: Row) -> f32 {
    return select(known.own, known.mean_positive, known.positives > 0.0) - params.parameter;
}

// An entry's terms of sums over the row; finish() says what becomes of the sums.
fn terms(row: u32, column: u32, z: f32, weight: f32, known: Row) -> vec4<f32> {
    let positive = weight > 0.0;
    switch (FUNCTION) {
        case CROSS_ENTROPY: {
            return vec4<f32>(target_of(row, column, weight, known), params.smoothing / known.entries, 0.0, 0.0)
                * (known.all - z);
        }
        case EACH_POSITIVE: {
            let gap = known.of_negatives - z;
            return select(vec4<f32>(), vec4<f32>(softplus(gap), sigmoid(gap), 0.0, 0.0), positive);
        }
        case SIGMOID: {
            return vec4<f32>(softplus(select(z, -z, positive)), 0.0, 0.0, 0.0);
        }
        case HINGE: {
            let excess = z - hinge(known);
            return select(vec4<f32>(), vec4<f32>(excess, 1.0, 0.0, 0.0), !positive && excess > 0.0);
        }
        default: {
            return vec4<f32>();
        }
    }
}

// The loss and the gradient from what is known of the row and the sums of terms.
fn finish(known: Row, total: vec4<f32>) -> Result {
    var result = Result(0.0, 0.0, 1.0, known.all, 0.0);
    switch (FUNCTION) {
        case CROSS_ENTROPY: {
            result.loss = total.x;
#ifndef TEACHER
            if (known.positives == 1.0) {
                // Without cancelling.
                result.loss = (1.0 - params.smoothing) * softplus(known.of_negatives - known.best) + total.y;
            }
#endif
        }
        case LOG_SUM_POSITIVES: {
            result.loss = softplus(known.of_negatives - known.of_positives);
        }
        case EACH_POSITIVE: {
            if (known.negatives > 0.0) {
                result.loss = total.x / known.positives;
            }
            result.of_negative = total.y / known.positives;
            result.shift = known.of_negatives;
        }
        case DECOUPLED: {
            if (known.negatives > 0.0) {
                result.loss = known.of_negatives - known.mean_positive;
                result.of_positive = -1.0 / known.positives;
            }
            result.shift = known.of_negatives;
        }
        case DEBIASED: {
            // Everything relative to L.
            let prior = params.parameter;
            let positive = exponential(known.mean_positive - known.all);
            let sum = exponential(known.of_negatives - known.all);
            let believed = known.negatives * prior * positive;
            let estimate = (sum - believed) / (1.0 - prior);
            let bound = known.negatives * exponential(-known.own - known.all);
            let is_free = estimate > bound;
            let rest = max(estimate, bound);
            let all = positive + rest;
            result.of_negative = 0.0;
            if (known.negatives > 0.0) {
                result.loss = known.all + logarithm(all) - known.mean_positive;
                if (positive > 1e-30) {
                    result.loss = log_one_plus(rest / positive);
                }
                var of_positive = -rest / all;
                if (is_free) {
                    of_positive -= believed / (1.0 - prior) / all;
                    result.of_negative = 1.0 / ((1.0 - prior) * all);
                } else {
                    result.own = -bound / all;
                }
                result.of_positive = of_positive / known.positives;
            }
        }
        case HYBRID_NCE: {
            var of_alpha = NO_ENTRY;
            if (params.parameter > 0.0) {
                of_alpha = logarithm(params.parameter);
            }
            result.of_negative = 0.0;
            if (known.negatives > 0.0) {
                let rest = known.hardest + logarithm(known.negatives * (known.harder / known.softer));
                // What stands in the logarithm, relative to the positives.
                result.loss = log_add_exp(of_alpha, rest - known.together);
                result.of_negative = exponential(rest - known.together - result.loss);
            } else if (params.parameter > 0.0) {
                result.loss = of_alpha;
            }
            // A share: gradient_of_negative and gradient_of_positive say of what.
            result.of_positive = -result.of_negative;
        }
        case SIGMOID: {
            result.loss = total.x;
        }
        case HINGE: {
            result.loss = total.x;
            if (known.positives > 0.0) {
                result.of_positive = -total.y / known.positives;
            } else {
                result.own = -total.y;
            }
        }
        case HARDEST_NEGATIVE: {
            let excess = params.parameter - known.mean_positive + known.hardest;
            result.of_negative = 0.0;
            if (known.negatives > 0.0 && excess > 0.0) {
                result.loss = excess;
                result.of_negative = 1.0;
                result.of_positive = -1.0 / known.positives;
            }
        }
        case LOG_MEAN_EXP: {
            result.loss = known.all - logarithm(known.entries);
        }
        case ALIGNMENT: {
            result.loss = -known.mean_positive;
            result.of_negative = 0.0;
            result.of_positive = -1.0 / known.positives;
        }
        default: {}
    }
    return result;
}

fn gradient_of_positive(z: f32, weight: f32, y: f32, known: Row, result: Result) -> f32 {
    switch (FUNCTION) {
        case CROSS_ENTROPY: {
#ifndef TEACHER
            if (known.positives == 1.0) {
                // p − 1, and what smoothing takes from the target.
                return params.smoothing - params.smoothing / known.entries
                    - exponential(known.of_negatives - known.all);
            }
#endif
            return exponential(z - known.all) - y;
        }
        case LOG_SUM_POSITIVES: {
            return -exponential(known.of_negatives - known.all) * exponential(z - known.of_positives);
        }
        case EACH_POSITIVE: {
            return -sigmoid(known.of_negatives - z) / known.positives;
        }
        case HYBRID_NCE: {
            return result.of_positive * weight * exponential(z - known.together);
        }
        case SIGMOID: {
            return -sigmoid(-z);
        }
        case LOG_MEAN_EXP: {
            return exponential(z - known.all);
        }
        default: {
            return result.of_positive;
        }
    }
}

fn gradient_of_negative(z: f32, y: f32, is_hardest: bool, known: Row, result: Result) -> f32 {
    switch (FUNCTION) {
        case CROSS_ENTROPY: {
            return exponential(z - known.all) - y;
        }
        case HYBRID_NCE: {
            let gap = z - known.hardest;
            let harder = exponential((1.0 + params.hardness) * gap) / known.harder;
            let softer = exponential(params.hardness * gap) / known.softer;
            return result.of_negative * ((1.0 + params.hardness) * harder - params.hardness * softer);
        }
        case SIGMOID: {
            return sigmoid(z);
        }
        case HINGE: {
            return select(0.0, 1.0, z - hinge(known) > 0.0);
        }
        case HARDEST_NEGATIVE: {
            return select(0.0, result.of_negative, is_hardest);
        }
        default: {
            return result.of_negative * exponential(z - result.shift);
        }
    }
}

// Whether a row without positives costs nothing.
fn needs_positive() -> bool {
#ifdef TEACHER
    return false;
#else
    return FUNCTION != HINGE && FUNCTION != LOG_MEAN_EXP;
#endif
}

@compute @workgroup_size(256)
fn evaluate(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = id.x;
    let pair = params.first_row + row;
    let first = (row * params.widths + params.at_width) * params.stride;
    let first_positive = row * params.stride;

    // Counts and largest logits.
    var counts = vec4<f32>();
    var largest = vec4<f32>(NO_ENTRY);
    for (var column = lane; column < params.stride; column += 256u) {
        let z = logits[first + column];
        let weight = positives[first_positive + column];
        if (z != NO_ENTRY) {
            largest.z = max(largest.z, teacher_logit(row, column));
            if (weight > 0.0) {
                counts += vec4<f32>(1.0, 0.0, weight, z);
                largest.x = max(largest.x, z);
            } else {
                counts.y += 1.0;
                largest.y = max(largest.y, z);
            }
        }
    }
    counts = workgroup_sums(counts, lane);
    largest = workgroup_maxima(largest, lane);

    // Sums of exponentials relative to the largest.
    var exponentials = vec4<f32>();
    var of_hybrid = vec4<f32>();
    for (var column = lane; column < params.stride; column += 256u) {
        let z = logits[first + column];
        let weight = positives[first_positive + column];
        if (z != NO_ENTRY) {
            if (weight > 0.0) {
                let e = exponential(z - largest.x);
                exponentials.x += e;
                of_hybrid.z += weight * e;
            } else {
                exponentials.y += exponential(z - largest.y);
                exponentials.z += select(0.0, 1.0, z > largest.x);
                if (FUNCTION == HYBRID_NCE) {
                    of_hybrid.x += exponential((1.0 + params.hardness) * (z - largest.y));
                    of_hybrid.y += exponential(params.hardness * (z - largest.y));
                }
            }
#ifdef TEACHER
            exponentials.w += exponential(teacher_logit(row, column) - largest.z);
#endif
        }
    }
    exponentials = workgroup_sums(exponentials, lane);
    if (FUNCTION == HYBRID_NCE) {
        of_hybrid = workgroup_sums(of_hybrid, lane);
    }

    var known = Row();
    known.positives = counts.x;
    known.negatives = counts.y;
    known.entries = counts.x + counts.y;
    known.weight = counts.z;
    known.mean_positive = counts.w / max(counts.x, 1.0);
    known.best = largest.x;
    known.hardest = largest.y;
    known.of_positives = NO_ENTRY;
    known.of_negatives = NO_ENTRY;
    if (counts.x > 0.0) {
        known.of_positives = largest.x + logarithm(exponentials.x);
        known.together = largest.x + logarithm(of_hybrid.z);
    }
    if (counts.y > 0.0) {
        known.of_negatives = largest.y + logarithm(exponentials.y);
    }
    known.all = log_add_exp(known.of_positives, known.of_negatives);
    known.teacher_largest = largest.z;
    known.teacher_sum = exponentials.w;
    known.harder = of_hybrid.x;
    known.softer = of_hybrid.y;
    known.own = exponential(log_scale[0]);
    let lacking = known.entries == 0.0 || (needs_positive() && known.positives == 0.0);

    // The terms of the loss.
    var total = vec4<f32>();
    if (FUNCTION == CROSS_ENTROPY || FUNCTION == EACH_POSITIVE || FUNCTION == SIGMOID || FUNCTION == HINGE) {
        for (var column = lane; column < params.stride; column += 256u) {
            let z = logits[first + column];
            if (z != NO_ENTRY && !lacking) {
                total += terms(row, column, z, positives[first_positive + column], known);
            }
        }
        total = workgroup_sums(total, lane);
    }
    var hardest_place = params.stride;
    if (FUNCTION == HARDEST_NEGATIVE) {
        for (var column = lane; column < params.stride; column += 256u) {
            if (logits[first + column] == known.hardest && positives[first_positive + column] == 0.0) {
                hardest_place = min(hardest_place, column);
            }
        }
        hardest_place = workgroup_first(hardest_place, lane);
    }
    var result = finish(known, total);
    if (lacking) {
        result.loss = 0.0;
        result.own = 0.0;
    }

    var row_weight = 1.0;
#ifdef ROW_WEIGHTS
    row_weight = row_weights[pair];
#endif
    let weight_of_loss = row_weight * params.weight;
    var derivative = vec4<f32>();
#ifdef BACKWARD
#ifdef UPSTREAM
    let factor = upstream[params.at_width * params.pairs + pair];
#else
    let factor = weight_of_loss * params.average;
#endif
    for (var column = lane; column < params.stride; column += 256u) {
        let z = logits[first + column];
        var g = 0.0;
        if (z != NO_ENTRY && !lacking) {
            let weight = positives[first_positive + column];
            let y = target_of(row, column, weight, known);
            if (weight > 0.0) {
                g = gradient_of_positive(z, weight, y, known, result);
            } else {
                g = gradient_of_negative(z, y, column == hardest_place, known, result);
            }
            g *= factor;
        }
        logits[first + column] = g;
        derivative += vec4<f32>(g * similarities[first + column], g, 0.0, 0.0);
    }
    derivative = workgroup_sums(derivative, lane);
    derivative.x = known.own * (derivative.x + factor * result.own);
#endif

    if (lane == 0u) {
        let at = (row * params.widths + params.at_width) * OUTCOME;
        outcomes[at] = result.loss;
        outcomes[at + 1u] = known.all;
        outcomes[at + 2u] = known.entries;
        outcomes[at + 3u] = known.negatives;
        outcomes[at + 4u] = known.best;
        outcomes[at + 5u] = known.hardest;
        outcomes[at + 6u] = select(0.0, 1.0 + exponentials.z, known.positives > 0.0);
        outcomes[at + 7u] = 0.0;
        outcomes[at + 8u] = weight_of_loss * result.loss;
        outcomes[at + 9u] = derivative.x;
        outcomes[at + 10u] = derivative.y;
    }
}
#endif

#ifdef COLLECT
@compute @workgroup_size(256)
fn collect(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * 256u + lane;
    if (row < params.rows) {
        let pair = params.first_row + row;
        var sums_of_widths = vec3<f32>();
        for (var w = 0u; w < params.widths; w++) {
            let at = (row * params.widths + w) * OUTCOME;
#ifdef GIVE_STATISTICS
            for (var i = 0u; i < STATISTICS; i++) {
                statistics[(w * params.pairs + pair) * STATISTICS + i] = outcomes[at + i];
            }
#endif
            sums_of_widths += vec3<f32>(outcomes[at + 8u], outcomes[at + 9u], outcomes[at + 10u]);
        }
#ifdef GIVE_LOSSES
        losses[pair] += sums_of_widths.x;
#endif
#ifdef GIVE_D_LOG_SCALE
        d_log_scale[pair] += sums_of_widths.y;
#endif
#ifdef GIVE_D_BIAS
        d_bias[pair] += sums_of_widths.z;
#endif
    }
}
#endif
