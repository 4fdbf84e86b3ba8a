// The inverse length of a row of `input`, in two factors: squares of long or short rows leave single precision, so the
// row is multiplied first with the power of two that brings its largest value near 1.

#import rows

// Shorter rows are treated as if they had this length.
const SHORTEST: f32 = 1e-12;

// 1 / length = scale · unit; a value of the unit row is (x · scale) · unit.
struct RowNorm {
    scale: f32,
    unit: f32,
}

// Of `width` values from `first` on, by the 32 invocations of a row.
fn row_norm(first: u32, width: u32, lane: u32) -> RowNorm {
    var largest = 0.0;
    for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
        largest = max(largest, abs(input[first + c]));
    }
    let exponent = clamp(bitcast<u32>(row_max(largest, lane)) >> 23u, 1u, 253u);
    let scale = bitcast<f32>((254u - exponent) << 23u);
    var square = 0.0;
    for (var c = lane % ROW_LANES; c < width; c += ROW_LANES) {
        let scaled = input[first + c] * scale;
        square += scaled * scaled;
    }
    let length = max(sqrt(row_sum(square, lane)), SHORTEST * scale);
    return RowNorm(scale, 1.0 / length);
}
