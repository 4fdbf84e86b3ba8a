// Operations that touch each element once.
//
//     fill            output = value
//     copy            output[to + i] (+)= input[from + i]
//     scale           output *= factor[0]
//     column          output[i] = input[first + i·width]
//     clamp_largest   output = min(input, largest)
//     clamp_backward  output = 0 where input > largest
//
// Launch: 256 invocations a workgroup, one element each, `count` elements in all.

#import groups

struct Params {
    groups: u32,
    count: u32,
    output_base: u32,
#ifdef FILL
    value: f32,
#endif
#ifdef COPY
    input_base: u32,
#endif
#ifdef COLUMN
    input_base: u32,
    width: u32,
#endif
#ifdef CLAMP_LARGEST
    input_base: u32,
    largest: f32,
#endif
#ifdef CLAMP_BACKWARD
    input_base: u32,
    largest: f32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> output: array<f32>;
@group(0) @binding(2) var<storage, read> input: array<f32>;
@group(0) @binding(3) var<storage, read> factor: array<f32>;

fn element(id: vec3<u32>, lines: vec3<u32>, lane: u32) -> u32 {
    return group_number(id, lines) * 256u + lane;
}

#ifdef FILL
@compute @workgroup_size(256)
fn fill(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = element(id, lines, lane);
    if (i < params.count) {
        output[params.output_base + i] = params.value;
    }
}
#endif

#ifdef COPY
@compute @workgroup_size(256)
fn copy(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = element(id, lines, lane);
    if (i < params.count) {
        let value = input[params.input_base + i];
#ifdef ACCUMULATE
        output[params.output_base + i] += value;
#else
        output[params.output_base + i] = value;
#endif
    }
}
#endif

#ifdef SCALE
@compute @workgroup_size(256)
fn scale(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = element(id, lines, lane);
    if (i < params.count) {
        output[params.output_base + i] *= factor[0];
    }
}
#endif

#ifdef COLUMN
@compute @workgroup_size(256)
fn column(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = element(id, lines, lane);
    if (i < params.count) {
        output[params.output_base + i] = input[params.input_base + i * params.width];
    }
}
#endif

#ifdef CLAMP_LARGEST
@compute @workgroup_size(256)
fn clamp_largest(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = element(id, lines, lane);
    if (i < params.count) {
        output[params.output_base + i] = min(input[params.input_base + i], params.largest);
    }
}
#endif

#ifdef CLAMP_BACKWARD
@compute @workgroup_size(256)
fn clamp_backward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = element(id, lines, lane);
    if (i < params.count) {
        if (input[params.input_base + i] > params.largest) {
            output[params.output_base + i] = 0.0;
        }
    }
}
#endif
