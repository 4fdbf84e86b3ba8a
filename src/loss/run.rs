//! One evaluation of an objective on a device.

use super::batch::dense_keys;
use super::outputs::{Outputs, empty_in, zeros_in};
use super::unit::Unit;
use super::{Batch, LossAndGradients};
use crate::backend::operations::{
    Add, AggregateRows, Clamp, ClampBackward, Column, L2NormGradient, PADDING, Partition, PositiveTensors,
    PositivesBackward, PositivesForward, PrefixNorm, PrefixNormsBackward, PrefixNormsForward, ROW_STATISTICS, RowSweep,
    RowSweepSide, STATISTICS, SimilarityMatrix, SimilaritySweepBackward, SimilaritySweepForward, SimilaritySweepOneWay,
    Sum, side_of,
};
use crate::error::{DType, Shape};
use crate::objective::plan::{Mask, Plan, Side, Sweep};
use crate::objective::relations::{Relations, offsets_or_even};
use crate::objective::{Aggregate, Candidates, Positives, Reduction, Target, Tower};
use crate::{Device, Objective, Result, Similarity, Tensor};

/// Numbers that are kept from the forward sweeps for the backward ones at most: 160 MiB.
const KEPT: usize = 40 << 20;
/// Where that would be less than this part of all, it is not worth its memory, and nothing is kept.
const WORTH_KEEPING: usize = 8;
/// No device cuts matrices into larger tiles than that.
const LARGEST_TILE: usize = 256;

/// What is asked of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Loss,
    Gradients,
    Statistics,
}

/// One kind of embeddings: its vectors as they are compared, and how they were made.
struct Vectors {
    /// (n, d)
    values: Tensor,
    /// The shape the caller gave them in.
    shape: Shape,
    /// (W, n), of nested widths and squared distances.
    prefix_norms: Option<(PrefixNorm, Tensor)>,
    /// (n, g)
    guide: Option<Tensor>,
    /// (n, d), if it is wanted.
    gradient: Option<Tensor>,
    along: Option<Tensor>,
}

impl Vectors {
    /// With the room for a gradient if one is wanted, and the memory it may use.
    fn new(
        run: &Setting<'_>,
        tensor: &Tensor,
        guide: Option<&Tensor>,
        gradient: Option<Option<Tensor>>,
    ) -> Result<Self> {
        let device = run.device;
        let d = run.width;
        let flat = tensor.reshape([tensor.elements() / d, d])?.cast(DType::F32)?;
        let n = flat.shape().rows();
        let guide = match guide {
            Some(guide) => {
                let g = guide.elements() / n.max(1);
                Some(Unit::normalised(device, &guide.reshape([n, g])?.cast(DType::F32)?)?.values)
            }
            None => None,
        };
        let norm = match run.objective.similarity_kind() {
            Similarity::Cosine => Some(PrefixNorm::Inverse),
            Similarity::Dot => None,
            Similarity::SquaredL2 => Some(PrefixNorm::HalfSquare),
        };
        let shape = tensor.shape().clone();
        let gradient = gradient.map(|old| zeros_in(device, old, [n, d])).transpose()?;
        let mut this = Self { values: flat, shape, prefix_norms: None, guide, gradient, along: None };
        if let Some(norm) = norm {
            let mut output = device.empty([run.widths.len(), n], DType::F32)?;
            let widths: Vec<usize> = run.widths.iter().map(|&(width, _)| width).collect();
            let input = &this.values;
            device.prefix_norms_forward(PrefixNormsForward { input, widths: &widths, norm, output: &mut output })?;
            this.prefix_norms = Some((norm, output));
            let along = this.gradient.is_some()
                && (norm == PrefixNorm::HalfSquare || !matches!(run.widths[..], [(only, _)] if only == d));
            this.along = if along { Some(device.zeros([run.widths.len(), n])?) } else { None };
        }
        Ok(this)
    }

