//! Products of two matrices in all orientations, with bias and activation while the product is still in the cache.

use rayon::prelude::*;

use super::buffer::{read, write};
use super::gemm::{MatMut, MatRef, multiply};
use super::{gelu, simd};
use crate::Result;
use crate::backend::operations::{Activation, MatMul};

/// Rows of the output, or terms of a long sum, that one task works on at most: enough to make up for packing the other
/// matrix once a task, few enough to stay near the cache.
const TASK: usize = 1024;

/// Cuts a length into pieces of at most [`TASK`], of equal size and eight of them or a multiple, so that any usual
/// number of threads has the same to do. Depends on the length alone, so that sums are made the same way everywhere.
fn task_size(length: usize) -> usize {
    let tasks = 8 * length.div_ceil(8 * TASK);
    length.div_ceil(tasks.max(1)).next_multiple_of(16)
}

/// Outputs with at most so many elements are summed in parts.
const SMALL_OUTPUT: usize = 1 << 20;

pub(super) fn forward(arguments: MatMul<'_>) -> Result<()> {
    const OPERATION: &str = "matmul";
    let (m, n, k) = arguments.extents();
    let MatMul { a, transpose_a, b, transpose_b, bias, activation, accumulate, output } = arguments;
    let view = |data, rows: usize, columns: usize, transpose: bool| {
        if transpose {
            MatRef::new(data, columns, rows, rows).transposed()
        } else {
            MatRef::new(data, rows, columns, columns)
        }
    };
    let (a, b) = (read::<f32>(OPERATION, "a", a)?, read::<f32>(OPERATION, "b", b)?);
    let bias = bias.map(|bias| read::<f32>(OPERATION, "bias", bias)).transpose()?;
    let output = write::<f32>(OPERATION, "output", output)?;
    if m == 0 || n == 0 {
        return Ok(());
    }

    if transpose_a && k > TASK && m * n <= SMALL_OUTPUT {
        let task_terms = task_size(k);
        let parts: Vec<Vec<f32>> = (0..k.div_ceil(task_terms))
            .into_par_iter()
            .map(|part| {
                let terms = part * task_terms..k.min((part + 1) * task_terms);
                let a = view(&a[terms.start * m..terms.end * m], m, terms.len(), true);
                let b = if transpose_b {
                    MatRef::new(&b[terms.start..], n, terms.len(), k).transposed()
                } else {
                    view(&b[terms.start * n..terms.end * n], terms.len(), n, false)
                };
                let mut product = vec![0.0; m * n];
                multiply(MatMut::new(&mut product, m, n, n), a, b, 1.0, false);
                product
            })
            .collect();
        let task = (m * n).div_ceil(16).max(1024);
        output.par_chunks_mut(task).enumerate().for_each(|(i, output)| {
            if !accumulate {
                output.fill(0.0);
            }
            for part in &parts {
                simd::add(&part[i * task..i * task + output.len()], output);
            }
        });
        return finish(output, n, bias, activation);
    }

    // A transposed matrix would be brought into order by every task; where it is small beside the other it is done once.
    let ordered;
    let b = if transpose_b && m >= 4 * k.max(n) {
        ordered = transposed(b, n, k);
        MatRef::new(&ordered, k, n, n)
    } else {
        view(b, k, n, transpose_b)
    };
    let task_rows = task_size(m);
    let product = |task: usize, output: &mut [f32]| {
        let (first, rows) = (task * task_rows, output.len() / n);
        let a = if transpose_a {
            MatRef::new(&a[first..], k, rows, m).transposed()
        } else {
            MatRef::new(&a[first * k..(first + rows) * k], rows, k, k)
        };
        multiply(MatMut::new(output, rows, n, n), a, b, 1.0, accumulate);
    };
    let add_bias = |output: &mut [f32]| {
        if let Some(bias) = bias {
            output.chunks_exact_mut(n).for_each(|row| simd::add(bias, row));
        }
    };
    let tasks = output.par_chunks_mut(task_rows * n).enumerate();
    match activation {
        Activation::Identity => tasks.for_each(|(task, output)| {
            product(task, output);
            add_bias(output);
        }),
        Activation::Gelu { input: None } => tasks.for_each(|(task, output)| {
            product(task, output);
            add_bias(output);
            gelu::apply(output);
        }),
        Activation::Gelu { input: Some(input) } => {
            let input = write::<f32>(OPERATION, "activation input", input)?;
            tasks.zip(input.par_chunks_mut(task_rows * n)).for_each(|((task, output), input)| {
                product(task, input);
                for (input, output) in input.chunks_exact_mut(n).zip(output.chunks_exact_mut(n)) {
                    if let Some(bias) = bias {
                        simd::add(bias, input);
                    }
                    output.copy_from_slice(input);
                    gelu::apply(output);
                }
            });
        }
    }
    Ok(())
}

