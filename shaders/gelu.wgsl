// The gradient of the Gaussian error linear unit: gradient[i] *= Φ(input[i]) + input[i] · φ(input[i]).
//
// Launch: 256 invocations a workgroup, one element each, `count` elements in all.

#import gelu
#import groups

struct Params {
    groups: u32,
    count: u32,
    input_base: u32,
    gradient_base: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> input: array<f32>;
@group(0) @binding(2) var<storage, read_write> gradient: array<f32>;

@compute @workgroup_size(256)
fn backward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_number(id, lines) * 256u + lane;
    if (i < params.count) {
        gradient[params.gradient_base + i] *= gelu_derivative(input[params.input_base + i]);
    }
}
