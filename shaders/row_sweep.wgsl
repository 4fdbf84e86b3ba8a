// One partition of an objective, row by row: everything around the row function, which is row_function.wgsl.
//
// A strip is `rows` rows, from `first_row` on. Its workspaces have for each row, and in it for each of `widths` prefixes
// of the embeddings, a line of `stride` columns: those of all blocks side by side. A launch is for one block, whose
// `width` columns begin at `column`. Matrix products write similarities and read gradients; this is what is left:
//
//     owners            keys[owners + c] = the pair i with offsets[i] ≤ c < offsets[i + 1]
//     own_products      similarities[r, k] = anchor r · candidate k of its own, over the values of a segment: those
//                       between two widths
//     normalise         similarities over segments → over prefixes; times both norms, or less both half squares
//     entries           logits = σ·s + bias, − margin on positives, + hardness·s on negatives; NO_ENTRY where masked
//                       positives = the weight of each positive, 0 of everything else
//     listed            both for positives that are listed
//     along_anchors     along[w, r] += σ · Σ_c g·s          without the s where half squares are subtracted
//     along_candidates  along[w, c] += σ · Σ_r g·s
//     segments          gradients of similarities → of dot products over segments
//     own_anchors       d_anchor[r] += σ · Σ_k g[r, k] · candidate k of its own
//     own_candidates    d_candidate[k of r] += σ · g[r, k] · anchor r
//
// Keys are ids, labels, segments of pairs, and where each pair's candidates begin, one after the other, those that are
// there; parameters say where.
//
// Launch: 256 invocations a workgroup.
//     normalise, entries, segments          columns in x, rows in y; of entries, widths in z
//     listed, along_anchors                 a workgroup for each row in x; of the latter, widths in y
//     along_candidates                      columns, or rows times columns if each row has its own, in x, widths in y
//     own_products                          32 invocations for each row and column
//     owners, own_anchors, own_candidates   an invocation for each element

#ifdef OWN_PRODUCTS
#define OWN_VALUES
#endif
#ifdef OWN_ANCHORS
#define OWN_VALUES
#endif
#ifdef OWN_CANDIDATES
#define OWN_VALUES
#endif

#import groups
#import numerics
#ifdef OWN_PRODUCTS
#import rows
#endif
#ifdef ALONG_ANCHORS
#import reduce
#endif

