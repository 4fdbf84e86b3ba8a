//! The sum of word, position and token-type embeddings.

use super::super::{Backward, Gradients, Tape, Variable};
use crate::backend::PackedBatch;
use crate::backend::operations::{EmbeddingBackward as Arguments, EmbeddingForward};
use crate::error::DType;
use crate::{Result, Tensor};

#[derive(Debug)]
struct EmbeddingBackward {
    batch: PackedBatch,
    word: Variable,
    position: Variable,
    token_type: Variable,
}

impl Backward for EmbeddingBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let device = gradients.device().clone();
        let mut take = |table: &Variable| gradients.take_zeroed(table.gradient(), table.value().shape());
        let (mut d_word, mut d_position) = (take(&self.word)?, take(&self.position)?);
        let mut d_token_type = take(&self.token_type)?;
        device.embedding_backward(Arguments {
            upstream: &upstream,
            tokens: self.batch.tokens(),
            order: self.batch.order(),
            offsets: self.batch.offsets(),
            d_word: &mut d_word,
            d_position: &mut d_position,
            d_token_type: &mut d_token_type,
        })?;
        gradients.put(self.word.gradient(), d_word);
        gradients.put(self.position.gradient(), d_position);
        gradients.put(self.token_type.gradient(), d_token_type);
        Ok(())
    }
}

impl Tape {
    /// The embedding of each token of a batch (BERT, arXiv 1810.04805, figure 2): word (V, C), position (P, C) and
    /// token type (Y, C), of which every token gets row 0. The output is (T, C).
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if a token or position is beyond its table.
    pub fn embedding(
        &mut self,
        batch: &PackedBatch,
        word: &Variable,
        position: &Variable,
        token_type: &Variable,
    ) -> Result<Variable> {
        let mut output = self.device().empty([batch.rows(), word.value().shape().width()], DType::F32)?;
        self.device().embedding_forward(EmbeddingForward {
            tokens: batch.tokens(),
            positions: batch.positions(),
            word: word.value(),
            position: position.value(),
            token_type: token_type.value(),
            output: &mut output,
        })?;
        Ok(self.record(output, &[word, position, token_type], || EmbeddingBackward {
            batch: batch.clone(),
            word: word.clone(),
            position: position.clone(),
            token_type: token_type.clone(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::autograd::check;

    #[test]
    fn gradients() {
        let sequences: [&[u32]; 3] = [&[1, 4, 1], &[0], &[4, 4, 2, 1]];
        let batch = PackedBatch::new(&Device::cpu(), &sequences, 0).unwrap();
        // A vocabulary of more than one task, of which few are used.
        check::gradients(&[&[140, 3], &[5, 3], &[2, 3]], 5e-5, |tape, v| tape.embedding(&batch, &v[0], &v[1], &v[2]));
    }
}
