//! Layer normalisation, with dropout and the residual connection before it.

use rayon::prelude::*;

use super::buffer::{read, write};
use super::simd::{multiply_add, sum_of, vectorised};
use super::{TASK_ROWS, dropout, simd};
use crate::Result;
use crate::backend::operations::{LayerNormBackward, LayerNormForward};

vectorised! {
    /// Normalises one row in place; returns rstd.
    fn normalise(row: &mut [f32], epsilon: f32) -> f32 {
        let n = row.len();
        let mean = sum_of(n, |i| row[i]) / n as f32;
        row.iter_mut().for_each(|value| *value -= mean);
        let variance = sum_of(n, |i| row[i] * row[i]) / n as f32;
        let rstd = 1.0 / (variance + epsilon).sqrt();
        row.iter_mut().for_each(|value| *value *= rstd);
        rstd
    }
}

vectorised! {
    fn affine(gain: &[f32], bias: &[f32], input: &[f32], output: &mut [f32]) {
        for (((output, input), gain), bias) in output.iter_mut().zip(input).zip(gain).zip(bias) {
            *output = multiply_add::<FUSED>(*input, *gain, *bias);
        }
    }
}

vectorised! {
    /// The gradient of one row, and what it adds to the gradients of gain and bias.
    fn row_gradient(
        upstream: &[f32],
        normalised: &[f32],
        rstd: f32,
        gain: &[f32],
        d_gain: &mut [f32],
        d_bias: &mut [f32],
        d_input: &mut [f32],
    ) {
        let n = d_input.len();
        let (upstream, normalised, gain) = (&upstream[..n], &normalised[..n], &gain[..n]);
        let (d_gain, d_bias) = (&mut d_gain[..n], &mut d_bias[..n]);
        let mean = sum_of(n, |i| upstream[i] * gain[i]) / n as f32;
        let along = sum_of(n, |i| upstream[i] * gain[i] * normalised[i]) / n as f32;
        for i in 0..n {
            d_gain[i] = multiply_add::<FUSED>(upstream[i], normalised[i], d_gain[i]);
            d_bias[i] += upstream[i];
            d_input[i] = rstd * (upstream[i] * gain[i] - mean - normalised[i] * along);
        }
    }
}

vectorised! {
    fn combine(input: &[f32], residual: Option<&[f32]>, mask: Option<&[f32]>, output: &mut [f32]) {
        match mask {
            Some(mask) => {
                for ((output, input), factor) in output.iter_mut().zip(input).zip(mask) {
                    *output = *input * *factor;
                }
            }
            None => output.copy_from_slice(input),
        }
        if let Some(residual) = residual {
            for (output, residual) in output.iter_mut().zip(residual) {
                *output += *residual;
            }
        }
    }
}

pub(super) fn forward(arguments: LayerNormForward<'_>) -> Result<()> {
    const OPERATION: &str = "layer_norm_forward";
    let width = arguments.input.shape().width();
    let rows = arguments.input.shape().rows();
    let LayerNormForward { input, residual, dropout, gain, bias, epsilon, output, normalised, rstd } = arguments;
    let input = read::<f32>(OPERATION, "input", input)?;
    let residual = residual.map(|residual| read::<f32>(OPERATION, "residual", residual)).transpose()?;
    let gain = read::<f32>(OPERATION, "gain", gain)?;
    let bias = read::<f32>(OPERATION, "bias", bias)?;
    let output = write::<f32>(OPERATION, "output", output)?;
    if width == 0 || rows == 0 {
        return Ok(());
    }
    let dropout = dropout.filter(|dropout| dropout.probability > 0.0);

    let normalised = normalised.map(|tensor| write::<f32>(OPERATION, "normalised", tensor)).transpose()?;
    let rstd = rstd.map(|tensor| write::<f32>(OPERATION, "rstd", tensor)).transpose()?;
    let mut normalised = pieces(normalised, rows, width);
    let mut rstd = pieces(rstd, rows, 1);
    output
        .par_chunks_mut(TASK_ROWS * width)
        .zip(normalised.par_iter_mut())
        .zip(rstd.par_iter_mut())
        .enumerate()
        .for_each(|(task, ((output, normalised), rstd))| {
            let mut mask = vec![0.0; if dropout.is_some() { width } else { 0 }];
            let mut scratch = vec![0.0; width];
            for (r, output) in output.chunks_exact_mut(width).enumerate() {
                let row = task * TASK_ROWS + r;
                let range = row * width..(row + 1) * width;
                if let Some(dropout) = dropout {
                    dropout::factors(dropout, row as u32, 0, &mut mask);
                }
                let kept = match normalised {
                    Some(normalised) => &mut normalised[r * width..(r + 1) * width],
                    None => &mut scratch[..],
                };
                let residual = residual.map(|residual| &residual[range.clone()]);
                combine(&input[range], residual, dropout.is_some().then_some(&mask), kept);
                let row_rstd = normalise(kept, epsilon);
                if let Some(rstd) = rstd {
                    rstd[r] = row_rstd;
                }
                affine(gain, bias, kept, output);
            }
        });
    Ok(())
}

