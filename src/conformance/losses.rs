//! Objectives on a device against their definition, with the bounds that [the model](super) of single precision gives.

use super::inputs::{Extras, Hard, HostBatch, Ids, Inputs, Padding};
use super::{Case, DEFINITION, EPSILON, Expected, Kind, Ran, TINY, bits, host, norm, sum_error};
use crate::backend::operations::NO_ENTRY;
use crate::error::DType;
use crate::loss::{Batch, Guide};
use crate::objective::definition::{Evaluated, Rows};
use crate::objective::{
    Aggregate, Block, Candidates, Directions, FalseNegatives, Hardness, HardnessScope, Judge, Objective, PRESETS,
    Partition, Positives, Reduction, RowFunction, SHORTEST, Scope, Similarity, Target, Threshold, Tower,
};
use crate::{Device, Result, Tensor, bf16, f16};

/// An objective and how its batch is made.
pub(super) struct LossCase {
    objective: Objective,
    n: usize,
    d: usize,
    inputs: Inputs,
    extras: Extras,
    /// What embeddings are rounded to and given as.
    precision: DType,
}

/// How far rounding may move everything that an objective gives.
struct Bounds<'a> {
    objective: &'a Objective,
    /// What a product is off by, as a part of itself, because its factors are rounded.
    rounding: f64,
    /// Each embedding as it was given.
    raw: Vec<&'a [f32]>,
    row_weights: &'a [f32],
    loss: f64,
    losses: Vec<f64>,
    log_sum_exp: Vec<Vec<f64>>,
    gradients: Vec<f64>,
    d_log_scale: f64,
    d_bias: f64,
}

/// The largest error of a row's logits, that of its loss, and those of its coefficients.
struct RowErrors {
    /// Of each similarity.
    eta: Vec<f64>,
    delta: f64,
    loss: f64,
    coefficients: Vec<f64>,
}

