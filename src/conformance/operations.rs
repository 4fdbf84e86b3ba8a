//! The operations of encoders on a device against float64, element by element.
//!
//! A case holds its inputs, what they come to in float64 and the size of each element: the sum of the magnitudes that
//! were added and subtracted for it. The bound of an element is the error of a sum of so many terms, times the number
//! of such sums in a row on the way to it, of its size.

use super::inputs::{Random, wide};
use super::{Case, Expected, Kind, Ran, TINY, bits, host, sum_error};
use crate::backend::PackedBatch;
use crate::backend::operations as ops;
use crate::backend::operations::{Activation, AttentionShape, Clip, Dropout, Pooling, PrefixNorm};
use crate::error::{DType, Shape};
use crate::{Device, Result, Tensor};

type Run = dyn Fn(&Device, &[Tensor], &mut [Tensor]) -> Result<()> + Send + Sync;
type Definition = dyn Fn(&[Vec<f64>]) -> Vec<Defined> + Send + Sync;

/// An operation, its inputs and what it must give.
pub(super) struct OperationCase {
    inputs: Vec<Input>,
    /// Of each output its name, shape and what is in it before.
    outputs: Vec<(&'static str, Shape, Option<Vec<f32>>)>,
    run: Box<Run>,
    definition: Box<Definition>,
    /// Whether it is a matrix product.
    product: bool,
}

/// What is uploaded.
enum Input {
    F32(Vec<f32>, Shape),
    U32(Vec<u32>),
}

/// An output in float64.
struct Defined {
    values: Vec<f64>,
    bounds: Vec<f64>,
    /// What is added for an element, as magnitudes, times the number of such sums in a row.
    sizes: Vec<f64>,
}

impl Defined {
    /// Sums of n terms, given as (value, sum of magnitudes), `times` of them in a row.
    fn sums(n: usize, times: f64, elements: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let (values, sizes): (Vec<f64>, Vec<f64>) = elements.into_iter().unzip();
        let bounds = sizes.iter().map(|size| times * sum_error(n) * size + TINY).collect();
        Self { values, bounds, sizes: sizes.iter().map(|size| times * size).collect() }
    }

    /// Values that are copied or chosen: no rounding.
    fn exact(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        Self { bounds: vec![0.0; values.len()], sizes: vec![0.0; values.len()], values }
    }

