//! The similarity of each query with its own document, and what it adds to the gradients. Apart from the sweeps,
//! because a positive's gradient is a small difference of large numbers there.

use rayon::prelude::*;

use super::TASK_ROWS;
use super::buffer::{read, write};
use super::simd::{add_scaled, dot};
use crate::Result;
use crate::backend::operations::{PositivesBackward, PositivesForward};

pub(super) fn forward(arguments: PositivesForward<'_>) -> Result<()> {
    const OPERATION: &str = "positives_forward";
    let width = arguments.queries.shape().width();
    let queries = read::<f32>(OPERATION, "queries", arguments.queries)?;
    let documents = read::<f32>(OPERATION, "documents", arguments.documents)?;
    let similarity = write::<f32>(OPERATION, "similarity", arguments.similarity)?;
    similarity.par_chunks_mut(TASK_ROWS).enumerate().for_each(|(task, similarity)| {
        for (r, similarity) in similarity.iter_mut().enumerate() {
            let range = (task * TASK_ROWS + r) * width..(task * TASK_ROWS + r + 1) * width;
            *similarity = dot(&queries[range.clone()], &documents[range]);
        }
    });
    Ok(())
}

pub(super) fn backward(arguments: PositivesBackward<'_>) -> Result<()> {
    const OPERATION: &str = "positives_backward";
    let width = arguments.queries.shape().width();
    let queries = read::<f32>(OPERATION, "queries", arguments.queries)?;
    let documents = read::<f32>(OPERATION, "documents", arguments.documents)?;
    let scale = read::<f32>(OPERATION, "log_scale", arguments.log_scale)?[0].exp();
    let similarity = read::<f32>(OPERATION, "similarity", arguments.similarity)?;
    let gradient = read::<f32>(OPERATION, "gradient", arguments.gradient)?;
    let d_queries = write::<f32>(OPERATION, "d_queries", arguments.d_queries)?;
    let d_documents = write::<f32>(OPERATION, "d_documents", arguments.d_documents)?;
    let d_log_scale = write::<f32>(OPERATION, "d_log_scale", arguments.d_log_scale)?;
    if width > 0 {
        let add = |output: &mut [f32], input: &[f32]| {
            output
                .par_chunks_mut(width)
                .zip(input.par_chunks(width))
                .zip(gradient)
                .for_each(|((output, input), gradient)| add_scaled(scale * gradient, input, output));
        };
        add(d_queries, documents);
        add(d_documents, queries);
    }
    for ((output, gradient), similarity) in d_log_scale.iter_mut().zip(gradient).zip(similarity) {
        *output += gradient * scale * similarity;
    }
    Ok(())
}
