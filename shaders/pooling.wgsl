// From the rows of each sequence to one vector: their mean, or with CLS the first of them.
//
//     forward   output[s] = Σ input[row] / length over the rows of sequence s
//     backward  d_input[row] = upstream[s] / length
//
// The rows may be a part of all, which several launches have in turn: a launch leaves out those of other parts, and
// with ACCUMULATE adds to what the earlier ones gave.
//
// Launch: 256 invocations a workgroup, which have 32 columns of a sequence; `columns` workgroups a sequence.

#import columns
#import groups

struct Params {
    groups: u32,
    width: u32,
    columns: u32,
    // The rows of this launch.
    first_row: u32,
    count: u32,
#ifdef FORWARD
    input_base: u32,
#endif
#ifdef BACKWARD
    d_input_base: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> offsets: array<u32>;

#ifdef FORWARD
@group(0) @binding(2) var<storage, read> input: array<f32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    let is_there = group < params.groups;
    let sequence = select(0u, group / params.columns, is_there);
    let column = group % params.columns * COLUMNS + lane % COLUMNS;
    let begin = offsets[sequence];
#ifdef CLS
    let length = 1u;
#else
    let length = max(offsets[sequence + 1u], begin + 1u) - begin;
#endif
    let first = max(begin, params.first_row);
    let end = min(begin + length, params.first_row + params.count);
    var sum = 0.0;
    if (column < params.width) {
        for (var row = first + lane / COLUMNS; row < end; row += COLUMN_LINES) {
            sum += input[params.input_base + (row - params.first_row) * params.width + column];
        }
    }
    sum = column_sum(sum, lane) / f32(length);
    if (is_there && column < params.width && lane < COLUMNS) {
#ifdef ACCUMULATE
        output[sequence * params.width + column] += sum;
#else
        output[sequence * params.width + column] = sum;
#endif
    }
}
#endif

#ifdef BACKWARD
@group(0) @binding(2) var<storage, read> upstream: array<f32>;
@group(0) @binding(3) var<storage, read_write> d_input: array<f32>;

@compute @workgroup_size(256)
fn backward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    let sequence = group / params.columns;
    let column = group % params.columns * COLUMNS + lane % COLUMNS;
    if (group >= params.groups || column >= params.width) {
        return;
    }
    let begin = offsets[sequence];
    let stop = offsets[sequence + 1u];
    let gradient = upstream[sequence * params.width + column];
    let mean_gradient = gradient / f32(max(stop, begin + 1u) - begin);
    let first = max(begin, params.first_row);
    let end = min(stop, params.first_row + params.count);
    for (var row = first + lane / COLUMNS; row < end; row += COLUMN_LINES) {
#ifdef CLS
        let value = select(0.0, gradient, row == begin);
#else
        let value = mean_gradient;
#endif
        d_input[params.d_input_base + (row - params.first_row) * params.width + column] = value;
    }
}
#endif
