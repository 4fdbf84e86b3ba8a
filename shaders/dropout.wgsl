// Dropout in place: output[row, column] *= 0 or the scale, by a mask that a counter-based generator makes from where an
// element stands.
//
// Launch: 256 invocations a workgroup, four columns of a row each; `count` rows of `quads` such fours.

#import groups
#import dropout

struct Params {
    groups: u32,
    count: u32,
    width: u32,
    quads: u32,
    output_base: u32,
    dropout_row: u32,
    dropout_site: u32,
    dropout_step: u32,
    dropout_key_low: u32,
    dropout_key_high: u32,
    dropout_threshold: u32,
    dropout_scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_number(id, lines) * 256u + lane;
    let row = i / params.quads;
    if (row >= params.count) {
        return;
    }
    let quad = i % params.quads;
    let factors = dropout_factors(row, quad);
    let end = min(4u * quad + 4u, params.width);
    for (var c = 4u * quad; c < end; c++) {
        output[params.output_base + row * params.width + c] *= factors[c % 4u];
    }
}
