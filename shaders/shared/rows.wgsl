// Sums and maxima over the 32 invocations that share a row, for workgroups of 256 invocations that have 8 rows. The
// same for all 32, always in the same order.
//
// Every invocation has to call, also those of a row that is not there; the barriers behind make the memory free for the
// next call. With SUBGROUPS values are exchanged within subgroups, and go through memory only where those have fewer
// than 32 invocations.

#import subgroups

const ROWS: u32 = 8u;
const ROW_LANES: u32 = 32u;

var<workgroup> row_values: array<f32, 256>;

#ifdef SUBGROUPS

fn row_sum(value: f32, lane: u32) -> f32 {
    var total = subgroup_sum(value, min(SUBGROUP, ROW_LANES));
    if (SUBGROUP < ROW_LANES) {
        row_values[lane] = total;
        workgroupBarrier();
        let first = lane - lane % ROW_LANES;
        total = 0.0;
        for (var part = 0u; part < ROW_LANES; part += SUBGROUP) {
            total += row_values[first + part];
        }
        workgroupBarrier();
    }
    return total;
}

fn row_max(value: f32, lane: u32) -> f32 {
    var largest = subgroup_max(value, min(SUBGROUP, ROW_LANES));
    if (SUBGROUP < ROW_LANES) {
        row_values[lane] = largest;
        workgroupBarrier();
        let first = lane - lane % ROW_LANES;
        for (var part = 0u; part < ROW_LANES; part += SUBGROUP) {
            largest = max(largest, row_values[first + part]);
        }
        workgroupBarrier();
    }
    return largest;
}

#else

fn row_sum(value: f32, lane: u32) -> f32 {
    row_values[lane] = value;
    workgroupBarrier();
    for (var step = ROW_LANES / 2u; step > 0u; step >>= 1u) {
        if (lane % ROW_LANES < step) {
            row_values[lane] += row_values[lane + step];
        }
        workgroupBarrier();
    }
    let total = row_values[lane - lane % ROW_LANES];
    workgroupBarrier();
    return total;
}

fn row_max(value: f32, lane: u32) -> f32 {
    row_values[lane] = value;
    workgroupBarrier();
    for (var step = ROW_LANES / 2u; step > 0u; step >>= 1u) {
        if (lane % ROW_LANES < step) {
            row_values[lane] = max(row_values[lane], row_values[lane + step]);
        }
        workgroupBarrier();
    }
    let largest = row_values[lane - lane % ROW_LANES];
    workgroupBarrier();
    return largest;
}

#endif
