// Softmax attention of packed sequences (arXiv 1706.03762, eq. 1), each sequence over itself, and its gradients,
// without a matrix of length × length: scores are computed a tile of 32 × 32 at a time (arXiv 2205.14135). With σ the
// scale and f what dropout multiplies with:
//
//     P = softmax(σ · Q · Kᵀ) ;  D = P ∘ (f ∘ (dO · Vᵀ) − along)  with  along[row] = O[row] · dO[row]
//     forward         O  = (f ∘ P) · V, and the log-sum-exp of each row of scores
//     query_gradient  dQ = σ · D · K
//     key_gradient    dK = σ · Dᵀ · Q
//     value_gradient  dV = (f ∘ P)ᵀ · dO
//
// All four are a sum over blocks of 32 rows: tile of weights times rows of a matrix. The rows that a workgroup sums for
// are its own rows, queries or keys; those it sums over are the other ones.
//
// Launch: 64 invocations a workgroup, which have 32 rows of one head of one sequence: `blocks` workgroups times heads
// times sequences, most of them empty where lengths differ much. Invocation 8·y + x has the weights of own rows 4·y to
// 4·y + 3 and other rows 4·x to 4·x + 3, and of the sums of the same own rows every eighth four of columns from 4·x on.
// A launch has the sequences that begin in its `owned_rows` rows from `first_row` on; `count` rows are bound.
//
// HEAD is the width of a head, rounded up to a power of two from 32 on; columns that are not there count as 0.

#import groups
#import numerics
#ifdef DROPOUT
#import dropout
#endif

