//! The Gaussian error linear unit, `x · Φ(x)`.

use rayon::prelude::*;

use super::TASK_ELEMENTS;
use super::buffer::{read, write};
use super::simd::{multiply_add, normal, vectorised};
use crate::Result;
use crate::backend::operations::GeluBackward;

vectorised! {
    /// Replaces each x by `x · Φ(x)`.
    pub(super) fn apply(values: &mut [f32]) {
        for value in values {
            *value *= normal::<FUSED>(*value).1;
        }
    }
}

vectorised! {
    /// Multiplies each gradient with `Φ(x) + x · φ(x)`.
    fn multiply_by_derivative(input: &[f32], gradient: &mut [f32]) {
        /// 1 / √(2π)
        const PEAK: f32 = 0.398_942_3;
        for (x, gradient) in input.iter().zip(gradient) {
            let (bell, phi) = normal::<FUSED>(*x);
            *gradient *= multiply_add::<FUSED>(*x * PEAK, bell, phi);
        }
    }
}

pub(super) fn backward(arguments: GeluBackward<'_>) -> Result<()> {
    let input = read::<f32>("gelu_backward", "input", arguments.input)?;
    let gradient = write::<f32>("gelu_backward", "gradient", arguments.gradient)?;
    gradient
        .par_chunks_mut(TASK_ELEMENTS)
        .zip(input.par_chunks(TASK_ELEMENTS))
        .for_each(|(gradient, input)| multiply_by_derivative(input, gradient));
    Ok(())
}
