//! One partition of an objective, row by row.
//!
//! Rows are taken in strips. The products of a strip's anchors with all candidates of all blocks go into one
//! workspace, where every row finds its entries side by side: [`row_function`] turns logits into gradients in place,
//! and two products bring those back to candidates and anchors. A strip has as many rows as fit the workspace, which
//! does not grow with the batch; products are cut into tiles of columns, rows and candidates into tasks, by shape
//! alone.
//!
//! With several widths the dot products of the first prefix are the start of the second's, and so on: the matrix work
//! is that of the full width. Backward, the values between two widths take the sum of the gradients of all prefixes
//! that hold them.

use std::cell::Cell;
use std::ops::{Deref, Range};

use rayon::prelude::*;

use super::buffer::{Lent, read, write};
use super::gemm::{MatMut, MatRef, multiply};
use super::positives::{add_unit, scaled_dot};
use super::row_function::{Row, evaluate};
use super::simd::{LANES, dot, multiply_add, vectorised};
use super::similarity_sweep::{scale_columns, units};
use super::{row_function, split_rows};
use crate::backend::operations::{NO_ENTRY, PADDING, ROW_STATISTICS, RowSweep, RowSweepSide, side_of, side_of_tower};
use crate::error::DType;
use crate::objective::relations::PositiveList;
use crate::objective::{
    Block, Candidates, FalseNegatives, Hardness, HardnessScope, Judge, Objective, Partition, Positives, Scope,
    Similarity, Target, Threshold, Tower,
};
use crate::{Error, Result};

const OPERATION: &str = "row_sweep";

/// Values of the workspace: 16 MiB.
const WORKSPACE: usize = 1 << 22;
/// Rows of a strip at most.
const STRIP: usize = 256;
/// Columns of a product's tile.
const TILE: usize = 256;
/// Rows that one task turns into gradients.
const TASK_ROWS: usize = 8;
/// Rows whose anchors' gradient one task computes.
const ANCHOR_ROWS: usize = 32;

/// One kind of embeddings in host memory.
#[derive(Clone, Copy)]
struct Side<'a> {
    values: &'a [f32],
    count: usize,
    /// At the full width alone embeddings are multiplied with them as they are read.
    units: Option<&'a [f32]>,
    /// Of prefixes dot products are multiplied with them.
    inverse_norms: Option<&'a [f32]>,
    half_squares: Option<&'a [f32]>,
    guide: Option<&'a [f32]>,
}

/// A block and where its entries stand in a row.
#[derive(Clone, Copy)]
struct Place<'a> {
    block: Block,
    anchors: Side<'a>,
    candidates: Side<'a>,
    /// Its first column, and how many it has.
    first: usize,
    width: usize,
    /// Where each pair's candidates begin, if they are several.
    offsets: Option<&'a [u32]>,
}

impl Place<'_> {
    /// Whether each row has candidates of its own, so that there is no matrix product.
    fn is_own(&self) -> bool {
        self.block.scope == Scope::Own
    }

    /// The candidates of a row's own pair.
    fn own(&self, row: usize) -> Range<usize> {
        match self.offsets {
            Some(offsets) => offsets[row] as usize..offsets[row + 1] as usize,
            None => row..row + 1,
        }
    }
}

/// Everything that stays the same from row to row.
struct Sweep<'a> {
    objective: &'a Objective,
    partition: &'a Partition,
    places: Vec<Place<'a>>,
    /// Columns of a row.
    stride: usize,
    /// Embeddings' width.
    width: usize,
    widths: &'a [(usize, f32)],
    scale: f32,
    bias: f32,
    ids: Option<&'a [u32]>,
    labels: Option<&'a [u32]>,
    segments: Option<&'a [u32]>,
    listed: Option<PositiveList<'a>>,
    listed_among: Candidates,
    scores: Option<&'a [f32]>,
    row_weights: Option<&'a [f32]>,
    upstream: Option<&'a [f32]>,
    average: f32,
    /// Queries and documents, for the similarity of a row's own pair.
    towers: [Option<Side<'a>>; 2],
    guide_width: usize,
    rows: usize,
    /// Whether gradients are wanted.
    backward: bool,
    /// Whether sums along columns are.
    along: bool,
}

/// What a row leaves beside its gradients.
struct RowOutput {
    loss: f64,
    d_log_scale: f64,
    d_bias: f64,
    /// By width.
    statistics: Vec<[f32; ROW_STATISTICS]>,
    /// By width and block: what its anchor's norm needs.
    along: Vec<f32>,
    /// The same of candidates that are the row's own: block, width, candidate.
    own_along: Vec<([usize; 3], f32)>,
}

/// Buffers of a task.
struct Scratch {
    /// By width: similarities.
    similarities: Vec<f32>,
    teacher: Vec<f32>,
    guide: Vec<f32>,
}

vectorised! {
    /// `row · column · values`, and `values − row − column` of half squares.
    fn normalise(values: &mut [f32], row: Option<f32>, columns: Option<&[f32]>, halves: Option<(f32, &[f32])>) {
        if let (Some(row), Some(columns)) = (row, columns) {
            for (value, column) in values.iter_mut().zip(columns) {
                *value *= row * *column;
            }
        }
        if let Some((row, columns)) = halves {
            for (value, column) in values.iter_mut().zip(columns) {
                *value -= row + *column;
            }
        }
    }
}