    /// From the gradient of the vectors as they are compared to that of the input; of frozen ones zeros.
    fn backward(self, run: &Setting<'_>, old: Option<Tensor>) -> Result<Tensor> {
        let device = run.device;
        let Some(mut gradient) = self.gradient else { return zeros_in(device, old, self.shape) };
        if let (Some((norm, norms)), Some(along)) = (&self.prefix_norms, &self.along) {
            let widths: Vec<usize> = run.widths.iter().map(|&(width, _)| width).collect();
            device.prefix_norms_backward(PrefixNormsBackward {
                input: &self.values,
                widths: &widths,
                along,
                inverse_norms: (*norm == PrefixNorm::Inverse).then_some(norms),
                d_input: &mut gradient,
            })?;
        }
        if let (Some(_), None) = (&self.prefix_norms, &self.along) {
            device.l2_norm_gradient(L2NormGradient { input: &self.values, gradient: &mut gradient })?;
        }
        gradient.reshape(self.shape)
    }
}

/// Row and column keys whose equality masks an entry.
type Keys = (Tensor, Tensor);

/// What stays the same through an evaluation.
struct Setting<'a> {
    objective: &'a Objective,
    device: &'a Device,
    /// d
    width: usize,
    widths: Vec<(usize, f32)>,
    /// What gradients are multiplied with over losses.
    average: f32,
    log_scale: Tensor,
}

/// What the batch says of its pairs, on the device.
struct RelationTensors {
    ids: Option<Tensor>,
    labels: Option<Tensor>,
    segments: Option<Tensor>,
    hard_negative_offsets: Tensor,
    hard_query_offsets: Tensor,
    most_hard_negatives: usize,
    most_hard_queries: usize,
    positives: Option<(Tensor, Tensor, Option<Tensor>)>,
}

impl RelationTensors {
    fn new(device: &Device, relations: &Relations<'_>, n: usize, negatives: usize, queries: usize) -> Result<Self> {
        let upload = |keys: &[u32]| device.tensor(keys, [keys.len()]);
        let keys = |ids: Option<&[i64]>| ids.map(|ids| upload(&dense_keys(ids))).transpose();
        let segments = if relations.segments.is_some() || relations.valid.is_some() {
            let mut segments = relations.segment_of_pairs(n);
            for (pair, segment) in segments.iter_mut().enumerate() {
                *segment = if relations.is_valid(pair) { *segment } else { PADDING };
            }
            Some(upload(&segments)?)
        } else {
            None
        };
        let negatives = offsets_or_even(relations.hard_negative_offsets, n, negatives);
        let queries = offsets_or_even(relations.hard_query_offsets, n, queries);
        let most = |offsets: &[u32]| offsets.windows(2).map(|ends| (ends[1] - ends[0]) as usize).max().unwrap_or(0);
        Ok(Self {
            ids: keys(relations.ids)?,
            labels: keys(relations.labels)?,
            segments,
            hard_negative_offsets: upload(&negatives)?,
            hard_query_offsets: upload(&queries)?,
            most_hard_negatives: most(&negatives),
            most_hard_queries: most(&queries),
            positives: match relations.positives {
                Some(list) => Some((
                    upload(list.offsets)?,
                    upload(list.candidates)?,
                    list.weights.map(|weights| device.tensor(weights, [weights.len()])).transpose()?,
                )),
                None => None,
            },
        })
    }
}

/// An evaluation.
pub(super) struct Run<'a> {
    setting: Setting<'a>,
    batch: Batch<'a>,
    plan: Plan,
    /// In the order of [`side_of`].
    sides: [Option<Vectors>; 5],
    relations: RelationTensors,
    group_keys: Option<Keys>,
    bias: Option<Tensor>,
    raw_log_scale: Tensor,
    /// Of each swept partition.
    coefficients: Vec<Option<Tensor>>,
    /// Of the logits of the positives.
    gradient: Tensor,
    d_log_scale: Tensor,
    d_bias: Tensor,
    losses: Tensor,
    /// Those of rows that are not averaged.
    losses_apart: Tensor,
    pub(super) rows: usize,
    pub(super) loss: Tensor,
    /// Memory for the outputs.
    spare: Outputs,
    /// Of each partition: of row sweeps what [`RowSweep::statistics`] says, of sweeps their coefficients.
    pub(super) statistics: Vec<Tensor>,
}

