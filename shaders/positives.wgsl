// The similarity of each query with its own document, and what it adds to the gradients. Embeddings are multiplied with
// their norms, where there are any, before anything else: plain products of long or short ones leave single precision.
//
//     forward             similarity[row] = queries[row] · documents[row]
//     backward            output[row] += σ · gradient[row] · input[row], of one side: input is the other side
//     log_scale_gradient  output[row] += σ · gradient[row] · similarity[row]
//
// with σ = exp(log_scale). Launch: 256 invocations a workgroup, which have 8 of `count` rows of `width` values; one row
// each in `log_scale_gradient`.

#import groups
#import numerics
#import rows

struct Params {
    groups: u32,
    count: u32,
#ifdef FORWARD
    width: u32,
    // The first row of the launch.
    first_row: u32,
    queries_base: u32,
    documents_base: u32,
#endif
#ifdef BACKWARD
    width: u32,
    first_row: u32,
    input_base: u32,
    output_base: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;

#ifdef FORWARD
@group(0) @binding(1) var<storage, read> queries: array<f32>;
@group(0) @binding(2) var<storage, read> documents: array<f32>;
@group(0) @binding(3) var<storage, read> query_norms: array<f32>;
@group(0) @binding(4) var<storage, read> document_norms: array<f32>;
@group(0) @binding(5) var<storage, read_write> similarity: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    var sum = 0.0;
    if (row < params.count) {
#ifdef NORMS
        let of_query = query_norms[params.first_row + row];
        let of_document = document_norms[params.first_row + row];
#else
        let of_query = 1.0;
        let of_document = 1.0;
#endif
        let query = params.queries_base + row * params.width;
        let document = params.documents_base + row * params.width;
        for (var c = lane % ROW_LANES; c < params.width; c += ROW_LANES) {
            sum += (queries[query + c] * of_query) * (documents[document + c] * of_document);
        }
    }
    sum = row_sum(sum, lane);
    if (row < params.count && lane % ROW_LANES == 0u) {
        similarity[params.first_row + row] = sum;
    }
}
#endif

#ifdef BACKWARD
@group(0) @binding(1) var<storage, read> input: array<f32>;
@group(0) @binding(2) var<storage, read> norms: array<f32>;
@group(0) @binding(3) var<storage, read> log_scale: array<f32>;
@group(0) @binding(4) var<storage, read> gradient: array<f32>;
@group(0) @binding(5) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(256)
fn backward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    if (row < params.count) {
        let factor = exponential(log_scale[0]) * gradient[params.first_row + row];
#ifdef NORMS
        let norm = norms[params.first_row + row];
#else
        let norm = 1.0;
#endif
        let input_row = params.input_base + row * params.width;
        let output_row = params.output_base + row * params.width;
        for (var c = lane % ROW_LANES; c < params.width; c += ROW_LANES) {
            output[output_row + c] += factor * (input[input_row + c] * norm);
        }
    }
}
#endif

#ifdef LOG_SCALE_GRADIENT
@group(0) @binding(1) var<storage, read> log_scale: array<f32>;
@group(0) @binding(2) var<storage, read> gradient: array<f32>;
@group(0) @binding(3) var<storage, read> similarity: array<f32>;
@group(0) @binding(4) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(256)
fn log_scale_gradient(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * 256u + lane;
    if (row < params.count) {
        output[row] += gradient[row] * exponential(log_scale[0]) * similarity[row];
    }
}
#endif
