//! Matrix products on a device, and what they should be.

use nearfar::backend::operations::{Activation, MatMul};
use nearfar::error::DType;
use nearfar::{Device, Result, Tensor};

pub(crate) fn matmul(device: &Device, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut output = device.empty([a.shape().rows(), b.shape().width()], DType::F32)?;
    device.matmul(MatMul {
        a,
        transpose_a: false,
        b,
        transpose_b: false,
        bias: None,
        activation: Activation::Identity,
        output: &mut output,
        accumulate: false,
    })?;
    Ok(output)
}

pub(crate) fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed) as f32 * 0.61).sin()).collect()
}

/// A × B on the processor.
pub(crate) fn expected(a: &[f32], b: &[f32], rows: usize, width: usize) -> Vec<f32> {
    let cpu = Device::cpu();
    let inner = a.len() / rows;
    let (a, b) = (cpu.tensor(a, [rows, inner]).unwrap(), cpu.tensor(b, [inner, width]).unwrap());
    matmul(&cpu, &a, &b).unwrap().to_host().unwrap()
}
