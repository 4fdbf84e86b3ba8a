// What dropout multiplies elements with, four columns at a time. The launch's Params have
//
//     dropout_row: u32,           where in the random stream row 0 stands
//     dropout_site: u32,
//     dropout_step: u32,
//     dropout_key_low: u32,
//     dropout_key_high: u32,
//     dropout_threshold: u32,     of 65,536: halves of random words below it drop their element
//     dropout_scale: f32,         for those that stay

#import philox

// Of the columns 4·quad to 4·quad + 3.
fn dropout_factors(row: u32, quad: u32) -> vec4<f32> {
    let counter = vec4<u32>(quad / 2u, params.dropout_row + row, params.dropout_site, params.dropout_step);
    let words = philox(counter, vec2<u32>(params.dropout_key_low, params.dropout_key_high));
    let pair = select(words.xy, words.zw, quad % 2u == 1u);
    let halves = vec4<u32>(pair.x & 0xffffu, pair.x >> 16u, pair.y & 0xffffu, pair.y >> 16u);
    let dropped = halves < vec4<u32>(params.dropout_threshold);
    return select(vec4<f32>(params.dropout_scale), vec4<f32>(0.0), dropped);
}
