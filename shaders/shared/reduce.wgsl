// Sums and maxima over the 256 invocations of a workgroup, the same for all of them, always in the same order.
//
// Every invocation has to call; the barriers behind make the memory free for the next call. With SUBGROUPS values are
// exchanged within subgroups first, and only the totals of subgroups go through memory.

#import subgroups

var<workgroup> reduce_values: array<f32, 256>;

#ifdef SUBGROUPS

fn workgroup_sum(value: f32, lane: u32) -> f32 {
    reduce_values[lane] = subgroup_sum(value, SUBGROUP);
    workgroupBarrier();
    var total = 0.0;
    for (var part = 0u; part < 256u; part += SUBGROUP) {
        total += reduce_values[part];
    }
    workgroupBarrier();
    return total;
}

fn workgroup_max(value: f32, lane: u32) -> f32 {
    reduce_values[lane] = subgroup_max(value, SUBGROUP);
    workgroupBarrier();
    var largest = reduce_values[0];
    for (var part = SUBGROUP; part < 256u; part += SUBGROUP) {
        largest = max(largest, reduce_values[part]);
    }
    workgroupBarrier();
    return largest;
}

#else

fn workgroup_sum(value: f32, lane: u32) -> f32 {
    reduce_values[lane] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            reduce_values[lane] += reduce_values[lane + step];
        }
        workgroupBarrier();
    }
    let total = reduce_values[0];
    workgroupBarrier();
    return total;
}

fn workgroup_max(value: f32, lane: u32) -> f32 {
    reduce_values[lane] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step >>= 1u) {
        if (lane < step) {
            reduce_values[lane] = max(reduce_values[lane], reduce_values[lane + step]);
        }
        workgroupBarrier();
    }
    let largest = reduce_values[0];
    workgroupBarrier();
    return largest;
}

#endif
