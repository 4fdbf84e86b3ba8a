//! Launches of `dropout`, and the parameters of whatever drops.

use super::rows::elements_of;
use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{Dropout, DropoutInPlace};

/// Fours of columns of a workgroup.
const GROUP: usize = 256;

/// Gives a launch the parameters of a dropout, for rows from a first one on.
pub(crate) fn parameters<'a>(launch: Launch<'a>, dropout: Dropout, first_row: usize) -> Launch<'a> {
    let [key_low, key_high] = dropout.key();
    launch
        .bits("dropout_row", dropout.row_offset.wrapping_add(first_row as u32))
        .bits("dropout_site", dropout.site)
        .bits("dropout_step", dropout.step)
        .bits("dropout_key_low", key_low)
        .bits("dropout_key_high", key_high)
        .bits("dropout_threshold", u32::from(dropout.threshold()))
        .float("dropout_scale", dropout.scale())
}

/// The same, if there is a dropout that drops anything, and the flag `DROPOUT`.
pub(crate) fn parameters_if<'a>(launch: Launch<'a>, dropout: Option<Dropout>, first_row: usize) -> Launch<'a> {
    match dropout.filter(|dropout| dropout.probability > 0.0) {
        Some(dropout) => parameters(launch.flag("DROPOUT", true), dropout, first_row),
        None => launch,
    }
}

pub(crate) fn forward(engine: &dyn Engine, arguments: DropoutInPlace<'_>) -> Result<()> {
    let DropoutInPlace { dropout, output } = arguments;
    let (rows, width) = (output.shape().rows(), output.shape().width());
    if width == 0 || dropout.probability == 0.0 {
        return Ok(());
    }
    let quads = width.div_ceil(4);
    for part in engine.parts(rows, width) {
        let launch = Launch::new("dropout", "forward")
            .write_part("output", &*output, elements_of(&part, width), "output_base")
            .size("count", part.len())
            .size("width", width)
            .size("quads", quads)
            .row_of_groups((part.len() * quads).div_ceil(GROUP));
        engine.launch(parameters(launch, dropout, part.start))?;
    }
    Ok(())
}