impl Bounds<'_> {
    fn scale_error(&self) -> f64 {
        EPSILON * (1.0 + self.objective.log_scale().abs())
    }

    /// Of what a dot product of some width is off by, beside the normalisation of cosines.
    fn product_error(&self, width: usize) -> f64 {
        let normalised = if self.objective.similarity_kind() == Similarity::Cosine { 2.0 * EPSILON } else { 0.0 };
        sum_error(width) + normalised + self.rounding
    }

    fn row(&self, rows: &Rows<'_>, row: &Evaluated, lengths: &[f64], width: usize) -> RowErrors {
        let objective = self.objective;
        let squared = objective.similarity_kind() == Similarity::SquaredL2;
        let eta: Vec<f64> = row
            .entries
            .iter()
            .map(|entry| {
                let (a, b) = (lengths[entry.left], lengths[entry.right]);
                let size = if squared { (a + b) * (a + b) / 2.0 } else { a * b };
                self.product_error(width) * size + TINY * (1.0 + a + b)
            })
            .collect();
        let n = row.entries.len() as f64;
        let constants = objective.bias_value().abs() + objective.margin_value().abs();
        let delta_of = |(entry, (eta, z)): (&crate::objective::definition::Entry, (&f64, &f64))| {
            let s = entry.similarity.abs();
            rows.scale * eta
                + self.scale_error() * rows.scale * s
                + entry.hardness * (eta + EPSILON * s)
                + EPSILON * (z.abs() + constants)
        };
        let largest = row.logits.iter().fold(0.0, |largest: f64, z| largest.max(z.abs()));
        let every = row.entries.iter().zip(eta.iter().zip(&row.logits)).map(delta_of).fold(0.0, f64::max);
        let size = largest + n.max(1.0).ln();
        let delta = every + 2.0 * EPSILON * (size + 1.0);
        let function = rows.partition.function;
        let several = row.entries.iter().filter(|entry| entry.positive > 0.0).count() > 1;
        let differs = function == RowFunction::CrossEntropy
            && (several || objective.label_smoothing_value() > 0.0 || objective.target_kind() != Target::Positives);
        let along: f64 = row.gradient.iter().map(|g| g.abs()).sum();
        let own = row.own.abs() * rows.scale * (self.scale_error() + EPSILON);
        let target = match objective.target_kind() {
            Target::Positives => 0.0,
            Target::Scores { scale } => EPSILON * scale.abs(),
            Target::Guide { scale } => scale.abs() * (sum_error(2) + 3.0 * EPSILON + self.rounding),
        };
        let of_targets: f64 = row.targets.iter().zip(&row.logits).map(|(y, z)| 2.0 * target * y * z.abs()).sum();
        let loss = along * delta
            + 4.0 * EPSILON * row.loss.abs()
            + own
            + of_targets
            + if differs { 4.0 * EPSILON * size } else { 0.0 }
            + DEFINITION * (size + 1.0)
            + n * TINY;
        let moved = coefficients(function, row, rows.scale, differs);
        let coefficients =
            row.gradient.iter().zip(moved).zip(row.targets.iter().zip(&row.logits)).map(|((g, moved), (y, z))| {
                // p and y each with its own roundings, those of the log-sum-exp among them.
                let p = (z - row.log_sum_exp).exp();
                let of_p = 2.0 * EPSILON * (size + 1.0) * p;
                let components = if differs { of_p + 4.0 * EPSILON * (g.abs() + y) + 2.0 * target * y } else { 0.0 };
                moved * delta + 4.0 * EPSILON * g.abs() + components + DEFINITION * (size + 1.0) + TINY
            });
        RowErrors { delta, loss, coefficients: coefficients.collect(), eta }
    }

    /// Takes in a partition at a width.
    fn add(&mut self, rows: &Rows<'_>, p: usize, width: usize) {
        let lengths: Vec<f64> = rows.vectors.iter().map(|vector| norm(vector.iter().copied())).collect();
        let scale_error = self.scale_error();
        let squared = self.objective.similarity_kind() == Similarity::SquaredL2;
        let cosine = self.objective.similarity_kind() == Similarity::Cosine;
        let errors: Vec<RowErrors> = rows.rows.iter().map(|row| self.row(rows, row, &lengths, width)).collect();
        let largest_row = errors
            .iter()
            .zip(rows.rows)
            .map(|(errors, row)| errors.loss + EPSILON * row.loss.abs())
            .fold(0.0, f64::max);
        let over_rows =
            self.objective.reduction_kind() == Reduction::Mean && rows.partition.aggregate == Aggregate::LogMeanExp;
        let upstream_error = 2.0 * EPSILON + if over_rows { 2.0 * largest_row + 2.0 * EPSILON } else { 0.0 };

        let (mut error, mut size) = (vec![0.0; lengths.len()], vec![0.0; lengths.len()]);
        let mut terms = vec![0usize; lengths.len()];
        let (mut scale_size, mut bias_size, mut count) = (0.0, 0.0, 0);
        for (i, (row, errors)) in rows.rows.iter().zip(&errors).enumerate() {
            let upstream = rows.upstream[i].abs();
            let row_weight = self.row_weights.get(i).map_or(1.0, |weight| f64::from(weight.abs()));
            self.losses[i] += rows.weight * row_weight * (errors.loss + 3.0 * EPSILON * row.loss.abs());
            self.log_sum_exp[p][i] = errors.delta + 2.0 * EPSILON * (1.0 + row.log_sum_exp.abs());
            if !over_rows {
                self.loss += upstream * (errors.loss + 3.0 * EPSILON * row.loss.abs());
            }
            self.d_log_scale +=
                upstream * row.own.abs() * rows.scale * (scale_error + 4.0 * EPSILON + 2.0 * errors.delta);
            count += row.entries.len();
            let entries = row.entries.iter().zip(&row.gradient).zip(errors.coefficients.iter().zip(&errors.eta));
            for ((entry, g), (coefficient, eta)) in entries {
                let g = upstream * g.abs();
                let of_g = upstream * coefficient + g * upstream_error + TINY;
                let s = entry.similarity.abs();
                self.d_log_scale += of_g * rows.scale * s + g * rows.scale * (eta + scale_error * s);
                self.d_bias += of_g;
                scale_size += g * rows.scale * s;
                bias_size += g;
                let (a, b) = (lengths[entry.left], lengths[entry.right]);
                let reach = if squared { [a + b; 2] } else { [b, a] };
                let normalised = if cosine { 4.0 * EPSILON } else { EPSILON };
                for (to, reach) in [entry.left, entry.right].into_iter().zip(reach) {
                    error[to] += rows.scale * reach * (of_g + g * (scale_error + normalised)) + TINY;
                    size[to] += rows.scale * reach * g;
                    terms[to] += 1;
                }
            }
        }
        if over_rows {
            self.loss += rows.weight * (largest_row + 8.0 * EPSILON);
        }
        self.d_log_scale += sum_error(count) * scale_size;
        self.d_bias += sum_error(count) * bias_size;
        for (to, gradient) in self.gradients.iter_mut().enumerate() {
            let of_terms = sum_error(terms[to]) + self.rounding;
            let of_sum = (of_terms + if cosine { sum_error(width) } else { 0.0 }) * size[to];
            let length = match cosine {
                true => norm(self.raw[to][..width].iter().copied().map(f64::from)).max(SHORTEST),
                false => 1.0,
            };
            *gradient += (error[to] + of_sum) / length + TINY;
        }
    }
}