fn side_of_plan(side: Side) -> usize {
    side_of(match side {
        Side::Queries => Candidates::Queries,
        Side::Documents => Candidates::Documents,
        Side::HardNegatives => Candidates::HardNegatives,
    })
}

impl<'a> Run<'a> {
    /// Results may be written into the memory of earlier ones, which are taken once the batch is known to fit.
    pub(super) fn new(
        objective: &'a Objective,
        device: &'a Device,
        batch: Batch<'a>,
        wanted: Wanted,
        outputs: Option<&mut LossAndGradients>,
    ) -> Result<Self> {
        let (rows, width) = batch.check(device, objective)?;
        let mut spare = outputs.map(|outputs| outputs.take(device)).transpose()?.unwrap_or_default();
        let raw_log_scale = match batch.log_scale {
            Some(log_scale) => log_scale.clone(),
            None => device.tensor(&[objective.log_scale() as f32], [1])?,
        };
        let log_scale = match objective.largest_scale_value() {
            Some(largest) => {
                let mut clamped = device.empty([1], DType::F32)?;
                let largest = largest.ln() as f32;
                device.clamp(Clamp { input: &raw_log_scale, largest, output: &mut clamped })?;
                clamped
            }
            None => raw_log_scale.clone(),
        };
        let valid = (0..rows).filter(|&i| batch.relations.is_valid(i)).count();
        let widths = match objective.width_weights() {
            [] => vec![(width, 1.0)],
            widths => widths.iter().map(|&(width, weight)| (width, weight as f32)).collect(),
        };
        let average = if objective.reduction_kind() == Reduction::Mean { 1.0 / valid.max(1) as f32 } else { 1.0 };
        let setting = Setting { objective, device, width, widths, average, log_scale };

        let backward = wanted == Wanted::Gradients;
        let guide = batch.guide.filter(|_| objective.uses_guide());
        let towers = [
            (Some(batch.queries), guide.map(|guide| guide.queries), Some(Tower::Query)),
            (batch.documents, guide.map(|guide| guide.documents), Some(Tower::Document)),
            (batch.hard_negatives, guide.and_then(|guide| guide.hard_negatives), Some(Tower::Document)),
            (batch.hard_queries, None, Some(Tower::Query)),
            (batch.bank, None, None),
        ];
        let mut sides: [Option<Vectors>; 5] = [const { None }; 5];
        for (s, (tensor, guide, tower)) in towers.into_iter().enumerate() {
            let Some(tensor) = tensor.filter(|tensor| tensor.elements() > 0) else { continue };
            let trained = tower.is_some() && tower != objective.frozen_tower();
            let gradient = (backward && trained).then(|| spare.gradients[s].take());
            sides[s] = Some(Vectors::new(&setting, tensor, guide, gradient)?);
        }
        let count = |side: &Option<Vectors>| side.as_ref().map_or(0, |side| side.values.shape().rows());
        let (negatives, queries) = (count(&sides[2]), count(&sides[3]));
        let relations = RelationTensors::new(device, &batch.relations, rows, negatives, queries)?;
        let mut plan = objective.plan(negatives > 0, &batch.relations);
        // Sweeps have no bias; a softmax does not see one, but its log-sum-exp does.
        if wanted == Wanted::Statistics || batch.bias.is_some() {
            plan = Plan { sweeps: Vec::new(), row_sweeps: (0..objective.partitions().len()).collect() };
        }
        let group_keys = if plan.sweeps.iter().any(|sweep| sweep.mask == Mask::OwnGroup) {
            let offsets = offsets_or_even(batch.relations.hard_negative_offsets, rows, negatives);
            let owners: Vec<u32> = (0..rows as u32)
                .flat_map(|pair| {
                    let of_pair = offsets[pair as usize + 1] - offsets[pair as usize];
                    std::iter::repeat_n(pair, of_pair as usize)
                })
                .collect();
            let pairs: Vec<u32> = (0..rows as u32).collect();
            Some((device.tensor(&pairs, [rows])?, device.tensor(&owners, [owners.len()])?))
        } else {
            None
        };
        let bias = match (batch.bias, objective.bias_value()) {
            (Some(bias), _) => Some(bias.clone()),
            (None, 0.0) => None,
            (None, bias) => Some(device.tensor(&[bias as f32], [1])?),
        };
        // Without a reduction the loss shares the memory of the losses: it goes first.
        let loss = zeros_in(device, spare.loss.take(), [1])?;
        let losses = zeros_in(device, spare.losses.take(), [rows])?;
        let mut run = Self {
            setting,
            batch,
            plan,
            sides,
            relations,
            group_keys,
            bias,
            raw_log_scale,
            coefficients: objective.partitions().iter().map(|_| None).collect(),
            gradient: device.zeros([rows])?,
            d_log_scale: device.zeros([rows])?,
            d_bias: device.zeros([rows])?,
            losses,
            losses_apart: device.zeros([rows])?,
            rows,
            loss,
            spare,
            statistics: Vec::new(),
        };
        run.sweeps(backward)?;
        run.row_sweeps(wanted)?;
        if objective.reduction_kind() == Reduction::None {
            run.loss = run.losses.clone();
        } else if objective.partitions().iter().any(|partition| partition.aggregate == Aggregate::Mean) {
            // Rows of other aggregates have added their loss already.
            let factor = run.setting.average;
            device.sum(Sum { input: &run.losses, factor, output: &mut run.loss, accumulate: true })?;
        }
        if objective.partitions().iter().any(|partition| partition.aggregate != Aggregate::Mean) {
            device.add(Add { input: &run.losses_apart, output: &mut run.losses })?;
        }
        Ok(run)
    }

