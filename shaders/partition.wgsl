// From the statistics of a partition's blocks, merged, to its losses and the coefficients of its gradients.
//
// With μ positives in the partition, S and T the sums of the statistics (N, 5), ε the smoothing, a the average,
// z⁺ = exp(log_scale)·similarity − margin and w_i = weight·row_weights[i]:
//
//     L = log( μ·exp z⁺ + S·exp m ) ;  K = μ + number of entries
//     losses[i]      += w_i·( L − (1−ε)·z⁺ − ε/K·(μ·z⁺ + Σ z) )
//     gradient[i]    += a·w_i·( −S·exp(m − L) + ε − μ·ε/K )
//     d_log_scale[i] += a·w_i·( T·exp(m − L) − ε/K·Σ z )
//     coefficients[i] = ( L, a·w_i, a·w_i·ε/K, 0 )
//
// Launch: 256 invocations a workgroup, a row each.

#import groups
#import numerics

struct Params {
    groups: u32,
    rows: u32,
    first_row: u32,
    positives: f32,
    smoothing: f32,
    margin: f32,
    weight: f32,
    average: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> statistics: array<f32>;
@group(0) @binding(2) var<storage, read> similarity: array<f32>;
@group(0) @binding(3) var<storage, read> log_scale: array<f32>;
@group(0) @binding(4) var<storage, read> row_weights: array<f32>;
@group(0) @binding(5) var<storage, read_write> coefficients: array<f32>;
@group(0) @binding(6) var<storage, read_write> losses: array<f32>;
@group(0) @binding(7) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(8) var<storage, read_write> d_log_scale: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let place = group_number(id, lines) * 256u + lane;
    if (place >= params.rows) {
        return;
    }
    let i = params.first_row + place;
    var weight = params.weight;
#ifdef ROW_WEIGHTS
    weight *= row_weights[i];
#endif
    let positive = exponential(log_scale[0]) * similarity[i] - params.margin;
    var largest = positive;
    var negatives = 0.0;
    var along = 0.0;
    var logits = 0.0;
    var entries = params.positives;
#ifdef BLOCKS
    // Statistics are those of the rows of this launch.
    let s = place * 5u;
    if (statistics[s] != NO_ENTRY) {
        largest = max(positive, statistics[s]);
        let factor = exponential(statistics[s] - largest);
        negatives = statistics[s + 1u] * factor;
        along = statistics[s + 2u] * factor;
        logits = statistics[s + 3u];
        entries += statistics[s + 4u];
    }
#endif
    let of_positives = params.positives * exponential(positive - largest);
    let everything = negatives + of_positives;
    // The log-sum-exp above the positive, without subtracting numbers of its size: for a loss near zero.
    var above = (largest - positive) + logarithm(everything);
    if (params.positives == 1.0 && of_positives > negatives) {
        above = logarithm_of_one_plus(negatives / of_positives);
    }
    let share = select(0.0, params.smoothing / entries, params.smoothing > 0.0);
    let smoothed = params.smoothing * positive - share * (logits + params.positives * positive);
    losses[i] += weight * (above + smoothed);
    let of_row = params.average * weight;
    gradient[i] += of_row * (params.smoothing - params.positives * share - negatives / everything);
    d_log_scale[i] += of_row * (along / everything - share * logits);
    coefficients[4u * i] = largest + logarithm(everything);
    coefficients[4u * i + 1u] = of_row;
    coefficients[4u * i + 2u] = of_row * share;
    coefficients[4u * i + 3u] = 0.0;
}
