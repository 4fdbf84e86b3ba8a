//! Launches of `prefix_norms`.

use super::rows::{ROWS, elements_of};
use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{PrefixNorm, PrefixNormsBackward, PrefixNormsForward};

pub(crate) fn forward(engine: &dyn Engine, arguments: PrefixNormsForward<'_>) -> Result<()> {
    let PrefixNormsForward { input, widths, norm, output } = arguments;
    let (rows, width) = (input.shape().rows(), input.shape().width());
    for part in engine.parts(rows, width) {
        for (w, &prefix) in widths.iter().enumerate() {
            let to = w * rows + part.start..w * rows + part.end;
            engine.launch(
                Launch::new("prefix_norms", "forward")
                    .flag("HALF_SQUARE", norm == PrefixNorm::HalfSquare)
                    .read_part("input", input, elements_of(&part, width), "input_base")
                    .write_part("output", &*output, to, "output_base")
                    .size("count", part.len())
                    .size("width", width)
                    .size("prefix", prefix)
                    .row_of_groups(part.len().div_ceil(ROWS)),
            )?;
        }
    }
    Ok(())
}

pub(crate) fn backward(engine: &dyn Engine, arguments: PrefixNormsBackward<'_>) -> Result<()> {
    let PrefixNormsBackward { input, widths, along, inverse_norms, d_input } = arguments;
    let (rows, width) = (input.shape().rows(), input.shape().width());
    for part in engine.parts(rows, width) {
        let mut first_column = 0;
        for (w, &end_column) in widths.iter().enumerate() {
            engine.launch(
                Launch::new("prefix_norms", "backward")
                    .read_part("input", input, elements_of(&part, width), "input_base")
                    .read("along", along)
                    .read_if("NORMS", "inverse_norms", inverse_norms)
                    .write_part("d_input", &*d_input, elements_of(&part, width), "d_input_base")
                    .size("count", part.len())
                    .size("width", width)
                    .size("first_row", part.start)
                    .size("rows", rows)
                    .size("first_prefix", w)
                    .size("prefixes", widths.len())
                    .size("first_column", first_column)
                    .size("end_column", end_column)
                    .row_of_groups(part.len().div_ceil(ROWS)),
            )?;
            first_column = end_column;
        }
    }
    Ok(())
}
