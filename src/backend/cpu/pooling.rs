//! From the rows of each sequence to one vector.

use rayon::prelude::*;

use super::buffer::{read, write};
use super::{sequences, simd, split_rows};
use crate::backend::operations::{Pooling, PoolingBackward, PoolingForward};
use crate::{Error, Result};

fn checked(
    operation: &'static str,
    offsets: &[u32],
    rows: usize,
) -> Result<impl ExactSizeIterator<Item = std::ops::Range<usize>> + Clone> {
    let sequences = sequences(operation, offsets, rows)?;
    match sequences.clone().position(|sequence| sequence.is_empty()) {
        None => Ok(sequences),
        Some(empty) => Err(Error::value(operation, "offsets", format!("make sequence {empty} empty"))),
    }
}

pub(super) fn forward(arguments: PoolingForward<'_>) -> Result<()> {
    const OPERATION: &str = "pooling_forward";
    let PoolingForward { input, offsets, pooling, output } = arguments;
    let (rows, width) = (input.shape().rows(), input.shape().width());
    let input = read::<f32>(OPERATION, "input", input)?;
    let sequences: Vec<_> = checked(OPERATION, read::<u32>(OPERATION, "offsets", offsets)?, rows)?.collect();
    let output = write::<f32>(OPERATION, "output", output)?;
    if width == 0 {
        return Ok(());
    }
    output.par_chunks_mut(width).zip(&sequences).for_each(|(output, sequence)| {
        let first = sequence.start * width;
        output.copy_from_slice(&input[first..first + width]);
        if pooling == Pooling::Mean {
            input[first + width..sequence.end * width].chunks_exact(width).for_each(|row| simd::add(row, output));
            let factor = 1.0 / sequence.len() as f32;
            output.iter_mut().for_each(|value| *value *= factor);
        }
    });
    Ok(())
}

pub(super) fn backward(arguments: PoolingBackward<'_>) -> Result<()> {
    const OPERATION: &str = "pooling_backward";
    let PoolingBackward { upstream, offsets, pooling, d_input } = arguments;
    let (rows, width) = (d_input.shape().rows(), d_input.shape().width());
    let upstream = read::<f32>(OPERATION, "upstream", upstream)?;
    let sequences = checked(OPERATION, read::<u32>(OPERATION, "offsets", offsets)?, rows)?;
    let d_input = write::<f32>(OPERATION, "d_input", d_input)?;
    if width == 0 {
        return Ok(());
    }
    split_rows(d_input, width, sequences).into_par_iter().zip(upstream.par_chunks(width)).for_each(
        |(d_input, upstream)| match pooling {
            Pooling::Mean => {
                let factor = width as f32 / d_input.len() as f32;
                for row in d_input.chunks_exact_mut(width) {
                    row.iter_mut().zip(upstream).for_each(|(value, upstream)| *value = upstream * factor);
                }
            }
            Pooling::Cls => {
                d_input.fill(0.0);
                d_input[..width].copy_from_slice(upstream);
            }
        },
    );
    Ok(())
}
