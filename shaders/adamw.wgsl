// A step of AdamW (arXiv 1711.05101), with g the gradient, scaled down to a norm of `clip` at most:
//
//     first = β₁·first + (1 − β₁)·g ;  second = β₂·second + (1 − β₂)·g²
//     parameter = min( parameter · keep − rate · first / (√second · second_scale + ε), largest )
//
// with keep = 1 − η·decay, rate = η / (1 − β₁ᵗ) and second_scale = 1 / √(1 − β₂ᵗ).
//
// Launch: 256 invocations a workgroup, one element each, `count` elements in all.

#import groups

struct Params {
    groups: u32,
    count: u32,
    parameter_base: u32,
    gradient_base: u32,
    first_base: u32,
    second_base: u32,
    keep_first: f32,
    add_first: f32,
    keep_second: f32,
    add_second: f32,
    rate: f32,
    second_scale: f32,
    epsilon: f32,
    keep: f32,
    largest: f32,
#ifdef CLIP
    clip: f32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> parameter: array<f32>;
@group(0) @binding(2) var<storage, read> gradient: array<f32>;
@group(0) @binding(3) var<storage, read_write> first_moment: array<f32>;
@group(0) @binding(4) var<storage, read_write> second_moment: array<f32>;
@group(0) @binding(5) var<storage, read> square_norm: array<f32>;

@compute @workgroup_size(256)
fn update(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_number(id, lines) * 256u + lane;
    if (i >= params.count) {
        return;
    }
    var g = gradient[params.gradient_base + i];
#ifdef CLIP
    let norm = sqrt(square_norm[0]);
    if (norm > params.clip) {
        g *= params.clip / norm;
    }
#endif
    let first = params.keep_first * first_moment[params.first_base + i] + params.add_first * g;
    let second = params.keep_second * second_moment[params.second_base + i] + params.add_second * g * g;
    first_moment[params.first_base + i] = first;
    second_moment[params.second_base + i] = second;
    let at = params.parameter_base + i;
    let step = params.rate * first / (sqrt(second) * params.second_scale + params.epsilon);
    let moved = parameter[at] * params.keep - step;
    // Not a minimum, which may hide what is no number.
    parameter[at] = select(moved, params.largest, moved > params.largest);
}
