//! Launches of `gelu`. Forward, the function is part of the matrix product.

use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::GeluBackward;

/// Elements of a workgroup.
const GROUP: usize = 256;

pub(crate) fn backward(engine: &dyn Engine, arguments: GeluBackward<'_>) -> Result<()> {
    let GeluBackward { input, gradient } = arguments;
    for part in engine.parts(input.elements(), 1) {
        engine.launch(
            Launch::new("gelu", "backward")
                .read_part("input", input, part.clone(), "input_base")
                .write_part("gradient", &*gradient, part.clone(), "gradient_base")
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}
