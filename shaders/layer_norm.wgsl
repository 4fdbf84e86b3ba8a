// Layer normalisation (arXiv 1607.06450), with dropout and the residual connection before it.
//
//     forward      x = residual + dropout(input) ;  normalised = (x − mean) · rstd ;  output = normalised · gain + bias
//     backward     with u = upstream · gain:
//                  d_residual = rstd · (u − mean(u) − normalised · mean(u · normalised))
//                  d_input = dropout(d_residual)
//     column_sums  partial[part, 0] = Σ upstream · normalised and partial[part, 1] = Σ upstream over the rows of a part
//     finish       d_gain += Σ_part partial[part, 0] ;  d_bias += Σ_part partial[part, 1]
//
// Launch: 256 invocations a workgroup. Forward and backward they have 8 of `count` rows of `width` values, and each
// invocation fours of columns that lie side by side, because these share their random words. In `column_sums` and
// `finish` they have 32 columns; `column_sums` has as many lines of workgroups as there are parts of `part` rows.

#ifdef FORWARD
#import groups
#import rows
#endif
#ifdef BACKWARD
#import groups
#import rows
#endif
#ifdef COLUMN_SUMS
#import columns
#endif
#ifdef FINISH
#import columns
#endif
#ifdef DROPOUT
#import dropout
#endif

struct Params {
    count: u32,
    width: u32,
#ifdef FORWARD
    groups: u32,
    // The first row of the launch.
    first_row: u32,
    input_base: u32,
    output_base: u32,
    epsilon: f32,
#ifdef RESIDUAL
    residual_base: u32,
#endif
#ifdef NORMALISED
    normalised_base: u32,
#endif
#endif
#ifdef BACKWARD
    groups: u32,
    first_row: u32,
    upstream_base: u32,
    normalised_base: u32,
    d_input_base: u32,
#ifdef RESIDUAL
    d_residual_base: u32,
#endif
#endif
#ifdef COLUMN_SUMS
    upstream_base: u32,
    normalised_base: u32,
    part: u32,
    first_part: u32,
#endif
#ifdef DROPOUT
    dropout_row: u32,
    dropout_site: u32,
    dropout_step: u32,
    dropout_key_low: u32,
    dropout_key_high: u32,
    dropout_threshold: u32,
    dropout_scale: f32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;

#ifdef FORWARD
@group(0) @binding(1) var<storage, read> input: array<f32>;
@group(0) @binding(2) var<storage, read> residual: array<f32>;
@group(0) @binding(3) var<storage, read> gain: array<f32>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read_write> output: array<f32>;
@group(0) @binding(6) var<storage, read_write> normalised: array<f32>;
@group(0) @binding(7) var<storage, read_write> rstd: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    let width = select(0u, params.width, row < params.count);
    let start = row * params.width;
    // The output holds x meanwhile; each invocation reads only what it wrote.
    var sum = 0.0;
    for (var quad = lane % ROW_LANES; 4u * quad < width; quad += ROW_LANES) {
#ifdef DROPOUT
        let factors = dropout_factors(row, quad);
#endif
        let end = min(4u * quad + 4u, width);
        for (var c = 4u * quad; c < end; c++) {
            var x = input[params.input_base + start + c];
#ifdef DROPOUT
            x *= factors[c % 4u];
#endif
#ifdef RESIDUAL
            x += residual[params.residual_base + start + c];
#endif
            output[params.output_base + start + c] = x;
            sum += x;
        }
    }
    let mean = row_sum(sum, lane) / f32(params.width);
    var square = 0.0;
    for (var quad = lane % ROW_LANES; 4u * quad < width; quad += ROW_LANES) {
        let end = min(4u * quad + 4u, width);
        for (var c = 4u * quad; c < end; c++) {
            let deviation = output[params.output_base + start + c] - mean;
            square += deviation * deviation;
        }
    }
    let row_rstd = 1.0 / sqrt(row_sum(square, lane) / f32(params.width) + params.epsilon);
    for (var quad = lane % ROW_LANES; 4u * quad < width; quad += ROW_LANES) {
        let end = min(4u * quad + 4u, width);
        for (var c = 4u * quad; c < end; c++) {
            let at = params.output_base + start + c;
            let value = (output[at] - mean) * row_rstd;
#ifdef NORMALISED
            normalised[params.normalised_base + start + c] = value;
#endif
            output[at] = value * gain[c] + bias[c];
        }
    }
#ifdef RSTD
    if (row < params.count && lane % ROW_LANES == 0u) {
        rstd[params.first_row + row] = row_rstd;
    }
#endif
}
#endif

