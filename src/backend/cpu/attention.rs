//! Softmax attention of packed sequences. A task is one sequence; for each head it takes [`QUERIES`] queries at a time,
//! so its scratch memory is [`QUERIES`] × length, and the backward pass recomputes the weights from their log-sum-exp.

use rayon::prelude::*;

use super::buffer::{read, write};
use super::gemm::{MatMut, MatRef, multiply};
use super::simd::{self, exp, largest_of, multiply_add, sum_of, vectorised};
use super::{dropout, sequences, split_rows};
use crate::backend::operations::{AttentionBackward, AttentionForward, AttentionShape, Dropout};
use crate::{Error, Result};

/// Queries that are worked on together.
const QUERIES: usize = 64;

vectorised! {
    /// Replaces scores by their softmax; returns the log-sum-exp.
    fn softmax(scores: &mut [f32]) -> f32 {
        let n = scores.len();
        let maximum = largest_of(n, f32::MIN, |i| scores[i]);
        for score in &mut *scores {
            *score = exp::<FUSED>(*score - maximum);
        }
        let sum = sum_of(n, |i| scores[i]);
        let inverse = 1.0 / sum;
        for score in &mut *scores {
            *score *= inverse;
        }
        maximum + sum.ln()
    }
}

vectorised! {
    /// Replaces scores by their softmax of known log-sum-exp.
    fn known_softmax(scores: &mut [f32], log_sum_exp: f32) {
        for score in scores {
            *score = exp::<FUSED>(*score - log_sum_exp);
        }
    }
}

vectorised! {
    /// `gradient = weights · (gradient − along)`: the gradient of the scores.
    fn score_gradient(weights: &[f32], along: f32, gradient: &mut [f32]) {
        for (gradient, weight) in gradient.iter_mut().zip(weights) {
            *gradient = multiply_add::<FUSED>(*weight, *gradient, -(*weight * along));
        }
    }
}

vectorised! {
    fn multiply_elements(factors: &[f32], output: &mut [f32]) {
        for (output, factor) in output.iter_mut().zip(factors) {
            *output *= *factor;
        }
    }
}

/// The three matrices of one head of one sequence in its packed rows.
struct Heads<'a> {
    rows: &'a [f32],
    length: usize,
    width: usize,
    head_width: usize,
}

impl<'a> Heads<'a> {
    /// Part 0 is the queries, 1 the keys, 2 the values.
    fn view(&self, part: usize, head: usize, rows: std::ops::Range<usize>) -> MatRef<'a> {
        let first = rows.start * 3 * self.width + part * self.width + head * self.head_width;
        MatRef::new(&self.rows[first..], rows.len(), self.head_width, 3 * self.width)
    }
}

/// What the forward and backward pass need of a checked shape.
fn prepare(operation: &'static str, shape: &AttentionShape<'_>, rows: usize) -> Result<Vec<std::ops::Range<usize>>> {
    let offsets = read::<u32>(operation, "offsets", shape.offsets)?;
    let sequences: Vec<_> = sequences(operation, offsets, rows)?.collect();
    match sequences.iter().find(|sequence| sequence.len() > shape.longest) {
        None => Ok(sequences),
        Some(sequence) => {
            let reason = format!("is {}, but there is a sequence of {} tokens", shape.longest, sequence.len());
            Err(Error::value(operation, "longest", reason))
        }
    }
}

fn mask(dropout: Option<Dropout>, row: usize, head: usize, output: &mut [f32]) {
    if let Some(dropout) = dropout {
        dropout::factors(dropout, row as u32, (head as u32) << 16, output);
    }
}

