//! Launches of `layer_norm`.

use super::dropout;
use super::rows::{COLUMNS, ROWS, elements_of};
use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{LayerNormBackward, LayerNormForward};
use crate::error::DType;

/// Rows of a part of a sum over rows, and parts at most.
const PART_ROWS: usize = 128;
const PARTS: usize = 1024;

pub(crate) fn forward(engine: &dyn Engine, arguments: LayerNormForward<'_>) -> Result<()> {
    let LayerNormForward { input, residual, dropout, gain, bias, epsilon, output, normalised, rstd } = arguments;
    let (rows, width) = (input.shape().rows(), input.shape().width());
    for part in engine.parts(rows, width) {
        let elements = elements_of(&part, width);
        let mut launch = Launch::new("layer_norm", "forward")
            .read_part("input", input, elements.clone(), "input_base")
            .read("gain", gain)
            .read("bias", bias)
            .write_part("output", &*output, elements.clone(), "output_base")
            .write_if("RSTD", "rstd", rstd.as_deref())
            .float("epsilon", epsilon)
            .size("count", part.len())
            .size("width", width)
            .size("first_row", part.start)
            .row_of_groups(part.len().div_ceil(ROWS));
        if let Some(residual) = residual {
            launch = launch.flag("RESIDUAL", true).read_part("residual", residual, elements.clone(), "residual_base");
        }
        if let Some(normalised) = normalised.as_deref() {
            launch = launch.flag("NORMALISED", true);
            launch = launch.write_part("normalised", normalised, elements.clone(), "normalised_base");
        }
        engine.launch(dropout::parameters_if(launch, dropout, part.start))?;
    }
    Ok(())
}

pub(crate) fn backward(engine: &dyn Engine, arguments: LayerNormBackward<'_>) -> Result<()> {
    let LayerNormBackward { upstream, normalised, rstd, gain, dropout, d_input, d_residual, d_gain, d_bias } =
        arguments;
    let (rows, width) = (upstream.shape().rows(), upstream.shape().width());
    let part_rows = PART_ROWS.max(rows.div_ceil(PARTS));
    // Each binding ends with a part of its own.
    let most_parts: usize = engine.parts(rows, width).map(|part| part.len().div_ceil(part_rows)).sum();
    let partial = engine.scratch(2 * most_parts * width, DType::F32)?;
    let mut parts = 0;
    for part in engine.parts(rows, width) {
        let elements = elements_of(&part, width);
        let mut launch = Launch::new("layer_norm", "backward")
            .read_part("upstream", upstream, elements.clone(), "upstream_base")
            .read_part("normalised", normalised, elements.clone(), "normalised_base")
            .read("rstd", rstd)
            .read("gain", gain)
            .write_part("d_input", &*d_input, elements.clone(), "d_input_base")
            .size("count", part.len())
            .size("width", width)
            .size("first_row", part.start)
            .row_of_groups(part.len().div_ceil(ROWS));
        if let Some(d_residual) = d_residual.as_deref() {
            launch = launch.flag("RESIDUAL", true);
            launch = launch.write_part("d_residual", d_residual, elements.clone(), "d_residual_base");
        }
        engine.launch(dropout::parameters_if(launch, dropout, part.start))?;
        let here = part.len().div_ceil(part_rows);
        engine.launch(
            Launch::new("layer_norm", "column_sums")
                .read_part("upstream", upstream, elements.clone(), "upstream_base")
                .read_part("normalised", normalised, elements, "normalised_base")
                .write("partial", &partial)
                .size("count", part.len())
                .size("width", width)
                .size("part", part_rows)
                .size("first_part", parts)
                .groups([width.div_ceil(COLUMNS), here, 1]),
        )?;
        parts += here;
    }
    engine.launch(
        Launch::new("layer_norm", "finish")
            .read("partial", &partial)
            .write("d_gain", &*d_gain)
            .write("d_bias", &*d_bias)
            .size("count", parts)
            .size("width", width)
            .groups([width.div_ceil(COLUMNS), 1, 1]),
    )
}
