//! Sequences of different length without padding.

use super::{Device, Tensor};
use crate::{Error, Result};

/// Token sequences, one after the other in one run of rows, on a device.
///
/// No work is spent on padding, because there is none: T rows are exactly T tokens.
#[derive(Debug, Clone)]
pub struct PackedBatch {
    tokens: Tensor,
    positions: Tensor,
    order: Tensor,
    offsets: Tensor,
    longest: usize,
    row_offset: u32,
}

impl PackedBatch {
    /// Packs sequences; `row_offset` is the number of tokens that stand before them in the whole batch, if this is
    /// only a part of it.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no sequence, one is empty, or one has 65,536 tokens or more;
    /// [`Error::OutOfMemory`].
    pub fn new(device: &Device, sequences: &[&[u32]], row_offset: usize) -> Result<Self> {
        const OPERATION: &str = "pack";
        if sequences.is_empty() {
            return Err(Error::value(OPERATION, "sequences", "are none"));
        }
        let longest = sequences.iter().map(|sequence| sequence.len()).max().unwrap_or(0);
        if let Some(empty) = sequences.iter().position(|sequence| sequence.is_empty()) {
            return Err(Error::value(OPERATION, "sequences", format!("hold an empty one, number {empty}")));
        }
        if longest >= 65_536 {
            return Err(Error::value(
                OPERATION,
                "sequences",
                format!("hold one of {longest} tokens; 65,535 is the most"),
            ));
        }
        let tokens: Vec<u32> = sequences.concat();
        let too_many = || Error::value(OPERATION, "sequences", format!("hold {} tokens, too many", tokens.len()));
        let row_offset = u32::try_from(row_offset).map_err(|_| too_many())?;
        u32::try_from(tokens.len()).map_err(|_| too_many())?;
        let positions: Vec<u32> = sequences.iter().flat_map(|sequence| 0..sequence.len() as u32).collect();
        let mut offsets = Vec::with_capacity(sequences.len() + 1);
        let mut end = 0;
        offsets.push(end);
        for sequence in sequences {
            end += sequence.len() as u32;
            offsets.push(end);
        }
        let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
        // Stable, so equal tokens stay in the order of the batch.
        order.sort_by_key(|&row| tokens[row as usize]);
        Ok(Self {
            tokens: device.tensor(&tokens, [tokens.len()])?,
            positions: device.tensor(&positions, [tokens.len()])?,
            order: device.tensor(&order, [tokens.len()])?,
            offsets: device.tensor(&offsets, [offsets.len()])?,
            longest,
            row_offset,
        })
    }

    /// T: the number of tokens.
    pub fn rows(&self) -> usize {
        self.tokens.elements()
    }

    /// S: the number of sequences.
    pub fn sequences(&self) -> usize {
        self.offsets.elements() - 1
    }

    /// The length of the longest sequence.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// u32 (T)
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// u32 (T): where each token stands in its sequence.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// u32 (T): the rows in ascending order of their tokens.
    pub fn order(&self) -> &Tensor {
        &self.order
    }

    /// u32 (S + 1): where each sequence begins, and T.
    pub fn offsets(&self) -> &Tensor {
        &self.offsets
    }

    /// The number of tokens that stand before these in the whole batch.
    pub fn row_offset(&self) -> u32 {
        self.row_offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_packed() {
        let batch = PackedBatch::new(&Device::cpu(), &[&[7, 3], &[3], &[1, 7, 3]], 10).unwrap();
        let host = |tensor: &Tensor| tensor.to_host::<u32>().unwrap();
        assert_eq!((batch.rows(), batch.sequences(), batch.longest(), batch.row_offset()), (6, 3, 3, 10));
        assert_eq!(host(batch.tokens()), [7, 3, 3, 1, 7, 3]);
        assert_eq!(host(batch.positions()), [0, 1, 0, 0, 1, 2]);
        assert_eq!(host(batch.order()), [3, 1, 2, 5, 0, 4]);
        assert_eq!(host(batch.offsets()), [0, 2, 3, 6]);
    }

    #[test]
    fn nothing_and_empty_sequences_are_refused() {
        assert!(PackedBatch::new(&Device::cpu(), &[], 0).is_err());
        let error = PackedBatch::new(&Device::cpu(), &[&[1], &[]], 0).unwrap_err().to_string();
        assert!(error.contains("empty one, number 1"), "{error}");
    }
}
