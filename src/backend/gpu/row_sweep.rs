//! Launches of `row_sweep`, and of the matrix products between them.
//!
//! As on the CPU, rows are taken in strips whose products with all candidates of all blocks stand side by side in a
//! workspace, with the columns of one width after those of another. Products over the values between two widths are
//! summed to those of prefixes, and the gradients of prefixes back to those of the values between.

use std::ops::Range;

use super::matmul::{Finish, Operand, Output, Product};
use super::row_function::{Collected, Evaluation, OUTCOME, Rows, collect, evaluate};
use super::{Bindable, Engine, Launch, Scratch};
use crate::backend::Tensor;
use crate::backend::operations::{NO_ENTRY, PositiveTensors, RowSweep, RowSweepSide, side_of, side_of_tower};
use crate::error::DType;
use crate::objective::{
    Block, Candidates, HardnessScope, Judge, Objective, Positives, Scope, Target, Threshold, Tower,
};
use crate::{Error, Result};

const OPERATION: &str = "row_sweep";

/// Values of a workspace: 16 MiB. There are up to four: similarities, logits, positives, a guide's similarities.
const WORKSPACE: usize = 1 << 22;
/// Rows of a strip at most.
const STRIP: usize = 4096;
/// Elements of a pass at most.
const MOST_ELEMENTS: usize = 1 << 31;
/// Elements of a workgroup.
const GROUP: usize = 256;
/// Dot products of a workgroup.
const DOT_PRODUCTS: usize = 8;

/// Keys that are not there, as the shader knows them.
const NOWHERE: u32 = u32::MAX;
/// The shader's rules of a block.
const OWN: u32 = 1;
const WITHOUT_OWN: u32 = 2;
const OF_PAIRS: u32 = 4;
const OWN_POSITIVE: u32 = 8;
const HARD_OWN: u32 = 16;
const HARD_OTHERS: u32 = 32;
const NOBODYS: u32 = 64;
const FALSE_NEGATIVES: u32 = 128;
const HALVES: u32 = 256;

/// One kind of embeddings.
#[derive(Clone, Copy)]
struct Side<'a> {
    embeddings: &'a Tensor,
    count: usize,
    /// At the full width alone embeddings are multiplied with them as they are read.
    units: Option<&'a Tensor>,
    /// Dot products of prefixes are multiplied with them, or they are half squares, which are subtracted.
    norms: Option<&'a Tensor>,
    halves: bool,
    guide: Option<&'a Tensor>,
    gradient: Option<&'a Tensor>,
    along: Option<&'a Tensor>,
}

/// What the shader knows of a block.
#[derive(Clone, Copy, Default)]
struct Columns {
    /// The first column of a row, and how many there are.
    first: usize,
    width: usize,
    candidates: usize,
    /// Where among the keys each pair's candidates begin, and which pair each candidate is of, if they are several.
    offsets: Option<usize>,
    owners: Option<usize>,
    rules: u32,
}

/// A block and where its entries stand in a row.
#[derive(Clone, Copy)]
struct Place<'a> {
    block: Block,
    anchors: Side<'a>,
    candidates: Side<'a>,
    columns: Columns,
}

impl Place<'_> {
    fn is_own(&self) -> bool {
        self.block.scope == Scope::Own
    }

    fn has_guide(&self) -> bool {
        self.anchors.guide.is_some() && self.candidates.guide.is_some()
    }
}

/// What a batch says of its pairs, in one buffer: where in it ids, labels and segments are, and by side of candidates
/// the offsets of pairs and the owners of candidates.
struct Keys {
    buffer: Scratch,
    ids: Option<usize>,
    labels: Option<usize>,
    segments: Option<usize>,
    offsets: [Option<usize>; 5],
    owners: [Option<usize>; 5],
}

