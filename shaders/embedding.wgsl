// Sums of word, position and token-type embeddings, and their gradients without atomics.
//
//     forward    output[row] = word[tokens[row]] + position[positions[row]] + token_type[0]
//     runs       adds upstream[row] to d_word[tokens[row]], for tokens that are within one run
//     joins      the same for tokens of several runs
//     positions  d_position[p] += Σ upstream[offsets[s] + p] over the sequences s that are longer than p
//
// `order` brings equal tokens together. It is cut into runs of 32 rows; what a run has of a token that has begun in an
// earlier one becomes its head, what it has of one that begins in it and goes on its tail. So a token's sum is that of
// one run, or a tail and the heads of all runs that follow, however often it occurs.
//
// The tables and the rows may be parts of larger ones, which several launches have in turn: a launch leaves out the
// tokens and rows that are not of its parts.
//
// Launch: 256 invocations a workgroup. Forward they have 8 of `count` rows. Else they have 32 columns, of `columns`
// times as many: 8 runs in `runs`, one run in `joins` and one position in `positions`.

#import groups
#ifdef FORWARD
#import rows
#endif
#ifdef RUNS
#import columns
#endif
#ifdef JOINS
#import columns
#endif
#ifdef POSITIONS
#import columns
#endif

struct Params {
    groups: u32,
    width: u32,
    // The rows of this launch.
    first_row: u32,
    count: u32,
#ifdef FORWARD
    first_token: u32,
    table_rows: u32,
    vocabulary: u32,
    position_rows: u32,
    word_base: u32,
    output_base: u32,
#else
    columns: u32,
#endif
#ifdef RUNS
    rows: u32,
    first_token: u32,
    table_rows: u32,
    upstream_base: u32,
    d_word_base: u32,
#endif
#ifdef JOINS
    rows: u32,
    first_token: u32,
    table_rows: u32,
    d_word_base: u32,
#endif
#ifdef POSITIONS
    sequences: u32,
    upstream_base: u32,
#endif
}

@group(0) @binding(0) var<uniform> params: Params;

#ifdef FORWARD
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read> word: array<f32>;
@group(0) @binding(4) var<storage, read> position: array<f32>;
@group(0) @binding(5) var<storage, read> token_type: array<f32>;
@group(0) @binding(6) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_number(id, lines) * ROWS + lane / ROW_LANES;
    if (row >= params.count) {
        return;
    }
    // What is beyond a table is not there to be read.
    let token = min(tokens[params.first_row + row], params.vocabulary - 1u) - params.first_token;
    if (token >= params.table_rows) {
        return;
    }
    let place = min(positions[params.first_row + row], params.position_rows - 1u);
    let word_row = params.word_base + token * params.width;
    let output_row = params.output_base + row * params.width;
    for (var c = lane % ROW_LANES; c < params.width; c += ROW_LANES) {
        output[output_row + c] = word[word_row + c] + position[place * params.width + c] + token_type[c];
    }
}
#else
@group(0) @binding(1) var<storage, read> upstream: array<f32>;
@group(0) @binding(2) var<storage, read> tokens: array<u32>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read> offsets: array<u32>;
@group(0) @binding(5) var<storage, read_write> output: array<f32>;
#endif

#ifdef RUNS
@group(0) @binding(6) var<storage, read_write> heads: array<f32>;
@group(0) @binding(7) var<storage, read_write> tails: array<f32>;
#endif

#ifdef JOINS
@group(0) @binding(6) var<storage, read> heads: array<f32>;
@group(0) @binding(7) var<storage, read> tails: array<f32>;
#endif

#ifndef FORWARD
#ifndef POSITIONS
// Rows of a run.
const RUN: u32 = 32u;

// The token that comes at a place in the order.
fn token_at(place: u32) -> u32 {
    return tokens[min(order[place], params.rows - 1u)];
}

// Whether the token at a place, not the first, is that of the place before.
fn goes_on(place: u32) -> bool {
    return token_at(place - 1u) == token_at(place);
}

fn add_to_table(token: u32, column: u32, value: f32) {
    let row = token - params.first_token;
    if (row < params.table_rows) {
        output[params.d_word_base + row * params.width + column] += value;
    }
}
#endif
#endif

#ifdef RUNS
@compute @workgroup_size(256)
fn runs(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    let column = group % params.columns * COLUMNS + lane % COLUMNS;
    let run = group / params.columns * COLUMN_LINES + lane / COLUMNS;
    let first = run * RUN;
    if (column >= params.width || first >= params.rows) {
        return;
    }
    let end = min(first + RUN, params.rows);
    var is_head = first > 0u && goes_on(first);
    var token = token_at(first);
    var sum = 0.0;
    for (var place = first; place < end; place++) {
        let next = token_at(place);
        if (next != token) {
            if (is_head) {
                heads[run * params.width + column] = sum;
            } else {
                add_to_table(token, column, sum);
            }
            is_head = false;
            token = next;
            sum = 0.0;
        }
        let row = order[place] - params.first_row;
        if (row < params.count) {
            sum += upstream[params.upstream_base + row * params.width + column];
        }
    }
    if (is_head) {
        heads[run * params.width + column] = sum;
    } else if (end < params.rows && goes_on(end)) {
        tails[run * params.width + column] = sum;
    } else {
        add_to_table(token, column, sum);
    }
}
#endif

#ifdef JOINS
@compute @workgroup_size(256)
fn joins(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    let run = group / params.columns;
    let first = run * RUN;
    let end = first + RUN;
    // Only where a token begins that goes on in the next run. All of this is the same for the whole workgroup.
    if (end >= params.rows) {
        return;
    }
    let token = token_at(end);
    if (token_at(end - 1u) != token || (first > 0u && token_at(first - 1u) == token)) {
        return;
    }
    let column = group % params.columns * COLUMNS + lane % COLUMNS;
    let line = lane / COLUMNS;
    var sum = 0.0;
    if (column < params.width) {
        if (line == 0u) {
            sum = tails[run * params.width + column];
        }
        for (var next = run + 1u + line; next * RUN < params.rows; next += COLUMN_LINES) {
            if (token_at(next * RUN) != token) {
                break;
            }
            sum += heads[next * params.width + column];
        }
    }
    sum = column_sum(sum, lane);
    if (column < params.width && line == 0u) {
        add_to_table(token, column, sum);
    }
}
#endif

#ifdef POSITIONS
@compute @workgroup_size(256)
fn positions(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_number(id, lines);
    let place = group / params.columns;
    let column = group % params.columns * COLUMNS + lane % COLUMNS;
    var sum = 0.0;
    if (column < params.width) {
        for (var s = lane / COLUMNS; s < params.sequences; s += COLUMN_LINES) {
            let row = offsets[s] + place;
            let here = row - params.first_row;
            if (row < offsets[s + 1u] && here < params.count) {
                sum += upstream[params.upstream_base + here * params.width + column];
            }
        }
    }
    sum = column_sum(sum, lane);
    if (group < params.groups && column < params.width && lane < COLUMNS) {
        output[place * params.width + column] += sum;
    }
}
#endif
