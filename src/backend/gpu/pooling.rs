//! Launches of `pooling`.

use super::rows::{COLUMNS, elements_of};
use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{Pooling, PoolingBackward, PoolingForward};

pub(crate) fn forward(engine: &dyn Engine, arguments: PoolingForward<'_>) -> Result<()> {
    let PoolingForward { input, offsets, pooling, output } = arguments;
    let (sequences, width) = (output.shape().rows(), output.shape().width());
    let columns = width.div_ceil(COLUMNS);
    for part in engine.parts(input.shape().rows(), width) {
        engine.launch(
            Launch::new("pooling", "forward")
                .flag("CLS", pooling == Pooling::Cls)
                .flag("ACCUMULATE", part.start > 0)
                .read("offsets", offsets)
                .read_part("input", input, elements_of(&part, width), "input_base")
                .write("output", &*output)
                .size("first_row", part.start)
                .size("count", part.len())
                .size("width", width)
                .size("columns", columns)
                .row_of_groups(sequences * columns),
        )?;
    }
    Ok(())
}

pub(crate) fn backward(engine: &dyn Engine, arguments: PoolingBackward<'_>) -> Result<()> {
    let PoolingBackward { upstream, offsets, pooling, d_input } = arguments;
    let (sequences, width) = (upstream.shape().rows(), upstream.shape().width());
    let columns = width.div_ceil(COLUMNS);
    for part in engine.parts(d_input.shape().rows(), width) {
        engine.launch(
            Launch::new("pooling", "backward")
                .flag("CLS", pooling == Pooling::Cls)
                .read("offsets", offsets)
                .read("upstream", upstream)
                .write_part("d_input", &*d_input, elements_of(&part, width), "d_input_base")
                .size("first_row", part.start)
                .size("count", part.len())
                .size("width", width)
                .size("columns", columns)
                .row_of_groups(sequences * columns),
        )?;
    }
    Ok(())
}