vectorised! {
    fn logits_of(similarities: &[f32], scale: f32, bias: f32, logits: &mut [f32]) {
        for (z, s) in logits.iter_mut().zip(similarities) {
            *z = multiply_add::<FUSED>(scale, *s, bias);
        }
    }
}

vectorised! {
    /// Leaves out what is above a threshold.
    fn mask_above(found: &[f32], threshold: f32, logits: &mut [f32]) {
        for (z, s) in logits.iter_mut().zip(found) {
            *z = if *s > threshold { NO_ENTRY } else { *z };
        }
    }
}

vectorised! {
    /// Leaves out where keys are equal, or where they are not.
    fn mask_keys(keys: &[u32], key: u32, equal: bool, logits: &mut [f32]) {
        for (z, other) in logits.iter_mut().zip(keys) {
            *z = if (*other == key) == equal { NO_ENTRY } else { *z };
        }
    }
}

vectorised! {
    /// (Σ g, Σ g·s)
    fn sums(gradient: &[f32], similarities: &[f32]) -> [f64; 2] {
        let (mut all, mut along) = (0.0, 0.0);
        for (gradient, similarities) in gradient.chunks(1024).zip(similarities.chunks(1024)) {
            let (mut plain, mut weighted) = ([0.0f32; LANES], [0.0f32; LANES]);
            for (gradient, similarities) in gradient.chunks(LANES).zip(similarities.chunks(LANES)) {
                for (lane, (g, s)) in gradient.iter().zip(similarities).enumerate() {
                    plain[lane] += *g;
                    weighted[lane] = multiply_add::<FUSED>(*g, *s, weighted[lane]);
                }
            }
            all += plain.into_iter().map(f64::from).sum::<f64>();
            along += weighted.into_iter().map(f64::from).sum::<f64>();
        }
        [all, along]
    }
}

vectorised! {
    /// `output += factor · gradient`, times the similarities if there are any.
    fn add_along(gradient: &[f32], similarities: &[f32], factor: f32, output: &mut [f32]) {
        if similarities.is_empty() {
            for (output, g) in output.iter_mut().zip(gradient) {
                *output = multiply_add::<FUSED>(factor, *g, *output);
            }
        } else {
            for ((output, g), s) in output.iter_mut().zip(gradient).zip(similarities) {
                *output = multiply_add::<FUSED>(factor * *g, *s, *output);
            }
        }
    }
}

thread_local! {
    /// Of candidates, in a task.
    static UNITS: Cell<Vec<f32>> = Cell::default();
    static QUERY_ANCHORS: Cell<Vec<f32>> = Cell::default();
    static DOCUMENT_ANCHORS: Cell<Vec<f32>> = Cell::default();
}

/// The anchors of a strip as they are compared.
enum Anchors<'a> {
    AsTheyAre(&'a [f32]),
    Units(Lent<Vec<f32>>),
}

impl Deref for Anchors<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::AsTheyAre(values) => values,
            Self::Units(values) => values,
        }
    }
}

impl<'a> Sweep<'a> {
    /// The columns of a width in a row of the workspace.
    fn columns(&self, w: usize, place: &Place<'_>) -> Range<usize> {
        w * self.stride + place.first..w * self.stride + place.first + place.width
    }

    /// The values between a width and the one before.
    fn segment(&self, w: usize) -> Range<usize> {
        let from = if w == 0 { 0 } else { self.widths[w - 1].0 };
        from..self.widths[w].0
    }

