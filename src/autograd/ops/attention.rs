//! Multi-head attention of packed sequences.

use super::super::{Backward, Gradients, Tape, Variable};
use crate::backend::PackedBatch;
use crate::backend::operations::{AttentionBackward as Arguments, AttentionForward, AttentionShape, Dropout};
use crate::error::DType;
use crate::{Result, Tensor};

#[derive(Debug)]
struct AttentionBackward {
    query_key_value: Variable,
    output: Tensor,
    log_sum_exp: Tensor,
    batch: PackedBatch,
    heads: usize,
    dropout: Option<Dropout>,
}

impl Backward for AttentionBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let device = gradients.device().clone();
        let mut d_query_key_value = device.empty(self.query_key_value.value().shape().clone(), DType::F32)?;
        device.attention_backward(Arguments {
            upstream: &upstream,
            query_key_value: self.query_key_value.value(),
            output: &self.output,
            log_sum_exp: &self.log_sum_exp,
            shape: shape(&self.batch, self.heads, self.dropout),
            d_query_key_value: &mut d_query_key_value,
        })?;
        gradients.add(self.query_key_value.gradient(), d_query_key_value)
    }
}

fn shape(batch: &PackedBatch, heads: usize, dropout: Option<Dropout>) -> AttentionShape<'_> {
    AttentionShape { offsets: batch.offsets(), longest: batch.longest(), heads, dropout }
}

impl Tape {
    /// Attention of each sequence over itself (arXiv 1706.03762, eq. 1), with dropout on its weights: queries, keys
    /// and values side by side (T, 3·C), each with its heads one after the other. The output is (T, C).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if there are not T rows, [`Error::Value`](crate::Error::Value) if the
    /// number of heads does not divide C.
    pub fn attention(
        &mut self,
        query_key_value: &Variable,
        batch: &PackedBatch,
        heads: usize,
        dropout: Option<Dropout>,
    ) -> Result<Variable> {
        let device = self.device().clone();
        let width = query_key_value.value().shape().width() / 3;
        let mut output = device.empty([batch.rows(), width], DType::F32)?;
        let mut log_sum_exp = if self.records(&[query_key_value]) {
            Some(device.empty([batch.rows(), heads], DType::F32)?)
        } else {
            None
        };
        device.attention_forward(AttentionForward {
            query_key_value: query_key_value.value(),
            shape: shape(batch, heads, dropout),
            output: &mut output,
            log_sum_exp: log_sum_exp.as_mut(),
        })?;
        let Some(log_sum_exp) = log_sum_exp else { return Ok(self.constant(output)) };
        let saved = output.clone();
        Ok(self.record(output, &[query_key_value], || AttentionBackward {
            query_key_value: query_key_value.clone(),
            output: saved,
            log_sum_exp,
            batch: batch.clone(),
            heads,
            dropout,
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
        let sequences: [&[u32]; 3] = [&[0; 3], &[0], &[0; 5]];
        let batch = PackedBatch::new(&Device::cpu(), &sequences, 7).unwrap();
        let dropout = Dropout { probability: 0.3, seed: 4, site: 2, step: 8, row_offset: 7 };
        for dropout in [None, Some(dropout)] {
            check::gradients(&[&[9, 12]], 5e-5, |tape, v| tape.attention(&v[0], &batch, 2, dropout));
        }
    }
}
