//! One vector of each packed sequence.

use super::super::{Backward, GradientOf, Gradients, Tape, Variable};
use crate::backend::PackedBatch;
use crate::backend::operations::{Pooling, PoolingBackward as Arguments, PoolingForward};
use crate::error::DType;
use crate::{Result, Tensor};

#[derive(Debug)]
struct PoolingBackward {
    input: GradientOf,
    batch: PackedBatch,
    pooling: Pooling,
}

impl Backward for PoolingBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let shape = [self.batch.rows(), upstream.shape().width()];
        let mut d_input = gradients.device().empty(shape, DType::F32)?;
        gradients.device().pooling_backward(Arguments {
            upstream: &upstream,
            offsets: self.batch.offsets(),
            pooling: self.pooling,
            d_input: &mut d_input,
        })?;
        gradients.add(self.input, d_input)
    }
}

impl Tape {
    /// From the rows (T, C) of a batch to one vector a sequence, (S, C).
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if there are not T rows.
    pub fn pooling(&mut self, input: &Variable, batch: &PackedBatch, pooling: Pooling) -> Result<Variable> {
        let mut output = self.device().empty([batch.sequences(), input.value().shape().width()], DType::F32)?;
        self.device().pooling_forward(PoolingForward {
            input: input.value(),
            offsets: batch.offsets(),
            pooling,
            output: &mut output,
        })?;
        Ok(self.record(output, &[input], || PoolingBackward { input: input.gradient(), batch: batch.clone(), pooling }))
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
        let batch = PackedBatch::new(&Device::cpu(), &sequences, 0).unwrap();
        for pooling in [Pooling::Mean, Pooling::Cls] {
            check::gradients(&[&[9, 4]], 5e-5, |tape, v| tape.pooling(&v[0], &batch, pooling));
        }
    }
}
