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
//     sort_within      sorts and merges runs of up to 1,024 in workgroup memory
//     sort_across      one step of merging longer runs
//     ties             ties[p] = (first, end) of the places whose score is that of place p
//     exponents        sums[p] = exp(z) of place p, or REVERSED: exp(−z) of place N − 1 − p
//     scan             sums of each 256 → running ones; totals = the last of each
//     add_before       running sums += the total of all 256s before
//     cosent           the loss, and 1 + Σ for cosent_gradient
//
// Launch: 256 invocations a workgroup. cosent, pearson and rank_kl are one workgroup: it is a few numbers a pair. Others
// have an invocation for each element; sort_within has four elements, sort_across two.

#import groups
#import numerics

struct Params {
    count: u32,
#ifdef KEYS
    groups: u32,
    padded: u32,
#endif
#ifdef SORT_WITHIN
    groups: u32,
    // Lengths of runs after the first and the last merge.
    shortest: u32,
    longest: u32,
#endif
#ifdef SORT_ACROSS
    groups: u32,
    longest: u32,
    distance: u32,
#endif
#ifdef TIES
    groups: u32,
#endif
#ifdef EXPONENTS
    groups: u32,
#endif
#ifdef SCAN
    groups: u32,
#endif
#ifdef ADD_BEFORE
    groups: u32,
#endif
#ifdef COSENT_GRADIENT
    groups: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> similarity: array<f32>;
@group(0) @binding(2) var<storage, read> scores: array<f32>;
@group(0) @binding(3) var<storage, read> log_scale: array<f32>;
@group(0) @binding(4) var<storage, read_write> order: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> ties_of: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> sums: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read_write> totals: array<vec2<f32>>;
@group(0) @binding(8) var<storage, read> below: array<vec2<f32>>;
@group(0) @binding(9) var<storage, read> above: array<vec2<f32>>;
@group(0) @binding(10) var<storage, read_write> loss: array<f32>;
@group(0) @binding(11) var<storage, read_write> gradient: array<f32>;

// The sum of no exponentials. Far below every exponent, but not so far that differences would leave single precision.
const NOTHING: vec2<f32> = vec2<f32>(-2e38, 0.0);
// Elements that sort_within has at a time.
const RUN: u32 = 1024u;
// Similarities that are off their mean by no more than that part of it are equal.
const SAME_SIMILARITY: f32 = 1.0 / 1048576.0;

// Of sums of exponentials.
fn add_sums(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    let largest = max(a.x, b.x);
    return vec2<f32>(largest, a.y * exponential(a.x - largest) + b.y * exponential(b.x - largest));
}

// log(1 + sum), and 1 + sum itself.
struct OnePlus {
    logarithm: f32,
    sum: vec2<f32>,
}

fn one_plus(sum: vec2<f32>) -> OnePlus {
    let total = add_sums(sum, vec2<f32>(0.0, 1.0));
    if (sum.x <= 0.0) {
        let plain = sum.y * exponential(sum.x);
        if (plain <= 1.0) {
            return OnePlus(logarithm_of_one_plus(plain), total);
        }
    }
    return OnePlus(total.x + logarithm(total.y), total);
}

fn scale() -> f32 {
    return exponential(log_scale[0]);
}

#ifdef KEYS
@compute @workgroup_size(256)
fn keys(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_number(id, lines) * 256u + lane;
    if (i < params.count) {
        // −0 and 0 are one score.
        let bits = bitcast<u32>(select(scores[i], 0.0, scores[i] == 0.0));
        let is_negative = (bits >> 31u) == 1u;
        order[i] = vec2<u32>(select(bits | 0x80000000u, ~bits, is_negative), i);
    } else if (i < params.padded) {
        order[i] = vec2<u32>(0xffffffffu);
    }
}
#endif

fn is_after(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x > b.x || (a.x == b.x && a.y > b.y);
}

#ifdef SORT_WITHIN
var<workgroup> run: array<vec2<u32>, RUN>;

@compute @workgroup_size(256)
fn sort_within(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    if (group >= params.groups) {
        return;
    }
    let first = group * RUN;
    for (var i = lane; i < RUN; i += 256u) {
        run[i] = order[first + i];
    }
    workgroupBarrier();
    for (var length = params.shortest; length <= params.longest; length *= 2u) {
        for (var distance = min(length, RUN) / 2u; distance > 0u; distance /= 2u) {
            for (var element = lane; element < RUN / 2u; element += 256u) {
                let a = element / distance * 2u * distance + element % distance;
                let b = a + distance;
                let descends = ((first + a) & length) != 0u;
                if (is_after(run[a], run[b]) != descends) {
                    let other = run[a];
                    run[a] = run[b];
                    run[b] = other;
                }
            }
            workgroupBarrier();
        }
    }
    for (var i = lane; i < RUN; i += 256u) {
        order[first + i] = run[i];
    }
}
#endif

#ifdef SORT_ACROSS
@compute @workgroup_size(256)
fn sort_across(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let element = group_number(id, lines) * 256u + lane;
    if (element < params.count) {
        let a = element / params.distance * 2u * params.distance + element % params.distance;
        let b = a + params.distance;
        let first = order[a];
        let second = order[b];
        if (is_after(first, second) != ((a & params.longest) != 0u)) {
            order[a] = second;
            order[b] = first;
        }
    }
}
#endif

#ifdef TIES
// The first place whose key is at least, or above, that one.
fn first_place(key: u32, above: bool) -> u32 {
    var low = 0u;
    var high = params.count;
    while (low < high) {
        let middle = (low + high) / 2u;
        let found = order[middle].x;
        if (found > key || (found == key && !above)) {
            high = middle;
        } else {
            low = middle + 1u;
        }
    }
    return low;
}

@compute @workgroup_size(256)
fn ties(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let place = group_number(id, lines) * 256u + lane;
    if (place < params.count) {
        let key = order[place].x;
        ties_of[place] = vec2<u32>(first_place(key, false), first_place(key, true));
    }
}
#endif

#ifdef EXPONENTS
@compute @workgroup_size(256)
fn exponents(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let place = group_number(id, lines) * 256u + lane;
    if (place < params.count) {
#ifdef REVERSED
        let z = -scale() * similarity[order[params.count - 1u - place].y];
#else
        let z = scale() * similarity[order[place].y];
#endif
        sums[place] = vec2<f32>(z, 1.0);
    }
}
#endif

var<workgroup> parts: array<vec2<f32>, 256>;

#ifdef SCAN
@compute @workgroup_size(256)
fn scan(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    let place = group * 256u + lane;
    var sum = NOTHING;
    if (place < params.count) {
        sum = sums[place];
    }
    for (var distance = 1u; distance < 256u; distance *= 2u) {
        parts[lane] = sum;
        workgroupBarrier();
        if (lane >= distance) {
            sum = add_sums(parts[lane - distance], sum);
        }
        workgroupBarrier();
    }
    if (place < params.count) {
        sums[place] = sum;
    }
    if (lane == 255u && group < params.groups) {
        totals[group] = sum;
    }
}
#endif

#ifdef ADD_BEFORE
@compute @workgroup_size(256)
fn add_before(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    let place = group * 256u + lane;
    if (group > 0u && place < params.count) {
        sums[place] = add_sums(totals[group - 1u], sums[place]);
    }
}
#endif

// The exponentials of the z below a place's score, and of the −z above it.
fn sum_below(place: u32) -> vec2<f32> {
    let first = ties_of[place].x;
    if (first == 0u) {
        return NOTHING;
    }
    return below[first - 1u];
}

fn sum_above(place: u32) -> vec2<f32> {
    let end = ties_of[place].y;
    if (end == params.count) {
        return NOTHING;
    }
    return above[params.count - 1u - end];
}

#ifdef COSENT
@compute @workgroup_size(256)
fn cosent(@builtin(local_invocation_index) lane: u32) {
    var sum = NOTHING;
    for (var place = lane; place < params.count; place += 256u) {
        let lower = sum_below(place);
        sum = add_sums(sum, vec2<f32>(lower.x - scale() * similarity[order[place].y], lower.y));
    }
    parts[lane] = sum;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            parts[lane] = add_sums(parts[lane], parts[lane + step]);
        }
        workgroupBarrier();
    }
    if (lane == 0u) {
        let result = one_plus(parts[0]);
        loss[0] = result.logarithm;
        totals[0] = result.sum;
    }
}
#endif