/// How far each coefficient moves at most when all logits move by 1, to first order: `Σ_k |∂²f/∂z_c∂z_k|` or more.
fn coefficients(function: RowFunction, row: &Evaluated, own: f64, differs: bool) -> Vec<f64> {
    let is_negative = |c: usize| row.entries[c].positive == 0.0;
    let times = |factor: f64| row.gradient.iter().map(|g| factor * g.abs()).collect::<Vec<f64>>();
    let softmax = |factor: f64, over: &dyn Fn(usize) -> bool| -> Vec<f64> {
        let logits = || row.logits.iter().enumerate().filter(|(c, _)| over(*c)).map(|(_, z)| factor * z);
        let largest = logits().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits().map(|z| (z - largest).exp()).sum();
        let share = |(c, z): (usize, &f64)| if over(c) { (factor * z - largest).exp() / total } else { 0.0 };
        row.logits.iter().enumerate().map(share).collect()
    };
    match function {
        // 2p(1 − p), of which 1 − p is the gradient of the one positive.
        RowFunction::CrossEntropy if !differs => times(2.0),
        RowFunction::CrossEntropy => softmax(1.0, &|_| true).into_iter().map(|p| 2.0 * p * (1.0 - p)).collect(),
        RowFunction::LogSumPositives | RowFunction::EachPositive => times(4.0),
        RowFunction::Decoupled => {
            (0..row.entries.len()).map(|c| if is_negative(c) { 2.0 * row.gradient[c].abs() } else { 0.0 }).collect()
        }
        RowFunction::Debiased { prior } => {
            let largest = row.logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum_of = |negative: bool| -> f64 {
                let here = |c: &usize| is_negative(*c) == negative;
                (0..row.entries.len()).filter(here).map(|c| (row.logits[c] - largest).exp()).sum()
            };
            let (positive, sum) = (sum_of(false), sum_of(true));
            let n = (0..row.entries.len()).filter(|&c| is_negative(c)).count() as f64;
            let estimate = (sum - n * prior * positive) / (1.0 - prior);
            let bound = n * (-own - largest).exp();
            let total = positive + estimate.max(bound);
            if estimate <= bound {
                return times(4.0);
            }
            let terms = (sum + n * prior * positive) / (1.0 - prior);
            let kappa = (positive + terms) / total;
            let of_positive = (terms + n * prior * positive / (1.0 - prior)) / total;
            let of_each = |c: usize| if is_negative(c) { row.gradient[c].abs() } else { of_positive };
            (0..row.entries.len()).map(|c| (1.0 + kappa) * of_each(c)).collect()
        }
        RowFunction::HybridNce { hardness: beta, .. } => {
            let share =
                row.gradient.iter().enumerate().filter(|(c, _)| !is_negative(*c)).map(|(_, g)| g.abs()).sum::<f64>();
            let (harder, weights) = (softmax(1.0 + beta, &is_negative), softmax(beta, &is_negative));
            let of_share = 2.0 + 2.0 * beta;
            (0..row.entries.len())
                .map(|c| {
                    let first = (1.0 + beta) * harder[c] * (2.0 * (1.0 + beta) + of_share);
                    let second = beta * weights[c] * (2.0 * beta + of_share);
                    if is_negative(c) { share * (first + second) } else { row.gradient[c].abs() * (2.0 + of_share) }
                })
                .collect()
        }
        RowFunction::Sigmoid => times(1.0),
        RowFunction::LogMeanExp => times(2.0),
        RowFunction::Hinge { .. } | RowFunction::HardestNegative { .. } | RowFunction::Alignment => times(0.0),
    }
}

impl LossCase {
    fn batch(&self) -> HostBatch {
        let mut batch = HostBatch::new(&self.objective, self.n, self.d, self.inputs, &self.extras);
        let round: fn(f32) -> f32 = match self.precision {
            DType::F16 => |value| f16::from_f32(value).to_f32(),
            DType::BF16 => |value| bf16::from_f32(value).to_f32(),
            _ => return batch,
        };
        batch.sides.iter_mut().flatten().for_each(|value| *value = round(*value));
        batch
    }

