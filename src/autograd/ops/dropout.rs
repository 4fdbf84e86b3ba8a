//! Dropout.

use super::super::{Backward, GradientOf, Gradients, Tape, Variable};
use crate::backend::operations::{Copy, Dropout, DropoutInPlace};
use crate::error::DType;
use crate::{Result, Tensor};

#[derive(Debug)]
struct DropoutBackward {
    input: GradientOf,
    dropout: Dropout,
}

impl Backward for DropoutBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let mut upstream = writable(gradients.device(), upstream)?;
        gradients.device().dropout(DropoutInPlace { dropout: self.dropout, output: &mut upstream })?;
        gradients.add(self.input, upstream)
    }
}

/// The tensor itself if nobody else holds it, else a copy.
fn writable(device: &crate::Device, tensor: Tensor) -> Result<Tensor> {
    if !tensor.is_shared() {
        return Ok(tensor);
    }
    let mut output = device.empty(tensor.shape().clone(), DType::F32)?;
    let elements = tensor.elements();
    let (input_offset, output_offset, accumulate) = (0, 0, false);
    device.copy(Copy { input: &tensor, input_offset, output: &mut output, output_offset, elements, accumulate })?;
    Ok(output)
}

impl Tape {
    /// Zeroes elements at random and scales the others up (Srivastava et al., JMLR 15, 2014). Works in place if nothing
    /// else needs the input.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if the probability is not at least 0 and below 1.
    pub fn dropout(&mut self, input: Variable, dropout: Dropout) -> Result<Variable> {
        let gradient = input.gradient();
        let input_only = Variable { value: self.device().empty([0], DType::F32)?, gradient };
        let mut output = writable(self.device(), input.into_value())?;
        self.device().dropout(DropoutInPlace { dropout, output: &mut output })?;
        Ok(self.record(output, &[&input_only], || DropoutBackward { input: gradient, dropout }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::check;

    #[test]
    fn gradients() {
        let dropout = Dropout { probability: 0.4, seed: 9, site: 0, step: 1, row_offset: 2 };
        check::gradients(&[&[6, 5]], 5e-5, |tape, v| tape.dropout(v[0].clone(), dropout));
    }
}
