// Functions that give the same on every driver.
//
// WGSL lets a driver be off by many units in the last place, and drivers differ where it matters: the logarithm of 0,
// the hyperbolic tangent of 100, infinities minus themselves. So nothing here is infinite, and exponentials and
// logarithms are polynomials of our own, good to two units in the last place with or without fused multiplication.

// The largest of no entries, and the logit of what is left out. The lowest f32.
const NO_ENTRY: f32 = -3.4028234663852886e38;

fn multiply_by_power_of_two(x: f32, n: i32) -> f32 {
    // In two steps that both exist as floats.
    let half = n >> 1u;
    let first = bitcast<f32>(u32(half + 127) << 23u);
    let second = bitcast<f32>(u32(n - half + 127) << 23u);
    return x * first * second;
}

// exp(x); 0 below -87.3, that of 88.7 above it.
fn exponential(x: f32) -> f32 {
    let clamped = clamp(x, -87.3, 88.7);
    let n = floor(clamped * 1.4426950408889634 + 0.5);
    // The first part of log 2 has few bits, so that its multiples are exact.
    let r = (clamped - n * 0.693359375) + n * 2.12194440e-4;
    var p = 0.0013950532 * r + 0.008368919;
    p = p * r + 0.041666206;
    p = p * r + 0.16666518;
    p = p * r + 0.5;
    p = (p * r * r + r) + 1.0;
    return select(multiply_by_power_of_two(p, i32(n)), 0.0, x < -87.3);
}

// log(x) for normal x > 0; about -88 for anything smaller.
fn logarithm(x: f32) -> f32 {
    let bits = bitcast<u32>(max(x, 1.17549435e-38));
    // x = m·2^e with m between 1/√2 and √2
    let shifted = bits - 0x3f3504f3u;
    let e = bitcast<i32>(shifted) >> 23u;
    let m = bitcast<f32>((shifted & 0x007fffffu) + 0x3f3504f3u);
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    // log m = 2·artanh s

    let p = z * (0.66666662693 + z * (0.40000972152 + z * (0.28498786688 + z * 0.24279078841)));
    let half_square = 0.5 * f * f;
    let n = f32(e);
    return n * 0.693359375 + (f - (half_square - (s * (half_square + p) - n * 2.12194440e-4)));
}

// log(1 + x) for x from 0 to 1, where 1 + x would round x away: 2·artanh(x / (2 + x)).
fn logarithm_of_one_plus(x: f32) -> f32 {
    let t = x / (2.0 + x);
    let u = t * t;
    var p = u * (1.0 / 15.0) + (1.0 / 13.0);
    p = p * u + (1.0 / 11.0);
    p = p * u + (1.0 / 9.0);
    p = p * u + (1.0 / 7.0);
    p = p * u + (1.0 / 5.0);
    p = p * u + (1.0 / 3.0);
    p = p * u + 1.0;
    return 2.0 * t * p;
}

// log(1 + exp x)
fn softplus(x: f32) -> f32 {
    return max(x, 0.0) + logarithm_of_one_plus(exponential(-abs(x)));
}

// 1 / (1 + exp(-x))
fn sigmoid(x: f32) -> f32 {
    let e = exponential(-abs(x));
    let inverse = 1.0 / (1.0 + e);
    return select(e * inverse, inverse, x > 0.0);
}

// log(exp a + exp b), of which either may be NO_ENTRY.
fn log_add_exp(a: f32, b: f32) -> f32 {
    let high = max(a, b);
    let low = min(a, b);
    if (low == NO_ENTRY) {
        return high;
    }
    return high + logarithm_of_one_plus(exponential(low - high));
}