    fn vectors(&self, side: usize) -> &Tensor {
        // A plan names only sides that are there; queries always are.
        self.sides[side].as_ref().map_or(self.batch.queries, |side| &side.values)
    }

    /// The inverse lengths of two sides, under cosine similarity.
    fn norms(&self, rows: usize, columns: usize) -> Option<(&Tensor, &Tensor)> {
        let of = |side: usize| self.sides[side].as_ref()?.prefix_norms.as_ref().map(|(_, norms)| norms);
        of(rows).zip(of(columns))
    }

    /// The sweeps of the plan: statistics, coefficients, and on request gradients.
    ///
    /// Blocks whose similarities stand in one partition only are left to the end, where their gradient follows in the
    /// same pass. Statistics are merged in the same order either way, so that the loss has the same bits with and
    /// without gradients.
    fn sweeps(&mut self, backward: bool) -> Result<()> {
        let sweeps = self.plan.sweeps.clone();
        if sweeps.is_empty() {
            return Ok(());
        }
        let (device, objective, n) = (self.setting.device, self.setting.objective, self.rows);
        let mut similarity = device.empty([n], DType::F32)?;
        device.positives_forward(PositivesForward {
            queries: self.vectors(0),
            documents: self.vectors(1),
            norms: self.norms(0, 1),
            similarity: &mut similarity,
        })?;
        let one_way: Vec<bool> =
            (0..objective.partitions().len()).map(|p| backward && self.is_one_way(p, &sweeps)).collect();
        let at_once = |sweep: &Sweep| !sweep.is_gram() && sweep.row_partition.is_some_and(|p| one_way[p]);

        // Grams first, in either case.
        let mut order: Vec<&Sweep> = sweeps.iter().collect();
        order.sort_by_key(|sweep| !sweep.is_gram());
        let mut statistics: Vec<Vec<Tensor>> = objective.partitions().iter().map(|_| Vec::new()).collect();
        let mut kept: Vec<Option<Tensor>> = Vec::with_capacity(order.len());
        let all: usize = order.iter().filter(|sweep| !at_once(sweep)).map(|sweep| self.kept_size(sweep)).sum();
        let mut room = if backward && all / WORTH_KEEPING <= KEPT { KEPT } else { 0 };
        for sweep in &order {
            if at_once(sweep) {
                kept.push(None);
                continue;
            }
            let wanted =
                |partition: Option<usize>| partition.map(|_| device.empty([n, STATISTICS], DType::F32)).transpose();
            let (mut of_rows, mut of_columns) = (wanted(sweep.row_partition)?, wanted(sweep.column_partition)?);
            let size = self.kept_size(sweep).min(room);
            room -= size;
            let mut of_sweep = if size > 0 { Some(device.empty([size], DType::F32)?) } else { None };
            device.similarity_sweep_forward(SimilaritySweepForward {
                matrix: self.matrix(sweep),
                sums: objective.label_smoothing_value() > 0.0,
                row_statistics: of_rows.as_mut(),
                column_statistics: of_columns.as_mut(),
                kept: of_sweep.as_mut(),
            })?;
            kept.push(of_sweep);
            for (partition, tensor) in [(sweep.row_partition, of_rows), (sweep.column_partition, of_columns)] {
                if let (Some(partition), Some(tensor)) = (partition, tensor) {
                    statistics[partition].push(tensor);
                }
            }
        }
        for (p, statistics) in statistics.iter().enumerate() {
            if self.plan.row_sweeps.contains(&p) {
                continue;
            }
            let mut coefficients = device.empty([n, 4], DType::F32)?;
            self.partition(p, statistics, &similarity, &mut coefficients, one_way[p].then_some(&sweeps))?;
            self.coefficients[p] = Some(coefficients);
        }
        if !backward {
            return Ok(());
        }
        for (sweep, kept) in order.into_iter().zip(kept).filter(|(sweep, _)| !at_once(sweep)) {
            let (rows, columns) = (side_of_plan(sweep.rows), side_of_plan(sweep.columns));
            let mut d_rows = self.take_gradient(rows);
            let mut d_columns = if sweep.is_gram() { None } else { self.take_gradient(columns) };
            let coefficients =
                |partition: Option<usize>| partition.and_then(|partition| self.coefficients[partition].as_ref());
            device.similarity_sweep_backward(SimilaritySweepBackward {
                matrix: self.matrix(sweep),
                row_coefficients: coefficients(sweep.row_partition),
                column_coefficients: coefficients(sweep.column_partition),
                kept: kept.as_ref(),
                d_rows: d_rows.as_mut(),
                d_columns: d_columns.as_mut(),
            })?;
            self.put_gradient(rows, d_rows);
            if !sweep.is_gram() {
                self.put_gradient(columns, d_columns);
            }
        }
        let (mut d_queries, mut d_documents) = (self.take_gradient(0), self.take_gradient(1));
        let mut d_log_scale = std::mem::replace(&mut self.d_log_scale, device.empty([0], DType::F32)?);
        if let (Some(d_queries), Some(d_documents)) = (&mut d_queries, &mut d_documents) {
            device.positives_backward(PositivesBackward {
                queries: self.vectors(0),
                documents: self.vectors(1),
                norms: self.norms(0, 1),
                log_scale: &self.setting.log_scale,
                similarity: &similarity,
                gradient: &self.gradient,
                d_queries,
                d_documents,
                d_log_scale: &mut d_log_scale,
            })?;
        }
        self.put_gradient(0, d_queries);
        self.put_gradient(1, d_documents);
        self.d_log_scale = d_log_scale;
        Ok(())
    }