struct Params {
    groups: u32,
    blocks: u32,
    heads: u32,
    head_width: u32,
    width: u32,
    first_row: u32,
    owned_rows: u32,
    count: u32,
    scale: f32,
    projections_base: u32,
    output_base: u32,
#ifndef FORWARD
    upstream_base: u32,
#endif
#ifdef DROPOUT
    dropout_row: u32,
    dropout_site: u32,
    dropout_step: u32,
    dropout_key_low: u32,
    dropout_key_high: u32,
    dropout_threshold: u32,
    dropout_scale: f32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> offsets: array<u32>;
// (T, 3·C): query, key and value of each row.
@group(0) @binding(2) var<storage, read> projections: array<f32>;
// (T, C), or (T, 3·C) for gradients.
@group(0) @binding(3) var<storage, read_write> output: array<f32>;
// (T, heads)
#ifdef FORWARD
@group(0) @binding(4) var<storage, read_write> log_sum_exp: array<f32>;
#else
@group(0) @binding(4) var<storage, read> log_sum_exp: array<f32>;
@group(0) @binding(5) var<storage, read> along: array<f32>;
@group(0) @binding(6) var<storage, read> upstream: array<f32>;
#endif

// Rows of a block, columns that scores are computed from at a time, and lines of the tile, one longer than it is full:
// so lines begin in different banks.
const BLOCK: u32 = 32u;
const SLICE: u32 = 32u;
const LINE: u32 = 9u;
// Where the other rows begin in the tile.
const OTHER: u32 = SLICE * LINE;
// Fours of columns of a head, of one invocation and of all, and rows of that width that the tile holds.
const FOURS: u32 = HEAD / 32u;
const HEAD_FOURS: u32 = HEAD / 4u;
const ROWS_AT_ONCE: u32 = 2048u / max(HEAD, 64u);

// Matrices that are multiplied.
const QUERY: u32 = 0u;
const KEY: u32 = 1u;
const VALUE: u32 = 2u;
const UPSTREAM: u32 = 3u;

var<workgroup> tile: array<vec4<f32>, 2u * OTHER>;
// Of each other row the weights for the own rows.
var<workgroup> weights: array<vec4<f32>, BLOCK * LINE>;
var<workgroup> exchanged: array<vec4<f32>, 64>;

// What a workgroup works on. Rows are counted from the first of the sequence on.
struct Task {
    // The first row of the sequence among those that are bound.
    first: u32,
    length: u32,
    head: u32,
    // The first of the own rows.
    own: u32,
}

fn task(id: vec3<u32>, lines: vec3<u32>) -> Task {
    let group = group_number(id, lines);
    if (group >= params.groups) {
        return Task(0u, 0u, 0u, 0u);
    }
    let sequence = group / (params.blocks * params.heads);
    let first = offsets[sequence] - params.first_row;
    if (first >= params.owned_rows) {
        return Task(0u, 0u, 0u, 0u);
    }
    let end = clamp(offsets[sequence + 1u] - params.first_row, first, params.count);
    let head = group / params.blocks % params.heads;
    return Task(first, end - first, head, group % params.blocks * BLOCK);
}

fn element(matrix: u32, here: Task, row: u32, column: u32) -> f32 {
    if (row >= here.length || column >= params.head_width) {
        return 0.0;
    }
    let place = here.first + row;
    let at = here.head * params.head_width + column;
#ifndef FORWARD
    if (matrix == UPSTREAM) {
        return upstream[params.upstream_base + place * params.width + at];
    }
#endif
    return projections[params.projections_base + (3u * place + matrix) * params.width + at];
}

// Puts columns from `slice` on of 32 rows into the tile, a line for each column.
fn load_columns(to: u32, matrix: u32, here: Task, first: u32, slice: u32, lane: u32) {
    let line = lane % SLICE;
    for (var four = lane / SLICE; four < BLOCK / 4u; four += 64u / SLICE) {
        let row = first + 4u * four;
        tile[to + line * LINE + four] = vec4<f32>(
            element(matrix, here, row, slice + line),
            element(matrix, here, row + 1u, slice + line),
            element(matrix, here, row + 2u, slice + line),
            element(matrix, here, row + 3u, slice + line),
        );
    }
}

// The products of own and other rows of two matrices: a column for each other row, a line for each own one.
fn products(own_matrix: u32, other_matrix: u32, here: Task, other: u32, lane: u32) -> mat4x4<f32> {
    var a = vec4<f32>();
    var b = vec4<f32>();
    var c = vec4<f32>();
    var d = vec4<f32>();
    for (var slice = 0u; slice < params.head_width; slice += SLICE) {
        workgroupBarrier();
        load_columns(0u, own_matrix, here, here.own, slice, lane);
        load_columns(OTHER, other_matrix, here, other, slice, lane);
        workgroupBarrier();
        for (var line = 0u; line < SLICE; line++) {
            let of_own = tile[line * LINE + lane / 8u];
            let of_other = tile[OTHER + line * LINE + lane % 8u];
            a += of_own * of_other.x;
            b += of_own * of_other.y;
            c += of_own * of_other.z;
            d += of_own * of_other.w;
        }
    }
    return mat4x4<f32>(a, b, c, d);
}

fn store_weights(of_invocation: mat4x4<f32>, lane: u32) {
    let at = lane % 8u * 4u * LINE + lane / 8u;
    weights[at] = of_invocation[0];
    weights[at + LINE] = of_invocation[1];
    weights[at + 2u * LINE] = of_invocation[2];
    weights[at + 3u * LINE] = of_invocation[3];
}

// Of each four of columns the sums of the four own rows.
alias Sums = array<vec4<f32>, 4u * FOURS>;

// Adds the rows of a matrix times the stored weights.
fn add_weighted(sums: ptr<function, Sums>, matrix: u32, here: Task, other: u32, lane: u32) {
    for (var first = 0u; first < BLOCK; first += ROWS_AT_ONCE) {
        workgroupBarrier();
        for (var i = lane; i < ROWS_AT_ONCE * HEAD_FOURS; i += 64u) {
            let row = other + first + i / HEAD_FOURS;
            let column = 4u * (i % HEAD_FOURS);
            tile[i] = vec4<f32>(
                element(matrix, here, row, column),
                element(matrix, here, row, column + 1u),
                element(matrix, here, row, column + 2u),
                element(matrix, here, row, column + 3u),
            );
        }
        workgroupBarrier();
        for (var row = 0u; row < ROWS_AT_ONCE; row++) {
            let weight = weights[(first + row) * LINE + lane / 8u];
            for (var four = 0u; four < FOURS; four++) {
                let values = tile[row * HEAD_FOURS + 8u * four + lane % 8u];
                (*sums)[4u * four] += weight.x * values;
                (*sums)[4u * four + 1u] += weight.y * values;
                (*sums)[4u * four + 2u] += weight.z * values;
                (*sums)[4u * four + 3u] += weight.w * values;
            }
        }
    }
}

// Writes the sums of the own rows, times a factor for each.
fn store_sums(sums: ptr<function, Sums>, factors: vec4<f32>, matrix: u32, here: Task, lane: u32) {
    for (var i = 0u; i < 4u; i++) {
        let row = here.own + lane / 8u * 4u + i;
        if (row < here.length) {
#ifdef FORWARD
            let line = here.first + row;
#else
            let line = 3u * (here.first + row) + matrix;
#endif
            let at = params.output_base + line * params.width + here.head * params.head_width;
            for (var four = 0u; four < FOURS; four++) {
                let values = (*sums)[4u * four + i] * factors[i];
                let column = 4u * (8u * four + lane % 8u);
                let end = min(column + 4u, params.head_width);
                for (var c = column; c < end; c++) {
                    output[at + c] = values[c - column];
                }
            }
        }
    }
}

fn exponentials(x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(exponential(x.x), exponential(x.y), exponential(x.z), exponential(x.w));
}

#ifdef DROPOUT
// Of a query the factors of four keys that lie side by side, the first of them a multiple of 4.
fn factors_of(here: Task, query: u32, key: u32) -> vec4<f32> {
    return dropout_factors(here.first + query, here.head * 16384u + key / 4u);
}
#endif

#ifdef FORWARD
@compute @workgroup_size(64)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let here = task(id, lines);
    if (here.own >= here.length) {
        return;
    }
    let query = here.own + lane / 8u * 4u;
    // The online softmax (arXiv 1805.02867); totals are of the keys of this invocation only.
    var largest = vec4<f32>(NO_ENTRY);
    var total = vec4<f32>();
    var sums = Sums();
    for (var other = 0u; other < here.length; other += BLOCK) {
        var scores = params.scale * products(QUERY, KEY, here, other, lane);
        let key = other + lane % 8u * 4u;
        var reference = largest;
        for (var i = 0u; i < 4u; i++) {
            if (key + i >= here.length) {
                scores[i] = vec4<f32>(NO_ENTRY);
            }
            reference = max(reference, scores[i]);
        }
        exchanged[lane] = reference;
        workgroupBarrier();
        for (var i = 0u; i < 8u; i++) {
            reference = max(reference, exchanged[lane / 8u * 8u + i]);
        }
        let correction = exponentials(largest - reference);
        largest = reference;
        total *= correction;
        for (var i = 0u; i < 4u; i++) {
            scores[i] = exponentials(scores[i] - reference);
            total += scores[i];
        }
#ifdef DROPOUT
        // Of each key the factors for the queries: the other way round than they are made.
        let factors = transpose(mat4x4<f32>(
            factors_of(here, query, key),
            factors_of(here, query + 1u, key),
            factors_of(here, query + 2u, key),
            factors_of(here, query + 3u, key),
        ));
        for (var i = 0u; i < 4u; i++) {
            scores[i] *= factors[i];
        }
#endif
        store_weights(scores, lane);
        for (var four = 0u; four < FOURS; four++) {
            for (var i = 0u; i < 4u; i++) {
                sums[4u * four + i] *= correction[i];
            }
        }
        add_weighted(&sums, VALUE, here, other, lane);
    }
    exchanged[lane] = total;
    workgroupBarrier();
    total = vec4<f32>();
    for (var i = 0u; i < 8u; i++) {
        total += exchanged[lane / 8u * 8u + i];
    }
    store_sums(&sums, 1.0 / total, QUERY, here, lane);
#ifdef LOG_SUM_EXP
    if (lane % 8u == 0u) {
        for (var i = 0u; i < 4u; i++) {
            if (query + i < here.length) {
                let at = (params.first_row + here.first + query + i) * params.heads + here.head;
                log_sum_exp[at] = largest[i] + logarithm(total[i]);
            }
        }
    }
#endif
}
#else
// Where a query's log-sum-exp and product along its output stand; of one that is not there, of the last.
fn statistic_at(here: Task, query: u32) -> u32 {
    return (params.first_row + here.first + min(query, here.length - 1u)) * params.heads + here.head;
}