pub(super) fn forward(arguments: AttentionForward<'_>) -> Result<()> {
    const OPERATION: &str = "attention_forward";
    let (rows, width) = (arguments.output.shape().rows(), arguments.output.shape().width());
    let AttentionForward { query_key_value, shape, output, log_sum_exp } = arguments;
    let heads = shape.heads;
    let head_width = width / heads;
    let scale = 1.0 / (head_width as f32).sqrt();
    let dropout = shape.dropout.filter(|dropout| dropout.probability > 0.0);
    let sequences = prepare(OPERATION, &shape, rows)?;
    let query_key_value = read::<f32>(OPERATION, "query_key_value", query_key_value)?;
    let output = write::<f32>(OPERATION, "output", output)?;
    let log_sum_exp = log_sum_exp.map(|tensor| write::<f32>(OPERATION, "log_sum_exp", tensor)).transpose()?;
    if width == 0 {
        return Ok(());
    }

    let outputs = split_rows(output, width, sequences.iter().cloned());
    let sums: Vec<Option<&mut [f32]>> = match log_sum_exp {
        Some(sums) => split_rows(sums, heads, sequences.iter().cloned()).into_iter().map(Some).collect(),
        None => sequences.iter().map(|_| None).collect(),
    };
    outputs.into_par_iter().zip(sums).zip(&sequences).for_each_init(
        || (Vec::new(), Vec::new()),
        |(scores, factors), ((output, mut sums), sequence)| {
            let length = sequence.len();
            let rows = &query_key_value[sequence.start * 3 * width..sequence.end * 3 * width];
            let data = Heads { rows, length, width, head_width };
            scores.resize(QUERIES.min(length) * length, 0.0f32);
            factors.resize(length, 0.0f32);
            for head in 0..heads {
                for first in (0..length).step_by(QUERIES) {
                    let queries = first..length.min(first + QUERIES);
                    let count = queries.len();
                    multiply(
                        MatMut::new(scores, count, length, length),
                        data.view(0, head, queries.clone()),
                        data.view(1, head, 0..data.length).transposed(),
                        scale,
                        false,
                    );
                    for (row, scores) in queries.clone().zip(scores.chunks_exact_mut(length)) {
                        let sum = softmax(scores);
                        if let Some(sums) = &mut sums {
                            sums[row * heads + head] = sum;
                        }
                        if dropout.is_some() {
                            mask(dropout, sequence.start + row, head, factors);
                            multiply_elements(factors, scores);
                        }
                    }
                    multiply(
                        MatMut::new(&mut output[first * width + head * head_width..], count, head_width, width),
                        MatRef::new(scores, count, length, length),
                        data.view(2, head, 0..length),
                        1.0,
                        false,
                    );
                }
            }
        },
    );
    Ok(())
}