struct Params {
    rows: u32,
    first_row: u32,
    // Rows of the batch.
    pairs: u32,
    widths: u32,
    stride: u32,
    column: u32,
    width: u32,
    candidate_count: u32,
    // Where the block's keys are.
    offsets: u32,
    owners: u32,
    // See the constants.
    rules: u32,
#ifdef OWNERS
    groups: u32,
#endif
#ifdef ENTRIES
    ids: u32,
    labels: u32,
    segments: u32,
    // The row's own positive stands at held + held_step · pair.
    held: u32,
    held_step: u32,
    margin: f32,
    hardness: f32,
    // False negatives are above positive + above − below·|positive|.
    above: f32,
    below: f32,
#endif
#ifdef LISTED
    margin: f32,
    count: u32,
#endif
#ifdef OWN_VALUES
    groups: u32,
    at_width: u32,
    segment: u32,
    segment_width: u32,
    embedding: u32,
    first_candidate: u32,
    end_candidate: u32,
    anchors_base: u32,
    candidates_base: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
#ifdef OWNERS
@group(0) @binding(1) var<storage, read_write> keys: array<u32>;
#else
@group(0) @binding(1) var<storage, read> keys: array<u32>;
#endif
#ifdef NORMALISE
@group(0) @binding(2) var<storage, read_write> similarities: array<f32>;
#else
#ifdef OWN_PRODUCTS
@group(0) @binding(2) var<storage, read_write> similarities: array<f32>;
#else
@group(0) @binding(2) var<storage, read> similarities: array<f32>;
#endif
#endif
@group(0) @binding(3) var<storage, read_write> logits: array<f32>;
@group(0) @binding(4) var<storage, read_write> positives: array<f32>;
#ifdef SEGMENTS
@group(0) @binding(5) var<storage, read_write> gradient: array<f32>;
#else
@group(0) @binding(5) var<storage, read> gradient: array<f32>;
#endif
@group(0) @binding(6) var<storage, read> log_scale: array<f32>;
@group(0) @binding(7) var<storage, read> bias: array<f32>;
@group(0) @binding(8) var<storage, read> guide: array<f32>;
@group(0) @binding(9) var<storage, read> references: array<f32>;
@group(0) @binding(10) var<storage, read> list_offsets: array<u32>;
@group(0) @binding(11) var<storage, read> list_candidates: array<u32>;
@group(0) @binding(12) var<storage, read> list_weights: array<f32>;
@group(0) @binding(13) var<storage, read> anchor_norms: array<f32>;
@group(0) @binding(14) var<storage, read> candidate_norms: array<f32>;
@group(0) @binding(15) var<storage, read> anchors: array<f32>;
@group(0) @binding(16) var<storage, read> candidates: array<f32>;
@group(0) @binding(17) var<storage, read_write> along: array<f32>;
@group(0) @binding(18) var<storage, read_write> d_anchors: array<f32>;
@group(0) @binding(19) var<storage, read_write> d_candidates: array<f32>;

// The place of keys that are not there, and the owner of candidates that belong to no pair.
const NOWHERE: u32 = 0xffffffffu;
// The segment of pairs that are padding.
const PADDING: u32 = 0xffffffffu;

// Each row has candidates of its own.
const OWN: u32 = 1u;
// What belongs to the row's own pair is no entry.
const WITHOUT_OWN: u32 = 2u;
// Candidates are queries or documents, one of each pair.
const OF_PAIRS: u32 = 4u;
// The one of the row's own pair is its positive.
const OWN_POSITIVE: u32 = 8u;
// Hardness weighting is for what belongs to the row's own pair, and for what does not.
const HARD_OWN: u32 = 16u;
const HARD_OTHERS: u32 = 32u;
// To hardness weighting, the candidates belong to nobody.
const NOBODYS: u32 = 64u;
// What looks like a positive is left out.
const FALSE_NEGATIVES: u32 = 128u;
// Half squares are subtracted where otherwise norms are multiplied with.
const HALVES: u32 = 256u;

fn has(rule: u32) -> bool {
    return (params.rules & rule) != 0u;
}

// The place of a column of the block in a row of a workspace.
fn place(row: u32, w: u32, column: u32) -> u32 {
    return (row * params.widths + w) * params.stride + params.column + column;
}

// The candidates of a pair's own: the first one, and the one after the last.
fn own(pair: u32) -> vec2<u32> {
    var range = vec2<u32>(pair, pair + 1u);
    if (params.offsets != NOWHERE) {
        range = vec2<u32>(keys[params.offsets + pair], keys[params.offsets + pair + 1u]);
    }
    return min(range, vec2<u32>(params.candidate_count));
}

// Which candidate stands in a column of a pair's row; another one in columns that nothing stands in.
fn candidate_of(pair: u32, column: u32) -> u32 {
    if (has(OWN)) {
        return min(own(pair).x + column, params.candidate_count - 1u);
    }
    return column;
}

// Whether a column of a pair's row has a candidate.
fn is_there(pair: u32, column: u32) -> bool {
    if (has(OWN)) {
        let range = own(pair);
        return range.x + column < range.y;
    }
    return true;
}

#ifdef OWNERS
@compute @workgroup_size(256)
fn owners(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let candidate = group_number(id, lines) * 256u + lane;
    if (candidate < params.candidate_count) {
        // The first pair whose candidates end beyond it.
        var low = 0u;
        var high = params.pairs - 1u;
        while (low < high) {
            let middle = (low + high) / 2u;
            if (keys[params.offsets + middle + 1u] > candidate) {
                high = middle;
            } else {
                low = middle + 1u;
            }
        }
        keys[params.owners + candidate] = low;
    }
}
#endif

#ifdef OWN_PRODUCTS
@compute @workgroup_size(256)
fn own_products(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let element = group_number(id, lines) * ROWS + lane / ROW_LANES;
    let row = min(element / params.width, params.rows - 1u);
    let column = element % params.width;
    let pair = params.first_row + row;
    let candidate = candidate_of(pair, column);
    let there = is_there(pair, column);
    let here = there && candidate >= params.first_candidate && candidate < params.end_candidate;
    var sum = 0.0;
    if (here) {
        var anchor_norm = 1.0;
        var candidate_norm = 1.0;
#ifdef NORMS
        anchor_norm = anchor_norms[pair];
        candidate_norm = candidate_norms[candidate];
#endif
        let a = params.anchors_base + row * params.embedding + params.segment;
        let b = params.candidates_base + (candidate - params.first_candidate) * params.embedding + params.segment;
        for (var i = lane % ROW_LANES; i < params.segment_width; i += ROW_LANES) {
            sum += (anchors[a + i] * anchor_norm) * (candidates[b + i] * candidate_norm);
        }
    }
    sum = row_sum(sum, lane);
    // Where nothing stands, the workspace is to hold a number nevertheless.
    if (lane % ROW_LANES == 0u && element < params.rows * params.width && (here || !there)) {
        similarities[place(row, params.at_width, column)] = sum;
    }
}
#endif

#ifdef NORMALISE
@compute @workgroup_size(256)
fn normalise(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    if (column < params.width) {
        let pair = params.first_row + id.y;
        let candidate = candidate_of(pair, column);
        var product = 0.0;
        for (var w = 0u; w < params.widths; w++) {
            let at = place(id.y, w, column);
            product += similarities[at];
            var similarity = product;
#ifdef NORMS
            let anchor_norm = anchor_norms[w * params.pairs + pair];
            let candidate_norm = candidate_norms[w * params.candidate_count + candidate];
            if (has(HALVES)) {
                similarity -= anchor_norm + candidate_norm;
            } else {
                similarity *= anchor_norm * candidate_norm;
            }
#endif
            similarities[at] = similarity;
        }
    }
}
#endif

#ifdef ENTRIES
// The pair that a candidate belongs to.
fn owner_of(pair: u32, column: u32) -> u32 {
    if (has(OWN)) {
        return pair;
    }
    if (has(OF_PAIRS)) {
        return column;
    }
    if (params.owners != NOWHERE) {
        return keys[params.owners + column];
    }
    return NOWHERE;
}

fn is_padding(pair: u32) -> bool {
    if (params.segments == NOWHERE) {
        return false;
    }
    return keys[params.segments + pair] == PADDING;
}

// Whether a pair is compared with candidates of another.
fn together(pair: u32, other: u32) -> bool {
    if (params.segments == NOWHERE || other >= params.pairs) {
        return true;
    }
    return keys[params.segments + pair] == keys[params.segments + other];
}

// Whether a candidate that belongs to a pair, or to none, is a positive of the row's pair.
fn is_positive(pair: u32, owner: u32, column: u32) -> bool {
    if (is_padding(pair) || !has(OF_PAIRS) || (has(OWN) && column > 0u)) {
        return false;
    }
    if (params.labels == NOWHERE) {
        return has(OWN_POSITIVE) && owner == pair;
    }
    if (has(OWN)) {
        return true;
    }
    if (owner >= params.pairs || (owner == pair && has(WITHOUT_OWN))) {
        return false;
    }
    return keys[params.labels + owner] == keys[params.labels + pair] && together(pair, owner);
}

// Whether a candidate that is no positive is left out.
fn is_masked(pair: u32, owner: u32, column: u32) -> bool {
    if (is_padding(pair) || !is_there(pair, column)) {
        return true;
    }
    if (has(OWN)) {
        return false;
    }
    if (!together(pair, owner) || (owner == pair && has(WITHOUT_OWN))) {
        return true;
    }
    if (params.ids == NOWHERE || owner >= params.pairs) {
        return false;
    }
    return keys[params.ids + owner] == keys[params.ids + pair];
}

// Whether what a row holds in a column looks like a positive.
fn is_false_negative(row: u32, w: u32, column: u32) -> bool {
    if (!has(FALSE_NEGATIVES)) {
        return false;
    }
    let own_column = min(params.held + params.held_step * (params.first_row + row), params.stride - 1u);
#ifdef GUIDE
    let found = guide[row * params.stride + params.column + column];
#ifdef REFERENCES
    let positive = references[row];
#else
    let positive = guide[row * params.stride + own_column];
#endif
#else
    let found = similarities[place(row, w, column)];
#ifdef REFERENCES
    let positive = references[row * params.widths + w];
#else
    let positive = similarities[(row * params.widths + w) * params.stride + own_column];
#endif
#endif
    return found > positive + params.above - params.below * abs(positive);
}

@compute @workgroup_size(256)
fn entries(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    let row = id.y;
    let w = id.z;
    if (column < params.width) {
        let pair = params.first_row + row;
        let at = place(row, w, column);
        let owner = owner_of(pair, column);
        let positive = is_positive(pair, owner, column);
        var logit = NO_ENTRY;
        if (positive || !(is_masked(pair, owner, column) || is_false_negative(row, w, column))) {
            let similarity = similarities[at];
            logit = exponential(log_scale[0]) * similarity;
#ifdef BIAS
            logit += bias[0];
#endif
            let hard = select(HARD_OTHERS, HARD_OWN, owner == pair && !has(NOBODYS));
            if (positive) {
                logit -= params.margin;
            } else if (has(hard)) {
                logit += params.hardness * similarity;
            }
        }
        logits[at] = logit;
        if (w == 0u) {
            positives[row * params.stride + params.column + column] = select(0.0, 1.0, positive);
        }
    }
}
#endif

#ifdef LISTED
@compute @workgroup_size(256)
fn listed(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = id.x;
    let pair = params.first_row + row;
    let first = min(list_offsets[pair], params.count);
    let end = min(list_offsets[pair + 1u], params.count);
    for (var i = first + lane; i < end; i += 256u) {
        let candidate = list_candidates[i];
        // What is listed twice weighs twice: the first time stands for all.
        var is_first = candidate < params.width;
        for (var other = first; other < i; other++) {
            is_first = is_first && list_candidates[other] != candidate;
        }
        if (is_first) {
            var weight = 0.0;
            for (var other = i; other < end; other++) {
                if (list_candidates[other] == candidate) {
#ifdef WEIGHTS
                    weight += list_weights[other];
#else
                    weight += 1.0;
#endif
                }
            }
            positives[row * params.stride + params.column + candidate] = weight;
            for (var w = 0u; w < params.widths; w++) {
                let at = place(row, w, candidate);
                var logit = exponential(log_scale[0]) * similarities[at];
#ifdef BIAS
                logit += bias[0];
#endif
                logits[at] = logit - params.margin;
            }
        }
    }
}
#endif

#ifdef ALONG_ANCHORS
@compute @workgroup_size(256)
fn along_anchors(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var column = lane; column < params.width; column += 256u) {
        let at = place(id.x, id.y, column);
        sum += gradient[at] * select(similarities[at], 1.0, has(HALVES));
    }
    sum = workgroup_sum(sum, lane);
    if (lane == 0u) {
        along[id.y * params.pairs + params.first_row + id.x] += exponential(log_scale[0]) * sum;
    }
}
#endif

