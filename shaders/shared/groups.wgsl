// The number of a workgroup of a launch whose workgroups are one long row, cut into lines because no direction of a
// launch may be longer than 65,535.
fn group_number(id: vec3<u32>, lines: vec3<u32>) -> u32 {
    return id.x + id.y * lines.x;
}
