// Loops over similarity matrices that are stored, of the method that the fused loss is measured against. Each matrix of
// logits z (N, N) fits one binding.
//
//     omit_diagonal      logits[i, i] = NO_ENTRY
//     row_statistics     statistics[first + i] = max_j z[i, j] and Σ_j exp(z[i, j] − max)
//     column_statistics  statistics[first + part·N + j] = the same of column j, over the rows of a part
//     finish             log_sum_exp[i] = log Σ exp z over all parts of statistics (parts, N)
//                        losses[i] += weight · (log_sum_exp[i] − logits[i, i])
//     gradient           logits[i, j] = w_r·exp(z[i, j] − L_r[i]) + w_c·exp(z[i, j] − L_c[j]) − (positive where i = j)
//
// Launch: 256 invocations a workgroup; of `row_statistics` a workgroup for each row in x. The others have an invocation
// for each row or column in x, and `column_statistics` in y the parts of `part` rows, `gradient` four rows each.

#import numerics
#ifdef ROW_STATISTICS
#import reduce
#endif

struct Params {
    // N
    count: u32,
#ifdef ROW_STATISTICS
    first: u32,
#endif
#ifdef COLUMN_STATISTICS
    first: u32,
    part: u32,
#endif
#ifdef FINISH
    parts: u32,
    weight: f32,
#endif
#ifdef GRADIENT
    positive: f32,
#ifdef ROWS
    row_weight: f32,
#endif
#ifdef COLUMNS
    column_weight: f32,
#endif
#endif
}

@group(0) @binding(0) var<uniform> params: Params;

fn exponentials(x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(exponential(x.x), exponential(x.y), exponential(x.z), exponential(x.w));
}

#ifdef OMIT_DIAGONAL
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;

@compute @workgroup_size(256)
fn omit_diagonal(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < params.count) {
        logits[id.x * (params.count + 1u)] = NO_ENTRY;
    }
}
#endif

#ifdef ROW_STATISTICS
#define STATISTICS
#endif
#ifdef COLUMN_STATISTICS
#define STATISTICS
#endif
#ifdef STATISTICS
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> statistics: array<vec2<f32>>;

// The four logits from a place on, so far apart; nothing is there from `end` on.
fn four_logits(first: u32, step: u32, end: u32) -> vec4<f32> {
    let at = first + step * vec4<u32>(0u, 1u, 2u, 3u);
    let here = min(at, vec4<u32>(end - 1u));
    let z = vec4<f32>(logits[here.x], logits[here.y], logits[here.z], logits[here.w]);
    return select(vec4<f32>(NO_ENTRY), z, at < vec4<u32>(end));
}

// Statistics with four logits more. As long as none is above what there was, each costs one exponential.
fn with_four(known: vec2<f32>, z: vec4<f32>) -> vec2<f32> {
    let largest = max(known.x, max(max(z.x, z.y), max(z.z, z.w)));
    var sum = known.y;
    if (largest > known.x) {
        sum *= exponential(known.x - largest);
    }
    return vec2<f32>(largest, sum + dot(exponentials(z - largest), vec4<f32>(1.0)));
}
#endif

#ifdef ROW_STATISTICS
@compute @workgroup_size(256)
fn row_statistics(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let start = id.x * params.count;
    let end = start + params.count;
    var known = vec2<f32>(NO_ENTRY, 0.0);
    for (var at = start + lane; at < end; at += 1024u) {
        known = with_four(known, four_logits(at, 256u, end));
    }
    let largest = workgroup_max(known.x, lane);
    let sum = workgroup_sum(known.y * exponential(known.x - largest), lane);
    if (lane == 0u) {
        statistics[params.first + id.x] = vec2<f32>(largest, sum);
    }
}
#endif

#ifdef COLUMN_STATISTICS
@compute @workgroup_size(256)
fn column_statistics(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    if (column < params.count) {
        let start = id.y * params.part;
        let end = min(start + params.part, params.count) * params.count;
        var known = vec2<f32>(NO_ENTRY, 0.0);
        for (var at = start * params.count + column; at < end; at += 4u * params.count) {
            known = with_four(known, four_logits(at, params.count, end));
        }
        statistics[params.first + id.y * params.count + column] = known;
    }
}
#endif

#ifdef FINISH
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> statistics: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> log_sum_exp: array<f32>;
@group(0) @binding(4) var<storage, read_write> losses: array<f32>;

@compute @workgroup_size(256)
fn finish(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = id.x;
    if (i < params.count) {
        var total = vec2<f32>(NO_ENTRY, 0.0);
        for (var part = 0u; part < params.parts; part++) {
            let more = statistics[part * params.count + i];
            let largest = max(total.x, more.x);
            let known = total.y * exponential(total.x - largest);
            total = vec2<f32>(largest, known + more.y * exponential(more.x - largest));
        }
        let of_row = total.x + logarithm(total.y);
        log_sum_exp[i] = of_row;
        losses[i] += params.weight * (of_row - logits[i * (params.count + 1u)]);
    }
}
#endif

#ifdef GRADIENT
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;
@group(0) @binding(2) var<storage, read> row_log_sum_exp: array<f32>;
@group(0) @binding(3) var<storage, read> column_log_sum_exp: array<f32>;

@compute @workgroup_size(256)
fn gradient(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    if (column < params.count) {
        // Beyond the last row stands the last one again: all are read before any is written, the same value each time.
        let rows = min(4u * id.y + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.count - 1u));
        let at = rows * params.count + column;
        let z = vec4<f32>(logits[at.x], logits[at.y], logits[at.z], logits[at.w]);
        var value = select(vec4<f32>(), vec4<f32>(-params.positive), rows == vec4<u32>(column));
#ifdef ROWS
        let of_rows = vec4<f32>(
            row_log_sum_exp[rows.x],
            row_log_sum_exp[rows.y],
            row_log_sum_exp[rows.z],
            row_log_sum_exp[rows.w],
        );
        value += params.row_weight * exponentials(z - of_rows);
#endif
#ifdef COLUMNS
        value += params.column_weight * exponentials(z - column_log_sum_exp[column]);
#endif
        logits[at.x] = value.x;
        logits[at.y] = value.y;
        logits[at.z] = value.z;
        logits[at.w] = value.w;
    }
}
#endif