    fn embedding(&self, side: &Side<'a>, row: usize, range: Range<usize>) -> &'a [f32] {
        &side.values[row * self.width + range.start..row * self.width + range.end]
    }

    fn is_padding(&self, pair: usize) -> bool {
        self.segments.is_some_and(|segments| segments[pair] == PADDING)
    }

    /// Dot products of a strip's anchors with all candidates, in tiles.
    fn products(&self, strip: &Range<usize>, workspace: &mut [f32]) {
        let rows = strip.len();
        let full = self.stride * self.widths.len();
        // For each tile its columns at every width.
        let mut tasks: Vec<(usize, usize, Vec<MatMut<'_>>)> = Vec::new();
        let mut rest = MatMut::new(workspace, rows, full, full);
        for w in 0..self.widths.len() {
            let mut task = 0;
            for (p, place) in self.places.iter().enumerate() {
                let (columns, others) = rest.split_at_column(place.width);
                rest = others;
                if place.is_own() {
                    continue;
                }
                for (tile, piece) in columns.split_columns(TILE).into_iter().enumerate() {
                    if w == 0 {
                        tasks.push((p, tile, Vec::with_capacity(self.widths.len())));
                    }
                    tasks[task].2.push(piece);
                    task += 1;
                }
            }
        }
        let anchors = self.anchor_units(strip);
        tasks.into_par_iter().for_each_init(
            || Lent::from(&UNITS),
            |scratch, (p, tile, mut pieces)| {
                let place = &self.places[p];
                for w in 0..pieces.len() {
                    let segment = self.segment(w);
                    let (before, here) = pieces.split_at_mut(w);
                    let output = &mut here[0];
                    if let Some(before) = before.last_mut() {
                        output.copy_from(before);
                    }
                    let (_, columns) = output.extents();
                    let range = tile * TILE..tile * TILE + columns;
                    let candidates =
                        units(place.candidates.values, place.candidates.units, &range, self.width, scratch);
                    let anchors = &anchors[side_of_tower(place.block.anchor)][segment.start..];
                    let anchors = MatRef::new(anchors, rows, segment.len(), self.width);
                    let candidates = MatRef::new(&candidates[segment.start..], columns, segment.len(), self.width);
                    multiply(output.reborrow(), anchors, candidates.transposed(), 1.0, w > 0);
                }
            },
        );
    }

    /// The anchors of a strip as they are compared, by side.
    fn anchor_units(&self, strip: &Range<usize>) -> [Anchors<'a>; 2] {
        [0, 1].map(|tower| {
            let side = self.towers[tower].filter(|side| side.count >= strip.end);
            let Some(side) = side else { return Anchors::AsTheyAre(&[]) };
            if side.units.is_none() {
                return Anchors::AsTheyAre(&side.values[strip.start * self.width..strip.end * self.width]);
            }
            let mut scratch = Lent::from(if tower == 0 { &QUERY_ANCHORS } else { &DOCUMENT_ANCHORS });
            units(side.values, side.units, strip, self.width, &mut scratch);
            Anchors::Units(scratch)
        })
    }

    /// The norm of an embedding, 1 if there is none.
    fn unit(side: &Side<'_>, row: usize) -> f32 {
        side.units.map_or(1.0, |units| units[row])
    }

    /// The guide's similarities of a row.
    fn guide(&self, row: usize, output: &mut [f32]) {
        let g = self.guide_width;
        for place in &self.places {
            let output = &mut output[place.first..place.first + place.width];
            let (Some(anchors), Some(candidates)) = (place.anchors.guide, place.candidates.guide) else {
                output.fill(NO_ENTRY);
                continue;
            };
            let anchor = &anchors[row * g..(row + 1) * g];
            let range = if place.is_own() { place.own(row) } else { 0..place.candidates.count };
            for (output, c) in output.iter_mut().zip(range) {
                *output = dot(anchor, &candidates[c * g..(c + 1) * g]);
            }
        }
    }

    /// A row's positives: their columns and weights. They are never masked.
    fn positives(&self, row: usize, output: &mut Vec<(usize, f32)>) {
        output.clear();
        if self.is_padding(row) {
            return;
        }
        for place in &self.places {
            let (crosses, same) = (place.block.crosses_towers(), place.block.is_same_tower());
            match self.objective.positives_kind() {
                Positives::Own if place.block.holds_positive() => {
                    output.push((place.first + if place.is_own() { 0 } else { row }, 1.0));
                }
                Positives::Own => {}
                Positives::Labels if crosses || same => {
                    let Some(labels) = self.labels else { continue };
                    if place.is_own() {
                        output.push((place.first, 1.0));
                        continue;
                    }
                    let excluded = |c: usize| c == row && (same || place.block.scope == Scope::Others);
                    let together = |c: usize| self.segments.is_none_or(|segments| segments[c] == segments[row]);
                    let of_label = (0..labels.len()).filter(|&c| labels[c] == labels[row] && !excluded(c));
                    output.extend(of_label.filter(|&c| together(c)).map(|c| (place.first + c, 1.0)));
                }
                Positives::Labels => {}
                Positives::Listed if place.block.candidates == self.listed_among => {
                    let Some(PositiveList { offsets, candidates, weights }) = self.listed else { continue };
                    let start = output.len();
                    for at in offsets[row] as usize..offsets[row + 1] as usize {
                        let (column, weight) =
                            (place.first + candidates[at] as usize, weights.map_or(1.0, |weights| weights[at]));
                        // What is listed twice weighs twice.
                        match output[start..].iter_mut().find(|(other, _)| *other == column) {
                            Some((_, sum)) => *sum += weight,
                            None => output.push((column, weight)),
                        }
                    }
                }
                Positives::Listed => {}
            }
        }
    }

    /// The similarity of a row's own pair, as it stands in the row if it does.
    fn own_similarity(&self, row: usize, w: usize, similarities: &[f32]) -> f32 {
        let held = self.places.iter().find(|place| place.block.holds_positive());
        if let Some(place) = held {
            return similarities[place.first + if place.is_own() { 0 } else { row }];
        }
        let [Some(queries), Some(documents)] = &self.towers else { return 0.0 };
        let range = 0..self.widths[w].0;
        let (query, document) = (self.embedding(queries, row, range.clone()), self.embedding(documents, row, range));
        let mut value = [scaled_dot(query, Self::unit(queries, row), document, Self::unit(documents, row))];
        let at = |norms: Option<&[f32]>, side: &Side<'_>| norms.map(|norms| norms[w * side.count + row]);
        let column = at(documents.inverse_norms, documents);
        let half = at(queries.half_squares, queries).zip(at(documents.half_squares, documents));
        normalise(
            &mut value,
            at(queries.inverse_norms, queries),
            column.as_ref().map(std::slice::from_ref),
            half.as_ref().map(|(row, column)| (*row, std::slice::from_ref(column))),
        );
        value[0]
    }

    /// Leaves out what is no entry of a row. Positives are put back afterwards.
    fn mask(&self, row: usize, w: usize, similarities: &[f32], guide: &[f32], logits: &mut [f32]) {
        if self.is_padding(row) {
            logits.fill(NO_ENTRY);
            return;
        }
        for place in &self.places {
            let Place { block, first, width, .. } = *place;
            let logits = &mut logits[first..first + width];
            let tower = block.crosses_towers() || block.is_same_tower();
            let by_pair = tower && self.objective.positives_kind() != Positives::Listed;
            if place.is_own() {
                logits[place.own(row).len()..].fill(NO_ENTRY);
                continue;
            }
            if let Some(segments) = self.segments {
                match place.offsets {
                    Some(offsets) => {
                        for (pair, &segment) in segments.iter().enumerate() {
                            if segment != segments[row] {
                                logits[offsets[pair] as usize..offsets[pair + 1] as usize].fill(NO_ENTRY);
                            }
                        }
                    }
                    None if tower => mask_keys(segments, segments[row], false, logits),
                    None => {}
                }
            }
            if block.is_same_tower() || (block.scope == Scope::Others && by_pair) {
                logits[row] = NO_ENTRY;
            }
            if let (Scope::Others, Some(offsets)) = (block.scope, place.offsets) {
                logits[offsets[row] as usize..offsets[row + 1] as usize].fill(NO_ENTRY);
            }
            if let (Some(ids), true) = (self.ids, by_pair) {
                mask_keys(ids, ids[row], true, logits);
            }
        }
        if let Some(FalseNegatives { threshold, judge }) = self.objective.false_negatives_rule() {
            let (found, positive) = match judge {
                Judge::Similarity => (similarities, self.own_similarity(row, w, similarities)),
                Judge::Guide => {
                    let [Some(queries), Some(documents)] = &self.towers else { return };
                    let (Some(queries), Some(documents)) = (queries.guide, documents.guide) else { return };
                    let range = row * self.guide_width..(row + 1) * self.guide_width;
                    (guide, dot(&queries[range.clone()], &documents[range]))
                }
            };
            let threshold = match threshold {
                Threshold::Above(margin) => positive + margin as f32,
                Threshold::Ratio(ratio) => positive - (1.0 - ratio as f32) * positive.abs(),
            };
            mask_above(found, threshold, logits);
        }
    }

    /// Adds what hardness weighting adds to the logits of a row.
    fn weigh_hardness(&self, row: usize, hardness: Hardness, similarities: &[f32], logits: &mut [f32]) {
        for place in &self.places {
            let documents = match (place.block.anchor, place.block.candidates) {
                (Tower::Query, Candidates::Documents) => true,
                (Tower::Query, Candidates::HardNegatives) => false,
                _ => continue,
            };
            let own = match self.objective.positives_kind() {
                // Listed documents belong to nobody.
                Positives::Listed if documents => 0..0,
                _ if place.is_own() => 0..place.own(row).len(),
                _ => place.own(row),
            };
            let (inside, outside) = match hardness.scope {
                HardnessScope::InBatch => (false, true),
                HardnessScope::HardNegatives => (!documents, false),
                HardnessScope::All => (!documents, true),
            };
            let columns = place.first..place.first + place.width;
            let (similarities, logits) = (&similarities[columns.clone()], &mut logits[columns]);
            let own = own.start.min(logits.len())..own.end.min(logits.len());
            let mut add = |range: Range<usize>| {
                add_along(&similarities[range.clone()], &[], hardness.strength as f32, &mut logits[range]);
            };
            if outside {
                add(0..own.start);
                add(own.end..place.width);
            }
            if inside {
                add(own);
            }
        }
    }

    /// A row from dot products to gradients.
    fn row(&self, row: usize, values: &mut [f32], scratch: &mut Scratch, columns_along: &mut [f32]) -> RowOutput {
        let stride = self.stride;
        let hardness = self.objective.hardness_weighting();
        let margin = self.objective.margin_value() as f32;
        let row_weight = self.row_weights.map_or(1.0, |weights| f64::from(weights[row]));
        let mut out = RowOutput {
            loss: 0.0,
            d_log_scale: 0.0,
            d_bias: 0.0,
            statistics: Vec::with_capacity(self.widths.len()),
            along: vec![0.0; if self.along { self.widths.len() * self.places.len() } else { 0 }],
            own_along: Vec::new(),
        };
        let mut positives = Vec::new();
        self.positives(row, &mut positives);
        if !scratch.guide.is_empty() {
            self.guide(row, &mut scratch.guide);
        }
        for (w, &(width, width_weight)) in self.widths.iter().enumerate() {
            let logits = &mut values[w * stride..(w + 1) * stride];
            for place in &self.places {
                let here = &mut logits[place.first..place.first + place.width];
                let range = if place.is_own() { place.own(row) } else { 0..place.candidates.count };
                if place.is_own() {
                    here.fill(0.0);
                    let anchor = self.embedding(&place.anchors, row, 0..width);
                    for (value, c) in here.iter_mut().zip(range.clone()) {
                        let candidate = self.embedding(&place.candidates, c, 0..width);
                        *value = scaled_dot(
                            anchor,
                            Self::unit(&place.anchors, row),
                            candidate,
                            Self::unit(&place.candidates, c),
                        );
                    }
                }
                let of_row = |norms: Option<&'a [f32]>| norms.map(|norms| norms[w * place.anchors.count + row]);
                let count = place.candidates.count;
                let of_columns = |norms: Option<&'a [f32]>| {
                    norms.map(|norms| &norms[w * count + range.start..w * count + range.end])
                };
                let halves = of_row(place.anchors.half_squares).zip(of_columns(place.candidates.half_squares));
                normalise(
                    here,
                    of_row(place.anchors.inverse_norms),
                    of_columns(place.candidates.inverse_norms),
                    halves,
                );
            }
            let similarities = &mut scratch.similarities[w * stride..(w + 1) * stride];
            similarities.copy_from_slice(logits);
            logits_of(similarities, self.scale, self.bias, logits);
            if let Some(hardness) = hardness {
                self.weigh_hardness(row, hardness, similarities, logits);
            }
            self.mask(row, w, similarities, &scratch.guide, logits);
            for &(at, _) in &positives {
                logits[at] = multiply_add::<false>(self.scale, similarities[at], self.bias) - margin;
            }
            let teacher = match self.objective.target_kind() {
                Target::Positives => None,
                Target::Scores { scale } => {
                    let scores = self.scores.unwrap_or(&[]);
                    scratch.teacher.copy_from_slice(&scores[row * stride..(row + 1) * stride]);
                    scratch.teacher.iter_mut().for_each(|score| *score *= scale as f32);
                    Some(&mut scratch.teacher[..])
                }
                Target::Guide { scale } => {
                    for (teacher, guide) in scratch.teacher.iter_mut().zip(&scratch.guide) {
                        *teacher = scale as f32 * *guide;
                    }
                    Some(&mut scratch.teacher[..])
                }
            };
            let weight = row_weight * f64::from(width_weight) * self.partition.weight;
            let factor = match self.upstream {
                Some(upstream) => f64::from(upstream[w * self.rows + row]),
                None => weight * f64::from(self.average),
            };
            let evaluated = evaluate(
                self.partition.function,
                Row {
                    logits,
                    positives: &positives,
                    teacher,
                    smoothing: self.objective.label_smoothing_value(),
                    own: f64::from(self.scale),
                    factor: self.backward.then_some(factor),
                },
            );
            out.loss += weight * evaluated.loss;
            let row_function::Outcome { loss, log_sum_exp, entries, negatives, positive, hardest, rank, own } =
                evaluated;
            out.statistics
                .push([loss, log_sum_exp, entries, negatives, positive, hardest, rank, 0.0].map(|value| value as f32));
            if self.backward {
                let [all, along] = sums(logits, similarities);
                out.d_bias += all;
                out.d_log_scale += f64::from(self.scale) * (along + own);
                self.finish(row, w, logits, similarities, &mut out, columns_along);
            }
        }
        if self.backward {
            // Values between two widths belong to every prefix from the second on.
            for w in (1..self.widths.len()).rev() {
                let (before, here) = values.split_at_mut(w * stride);
                super::simd::add(&here[..stride], &mut before[(w - 1) * stride..]);
            }
        }
        out
    }

    /// Notes what the norms of anchor and candidates need of a row's gradients, and turns these into gradients of the
    /// dot products.
    fn finish(
        &self,
        row: usize,
        w: usize,
        gradient: &mut [f32],
        similarities: &[f32],
        out: &mut RowOutput,
        columns_along: &mut [f32],
    ) {
        if !self.along {
            return;
        }
        let halves = self.objective.similarity_kind() == Similarity::SquaredL2;
        for (p, place) in self.places.iter().enumerate() {
            let here = place.first..place.first + place.width;
            let similarities = if halves { &[][..] } else { &similarities[here.clone()] };
            let gradient = &mut gradient[here];
            let sum = if halves { sums(gradient, gradient)[0] } else { sums(gradient, similarities)[1] };
            out.along[w * self.places.len() + p] = self.scale * sum as f32;
            let count = place.candidates.count;
            let range = if place.is_own() { place.own(row) } else { 0..count };
            if place.is_own() {
                for (k, candidate) in range.clone().enumerate() {
                    let factor = similarities.get(k).map_or(1.0, |similarity| *similarity);
                    out.own_along.push(([p, w, candidate], self.scale * gradient[k] * factor));
                }
            } else {
                add_along(gradient, similarities, self.scale, &mut columns_along[self.columns(w, place)]);
            }
            if let (Some(rows), Some(columns)) = (place.anchors.inverse_norms, place.candidates.inverse_norms) {
                let columns = &columns[w * count + range.start..w * count + range.end];
                normalise(gradient, Some(rows[w * place.anchors.count + row]), Some(columns), None);
            }
        }
    }
}

/// A side's gradient in host memory.
struct Gradient<'a> {
    values: &'a mut [f32],
    along: Option<&'a mut [f32]>,
}