impl Keys {
    fn new(engine: &dyn Engine, arguments: &RowSweep<'_>, sides: &[Option<Side<'_>>; 5], pairs: usize) -> Result<Self> {
        let mut length = 0;
        let mut room = |elements: usize| {
            length += elements;
            length - elements
        };
        let labelled = arguments.objective.positives_kind() == Positives::Labels;
        let given = [
            arguments.ids,
            arguments.labels.filter(|_| labelled),
            arguments.segments,
            arguments.hard_negative_offsets.filter(|_| sides[2].is_some()),
            arguments.hard_query_offsets.filter(|_| sides[3].is_some()),
        ];
        let places = given.map(|keys| keys.map(|keys| room(keys.elements())));
        let [ids, labels, segments, of_negatives, of_queries] = places;
        let offsets = [None, None, of_negatives, of_queries, None];
        let mut owners = [None; 5];
        for side in [2, 3] {
            owners[side] = offsets[side].and(sides[side].as_ref()).map(|side| room(side.count));
        }
        let buffer = engine.scratch(length.max(1), DType::U32)?;
        for (keys, place) in given.into_iter().zip(places) {
            let (Some((from, bytes)), Some(place)) = (keys.map(Bindable::bind), place) else { continue };
            if bytes > 0 {
                engine.copy((from, 0), (&*buffer.buffer, 4 * place), bytes)?;
            }
        }
        for side in [2, 3] {
            let (Some(offsets), Some(owners), Some(candidates)) = (offsets[side], owners[side], &sides[side]) else {
                continue;
            };
            let candidates = candidates.count;
            let columns = Columns { candidates, offsets: Some(offsets), owners: Some(owners), ..Columns::default() };
            engine.launch(
                Line { rows: 0..pairs, pairs, widths: 1, stride: 0 }
                    .launch("owners", columns)
                    .write("keys", &buffer)
                    .row_of_groups(candidates.div_ceil(GROUP)),
            )?;
        }
        Ok(Self { buffer, ids, labels, segments, offsets, owners })
    }
}

/// The rows that stand in a workspace: a strip of those of the batch, each with so many columns at each width.
#[derive(Clone)]
struct Line {
    rows: Range<usize>,
    pairs: usize,
    widths: usize,
    stride: usize,
}

impl Line {
    fn launch<'b>(&self, entry: &'static str, columns: Columns) -> Launch<'b> {
        Launch::new("row_sweep", entry)
            .size("rows", self.rows.len())
            .size("first_row", self.rows.start)
            .size("pairs", self.pairs)
            .size("widths", self.widths)
            .size("stride", self.stride)
            .size("column", columns.first)
            .size("width", columns.width)
            .size("candidate_count", columns.candidates)
            .bits("offsets", key(columns.offsets))
            .bits("owners", key(columns.owners))
            .bits("rules", columns.rules)
    }

    /// Columns in one row at all widths.
    fn full(&self) -> usize {
        self.stride * self.widths
    }
}

/// The place of keys, as the shader knows it.
fn key(place: Option<usize>) -> u32 {
    place.and_then(|place| u32::try_from(place).ok()).unwrap_or(NOWHERE)
}

/// Elements of some rows of a matrix.
fn elements(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

/// The values of a segment in some rows of embeddings, each row times its factor.
fn operand<'a>(
    embeddings: &'a Tensor,
    units: Option<&'a Tensor>,
    rows: &Range<usize>,
    segment: &Range<usize>,
    transposed: bool,
) -> Operand<'a> {
    let stride = embeddings.shape().width();
    let first = rows.start * stride + segment.start;
    let norms = units.map(|units| (units as &dyn Bindable, rows.start));
    Operand { buffer: embeddings, first, stride, transposed, norms }
}

/// Embeddings of both sides that are multiplied with each other.
#[derive(Clone, Copy)]
struct Factors<'a> {
    anchors: &'a Tensor,
    candidates: &'a Tensor,
    /// What each row of them is multiplied with as it is read.
    units: [Option<&'a Tensor>; 2],
}

