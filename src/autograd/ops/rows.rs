//! A run of rows of a matrix.

use super::super::{Backward, GradientOf, Gradients, Tape, Variable};
use crate::backend::operations::Copy;
use crate::error::{DType, Shape};
use crate::{Error, Result, Tensor};

#[derive(Debug)]
struct RowsBackward {
    input: GradientOf,
    shape: Shape,
    offset: usize,
}

impl Backward for RowsBackward {
    fn backward(self: Box<Self>, upstream: Tensor, gradients: &mut Gradients<'_>) -> Result<()> {
        let mut output = gradients.take_zeroed(self.input, &self.shape)?;
        gradients.device().copy(Copy {
            input: &upstream,
            input_offset: 0,
            output: &mut output,
            output_offset: self.offset,
            elements: upstream.elements(),
            accumulate: true,
        })?;
        gradients.put(self.input, output);
        Ok(())
    }
}

impl Tape {
    /// Rows `first..first + count` of (R, C).
    ///
    /// # Errors
    /// [`Error::Value`] if the matrix has fewer rows.
    pub fn rows(&mut self, input: &Variable, first: usize, count: usize) -> Result<Variable> {
        let shape = input.value().shape().clone();
        if first.checked_add(count).is_none_or(|end| end > shape.rows()) {
            return Err(Error::value("rows", "input", format!("has shape {shape}, not {count} rows from {first} on")));
        }
        let mut output = self.device().empty([count, shape.width()], DType::F32)?;
        let offset = first * shape.width();
        let (output_offset, elements, accumulate) = (0, count * shape.width(), false);
        let input_offset = offset;
        let arguments =
            Copy { input: input.value(), input_offset, output: &mut output, output_offset, elements, accumulate };
        self.device().copy(arguments)?;
        Ok(self.record(output, &[input], || RowsBackward { input: input.gradient(), shape, offset }))
    }
}

#[cfg(test)]
mod tests {
    use crate::autograd::check;

    #[test]
    fn gradients() {
        check::gradients(&[&[6, 3]], 5e-5, |tape, v| tape.rows(&v[0], 2, 3));
        // Two overlapping runs of one matrix.
        check::gradients(&[&[4, 4]], 5e-5, |tape, v| {
            let (a, b) = (tape.rows(&v[0], 0, 3)?, tape.rows(&v[0], 1, 2)?);
            tape.linear(&a, &b, None)
        });
    }
}