    pub(super) fn expected(&self, rounding: f64) -> Result<Vec<Expected>> {
        let batch = self.batch();
        let objective = &self.objective;
        let (n, d) = (self.n, self.d);
        let raw: Vec<&[f32]> = batch.sides.iter().flat_map(|side| side.chunks(d)).collect();
        let partitions = objective.partitions().len();
        let mut bounds = Bounds {
            objective,
            rounding: 2.0 * rounding,
            row_weights: &batch.row_weights,
            loss: 0.0,
            losses: vec![0.0; n],
            log_sum_exp: vec![vec![0.0; n]; partitions],
            gradients: vec![0.0; raw.len()],
            raw,
            d_log_scale: 0.0,
            d_bias: 0.0,
        };
        let exact = batch.wide(objective, |input| {
            let mut at = 0;
            objective.watched_definition(input, &mut |rows| {
                let width = objective.width_weights().get(at / partitions).map_or(d, |&(width, _)| width);
                bounds.add(&rows, at % partitions, width);
                at += 1;
            })
        })?;
        let mut first = 0;
        let mut gradient = |name, values: Vec<f64>| {
            let rows = values.len() / d;
            let of_side = bounds.gradients[first..first + rows].to_vec();
            first += rows;
            Expected::rows(name, values, d, of_side)
        };
        let none = objective.reduction_kind() == Reduction::None;
        let (loss, of_loss) = if none {
            (exact.losses.clone(), bounds.losses.clone())
        } else {
            (vec![exact.loss], vec![bounds.loss + 4.0 * EPSILON * exact.loss.abs() + TINY])
        };
        let floor = |bounds: Vec<f64>| bounds.into_iter().map(|bound| bound + TINY).collect::<Vec<f64>>();
        let mut expected = vec![
            Expected::new("loss", loss, floor(of_loss)),
            Expected::new("losses", exact.losses, floor(bounds.losses)),
            gradient("d_queries", exact.d_queries),
            gradient("d_documents", exact.d_documents),
            gradient("d_hard_negatives", exact.d_hard_negatives),
            gradient("d_hard_queries", exact.d_hard_queries),
            Expected::new("d_log_scale", vec![exact.d_log_scale], vec![bounds.d_log_scale]),
            Expected::new("d_bias", vec![exact.d_bias], vec![bounds.d_bias]),
        ];
        for (values, bounds) in exact.log_sum_exp.into_iter().zip(bounds.log_sum_exp) {
            let values =
                values.into_iter().map(|value| if value == f64::NEG_INFINITY { f64::from(NO_ENTRY) } else { value });
            expected.push(Expected::new("log_sum_exp", values.collect(), bounds));
        }
        Ok(expected)
    }

    pub(super) fn inputs(&self) -> Vec<Vec<u32>> {
        let batch = self.batch();
        let guide = batch.guide.unwrap_or_default();
        let bits = |values: &Vec<f32>| values.iter().map(|value| value.to_bits()).collect();
        batch.sides.iter().chain(&guide).chain([&batch.row_weights, &batch.scores]).map(bits).collect()
    }

    pub(super) fn on_device(&self, device: &Device) -> Result<Ran> {
        let host_batch = self.batch();
        let (n, d) = (self.n, self.d);
        let upload = |values: &[f32], width: usize| device.tensor(values, [values.len() / width, width]);
        let embeddings = |values: &[f32]| upload(values, d)?.cast(self.precision);
        // (T, d) with offsets, else (N, K, d).
        let of_pairs = |values: &[f32]| match host_batch.offsets {
            Some(_) => embeddings(values),
            None => device.tensor(values, [n, values.len() / (n * d), d])?.cast(self.precision),
        };
        let sides = &host_batch.sides;
        let queries = embeddings(&sides[0])?;
        let documents = embeddings(&sides[1])?;
        let (hard_negatives, hard_queries) = (of_pairs(&sides[2])?, of_pairs(&sides[3])?);
        let bank = embeddings(&sides[4])?;
        let guide = host_batch.guide.clone().unwrap_or_default();
        let guide: Vec<Tensor> = guide.iter().map(|side| upload(side, 2)).collect::<Result<_>>()?;
        let row_weights = upload(&host_batch.row_weights, 1)?;
        let scores = device.tensor(&host_batch.scores, [n, host_batch.scores.len() / n])?;
        let mut batch = Batch::new(&queries, &documents).relations(host_batch.relations());
        if hard_negatives.elements() > 0 || host_batch.offsets.is_some() {
            batch = batch.hard_negatives(&hard_negatives);
        }
        if hard_queries.elements() > 0 {
            batch = batch.hard_queries(&hard_queries);
        }
        if bank.elements() > 0 {
            batch = batch.bank(&bank);
        }
        if host_batch.guide.is_some() {
            let hard = (hard_negatives.elements() > 0).then_some(&guide[2]);
            batch = batch.guide(Guide { queries: &guide[0], documents: &guide[1], hard_negatives: hard });
        }
        if !host_batch.row_weights.is_empty() {
            batch = batch.row_weights(&row_weights);
        }
        if !host_batch.scores.is_empty() {
            batch = batch.scores(&scores);
        }
        let out = self.objective.forward_backward(device, batch)?;
        let empty = device.zeros([0])?;
        let mut outputs = vec![
            &out.loss,
            &out.losses,
            &out.d_queries,
            &out.d_documents,
            out.d_hard_negatives.as_ref().unwrap_or(&empty),
            out.d_hard_queries.as_ref().unwrap_or(&empty),
            &out.d_log_scale,
            &out.d_bias,
        ];
        outputs.extend(&out.log_sum_exp);
        let inputs = [&queries, &documents, &hard_negatives, &hard_queries, &bank];
        let inputs: Vec<&Tensor> = inputs.into_iter().chain(&guide).chain([&row_weights, &scores]).collect();
        Ok(Ran { outputs: host(&outputs)?, inputs: bits(&inputs)? })
    }
}

