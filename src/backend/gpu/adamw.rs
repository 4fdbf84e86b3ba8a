//! Launches of `adamw`.

use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::AdamW;

/// Elements of a workgroup.
const GROUP: usize = 256;

pub(crate) fn step(engine: &dyn Engine, arguments: AdamW<'_>) -> Result<()> {
    let AdamW { parameter, gradient, first_moment, second_moment, clip, .. } = arguments;
    let (beta_1, beta_2) = arguments.betas;
    // In float64: these are small differences.
    let debias = |beta: f32| 1.0 - f64::from(beta).powf(arguments.step as f64);
    let rate = f64::from(arguments.learning_rate);
    for part in engine.parts(parameter.elements(), 1) {
        let mut launch = Launch::new("adamw", "update")
            .write_part("parameter", &*parameter, part.clone(), "parameter_base")
            .read_part("gradient", gradient, part.clone(), "gradient_base")
            .write_part("first_moment", &*first_moment, part.clone(), "first_base")
            .write_part("second_moment", &*second_moment, part.clone(), "second_base")
            .float("keep_first", beta_1)
            .float("add_first", 1.0 - beta_1)
            .float("keep_second", beta_2)
            .float("add_second", 1.0 - beta_2)
            .float("rate", (rate / debias(beta_1)) as f32)
            .float("second_scale", (1.0 / debias(beta_2).sqrt()) as f32)
            .float("epsilon", arguments.epsilon)
            .float("keep", (1.0 - rate * f64::from(arguments.weight_decay)) as f32)
            // Shaders have no infinity.
            .float("largest", arguments.largest.min(f32::MAX))
            .size("count", part.len())
            .row_of_groups(part.len().div_ceil(GROUP));
        if let Some(clip) = clip {
            launch = launch.flag("CLIP", true).read("square_norm", clip.square_norm).float("clip", clip.largest);
        }
        engine.launch(launch)?;
    }
    Ok(())
}
