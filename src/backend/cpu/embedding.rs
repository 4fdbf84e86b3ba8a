//! Sums of word, position and token-type embeddings, and their gradients without atomics: each task owns a range of
//! table rows and adds to them in the order of the batch.

use rayon::prelude::*;

use super::buffer::{read, write};
use super::reduce::add_column_sums;
use super::{TASK_ROWS, sequences, simd};
use crate::backend::operations::{EmbeddingBackward, EmbeddingForward};
use crate::{Error, Result};

fn check_below(operation: &'static str, argument: &'static str, indices: &[u32], bound: usize) -> Result<()> {
    match indices.iter().position(|&index| index as usize >= bound) {
        None => Ok(()),
        Some(at) => {
            let reason = format!("holds {} at {at}, but the table has {bound} rows", indices[at]);
            Err(Error::value(operation, argument, reason))
        }
    }
}

pub(super) fn forward(arguments: EmbeddingForward<'_>) -> Result<()> {
    const OPERATION: &str = "embedding_forward";
    let EmbeddingForward { tokens, positions, word, position, token_type, output } = arguments;
    let width = word.shape().width();
    let tokens = read::<u32>(OPERATION, "tokens", tokens)?;
    let positions = read::<u32>(OPERATION, "positions", positions)?;
    check_below(OPERATION, "tokens", tokens, word.shape().rows())?;
    check_below(OPERATION, "positions", positions, position.shape().rows())?;
    let word = read::<f32>(OPERATION, "word", word)?;
    let position = read::<f32>(OPERATION, "position", position)?;
    let token_type = read::<f32>(OPERATION, "token_type", token_type)?;
    let output = write::<f32>(OPERATION, "output", output)?;
    if width == 0 {
        return Ok(());
    }
    let row_of = |index: u32| index as usize * width..(index as usize + 1) * width;
    output.par_chunks_mut(TASK_ROWS * width).enumerate().for_each(|(task, rows)| {
        for (r, output) in rows.chunks_exact_mut(width).enumerate() {
            let t = task * TASK_ROWS + r;
            output.copy_from_slice(&word[row_of(tokens[t])]);
            simd::add(&position[row_of(positions[t])], output);
            simd::add(&token_type[..width], output);
        }
    });
    Ok(())
}

pub(super) fn backward(arguments: EmbeddingBackward<'_>) -> Result<()> {
    const OPERATION: &str = "embedding_backward";
    let EmbeddingBackward { upstream, tokens, order, offsets, d_word, d_position, d_token_type } = arguments;
    let (rows, width) = (upstream.shape().rows(), upstream.shape().width());
    let upstream = read::<f32>(OPERATION, "upstream", upstream)?;
    let tokens = read::<u32>(OPERATION, "tokens", tokens)?;
    let order = read::<u32>(OPERATION, "order", order)?;
    let offsets = read::<u32>(OPERATION, "offsets", offsets)?;
    check_below(OPERATION, "tokens", tokens, d_word.shape().rows())?;
    check_below(OPERATION, "order", order, rows)?;
    if !order.is_sorted_by_key(|&row| tokens[row as usize]) {
        return Err(Error::value(OPERATION, "order", "does not bring equal tokens together"));
    }
    let sequences = sequences(OPERATION, offsets, rows)?;
    let longest = sequences.clone().map(|sequence| sequence.len()).max().unwrap_or(0);
    if longest > d_position.shape().rows() {
        let reason = format!("has {} rows for sequences of up to {longest} tokens", d_position.shape().rows());
        return Err(Error::value(OPERATION, "d_position", reason));
    }
    let d_word = write::<f32>(OPERATION, "d_word", d_word)?;
    let d_position = write::<f32>(OPERATION, "d_position", d_position)?;
    let d_token_type = write::<f32>(OPERATION, "d_token_type", d_token_type)?;
    if width == 0 {
        return Ok(());
    }
    let gradient = |row: usize| &upstream[row * width..(row + 1) * width];

    d_word.par_chunks_mut(TASK_ROWS * width).enumerate().for_each(|(task, table)| {
        let first = task * TASK_ROWS;
        let end = first + table.len() / width;
        let begin = order.partition_point(|&row| (tokens[row as usize] as usize) < first);
        for &row in &order[begin..] {
            let token = tokens[row as usize] as usize;
            if token >= end {
                break;
            }
            simd::add(gradient(row as usize), &mut table[(token - first) * width..(token - first + 1) * width]);
        }
    });
    d_position[..longest * width].par_chunks_mut(width).enumerate().for_each(|(position, output)| {
        for sequence in sequences.clone().filter(|sequence| sequence.len() > position) {
            simd::add(gradient(sequence.start + position), output);
        }
    });
    add_column_sums(upstream, width, &mut d_token_type[..width]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Device;

    #[test]
    fn a_token_beyond_the_table_is_an_error() {
        let device = Device::cpu();
        let table = device.zeros([4, 2]).unwrap();
        let tokens = device.tensor(&[1u32, 4], [2]).unwrap();
        let positions = device.tensor(&[0u32, 1], [2]).unwrap();
        let mut output = device.zeros([2, 2]).unwrap();
        let error = device
            .embedding_forward(EmbeddingForward {
                tokens: &tokens,
                positions: &positions,
                word: &table,
                position: &table,
                token_type: &table,
                output: &mut output,
            })
            .unwrap_err();
        assert_eq!(error.to_string(), "embedding_forward: `tokens` holds 4 at 1, but the table has 4 rows");
    }
}
