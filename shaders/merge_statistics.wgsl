// The statistics of two parts of the same rows become those of the whole.
//
//     statistics[i] = merged(statistics[i], part[i])          both (N, 5)
//
// Launch: 256 invocations a workgroup, a row each.

#import groups
#import numerics
#import statistics

struct Params {
    groups: u32,
    rows: u32,
    part_base: u32,
    statistics_base: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> part: array<f32>;
@group(0) @binding(2) var<storage, read_write> statistics: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * 256u + lane;
    if (row < params.rows) {
        let p = params.part_base + row * STATISTICS;
        let s = params.statistics_base + row * STATISTICS;
        let both = merged(
            Statistics(statistics[s], statistics[s + 1u], statistics[s + 2u], statistics[s + 3u], statistics[s + 4u]),
            Statistics(part[p], part[p + 1u], part[p + 2u], part[p + 3u], part[p + 4u]),
        );
        statistics[s] = both.reference;
        statistics[s + 1u] = both.sum;
        statistics[s + 2u] = both.along;
        statistics[s + 3u] = both.logits;
        statistics[s + 4u] = both.entries;
    }
}
