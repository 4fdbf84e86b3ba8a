//! The optimizer.

use super::Parameters;
use crate::autograd::ParameterGradients;
use crate::backend::operations::{AdamW as Arguments, Clip, SquareSum};
use crate::error::DType;
use crate::{Error, Result, Tensor};

/// What AdamW can be told (arXiv 1711.05101); the defaults are those most encoders are trained with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// (β₁, β₂): how slowly the moments forget.
    pub betas: (f32, f32),
    /// ε: added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay, of the parameters that decay.
    pub weight_decay: f32,
    /// The norm of all gradients together is scaled down to this; infinity for no clipping.
    pub max_gradient_norm: f32,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.01, max_gradient_norm: 1.0 }
    }
}

/// The state of the optimizer: two moments of each parameter, on its device.
#[derive(Debug)]
pub struct AdamW {
    settings: AdamWSettings,
    step: u64,
    first_moments: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    square_norm: Tensor,
    /// Upper limits of single parameters.
    largest: Vec<f32>,
}

impl AdamW {
    /// The optimizer of some parameters, before its first step.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(parameters: &Parameters, settings: AdamWSettings) -> Result<Self> {
        let device = parameters.device();
        let zeros = || -> Result<Vec<Tensor>> {
            parameters.iter().map(|parameter| device.zeros(parameter.tensor().shape().clone())).collect()
        };
        Ok(Self {
            settings,
            step: 0,
            first_moments: zeros()?,
            second_moments: zeros()?,
            square_norm: device.empty([1], DType::F32)?,
            largest: vec![f32::INFINITY; parameters.len()],
        })
    }

    /// Keeps the elements of a parameter at or below a limit.
    pub fn limit(&mut self, parameter: usize, largest: f32) {
        if let Some(limit) = self.largest.get_mut(parameter) {
            *limit = largest;
        }
    }

    /// How many steps have been made.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The first and second moment of each parameter.
    pub fn moments(&self) -> impl Iterator<Item = (&Tensor, &Tensor)> {
        self.first_moments.iter().zip(&self.second_moments)
    }

    /// Puts the optimizer into a state it was in before.
    ///
    /// # Errors
    /// [`Error::Shape`] if the moments are not of these parameters.
    pub fn restore(&mut self, step: u64, moments: &[(Vec<f32>, Vec<f32>)]) -> Result<()> {
        if moments.len() != self.first_moments.len() {
            return Err(Error::shape("restore", "moments", [self.first_moments.len()], [moments.len()]));
        }
        let tensors = self.first_moments.iter_mut().zip(&mut self.second_moments);
        for ((first, second), (first_values, second_values)) in tensors.zip(moments) {
            let device = first.device().clone();
            device.write(first, first_values)?;
            device.write(second, second_values)?;
        }
        self.step = step;
        Ok(())
    }

    /// Moves the parameters against their gradients. Nothing is read back from the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn step(
        &mut self,
        parameters: &mut Parameters,
        gradients: &mut ParameterGradients,
        learning_rate: f64,
    ) -> Result<()> {
        let device = parameters.device().clone();
        let gradients = gradients.finish()?;
        let clips = self.settings.max_gradient_norm.is_finite();
        if clips {
            for (index, gradient) in gradients.iter().enumerate() {
                let accumulate = index > 0;
                device.square_sum(SquareSum { input: gradient, output: &mut self.square_norm, accumulate })?;
            }
        }
        self.step += 1;
        let moments = self.first_moments.iter_mut().zip(&mut self.second_moments);
        for ((index, parameter), (gradient, (first_moment, second_moment))) in
            parameters.iter_mut().enumerate().zip(gradients.into_iter().zip(moments))
        {
            let weight_decay = if parameter.decays() { self.settings.weight_decay } else { 0.0 };
            device.adamw(Arguments {
                parameter: parameter.tensor_mut(),
                gradient,
                first_moment,
                second_moment,
                clip: clips
                    .then_some(Clip { square_norm: &self.square_norm, largest: self.settings.max_gradient_norm }),
                learning_rate: learning_rate as f32,
                betas: self.settings.betas,
                epsilon: self.settings.epsilon,
                weight_decay,
                largest: self.largest[index],
                step: self.step,
            })?;
        }
        Ok(())
    }

    /// The norm of all gradients of the last step together, before clipping; none if nothing was clipped.
    ///
    /// # Errors
    /// What the device reports.
    pub fn gradient_norm(&self) -> Result<Option<f32>> {
        if self.step == 0 || !self.settings.max_gradient_norm.is_finite() {
            return Ok(None);
        }
        Ok(Some(self.square_norm.to_scalar()?.sqrt()))
    }
}