fn four_statistics(here: Task, query: u32) -> vec4<u32> {
    return vec4<u32>(
        statistic_at(here, query),
        statistic_at(here, query + 1u),
        statistic_at(here, query + 2u),
        statistic_at(here, query + 3u),
    );
}
#endif

#ifdef QUERY_GRADIENT
@compute @workgroup_size(64)
fn query_gradient(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let here = task(id, lines);
    if (here.own >= here.length) {
        return;
    }
    let query = here.own + lane / 8u * 4u;
    let at = four_statistics(here, query);
    let known = vec4<f32>(log_sum_exp[at.x], log_sum_exp[at.y], log_sum_exp[at.z], log_sum_exp[at.w]);
    let of_output = vec4<f32>(along[at.x], along[at.y], along[at.z], along[at.w]);
    var sums = Sums();
    for (var other = 0u; other < here.length; other += BLOCK) {
        let scores = params.scale * products(QUERY, KEY, here, other, lane);
        var gradients = products(UPSTREAM, VALUE, here, other, lane);
        let key = other + lane % 8u * 4u;
#ifdef DROPOUT
        let factors = transpose(mat4x4<f32>(
            factors_of(here, query, key),
            factors_of(here, query + 1u, key),
            factors_of(here, query + 2u, key),
            factors_of(here, query + 3u, key),
        ));
#endif
        for (var i = 0u; i < 4u; i++) {
#ifdef DROPOUT
            gradients[i] *= factors[i];
#endif
            gradients[i] = exponentials(scores[i] - known) * (gradients[i] - of_output);
            if (key + i >= here.length) {
                gradients[i] = vec4<f32>();
            }
        }
        store_weights(gradients, lane);
        add_weighted(&sums, KEY, here, other, lane);
    }
    store_sums(&sums, vec4<f32>(params.scale), QUERY, here, lane);
}
#endif

