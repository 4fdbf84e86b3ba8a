//! Launches of `elementwise`.

use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{Add, Clamp, ClampBackward, Column, Copy, Fill, Scale};

/// Elements of a workgroup.
const GROUP: usize = 256;

pub(crate) fn fill(engine: &dyn Engine, arguments: Fill<'_>) -> Result<()> {
    let Fill { output, value } = arguments;
    for part in engine.parts(output.elements(), 1) {
        engine.launch(
            Launch::new("elementwise", "fill")
                .write_part("output", &*output, part.clone(), "output_base")
                .float("value", value)
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}

pub(crate) fn copy(engine: &dyn Engine, arguments: Copy<'_>) -> Result<()> {
    let Copy { input, input_offset, output, output_offset, elements, accumulate } = arguments;
    for part in engine.parts(elements, 1) {
        let (from, to) = (input_offset + part.start, output_offset + part.start);
        engine.launch(
            Launch::new("elementwise", "copy")
                .flag("ACCUMULATE", accumulate)
                .read_part("input", input, from..from + part.len(), "input_base")
                .write_part("output", &*output, to..to + part.len(), "output_base")
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}

pub(crate) fn add(engine: &dyn Engine, arguments: Add<'_>) -> Result<()> {
    let Add { input, output } = arguments;
    let elements = input.elements();
    copy(engine, Copy { input, input_offset: 0, output, output_offset: 0, elements, accumulate: true })
}

pub(crate) fn scale(engine: &dyn Engine, arguments: Scale<'_>) -> Result<()> {
    let Scale { factor, output } = arguments;
    for part in engine.parts(output.elements(), 1) {
        engine.launch(
            Launch::new("elementwise", "scale")
                .read("factor", factor)
                .write_part("output", &*output, part.clone(), "output_base")
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}

pub(crate) fn column(engine: &dyn Engine, arguments: Column<'_>) -> Result<()> {
    let Column { input, first_row, column, output } = arguments;
    let width = input.shape().width();
    for part in engine.parts(output.elements(), width) {
        let from = (first_row + part.start) * width + column;
        engine.launch(
            Launch::new("elementwise", "column")
                .read_part("input", input, from..from + (part.len() - 1) * width + 1, "input_base")
                .write_part("output", &*output, part.clone(), "output_base")
                .size("width", width)
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}

pub(crate) fn clamp(engine: &dyn Engine, arguments: Clamp<'_>) -> Result<()> {
    let Clamp { input, largest, output } = arguments;
    for part in engine.parts(input.elements(), 1) {
        engine.launch(
            Launch::new("elementwise", "clamp_largest")
                .read_part("input", input, part.clone(), "input_base")
                .write_part("output", &*output, part.clone(), "output_base")
                .float("largest", largest)
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}

pub(crate) fn clamp_backward(engine: &dyn Engine, arguments: ClampBackward<'_>) -> Result<()> {
    let ClampBackward { input, largest, gradient } = arguments;
    for part in engine.parts(input.elements(), 1) {
        engine.launch(
            Launch::new("elementwise", "clamp_backward")
                .read_part("input", input, part.clone(), "input_base")
                .write_part("output", &*gradient, part.clone(), "output_base")
                .float("largest", largest)
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}
