// The Gaussian error linear unit x · Φ(x), with the exact normal distribution function Φ (arXiv 1606.08415).
//
// For a ≥ 0, Φ(−a) = exp(−a²/2) · u · P(u) with u = 1 / (1 + 0.35·a) and a minimax polynomial P: good to about 1e-7 of
// itself also in the lower tail.

#import numerics

// exp(−x²/2) and Φ(x)
fn normal_distribution(x: f32) -> vec2<f32> {
    // Beyond 14 all is 0 or 1 already, and the square stays a number.
    let distance = min(abs(x), 14.0);
    let bell = exponential(-0.5 * distance * distance);
    let u = 1.0 / (0.35 * distance + 1.0);
    var p = -0.029146722 * u + 0.14397545;
    p = p * u - 0.25572178;
    p = p * u + 0.15918244;
    p = p * u - 0.023115296;
    p = p * u + 0.1055102;
    p = p * u + 0.119832344;
    p = p * u + 0.13986194;
    p = p * u + 0.1396214;
    let tail = bell * u * p;
    return vec2<f32>(bell, select(tail, 1.0 - tail, x > 0.0));
}

fn gelu(x: f32) -> f32 {
    return x * normal_distribution(x).y;
}

// Φ(x) + x · φ(x)
fn gelu_derivative(x: f32) -> f32 {
    let normal = normal_distribution(x);
    // 1 / √(2π)
    return normal.y + x * 0.3989423 * normal.x;
}
