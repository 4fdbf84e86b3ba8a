// Lengths of the first values of every row, for nested widths and squared distances.
//
//     forward   output[row] = 1 / max(|x|, 1e-12), or |x|² / 2, with x the first `prefix` values of the row
//     backward  d_input[row, c] −= input[row, c] · Σ_w along[w, row] · inverse_norms[w, row]²
//               over the prefixes w that hold column c, without the norms if there are none; a launch has the columns
//               of one segment, which all are in the same prefixes: those from `first_prefix` on
//
// Launch: 256 invocations a workgroup, which have 8 of `count` rows of `width` values. One launch a prefix.

#import groups
#ifdef FORWARD
#import row_norm
#else
#import rows
#endif

struct Params {
    groups: u32,
    count: u32,
    width: u32,
    input_base: u32,
#ifdef FORWARD
    prefix: u32,
    output_base: u32,
#endif
#ifdef BACKWARD
    // The first row of the launch, and all rows.
    first_row: u32,
    rows: u32,
    first_prefix: u32,
    prefixes: u32,
    first_column: u32,
    end_column: u32,
    d_input_base: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> input: array<f32>;

#ifdef FORWARD
@group(0) @binding(2) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    let prefix = select(0u, params.prefix, row < params.count);
    let input_row = params.input_base + row * params.width;
#ifdef HALF_SQUARE
    var square = 0.0;
    for (var c = lane % ROW_LANES; c < prefix; c += ROW_LANES) {
        square += input[input_row + c] * input[input_row + c];
    }
    let value = 0.5 * row_sum(square, lane);
#else
    let norm = row_norm(input_row, prefix, lane);
    let value = norm.scale * norm.unit;
#endif
    if (row < params.count && lane % ROW_LANES == 0u) {
        output[params.output_base + row] = value;
    }
}
#endif

#ifdef BACKWARD
@group(0) @binding(2) var<storage, read> along: array<f32>;
@group(0) @binding(3) var<storage, read> inverse_norms: array<f32>;
@group(0) @binding(4) var<storage, read_write> d_input: array<f32>;

@compute @workgroup_size(256)
fn backward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    if (row < params.count) {
        var factor = 0.0;
        for (var w = params.first_prefix; w < params.prefixes; w++) {
            let i = w * params.rows + params.first_row + row;
#ifdef NORMS
            factor += along[i] * inverse_norms[i] * inverse_norms[i];
#else
            factor += along[i];
#endif
        }
        let input_row = params.input_base + row * params.width;
        let output_row = params.d_input_base + row * params.width;
        for (var c = params.first_column + lane % ROW_LANES; c < params.end_column; c += ROW_LANES) {
            d_input[output_row + c] -= factor * input[input_row + c];
        }
    }
}
#endif