    /// Whether the rectangles of a partition can be swept forward and backward in one pass.
    fn is_one_way(&self, p: usize, sweeps: &[Sweep]) -> bool {
        let of_rows = |sweep: &&Sweep| !sweep.is_gram() && sweep.row_partition == Some(p);
        let columns: usize =
            sweeps.iter().filter(of_rows).map(|sweep| self.vectors(side_of_plan(sweep.columns)).shape().rows()).sum();
        self.setting.objective.label_smoothing_value() == 0.0
            && columns > 0
            && sweeps.iter().all(|sweep| sweep.column_partition != Some(p))
            && sweeps.iter().filter(of_rows).all(Sweep::is_one_way)
            // All have the queries, or all the documents, for rows.
            && sweeps.iter().filter(of_rows).all(|sweep| sweep.rows == Side::Queries)
            && self.setting.device.prefers_one_way(columns)
    }

    /// Finishes a partition from the statistics of its blocks; those of `at_once` that are rectangles of it are swept
    /// here, with their gradient.
    fn partition(
        &mut self,
        p: usize,
        statistics: &[Tensor],
        similarity: &Tensor,
        coefficients: &mut Tensor,
        at_once: Option<&Vec<Sweep>>,
    ) -> Result<()> {
        let (device, objective) = (self.setting.device, self.setting.objective);
        let empty = || device.empty([0], DType::F32);
        let mut losses = std::mem::replace(&mut self.losses, empty()?);
        let mut gradient = std::mem::replace(&mut self.gradient, empty()?);
        let mut d_log_scale = std::mem::replace(&mut self.d_log_scale, empty()?);
        let here = |sweep: &&Sweep| !sweep.is_gram() && sweep.row_partition == Some(p);
        let sweeps: Vec<&Sweep> = at_once.into_iter().flatten().filter(here).collect();
        let mut d_rows = if sweeps.is_empty() { None } else { self.take_gradient(0) };
        let mut d_columns: Vec<(usize, Tensor)> = Vec::new();
        for side in sweeps.iter().map(|sweep| side_of_plan(sweep.columns)) {
            if let Some(gradient) = self.take_gradient(side) {
                d_columns.push((side, gradient));
            }
        }
        let references: Vec<&Tensor> = statistics.iter().collect();
        let partition = &objective.partitions()[p];
        let arguments = Partition {
            statistics: &references,
            similarity,
            log_scale: &self.setting.log_scale,
            positives: partition.positives(),
            label_smoothing: objective.label_smoothing_value() as f32,
            margin: objective.margin_value() as f32,
            weight: partition.weight as f32,
            row_weights: self.batch.row_weights,
            average: self.setting.average,
            coefficients,
            losses: &mut losses,
            gradient: &mut gradient,
            d_log_scale: &mut d_log_scale,
        };
        match &mut d_rows {
            Some(d_rows) => {
                let matrices: Vec<_> = sweeps.iter().map(|sweep| self.matrix(sweep)).collect();
                let d_columns = d_columns.iter_mut().map(|(_, gradient)| gradient).collect();
                device.similarity_sweep_one_way(SimilaritySweepOneWay {
                    matrices: &matrices,
                    partition: arguments,
                    d_rows,
                    d_columns,
                })?;
            }
            None => device.partition(arguments)?,
        }
        if d_rows.is_some() {
            self.put_gradient(0, d_rows);
        }
        for (side, gradient) in d_columns {
            self.put_gradient(side, Some(gradient));
        }
        (self.losses, self.gradient, self.d_log_scale) = (losses, gradient, d_log_scale);
        Ok(())
    }

