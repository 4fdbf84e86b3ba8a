//! AdamW.

use rayon::prelude::*;

use super::TASK_ELEMENTS;
use super::buffer::{read, write};
use super::simd::vectorised;
use crate::Result;
use crate::backend::operations::AdamW;

/// The constants of a step.
#[derive(Debug, Clone, Copy)]
struct Constants {
    gradient_scale: f32,
    beta_1: f32,
    beta_2: f32,
    /// rate / (1 − β₁ᵗ)
    rate: f32,
    /// 1 / √(1 − β₂ᵗ)
    second_scale: f32,
    epsilon: f32,
    /// 1 − rate · decay
    keep: f32,
    largest: f32,
}

vectorised! {
    fn update(c: Constants, gradient: &[f32], parameter: &mut [f32], first: &mut [f32], second: &mut [f32]) {
        let elements = parameter.iter_mut().zip(gradient).zip(first).zip(second);
        for (((parameter, gradient), first), second) in elements {
            let g = *gradient * c.gradient_scale;
            *first = c.beta_1 * *first + (1.0 - c.beta_1) * g;
            *second = c.beta_2 * *second + (1.0 - c.beta_2) * g * g;
            let moved = *parameter * c.keep - c.rate * *first / (second.sqrt() * c.second_scale + c.epsilon);
            *parameter = if moved > c.largest { c.largest } else { moved };
        }
    }
}

pub(super) fn step(arguments: AdamW<'_>) -> Result<()> {
    const OPERATION: &str = "adamw";
    let gradient_scale = match arguments.clip {
        None => 1.0,
        Some(clip) => {
            let norm = read::<f32>(OPERATION, "square_norm", clip.square_norm)?[0].sqrt();
            if norm > clip.largest { clip.largest / norm } else { 1.0 }
        }
    };
    let (beta_1, beta_2) = arguments.betas;
    let debias = |beta: f32| 1.0 - f64::from(beta).powf(arguments.step as f64);
    let rate = f64::from(arguments.learning_rate);
    let constants = Constants {
        gradient_scale,
        beta_1,
        beta_2,
        rate: (rate / debias(beta_1)) as f32,
        second_scale: (1.0 / debias(beta_2).sqrt()) as f32,
        epsilon: arguments.epsilon,
        keep: (1.0 - rate * f64::from(arguments.weight_decay)) as f32,
        largest: arguments.largest,
    };
    let gradient = read::<f32>(OPERATION, "gradient", arguments.gradient)?;
    let parameter = write::<f32>(OPERATION, "parameter", arguments.parameter)?;
    let first = write::<f32>(OPERATION, "first_moment", arguments.first_moment)?;
    let second = write::<f32>(OPERATION, "second_moment", arguments.second_moment)?;
    parameter
        .par_chunks_mut(TASK_ELEMENTS)
        .zip(gradient.par_chunks(TASK_ELEMENTS))
        .zip(first.par_chunks_mut(TASK_ELEMENTS))
        .zip(second.par_chunks_mut(TASK_ELEMENTS))
        .for_each(|(((parameter, gradient), first), second)| update(constants, gradient, parameter, first, second));
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::backend::Device;
    use crate::backend::operations::{AdamW, Clip};

    /// Three steps against the update rule in float64.
    #[test]
    fn three_steps_of_the_update_rule() {
        let device = Device::cpu();
        let n = 37;
        let start: Vec<f32> = (0..n).map(|i| i as f32 / 10.0 - 1.5).collect();
        let mut parameter = device.tensor(&start, [n]).unwrap();
        let mut first = device.zeros([n]).unwrap();
        let mut second = device.zeros([n]).unwrap();
        let mut expected: Vec<[f64; 3]> = start.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
        for step in 1..=3 {
            let gradient: Vec<f32> = (0..n).map(|i| ((i * 31 + step * 17) % 23) as f32 / 23.0 - 0.4).collect();
            let square_norm: f32 = gradient.iter().map(|g| g * g).sum();
            let clip_to = if step == 2 { 0.5 } else { 1e3 };
            device
                .adamw(AdamW {
                    parameter: &mut parameter,
                    gradient: &device.tensor(&gradient, [n]).unwrap(),
                    first_moment: &mut first,
                    second_moment: &mut second,
                    clip: Some(Clip { square_norm: &device.tensor(&[square_norm], [1]).unwrap(), largest: clip_to }),
                    learning_rate: 0.01,
                    betas: (0.9, 0.999),
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    largest: 2.0,
                    step: step as u64,
                })
                .unwrap();
            let clipped = (f64::from(clip_to) / f64::from(square_norm).sqrt()).min(1.0);
            for ([p, m, v], g) in expected.iter_mut().zip(&gradient) {
                let g = f64::from(*g) * clipped;
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let (m, v) = (*m / (1.0 - 0.9f64.powi(step as i32)), *v / (1.0 - 0.999f64.powi(step as i32)));
                *p = (*p - 0.01 * (m / (v.sqrt() + 1e-8) + 0.1 * *p)).min(2.0);
            }
        }
        for (value, [p, ..]) in parameter.to_host::<f32>().unwrap().into_iter().zip(expected) {
            // β₂ = 0.999 in single precision is off by 1e-8, which 1 − β₂ makes 1e-5 of the step.
            assert!((f64::from(value) - p).abs() < 1e-6, "{value} {p}");
        }
    }
}