#ifdef ALONG_CANDIDATES
fn part_along(row: u32, w: u32, column: u32) -> f32 {
    let at = place(row, w, column);
    return gradient[at] * select(similarities[at], 1.0, has(HALVES));
}

@compute @workgroup_size(256)
fn along_candidates(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let element = id.x * 256u + lane;
    let of_width = id.y * params.candidate_count;
    let scale = exponential(log_scale[0]);
    if (has(OWN)) {
        let row = element / params.width;
        let column = element % params.width;
        let pair = params.first_row + row;
        if (row < params.rows) {
            if (is_there(pair, column)) {
                along[of_width + candidate_of(pair, column)] += scale * part_along(row, id.y, column);
            }
        }
    } else if (element < params.width) {
        var sum = 0.0;
        for (var row = 0u; row < params.rows; row++) {
            sum += part_along(row, id.y, element);
        }
        along[of_width + element] += scale * sum;
    }
}
#endif

#ifdef SEGMENTS
@compute @workgroup_size(256)
fn segments(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    if (column < params.width) {
        let pair = params.first_row + id.y;
        let candidate = candidate_of(pair, column);
        // A segment belongs to its own prefix and to all longer ones.
        var sum = 0.0;
        for (var longer = params.widths; longer > 0u; longer--) {
            let w = longer - 1u;
            let at = place(id.y, w, column);
#ifdef NORMS
            sum += gradient[at]
                * (anchor_norms[w * params.pairs + pair] * candidate_norms[w * params.candidate_count + candidate]);
#else
            sum += gradient[at];
#endif
            gradient[at] = sum;
        }
    }
}
#endif