/// What the passes of a sweep share.
struct Sweep<'a> {
    engine: &'a dyn Engine,
    objective: &'a Objective,
    keys: Keys,
    log_scale: &'a Tensor,
    bias: Option<&'a Tensor>,
    listed: Option<PositiveTensors<'a>>,
    /// The values of embeddings between the widths.
    segments: Vec<Range<usize>>,
    /// Whether dot products are multiplied with norms of prefixes.
    has_norms: bool,
}

/// What an entry that is no false negative stays below: `positive + above − below·|positive|`.
struct Rule<'a> {
    above: f64,
    below: f64,
    /// The guide's similarities; the trained ones if not given.
    guide: Option<&'a Scratch>,
    positive: Reference<'a>,
}

/// Where the similarity of each row's own pair stands.
enum Reference<'a> {
    /// In the row, from a column on, and whether a column further in each row.
    Held {
        column: usize,
        step: usize,
    },
    Apart(&'a Scratch),
}

impl<'a> Rule<'a> {
    fn new(
        objective: &Objective,
        places: &[Place<'_>],
        guide: Option<&'a Scratch>,
        references: &'a Scratch,
    ) -> Option<Self> {
        let (above, below) = match objective.false_negatives_rule()?.threshold {
            Threshold::Above(margin) => (margin, 0.0),
            Threshold::Ratio(ratio) => (0.0, 1.0 - ratio),
        };
        let positive = match places.iter().find(|place| place.block.holds_positive()) {
            Some(place) => Reference::Held { column: place.columns.first, step: usize::from(!place.is_own()) },
            None => Reference::Apart(references),
        };
        Some(Self { above, below, guide, positive })
    }
}

impl Sweep<'_> {
    /// A pass over each row's own candidates, as far as they are in a part of all, and over the values of a segment.
    fn own<'b>(
        &'b self,
        line: &Line,
        entry: &'static str,
        place: &Place<'_>,
        part: &Range<usize>,
        (w, segment, embedding): (usize, &Range<usize>, usize),
    ) -> Launch<'b> {
        line.launch(entry, place.columns)
            .read("keys", &self.keys.buffer)
            .size("at_width", w)
            .size("segment", segment.start)
            .size("segment_width", segment.len())
            .size("embedding", embedding)
            .size("first_candidate", part.start)
            .size("end_candidate", part.end)
    }

    /// Dot products of anchors and candidates over segments, into the columns of a block.
    fn products(
        &self,
        line: &Line,
        place: &Place<'_>,
        factors: Factors<'_>,
        segments: &[Range<usize>],
        output: &Scratch,
    ) -> Result<()> {
        let Factors { anchors, candidates, units } = factors;
        let width = anchors.shape().width();
        for part in self.engine.parts(place.candidates.count, width) {
            for (w, segment) in segments.iter().enumerate() {
                if place.is_own() {
                    let mut launch = self
                        .own(line, "own_products", place, &part, (w, segment, width))
                        .read_part("anchors", anchors, elements(&line.rows, width), "anchors_base")
                        .read_part("candidates", candidates, elements(&part, width), "candidates_base")
                        .write("similarities", output);
                    if let [Some(of_anchors), Some(of_candidates)] = units {
                        launch = norms(launch, of_anchors, of_candidates);
                    }
                    let count = line.rows.len() * place.columns.width;
                    self.engine.launch(launch.row_of_groups(count.div_ceil(DOT_PRODUCTS)))?;
                    continue;
                }
                let first = w * line.stride + place.columns.first + part.start;
                self.engine.product(&Product {
                    a: operand(anchors, units[0], &line.rows, segment, false),
                    b: operand(candidates, units[1], &part, segment, true),
                    extents: (line.rows.len(), part.len(), segment.len()),
                    output: Output { buffer: output, first, stride: line.full(), accumulate: false },
                    finish: Finish::default(),
                })?;
            }
        }
        Ok(())
    }

    /// Turns dot products over segments into similarities of prefixes.
    fn normalise(&self, line: &Line, place: &Place<'_>, similarities: &Scratch) -> Result<()> {
        if !self.has_norms && line.widths == 1 {
            return Ok(());
        }
        let launch = line
            .launch("normalise", place.columns)
            .read("keys", &self.keys.buffer)
            .write("similarities", similarities)
            .groups([place.columns.width.div_ceil(GROUP), line.rows.len(), 1]);
        self.engine.launch(with_norms(launch, place))
    }

    /// Logits and positives of a block.
    fn entries(
        &self,
        line: &Line,
        place: &Place<'_>,
        [similarities, logits, positives]: [&Scratch; 3],
        rule: Option<&Rule<'_>>,
    ) -> Result<()> {
        let tower = place.columns.rules & OF_PAIRS != 0;
        let by_pair = tower && self.objective.positives_kind() != Positives::Listed;
        let hardness = self.objective.hardness_weighting().map_or(0.0, |hardness| hardness.strength);
        let mut launch = line
            .launch("entries", place.columns)
            .read("keys", &self.keys.buffer)
            .read("similarities", similarities)
            .write("logits", logits)
            .write("positives", positives)
            .read("log_scale", self.log_scale)
            .read_if("BIAS", "bias", self.bias)
            .bits("ids", key(self.keys.ids.filter(|_| by_pair)))
            .bits("labels", key(self.keys.labels))
            .bits("segments", key(self.keys.segments))
            .float("margin", self.objective.margin_value() as f32)
            .float("hardness", hardness as f32)
            .groups([place.columns.width.div_ceil(GROUP), line.rows.len(), line.widths]);
        let (mut held, mut held_step, mut above, mut below) = (0, 0, 0.0, 0.0);
        if let Some(rule) = rule {
            (above, below) = (rule.above, rule.below);
            launch = launch.read_if("GUIDE", "guide", rule.guide);
            match rule.positive {
                Reference::Held { column, step } => (held, held_step) = (column, step),
                Reference::Apart(references) => {
                    launch = launch.flag("REFERENCES", true).read("references", references);
                }
            }
        }
        self.engine.launch(
            launch
                .size("held", held)
                .size("held_step", held_step)
                .float("above", above as f32)
                .float("below", below as f32),
        )
    }

    /// The same of listed positives, which may stand in a block.
    fn listed(&self, line: &Line, place: &Place<'_>, [similarities, logits, positives]: [&Scratch; 3]) -> Result<()> {
        let Some(PositiveTensors { offsets, candidates, weights }) = self.listed else { return Ok(()) };
        self.engine.launch(
            line.launch("listed", place.columns)
                .read("similarities", similarities)
                .write("logits", logits)
                .write("positives", positives)
                .read("list_offsets", offsets)
                .read("list_candidates", candidates)
                .read_if("WEIGHTS", "list_weights", weights)
                .read("log_scale", self.log_scale)
                .read_if("BIAS", "bias", self.bias)
                .float("margin", self.objective.margin_value() as f32)
                .size("count", candidates.elements())
                .groups([line.rows.len(), 1, 1]),
        )
    }

    /// Notes what the norms need of the gradients of similarities, and turns these into those of dot products over
    /// segments.
    fn finish(&self, line: &Line, place: &Place<'_>, similarities: &Scratch, gradient: &Scratch) -> Result<()> {
        let width = place.columns.width;
        let elements = if place.is_own() { line.rows.len() * width } else { width };
        let passes = [
            ("along_anchors", place.anchors.along, line.rows.len()),
            ("along_candidates", place.candidates.along, elements.div_ceil(GROUP)),
        ];
        for (entry, along, groups) in passes {
            let Some(along) = along else { continue };
            let mut launch = line
                .launch(entry, place.columns)
                .read("similarities", similarities)
                .read("gradient", gradient)
                .read("log_scale", self.log_scale)
                .write("along", along)
                .groups([groups, line.widths, 1]);
            if entry == "along_candidates" {
                launch = launch.read("keys", &self.keys.buffer);
            }
            self.engine.launch(launch)?;
        }
        let multiplied = self.has_norms && place.columns.rules & HALVES == 0;
        if !multiplied && line.widths == 1 {
            return Ok(());
        }
        let launch = line
            .launch("segments", place.columns)
            .read("keys", &self.keys.buffer)
            .write("gradient", gradient)
            .groups([place.columns.width.div_ceil(GROUP), line.rows.len(), 1]);
        self.engine.launch(if multiplied { with_norms(launch, place) } else { launch })
    }

    /// Brings gradients of dot products back to candidates and anchors.
    fn gradients(&self, line: &Line, place: &Place<'_>, gradient: &Scratch) -> Result<()> {
        let Place { anchors, candidates, .. } = *place;
        let width = anchors.embeddings.shape().width();
        let all = 0..candidates.count;
        for (w, segment) in self.segments.iter().enumerate() {
            if place.is_own() {
                self.own_gradients(line, place, gradient, w, segment)?;
                continue;
            }
            let coefficients = |transposed: bool| Operand {
                buffer: gradient,
                first: w * line.stride + place.columns.first,
                stride: line.full(),
                transposed,
                norms: None,
            };
            let into = |buffer, rows: &Range<usize>| Output {
                buffer,
                first: rows.start * width + segment.start,
                stride: width,
                accumulate: true,
            };
            let finish = Finish { log_scale: Some(self.log_scale), ..Finish::default() };
            if let Some(d_candidates) = candidates.gradient {
                self.engine.product(&Product {
                    a: coefficients(true),
                    b: operand(anchors.embeddings, anchors.units, &line.rows, segment, false),
                    extents: (candidates.count, segment.len(), line.rows.len()),
                    output: into(d_candidates, &all),
                    finish,
                })?;
            }
            if let Some(d_anchors) = anchors.gradient {
                self.engine.product(&Product {
                    a: coefficients(false),
                    b: operand(candidates.embeddings, candidates.units, &all, segment, false),
                    extents: (line.rows.len(), segment.len(), candidates.count),
                    output: into(d_anchors, &line.rows),
                    finish,
                })?;
            }
        }
        Ok(())
    }

    /// The same where each row has candidates of its own.
    fn own_gradients(
        &self,
        line: &Line,
        place: &Place<'_>,
        gradient: &Scratch,
        w: usize,
        segment: &Range<usize>,
    ) -> Result<()> {
        let Place { anchors, candidates, .. } = *place;
        let width = anchors.embeddings.shape().width();
        let (of_rows, rows) = (elements(&line.rows, width), line.rows.len());
        for part in self.engine.parts(candidates.count, width) {
            let of_part = elements(&part, width);
            let launch = |entry: &'static str| {
                self.own(line, entry, place, &part, (w, segment, width))
                    .read("gradient", gradient)
                    .read("log_scale", self.log_scale)
            };
            if let Some(d_candidates) = candidates.gradient {
                let launch = launch("own_candidates")
                    .read_part("anchors", anchors.embeddings, of_rows.clone(), "anchors_base")
                    .write_part("d_candidates", d_candidates, of_part.clone(), "candidates_base")
                    .read_if("NORMS", "anchor_norms", anchors.units);
                self.engine
                    .launch(launch.row_of_groups((rows * place.columns.width * segment.len()).div_ceil(GROUP)))?;
            }
            if let Some(d_anchors) = anchors.gradient {
                let launch = launch("own_anchors")
                    .write_part("d_anchors", d_anchors, of_rows.clone(), "anchors_base")
                    .read_part("candidates", candidates.embeddings, of_part, "candidates_base")
                    .read_if("NORMS", "candidate_norms", candidates.units);
                self.engine.launch(launch.row_of_groups((rows * segment.len()).div_ceil(GROUP)))?;
            }
        }
        Ok(())
    }
}

