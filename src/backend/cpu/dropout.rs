//! Dropout: elements are zeroed by a mask that a counter-based generator makes from where they stand.

use rayon::prelude::*;

use super::TASK_ROWS;
use super::buffer::write;
use super::simd::vectorised;
use crate::Result;
use crate::backend::operations::{Dropout, DropoutInPlace};
use crate::backend::philox::philox;

/// Counters that are worked on side by side.
const BLOCK: usize = 8;

vectorised! {
    /// The factors (0 or the scale) of a run of elements of one row, the first of them a multiple of 8.
    pub(super) fn factors(dropout: Dropout, row: u32, first_column: u32, output: &mut [f32]) {
        let (key, threshold, scale) = (dropout.key(), dropout.threshold(), dropout.scale());
        let row = dropout.row_offset.wrapping_add(row);
        for (block, output) in output.chunks_mut(8 * BLOCK).enumerate() {
            let first = first_column / 8 + (block * BLOCK) as u32;
            let mut words = [[0u32; 4]; BLOCK];
            for (i, words) in words.iter_mut().enumerate() {
                // The low half of a word comes first, whatever the processor's order of bytes.
                *words = philox([first + i as u32, row, dropout.site, dropout.step], key).map(u32::to_le);
            }
            let halves: &[u16] = bytemuck::cast_slice(words.as_flattened());
            for (output, half) in output.iter_mut().zip(halves) {
                *output = if u16::from_le(*half) < threshold { 0.0 } else { scale };
            }
        }
    }
}

pub(super) fn forward(arguments: DropoutInPlace<'_>) -> Result<()> {
    let width = arguments.output.shape().width();
    let output = write::<f32>("dropout", "output", arguments.output)?;
    if width == 0 || arguments.dropout.probability == 0.0 {
        return Ok(());
    }
    output.par_chunks_mut(TASK_ROWS * width).enumerate().for_each(|(task, rows)| {
        let mut mask = vec![0.0; width];
        for (r, row) in rows.chunks_exact_mut(width).enumerate() {
            factors(arguments.dropout, (task * TASK_ROWS + r) as u32, 0, &mut mask);
            row.iter_mut().zip(&mask).for_each(|(value, factor)| *value *= factor);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Device;

    #[test]
    fn every_element_gets_the_factor_of_its_place() {
        let device = Device::cpu();
        let dropout = Dropout { probability: 0.3, seed: 1 << 40 | 5, site: 2, step: 9, row_offset: 17 };
        for (rows, width) in [(1, 1), (3, 70), (300, 5)] {
            let mut output = device.tensor(&vec![2.0f32; rows * width], [rows, width]).unwrap();
            device.dropout(DropoutInPlace { dropout, output: &mut output }).unwrap();
            for (i, value) in output.to_host::<f32>().unwrap().into_iter().enumerate() {
                assert_eq!(value, 2.0 * dropout.factor((i / width) as u32, (i % width) as u32));
            }
        }
    }
}
