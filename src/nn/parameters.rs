//! The parameters of a model: named tensors on a device.

use crate::autograd::{ParameterGradients, Tape, Variable};
use crate::backend::philox::{philox, uniform};
use crate::error::Shape;
use crate::{Device, Error, Result, Tensor};

/// What a parameter starts as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Initial {
    /// Independent normal numbers of mean 0 and this standard deviation.
    Normal(f32),
    /// The same number everywhere.
    Constant(f32),
}

/// A named tensor that is learned.
#[derive(Debug)]
pub struct Parameter {
    name: String,
    tensor: Tensor,
    decays: bool,
}

impl Parameter {
    /// The name, unique in its model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub(super) fn tensor_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }

    /// Whether weight decay pulls it towards zero: not so for biases, norms and scales.
    pub fn decays(&self) -> bool {
        self.decays
    }
}

/// The parameters of a model, in a fixed order.
#[derive(Debug)]
pub struct Parameters {
    device: Device,
    list: Vec<Parameter>,
}

/// The part of the random stream that initial values come from; dropout uses the training step in its place.
const INITIAL_VALUES: u32 = u32::MAX;

impl Parameters {
    /// No parameters yet.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), list: Vec::new() }
    }

    /// Adds a parameter and returns its index. Normal numbers come from the generator that all devices share: `stream`
    /// says which part of it, so two parameters of one stream and seed start the same.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn add(
        &mut self,
        name: impl Into<String>,
        shape: impl Into<Shape>,
        initial: Initial,
        (seed, stream): (u64, u32),
    ) -> Result<usize> {
        let (name, shape) = (name.into(), shape.into());
        let elements = shape.elements();
        let values: Vec<f32> = match initial {
            Initial::Constant(value) => vec![value; elements],
            Initial::Normal(deviation) => (0..elements.div_ceil(4))
                .flat_map(|block| {
                    let counter = [block as u32, (block as u64 >> 32) as u32, stream, INITIAL_VALUES];
                    let [a, b, c, d] = philox(counter, [seed as u32, (seed >> 32) as u32]);
                    let [p, q] = box_muller(a, b);
                    let [r, s] = box_muller(c, d);
                    [p, q, r, s]
                })
                .take(elements)
                .map(|value| (value * f64::from(deviation)) as f32)
                .collect(),
        };
        let tensor = self.device.tensor(&values, shape)?;
        let decays = matches!(initial, Initial::Normal(_));
        self.list.push(Parameter { name, tensor, decays });
        Ok(self.list.len() - 1)
    }

    /// The device they live on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many numbers they hold together.
    pub fn elements(&self) -> usize {
        self.list.iter().map(|parameter| parameter.tensor.elements()).sum()
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.list.iter()
    }

    pub(super) fn iter_mut(&mut self) -> std::slice::IterMut<'_, Parameter> {
        self.list.iter_mut()
    }

    /// The parameter of an index, if there is one.
    pub fn get(&self, index: usize) -> Option<&Parameter> {
        self.list.get(index)
    }

    /// Overwrites the parameter of an index.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more or fewer values than it has; [`Error::Value`] if there is no such parameter.
    pub fn write(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let device = self.device.clone();
        match self.list.get_mut(index) {
            Some(parameter) => device.write(&mut parameter.tensor, values),
            None => Err(Error::value("write", "index", format!("is {index}; there is no such parameter"))),
        }
    }

    /// All parameters as variables of a tape, in their order.
    pub fn on(&self, tape: &mut Tape) -> Vec<Variable> {
        self.list.iter().enumerate().map(|(index, parameter)| tape.parameter(&parameter.tensor, index)).collect()
    }

    /// Gradients for all of them, zero.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn gradients(&self) -> Result<ParameterGradients> {
        ParameterGradients::new(&self.device, self.list.iter().map(|parameter| parameter.tensor.shape()))
    }
}

/// Two normal numbers of two random words (Box and Muller, 1958).
fn box_muller(a: u32, b: u32) -> [f64; 2] {
    let radius = (-2.0 * f64::from(uniform(a)).ln()).sqrt();
    let angle = 2.0 * std::f64::consts::PI * f64::from(uniform(b));
    [radius * angle.cos(), radius * angle.sin()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_their_moments_and_streams_differ() {
        let mut parameters = Parameters::new(&Device::cpu());
        for stream in [0, 0, 1] {
            parameters.add("weight", [201, 99], Initial::Normal(0.02), (7, stream)).unwrap();
        }
        let values: Vec<Vec<f32>> = parameters.iter().map(|p| p.tensor().to_host().unwrap()).collect();
        assert_eq!(values[0], values[1]);
        assert_ne!(values[0], values[2]);
        let n = values[0].len() as f64;
        let mean = values[0].iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values[0].iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 5e-4 && (variance.sqrt() / 0.02 - 1.0).abs() < 0.02, "{mean} {variance}");
        assert_eq!(parameters.elements(), 3 * 201 * 99);
    }
}