impl Sweep<'_> {
    /// All strips.
    fn run(
        &self,
        arguments: &RowSweep<'_>,
        towers: [Option<Side<'_>>; 2],
        mut places: Vec<Place<'_>>,
        pairs: usize,
        stride: usize,
    ) -> Result<()> {
        let (engine, objective, widths) = (self.engine, self.objective, arguments.widths.len());
        let height = (WORKSPACE / (stride * widths).max(1)).clamp(1, STRIP).min(pairs);
        // Elements of passes over each row's own candidates are numbered with 32 bits.
        let own = places.iter().filter(|place| place.is_own()).map(|place| place.columns.width).max().unwrap_or(0);
        let values = arguments.widths.last().map_or(0, |&(width, _)| width);
        let height = height.min(MOST_ELEMENTS / (own * values).max(1)).max(1);
        let scratch = |columns: usize| engine.scratch((height * columns).max(1), DType::F32);
        let workspaces = [scratch(stride * widths)?, scratch(stride * widths)?, scratch(stride)?];
        let [similarities, logits, positives] = workspaces.each_ref();
        let (outcomes, references) = (scratch(widths * OUTCOME)?, scratch(widths)?);
        let guide = if objective.uses_guide() { Some(scratch(stride)?) } else { None };
        if let Some(guide) = guide.as_ref().filter(|_| !places.iter().all(Place::has_guide)) {
            engine.launch(
                Launch::new("elementwise", "fill")
                    .write_part("output", guide, 0..height * stride, "output_base")
                    .float("value", NO_ENTRY)
                    .size("count", height * stride)
                    .row_of_groups((height * stride).div_ceil(GROUP)),
            )?;
        }
        let own_pair = towers[0].zip(towers[1]).map(|(anchors, candidates)| {
            let rules = OWN | if candidates.halves { HALVES } else { 0 };
            let block = Block::QUERY_POSITIVE;
            let columns = Columns { width: 1, candidates: candidates.count, rules, ..Columns::default() };
            Place { block, anchors, candidates, columns }
        });
        let by_guide = objective.false_negatives_rule().is_some_and(|rule| rule.judge == Judge::Guide);
        let own_pair = own_pair.filter(|pair| !by_guide || pair.has_guide());
        let of_guide = guide.as_ref().filter(|_| by_guide);
        let rule = own_pair.and_then(|_| Rule::new(objective, &places, of_guide, &references));
        if rule.is_some() {
            for place in places.iter_mut().filter(|place| !by_guide || place.has_guide()) {
                place.columns.rules |= FALSE_NEGATIVES;
            }
        }
        let listed_among = if objective.uses_documents() { Candidates::Documents } else { Candidates::Bank };

        for first in (0..pairs).step_by(height) {
            let rows = first..pairs.min(first + height);
            let line = Line { rows: rows.clone(), pairs, widths, stride };
            for place in &places {
                self.similarities(&line, place, similarities)?;
                self.guide(&line, place, guide.as_ref())?;
            }
            if let (Some(pair), Some(Rule { positive: Reference::Apart(references), .. })) = (&own_pair, &rule) {
                let line = Line { stride: 1, ..line.clone() };
                if by_guide {
                    self.guide(&line, pair, Some(references))?;
                } else {
                    self.similarities(&line, pair, references)?;
                }
            }
            for place in &places {
                self.entries(&line, place, workspaces.each_ref(), rule.as_ref())?;
            }
            for place in places.iter().filter(|place| place.block.candidates == listed_among) {
                self.listed(&line, place, workspaces.each_ref())?;
            }
            let rows = Rows { rows, pairs, stride, widths, logits, similarities, positives, outcomes: &outcomes };
            self.evaluate(arguments, &rows, guide.as_ref())?;
            if arguments.d_log_scale.is_some() {
                places.iter().try_for_each(|place| self.finish(&line, place, similarities, logits))?;
                places.iter().try_for_each(|place| self.gradients(&line, place, logits))?;
            }
        }
        Ok(())
    }

    /// The similarities of a strip's anchors with the candidates of a block.
    fn similarities(&self, line: &Line, place: &Place<'_>, output: &Scratch) -> Result<()> {
        let Place { anchors, candidates, .. } = *place;
        let factors = Factors {
            anchors: anchors.embeddings,
            candidates: candidates.embeddings,
            units: [anchors.units, candidates.units],
        };
        self.products(line, place, factors, &self.segments, output)?;
        self.normalise(line, place, output)
    }

    /// The same of a guide's embeddings, where there are any.
    fn guide(&self, line: &Line, place: &Place<'_>, output: Option<&Scratch>) -> Result<()> {
        let (Some(output), Some(anchors), Some(candidates)) = (output, place.anchors.guide, place.candidates.guide)
        else {
            return Ok(());
        };
        let line = Line { widths: 1, ..line.clone() };
        let factors = Factors { anchors, candidates, units: [None; 2] };
        let all = 0..anchors.shape().width();
        self.products(&line, place, factors, std::slice::from_ref(&all), output)
    }

    /// Evaluates the rows of a strip at all widths.
    fn evaluate(&self, arguments: &RowSweep<'_>, rows: &Rows<'_>, guide: Option<&Scratch>) -> Result<()> {
        let partition = &self.objective.partitions()[arguments.partition];
        let teacher = match self.objective.target_kind() {
            Target::Positives => None,
            Target::Scores { scale } => {
                arguments.scores.map(|scores| (scores as &dyn Bindable, rows.rows.start * rows.stride, scale))
            }
            Target::Guide { scale } => guide.map(|guide| (guide as &dyn Bindable, 0, scale)),
        };
        for (at_width, &(_, weight)) in arguments.widths.iter().enumerate() {
            evaluate(
                self.engine,
                rows,
                &Evaluation {
                    function: partition.function,
                    at_width,
                    weight: f64::from(weight) * partition.weight,
                    average: arguments.average,
                    smoothing: self.objective.label_smoothing_value(),
                    teacher,
                    log_scale: arguments.log_scale,
                    row_weights: arguments.row_weights,
                    upstream: arguments.upstream,
                    backward: arguments.d_log_scale.is_some(),
                },
            )?;
        }
        collect(
            self.engine,
            rows,
            &Collected {
                losses: arguments.losses.as_deref(),
                statistics: arguments.statistics.as_deref(),
                d_log_scale: arguments.d_log_scale.as_deref(),
                d_bias: arguments.d_bias.as_deref(),
            },
        )
    }
}

