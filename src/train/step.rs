//! One step: encode, compare, send gradients back, move.

use std::ops::Range;

use crate::autograd::{LossBatch, ParameterGradients, Tape, Variable};
use crate::backend::PackedBatch;
use crate::backend::operations::Copy;
use crate::error::DType;
use crate::nn::{AdamW, DualEncoder, StepDropout, Tower, Towers};
use crate::text::TokenisedPairs;
use crate::{Device, Objective, Result, Tensor};

/// What a training holds besides the model: the optimizer, the gradients, and how steps are made.
#[derive(Debug)]
pub struct Trainer {
    /// The optimizer.
    pub optimizer: AdamW,
    gradients: ParameterGradients,
    objective: Objective,
    learn_temperature: bool,
    mask_ids: bool,
    mini_batch_size: usize,
    seed: u64,
}

/// The sequences of one side of a batch, and where they stand in the batch.
struct Side<'a> {
    tower: Tower,
    sequences: Vec<&'a [u32]>,
    /// Tokens before each sequence in the whole batch, and after the last.
    offsets: Vec<usize>,
    /// Sequences of each pair.
    of_pair: usize,
}

impl<'a> Side<'a> {
    fn new(tower: Tower, sequences: Vec<&'a [u32]>, first: usize, of_pair: usize) -> Self {
        let ends = sequences.iter().scan(first, |end, sequence| {
            *end += sequence.len();
            Some(*end)
        });
        let offsets = std::iter::once(first).chain(ends).collect();
        Self { tower, sequences, offsets, of_pair }
    }

    fn end(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// The sequences of some of the pairs.
    fn of(&self, pairs: &Range<usize>) -> Range<usize> {
        pairs.start * self.of_pair..pairs.end * self.of_pair
    }
}

impl Trainer {
    /// A trainer before its first step. A `mini_batch_size` of 0 is the whole batch.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn new(
        encoder: &DualEncoder,
        optimizer: AdamW,
        objective: Objective,
        (learn_temperature, mask_ids): (bool, bool),
        mini_batch_size: usize,
        seed: u64,
    ) -> Result<Self> {
        let gradients = encoder.parameters().gradients()?;
        Ok(Self { optimizer, gradients, objective, learn_temperature, mask_ids, mini_batch_size, seed })
    }