/// A matrix of rows and columns, in columns and rows; by squares that fit in the cache.
fn transposed(input: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const SQUARE: usize = 16;
    let mut output = vec![0.0; rows * columns];
    for first_row in (0..rows).step_by(SQUARE) {
        for first_column in (0..columns).step_by(SQUARE) {
            for row in first_row..rows.min(first_row + SQUARE) {
                for column in first_column..columns.min(first_column + SQUARE) {
                    output[column * rows + row] = input[row * columns + column];
                }
            }
        }
    }
    output
}

/// Bias and activation of a product that was summed in parts.
fn finish(output: &mut [f32], n: usize, bias: Option<&[f32]>, activation: Activation<'_>) -> Result<()> {
    if let Some(bias) = bias {
        output.par_chunks_mut(n).for_each(|row| simd::add(bias, row));
    }
    if let Activation::Gelu { input } = activation {
        if let Some(input) = input {
            write::<f32>("matmul", "activation input", input)?.copy_from_slice(output);
        }
        output.par_chunks_mut(n).for_each(gelu::apply);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Device;
    use crate::error::DType;

    #[test]
    fn every_orientation_and_epilogue() {
        let device = Device::cpu();
        let normal = |x: f64| {
            // x·Φ(x) by the series of the error function; beyond 8 Φ is 0 or 1 to single precision.
            if x.abs() > 8.0 {
                return x.max(0.0);
            }
            let (mut term, mut sum) = (x, x);
            for k in 1..300 {
                term *= x * x / f64::from(2 * k + 1);
                sum += term;
            }
            x * (0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt())
        };
        for (m, n, k) in [(1, 1, 1), (5, 3, 7), (1100, 2, 3), (3, 4, 2500), (2, 1, 0)] {
            let value = |i: usize, seed: usize| ((i * 7919 + seed) % 101) as f32 / 101.0 - 0.5;
            let a: Vec<f32> = (0..m * k).map(|i| value(i, 3)).collect();
            let b: Vec<f32> = (0..k * n).map(|i| value(i, 50)).collect();
            let bias: Vec<f32> = (0..n).map(|i| value(i, 9)).collect();
            let exact: Vec<f64> = (0..m * n)
                .map(|i| (0..k).map(|l| f64::from(a[i / n * k + l]) * f64::from(b[l * n + i % n])).sum())
                .collect();
            let flip = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
            };
            let bias_tensor = device.tensor(&bias, [n]).unwrap();
            for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
                let a = if transpose_a {
                    device.tensor(&flip(&a, m, k), [k, m]).unwrap()
                } else {
                    device.tensor(&a, [m, k]).unwrap()
                };
                let b = if transpose_b {
                    device.tensor(&flip(&b, k, n), [n, k]).unwrap()
                } else {
                    device.tensor(&b, [k, n]).unwrap()
                };
                macro_rules! run {
                    ($bias:expr, $activation:expr, $accumulate:expr, $output:expr) => {
                        device.matmul(MatMul {
                            a: &a,
                            transpose_a,
                            b: &b,
                            transpose_b,
                            bias: $bias,
                            activation: $activation,
                            accumulate: $accumulate,
                            output: $output,
                        })
                    };
                }
                // Rounding of a dot product of k terms of at most 1/4.
                let bound = (k as f64 + 4.0) * 0.25 * f64::from(f32::EPSILON);
                let check = |output: &crate::backend::Tensor, expected: &dyn Fn(usize) -> f64| {
                    for (i, value) in output.to_host::<f32>().unwrap().into_iter().enumerate() {
                        assert!(
                            (f64::from(value) - expected(i)).abs() <= bound,
                            "{m}×{n}×{k} {i}: {value} {}",
                            expected(i)
                        );
                    }
                };
                let mut output = device.tensor(&vec![1.0f32; m * n], [m, n]).unwrap();
                run!(None, Activation::Identity, true, &mut output).unwrap();
                check(&output, &|i| 1.0 + exact[i]);
                run!(Some(&bias_tensor), Activation::Identity, false, &mut output).unwrap();
                check(&output, &|i| exact[i] + f64::from(bias[i % n]));
                let mut input = device.empty([m, n], DType::F32).unwrap();
                run!(Some(&bias_tensor), Activation::Gelu { input: Some(&mut input) }, false, &mut output).unwrap();
                check(&input, &|i| exact[i] + f64::from(bias[i % n]));
                check(&output, &|i| normal(exact[i] + f64::from(bias[i % n])));
                run!(None, Activation::Gelu { input: None }, false, &mut output).unwrap();
                check(&output, &|i| normal(exact[i]));
                assert!(run!(Some(&bias_tensor), Activation::Identity, true, &mut output).is_err());
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let device = Device::cpu();
        let a = device.zeros([2, 3]).unwrap();
        let b = device.zeros([4, 5]).unwrap();
        let mut output = device.zeros([2, 5]).unwrap();
        let error = device
            .matmul(MatMul {
                a: &a,
                transpose_a: false,
                b: &b,
                transpose_b: false,
                bias: None,
                activation: Activation::Identity,
                accumulate: false,
                output: &mut output,
            })
            .unwrap_err();
        assert_eq!(error.to_string(), "matmul: `b` has shape (4, 5), expected (3, 5)");
    }
}