/// Adds norms of both sides to a launch.
fn norms<'a>(launch: Launch<'a>, of_anchors: &'a Tensor, of_candidates: &'a Tensor) -> Launch<'a> {
    launch.flag("NORMS", true).read("anchor_norms", of_anchors).read("candidate_norms", of_candidates)
}

/// Adds norms, or half squares, of prefixes to a launch if there are any.
fn with_norms<'a>(launch: Launch<'a>, place: &Place<'a>) -> Launch<'a> {
    match (place.anchors.norms, place.candidates.norms) {
        (Some(of_anchors), Some(of_candidates)) => norms(launch, of_anchors, of_candidates),
        _ => launch,
    }
}

/// What the shader is to know of a block.
fn rules_of(objective: &Objective, block: Block, has_offsets: bool, halves: bool) -> u32 {
    let tower = block.crosses_towers() || block.is_same_tower();
    let listed = objective.positives_kind() == Positives::Listed;
    let others = block.scope == Scope::Others && ((tower && !listed) || has_offsets);
    let of_own = block.holds_positive() && objective.positives_kind() == Positives::Own;
    let documents = match (block.anchor, block.candidates) {
        (Tower::Query, Candidates::Documents) => Some(true),
        (Tower::Query, Candidates::HardNegatives) => Some(false),
        _ => None,
    };
    let (hard_own, hard_others) = match (objective.hardness_weighting(), documents) {
        (Some(hardness), Some(documents)) => match hardness.scope {
            HardnessScope::InBatch => (false, true),
            HardnessScope::HardNegatives => (!documents, false),
            HardnessScope::All => (!documents, true),
        },
        _ => (false, false),
    };
    let rules = [
        (OWN, block.scope == Scope::Own),
        (WITHOUT_OWN, block.is_same_tower() || others),
        (OF_PAIRS, tower),
        (OWN_POSITIVE, of_own),
        (HARD_OWN, hard_own),
        (HARD_OTHERS, hard_others),
        (NOBODYS, listed && documents == Some(true)),
        (HALVES, halves),
    ];
    rules.into_iter().filter(|(_, holds)| *holds).map(|(rule, _)| rule).sum()
}

