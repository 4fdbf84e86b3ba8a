//! Launches of `l2_norm`.

use super::rows::{ROWS, elements_of};
use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{L2NormBackward, L2NormForward, L2NormGradient};

pub(crate) fn forward(engine: &dyn Engine, arguments: L2NormForward<'_>) -> Result<()> {
    let L2NormForward { input, output, inverse_norm } = arguments;
    let (rows, width) = (input.shape().rows(), input.shape().width());
    for part in engine.parts(rows, width) {
        engine.launch(
            Launch::new("l2_norm", "forward")
                .read_part("input", input, elements_of(&part, width), "input_base")
                .write_part("output", &*output, elements_of(&part, width), "output_base")
                .write_part("inverse_norm", &*inverse_norm, part.clone(), "inverse_norm_base")
                .size("count", part.len())
                .size("width", width)
                .row_of_groups(part.len().div_ceil(ROWS)),
        )?;
    }
    Ok(())
}

pub(crate) fn backward(engine: &dyn Engine, arguments: L2NormBackward<'_>) -> Result<()> {
    let L2NormBackward { upstream, output, inverse_norm, d_input } = arguments;
    let (rows, width) = (upstream.shape().rows(), upstream.shape().width());
    for part in engine.parts(rows, width) {
        engine.launch(
            Launch::new("l2_norm", "backward")
                .read_part("upstream", upstream, elements_of(&part, width), "upstream_base")
                .read_part("output", output, elements_of(&part, width), "output_base")
                .read_part("inverse_norm", inverse_norm, part.clone(), "inverse_norm_base")
                .write_part("d_input", &*d_input, elements_of(&part, width), "d_input_base")
                .size("count", part.len())
                .size("width", width)
                .row_of_groups(part.len().div_ceil(ROWS)),
        )?;
    }
    Ok(())
}

pub(crate) fn gradient(engine: &dyn Engine, arguments: L2NormGradient<'_>) -> Result<()> {
    let L2NormGradient { input, gradient } = arguments;
    let (rows, width) = (input.shape().rows(), input.shape().width());
    for part in engine.parts(rows, width) {
        engine.launch(
            Launch::new("l2_norm", "gradient")
                .read_part("input", input, elements_of(&part, width), "input_base")
                .write_part("output", &*gradient, elements_of(&part, width), "output_base")
                .size("count", part.len())
                .size("width", width)
                .row_of_groups(part.len().div_ceil(ROWS)),
        )?;
    }
    Ok(())
}
