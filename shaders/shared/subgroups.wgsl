// Sums and maxima within a subgroup, whose invocations are next to each other and a power of two: the device is asked
// for both before SUBGROUPS is set.

#ifdef SUBGROUPS

// Invocations of a subgroup.
override SUBGROUP: u32 = 32u;

// Over each `count` invocations, a power of two and at most a subgroup. Both of a pair add the same two numbers, so all
// have the same bits.
fn subgroup_sum(value: f32, count: u32) -> f32 {
    var total = value;
    for (var step = 1u; step < count; step <<= 1u) {
        total += subgroupShuffleXor(total, step);
    }
    return total;
}

fn subgroup_max(value: f32, count: u32) -> f32 {
    var largest = value;
    for (var step = 1u; step < count; step <<= 1u) {
        largest = max(largest, subgroupShuffleXor(largest, step));
    }
    return largest;
}

#endif
