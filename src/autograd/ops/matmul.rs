//! Linear layers.

use super::super::{Backward, GradientOf, Gradients, Tape, Variable};
use crate::backend::operations::{Activation, ColumnSum, GeluBackward, MatMul};
use crate::error::DType;
use crate::{Result, Tensor};

#[derive(Debug)]
struct LinearBackward {
    input: Variable,
    weight: Variable,
    bias: Option<(GradientOf, usize)>,
    /// What the activation was applied to, if there was one.
    before_gelu: Option<Tensor>,
}

impl Backward for LinearBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let device = gradients.device().clone();
        let mut upstream = upstream;
        if let Some(input) = &self.before_gelu {
            device.gelu_backward(GeluBackward { input, gradient: &mut upstream })?;
        }
        let product = |a: &Tensor, transpose_a, b: &Tensor, accumulate, output: &mut Tensor| {
            let (transpose_b, bias, activation) = (false, None, Activation::Identity);
            device.matmul(MatMul { a, transpose_a, b, transpose_b, bias, activation, accumulate, output })
        };
        if let Some((bias, width)) = self.bias
            && gradients.wants(bias)
        {
            let (mut output, accumulate) = gradients.take(bias, &[width].into())?;
            device.column_sum(ColumnSum { input: &upstream, output: &mut output, accumulate })?;
            gradients.put(bias, output);
        }
        let weight = self.weight.gradient();
        if gradients.wants(weight) {
            let (mut output, accumulate) = gradients.take(weight, self.weight.value().shape())?;
            product(&upstream, true, self.input.value(), accumulate, &mut output)?;
            gradients.put(weight, output);
        }
        let input = self.input.gradient();
        if gradients.wants(input) {
            let (mut output, accumulate) = gradients.take(input, self.input.value().shape())?;
            product(&upstream, false, self.weight.value(), accumulate, &mut output)?;
            gradients.put(input, output);
        }
        Ok(())
    }
}

impl Tape {
    /// `input · weightᵀ + bias`: input (R, in), weight (out, in), bias (out); the output is (R, out).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit together.
    pub fn linear(&mut self, input: &Variable, weight: &Variable, bias: Option<&Variable>) -> Result<Variable> {
        self.linear_with(input, weight, bias, false)
    }

    /// `gelu(input · weightᵀ + bias)`, with the exact GELU (arXiv 1606.08415, eq. 1); shapes as [`linear`](Self::linear).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit together.
    pub fn linear_gelu(&mut self, input: &Variable, weight: &Variable, bias: Option<&Variable>) -> Result<Variable> {
        self.linear_with(input, weight, bias, true)
    }

    fn linear_with(
        &mut self,
        input: &Variable,
        weight: &Variable,
        bias: Option<&Variable>,
        gelu: bool,
    ) -> Result<Variable> {
        let shape = [input.value().shape().rows(), weight.value().shape().rows()];
        let mut output = self.device().empty(shape, DType::F32)?;
        let inputs: Vec<&Variable> = [input, weight].into_iter().chain(bias).collect();
        let mut before_gelu =
            if gelu && self.records(&inputs) { Some(self.device().empty(shape, DType::F32)?) } else { None };
        self.device().matmul(MatMul {
            a: input.value(),
            transpose_a: false,
            b: weight.value(),
            transpose_b: true,
            bias: bias.map(Variable::value),
            activation: if gelu { Activation::Gelu { input: before_gelu.as_mut() } } else { Activation::Identity },
            accumulate: false,
            output: &mut output,
        })?;
        Ok(self.record(output, &inputs, || LinearBackward {
            input: input.clone(),
            weight: weight.clone(),
            bias: bias.map(|bias| (bias.gradient(), shape[1])),
            before_gelu,
        }))
    }
}

#[cfg(test)]
mod tests {
    use crate::autograd::check;

    #[test]
    fn gradients() {
        let shapes: [&[usize]; 3] = [&[5, 3], &[4, 3], &[4]];
        check::gradients(&shapes, 5e-5, |tape, v| tape.linear(&v[0], &v[1], Some(&v[2])));
        check::gradients(&shapes[..2], 5e-5, |tape, v| tape.linear(&v[0], &v[1], None));
        check::gradients(&shapes, 5e-5, |tape, v| tape.linear_gelu(&v[0], &v[1], Some(&v[2])));
        // The input used twice: its gradient gathers both.
        check::gradients(&[&[4, 4], &[4, 4]], 5e-5, |tape, v| {
            let once = tape.linear(&v[0], &v[1], None)?;
            tape.linear(&once, &v[0], None)
        });
    }
}