    /// Makes one step on a batch of pairs; returns its loss, which stays on the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn step(
        &mut self,
        encoder: &mut DualEncoder,
        pairs: &TokenisedPairs,
        batch: &[u32],
        learning_rate: f64,
    ) -> Result<Tensor> {
        let loss = self.gradients(encoder, pairs, batch)?;
        self.optimizer.step(encoder.parameters_mut(), &mut self.gradients, learning_rate)?;
        Ok(loss)
    }

    /// Computes the loss and gradients of a batch, as the next step would.
    ///
    /// # Errors
    /// What the device reports.
    pub fn gradients(&mut self, encoder: &DualEncoder, pairs: &TokenisedPairs, batch: &[u32]) -> Result<Tensor> {
        self.gradients.clear();
        let pair = |index: &u32| *index as usize;
        let k = pairs.hard_negatives();
        let queries = Side::new(Tower::Query, batch.iter().map(|i| pairs.query(pair(i))).collect(), 0, 1);
        let documents = batch.iter().map(|i| pairs.document(pair(i))).collect();
        let documents = Side::new(Tower::Document, documents, queries.end(), 1);
        let negatives = batch.iter().flat_map(|i| (0..k).map(|which| pairs.negative(pair(i), which))).collect();
        let negatives = Side::new(Tower::Document, negatives, documents.end(), k);
        let sides = [queries, documents, negatives];
        let ids: Option<Vec<i64>> =
            self.mask_ids.then(|| batch.iter().map(|i| i64::from(pairs.ids()[pair(i)])).collect());
        let dropout = StepDropout { seed: self.seed, step: (self.optimizer.steps() + 1) as u32 };
        if self.mini_batch_size == 0 || self.mini_batch_size >= batch.len() {
            self.whole(encoder, &sides, ids.as_deref(), dropout)
        } else {
            self.cached(encoder, &sides, batch.len(), ids.as_deref(), dropout)
        }
    }

    /// Encodes, compares and sends gradients back in one go.
    fn whole(
        &mut self,
        encoder: &DualEncoder,
        sides: &[Side<'_>; 3],
        ids: Option<&[i64]>,
        dropout: StepDropout,
    ) -> Result<Tensor> {
        let device = encoder.parameters().device().clone();
        let mut tape = Tape::new(&device);
        let parameters = encoder.parameters().on(&mut tape);
        let everything = 0..sides[0].sequences.len();
        let encoded = encode(encoder, &mut tape, &parameters, sides, &everything, dropout)?;
        let loss = self.loss(&mut tape, &encoded, &parameters[encoder.log_scale()], ids)?;
        drop((encoded, parameters));
        let value = loss.value().clone();
        tape.backward(loss, None, &mut self.gradients)?;
        Ok(value)
    }

    /// Gradient caching (arXiv 2101.06983): all embeddings without a tape, their gradients from the loss, then part by
    /// part the encoder again, with a tape, from those gradients. Dropout repeats itself, as it depends on where a
    /// token stands in the batch alone.
    fn cached(
        &mut self,
        encoder: &DualEncoder,
        sides: &[Side<'_>; 3],
        pairs: usize,
        ids: Option<&[i64]>,
        dropout: StepDropout,
    ) -> Result<Tensor> {
        let device = encoder.parameters().device().clone();
        let width = encoder.settings().embedding_size();
        let parts: Vec<Range<usize>> = (0..pairs)
            .step_by(self.mini_batch_size)
            .map(|first| first..pairs.min(first + self.mini_batch_size))
            .collect();

        let mut embeddings = Vec::new();
        for side in sides {
            embeddings.push(device.empty([side.sequences.len(), width], DType::F32)?);
        }
        for part in &parts {
            let mut tape = Tape::inference(&device);
            let parameters = encoder.parameters().on(&mut tape);
            let encoded = encode(encoder, &mut tape, &parameters, sides, part, dropout)?;
            for ((side, encoded), output) in sides.iter().zip(&encoded).zip(&mut embeddings) {
                if let Some(encoded) = encoded {
                    copy_rows(&device, encoded.value(), 0, output, side.of(part).start, side.of(part).len())?;
                }
            }
        }

        let mut tape = Tape::new(&device);
        let parameters = encoder.parameters().on(&mut tape);
        let inputs: Vec<Option<Variable>> = sides
            .iter()
            .zip(embeddings)
            .map(|(side, tensor)| (!side.sequences.is_empty()).then(|| tape.input(tensor)))
            .collect();
        let loss = self.loss(&mut tape, &inputs, &parameters[encoder.log_scale()], ids)?;
        drop(parameters);
        let value = loss.value().clone();
        let mut cached = tape.backward(loss, None, &mut self.gradients)?;
        let cached: Vec<Option<Tensor>> =
            inputs.iter().map(|input| input.as_ref().and_then(|input| cached.take(input))).collect();
        drop(inputs);

        for part in &parts {
            // The gradient of one side at a time: each is the start of a way back of its own.
            for (side, gradient) in sides.iter().zip(&cached) {
                let Some(gradient) = gradient else { continue };
                let range = side.of(part);
                let mut upstream = device.empty([range.len(), width], DType::F32)?;
                copy_rows(&device, gradient, range.start, &mut upstream, 0, range.len())?;
                let mut tape = Tape::new(&device);
                let parameters = encoder.parameters().on(&mut tape);
                let batch = PackedBatch::new(&device, &side.sequences[range.clone()], side.offsets[range.start])?;
                let output = encoder.forward(&mut tape, &parameters, side.tower, &batch, Some(dropout))?;
                drop(parameters);
                tape.backward(output, Some(upstream), &mut self.gradients)?;
            }
        }
        Ok(value)
    }

    fn loss(
        &self,
        tape: &mut Tape,
        encoded: &[Option<Variable>],
        log_scale: &Variable,
        ids: Option<&[i64]>,
    ) -> Result<Variable> {
        let [Some(queries), Some(documents), hard_negatives] = encoded else {
            return Err(crate::Error::value("step", "batch", "is empty"));
        };
        let log_scale = self.learn_temperature.then_some(log_scale);
        let hard_negatives = hard_negatives.as_ref();
        tape.contrastive_loss(&self.objective, LossBatch { queries, documents, hard_negatives, ids, log_scale })
    }

    /// The gradients of the last step, in the order of the parameters.
    ///
    /// # Errors
    /// What the device reports.
    pub fn last_gradients(&mut self) -> Result<Vec<&Tensor>> {
        self.gradients.finish()
    }
}

/// The embeddings of some pairs: queries, documents and hard negatives.
fn encode(
    encoder: &DualEncoder,
    tape: &mut Tape,
    parameters: &[Variable],
    sides: &[Side<'_>; 3],
    pairs: &Range<usize>,
    dropout: StepDropout,
) -> Result<Vec<Option<Variable>>> {
    let device = tape.device().clone();
    // With one encoder for both, the whole batch goes through it at once.
    let whole = pairs.len() == sides[0].sequences.len();
    if whole && encoder.settings().towers == Towers::Shared {
        let sequences: Vec<&[u32]> = sides.iter().flat_map(|side| side.sequences.iter().copied()).collect();
        let batch = PackedBatch::new(&device, &sequences, 0)?;
        let all = encoder.forward(tape, parameters, Tower::Query, &batch, Some(dropout))?;
        let mut first = 0;
        return sides
            .iter()
            .map(|side| {
                let count = side.sequences.len();
                first += count;
                if count == 0 { Ok(None) } else { tape.rows(&all, first - count, count).map(Some) }
            })
            .collect();
    }
    sides
        .iter()
        .map(|side| {
            let range = side.of(pairs);
            if range.is_empty() {
                return Ok(None);
            }
            let batch = PackedBatch::new(&device, &side.sequences[range.clone()], side.offsets[range.start])?;
            encoder.forward(tape, parameters, side.tower, &batch, Some(dropout)).map(Some)
        })
        .collect()
}

fn copy_rows(
    device: &Device,
    input: &Tensor,
    input_row: usize,
    output: &mut Tensor,
    output_row: usize,
    rows: usize,
) -> Result<()> {
    let width = input.shape().width();
    device.copy(Copy {
        input,
        input_offset: input_row * width,
        output,
        output_offset: output_row * width,
        elements: rows * width,
        accumulate: false,
    })
}
