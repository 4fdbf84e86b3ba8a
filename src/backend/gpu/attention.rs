//! Launches of `attention`.

use std::ops::Range;

use super::rows::elements_of;
use super::{Engine, Launch};
use super::{dropout, positives};
use crate::backend::operations::{AttentionBackward, AttentionForward, AttentionShape};
use crate::error::DType;
use crate::{Error, Result};

/// Rows of a workgroup.
const BLOCK: usize = 32;
/// The widths of heads that there are shaders for; narrower ones are filled up.
const HEADS: [usize; 4] = [32, 64, 128, 256];

/// Rows of a launch.
struct Window {
    /// Those at which its sequences begin.
    owned: Range<usize>,
    /// Those that are bound: its sequences may end later.
    bound: Range<usize>,
}

/// Cuts rows into windows of which the widest tensor fits one binding.
fn windows(engine: &dyn Engine, rows: usize, width: usize, longest: usize) -> Result<Vec<Window>> {
    let fit = engine.parts(rows, width).next().map_or(0, |part| part.len());
    if fit == rows {
        return Ok(vec![Window { owned: 0..rows, bound: 0..rows }]);
    }
    if fit <= longest {
        return Err(engine.unbindable((4 * (longest + 1) * width) as u64));
    }
    let step = fit - longest;
    let window = |first: usize| Window { owned: first..rows.min(first + step), bound: first..rows.min(first + fit) };
    Ok((0..rows).step_by(step).map(window).collect())
}

/// What forward and backward launches have in common.
fn launch<'a>(
    entry: &'static str,
    shape: &AttentionShape<'a>,
    width: usize,
    padded_width: usize,
    window: &Window,
) -> Launch<'a> {
    let (sequences, blocks) = (shape.offsets.elements() - 1, shape.longest.div_ceil(BLOCK));
    let head_width = width / shape.heads;
    let launch = Launch::new("attention", entry)
        .constant("HEAD", padded_width as u32)
        .flag("VECTORS", head_width.is_multiple_of(4))
        .read("offsets", shape.offsets)
        .float("scale", 1.0 / (head_width as f32).sqrt())
        .size("blocks", blocks)
        .size("heads", shape.heads)
        .size("head_width", head_width)
        .size("width", width)
        .size("first_row", window.bound.start)
        .size("owned_rows", window.owned.len())
        .size("count", window.bound.len())
        .row_of_groups(blocks * shape.heads * sequences);
    dropout::parameters_if(launch, shape.dropout, window.bound.start)
}

/// The width of a head in shaders.
fn padded_width(operation: &'static str, width: usize, heads: usize) -> Result<usize> {
    let head_width = width / heads;
    HEADS.into_iter().find(|&padded| head_width <= padded).ok_or_else(|| {
        Error::value(operation, "heads", format!("makes heads {head_width} wide; this device has them up to 256"))
    })
}

pub(crate) fn forward(engine: &dyn Engine, arguments: AttentionForward<'_>) -> Result<()> {
    let AttentionForward { query_key_value, shape, output, log_sum_exp } = arguments;
    let (rows, width) = (output.shape().rows(), output.shape().width());
    let padded_width = padded_width("attention_forward", width, shape.heads)?;
    for window in windows(engine, rows, 3 * width, shape.longest)? {
        engine.launch(
            launch("forward", &shape, width, padded_width, &window)
                .read_part("projections", query_key_value, elements_of(&window.bound, 3 * width), "projections_base")
                .write_part("output", &*output, elements_of(&window.bound, width), "output_base")
                .write_if("LOG_SUM_EXP", "log_sum_exp", log_sum_exp.as_deref()),
        )?;
    }
    Ok(())
}

pub(crate) fn backward(engine: &dyn Engine, arguments: AttentionBackward<'_>) -> Result<()> {
    let AttentionBackward { upstream, query_key_value, output, log_sum_exp, shape, d_query_key_value } = arguments;
    let (rows, width) = (upstream.shape().rows(), upstream.shape().width());
    let padded_width = padded_width("attention_backward", width, shape.heads)?;
    let along = engine.scratch(rows * shape.heads, DType::F32)?;
    positives::row_products(engine, output, upstream, None, (rows * shape.heads, width / shape.heads), &along)?;
    for window in windows(engine, rows, 3 * width, shape.longest)? {
        for entry in ["query_gradient", "key_gradient", "value_gradient"] {
            let projections = elements_of(&window.bound, 3 * width);
            let mut launch = launch(entry, &shape, width, padded_width, &window)
                .read_part("projections", query_key_value, projections.clone(), "projections_base")
                .read_part("upstream", upstream, elements_of(&window.bound, width), "upstream_base")
                .read("log_sum_exp", log_sum_exp)
                .write_part("output", &*d_query_key_value, projections, "output_base");
            if entry != "value_gradient" {
                launch = launch.read("along", &along);
            }
            engine.launch(launch)?;
        }
    }
    Ok(())
}