    /// Values after a few roundings of their own size.
    fn rounded(values: impl IntoIterator<Item = f64>) -> Self {
        Self::sums(1, 2.0, values.into_iter().map(|value| (value, value.abs())))
    }
}

impl OperationCase {
    pub(super) fn expected(&self, rounding: f64) -> Vec<Expected> {
        let of_products = if self.product { 2.0 * rounding } else { 0.0 };
        let inputs: Vec<Vec<f64>> = self
            .inputs
            .iter()
            .map(|input| match input {
                Input::F32(values, _) => wide(values),
                Input::U32(values) => values.iter().copied().map(f64::from).collect(),
            })
            .collect();
        let outputs = self.outputs.iter().zip((self.definition)(&inputs));
        let expected = |((name, ..), Defined { values, bounds, sizes }): (&(&'static str, _, _), Defined)| {
            let bounds = bounds.iter().zip(&sizes).map(|(bound, size)| bound + of_products * size).collect();
            Expected::new(name, values, bounds)
        };
        outputs.map(expected).collect()
    }

    pub(super) fn inputs(&self) -> Vec<Vec<u32>> {
        let bits = |input: &Input| match input {
            Input::F32(values, _) => values.iter().map(|value| value.to_bits()).collect(),
            Input::U32(values) => values.clone(),
        };
        self.inputs.iter().map(bits).collect()
    }

    pub(super) fn on_device(&self, device: &Device) -> Result<Ran> {
        let upload = |input: &Input| match input {
            Input::F32(values, shape) => device.tensor(values, shape.clone()),
            Input::U32(values) => device.tensor(values, [values.len()]),
        };
        let inputs: Vec<Tensor> = self.inputs.iter().map(upload).collect::<Result<_>>()?;
        let output = |(_, shape, before): &(_, Shape, Option<Vec<f32>>)| match before {
            Some(before) => device.tensor(before, shape.clone()),
            None => device.empty(shape.clone(), DType::F32),
        };
        let mut outputs: Vec<Tensor> = self.outputs.iter().map(output).collect::<Result<_>>()?;
        (self.run)(device, &inputs, &mut outputs)?;
        Ok(Ran {
            inputs: bits(&inputs.iter().collect::<Vec<_>>())?,
            outputs: host(&outputs.iter().collect::<Vec<_>>())?,
        })
    }
}

/// `Φ(x)` and its derivative φ: near 0 by `Φ(x) = 1/2 + φ(x)·Σ x^(2k+1) / (1·3·…·(2k+1))`, beyond by the continued
/// fraction `Φ(−x) = φ(x) / (x + 1/(x + 2/(x + …)))`.
fn normal(x: f64) -> (f64, f64) {
    let bell = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    if x.abs() > 3.0 {
        let tail = bell / (1..200).rev().fold(x.abs(), |fraction, k| x.abs() + f64::from(k) / fraction);
        return (if x > 0.0 { 1.0 - tail } else { tail }, bell);
    }
    let (mut term, mut sum) = (x, x);
    for k in 1..60 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    (0.5 + bell * sum, bell)
}

const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 1 << 40 | 5, site: 2, step: 9, row_offset: 17 };

fn factor(dropout: Option<Dropout>, row: usize, column: usize) -> f64 {
    dropout.map_or(1.0, |dropout| f64::from(dropout.factor(row as u32, column as u32)))
}

struct Table(Vec<Case>);

impl Table {
    fn add(
        &mut self,
        name: impl Into<String>,
        inputs: Vec<Input>,
        outputs: Vec<(&'static str, Shape, Option<Vec<f32>>)>,
        run: impl Fn(&Device, &[Tensor], &mut [Tensor]) -> Result<()> + Send + Sync + 'static,
        definition: impl Fn(&[Vec<f64>]) -> Vec<Defined> + Send + Sync + 'static,
    ) {
        let name = format!("{}/random/f32", name.into());
        let (run, definition, product) = (Box::new(run), Box::new(definition), name.starts_with("matmul"));
        let kind = Kind::Operation(OperationCase { inputs, outputs, run, definition, product });
        self.0.push(Case { name, slow: false, kind });
    }
}

/// A random matrix.
fn matrix(rows: usize, width: usize, seed: u64) -> Input {
    Input::F32(Random::new(seed).values(rows * width), [rows, width].into())
}

fn vector(length: usize, seed: u64) -> Input {
    Input::F32(Random::new(seed).values(length), [length].into())
}

fn output(name: &'static str, shape: impl Into<Shape>) -> (&'static str, Shape, Option<Vec<f32>>) {
    (name, shape.into(), None)
}

/// An output that is added to.
fn added_to(name: &'static str, shape: impl Into<Shape>, seed: u64) -> (&'static str, Shape, Option<Vec<f32>>) {
    let shape = shape.into();
    let before = Random::new(seed).values(shape.elements());
    (name, shape, Some(before))
}

fn before(seed: u64, elements: usize) -> Vec<f64> {
    wide(&Random::new(seed).values(elements))
}

pub(super) fn cases() -> Vec<Case> {
    let mut table = Table(Vec::new());
    elementwise(&mut table);
    reductions(&mut table);
    products(&mut table);
    layer_norm(&mut table);
    embedding_and_pooling(&mut table);
    attention(&mut table);
    norms(&mut table);
    adamw(&mut table);
    table.0
}

fn elementwise(table: &mut Table) {
    for n in [1, 33, 257, 40_001] {
        let name = |operation: &str| format!("{operation}/{n}");
        table.add(
            name("fill"),
            vec![],
            vec![output("output", [n])],
            |device, _, out| device.fill(ops::Fill { output: &mut out[0], value: -1.25 }),
            move |_| vec![Defined::exact(vec![-1.25; n])],
        );
        table.add(
            name("add"),
            vec![vector(n, 1)],
            vec![added_to("output", [n], 2)],
            |device, x, out| device.add(ops::Add { input: &x[0], output: &mut out[0] }),
            move |x| vec![Defined::rounded(x[0].iter().zip(before(2, n)).map(|(a, b)| a + b))],
        );
        table.add(
            name("scale"),
            vec![vector(1, 3)],
            vec![added_to("output", [n], 2)],
            |device, x, out| device.scale(ops::Scale { factor: &x[0], output: &mut out[0] }),
            move |x| vec![Defined::rounded(before(2, n).iter().map(|v| x[0][0] * v))],
        );
        table.add(
            name("clamp"),
            vec![vector(n, 1)],
            vec![output("output", [n])],
            |device, x, out| device.clamp(ops::Clamp { input: &x[0], largest: 0.25, output: &mut out[0] }),
            |x| vec![Defined::exact(x[0].iter().map(|v| v.min(0.25)))],
        );
        table.add(
            name("clamp_backward"),
            vec![vector(n, 1)],
            vec![added_to("gradient", [n], 2)],
            |device, x, out| {
                device.clamp_backward(ops::ClampBackward { input: &x[0], largest: 0.25, gradient: &mut out[0] })
            },
            move |x| vec![Defined::exact(x[0].iter().zip(before(2, n)).map(|(v, g)| if *v > 0.25 { 0.0 } else { g }))],
        );
        let scaled: Vec<f32> = Random::new(4).values(n).iter().map(|v| 5.0 * v).collect();
        let input = Input::F32(scaled, [n].into());
        table.add(
            name("gelu_backward"),
            vec![input],
            vec![added_to("gradient", [n], 2)],
            |device, x, out| device.gelu_backward(ops::GeluBackward { input: &x[0], gradient: &mut out[0] }),
            move |x| {
                let of = |(x, g): (&f64, f64)| {
                    let (phi, bell) = normal(*x);
                    (g * (phi + x * bell), g.abs() * (phi + x.abs() * bell * (1.0 + x * x)))
                };
                vec![Defined::sums(4, 4.0, x[0].iter().zip(before(2, n)).map(of))]
            },
        );
    }
    for accumulate in [false, true] {
        let name = format!("copy{}/300", if accumulate { "+accumulate" } else { "" });
        table.add(
            name,
            vec![vector(300, 1)],
            vec![added_to("output", [257], 2)],
            move |device, x, out| {
                let output = &mut out[0];
                device.copy(ops::Copy {
                    input: &x[0],
                    input_offset: 33,
                    output,
                    output_offset: 7,
                    elements: 201,
                    accumulate,
                })
            },
            move |x| {
                let mut expected = before(2, 257);
                for (to, from) in expected[7..208].iter_mut().zip(&x[0][33..234]) {
                    *to = from + if accumulate { *to } else { 0.0 };
                }
                vec![if accumulate { Defined::rounded(expected) } else { Defined::exact(expected) }]
            },
        );
    }
    for (rows, width) in [(1, 1), (33, 17), (300, 130)] {
        table.add(
            format!("dropout/{rows}x{width}"),
            vec![],
            vec![added_to("output", [rows, width], 2)],
            |device, _, out| device.dropout(ops::DropoutInPlace { dropout: DROPOUT, output: &mut out[0] }),
            move |_| {
                let of = |(i, v): (usize, f64)| v * factor(Some(DROPOUT), i / width, i % width);
                vec![Defined::rounded(before(2, rows * width).into_iter().enumerate().map(of))]
            },
        );
        table.add(
            format!("column/{rows}x{width}"),
            vec![matrix(rows, width, 1)],
            vec![output("output", [rows / 2 + 1])],
            move |device, x, out| {
                device.column(ops::Column {
                    input: &x[0],
                    first_row: rows - rows / 2 - 1,
                    column: width / 2,
                    output: &mut out[0],
                })
            },
            move |x| {
                let row = |row: usize| x[0][row * width + width / 2];
                vec![Defined::exact((rows - rows / 2 - 1..rows).map(row))]
            },
        );
    }
}

fn reductions(table: &mut Table) {
    for accumulate in [false, true] {
        let with = if accumulate { "+accumulate" } else { "" };
        let start = move |elements: usize| if accumulate { before(2, elements) } else { vec![0.0; elements] };
        for n in [1, 33, 40_001] {
            table.add(
                format!("sum{with}/{n}"),
                vec![vector(n, 1)],
                vec![added_to("output", [1], 2)],
                move |device, x, out| {
                    device.sum(ops::Sum { input: &x[0], factor: -0.5, output: &mut out[0], accumulate })
                },
                move |x| {
                    let size: f64 = x[0].iter().map(|v| v.abs()).sum();
                    let of = |start: &f64| (start - 0.5 * x[0].iter().sum::<f64>(), start.abs() + 0.5 * size);
                    vec![Defined::sums(n, 1.0, start(1).iter().map(of))]
                },
            );
            table.add(
                format!("square_sum{with}/{n}"),
                vec![vector(n, 1)],
                vec![added_to("output", [1], 2)],
                move |device, x, out| {
                    device.square_sum(ops::SquareSum { input: &x[0], output: &mut out[0], accumulate })
                },
                move |x| {
                    let sum: f64 = x[0].iter().map(|v| v * v).sum();
                    vec![Defined::sums(n, 1.0, start(1).iter().map(|start| (start + sum, start.abs() + sum)))]
                },
            );
        }
        for (rows, width) in [(1, 1), (33, 17), (3001, 3)] {
            table.add(
                format!("column_sum{with}/{rows}x{width}"),
                vec![matrix(rows, width, 1)],
                vec![added_to("output", [width], 2)],
                move |device, x, out| {
                    device.column_sum(ops::ColumnSum { input: &x[0], output: &mut out[0], accumulate })
                },
                move |x| {
                    let column = |c: usize| x[0].iter().skip(c).step_by(width);
                    let of = |(c, start): (usize, f64)| {
                        (start + column(c).sum::<f64>(), start.abs() + column(c).map(|v| v.abs()).sum::<f64>())
                    };
                    vec![Defined::sums(rows, 1.0, start(width).into_iter().enumerate().map(of))]
                },
            );
        }
    }
}

/// Which way round the matrices of a product are stored, and what follows it.
#[derive(Clone, Copy)]
struct Product {
    transpose: [bool; 2],
    extents: [usize; 3],
    bias: bool,
    gelu: bool,
    accumulate: bool,
}

impl Product {
    fn name(self) -> String {
        let [m, n, k] = self.extents;
        let flag = |flag: bool, name: &'static str| if flag { name } else { "" };
        let [a, b] = self.transpose;
        let flags = [
            flag(a, "+ta"),
            flag(b, "+tb"),
            flag(self.bias, "+bias"),
            flag(self.gelu, "+gelu"),
            flag(self.accumulate, "+accumulate"),
        ];
        format!("matmul{}/{m}x{n}x{k}", flags.concat())
    }
}

fn products(table: &mut Table) {
    for transpose in [[false, false], [false, true], [true, false], [true, true]] {
        for extents in [[1, 1, 1], [7, 3, 17], [33, 65, 130], [257, 33, 300], [3, 5, 2_500]] {
            for (bias, gelu, accumulate) in [
                (false, false, false),
                (true, false, false),
                (true, true, false),
                (false, true, false),
                (false, false, true),
            ] {
                product(table, Product { transpose, extents, bias, gelu, accumulate });
            }
        }
    }
}

fn product(table: &mut Table, product: Product) {
    let Product { transpose: [ta, tb], extents: [m, n, k], bias, gelu, accumulate } = product;
    let stored = |transposed: bool, rows, columns, seed| {
        if transposed { matrix(columns, rows, seed) } else { matrix(rows, columns, seed) }
    };
    let inputs = vec![stored(ta, m, k, 1), stored(tb, k, n, 2), vector(n, 3)];
    let outputs = vec![added_to("output", [m, n], 4), added_to("activation input", [m, n], 5)];
    table.add(
        product.name(),
        inputs,
        outputs,
        move |device, x, out| {
            let (output, input) = out.split_at_mut(1);
            let activation = if gelu { Activation::Gelu { input: Some(&mut input[0]) } } else { Activation::Identity };
            device.matmul(ops::MatMul {
                a: &x[0],
                transpose_a: ta,
                b: &x[1],
                transpose_b: tb,
                bias: bias.then_some(&x[2]),
                activation,
                accumulate,
                output: &mut output[0],
            })
        },
        move |x| {
            let a = |i: usize, l: usize| if ta { x[0][l * m + i] } else { x[0][i * k + l] };
            let b = |l: usize, j: usize| if tb { x[1][j * k + l] } else { x[1][l * n + j] };
            let start = before(4, m * n);
            let of = |at: usize| {
                let (i, j) = (at / n, at % n);
                let mut sum = (if bias { x[2][j] } else { 0.0 }) + if accumulate { start[at] } else { 0.0 };
                let mut size = sum.abs();
                for l in 0..k {
                    sum += a(i, l) * b(l, j);
                    size += (a(i, l) * b(l, j)).abs();
                }
                (sum, size)
            };
            let linear: Vec<(f64, f64)> = (0..m * n).map(of).collect();
            if !gelu {
                return vec![Defined::sums(k + 1, 1.0, linear), Defined::exact(before(5, m * n))];
            }
            let activated = linear.iter().map(|&(x, size)| {
                let (phi, bell) = normal(x);
                // The slope of the activation, at most 1.13, and its own roundings.
                (x * phi, size * (phi + x.abs() * bell).abs() + 4.0 * (x * phi).abs())
            });
            vec![Defined::sums(k + 1, 1.5, activated), Defined::sums(k + 1, 1.0, linear.clone())]
        },
    );
}

fn layer_norm(table: &mut Table) {
    for (rows, width) in [(1, 3), (33, 17), (300, 130)] {
        for (residual, dropout) in [(false, None), (true, None), (true, Some(DROPOUT))] {
            let flags = format!(
                "{}{}",
                if residual { "+residual" } else { "" },
                if dropout.is_some() { "+dropout" } else { "" }
            );
            let size = [rows, width];
            // x, residual, gain, bias
            let inputs = || vec![matrix(rows, width, 1), matrix(rows, width, 2), vector(width, 3), vector(width, 4)];
            let normalise = move |x: &[Vec<f64>]| -> (Vec<f64>, Vec<f64>, Vec<f64>) {
                let (mut normalised, mut sizes, mut rstds) = (Vec::new(), Vec::new(), Vec::new());
                for row in 0..rows {
                    let at = |c: usize| row * width + c;
                    let values: Vec<f64> = (0..width)
                        .map(|c| x[0][at(c)] * factor(dropout, row, c) + if residual { x[1][at(c)] } else { 0.0 })
                        .collect();
                    let mean = values.iter().sum::<f64>() / width as f64;
                    let largest = values.iter().fold(0.0, |largest: f64, v| largest.max(v.abs()));
                    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / width as f64;
                    let rstd = 1.0 / (variance + 1e-5).sqrt();
                    normalised.extend(values.iter().map(|v| (v - mean) * rstd));
                    // What is subtracted, and the deviation, which moves with it.
                    sizes.extend(values.iter().map(|v| 2.0 * largest * rstd * (1.0 + (v - mean).abs() * rstd)));
                    rstds.push((rstd, 2.0 * largest * rstd * rstd));
                }
                (normalised, sizes, rstds.iter().flat_map(|&(rstd, size)| [rstd, size]).collect())
            };
            let outputs = vec![output("output", size), output("normalised", size), output("rstd", [rows])];
            table.add(
                format!("layer_norm_forward{flags}/{rows}x{width}"),
                inputs(),
                outputs,
                move |device, x, out| {
                    let [output, normalised, rstd] = out else { return Ok(()) };
                    device.layer_norm_forward(ops::LayerNormForward {
                        input: &x[0],
                        residual: residual.then_some(&x[1]),
                        dropout,
                        gain: &x[2],
                        bias: &x[3],
                        epsilon: 1e-5,
                        output,
                        normalised: Some(normalised),
                        rstd: Some(rstd),
                    })
                },
                move |x| {
                    let (normalised, sizes, rstds) = normalise(x);
                    let elements = || normalised.iter().zip(&sizes).enumerate();
                    let affine = elements().map(|(i, (y, size))| {
                        let (gain, bias) = (x[2][i % width], x[3][i % width]);
                        (y * gain + bias, (size + y.abs()) * gain.abs() + bias.abs())
                    });
                    vec![
                        Defined::sums(width, 2.0, affine),
                        Defined::sums(width, 2.0, elements().map(|(_, (y, size))| (*y, size + y.abs()))),
                        Defined::sums(width, 2.0, rstds.chunks(2).map(|pair| (pair[0], pair[0] + pair[1]))),
                    ]
                },
            );
            // upstream, normalised, rstd, gain
            let rstd = Input::F32(Random::new(7).values(rows).iter().map(|v| 1.5 + v).collect(), [rows].into());
            let inputs = vec![matrix(rows, width, 5), matrix(rows, width, 6), rstd, vector(width, 3)];
            let outputs = vec![
                output("d_input", size),
                output("d_residual", size),
                added_to("d_gain", [width], 8),
                added_to("d_bias", [width], 9),
            ];
            table.add(
                format!("layer_norm_backward{flags}/{rows}x{width}"),
                inputs,
                outputs,
                move |device, x, out| {
                    let [d_input, d_residual, d_gain, d_bias] = out else { return Ok(()) };
                    device.layer_norm_backward(ops::LayerNormBackward {
                        upstream: &x[0],
                        normalised: &x[1],
                        rstd: &x[2],
                        gain: &x[3],
                        dropout,
                        d_input,
                        d_residual: Some(d_residual),
                        d_gain,
                        d_bias,
                    })
                },
                move |x| {
                    let (mut d_residual, mut sizes) = (Vec::new(), Vec::new());
                    for row in 0..rows {
                        let part = |c: usize| x[0][row * width + c] * x[3][c];
                        let along = |c: usize| part(c) * x[1][row * width + c];
                        let mean_of = |value: &dyn Fn(usize) -> f64| (0..width).map(value).sum::<f64>() / width as f64;
                        let (mean, mean_along) = (mean_of(&part), mean_of(&along));
                        let (size, size_along) = (mean_of(&|c| part(c).abs()), mean_of(&|c| along(c).abs()));
                        for c in 0..width {
                            let (y, rstd) = (x[1][row * width + c], x[2][row]);
                            d_residual.push(rstd * (part(c) - mean - y * mean_along));
                            sizes.push(rstd * (part(c).abs() + size + y.abs() * size_along));
                        }
                    }
                    let of = |value: f64, size: f64| (value, size);
                    let dropped = d_residual.iter().zip(&sizes).enumerate().map(|(i, (d, size))| {
                        let factor = factor(dropout, i / width, i % width);
                        of(d * factor, size * factor)
                    });
                    let columns = |start: Vec<f64>, value: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
                        let at = |c: usize| (0..rows).map(move |row| row * width + c);
                        let sum = |c: usize| at(c).map(value).sum::<f64>() + start[c];
                        let size = |c: usize| at(c).map(|i| value(i).abs()).sum::<f64>() + start[c].abs();
                        (0..width).map(|c| (sum(c), size(c))).collect()
                    };
                    vec![
                        Defined::sums(width, 2.0, dropped),
                        Defined::sums(width, 2.0, d_residual.iter().zip(&sizes).map(|(d, size)| of(*d, *size))),
                        Defined::sums(rows, 1.0, columns(before(8, width), &|i| x[0][i] * x[1][i])),
                        Defined::sums(rows, 1.0, columns(before(9, width), &|i| x[0][i])),
                    ]
                },
            );
        }
    }
}

/// Token sequences of different length.
fn sequences() -> Vec<Vec<u32>> {
    let lengths = [1usize, 5, 33, 2, 70, 1];
    let token = |s: usize, t: usize| ((s * 31 + t * t * 7) % 23) as u32;
    lengths.iter().enumerate().map(|(s, &length)| (0..length).map(|t| token(s, t)).collect()).collect()
}

fn offsets() -> Vec<u32> {
    let mut offsets = vec![0];
    for sequence in sequences() {
        offsets.push(offsets.last().copied().unwrap_or(0) + sequence.len() as u32);
    }
    offsets
}

fn embedding_and_pooling(table: &mut Table) {
    let (rows, longest, vocabulary) = (sequences().concat().len(), 70, 23);
    let count = sequences().len();
    for width in [1, 17, 130] {
        let positions: Vec<u32> = sequences().iter().flat_map(|sequence| 0..sequence.len() as u32).collect();
        let tokens = sequences().concat();
        let inputs = vec![
            Input::U32(tokens.clone()),
            Input::U32(positions.clone()),
            matrix(vocabulary, width, 1),
            matrix(longest, width, 2),
            matrix(2, width, 3),
        ];
        table.add(
            format!("embedding_forward/{rows}x{width}"),
            inputs,
            vec![output("output", [rows, width])],
            |device, x, out| {
                let (word, position, token_type) = (&x[2], &x[3], &x[4]);
                device.embedding_forward(ops::EmbeddingForward {
                    tokens: &x[0],
                    positions: &x[1],
                    word,
                    position,
                    token_type,
                    output: &mut out[0],
                })
            },
            move |x| {
                let of = |i: usize| {
                    let (row, c) = (i / width, i % width);
                    let terms = [x[2][x[0][row] as usize * width + c], x[3][x[1][row] as usize * width + c], x[4][c]];
                    (terms.iter().sum(), terms.iter().map(|v| v.abs()).sum())
                };
                vec![Defined::sums(3, 1.0, (0..rows * width).map(of))]
            },
        );
        let inputs = vec![matrix(rows, width, 1)];
        let outputs = vec![
            added_to("d_word", [vocabulary, width], 2),
            added_to("d_position", [longest + 1, width], 3),
            added_to("d_token_type", [2, width], 4),
        ];
        table.add(
            format!("embedding_backward/{rows}x{width}"),
            inputs,
            outputs,
            |device, x, out| {
                let sequences = sequences();
                let packed = PackedBatch::new(device, &sequences.iter().map(Vec::as_slice).collect::<Vec<_>>(), 0)?;
                let [d_word, d_position, d_token_type] = out else { return Ok(()) };
                device.embedding_backward(ops::EmbeddingBackward {
                    upstream: &x[0],
                    tokens: packed.tokens(),
                    order: packed.order(),
                    offsets: packed.offsets(),
                    d_word,
                    d_position,
                    d_token_type,
                })
            },
            move |x| {
                let gather = |seed: u64, table_rows: usize, to: &dyn Fn(usize) -> usize| {
                    let mut sums: Vec<(f64, f64)> =
                        before(seed, table_rows * width).iter().map(|v| (*v, v.abs())).collect();
                    for (i, g) in x[0].iter().enumerate() {
                        let (sum, size) = &mut sums[to(i / width) * width + i % width];
                        *sum += g;
                        *size += g.abs();
                    }
                    Defined::sums(rows, 1.0, sums)
                };
                vec![
                    gather(2, vocabulary, &|row| tokens[row] as usize),
                    gather(3, longest + 1, &|row| positions[row] as usize),
                    gather(4, 2, &|_| 0),
                ]
            },
        );
        for pooling in [Pooling::Mean, Pooling::Cls] {
            let range = |s: usize| offsets()[s] as usize..offsets()[s + 1] as usize;
            let inputs = vec![matrix(rows, width, 1), Input::U32(offsets())];
            table.add(
                format!("pooling_forward+{pooling}/{rows}x{width}"),
                inputs,
                vec![output("output", [count, width])],
                move |device, x, out| {
                    device.pooling_forward(ops::PoolingForward {
                        input: &x[0],
                        offsets: &x[1],
                        pooling,
                        output: &mut out[0],
                    })
                },
                move |x| {
                    let of = |i: usize| {
                        let (sequence, c) = (range(i / width), i % width);
                        let mean = |value: &dyn Fn(f64) -> f64| {
                            sequence.clone().map(|row| value(x[0][row * width + c])).sum::<f64>()
                                / sequence.len() as f64
                        };
                        let first = x[0][sequence.start * width + c];
                        if pooling == Pooling::Mean { (mean(&|v| v), mean(&f64::abs)) } else { (first, 0.0) }
                    };
                    vec![Defined::sums(longest, 1.0, (0..count * width).map(of))]
                },
            );
            let inputs = vec![matrix(count, width, 1), Input::U32(offsets())];
            table.add(
                format!("pooling_backward+{pooling}/{rows}x{width}"),
                inputs,
                vec![output("d_input", [rows, width])],
                move |device, x, out| {
                    device.pooling_backward(ops::PoolingBackward {
                        upstream: &x[0],
                        offsets: &x[1],
                        pooling,
                        d_input: &mut out[0],
                    })
                },
                move |x| {
                    let mut expected = Vec::new();
                    for s in 0..count {
                        for row in range(s) {
                            let factor = match pooling {
                                Pooling::Mean => 1.0 / range(s).len() as f64,
                                Pooling::Cls => f64::from(row == range(s).start),
                            };
                            expected.extend(x[0][s * width..(s + 1) * width].iter().map(|g| factor * g));
                        }
                    }
                    vec![Defined::rounded(expected)]
                },
            );
        }
    }
}

fn attention(table: &mut Table) {
    let rows = sequences().concat().len();
    for (heads, head_width) in [(1, 1), (2, 3), (3, 17)] {
        for dropout in [None, Some(DROPOUT)] {
            let width = heads * head_width;
            let with = if dropout.is_some() { "+dropout" } else { "" };
            // Values and sizes of the output, the log-sum-exps and the gradient.
            let define = move |x: &[Vec<f64>]| -> Vec<Defined> {
                let at = move |row: usize, part: usize, head: usize, c: usize| {
                    row * 3 * width + part * width + head * head_width + c
                };
                let scale = 1.0 / (head_width as f64).sqrt();
                let mut outputs = vec![(0.0, 0.0); rows * width];
                let mut sums = vec![(0.0, 0.0); rows * heads];
                let mut gradient = vec![(0.0, 0.0); rows * 3 * width];
                let mut add = |to: usize, value: f64, size: f64| {
                    gradient[to].0 += value;
                    gradient[to].1 += size;
                };
                for pair in offsets().windows(2) {
                    let keys = pair[0] as usize..pair[1] as usize;
                    for (head, i) in (0..heads).flat_map(|head| keys.clone().map(move |i| (head, i))) {
                        let key = |j: usize, part: usize, c: usize| x[0][at(j, part, head, c)];
                        let up = |c: usize| x[2][i * width + head * head_width + c];
                        let sum = |value: &dyn Fn(usize) -> f64| (0..head_width).map(value).sum::<f64>();
                        let scores: Vec<f64> =
                            keys.clone().map(|j| scale * sum(&|c| key(i, 0, c) * key(j, 1, c))).collect();
                        let largest_sum = keys
                            .clone()
                            .map(|j| scale * sum(&|c| (key(i, 0, c) * key(j, 1, c)).abs()))
                            .fold(0.0, f64::max);
                        // How far a weight may move: with its score and with the log-sum-exp.
                        let moved = 1.0 + 2.0 * (largest_sum + 1.0 + (keys.len() as f64).ln());
                        let total = scores.iter().map(|s| s.exp()).sum::<f64>();
                        sums[i * heads + head] = (total.ln(), moved);
                        let weights: Vec<f64> = scores.iter().map(|s| s.exp() / total).collect();
                        let factors: Vec<f64> = (0..keys.len()).map(|k| factor(dropout, i, (head << 16) + k)).collect();
                        let d_weight = |k: usize, j: usize| factors[k] * sum(&|c| up(c) * key(j, 2, c));
                        let d_size = |k: usize, j: usize| factors[k] * sum(&|c| (up(c) * key(j, 2, c)).abs());
                        let pairs = || keys.clone().enumerate();
                        let along: f64 = pairs().map(|(k, j)| weights[k] * d_weight(k, j)).sum();
                        let along_size: f64 = pairs().map(|(k, j)| weights[k] * d_size(k, j)).sum();
                        for (k, j) in pairs() {
                            let kept = weights[k] * factors[k];
                            let d_score = scale * weights[k] * (d_weight(k, j) - along);
                            let d_score_size = scale * weights[k] * (d_size(k, j) + along_size) * moved;
                            for c in 0..head_width {
                                let to = &mut outputs[i * width + head * head_width + c];
                                to.0 += kept * key(j, 2, c);
                                to.1 += kept * key(j, 2, c).abs() * moved;
                                add(at(j, 2, head, c), kept * up(c), kept * up(c).abs() * moved);
                                add(at(i, 0, head, c), d_score * key(j, 1, c), d_score_size * key(j, 1, c).abs());
                                add(at(j, 1, head, c), d_score * key(i, 0, c), d_score_size * key(i, 0, c).abs());
                            }
                        }
                    }
                }
                vec![Defined::sums(70, 1.0, outputs), Defined::sums(70, 1.0, sums), Defined::sums(70, 2.0, gradient)]
            };
            let inputs = vec![matrix(rows, 3 * width, 1), Input::U32(offsets()), matrix(rows, width, 2)];
            let outputs = vec![
                output("output", [rows, width]),
                output("log_sum_exp", [rows, heads]),
                output("d_query_key_value", [rows, 3 * width]),
            ];
            table.add(
                format!("attention_forward_backward{with}/{rows}x{heads}x{head_width}"),
                inputs,
                outputs,
                move |device, x, out| {
                    let [output, log_sum_exp, d_query_key_value] = out else { return Ok(()) };
                    let shape = AttentionShape { offsets: &x[1], longest: 70, heads, dropout };
                    device.attention_forward(ops::AttentionForward {
                        query_key_value: &x[0],
                        shape,
                        output,
                        log_sum_exp: Some(log_sum_exp),
                    })?;
                    device.attention_backward(ops::AttentionBackward {
                        upstream: &x[2],
                        query_key_value: &x[0],
                        output,
                        log_sum_exp,
                        shape,
                        d_query_key_value,
                    })
                },
                define,
            );
        }
    }
}

fn norms(table: &mut Table) {
    let square = |row: &[f64]| row.iter().map(|v| v * v).sum::<f64>();
    for (rows, width) in [(1, 1), (33, 17), (300, 130)] {
        let name = |operation: &str| format!("{operation}/{rows}x{width}");
        let outputs = vec![output("output", [rows, width]), output("inverse_norm", [rows])];
        table.add(
            name("l2_norm_forward"),
            vec![matrix(rows, width, 1)],
            outputs,
            |device, x, out| {
                let [output, inverse_norm] = out else { return Ok(()) };
                device.l2_norm_forward(ops::L2NormForward { input: &x[0], output, inverse_norm })
            },
            move |x| {
                let inverse: Vec<f64> = x[0].chunks(width).map(|row| 1.0 / square(row).sqrt()).collect();
                let unit = x[0].iter().enumerate().map(|(i, v)| v * inverse[i / width]);
                let of = |value: f64| (value, value.abs());
                vec![
                    Defined::sums(width, 1.0, unit.map(of)),
                    Defined::sums(width, 1.0, inverse.iter().copied().map(of)),
                ]
            },
        );
        // upstream, output, inverse norm
        let inputs = vec![matrix(rows, width, 1), matrix(rows, width, 2), vector(rows, 3)];
        table.add(
            name("l2_norm_backward"),
            inputs,
            vec![output("d_input", [rows, width])],
            |device, x, out| {
                let (upstream, output, inverse_norm) = (&x[0], &x[1], &x[2]);
                device.l2_norm_backward(ops::L2NormBackward { upstream, output, inverse_norm, d_input: &mut out[0] })
            },
            move |x| {
                let of = |i: usize| {
                    let row = i / width * width..(i / width + 1) * width;
                    let products = || x[0][row.clone()].iter().zip(&x[1][row.clone()]).map(|(a, b)| a * b);
                    let (along, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                    let inverse = x[2][i / width];
                    ((x[0][i] - x[1][i] * along) * inverse, (x[0][i].abs() + x[1][i].abs() * size) * inverse.abs())
                };
                vec![Defined::sums(width, 2.0, (0..rows * width).map(of))]
            },
        );
        // part
        table.add(
            format!("merge_statistics/{rows}"),
            vec![matrix(rows, ops::STATISTICS, 1)],
            vec![added_to("statistics", [rows, ops::STATISTICS], 2)],
            |device, x, out| device.merge_statistics(ops::MergeStatistics { part: &x[0], statistics: &mut out[0] }),
            move |x| {
                let before = before(2, rows * ops::STATISTICS);
                let pairs = x[0].chunks(ops::STATISTICS).zip(before.chunks(ops::STATISTICS));
                let merged = pairs.flat_map(|(a, b)| {
                    let reference = a[0].max(b[0]);
                    let (of_a, of_b) = ((a[0] - reference).exp(), (b[0] - reference).exp());
                    let sum = |i: usize, of_a: f64, of_b: f64| {
                        (a[i] * of_a + b[i] * of_b, (a[i] * of_a).abs() + (b[i] * of_b).abs())
                    };
                    [(reference, 0.0), sum(1, of_a, of_b), sum(2, of_a, of_b), sum(3, 1.0, 1.0), sum(4, 1.0, 1.0)]
                });
                // The exponentials' arguments are rounded too.
                vec![Defined::sums(2, 4.0, merged)]
            },
        );
        // input
        table.add(
            name("l2_norm_gradient"),
            vec![matrix(rows, width, 1)],
            vec![added_to("gradient", [rows, width], 2)],
            |device, x, out| device.l2_norm_gradient(ops::L2NormGradient { input: &x[0], gradient: &mut out[0] }),
            move |x| {
                let gradient = before(2, rows * width);
                let of = |i: usize| {
                    let row = i / width * width..(i / width + 1) * width;
                    let inverse = 1.0 / x[0][row.clone()].iter().map(|x| x * x).sum::<f64>().sqrt();
                    let products = || x[0][row.clone()].iter().zip(&gradient[row.clone()]).map(|(a, b)| a * b);
                    let (along, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                    let unit = x[0][i] * inverse * inverse;
                    ((gradient[i] - unit * along) * inverse, (gradient[i].abs() + unit.abs() * size) * inverse)
                };
                vec![Defined::sums(width, 2.0, (0..rows * width).map(of))]
            },
        );
        // queries, documents
        let inputs = vec![matrix(rows, width, 1), matrix(rows, width, 2)];
        table.add(
            name("positives_forward"),
            inputs,
            vec![output("similarity", [rows])],
            |device, x, out| {
                device.positives_forward(ops::PositivesForward {
                    queries: &x[0],
                    documents: &x[1],
                    norms: None,
                    similarity: &mut out[0],
                })
            },
            move |x| {
                let of = |(a, b): (&[f64], &[f64])| {
                    let products = || a.iter().zip(b).map(|(a, b)| a * b);
                    (products().sum::<f64>(), products().map(f64::abs).sum::<f64>())
                };
                vec![Defined::sums(width, 1.0, x[0].chunks(width).zip(x[1].chunks(width)).map(of))]
            },
        );
        // queries, documents, log scale, similarity, gradient
        let inputs =
            vec![matrix(rows, width, 1), matrix(rows, width, 2), vector(1, 3), vector(rows, 4), vector(rows, 5)];
        let outputs = vec![
            added_to("d_queries", [rows, width], 6),
            added_to("d_documents", [rows, width], 7),
            added_to("d_log_scale", [rows], 8),
        ];
        table.add(
            name("positives_backward"),
            inputs,
            outputs,
            |device, x, out| {
                let [d_queries, d_documents, d_log_scale] = out else { return Ok(()) };
                let (queries, documents, log_scale, similarity, gradient) = (&x[0], &x[1], &x[2], &x[3], &x[4]);
                device.positives_backward(ops::PositivesBackward {
                    queries,
                    documents,
                    norms: None,
                    log_scale,
                    similarity,
                    gradient,
                    d_queries,
                    d_documents,
                    d_log_scale,
                })
            },
            move |x| {
                let scale = x[2][0].exp();
                let add = |start: f64, term: f64| (start + term, start.abs() + term.abs());
                let side = |seed: u64, other: usize| {
                    let elements = before(seed, rows * width).into_iter().enumerate();
                    Defined::sums(
                        2,
                        3.0,
                        elements
                            .map(|(i, start)| add(start, scale * x[4][i / width] * x[other][i]))
                            .collect::<Vec<_>>(),
                    )
                };
                let of_scale =
                    before(8, rows).into_iter().enumerate().map(|(i, start)| add(start, scale * x[4][i] * x[3][i]));
                vec![side(6, 1), side(7, 0), Defined::sums(2, 3.0, of_scale)]
            },
        );
    }
    for (rows, width, widths) in [(1, 3, vec![1]), (33, 17, vec![2, 5, 17]), (257, 130, vec![64, 129])] {
        let count = widths.len();
        for norm in [PrefixNorm::Inverse, PrefixNorm::HalfSquare] {
            let inverse = norm == PrefixNorm::Inverse;
            let with = if inverse { "+inverse" } else { "+half-square" };
            let (of_run, of_definition) = (widths.clone(), widths.clone());
            let outputs = vec![output("output", [count, rows])];
            table.add(
                format!("prefix_norms_forward{with}/{rows}x{width}"),
                vec![matrix(rows, width, 1)],
                outputs,
                move |device, x, out| {
                    device.prefix_norms_forward(ops::PrefixNormsForward {
                        input: &x[0],
                        widths: &of_run,
                        norm,
                        output: &mut out[0],
                    })
                },
                move |x| {
                    let of = |(w, row): (usize, usize)| {
                        let square = square(&x[0][row * width..row * width + of_definition[w]]);
                        let value = if inverse { 1.0 / square.sqrt() } else { square / 2.0 };
                        (value, value)
                    };
                    let places = (0..count).flat_map(|w| (0..rows).map(move |row| (w, row)));
                    vec![Defined::sums(width, 1.0, places.map(of))]
                },
            );
            // input, along, inverse norms
            let inputs = vec![matrix(rows, width, 1), matrix(count, rows, 2), matrix(count, rows, 3)];
            let (of_run, of_definition) = (widths.clone(), widths.clone());
            let outputs = vec![added_to("d_input", [rows, width], 4)];
            table.add(
                format!("prefix_norms_backward{with}/{rows}x{width}"),
                inputs,
                outputs,
                move |device, x, out| {
                    device.prefix_norms_backward(ops::PrefixNormsBackward {
                        input: &x[0],
                        widths: &of_run,
                        along: &x[1],
                        inverse_norms: inverse.then_some(&x[2]),
                        d_input: &mut out[0],
                    })
                },
                move |x| {
                    let of = |(i, start): (usize, f64)| {
                        let (row, c) = (i / width, i % width);
                        let norm = |w: usize| if inverse { x[2][w * rows + row] } else { 1.0 };
                        let terms = || {
                            (0..count)
                                .filter(|&w| c < of_definition[w])
                                .map(|w| x[1][w * rows + row] * norm(w) * norm(w))
                        };
                        let (sum, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        (start - x[0][i] * sum, start.abs() + x[0][i].abs() * size)
                    };
                    vec![Defined::sums(count + 1, 3.0, before(4, rows * width).into_iter().enumerate().map(of))]
                },
            );
        }
    }
}

fn adamw(table: &mut Table) {
    for n in [1, 33, 40_001] {
        for (step, clip, largest) in [(1u64, false, f32::INFINITY), (3, true, f32::INFINITY), (1000, true, 0.5)] {
            let name = format!("adamw+step-{step}{}/{n}", if clip { "+clip" } else { "" });
            // gradient, square norm
            let inputs = vec![vector(n, 1), Input::F32(vec![3.5], [1].into())];
            let squares: Vec<f32> = Random::new(4).values(n).iter().map(|v| v * v).collect();
            let second_moment = ("second_moment", [n].into(), Some(squares.clone()));
            let outputs = vec![added_to("parameter", [n], 2), added_to("first_moment", [n], 3), second_moment];
            table.add(
                name,
                inputs,
                outputs,
                move |device, x, out| {
                    let [parameter, first_moment, second_moment] = out else { return Ok(()) };
                    device.adamw(ops::AdamW {
                        parameter,
                        gradient: &x[0],
                        first_moment,
                        second_moment,
                        clip: clip.then_some(Clip { square_norm: &x[1], largest: 1.25 }),
                        learning_rate: 0.01,
                        betas: (0.9, 0.999),
                        epsilon: 1e-8,
                        weight_decay: 0.1,
                        largest,
                        step,
                    })
                },
                move |x| {
                    let clipped = if clip { 1.25 / x[1][0].sqrt() } else { 1.0 };
                    // The settings are single-precision numbers.
                    let [beta_1, beta_2] = [0.9f32, 0.999].map(f64::from);
                    let (rate, decay, epsilon) = (f64::from(0.01f32), f64::from(0.1f32), f64::from(1e-8f32));
                    let debias = |beta: f64| 1.0 - beta.powf(step as f64);
                    let (mut parameters, mut firsts, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
                    let start = before(2, n).into_iter().zip(before(3, n)).zip(wide(&squares));
                    for (g, ((p, m), v)) in x[0].iter().map(|g| g * clipped).zip(start) {
                        let parts = [beta_1 * m, (1.0 - beta_1) * g];
                        let (m, size) = (parts[0] + parts[1], parts[0].abs() + parts[1].abs());
                        let v = beta_2 * v + (1.0 - beta_2) * g * g;
                        let denominator = (v / debias(beta_2)).sqrt() + epsilon;
                        let moved = |m: f64| rate * m / debias(beta_1) / denominator;
                        let value = p - moved(m) - rate * decay * p;
                        parameters.push((value.min(f64::from(largest)), p.abs() + moved(size)));
                        firsts.push((m, size));
                        seconds.push((v, v));
                    }
                    vec![
                        Defined::sums(2, 4.0, parameters),
                        Defined::sums(2, 2.0, firsts),
                        Defined::sums(2, 3.0, seconds),
                    ]
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::OPERATIONS;

    #[test]
    fn the_normal_distribution_is_known() {
        for (x, phi) in
            [(0.0, 0.5), (1.0, 0.841_344_746_068_543), (-2.0, 0.022_750_131_948_179), (5.0, 0.999_999_713_348_428)]
        {
            assert!((normal(x).0 - phi).abs() < 1e-14, "{x}: {}", normal(x).0);
        }
    }

    /// What is not here is part of every loss.
    #[test]
    fn every_operation_is_in_the_table() {
        let of_losses = [
            "similarity_sweep_forward",
            "similarity_sweep_backward",
            "similarity_sweep_one_way",
            "cast",
            "partition",
            "row_sweep",
            "aggregate",
            "pair_scores",
        ];
        let cases = cases();
        for operation in OPERATIONS {
            let both =
                format!("{}_forward_backward", operation.trim_end_matches("_forward").trim_end_matches("_backward"));
            let here = |case: &Case| case.name().starts_with(operation) || case.name().starts_with(&both);
            assert!(of_losses.contains(operation) || cases.iter().any(here), "{operation}");
        }
    }
}
