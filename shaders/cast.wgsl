// From one floating point type to another, on bits: what a driver does with halves is its own choice.
//
//     output[i] = input[i], rounded to the nearest value, of two that are equally near to the even one, beyond the
//     range to infinity; what is no number stays none
//
// Two elements of 16 bits share a word, the first in the low half. FROM_… and TO_… name the types, none of
// them bf16.
//
// Launch: 256 invocations a workgroup, two elements each, `count` elements in all.

#import groups

struct Params {
    groups: u32,
    count: u32,
    input_base: u32,
    output_base: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> input: array<u32>;
@group(0) @binding(2) var<storage, read_write> output: array<u32>;

const INFINITY_BITS: u32 = 0x7f800000u;

// The bits as f32 of a value of 16 bits.
fn widened(bits: u32) -> u32 {
#ifdef FROM_F16
    let sign = (bits & 0x8000u) << 16u;
    let magnitude = bits & 0x7fffu;
    if (magnitude > 0x7c00u) {
        return sign | 0x7fc00000u | (magnitude << 13u);
    }
    if (magnitude == 0x7c00u) {
        return sign | INFINITY_BITS;
    }
    if (magnitude < 0x0400u) {
        // A multiple of 2⁻²⁴.
        return sign | bitcast<u32>(f32(magnitude) * 5.9604644775390625e-8);
    }
    return sign | ((magnitude << 13u) + 0x38000000u);
#else
    return (bits | select(0u, 0x0040u, (bits & 0x7fffu) > 0x7f80u)) << 16u;
#endif
}

// The value of 16 bits nearest to bits of f32.
fn narrowed(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
#ifdef TO_F16
    let sign = (bits >> 16u) & 0x8000u;
    if (magnitude > INFINITY_BITS) {
        return sign | 0x7e00u | ((magnitude >> 13u) & 0x03ffu);
    }
    if (magnitude >= 0x47800000u) {
        return sign | 0x7c00u;
    }
    if (magnitude >= 0x38800000u) {
        // Half a unit less one bit, and one more for odd ones, carries exactly where it is to be rounded up.
        return sign | ((magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13u) & 1u)) >> 13u);
    }
    let exponent = magnitude >> 23u;
    if (exponent < 102u) {
        return sign;
    }
    // In units of 2⁻²⁴, of which `shift` bits are a fraction.
    let shift = 126u - exponent;
    let mantissa = (magnitude & 0x007fffffu) | 0x00800000u;
    let whole = mantissa >> shift;
    let fraction = mantissa - (whole << shift);
    let half = 1u << (shift - 1u);
    let up = fraction > half || (fraction == half && (whole & 1u) == 1u);
    return sign | (whole + select(0u, 1u, up));
#else
    if (magnitude > INFINITY_BITS) {
        return (bits >> 16u) | 0x0040u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
#endif
}

@compute @workgroup_size(256)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) lines: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let pair = group_number(id, lines) * 256u + lane;
    let first = 2u * pair;
    if (first >= params.count) {
        return;
    }
    // The last of an odd number has no second one beside it.
    let second = min(first + 1u, params.count - 1u);
#ifdef FROM_F32
    let values = vec2<u32>(input[params.input_base + first], input[params.input_base + second]);
#else
    let word = input[params.input_base + pair];
    let values = vec2<u32>(widened(word & 0xffffu), widened(word >> 16u));
#endif
#ifdef TO_F32
    output[params.output_base + first] = values.x;
    if (second > first) {
        output[params.output_base + second] = values.y;
    }
#else
    output[params.output_base + pair] = narrowed(values.x) | (narrowed(values.y) << 16u);
#endif
}