#ifdef COSENT_GRADIENT
@compute @workgroup_size(256)
fn cosent_gradient(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let place = group_number(id, lines) * 256u + lane;
    if (place < params.count) {
        let pair = order[place].y;
        let z = scale() * similarity[pair];
        let total = totals[0];
        let lower = sum_below(place);
        let higher = sum_above(place);
        gradient[pair] = (higher.y * exponential(z + higher.x - total.x)
            - lower.y * exponential(lower.x - z - total.x)) / total.y;
    }
}
#endif

var<workgroup> values: array<vec4<f32>, 256>;

fn workgroup_sums(value: vec4<f32>, lane: u32) -> vec4<f32> {
    values[lane] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            values[lane] += values[lane + step];
        }
        workgroupBarrier();
    }
    let total = values[0];
    workgroupBarrier();
    return total;
}

fn workgroup_maxima(value: vec4<f32>, lane: u32) -> vec4<f32> {
    values[lane] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            values[lane] = max(values[lane], values[lane + step]);
        }
        workgroupBarrier();
    }
    let largest = values[0];
    workgroupBarrier();
    return largest;
}

#ifdef PEARSON
@compute @workgroup_size(256)
fn pearson(@builtin(local_invocation_index) lane: u32) {
    let n = f32(params.count);
    // Means, then what rounding has left of them; and the range of the gold scores.
    var mean = vec2<f32>();
    var range = vec4<f32>(NO_ENTRY);
    for (var pass_number = 0u; pass_number < 2u; pass_number++) {
        var sum = vec2<f32>();
        for (var i = lane; i < params.count; i += 256u) {
            sum += (vec2<f32>(similarity[i], scores[i]) - mean) / n;
            range = max(range, vec4<f32>(scores[i], -scores[i], NO_ENTRY, NO_ENTRY));
        }
        mean += workgroup_sums(vec4<f32>(sum, 0.0, 0.0), lane).xy;
    }
    range = workgroup_maxima(range, lane);
    var farthest = vec2<f32>();
    for (var i = lane; i < params.count; i += 256u) {
        farthest = max(farthest, abs(vec2<f32>(similarity[i], scores[i]) - mean));
    }
    farthest = workgroup_maxima(vec4<f32>(farthest, 0.0, 0.0), lane).xy;

    // Relative to the farthest, squares stay in single precision.
    let unit = 1.0 / max(farthest, vec2<f32>(1e-37));
    var products = vec3<f32>();
    for (var i = lane; i < params.count; i += 256u) {
        let centred = (vec2<f32>(similarity[i], scores[i]) - mean) * unit;
        products += vec3<f32>(centred * centred, centred.x * centred.y);
    }
    products = workgroup_sums(vec4<f32>(products, 0.0), lane).xyz;
    let lengths = max(sqrt(products.xy), vec2<f32>(1e-18));
    let r = clamp(products.z / (lengths.x * lengths.y), -1.0, 1.0);

    let asks_nothing = range.x == -range.y;
    let is_flat = farthest.x <= SAME_SIMILARITY * abs(mean.x);
    for (var i = lane; i < params.count; i += 256u) {
        let centred = (vec2<f32>(similarity[i], scores[i]) - mean) * unit / lengths;
        let derivative = (r * centred.x - centred.y) / (lengths.x * scale()) * unit.x;
        gradient[i] = select(derivative, 0.0, asks_nothing || is_flat);
    }
    if (lane == 0u) {
        loss[0] = select(select(1.0 - r, 1.0, is_flat), 0.0, asks_nothing);
    }
}
#endif

