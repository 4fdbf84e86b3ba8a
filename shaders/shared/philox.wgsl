// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011):
// the four random words of a counter under a key, the same as everywhere.

// The low and the high word of a product.
fn wide_product(a: u32, b: u32) -> vec2<u32> {
    let a_low = a & 0xffffu;
    let a_high = a >> 16u;
    let b_low = b & 0xffffu;
    let b_high = b >> 16u;
    // Neither sum leaves 32 bits: (2¹⁶ − 1)² + 2¹⁶ − 1 is less than 2³².
    let first = a_high * b_low + ((a_low * b_low) >> 16u);
    let second = a_low * b_high + (first & 0xffffu);
    return vec2<u32>(a * b, a_high * b_high + (first >> 16u) + (second >> 16u));
}

fn philox(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
    var words = counter;
    var round_key = key;
    for (var round = 0u; round < 10u; round++) {
        let first = wide_product(0xd2511f53u, words.x);
        let second = wide_product(0xcd9e8d57u, words.z);
        words = vec4<u32>(second.y ^ words.y ^ round_key.x, second.x, first.y ^ words.w ^ round_key.y, first.x);
        round_key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    return words;
}
