// The Gaussian error linear unit x · Φ(x), with the exact normal distribution function Φ (arXiv 1606.08415).
//
// For a ≥ 0, Φ(−a) = exp(−a²/2) · u · P(u) with u = 1 / (1 + 0.35·a) and a minimax polynomial P: good to about 1e-7 of
// itself also in the lower tail.

#import numerics

// exp(−x²/2), and what it is multiplied with to give Φ(−|x|).
fn lower_tail(x: f32) -> vec2<f32> {
    // Beyond 14 all is 0 or 1 already, and the square stays a number.
    let distance = min(abs(x), 14.0);
    let u = 1.0 / (0.35 * distance + 1.0);
    var p = -0.029146722 * u + 0.14397545;
    p = p * u - 0.25572178;
    p = p * u + 0.15918244;
    p = p * u - 0.023115296;
    p = p * u + 0.1055102;
    p = p * u + 0.119832344;
    p = p * u + 0.13986194;
    p = p * u + 0.1396214;
    return vec2<f32>(exponential(-0.5 * distance * distance), u * p);
}

// In the lower tail Φ is below the normal numbers, which drivers may take for 0, where x · Φ(x) is not yet: the
// exponential comes last.
fn gelu(x: f32) -> f32 {
    let tail = lower_tail(x);
    return select(x * tail.y * tail.x, x * (1.0 - tail.x * tail.y), x > 0.0);
}

// Φ(x) + x · φ(x)
fn gelu_derivative(x: f32) -> f32 {
    let tail = lower_tail(x);
    // φ(x) = exp(−x²/2) / √(2π)
    let density = x * 0.3989423;
    return select(tail.x * (tail.y + density), 1.0 + tail.x * (density - tail.y), x > 0.0);
}
