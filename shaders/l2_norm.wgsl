// Rows divided by their length.
//
//     forward        output = input / max(|input|, 1e-12) ;  inverse_norm = 1 / max(|input|, 1e-12)
//     backward       d_input = (upstream − output · (output · upstream)) · inverse_norm
//     gradient       the same in place, from the input:
//                    gradient = (gradient − unit · (unit · gradient)) / |input|  with  unit = input / |input|
//
// Launch: 256 invocations a workgroup, which have 8 of `count` rows of `width` values.

#import groups
#ifdef BACKWARD
#import rows
#else
#import row_norm
#endif

struct Params {
    groups: u32,
    count: u32,
    width: u32,
    output_base: u32,
#ifdef FORWARD
    input_base: u32,
    inverse_norm_base: u32,
#endif
#ifdef BACKWARD
    upstream_base: u32,
    inverse_norm_base: u32,
    d_input_base: u32,
#endif
#ifdef GRADIENT
    input_base: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;

#ifdef FORWARD
@group(0) @binding(1) var<storage, read> input: array<f32>;
@group(0) @binding(2) var<storage, read_write> output: array<f32>;
@group(0) @binding(3) var<storage, read_write> inverse_norm: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    let width = select(0u, params.width, row < params.count);
    let input_row = params.input_base + row * params.width;
    let output_row = params.output_base + row * params.width;
    let norm = row_norm(input_row, width, lane);
    for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
        output[output_row + c] = (input[input_row + c] * norm.scale) * norm.unit;
    }
    if (row < params.count && lane % ROW_LANES == 0u) {
        inverse_norm[params.inverse_norm_base + row] = norm.scale * norm.unit;
    }
}
#endif

#ifdef BACKWARD
@group(0) @binding(1) var<storage, read> upstream: array<f32>;
@group(0) @binding(2) var<storage, read> output: array<f32>;
@group(0) @binding(3) var<storage, read> inverse_norm: array<f32>;
@group(0) @binding(4) var<storage, read_write> d_input: array<f32>;

@compute @workgroup_size(256)
fn backward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    let width = select(0u, params.width, row < params.count);
    let of_upstream = params.upstream_base + row * params.width;
    let of_output = params.output_base + row * params.width;
    var along = 0.0;
    for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
        along += output[of_output + c] * upstream[of_upstream + c];
    }
    along = row_sum(along, lane);
    if (row < params.count) {
        let inverse = inverse_norm[params.inverse_norm_base + row];
        let output_row = params.d_input_base + row * params.width;
        for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
            d_input[output_row + c] = (upstream[of_upstream + c] - output[of_output + c] * along) * inverse;
        }
    }
}
#endif

#ifdef GRADIENT
@group(0) @binding(1) var<storage, read> input: array<f32>;
@group(0) @binding(2) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(256)
fn gradient(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    let width = select(0u, params.width, row < params.count);
    let input_row = params.input_base + row * params.width;
    let output_row = params.output_base + row * params.width;
    let norm = row_norm(input_row, width, lane);
    var along = 0.0;
    for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
        along += ((input[input_row + c] * norm.scale) * norm.unit) * output[output_row + c];
    }
    along = row_sum(along, lane);
    for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
        let across = output[output_row + c] - ((input[input_row + c] * norm.scale) * norm.unit) * along;
        output[output_row + c] = across * (norm.scale * norm.unit);
    }
}
#endif