pub(super) fn forward_backward(arguments: RowSweep<'_>) -> Result<()> {
    let nested = arguments.is_nested();
    let RowSweep { objective, widths, sides, .. } = arguments;
    let device = arguments.log_scale.device();
    let partition = &objective.partitions()[arguments.partition];
    let float = |argument: &'static str, tensor: Option<_>| -> Result<Option<&[f32]>> {
        tensor.map(|tensor| read::<f32>(OPERATION, argument, tensor)).transpose()
    };
    let keys = |argument: &'static str, tensor: Option<_>| -> Result<Option<&[u32]>> {
        tensor.map(|tensor| read::<u32>(OPERATION, argument, tensor)).transpose()
    };
    let mut here: [Option<Side<'_>>; 5] = [None; 5];
    let mut gradients: [Option<Gradient<'_>>; 5] = [const { None }; 5];
    let (mut width, mut guide_width) = (0, 0);
    for (s, side) in sides.into_iter().enumerate() {
        let Some(RowSweepSide { embeddings, inverse_norms, half_squares, guide, gradient, along }) = side else {
            continue;
        };
        width = embeddings.shape().width();
        guide_width = guide.map_or(guide_width, |guide| guide.shape().width());
        here[s] = Some(Side {
            values: read(OPERATION, "embeddings", embeddings)?,
            count: embeddings.shape().rows(),
            units: float("inverse_norms", inverse_norms.filter(|_| !nested))?,
            inverse_norms: float("inverse_norms", inverse_norms.filter(|_| nested))?,
            half_squares: float("half_squares", half_squares)?,
            guide: float("guide", guide)?,
        });
        if let Some(gradient) = gradient {
            let along = along.map(|along| write::<f32>(OPERATION, "along", along)).transpose()?;
            gradients[s] = Some(Gradient { values: write(OPERATION, "gradient", gradient)?, along });
        }
    }
    let offsets = [
        None,
        None,
        keys("hard_negative_offsets", arguments.hard_negative_offsets)?,
        keys("hard_query_offsets", arguments.hard_query_offsets)?,
        None,
    ];
    let most = [1, 1, arguments.most_hard_negatives, arguments.most_hard_queries, 0];
    let mut places: Vec<Place<'_>> = Vec::new();
    let mut stride = 0;
    for &block in &partition.blocks {
        let (anchors, candidates) = (here[side_of_tower(block.anchor)], here[side_of(block.candidates)]);
        let (Some(anchors), Some(candidates)) = (anchors, candidates) else { continue };
        let (offsets, most) = (offsets[side_of(block.candidates)], most[side_of(block.candidates)]);
        if let Some(offsets) = offsets {
            let rise = offsets.is_sorted() && offsets.first() == Some(&0);
            let ends = rise && offsets.last().map(|&last| last as usize) == Some(candidates.count);
            if !ends || offsets.windows(2).any(|pair| (pair[1] - pair[0]) as usize > most) {
                let reason = format!("must rise from 0 to {} by at most {most}", candidates.count);
                return Err(Error::value(OPERATION, "offsets", reason));
            }
        }
        let width = match (block.scope, offsets) {
            (Scope::Own, Some(_)) => most,
            (Scope::Own, None) => 1,
            _ => candidates.count,
        };
        places.push(Place { block, anchors, candidates, first: stride, width, offsets });
        stride += width;
    }
    // As many as there are queries: documents are anchors only where each belongs to a query.
    let rows = here[side_of_tower(Tower::Query)].map_or(0, |queries| queries.count);
    let listed = match arguments.positives {
        Some(positives) => Some(PositiveList {
            offsets: read::<u32>(OPERATION, "positive offsets", positives.offsets)?,
            candidates: read::<u32>(OPERATION, "positive candidates", positives.candidates)?,
            weights: float("positive weights", positives.weights)?,
        }),
        None => None,
    };
    let scores = float("scores", arguments.scores)?;
    if scores.is_some_and(|scores| scores.len() != rows * stride) {
        let found = scores.map_or(0, <[f32]>::len) / rows.max(1);
        return Err(Error::shape(OPERATION, "scores", [rows, stride], [rows, found]));
    }
    let sweep = Sweep {
        objective,
        partition,
        stride,
        width,
        widths,
        scale: read::<f32>(OPERATION, "log_scale", arguments.log_scale)?[0].exp(),
        bias: float("bias", arguments.bias)?.map_or(0.0, |bias| bias[0]),
        ids: keys("ids", arguments.ids)?,
        labels: keys("labels", arguments.labels)?,
        segments: keys("segments", arguments.segments)?,
        listed,
        listed_among: if objective.uses_documents() { Candidates::Documents } else { Candidates::Bank },
        scores,
        row_weights: float("row_weights", arguments.row_weights)?,
        upstream: float("upstream", arguments.upstream)?,
        average: arguments.average,
        towers: [here[0], here[1]],
        guide_width,
        rows,
        backward: arguments.d_log_scale.is_some(),
        along: gradients.iter().flatten().any(|gradient| gradient.along.is_some()),
        places,
    };
    let mut losses = arguments.losses.map(|tensor| write::<f32>(OPERATION, "losses", tensor)).transpose()?;
    let mut statistics = match arguments.statistics {
        Some(tensor) => Some(write::<f32>(OPERATION, "statistics", tensor)?.as_chunks_mut::<ROW_STATISTICS>().0),
        None => None,
    };
    let mut d_log_scale =
        arguments.d_log_scale.map(|tensor| write::<f32>(OPERATION, "d_log_scale", tensor)).transpose()?;
    let mut d_bias = arguments.d_bias.map(|tensor| write::<f32>(OPERATION, "d_bias", tensor)).transpose()?;

    if stride == 0 {
        // No row has an entry.
        if let Some(statistics) = statistics {
            statistics.fill([0.0, NO_ENTRY, 0.0, 0.0, NO_ENTRY, NO_ENTRY, 0.0, 0.0]);
        }
        return Ok(());
    }
    let full = stride * widths.len();
    let height = (WORKSPACE / full.max(1)).clamp(1, STRIP);
    let height = if height > TASK_ROWS { height - height % TASK_ROWS } else { height };
    let mut workspace = device.empty([height.min(rows), full], DType::F32)?;
    let workspace = write::<f32>(OPERATION, "workspace", &mut workspace)?;
    for first in (0..rows).step_by(height) {
        let strip = first..rows.min(first + height);
        let workspace = &mut workspace[..strip.len() * full];
        sweep.products(&strip, workspace);
        let outputs = sweep.rows_of_strip(&strip, workspace);
        for (row, out) in strip.clone().zip(&outputs.rows) {
            if let Some(losses) = &mut losses {
                losses[row] += out.loss as f32;
            }
            if let Some(statistics) = &mut statistics {
                for (w, of_width) in out.statistics.iter().enumerate() {
                    statistics[w * rows + row] = *of_width;
                }
            }
            if let Some(d_log_scale) = &mut d_log_scale {
                d_log_scale[row] += out.d_log_scale as f32;
            }
            if let Some(d_bias) = &mut d_bias {
                d_bias[row] += out.d_bias as f32;
            }
        }
        if sweep.backward {
            sweep.add_along(&strip, &outputs, &mut gradients);
            sweep.candidate_gradients(&strip, workspace, &mut gradients);
            sweep.scale_by_norms(workspace);
            sweep.anchor_gradients(&strip, workspace, &mut gradients);
        }
    }
    Ok(())
}

/// What the rows of a strip leave.
struct StripOutput {
    rows: Vec<RowOutput>,
    /// By width and column, of all rows.
    columns_along: Vec<f32>,
}

impl Sweep<'_> {
    fn rows_of_strip(&self, strip: &Range<usize>, workspace: &mut [f32]) -> StripOutput {
        let full = self.stride * self.widths.len();
        let uses_guide = self.objective.uses_guide();
        let teacher = self.objective.target_kind() != Target::Positives;
        let scratch = || Scratch {
            similarities: vec![0.0; full],
            teacher: vec![0.0; if teacher { self.stride } else { 0 }],
            guide: vec![0.0; if uses_guide { self.stride } else { 0 }],
        };
        let along = if self.along { full } else { 0 };
        let parts: Vec<(Vec<RowOutput>, Vec<f32>)> = workspace
            .par_chunks_mut(TASK_ROWS * full.max(1))
            .enumerate()
            .map_init(scratch, |scratch, (task, values)| {
                let mut columns_along = vec![0.0; along];
                let rows = values.chunks_exact_mut(full.max(1)).enumerate().map(|(r, values)| {
                    self.row(strip.start + task * TASK_ROWS + r, values, scratch, &mut columns_along)
                });
                (rows.collect(), columns_along)
            })
            .collect();
        let mut out = StripOutput { rows: Vec::with_capacity(strip.len()), columns_along: vec![0.0; along] };
        for (rows, columns_along) in parts {
            out.rows.extend(rows);
            super::simd::add(&columns_along, &mut out.columns_along);
        }
        out
    }

    /// Adds what the norms need to their sides.
    fn add_along(&self, strip: &Range<usize>, outputs: &StripOutput, gradients: &mut [Option<Gradient<'_>>; 5]) {
        if !self.along {
            return;
        }
        for (p, place) in self.places.iter().enumerate() {
            let of_side = |gradients: &mut [Option<Gradient<'_>>; 5], side: usize, add: &mut dyn FnMut(&mut [f32])| {
                if let Some(along) = gradients[side].as_mut().and_then(|gradient| gradient.along.as_deref_mut()) {
                    add(along);
                }
            };
            of_side(gradients, side_of_tower(place.block.anchor), &mut |along| {
                for (row, out) in strip.clone().zip(&outputs.rows) {
                    for w in 0..self.widths.len() {
                        along[w * place.anchors.count + row] += out.along[w * self.places.len() + p];
                    }
                }
            });
            let count = place.candidates.count;
            of_side(gradients, side_of(place.block.candidates), &mut |along| {
                if place.is_own() {
                    for &([_, w, candidate], value) in
                        outputs.rows.iter().flat_map(|row| &row.own_along).filter(|([of, ..], _)| *of == p)
                    {
                        along[w * count + candidate] += value;
                    }
                } else {
                    for w in 0..self.widths.len() {
                        let columns = &outputs.columns_along[self.columns(w, place)];
                        super::simd::add(columns, &mut along[w * count..(w + 1) * count]);
                    }
                }
            });
        }
    }

    /// `d_candidates += σ · Gᵀ · anchors`
    fn candidate_gradients(&self, strip: &Range<usize>, workspace: &[f32], gradients: &mut [Option<Gradient<'_>>; 5]) {
        let (d, full) = (self.width, self.stride * self.widths.len());
        let anchors = self.anchor_units(strip);
        for place in &self.places {
            let Some(gradient) = &mut gradients[side_of(place.block.candidates)] else { continue };
            if place.is_own() {
                let (first, last) = (place.own(strip.start).start, place.own(strip.end - 1).end);
                let ranges = strip.clone().map(|row| place.own(row));
                let pieces = split_rows(&mut gradient.values[first * d..last * d], d, ranges);
                pieces.into_par_iter().zip(strip.clone()).for_each(|(piece, row)| {
                    let values = &workspace[(row - strip.start) * full..][..full];
                    for w in 0..self.widths.len() {
                        let segment = self.segment(w);
                        let anchor = self.embedding(&place.anchors, row, segment.clone());
                        let of_width = &values[self.columns(w, place)];
                        for (d_candidate, g) in piece.chunks_exact_mut(d).zip(of_width) {
                            let norm = Self::unit(&place.anchors, row);
                            add_unit(self.scale * g, anchor, norm, &mut d_candidate[segment.clone()]);
                        }
                    }
                });
                continue;
            }
            gradient.values.par_chunks_mut(TILE * d).enumerate().for_each(|(tile, d_candidates)| {
                let count = d_candidates.len() / d;
                for w in 0..self.widths.len() {
                    let segment = self.segment(w);
                    let from = self.columns(w, place).start + tile * TILE;
                    let coefficients = MatRef::new(&workspace[from..], strip.len(), count, full).transposed();
                    let anchors = &anchors[side_of_tower(place.block.anchor)][segment.start..];
                    let anchors = MatRef::new(anchors, strip.len(), segment.len(), d);
                    let output = MatMut::new(&mut d_candidates[segment.start..], count, segment.len(), d);
                    multiply(output, coefficients, anchors, self.scale, true);
                }
            });
        }
    }

    /// Multiplies the gradients of the logits with the norms of the candidates, so that the product with the
    /// candidates as they are is that with the candidates as they are compared.
    fn scale_by_norms(&self, workspace: &mut [f32]) {
        workspace.par_chunks_exact_mut(self.stride.max(1)).for_each(|row| {
            for place in self.places.iter().filter(|place| !place.is_own()) {
                if let Some(norms) = place.candidates.units {
                    scale_columns(&mut row[place.first..place.first + place.width], norms);
                }
            }
        });
    }

    /// `d_anchors += σ · G · candidates`
    fn anchor_gradients(&self, strip: &Range<usize>, workspace: &[f32], gradients: &mut [Option<Gradient<'_>>; 5]) {
        let (d, full) = (self.width, self.stride * self.widths.len());
        for place in &self.places {
            let Some(gradient) = &mut gradients[side_of_tower(place.block.anchor)] else { continue };
            let d_strip = &mut gradient.values[strip.start * d..strip.end * d];
            if place.is_own() {
                d_strip.par_chunks_exact_mut(d).zip(strip.clone()).for_each(|(d_anchor, row)| {
                    let values = &workspace[(row - strip.start) * full..][..full];
                    for w in 0..self.widths.len() {
                        let segment = self.segment(w);
                        for (candidate, g) in place.own(row).zip(&values[self.columns(w, place)]) {
                            let norm = Self::unit(&place.candidates, candidate);
                            let candidate = self.embedding(&place.candidates, candidate, segment.clone());
                            add_unit(self.scale * g, candidate, norm, &mut d_anchor[segment.clone()]);
                        }
                    }
                });
                continue;
            }
            d_strip.par_chunks_mut(ANCHOR_ROWS * d).enumerate().for_each(|(task, d_anchors)| {
                let count = d_anchors.len() / d;
                for w in 0..self.widths.len() {
                    let segment = self.segment(w);
                    let from = task * ANCHOR_ROWS * full + self.columns(w, place).start;
                    let coefficients = MatRef::new(&workspace[from..], count, place.width, full);
                    let candidates = MatRef::new(
                        &place.candidates.values[segment.start.min(place.candidates.values.len())..],
                        place.width,
                        segment.len(),
                        d,
                    );
                    let output = MatMut::new(&mut d_anchors[segment.start..], count, segment.len(), d);
                    multiply(output, coefficients, candidates, self.scale, true);
                }
            });
        }
    }
}