/// The sides with what is written taken for what is read: each launch names what it writes.
fn side<'a>(side: RowSweepSide<'a>, nested: bool) -> Side<'a> {
    let RowSweepSide { embeddings, inverse_norms, half_squares, guide, gradient, along } = side;
    Side {
        embeddings,
        count: embeddings.shape().rows(),
        units: inverse_norms.filter(|_| !nested),
        norms: half_squares.or(inverse_norms.filter(|_| nested)),
        halves: half_squares.is_some(),
        guide,
        gradient: gradient.map(|gradient| &*gradient),
        along: along.map(|along| &*along),
    }
}

pub(crate) fn forward_backward(engine: &dyn Engine, mut arguments: RowSweep<'_>) -> Result<()> {
    let (nested, pairs) = (arguments.is_nested(), arguments.rows());
    let sides = std::mem::take(&mut arguments.sides).map(|of| of.map(|of| side(of, nested)));
    if pairs == 0 {
        return Ok(());
    }
    let keys = Keys::new(engine, &arguments, &sides, pairs)?;
    let RowSweep { objective, widths, .. } = arguments;
    let partition = &objective.partitions()[arguments.partition];
    let most = [1, 1, arguments.most_hard_negatives, arguments.most_hard_queries, 0];
    let mut places: Vec<Place<'_>> = Vec::new();
    let mut stride = 0;
    for &block in &partition.blocks {
        let of = side_of(block.candidates);
        let (Some(anchors), Some(candidates)) = (sides[side_of_tower(block.anchor)], sides[of]) else { continue };
        let own = if keys.offsets[of].is_some() { most[of] } else { 1 };
        let width = if block.scope == Scope::Own { own.min(candidates.count) } else { candidates.count };
        let rules = rules_of(objective, block, keys.offsets[of].is_some(), candidates.halves);
        let (offsets, owners) = (keys.offsets[of], keys.owners[of]);
        let columns = Columns { first: stride, width, candidates: candidates.count, offsets, owners, rules };
        places.push(Place { block, anchors, candidates, columns });
        stride += width;
    }
    if let Some(scores) = arguments.scores
        && scores.elements() != pairs * stride
    {
        let found = scores.elements() / pairs.max(1);
        return Err(Error::shape(OPERATION, "scores", [pairs, stride], [pairs, found]));
    }
    let ends = || widths.iter().map(|&(width, _)| width);
    let segments = std::iter::once(0).chain(ends()).zip(ends()).map(|(start, end)| start..end).collect();
    let sweep = Sweep {
        engine,
        objective,
        keys,
        log_scale: arguments.log_scale,
        bias: arguments.bias,
        listed: arguments.positives,
        segments,
        has_norms: places.iter().any(|place| place.anchors.norms.is_some()),
    };
    sweep.run(&arguments, [sides[0], sides[1]], places, pairs, stride)
}
