// What a device does with subgroups, asked once when it is opened.
//
//     found[lane]        the number of invocations of its subgroup
//     found[256 + lane]  its place among them
//     found[512 + lane]  the largest of what its neighbours have, by shuffles, who have their place in the workgroup
//
// Launch: one workgroup of 256 invocations.

@group(0) @binding(1) var<storage, read_write> found: array<u32>;

@compute @workgroup_size(256)
fn probe(
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) place: u32,
) {
    var largest = lane;
    for (var step = 1u; step < size; step <<= 1u) {
        largest = max(largest, subgroupShuffleXor(largest, step));
    }
    found[lane] = size;
    found[256u + lane] = place;
    found[512u + lane] = largest;
}
