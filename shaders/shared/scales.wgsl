// Powers of two that bring the largest magnitude of each of two matrices to between 2^14 and 2^15, from the bits of
// these magnitudes in `largest`.

fn scale_of(bits: u32) -> f32 {
    // Nothing is lost of a matrix of zeros, and nothing is gained beyond what a power of two can be.
    let exponent = clamp(i32(bits >> 23u) - 127, -100, 100);
    return select(bitcast<f32>(u32(127 + 14 - exponent) << 23u), 1.0, bits == 0u);
}

fn matrix_scales() -> vec2<f32> {
    return vec2<f32>(scale_of(largest[0]), scale_of(largest[1]));
}