    fn matrix(&self, sweep: &Sweep) -> SimilarityMatrix<'_> {
        let ids = self.relations.ids.as_ref();
        let (rows, columns) = (side_of_plan(sweep.rows), side_of_plan(sweep.columns));
        SimilarityMatrix {
            rows: self.vectors(rows),
            columns: (!sweep.is_gram()).then(|| self.vectors(columns)),
            norms: self.norms(rows, columns),
            log_scale: &self.setting.log_scale,
            diagonal: (sweep.mask == Mask::DiagonalAndIds).then_some(0),
            keys: match sweep.mask {
                Mask::Nothing => None,
                Mask::DiagonalAndIds => ids.zip(ids),
                Mask::OwnGroup => self.group_keys.as_ref().map(|(rows, columns)| (rows, columns)),
            },
        }
    }

    /// The room that all tiles of a sweep take.
    fn kept_size(&self, sweep: &Sweep) -> usize {
        let padded = |side: Side| self.vectors(side_of_plan(side)).shape().rows().next_multiple_of(LARGEST_TILE);
        let (rows, columns) = (padded(sweep.rows), padded(sweep.columns));
        if sweep.is_gram() { rows * (columns + LARGEST_TILE) / 2 } else { rows * columns }
    }

    /// Takes the gradient of a side out, to be written.
    fn take_gradient(&mut self, side: usize) -> Option<Tensor> {
        self.sides[side].as_mut().and_then(|side| side.gradient.take())
    }

    fn put_gradient(&mut self, side: usize, gradient: Option<Tensor>) {
        if let Some(side) = &mut self.sides[side] {
            side.gradient = gradient;
        }
    }

    /// One pass over the rows of a partition.
    fn row_sweep(
        &mut self,
        partition: usize,
        backward: bool,
        upstream: Option<&Tensor>,
        losses: bool,
        statistics: Option<&mut Tensor>,
    ) -> Result<()> {
        let Self { setting, batch, sides, relations, bias, d_log_scale, d_bias, losses: all_losses, .. } = self;
        let sides = sides.each_mut().map(|side| {
            let side = side.as_mut()?;
            let norms = |wanted: PrefixNorm| {
                side.prefix_norms.as_ref().filter(|(norm, _)| *norm == wanted).map(|(_, norms)| norms)
            };
            let (inverse_norms, half_squares) = (norms(PrefixNorm::Inverse), norms(PrefixNorm::HalfSquare));
            Some(RowSweepSide {
                embeddings: &side.values,
                inverse_norms,
                half_squares,
                guide: side.guide.as_ref(),
                gradient: side.gradient.as_mut().filter(|_| backward),
                along: side.along.as_mut().filter(|_| backward),
            })
        });
        setting.device.row_sweep(RowSweep {
            objective: setting.objective,
            partition,
            sides,
            widths: &setting.widths,
            log_scale: &setting.log_scale,
            bias: bias.as_ref(),
            ids: relations.ids.as_ref(),
            labels: relations.labels.as_ref(),
            segments: relations.segments.as_ref(),
            hard_negative_offsets: Some(&relations.hard_negative_offsets),
            hard_query_offsets: Some(&relations.hard_query_offsets),
            most_hard_negatives: relations.most_hard_negatives,
            most_hard_queries: relations.most_hard_queries,
            positives: match (&relations.positives, setting.objective.positives_kind()) {
                (Some((offsets, candidates, weights)), Positives::Listed) => {
                    Some(PositiveTensors { offsets, candidates, weights: weights.as_ref() })
                }
                _ => None,
            },
            scores: batch.scores.filter(|_| matches!(setting.objective.target_kind(), Target::Scores { .. })),
            row_weights: batch.row_weights,
            upstream,
            average: setting.average,
            losses: losses.then_some(all_losses),
            statistics,
            d_log_scale: backward.then_some(d_log_scale),
            d_bias: backward.then_some(d_bias),
        })
    }

    fn row_sweeps(&mut self, wanted: Wanted) -> Result<()> {
        let (device, objective) = (self.setting.device, self.setting.objective);
        let backward = wanted == Wanted::Gradients;
        let widths = self.setting.widths.len();
        for p in 0..objective.partitions().len() {
            if let Some(coefficients) = &self.coefficients[p] {
                self.statistics.push(coefficients.clone());
                continue;
            }
            let partition = &objective.partitions()[p];
            let mut statistics = device.empty([widths, self.rows, ROW_STATISTICS], DType::F32)?;
            if partition.aggregate == Aggregate::Mean {
                self.row_sweep(p, backward, None, true, Some(&mut statistics))?;
            } else {
                // What a row's gradient weighs depends on all rows' losses.
                std::mem::swap(&mut self.losses, &mut self.losses_apart);
                self.row_sweep(p, false, None, true, Some(&mut statistics))?;
                std::mem::swap(&mut self.losses, &mut self.losses_apart);
                let mut upstream = device.empty([widths, self.rows], DType::F32)?;
                device.aggregate(AggregateRows {
                    statistics: &statistics,
                    row_weights: self.batch.row_weights,
                    aggregate: partition.aggregate,
                    weight: partition.weight as f32,
                    width_weights: &self.setting.widths.iter().map(|&(_, weight)| weight).collect::<Vec<_>>(),
                    upstream: &mut upstream,
                    loss: &mut self.loss,
                })?;
                if backward {
                    self.row_sweep(p, true, Some(&upstream), false, None)?;
                }
            }
            self.statistics.push(statistics);
        }
        Ok(())
    }

    pub(super) fn into_gradients(self) -> Result<LossAndGradients> {
        let Self { setting, batch, sides, statistics, coefficients, losses, loss, rows, spare, .. } = self;
        let Outputs { log_sum_exp: old_sums, gradients: mut old_gradients, d_log_scale, d_bias, .. } = spare;
        let mut old_sums = old_sums.into_iter();
        let device = setting.device;
        let mut log_sum_exp = Vec::with_capacity(statistics.len());
        for (statistics, coefficients) in statistics.iter().zip(&coefficients) {
            let (width, column) = if coefficients.is_some() { (4, 0) } else { (ROW_STATISTICS, 1) };
            let first_row = statistics.elements() / width - rows;
            let mut output = empty_in(device, old_sums.next(), [rows])?;
            let input = statistics.reshape([statistics.elements() / width, width])?;
            device.column(Column { input: &input, first_row, column, output: &mut output })?;
            log_sum_exp.push(output);
        }
        let sum = |input: &Tensor, old: Option<Tensor>| -> Result<Tensor> {
            let mut output = empty_in(device, old, [1])?;
            device.sum(Sum { input, factor: 1.0, output: &mut output, accumulate: false })?;
            Ok(output)
        };
        let mut d_log_scale = sum(&self.d_log_scale, d_log_scale)?;
        if let Some(largest) = setting.objective.largest_scale_value() {
            let largest = largest.ln() as f32;
            device.clamp_backward(ClampBackward { input: &self.raw_log_scale, largest, gradient: &mut d_log_scale })?;
        }
        let d_bias = sum(&self.d_bias, d_bias)?;
        let mut sides = sides.into_iter().zip(&mut old_gradients);
        let mut next = || -> Result<Option<Tensor>> {
            let Some((Some(side), old)) = sides.next() else { return Ok(None) };
            side.backward(&setting, old.take()).map(Some)
        };
        let (d_queries, d_documents, d_hard_negatives, d_hard_queries) = (next()?, next()?, next()?, next()?);
        let or_empty = |gradient: Option<Tensor>, input: Option<&Tensor>| match gradient {
            Some(gradient) => Ok(gradient),
            None => device.zeros(input.map_or([0, setting.width].into(), |input| input.shape().clone())),
        };
        Ok(LossAndGradients {
            loss,
            losses,
            log_sum_exp,
            d_queries: or_empty(d_queries, Some(batch.queries))?,
            d_documents: or_empty(d_documents, batch.documents)?,
            d_hard_negatives,
            d_hard_queries,
            d_log_scale,
            d_bias,
        })
    }
}