/// Shapes that are multiples of nothing, from one pair to more than a tile.
const SHAPES: [(usize, usize); 6] = [(1, 3), (2, 1), (7, 17), (33, 64), (257, 33), (300, 130)];

/// Objectives whose decisions have a margin only on a grid of similarities.
fn is_decided(objective: &Objective) -> bool {
    let hinge = |partition: &Partition| matches!(partition.function, RowFunction::Hinge { .. });
    let by_similarity = |rule: FalseNegatives| rule.judge == Judge::Similarity;
    objective.partitions().iter().any(hinge) || objective.false_negatives_rule().is_some_and(by_similarity)
}

struct Table(Vec<Case>);

impl Table {
    fn add(&mut self, name: &str, objective: &Objective, shape: (usize, usize), inputs: Inputs, extras: Extras) {
        self.add_rounded(name, objective, shape, inputs, extras, DType::F32);
    }

    fn add_rounded(
        &mut self,
        name: &str,
        objective: &Objective,
        (n, d): (usize, usize),
        inputs: Inputs,
        extras: Extras,
        precision: DType,
    ) {
        let inputs = match inputs {
            Inputs::Random if is_decided(objective) => Inputs::Signs,
            inputs => inputs,
        };
        let case = LossCase { objective: objective.clone(), n, d, inputs, extras, precision };
        let slow = n > 1000;
        self.0.push(Case {
            name: format!("{name}/{n}x{d}/{}/{precision}", inputs.name()),
            slow,
            kind: Kind::Loss(case),
        });
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut table = Table(Vec::new());
    let hard = |hard: Hard| Extras { hard, ..Extras::NONE };
    for preset in PRESETS {
        let objective = (preset.make)();
        for (n, d) in SHAPES {
            // One of two shapes has hard negatives; ±1 has its grid of similarities only where d is odd.
            let extras =
                hard(if n % 2 == 0 || objective.uses(Candidates::HardQueries) { Hard::Even(2) } else { Hard::None });
            let d = if is_decided(&objective) && d % 2 == 0 { d + 1 } else { d };
            table.add(preset.name, &objective, (n, d), Inputs::Random, extras);
            if n == 33 {
                for precision in [DType::F16, DType::BF16] {
                    table.add_rounded(preset.name, &objective, (n, d), Inputs::Random, extras, precision);
                }
            }
        }
    }
    for name in Objective::CENTRE {
        let Ok(objective) = Objective::named(name) else { continue };
        table.add(name, &objective, (1025, 96), Inputs::Random, Extras::NONE);
        adversarial(&mut table, name, &objective);
    }
    for (name, objective, extras) in compositions() {
        for shape in [(7, 3), (33, 17), (257, 17)] {
            table.add(&name, &objective, shape, Inputs::Random, extras);
        }
    }
    for name in ["decoupled", "debiased", "hybrid-nce", "sigmoid", "supervised", "each-positive", "log-sum-positives"] {
        let Ok(objective) = Objective::named(name) else { continue };
        adversarial(&mut table, name, &objective);
    }
    table.0
}

/// Inputs at the edges of single precision and of what a batch may be.
fn adversarial(table: &mut Table, name: &str, objective: &Objective) {
    let shape = (33, 17);
    for inputs in [
        Inputs::Ties,
        Inputs::Same,
        Inputs::Orthogonal,
        Inputs::Opposite,
        Inputs::Separated,
        Inputs::Lengths,
        Inputs::Subnormal,
    ] {
        table.add(name, objective, shape, inputs, Extras { hard: Hard::Even(1), ..Extras::NONE });
    }
    table.add(name, objective, (257, 33), Inputs::Ties, Extras { ids: Ids::Some, hard: Hard::Even(1), ..Extras::NONE });
    for (masks, extras) in [
        ("one-id", Extras { ids: Ids::One, ..Extras::NONE }),
        ("all-padding", Extras { padding: Padding::All, ..Extras::NONE }),
        ("padding", Extras { padding: Padding::Some, hard: Hard::Ragged, ..Extras::NONE }),
    ] {
        table.add(&format!("{name}+{masks}"), objective, shape, Inputs::Random, extras);
    }
    for temperature in [0.001, 0.01, 100.0, 1000.0] {
        if let Ok(objective) = objective.clone().temperature(temperature) {
            let name = format!("{name}+temperature-{temperature}");
            table.add(&name, &objective, shape, Inputs::Random, Extras::NONE);
        }
    }
    let dot = objective.clone().similarity(Similarity::Dot);
    if let (Ok(()), Ok(hot)) = (dot.validate(), dot.clone().temperature(1.0)) {
        table.add(&format!("{name}+dot"), &hot, shape, Inputs::Long, Extras::NONE);
        table.add(&format!("{name}+dot"), &hot, shape, Inputs::Subnormal, Extras::NONE);
        let squared = hot.similarity(Similarity::SquaredL2);
        table.add(&format!("{name}+squared-l2"), &squared, shape, Inputs::Random, Extras::NONE);
    }
}

/// Objectives that between them use every part of the algebra, and batches with everything they can have.
fn compositions() -> Vec<(String, Objective, Extras)> {
    let mut all: Vec<(String, Result<Objective>, Extras)> = Vec::new();
    let mut add = |name: &str, objective: Result<Objective>, extras: Extras| all.push((name.into(), objective, extras));
    let even = Extras { hard: Hard::Even(2), ..Extras::NONE };
    let ragged = Extras { hard: Hard::Ragged, ..Extras::NONE };
    let weights = Extras { row_weights: true, ..even };
    let everything = Extras {
        hard: Hard::Ragged,
        ids: Ids::Some,
        padding: Padding::Some,
        segments: true,
        row_weights: true,
        weighted: false,
    };

    for name in ["infonce", "samtone-bidirectional", "gte"] {
        let named = || Objective::named(name);
        add(&format!("{name}+smoothing"), named().and_then(|o| o.label_smoothing(0.1)), even);
        add(&format!("{name}+margin"), named().and_then(|o| o.margin(0.3)), even);
        add(
            &format!("{name}+smoothing+margin+ids"),
            named().and_then(|o| o.label_smoothing(0.2)?.margin(-1.5)),
            Extras { ids: Ids::Some, ..weights },
        );
        add(&format!("{name}+everything"), named(), everything);
        add(&format!("{name}+smoothing+everything"), named().and_then(|o| o.label_smoothing(0.2)), everything);
    }
    for preset in ["samtone", "decoupled", "sigmoid"] {
        let named = || Objective::named(preset);
        add(&format!("{preset}+ragged"), named(), ragged);
        add(&format!("{preset}+segments"), named(), Extras { segments: true, ..even });
        add(&format!("{preset}+row-weights"), named(), weights);
        add(&format!("{preset}+sum"), named().and_then(|o| o.reduction(Reduction::Sum)), weights);
        add(&format!("{preset}+none"), named().and_then(|o| o.reduction(Reduction::None)), weights);
        add(&format!("{preset}+frozen-documents"), named().map(|o| o.frozen(Tower::Document)), even);
        add(&format!("{preset}+frozen-queries"), named().map(|o| o.frozen(Tower::Query)), even);
        add(&format!("{preset}+widths"), named().and_then(|o| o.widths(&[(1, 0.5), (3, 1.0)])), even);
        let squared = named().and_then(|o| o.similarity(Similarity::SquaredL2).widths(&[(2, 0.5), (3, 2.0)]));
        add(&format!("{preset}+squared-l2+widths"), squared, even);
        add(
            &format!("{preset}+dot+widths"),
            named().and_then(|o| o.similarity(Similarity::Dot).widths(&[(2, 1.0)])),
            even,
        );
        add(&format!("{preset}+scale-below-bound"), named().and_then(|o| o.largest_scale(100.0)), even);
        add(&format!("{preset}+scale-above-bound"), named().and_then(|o| o.largest_scale(3.0)), even);
    }
    add("sigmoid+bias", Objective::sigmoid().bias(1.25), weights);
    add("samtone-bidirectional+mean", Ok(Objective::samtone_bidirectional().directions(Directions::Mean)), even);
    for (scope_name, scope) in [
        ("in-batch", HardnessScope::InBatch),
        ("hard-negatives", HardnessScope::HardNegatives),
        ("all", HardnessScope::All),
    ] {
        let hardness = Hardness { strength: 9.0, scope };
        for preset in ["infonce", "gecko"] {
            let objective = Objective::named(preset).and_then(|o| o.hardness(hardness));
            add(&format!("{preset}+hardness-{scope_name}"), objective, ragged);
        }
    }
    for (rule_name, threshold, judge) in [
        ("above-own", Threshold::Above(0.1), Judge::Similarity),
        ("below-own", Threshold::Above(-0.1), Judge::Similarity),
        ("ratio-own", Threshold::Ratio(0.93), Judge::Similarity),
        ("above-guide", Threshold::Above(0.0), Judge::Guide),
        ("everything-own", Threshold::Above(-10.0), Judge::Similarity),
    ] {
        let rule = FalseNegatives { threshold, judge };
        add(&format!("samtone+{rule_name}"), Objective::samtone().false_negatives(rule), ragged);
        add(&format!("gte+{rule_name}"), Objective::gte().false_negatives(rule), even);
    }
    let listed = Extras { weighted: true, row_weights: true, ..even };
    for preset in ["infonce", "samtone", "hybrid-nce", "sigmoid"] {
        let objective = || Objective::named(preset).and_then(|o| o.positives(Positives::Listed));
        add(&format!("{preset}+listed"), objective(), even);
        add(&format!("{preset}+listed-weights"), objective(), listed);
    }
    add("full-softmax+listed-weights", Ok(Objective::full_softmax()), listed);
    for preset in ["infonce", "gte", "decoupled", "sigmoid"] {
        let objective = Objective::named(preset).and_then(|o| o.positives(Positives::Labels));
        add(
            &format!("{preset}+labels"),
            objective,
            Extras { ids: Ids::Some, padding: Padding::Some, segments: true, ..even },
        );
    }
    add("infonce+scores", Objective::infonce().target(Target::Scores { scale: 3.0 }), ragged);
    add("gecko+scores", Objective::gecko().target(Target::Scores { scale: 3.0 }), ragged);
    add(
        "infonce+guide-target",
        Objective::infonce().target(Target::Guide { scale: 5.0 }).and_then(|o| o.label_smoothing(0.1)),
        weights,
    );
    add("moco+row-weights", Ok(Objective::moco()), weights);
    add("beclr+row-weights", Ok(Objective::beclr()), weights);
    add("beclr+padding", Ok(Objective::beclr()), Extras { padding: Padding::Some, ..even });
    add("uniformity+row-weights", Ok(Objective::uniformity()), Extras { segments: true, ..weights });
    add("hinge+segments", Ok(Objective::hinge()), Extras { segments: true, ..weights });
    let others = |anchor, candidates| Block::new(anchor, candidates, Scope::Others);
    let custom = [
        (
            "own+others",
            vec![Block::QUERY_POSITIVE, others(Tower::Query, Candidates::HardNegatives), Block::QUERY_QUERY],
        ),
        (
            "both-anchors",
            vec![
                Block::QUERY_POSITIVE,
                Block::DOCUMENT_QUERY,
                Block::DOCUMENT_OWN_HARD_QUERIES,
                others(Tower::Query, Candidates::HardQueries),
                others(Tower::Document, Candidates::Documents),
            ],
        ),
        ("crossed-others", vec![Block::QUERY_POSITIVE, others(Tower::Document, Candidates::Queries)]),
        ("with-bank", vec![Block::QUERY_DOCUMENT, Block::QUERY_BANK, Block::QUERY_OWN_HARD_NEGATIVES]),
    ];
    for (name, blocks) in custom {
        for function in
            [RowFunction::CrossEntropy, RowFunction::Sigmoid, RowFunction::HybridNce { alpha: 0.5, hardness: 0.5 }]
        {
            let objective = Objective::new(name, vec![Partition::new(blocks.clone()).function(function)]);
            add(&format!("{name}+{}", function.name()), objective, Extras { ids: Ids::Some, ..ragged });
        }
    }
    let two = vec![
        Partition::new([Block::QUERY_DOCUMENT, Block::QUERY_HARD_NEGATIVES]).weight(0.7),
        Partition::new([Block::QUERY_QUERY])
            .function(RowFunction::LogMeanExp)
            .aggregate(Aggregate::LogMeanExp)
            .weight(0.2),
    ];
    add("swept+aggregated", Objective::new("swept+aggregated", two), weights);
    all.into_iter().filter_map(|(name, objective, extras)| Some((name, objective.ok()?, extras))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::inputs::wide;
    use super::*;

    /// A composition that makes no sense would be left out in silence.
    #[test]
    fn every_composition_is_in_the_table() {
        let count = 3 * 5 + 3 * 12 + 2 + 3 * 2 + 5 * 2 + 4 * 2 + 1 + 4 + 3 + 5 + 4 * 3 + 1;
        assert_eq!(compositions().len(), count);
    }

    #[test]
    fn names_are_unique_and_say_the_shape() {
        let cases = cases();
        let mut names: Vec<&str> = cases.iter().map(Case::name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.binary_search(&"samtone/257x33/ties/f32").is_ok());
        for preset in PRESETS {
            let prefix = format!("{}/", preset.name);
            assert!(names.iter().filter(|name| name.starts_with(&prefix)).count() >= SHAPES.len(), "{}", preset.name);
        }
    }

    /// The hardest negative and the bound of the debiased estimate have a margin in the table's data.
    #[test]
    fn no_decision_is_close() {
        for case in cases() {
            let Kind::Loss(case) = &case.kind else { continue };
            let check = |rows: &Rows<'_>| {
                for row in rows.rows {
                    let mut negatives: Vec<f64> = row
                        .entries
                        .iter()
                        .zip(&row.logits)
                        .filter(|(e, _)| e.positive == 0.0)
                        .map(|(_, z)| *z)
                        .collect();
                    negatives.sort_by(|a, b| b.total_cmp(a));
                    let positive = row.entries.iter().zip(&row.logits).find(|(e, _)| e.positive > 0.0).map(|(_, z)| *z);
                    let margin = match (rows.partition.function, &negatives[..], positive) {
                        (RowFunction::HardestNegative { margin }, [first, second, ..], Some(positive)) => {
                            (first - second).min((margin - positive + first).abs())
                        }
                        (RowFunction::Hinge { margin }, all, positive) => all
                            .iter()
                            .map(|z| (margin - positive.unwrap_or(rows.scale) + z).abs())
                            .fold(f64::INFINITY, f64::min),
                        _ => continue,
                    };
                    assert!(margin > 1e-5, "{}/{}x{}: {margin:e}", case.objective.name(), case.n, case.d);
                }
            };
            let decides =
                |p: &Partition| matches!(p.function, RowFunction::HardestNegative { .. } | RowFunction::Hinge { .. });
            if case.objective.partitions().iter().any(decides) {
                let batch = case.batch();
                batch
                    .wide(&case.objective, |input| case.objective.watched_definition(input, &mut |rows| check(&rows)))
                    .unwrap();
            }
        }
    }

    /// The grid of the guide leaves no similarity near that of a pair.
    #[test]
    fn guides_are_clear() {
        let batch = HostBatch::new(
            &Objective::guided(),
            300,
            3,
            Inputs::Random,
            &Extras { hard: Hard::Even(2), ..Extras::NONE },
        );
        let [queries, documents, hard] = batch.guide.unwrap().map(|side| wide(&side));
        let dot = |a: &[f64], b: &[f64]| a[0] * b[0] + a[1] * b[1];
        for i in 0..300 {
            let (query, document) = (&queries[2 * i..][..2], &documents[2 * i..][..2]);
            let own = dot(query, document);
            let others = documents.chunks(2).enumerate().filter(|(j, _)| *j != i).map(|(_, other)| dot(query, other));
            let towers = queries
                .chunks(2)
                .map(|other| dot(query, other))
                .chain(documents.chunks(2).map(|other| dot(document, other)));
            let found = others.chain(towers).chain(hard.chunks(2).map(|other| dot(query, other)));
            let margin = found.map(|s| (s - own).abs()).fold(f64::INFINITY, f64::min);
            assert!(margin > 5e-6, "{margin:e}");
        }
    }
}