#ifdef KEY_GRADIENT
@compute @workgroup_size(64)
fn key_gradient(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let here = task(id, lines);
    if (here.own >= here.length) {
        return;
    }
    var sums = Sums();
    for (var other = 0u; other < here.length; other += BLOCK) {
        let scores = params.scale * products(KEY, QUERY, here, other, lane);
        var gradients = products(VALUE, UPSTREAM, here, other, lane);
        let query = other + lane % 8u * 4u;
        let at = four_statistics(here, query);
        for (var i = 0u; i < 4u; i++) {
#ifdef DROPOUT
            gradients[i] *= factors_of(here, query + i, here.own + lane / 8u * 4u);
#endif
            gradients[i] = exponentials(scores[i] - log_sum_exp[at[i]]) * (gradients[i] - along[at[i]]);
            if (query + i >= here.length) {
                gradients[i] = vec4<f32>();
            }
        }
        store_weights(gradients, lane);
        add_weighted(&sums, QUERY, here, other, lane);
    }
    store_sums(&sums, vec4<f32>(params.scale), KEY, here, lane);
}
#endif

#ifdef VALUE_GRADIENT
@compute @workgroup_size(64)
fn value_gradient(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let here = task(id, lines);
    if (here.own >= here.length) {
        return;
    }
    var sums = Sums();
    for (var other = 0u; other < here.length; other += BLOCK) {
        var scores = params.scale * products(KEY, QUERY, here, other, lane);
        let query = other + lane % 8u * 4u;
        let at = four_statistics(here, query);
        for (var i = 0u; i < 4u; i++) {
            scores[i] = exponentials(scores[i] - log_sum_exp[at[i]]);
#ifdef DROPOUT
            scores[i] *= factors_of(here, query + i, here.own + lane / 8u * 4u);
#endif
            if (query + i >= here.length) {
                scores[i] = vec4<f32>();
            }
        }
        store_weights(scores, lane);
        add_weighted(&sums, UPSTREAM, here, other, lane);
    }
    store_sums(&sums, vec4<f32>(1.0), VALUE, here, lane);
}
#endif