pub(super) fn backward(arguments: AttentionBackward<'_>) -> Result<()> {
    const OPERATION: &str = "attention_backward";
    let (rows, width) = (arguments.upstream.shape().rows(), arguments.upstream.shape().width());
    let AttentionBackward { upstream, query_key_value, output, log_sum_exp, shape, d_query_key_value } = arguments;
    let heads = shape.heads;
    let head_width = width / heads;
    let scale = 1.0 / (head_width as f32).sqrt();
    let dropout = shape.dropout.filter(|dropout| dropout.probability > 0.0);
    let sequences = prepare(OPERATION, &shape, rows)?;
    let upstream = read::<f32>(OPERATION, "upstream", upstream)?;
    let query_key_value = read::<f32>(OPERATION, "query_key_value", query_key_value)?;
    let output = read::<f32>(OPERATION, "output", output)?;
    let log_sum_exp = read::<f32>(OPERATION, "log_sum_exp", log_sum_exp)?;
    let d_query_key_value = write::<f32>(OPERATION, "d_query_key_value", d_query_key_value)?;
    if width == 0 {
        return Ok(());
    }

    let gradients = split_rows(d_query_key_value, 3 * width, sequences.iter().cloned());
    gradients.into_par_iter().zip(&sequences).for_each_init(
        || (Vec::new(), Vec::new(), Vec::new()),
        |(weights, d_scores, factors), (gradient, sequence)| {
            let length = sequence.len();
            let rows = &query_key_value[sequence.start * 3 * width..sequence.end * 3 * width];
            let data = Heads { rows, length, width, head_width };
            weights.resize(QUERIES.min(length) * length, 0.0f32);
            d_scores.resize(QUERIES.min(length) * length, 0.0f32);
            factors.resize(length, 0.0f32);
            for head in 0..heads {
                for first in (0..length).step_by(QUERIES) {
                    let queries = first..length.min(first + QUERIES);
                    let count = queries.len();
                    let rows_first = (sequence.start + first) * width + head * head_width;
                    let upstream_block = MatRef::new(&upstream[rows_first..], count, head_width, width);
                    multiply(
                        MatMut::new(weights, count, length, length),
                        data.view(0, head, queries.clone()),
                        data.view(1, head, 0..data.length).transposed(),
                        scale,
                        false,
                    );
                    multiply(
                        MatMut::new(d_scores, count, length, length),
                        upstream_block,
                        data.view(2, head, 0..length).transposed(),
                        1.0,
                        false,
                    );
                    let pieces = weights.chunks_exact_mut(length).zip(d_scores.chunks_exact_mut(length));
                    for (row, (weights, d_scores)) in queries.clone().zip(pieces) {
                        let absolute = sequence.start + row;
                        known_softmax(weights, log_sum_exp[absolute * heads + head]);
                        // Σ_j weight · d_weight over the dropped-out weights is output · upstream.
                        let at = absolute * width + head * head_width;
                        let along = simd::dot(&output[at..at + head_width], &upstream[at..at + head_width]);
                        if dropout.is_some() {
                            mask(dropout, absolute, head, factors);
                            multiply_elements(factors, d_scores);
                        }
                        score_gradient(weights, along, d_scores);
                        if dropout.is_some() {
                            multiply_elements(factors, weights);
                        }
                    }
                    let weights = MatRef::new(weights, count, length, length);
                    let d_scores = MatRef::new(d_scores, count, length, length);
                    let stride = 3 * width;
                    let at = |part: usize, row: usize| row * stride + part * width + head * head_width;
                    let d_queries = MatMut::new(&mut gradient[at(0, first)..], count, head_width, stride);
                    multiply(d_queries, d_scores, data.view(1, head, 0..length), scale, false);
                    // Keys and values gather from every block of queries, one after the other.
                    let d_keys = MatMut::new(&mut gradient[at(1, 0)..], length, head_width, stride);
                    multiply(d_keys, d_scores.transposed(), data.view(0, head, queries), scale, first > 0);
                    let d_values = MatMut::new(&mut gradient[at(2, 0)..], length, head_width, stride);
                    multiply(d_values, weights.transposed(), upstream_block, 1.0, first > 0);
                }
            }
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Device, Tensor};
    use crate::error::DType;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0) * 2.0).collect()
    }

    /// Forward and backward in float64, entry by entry, on lengths around the block of queries, with dropout.
    #[test]
    fn agrees_with_the_definition() {
        let device = Device::cpu();
        let (heads, head_width) = (2, 3);
        let width = heads * head_width;
        let lengths = [1usize, 5, 0, 64, 67, 130];
        let offsets: Vec<u32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |at, &n| {
                *at += n as u32;
                Some(*at)
            }))
            .collect();
        let rows = lengths.iter().sum::<usize>();
        let (x, g) = (values(rows * 3 * width, 1), values(rows * width, 2));
        let dropout = Dropout { probability: 0.2, seed: 5, site: 1, step: 3, row_offset: 40 };
        let offsets_tensor = device.tensor(&offsets, [offsets.len()]).unwrap();
        let shape = AttentionShape { offsets: &offsets_tensor, longest: 130, heads, dropout: Some(dropout) };
        let query_key_value = device.tensor(&x, [rows, 3 * width]).unwrap();
        let upstream = device.tensor(&g, [rows, width]).unwrap();
        let mut output = device.empty([rows, width], DType::F32).unwrap();
        let mut sums = device.empty([rows, heads], DType::F32).unwrap();
        let mut gradient = device.empty([rows, 3 * width], DType::F32).unwrap();
        device
            .attention_forward(AttentionForward {
                query_key_value: &query_key_value,
                shape,
                output: &mut output,
                log_sum_exp: Some(&mut sums),
            })
            .unwrap();
        device
            .attention_backward(AttentionBackward {
                upstream: &upstream,
                query_key_value: &query_key_value,
                output: &output,
                log_sum_exp: &sums,
                shape,
                d_query_key_value: &mut gradient,
            })
            .unwrap();

        let (mut expected, mut d_expected) = (vec![0.0f64; rows * width], vec![0.0f64; rows * 3 * width]);
        let at =
            |row: usize, part: usize, head: usize, c: usize| row * 3 * width + part * width + head * head_width + c;
        let scale = 1.0 / (head_width as f64).sqrt();
        for pair in offsets.windows(2) {
            let sequence = pair[0] as usize..pair[1] as usize;
            for (head, i) in (0..heads).flat_map(|head| sequence.clone().map(move |i| (head, i))) {
                let product = |a: &dyn Fn(usize) -> f64, b: &dyn Fn(usize) -> f64| {
                    (0..head_width).map(|c| a(c) * b(c)).sum::<f64>()
                };
                let input = |row, part| move |c: usize| (row, part, c);
                let read = |(row, part, c): (usize, usize, usize)| f64::from(x[at(row, part, head, c)]);
                let up = |c: usize| f64::from(g[i * width + head * head_width + c]);
                let scores: Vec<f64> = sequence
                    .clone()
                    .map(|j| scale * product(&|c| read(input(i, 0)(c)), &|c| read(input(j, 1)(c))))
                    .collect();
                let total: f64 = scores.iter().map(|s| s.exp()).sum();
                let weights: Vec<f64> = scores.iter().map(|s| s.exp() / total).collect();
                let factor = |k: usize| f64::from(dropout.factor(i as u32, ((head as u32) << 16) + k as u32));
                let d_weights: Vec<f64> = sequence
                    .clone()
                    .enumerate()
                    .map(|(k, j)| factor(k) * product(&up, &|c| read(input(j, 2)(c))))
                    .collect();
                let along: f64 = weights.iter().zip(&d_weights).map(|(w, d)| w * d).sum();
                for (k, j) in sequence.clone().enumerate() {
                    let d_score = scale * weights[k] * (d_weights[k] - along);
                    for c in 0..head_width {
                        expected[i * width + head * head_width + c] += weights[k] * factor(k) * read((j, 2, c));
                        d_expected[at(j, 2, head, c)] += weights[k] * factor(k) * up(c);
                        d_expected[at(i, 0, head, c)] += d_score * read((j, 1, c));
                        d_expected[at(j, 1, head, c)] += d_score * read((i, 0, c));
                    }
                }
            }
        }
        let check = |tensor: &Tensor, expected: &[f64]| {
            let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for (value, expected) in tensor.to_host::<f32>().unwrap().into_iter().zip(expected) {
                assert!((f64::from(value) - expected).abs() < 2e-6 * largest, "{value} {expected}");
            }
        };
        check(&output, &expected);
        check(&gradient, &d_expected);
    }

    #[test]
    fn bad_offsets_are_an_error() {
        let device = Device::cpu();
        let query_key_value = device.zeros([4, 6]).unwrap();
        for (offsets, longest) in [([0u32, 3, 5], 4), ([1, 2, 4], 4), ([0, 3, 2], 4), ([0, 1, 4], 2)] {
            let offsets = device.tensor(&offsets, [3]).unwrap();
            let mut output = device.zeros([4, 2]).unwrap();
            let shape = AttentionShape { offsets: &offsets, longest, heads: 1, dropout: None };
            let arguments =
                AttentionForward { query_key_value: &query_key_value, shape, output: &mut output, log_sum_exp: None };
            assert!(matches!(device.attention_forward(arguments), Err(Error::Value { .. })));
        }
    }
}
