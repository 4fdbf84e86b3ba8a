//! Layer normalisation, with the dropout and residual connection that stand before it in a post-norm block.

use super::super::{Backward, GradientOf, Gradients, Tape, Variable};
use crate::backend::operations::{Dropout, LayerNormBackward as Arguments, LayerNormForward};
use crate::error::DType;
use crate::{Result, Tensor};

#[derive(Debug)]
struct LayerNormBackward {
    input: GradientOf,
    residual: Option<GradientOf>,
    gain: Variable,
    bias: GradientOf,
    normalised: Tensor,
    rstd: Tensor,
    dropout: Option<Dropout>,
}

impl Backward for LayerNormBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let device = gradients.device().clone();
        let shape = self.gain.value().shape();
        let mut d_gain = gradients.take_zeroed(self.gain.gradient(), shape)?;
        let mut d_bias = gradients.take_zeroed(self.bias, shape)?;
        let mut d_input = device.empty(upstream.shape().clone(), DType::F32)?;
        let mut d_residual = match self.residual {
            Some(_) => Some(device.empty(upstream.shape().clone(), DType::F32)?),
            None => None,
        };
        device.layer_norm_backward(Arguments {
            upstream: &upstream,
            normalised: &self.normalised,
            rstd: &self.rstd,
            gain: self.gain.value(),
            dropout: self.dropout,
            d_input: &mut d_input,
            d_residual: d_residual.as_mut(),
            d_gain: &mut d_gain,
            d_bias: &mut d_bias,
        })?;
        gradients.put(self.gain.gradient(), d_gain);
        gradients.put(self.bias, d_bias);
        if let (Some(residual), Some(d_residual)) = (self.residual, d_residual) {
            gradients.add(residual, d_residual)?;
        }
        gradients.add(self.input, d_input)
    }
}

impl Tape {
    /// `layer_norm(residual + dropout(input))` over each row (arXiv 1607.06450): input and residual (R, C), gain and
    /// bias (C).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit together.
    pub fn layer_norm(
        &mut self,
        input: &Variable,
        residual: Option<&Variable>,
        dropout: Option<Dropout>,
        (gain, bias): (&Variable, &Variable),
        epsilon: f32,
    ) -> Result<Variable> {
        let shape = input.value().shape();
        let device = self.device().clone();
        let mut output = device.empty(shape.clone(), DType::F32)?;
        let inputs: Vec<&Variable> = [input, gain, bias].into_iter().chain(residual).collect();
        let mut saved = if self.records(&inputs) {
            Some((device.empty(shape.clone(), DType::F32)?, device.empty([shape.rows()], DType::F32)?))
        } else {
            None
        };
        let (normalised, rstd) = match &mut saved {
            Some((normalised, rstd)) => (Some(normalised), Some(rstd)),
            None => (None, None),
        };
        device.layer_norm_forward(LayerNormForward {
            input: input.value(),
            residual: residual.map(Variable::value),
            dropout,
            gain: gain.value(),
            bias: bias.value(),
            epsilon,
            output: &mut output,
            normalised,
            rstd,
        })?;
        let Some((normalised, rstd)) = saved else { return Ok(self.constant(output)) };
        Ok(self.record(output, &inputs, || LayerNormBackward {
            input: input.gradient(),
            residual: residual.map(Variable::gradient),
            gain: gain.clone(),
            bias: bias.gradient(),
            normalised,
            rstd,
            dropout,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::check;

    #[test]
    fn gradients() {
        let shapes: [&[usize]; 4] = [&[3, 21], &[21], &[21], &[3, 21]];
        check::gradients(&shapes[..3], 1e-4, |tape, v| tape.layer_norm(&v[0], None, None, (&v[1], &v[2]), 1e-5));
        let dropout = Dropout { probability: 0.25, seed: 3, site: 1, step: 2, row_offset: 5 };
        check::gradients(&shapes, 1e-4, |tape, v| {
            tape.layer_norm(&v[0], Some(&v[3]), Some(dropout), (&v[1], &v[2]), 1e-5)
        });
    }
}
