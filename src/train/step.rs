//! One step: encode, compare, send gradients back, move.

use std::ops::Range;

use crate::autograd::{LossBatch, LossConstants, ParameterGradients, Tape, Variable};
use crate::backend::PackedBatch;
use crate::backend::operations::Copy;
use crate::error::DType;
use crate::nn::{AdamW, DualEncoder, StepDropout, Tower, Towers};
use crate::objective::relations::Relations;
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
        // What was recorded since the step before goes to the device together.
        encoder.parameters().device().submit()?;
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
        let relations = Relations { ids, ..Relations::default() };
        let constants = LossConstants { relations, ..LossConstants::default() };
        let batch = LossBatch { hard_negatives, log_scale, constants, ..LossBatch::new(queries, documents) };
        tape.contrastive_loss(&self.objective, batch)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::operations::Pooling;
    use crate::nn::{AdamWSettings, DualEncoderSettings, EncoderSettings};
    use crate::text::Tokenizer;
    use crate::{Error, Similarity};

    const K: usize = 2;

    /// Pairs of different lengths with two hard negatives each; some of them share a query or a document.
    fn pairs(count: usize) -> (Tokenizer, TokenisedPairs) {
        let words = ["red", "green", "blue", "house", "tree", "river", "stone", "cloud", "bird", "road"];
        let text = |seed: usize, longest: usize| -> String {
            let length = 1 + seed * 7 % longest;
            (0..length).map(|i| words[(seed * seed + 3 * i * seed + i) % words.len()]).collect::<Vec<_>>().join(" ")
        };
        let lines: Vec<String> = (0..count)
            .map(|i| {
                // The third pair repeats a query, the sixth a document.
                let (query, document) = (if i == 2 { 1 } else { i + 1 }, if i == 5 { 104 } else { i + 100 });
                let pair = serde_json::json!({
                    "query": text(query, 5),
                    "document": text(document, 23),
                    "negatives": [text(i + 300, 11), text(i + 400, 17)],
                });
                pair.to_string()
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs.jsonl");
        std::fs::write(&path, lines.join("\n")).unwrap();
        let tokenizer = Tokenizer::train(words, 200).unwrap();
        let pairs = TokenisedPairs::read(&path, &tokenizer, 8, 24, K, &mut |_| ()).unwrap();
        (tokenizer, pairs)
    }

    struct Case {
        towers: Towers,
        objective: &'static str,
        similarity: Similarity,
        mask_ids: bool,
        mini_batch_size: usize,
        hidden_size: usize,
        dropout: f32,
        seed: u64,
    }

    impl Case {
        fn new(towers: Towers) -> Self {
            Self {
                towers,
                objective: "samtone-bidirectional",
                similarity: Similarity::Cosine,
                mask_ids: true,
                mini_batch_size: 0,
                hidden_size: 16,
                dropout: 0.2,
                seed: 4,
            }
        }

        fn start(&self, tokenizer: &Tokenizer) -> Result<(DualEncoder, Trainer)> {
            self.start_on(&Device::cpu(), tokenizer)
        }

        fn start_on(&self, device: &Device, tokenizer: &Tokenizer) -> Result<(DualEncoder, Trainer)> {
            let encoder = EncoderSettings {
                vocabulary_size: tokenizer.id_bound(),
                hidden_size: self.hidden_size,
                layers: 2,
                heads: 2,
                feed_forward_size: 2 * self.hidden_size,
                max_positions: 24,
                token_types: 2,
                layer_norm_epsilon: 1e-12,
                dropout: self.dropout,
                attention_dropout: self.dropout,
                pooling: Pooling::Mean,
            };
            let projection = (self.towers == Towers::SharedProjection).then_some(12);
            let settings = DualEncoderSettings { encoder, towers: self.towers, projection };
            let objective = Objective::named(self.objective)?.temperature(0.1)?.similarity(self.similarity);
            let encoder = DualEncoder::new(device, settings, objective.log_scale() as f32, 4)?;
            let optimizer = AdamW::new(encoder.parameters(), AdamWSettings::default())?;
            let trainer =
                Trainer::new(&encoder, optimizer, objective, (true, self.mask_ids), self.mini_batch_size, self.seed)?;
            Ok((encoder, trainer))
        }

        /// The loss of a batch and its gradients by name.
        fn gradients(&self, batch: &[u32]) -> (f32, Vec<(String, Vec<f32>)>) {
            let (tokenizer, pairs) = pairs(11);
            let (encoder, mut trainer) = self.start(&tokenizer).unwrap();
            let loss = trainer.gradients(&encoder, &pairs, batch).unwrap().to_scalar().unwrap();
            let gradients = trainer.last_gradients().unwrap();
            let names = encoder.parameters().iter().map(|parameter| parameter.name().to_owned());
            (loss, names.zip(gradients.iter().map(|gradient| gradient.to_host::<f32>().unwrap())).collect())
        }

        /// The losses of some steps and all parameters after them.
        fn train(&self, count: usize, steps: usize) -> Vec<f32> {
            let (tokenizer, pairs) = pairs(count);
            let (mut encoder, mut trainer) = self.start(&tokenizer).unwrap();
            let batch: Vec<u32> = (0..count as u32).collect();
            let mut all = Vec::new();
            for _ in 0..steps {
                let loss = trainer.step(&mut encoder, &pairs, &batch, 1e-3).unwrap();
                all.push(loss.to_scalar().unwrap());
            }
            for parameter in encoder.parameters().iter() {
                all.extend(parameter.tensor().to_host::<f32>().unwrap());
            }
            all
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[track_caller]
    fn assert_same_step(case: &Case) {
        let batch = [7, 2, 0, 5, 9, 1, 4, 10];
        let (loss, expected) = Case { mini_batch_size: 0, ..*case }.gradients(&batch);
        let (cached_loss, found) = case.gradients(&batch);
        let what = format!("{} {} in parts of {}", case.towers, case.objective, case.mini_batch_size);
        assert!((cached_loss - loss).abs() <= 1e-5 * loss.abs(), "{what}: {cached_loss}, not {loss}");
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().flat_map(|(_, gradient)| gradient).fold(0.0f32, |max, g| max.max(g.abs()));
        for ((name, expected), (_, found)) in expected.iter().zip(&found) {
            assert_eq!(found.len(), expected.len());
            let error = expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error <= 1e-5 * largest, "{what}: {name} is off by {error}, the largest gradient is {largest}");
            let own = expected.iter().fold(0.0f32, |max, g| max.max(g.abs()));
            assert!(own > 0.0, "{what}: {name} has no gradient, so nothing is compared");
        }
    }

    #[test]
    fn gradient_caching_makes_the_step_of_the_whole_batch() {
        for towers in [Towers::Shared, Towers::Separate, Towers::SharedProjection] {
            // One pair at a time, parts that do not fill the batch, and parts that do.
            for mini_batch_size in [1, 3, 4, 7] {
                assert_same_step(&Case { mini_batch_size, ..Case::new(towers) });
            }
            assert_same_step(&Case {
                mini_batch_size: 3,
                similarity: Similarity::Dot,
                mask_ids: false,
                ..Case::new(towers)
            });
        }
        for objective in Objective::CENTRE {
            assert_same_step(&Case { mini_batch_size: 3, objective, ..Case::new(Towers::Separate) });
        }
    }

    #[test]
    fn the_comparison_above_would_notice_what_it_is_about() {
        let batch = [7, 2, 0, 5, 9, 1, 4, 10];
        let case = Case::new(Towers::Separate);
        let (loss, gradients) = case.gradients(&batch);
        for (what, other) in [
            ("dropout", Case { dropout: 0.0, ..case }),
            ("the seed of dropout", Case { seed: 5, ..case }),
            // Pairs 2 and 1 have the same query.
            ("masking", Case { mask_ids: false, ..case }),
        ] {
            let (other_loss, other_gradients) = other.gradients(&batch);
            assert!((other_loss - loss).abs() > 1e-4 * loss, "{what} makes no difference: {other_loss}, {loss}");
            assert_ne!(other_gradients, gradients, "{what}");
        }
        let temperature = gradients.iter().find(|(name, _)| name == "log_scale").unwrap();
        assert!(temperature.1[0] != 0.0);
    }

    #[test]
    fn a_step_follows_from_the_seed() {
        let case = Case::new(Towers::Shared);
        let first = case.train(8, 3);
        assert!(first.iter().all(|value| value.is_finite()));
        assert_eq!(bits(&case.train(8, 3)), bits(&first));
        let other = Case { seed: 5, ..case }.train(8, 3);
        assert_ne!(bits(&other[..1]), bits(&first[..1]), "the first loss does not depend on the seed");
    }

    #[test]
    fn a_step_does_not_depend_on_the_number_of_threads() {
        // Large enough that every kernel splits its work.
        for mini_batch_size in [0, 20] {
            let case = Case { hidden_size: 64, mini_batch_size, ..Case::new(Towers::Separate) };
            let with = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                bits(&pool.install(|| case.train(64, 2)))
            };
            let one = with(1);
            for threads in [2, 5] {
                assert!(with(threads) == one, "{threads} threads make another step than one");
            }
        }
    }

    /// A step is one submission, and reading its loss another one.
    #[cfg(feature = "wgpu")]
    #[test]
    fn a_step_is_one_submission() {
        use crate::backend::wgpu::{Settings, Wgpu};

        let opened = match Wgpu::open(0, Settings::default()) {
            Ok(opened) => opened,
            Err(error) => return println!("skipped: {error}"),
        };
        let device = Device::new(opened);
        let wgpu: &Wgpu = device.backend().unwrap();
        for mini_batch_size in [0, 3] {
            let (tokenizer, pairs) = pairs(8);
            let case = Case { mini_batch_size, ..Case::new(Towers::Separate) };
            let (mut encoder, mut trainer) = case.start_on(&device, &tokenizer).unwrap();
            let mut step = || trainer.step(&mut encoder, &pairs, &[0, 1, 2, 3], 1e-3).unwrap();
            // A loss is held while the next one is computed.
            let first = step();
            let mut loss = step();
            drop(first);
            let (submissions, held) = (wgpu.submissions(), device.held_bytes());
            for _ in 0..10 {
                loss = step();
            }
            assert_eq!(wgpu.submissions(), submissions + 10);
            assert!(loss.to_scalar().unwrap().is_finite());
            assert_eq!(wgpu.submissions(), submissions + 11);
            assert_eq!(device.held_bytes(), held, "a step takes memory that the one before did not give back");
        }
    }

    #[test]
    fn an_empty_batch_is_an_error() {
        for mini_batch_size in [0, 3] {
            let (tokenizer, pairs) = pairs(4);
            let case = Case { mini_batch_size, ..Case::new(Towers::Shared) };
            let (encoder, mut trainer) = case.start(&tokenizer).unwrap();
            let error = trainer.gradients(&encoder, &pairs, &[]).unwrap_err();
            assert!(matches!(error, Error::Value { .. }), "{error}");
        }
    }
}
