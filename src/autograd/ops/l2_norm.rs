//! Vectors of length one.

use super::super::{Backward, GradientOf, Gradients, Tape, Variable};
use crate::backend::operations::{L2NormBackward as Arguments, L2NormForward};
use crate::error::DType;
use crate::{Result, Tensor};

#[derive(Debug)]
struct L2NormBackward {
    input: GradientOf,
    output: Tensor,
    inverse_norm: Tensor,
}

impl Backward for L2NormBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let mut d_input = gradients.device().empty(upstream.shape().clone(), DType::F32)?;
        gradients.device().l2_norm_backward(Arguments {
            upstream: &upstream,
            output: &self.output,
            inverse_norm: &self.inverse_norm,
            d_input: &mut d_input,
        })?;
        gradients.add(self.input, d_input)
    }
}

impl Tape {
    /// Each row of (N, d) divided by its Euclidean length; rows shorter than 1e-12 are divided by that.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn l2_norm(&mut self, input: &Variable) -> Result<Variable> {
        let shape = input.value().shape();
        let mut output = self.device().empty(shape.clone(), DType::F32)?;
        let mut inverse_norm = self.device().empty([shape.rows()], DType::F32)?;
        self.device().l2_norm_forward(L2NormForward {
            input: input.value(),
            output: &mut output,
            inverse_norm: &mut inverse_norm,
        })?;
        let saved = output.clone();
        Ok(self.record(output, &[input], || L2NormBackward { input: input.gradient(), output: saved, inverse_norm }))
    }
}

#[cfg(test)]
mod tests {
    use crate::autograd::check;

    #[test]
    fn gradients() {
        check::gradients(&[&[4, 19]], 5e-5, |tape, v| tape.l2_norm(&v[0]));
    }
}