/// The task-sized pieces of an output that may not be wanted.
fn pieces(output: Option<&mut [f32]>, rows: usize, width: usize) -> Vec<Option<&mut [f32]>> {
    match output {
        Some(output) => output.chunks_mut(TASK_ROWS * width).map(Some).collect(),
        None => (0..rows.div_ceil(TASK_ROWS)).map(|_| None).collect(),
    }
}

pub(super) fn backward(arguments: LayerNormBackward<'_>) -> Result<()> {
    const OPERATION: &str = "layer_norm_backward";
    let (rows, width) = (arguments.upstream.shape().rows(), arguments.upstream.shape().width());
    let LayerNormBackward { upstream, normalised, rstd, gain, dropout, d_input, d_residual, d_gain, d_bias } =
        arguments;
    let upstream = read::<f32>(OPERATION, "upstream", upstream)?;
    let normalised = read::<f32>(OPERATION, "normalised", normalised)?;
    let rstd = read::<f32>(OPERATION, "rstd", rstd)?;
    let gain = read::<f32>(OPERATION, "gain", gain)?;
    let d_input = write::<f32>(OPERATION, "d_input", d_input)?;
    let d_residual = d_residual.map(|tensor| write::<f32>(OPERATION, "d_residual", tensor)).transpose()?;
    let d_gain = write::<f32>(OPERATION, "d_gain", d_gain)?;
    let d_bias = write::<f32>(OPERATION, "d_bias", d_bias)?;
    if width == 0 || rows == 0 {
        return Ok(());
    }
    let dropout = dropout.filter(|dropout| dropout.probability > 0.0);
    let mut d_residual = pieces(d_residual, rows, width);
    let parts: Vec<(Vec<f32>, Vec<f32>)> = d_input
        .par_chunks_mut(TASK_ROWS * width)
        .zip(d_residual.par_iter_mut())
        .enumerate()
        .map(|(task, (d_input, d_residual))| {
            let (mut d_gain, mut d_bias) = (vec![0.0; width], vec![0.0; width]);
            let mut mask = vec![0.0; if dropout.is_some() { width } else { 0 }];
            for (r, d_input) in d_input.chunks_exact_mut(width).enumerate() {
                let row = task * TASK_ROWS + r;
                let range = row * width..(row + 1) * width;
                row_gradient(
                    &upstream[range.clone()],
                    &normalised[range],
                    rstd[row],
                    gain,
                    &mut d_gain,
                    &mut d_bias,
                    d_input,
                );
                if let Some(d_residual) = d_residual {
                    d_residual[r * width..(r + 1) * width].copy_from_slice(d_input);
                }
                if let Some(dropout) = dropout {
                    dropout::factors(dropout, row as u32, 0, &mut mask);
                    d_input.iter_mut().zip(&mask).for_each(|(value, factor)| *value *= factor);
                }
            }
            (d_gain, d_bias)
        })
        .collect();
    for (part_gain, part_bias) in &parts {
        simd::add(part_gain, d_gain);
        simd::add(part_bias, d_bias);
    }
    Ok(())
}