#ifdef RANK_KL
// The logit of a place, and that of its rank: equal scores have the mean of theirs.
fn logits_of(place: u32) -> vec2<f32> {
    let tie = ties_of[place];
    let rank = f32(tie.x) + 0.5 * f32(tie.y - tie.x - 1u);
    return scale() * vec2<f32>(similarity[order[place].y], rank / f32(max(params.count, 2u) - 1u));
}

@compute @workgroup_size(256)
fn rank_kl(@builtin(local_invocation_index) lane: u32) {
    var largest = vec2<f32>(NO_ENTRY);
    for (var place = lane; place < params.count; place += 256u) {
        largest = max(largest, logits_of(place));
    }
    largest = workgroup_maxima(vec4<f32>(largest, 0.0, 0.0), lane).xy;
    var sum = vec2<f32>();
    for (var place = lane; place < params.count; place += 256u) {
        let relative = logits_of(place) - largest;
        sum += vec2<f32>(exponential(relative.x), exponential(relative.y));
    }
    sum = workgroup_sums(vec4<f32>(sum, 0.0, 0.0), lane).xy;
    let logarithms = vec2<f32>(logarithm(sum.x), logarithm(sum.y));
    let n = f32(params.count);
    var divergence = 0.0;
    for (var place = lane; place < params.count; place += 256u) {
        let relative = logits_of(place) - largest;
        let probability = vec2<f32>(exponential(relative.x), exponential(relative.y)) / sum;
        let gap = (relative.y - logarithms.y) - (relative.x - logarithms.x);
        divergence += probability.y * gap;
        gradient[order[place].y] = (probability.x - probability.y) / n;
    }
    divergence = workgroup_sums(vec4<f32>(divergence, 0.0, 0.0, 0.0), lane).x;
    if (lane == 0u) {
        loss[0] = divergence / n;
    }
}
#endif