#ifdef BACKWARD
@group(0) @binding(1) var<storage, read> upstream: array<f32>;
@group(0) @binding(2) var<storage, read> normalised: array<f32>;
@group(0) @binding(3) var<storage, read> rstd: array<f32>;
@group(0) @binding(4) var<storage, read> gain: array<f32>;
@group(0) @binding(5) var<storage, read_write> d_input: array<f32>;
@group(0) @binding(6) var<storage, read_write> d_residual: array<f32>;

@compute @workgroup_size(256)
fn backward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    let width = select(0u, params.width, row < params.count);
    let start = row * params.width;
    var sum = 0.0;
    var sum_along = 0.0;
    for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
        let u = upstream[params.upstream_base + start + c] * gain[c];
        sum += u;
        sum_along += u * normalised[params.normalised_base + start + c];
    }
    let mean = row_sum(sum, lane) / f32(params.width);
    let along = row_sum(sum_along, lane) / f32(params.width);
    for (var quad = lane % ROW_LANES; 4u * quad < width; quad += ROW_LANES) {
        let row_rstd = rstd[params.first_row + row];
#ifdef DROPOUT
        let factors = dropout_factors(row, quad);
#endif
        let end = min(4u * quad + 4u, width);
        for (var c = 4u * quad; c < end; c++) {
            let u = upstream[params.upstream_base + start + c] * gain[c];
            var gradient = row_rstd * (u - mean - normalised[params.normalised_base + start + c] * along);
#ifdef RESIDUAL
            d_residual[params.d_residual_base + start + c] = gradient;
#endif
#ifdef DROPOUT
            gradient *= factors[c % 4u];
#endif
            d_input[params.d_input_base + start + c] = gradient;
        }
    }
}
#endif

#ifdef COLUMN_SUMS
@group(0) @binding(1) var<storage, read> upstream: array<f32>;
@group(0) @binding(2) var<storage, read> normalised: array<f32>;
@group(0) @binding(3) var<storage, read_write> partial: array<f32>;

@compute @workgroup_size(256)
fn column_sums(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * COLUMNS + lane % COLUMNS;
    var of_gain = 0.0;
    var of_bias = 0.0;
    if (column < params.width) {
        let end = min((id.y + 1u) * params.part, params.count);
        for (var row = id.y * params.part + lane / COLUMNS; row < end; row += COLUMN_LINES) {
            let at = row * params.width + column;
            let gradient = upstream[params.upstream_base + at];
            of_gain += gradient * normalised[params.normalised_base + at];
            of_bias += gradient;
        }
    }
    of_gain = column_sum(of_gain, lane);
    of_bias = column_sum(of_bias, lane);
    if (column < params.width && lane < COLUMNS) {
        let at = 2u * (params.first_part + id.y) * params.width + column;
        partial[at] = of_gain;
        partial[at + params.width] = of_bias;
    }
}
#endif

#ifdef FINISH
@group(0) @binding(1) var<storage, read> partial: array<f32>;
@group(0) @binding(2) var<storage, read_write> d_gain: array<f32>;
@group(0) @binding(3) var<storage, read_write> d_bias: array<f32>;

@compute @workgroup_size(256)
fn finish(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = id.x * COLUMNS + lane % COLUMNS;
    var of_gain = 0.0;
    var of_bias = 0.0;
    if (column < params.width) {
        for (var part = lane / COLUMNS; part < params.count; part += COLUMN_LINES) {
            let at = 2u * part * params.width + column;
            of_gain += partial[at];
            of_bias += partial[at + params.width];
        }
    }
    of_gain = column_sum(of_gain, lane);
    of_bias = column_sum(of_bias, lane);
    if (column < params.width && lane < COLUMNS) {
        d_gain[column] += of_gain;
        d_bias[column] += of_bias;
    }
}
#endif