#ifdef OWN_ANCHORS
@compute @workgroup_size(256)
fn own_anchors(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let element = group_number(id, lines) * 256u + lane;
    let row = element / params.segment_width;
    let i = element % params.segment_width;
    if (row < params.rows) {
        let range = own(params.first_row + row);
        let first = max(range.x, params.first_candidate);
        let end = min(min(range.y, params.end_candidate), range.x + params.width);
        var sum = 0.0;
        for (var candidate = first; candidate < end; candidate++) {
            var value = candidates[
                params.candidates_base + (candidate - params.first_candidate) * params.embedding + params.segment + i
            ];
#ifdef NORMS
            value *= candidate_norms[candidate];
#endif
            sum += gradient[place(row, params.at_width, candidate - range.x)] * value;
        }
        d_anchors[params.anchors_base + row * params.embedding + params.segment + i]
            += exponential(log_scale[0]) * sum;
    }
}
#endif

#ifdef OWN_CANDIDATES
@compute @workgroup_size(256)
fn own_candidates(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let element = group_number(id, lines) * 256u + lane;
    let i = element % params.segment_width;
    let column = element / params.segment_width % params.width;
    let row = element / params.segment_width / params.width;
    if (row < params.rows) {
        let pair = params.first_row + row;
        let candidate = candidate_of(pair, column);
        let there = is_there(pair, column);
        if (there && candidate >= params.first_candidate && candidate < params.end_candidate) {
            var value = anchors[params.anchors_base + row * params.embedding + params.segment + i];
#ifdef NORMS
            value *= anchor_norms[pair];
#endif
            let at = params.candidates_base + (candidate - params.first_candidate) * params.embedding
                + params.segment + i;
            d_candidates[at] += exponential(log_scale[0]) * gradient[place(row, params.at_width, column)] * value;
        }
    }
}
#endif
