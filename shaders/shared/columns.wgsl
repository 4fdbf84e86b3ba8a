// Sums of columns, for workgroups of 256 invocations that have 32 columns and 8 lines of invocations, which share the
// terms of a sum. Always in the same order.
//
// Every invocation has to call; the barriers behind make the memory free for the next call.

const COLUMNS: u32 = 32u;
const COLUMN_LINES: u32 = 8u;

var<workgroup> column_values: array<f32, 256>;

fn column_sum(value: f32, lane: u32) -> f32 {
    column_values[lane] = value;
    workgroupBarrier();
    for (var step = COLUMNS * COLUMN_LINES / 2u; step >= COLUMNS; step >>= 1u) {
        if (lane < step) {
            column_values[lane] += column_values[lane + step];
        }
        workgroupBarrier();
    }
    let total = column_values[lane % COLUMNS];
    workgroupBarrier();
    return total;
}
