//! Loops over stored matrices in memory of this program's own, on all threads, with the vector code of the fused
//! kernels.

use rayon::prelude::*;

use super::OPERATION;
use crate::backend::cpu::buffer::{read, write};
use crate::backend::cpu::simd::{exp, largest_of, sum_of, vectorised};
use crate::{Result, Tensor};

/// Columns that one task works on.
const TASK_COLUMNS: usize = 256;

vectorised! {
    fn largest(logits: &[f32], start: f32) -> f32 {
        largest_of(logits.len(), start, |i| logits[i])
    }
}

vectorised! {
    fn exponentials(logits: &[f32], maximum: f32) -> f32 {
        sum_of(logits.len(), |i| exp::<FUSED>(logits[i] - maximum))
    }
}

vectorised! {
    /// The largest logit of each column, so far.
    fn raise(logits: &[f32], largest: &mut [f32]) {
        for (largest, z) in largest.iter_mut().zip(logits) {
            *largest = if *z > *largest { *z } else { *largest };
        }
    }
}

vectorised! {
    /// Adds the exponentials of a row to the sums of its columns.
    fn add_exponentials(logits: &[f32], maximum: &[f32], sums: &mut [f32]) {
        for ((sum, z), maximum) in sums.iter_mut().zip(logits).zip(maximum) {
            *sum += exp::<FUSED>(*z - *maximum);
        }
    }
}

vectorised! {
    /// Adds the gradient of the softmax that a row of logits stands in.
    fn add_row_softmax(logits: &[f32], log_sum_exp: f32, weight: f32, gradient: &mut [f32]) {
        for (gradient, z) in gradient.iter_mut().zip(logits) {
            *gradient += weight * exp::<FUSED>(*z - log_sum_exp);
        }
    }
}

vectorised! {
    /// Adds the gradients of the softmaxes that the columns of a row of logits stand in.
    fn add_column_softmax(logits: &[f32], log_sum_exp: &[f32], weight: f32, gradient: &mut [f32]) {
        for ((gradient, z), log_sum_exp) in gradient.iter_mut().zip(logits).zip(log_sum_exp) {
            *gradient += weight * exp::<FUSED>(*z - *log_sum_exp);
        }
    }
}

/// Leaves out the diagonal of logits (N, N).
pub(super) fn omit_diagonal(logits: &mut Tensor) -> Result<()> {
    let n = logits.shape().rows();
    let logits = write::<f32>(OPERATION, "logits", logits)?;
    logits.iter_mut().step_by(n + 1).for_each(|z| *z = f32::NEG_INFINITY);
    Ok(())
}

/// The log-sum-exp of each row of a partition, whose entries are the rows of some matrices (N, N) and the columns of
/// those with a `true`, and what it adds to the losses: `losses[i] += weight · (log_sum_exp[i] − positives[i, i])`.
pub(super) fn log_sum_exp(
    entries: &[(&Tensor, bool)],
    positives: &Tensor,
    weight: f32,
    log_sum_exp: &mut Tensor,
    losses: &mut Tensor,
) -> Result<()> {
    let n = positives.shape().rows();
    let matrices = entries
        .iter()
        .map(|&(logits, columns)| Ok((read::<f32>(OPERATION, "logits", logits)?, columns)))
        .collect::<Result<Vec<_>>>()?;
    let mut maximum = vec![f32::NEG_INFINITY; n];
    for &(logits, columns) in &matrices {
        if columns {
            maximum.par_chunks_mut(TASK_COLUMNS).enumerate().for_each(|(task, maximum)| {
                let first = task * TASK_COLUMNS;
                logits.chunks_exact(n).for_each(|row| raise(&row[first..first + maximum.len()], maximum));
            });
        } else {
            logits.par_chunks_exact(n).zip(&mut maximum).for_each(|(row, maximum)| *maximum = largest(row, *maximum));
        }
    }
    let mut sums = vec![0.0f32; n];
    for &(logits, columns) in &matrices {
        if columns {
            let tasks = sums.par_chunks_mut(TASK_COLUMNS).zip(maximum.par_chunks(TASK_COLUMNS)).enumerate();
            tasks.for_each(|(task, (sums, maximum))| {
                let first = task * TASK_COLUMNS;
                logits.chunks_exact(n).for_each(|row| add_exponentials(&row[first..first + sums.len()], maximum, sums));
            });
        } else {
            let rows = logits.par_chunks_exact(n).zip(&mut sums).zip(&maximum);
            rows.for_each(|((row, sum), &maximum)| *sum += exponentials(row, maximum));
        }
    }
    let positives = read::<f32>(OPERATION, "positives", positives)?.iter().step_by(n + 1);
    let output = write::<f32>(OPERATION, "log_sum_exp", log_sum_exp)?;
    let losses = write::<f32>(OPERATION, "losses", losses)?;
    for ((((output, loss), maximum), sum), positive) in
        output.iter_mut().zip(losses).zip(&maximum).zip(&sums).zip(positives)
    {
        *output = maximum + sum.ln();
        *loss += weight * (*output - positive);
    }
    Ok(())
}

fn softmax((log_sum_exp, weight): (&Tensor, f32)) -> Result<(&[f32], f32)> {
    Ok((read::<f32>(OPERATION, "log_sum_exp", log_sum_exp)?, weight))
}

/// Puts in place of logits (N, N) the gradient by them: of the softmaxes of their rows and of their columns, each given
/// by its log-sum-exps and its weight, less `positive` on the diagonal.
pub(super) fn gradient(
    logits: &mut Tensor,
    rows: Option<(&Tensor, f32)>,
    columns: Option<(&Tensor, f32)>,
    positive: f32,
) -> Result<()> {
    let n = logits.shape().rows();
    let (rows, columns) = (rows.map(softmax).transpose()?, columns.map(softmax).transpose()?);
    let logits = write::<f32>(OPERATION, "logits", logits)?;
    logits.par_chunks_exact_mut(n).enumerate().for_each_init(
        || vec![0.0f32; n],
        |gradient, (i, logits)| {
            gradient.fill(0.0);
            if let Some((log_sum_exp, weight)) = rows {
                add_row_softmax(logits, log_sum_exp[i], weight, gradient);
            }
            if let Some((log_sum_exp, weight)) = columns {
                add_column_softmax(logits, log_sum_exp, weight, gradient);
            }
            gradient[i] -= positive;
            logits.copy_from_slice(gradient);
        },
    );
    Ok(())
}
