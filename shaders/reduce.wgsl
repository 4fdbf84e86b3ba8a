// Sums: of all elements, of their squares, of columns.
//
//     sum             output[base + g] = Σ of part g of the input (or of its squares)
//     finish          output[0] (+)= factor · Σ input
//     column_sum      output[part·width + c] = Σ_r input[r, c] over the rows of a part
//     finish_columns  output[c] (+)= Σ_part input[part·width + c]
//
// Launch: 256 invocations a workgroup. A workgroup of `sum` adds `part` elements, one of `finish` all there are; of the
// columns each invocation has one, and `column_sum` as many lines of workgroups as there are parts.

#import reduce

struct Params {
    count: u32,
#ifdef SUM
    part: u32,
    input_base: u32,
    output_base: u32,
#endif
#ifdef FINISH
    factor: f32,
#endif
#ifdef COLUMN_SUM
    width: u32,
    part: u32,
    input_base: u32,
    output_base: u32,
#endif
#ifdef FINISH_COLUMNS
    width: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> input: array<f32>;
@group(0) @binding(2) var<storage, read_write> output: array<f32>;

#ifdef SUM
@compute @workgroup_size(256)
fn sum(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = id.x * params.part;
    let end = min(first + params.part, params.count);
    var total = 0.0;
    for (var i = first + lane; i < end; i += 256u) {
        let value = input[params.input_base + i];
#ifdef SQUARES
        total += value * value;
#else
        total += value;
#endif
    }
    total = workgroup_sum(total, lane);
    if (lane == 0u) {
        output[params.output_base + id.x] = total;
    }
}
#endif

#ifdef FINISH
@compute @workgroup_size(256)
fn finish(@builtin(local_invocation_index) lane: u32) {
    var total = 0.0;
    for (var i = lane; i < params.count; i += 256u) {
        total += input[i];
    }
    total = workgroup_sum(total, lane) * params.factor;
    if (lane == 0u) {
#ifdef ACCUMULATE
        output[0] += total;
#else
        output[0] = total;
#endif
    }
}
#endif

#ifdef COLUMN_SUM
@compute @workgroup_size(256)
fn column_sum(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    if (column < params.width) {
        let first = id.y * params.part;
        let end = min(first + params.part, params.count);
        var total = 0.0;
        for (var row = first; row < end; row++) {
            total += input[params.input_base + row * params.width + column];
        }
        output[params.output_base + id.y * params.width + column] = total;
    }
}
#endif

#ifdef FINISH_COLUMNS
@compute @workgroup_size(256)
fn finish_columns(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * 256u + lane;
    if (column < params.width) {
        var total = 0.0;
        for (var part = 0u; part < params.count; part++) {
            total += input[part * params.width + column];
        }
#ifdef ACCUMULATE
        output[column] += total;
#else
        output[column] = total;
#endif
    }
}
#endif
