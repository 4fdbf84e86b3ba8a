//! The loop: from files to a trained, evaluated, saved model.
//!
//! | file in the output folder | content |
//! |---|---|
//! | those of [`Model`] | the trained model, written at the end |
//! | `training.toml` | the settings |
//! | `metrics.jsonl` | loss, learning rate and gradient norm of each step; the evaluations |
//! | `loss.svg`, `loss.png` | the loss curve |
//! | `checkpoint.safetensors` | the last checkpoint |

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::checkpoint::Checkpoint;
use super::settings::{Length, TrainSettings};
use super::step::Trainer;
use crate::evaluate::{Beir, EvaluationProgress, Metrics, evaluate};
use crate::files::{remove_unfinished, write_atomically};
use crate::model::{Model, make_folder};
use crate::nn::{AdamW, AdamWSettings, Decay, DualEncoder, DualEncoderSettings, EncoderSettings, Schedule, Towers};
use crate::report::{MetricsLog, loss_curve};
use crate::text::{Batches, PairReader, TokenisedPairs, Tokenizer};
use crate::{Device, Error, Objective, Result, Tensor};

/// What happens in a training, for whoever watches it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A tokenizer is being trained on the pairs.
    TrainingTokenizer,
    /// So many pairs have been read and tokenised.
    ReadPairs(usize),
    /// Everything is ready.
    Ready {
        /// The device.
        device: &'a Device,
        /// The objective.
        objective: &'a Objective,
        /// Numbers in the model.
        parameters: usize,
        /// Token ids there can be.
        vocabulary_size: usize,
        /// Pairs to learn from.
        pairs: usize,
        /// Steps that were made before this run.
        done_steps: u64,
        /// Steps of the whole training.
        total_steps: u64,
    },
    /// An evaluation has embedded so many of so many texts.
    Evaluating {
        /// Texts that are done.
        done: usize,
        /// All texts.
        total: usize,
    },
    /// An evaluation is finished.
    Evaluated {
        /// Steps that had been made: 0 before training.
        step: u64,
        /// The result.
        metrics: &'a Metrics,
    },
    /// Steps were made.
    Steps {
        /// The last of them.
        step: u64,
        /// Its loss.
        loss: f32,
        /// Pairs trained on since the training began or was resumed, without pauses for evaluation.
        pairs: u64,
        /// The time that took.
        seconds: f64,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Steps that had been made.
        step: u64,
    },
}

/// What came of a training.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Steps of the whole training.
    pub steps: u64,
    /// The loss of the last step.
    pub loss: f32,
    /// Pairs trained on by this run.
    pub pairs: u64,
    /// The time of this run's steps, without tokenisation and evaluation.
    pub seconds: f64,
    /// The evaluation before training, unless it was made by an earlier run.
    pub before: Option<Metrics>,
    /// The evaluation after training.
    pub after: Option<Metrics>,
    /// The output folder.
    pub output: PathBuf,
}

/// Watches a training: is called with what happens, and asked after each step whether to stop.
pub trait Watcher {
    /// Something happened.
    fn event(&mut self, event: Event<'_>);

    /// Whether to stop. The training then writes a checkpoint and returns [`Error::Interrupted`].
    fn wants_to_stop(&self) -> bool {
        false
    }
}

impl<F: FnMut(Event<'_>)> Watcher for F {
    fn event(&mut self, event: Event<'_>) {
        self(event);
    }
}

/// Steps whose losses are read together where reading one means waiting for the device.
const STEPS_PER_READ: usize = 16;

/// The temperature is not learned below 0.01 (CLIP, arXiv 2103.00020, section 2.5).
const LARGEST_LOG_SCALE: f32 = 4.605_170_2;

const CHECKPOINT: &str = "checkpoint.safetensors";
const METRICS: &str = "metrics.jsonl";
const SETTINGS: &str = "training.toml";

/// Trains a model as the settings say, into a folder that does not exist yet or is empty.
///
/// # Errors
/// [`Error::File`] if the folder holds something, any error of the input files, [`Error::Diverged`] if the loss stops
/// being finite and [`Error::DeviceLost`] if the device goes (the last checkpoint is kept), [`Error::Interrupted`] if
/// the watcher wants to stop.
pub fn train(settings: &TrainSettings, output: &Path, device: &Device, watcher: &mut dyn Watcher) -> Result<Outcome> {
    settings.check()?;
    match std::fs::read_dir(output) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                let reason = if output.join(CHECKPOINT).exists() {
                    "holds a training already; resume that, or choose another output folder"
                } else {
                    "is not empty; choose another output folder"
                };
                return Err(Error::file(output, reason));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io(output, "use it as the output folder", error)),
    }
    Run::new(settings.clone(), output, device, None, watcher)?.go(watcher)
}

/// Goes on with the training in a folder from its last checkpoint. What follows is bit for bit what would have followed
/// without the interruption.
///
/// `settings`, if given, may say where files lie now; where they contradict the checkpoint it is an error.
///
/// # Errors
/// As [`train`], and [`Error::File`] or [`Error::Setting`] if there is no checkpoint or it is one of other settings,
/// pairs or another tokenizer.
pub fn resume(
    settings: Option<&TrainSettings>,
    output: &Path,
    device: &Device,
    watcher: &mut dyn Watcher,
) -> Result<Outcome> {
    let path = output.join(CHECKPOINT);
    if !path.exists() {
        let reason = "holds no checkpoint to resume from; train into another output folder, from the beginning";
        return Err(Error::file(output, reason));
    }
    let (checkpoint, bytes) = Checkpoint::read(&path)?;
    let settings = match settings {
        None => checkpoint.settings.clone(),
        Some(settings) => {
            settings.check()?;
            if let Some((name, mine, theirs)) = settings.difference(&checkpoint.settings) {
                let reason = format!("is {mine}, but the checkpoint in {} was trained with {theirs}", output.display());
                return Err(Error::setting(name, reason));
            }
            settings.clone()
        }
    };
    Run::new(settings, output, device, Some((checkpoint, bytes)), watcher)?.go(watcher)
}

/// A training with everything it needs.
struct Run<'a> {
    settings: TrainSettings,
    output: &'a Path,
    device: &'a Device,
    objective: Objective,
    model: Model,
    pairs: TokenisedPairs,
    pairs_fingerprint: u64,
    batches: Batches,
    beir: Option<Beir>,
    trainer: Trainer,
    schedule: Schedule,
    log: MetricsLog,
    /// Steps that were made before.
    done: u64,
    last_loss: f32,
}

impl<'a> Run<'a> {
    fn new(
        settings: TrainSettings,
        output: &'a Path,
        device: &'a Device,
        checkpoint: Option<(Checkpoint, Vec<u8>)>,
        watcher: &mut dyn Watcher,
    ) -> Result<Self> {
        let objective = settings.objective()?;
        let beir = settings.evaluate_on.as_ref().map(Beir::open).transpose()?;
        let start = settings.model.as_ref().map(|folder| Model::load(folder, device)).transpose()?;
        // A resumed training finds its tokenizer where it was left, whatever has become of the original.
        let kept = output.join("tokenizer.json");
        let tokenizer = match (&checkpoint, &settings.tokenizer, &start) {
            (Some(_), ..) => Tokenizer::from_file(&kept)?,
            (None, Some(path), None) => Tokenizer::from_file(path)?,
            (None, Some(_), Some(_)) => {
                let reason = "does not go with `model`, which brings its own; leave one of them out";
                return Err(Error::setting("tokenizer", reason));
            }
            (None, None, Some(model)) => model.tokenizer.clone(),
            (None, None, None) => {
                watcher.event(Event::TrainingTokenizer);
                train_tokenizer(&settings)?
            }
        };
        if let Some((checkpoint, _)) = &checkpoint
            && checkpoint.tokenizer_fingerprint != tokenizer.fingerprint()
        {
            return Err(Error::file(kept, "is not the tokenizer that the checkpoint was trained with"));
        }
        let pairs = TokenisedPairs::read(
            &settings.pairs,
            &tokenizer,
            settings.max_query_length,
            settings.max_document_length,
            settings.hard_negatives,
            &mut |count| watcher.event(Event::ReadPairs(count)),
        )?;
        let pairs_fingerprint = fingerprint(&pairs);
        if let Some((checkpoint, _)) = &checkpoint
            && checkpoint.pairs_fingerprint != pairs_fingerprint
        {
            return Err(Error::file(&settings.pairs, "does not hold the pairs that the checkpoint was trained with"));
        }
        let (duplicates, mask_ids) = settings.duplicates()?;
        let batches = Batches::new(&pairs, settings.batch_size, settings.seed, duplicates)?;
        let total_steps = match settings.length()? {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => batches.steps(epochs),
        };

        let mut encoder = match start {
            Some(model) => model.encoder,
            None => DualEncoder::new(device, encoder_settings(&settings, &tokenizer)?, 0.0, settings.seed)?,
        };
        let positions = encoder.settings().encoder.max_positions;
        let longest = settings.max_query_length.max(settings.max_document_length);
        let longest = longest.max(settings.query_length()).max(settings.document_length());
        if longest > positions {
            let reason = format!("allows {longest} tokens, but the model has {positions} positions");
            return Err(Error::setting("max-document-length", reason));
        }
        let log_scale = encoder.log_scale();
        encoder.parameters_mut().write(log_scale, &[objective.log_scale() as f32])?;
        let optimizer_settings = AdamWSettings {
            weight_decay: settings.weight_decay,
            max_gradient_norm: if settings.max_gradient_norm > 0.0 {
                settings.max_gradient_norm
            } else {
                f32::INFINITY
            },
            ..AdamWSettings::default()
        };
        let mut optimizer = AdamW::new(encoder.parameters(), optimizer_settings)?;
        optimizer.limit(log_scale, LARGEST_LOG_SCALE.max(objective.log_scale() as f32));

        make_folder(output)?;
        let mut done = 0;
        let mut last_loss = f32::NAN;
        let log = match &checkpoint {
            Some((checkpoint, bytes)) => {
                checkpoint.restore(&output.join(CHECKPOINT), bytes, &mut encoder, &mut optimizer)?;
                remove_unfinished(output)?;
                done = checkpoint.step;
                last_loss = checkpoint.loss;
                MetricsLog::resume(output.join(METRICS), done)?
            }
            None => {
                let toml = settings.to_toml()?;
                write_atomically(&output.join(SETTINGS), |file| file.write_all(toml.as_bytes()))?;
                tokenizer.save(&kept)?;
                MetricsLog::create(output.join(METRICS))?
            }
        };
        let schedule = Schedule {
            peak: settings.learning_rate,
            warmup_steps: (settings.warmup * total_steps as f64).round() as u64,
            total_steps,
            decay: settings.decay.parse::<Decay>()?,
        };
        let trainer = Trainer::new(
            &encoder,
            optimizer,
            objective.clone(),
            (settings.learn_temperature, mask_ids),
            settings.mini_batch_size,
            settings.seed,
        )?;
        let model = Model {
            encoder,
            tokenizer,
            similarity: objective.similarity_kind(),
            max_query_length: settings.query_length(),
            max_document_length: settings.document_length(),
        };
        Ok(Self {
            settings,
            output,
            device,
            objective,
            model,
            pairs,
            pairs_fingerprint,
            batches,
            beir,
            trainer,
            schedule,
            log,
            done,
            last_loss,
        })
    }

    fn go(mut self, watcher: &mut dyn Watcher) -> Result<Outcome> {
        self.run(watcher).map_err(|error| match error {
            Error::DeviceLost { device, reason } => {
                Error::DeviceLost { device, reason: format!("{reason}; {}", self.kept()) }
            }
            error => error,
        })
    }

    fn run(&mut self, watcher: &mut dyn Watcher) -> Result<Outcome> {
        watcher.event(Event::Ready {
            device: self.device,
            objective: &self.objective,
            parameters: self.model.encoder.parameters().elements(),
            vocabulary_size: self.model.encoder.settings().encoder.vocabulary_size,
            pairs: self.pairs.len(),
            done_steps: self.done,
            total_steps: self.schedule.total_steps,
        });
        let before = if self.done == 0 { self.evaluate(0, watcher)? } else { None };
        let (pairs, seconds) = self.steps(watcher)?;
        let after = self.evaluate(self.schedule.total_steps, watcher)?;
        let steps = self.schedule.total_steps;
        let (loss, output) = (self.last_loss, self.output.to_path_buf());
        let curve = read_curve(&output.join(METRICS))?;
        loss_curve(
            &curve,
            &format!("{} loss", self.objective.name()),
            &output.join("loss.svg"),
            &output.join("loss.png"),
        )?;
        self.model.save(&output)?;
        Ok(Outcome { steps, loss, pairs, seconds, before, after, output })
    }

    /// Makes all steps that are left.
    fn steps(&mut self, watcher: &mut dyn Watcher) -> Result<(u64, f64)> {
        let started = Instant::now();
        let total = self.schedule.total_steps;
        let mut pairs = 0;
        let mut unread: Vec<(u64, u64, Tensor)> = Vec::new();
        let mut step = 0;
        for epoch in 0.. {
            if step == total {
                break;
            }
            for batch in self.batches.epoch(epoch) {
                if step == total {
                    break;
                }
                step += 1;
                if step <= self.done {
                    continue;
                }
                let rate = self.schedule.learning_rate(step);
                let loss = self.trainer.step(&mut self.model.encoder, &self.pairs, &batch, rate)?;
                pairs += batch.len() as u64;
                unread.push((step, epoch, loss));
                let stop = watcher.wants_to_stop();
                let every = self.settings.checkpoint_every;
                let checkpoint = stop || step == total || (every > 0 && step.is_multiple_of(every));
                if checkpoint || self.device.is_synchronous() || unread.len() >= STEPS_PER_READ {
                    self.read(&mut unread)?;
                    let (loss, seconds) = (self.last_loss, started.elapsed().as_secs_f64());
                    watcher.event(Event::Steps { step, loss, pairs, seconds });
                }
                if checkpoint {
                    self.save_checkpoint(step)?;
                    watcher.event(Event::Checkpoint { step });
                }
                if stop && step < total {
                    let advice = format!("{} holds everything to resume from there", self.output.display());
                    return Err(Error::Interrupted { step, advice });
                }
            }
        }
        Ok((pairs, started.elapsed().as_secs_f64()))
    }

    /// Reads losses from the device, checks and logs them.
    fn read(&mut self, unread: &mut Vec<(u64, u64, Tensor)>) -> Result<()> {
        let norm = self.trainer.optimizer.gradient_norm()?;
        let last = unread.len().saturating_sub(1);
        for (i, (step, epoch, loss)) in unread.drain(..).enumerate() {
            let loss = loss.to_scalar()?;
            let mut record = json!({
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "learning_rate": self.schedule.learning_rate(step),
            });
            if let (Some(norm), true) = (norm, i == last) {
                record["gradient_norm"] = json!(norm);
            }
            self.log.append(&record)?;
            if !loss.is_finite() {
                return Err(Error::Diverged { step, loss, advice: self.advice_on_divergence() });
            }
            self.last_loss = loss;
        }
        Ok(())
    }

    /// What is left of a training that cannot go on.
    fn kept(&self) -> String {
        let path = self.output.join(CHECKPOINT);
        match Checkpoint::read(&path) {
            Ok((checkpoint, _)) => format!("the checkpoint of step {} is kept in {}", checkpoint.step, path.display()),
            Err(_) => "there was no checkpoint yet".into(),
        }
    }

    /// What is left of a training whose numbers are no longer finite, and what to try.
    fn advice_on_divergence(&self) -> String {
        let kept = self.kept();
        format!("{kept}; try a lower learning rate, a higher temperature or a longer warm-up")
    }

    fn save_checkpoint(&mut self, step: u64) -> Result<()> {
        // The loss of a step is that of the weights before it: a step can have a finite loss and spoil the weights, and
        // they must not replace good ones.
        for parameter in self.model.encoder.parameters().iter() {
            if parameter.tensor().to_host::<f32>()?.iter().any(|value| !value.is_finite()) {
                let (name, advice) = (parameter.name(), self.advice_on_divergence());
                let reason = format!("are no longer finite after step {step}, first in `{name}`; {advice}");
                return Err(Error::value("training", "weights", reason));
            }
        }
        let checkpoint = Checkpoint::new(
            (step, self.schedule.total_steps),
            &self.settings,
            self.model.tokenizer.fingerprint(),
            self.pairs_fingerprint,
            self.last_loss,
        );
        checkpoint.save(&self.output.join(CHECKPOINT), &self.model.encoder, &self.trainer.optimizer)
    }

    fn evaluate(&mut self, step: u64, watcher: &mut dyn Watcher) -> Result<Option<Metrics>> {
        let Some(beir) = self.beir.take() else { return Ok(None) };
        let (queries, documents) = (beir.queries.len(), beir.documents.len());
        let metrics = evaluate(&self.model, &beir, &mut |progress| {
            let done = match progress {
                EvaluationProgress::Queries { done, .. } => done,
                EvaluationProgress::Documents { done, .. } => queries + done,
                EvaluationProgress::Searching => queries + documents,
            };
            watcher.event(Event::Evaluating { done, total: queries + documents });
        })?;
        self.beir = Some(beir);
        self.log.append(&json!({
            "step": step,
            "evaluation": {
                "ndcg@10": metrics.ndcg_at_10,
                "mrr@10": metrics.mrr_at_10,
                "recall@100": metrics.recall_at_100,
                "map": metrics.map,
            },
        }))?;
        watcher.event(Event::Evaluated { step, metrics: &metrics });
        Ok(Some(metrics))
    }
}

/// The shape of a new model.
fn encoder_settings(settings: &TrainSettings, tokenizer: &Tokenizer) -> Result<DualEncoderSettings> {
    let lengths =
        [settings.max_query_length, settings.max_document_length, settings.query_length(), settings.document_length()];
    Ok(DualEncoderSettings {
        encoder: EncoderSettings {
            vocabulary_size: tokenizer.id_bound(),
            hidden_size: settings.hidden_size,
            layers: settings.layers,
            heads: settings.heads,
            feed_forward_size: settings.feed_forward_size,
            max_positions: lengths.into_iter().max().unwrap_or(0),
            token_types: 2,
            layer_norm_epsilon: 1e-12,
            dropout: settings.dropout,
            attention_dropout: settings.attention_dropout,
            pooling: settings.pooling.parse()?,
        },
        towers: settings.towers.parse::<Towers>()?,
        projection: (settings.projection > 0).then_some(settings.projection),
    })
}

/// Trains a tokenizer on all texts of the pairs.
fn train_tokenizer(settings: &TrainSettings) -> Result<Tokenizer> {
    let mut failed = None;
    let texts = PairReader::open(&settings.pairs)?
        .map_while(|pair| pair.map_err(|error| failed = Some(error)).ok())
        .flat_map(|pair| [pair.query, pair.document].into_iter().chain(pair.negatives));
    let trained = Tokenizer::train(texts, settings.vocabulary_size);
    match failed {
        Some(error) => Err(error),
        None => trained,
    }
}

/// A number that changes when the pairs do (FNV-1a over their tokens, and over the hashes of their texts, by which
/// duplicates are known).
fn fingerprint(pairs: &TokenisedPairs) -> u64 {
    let mut hash = 0xCBF2_9CE4_8422_2325_u64;
    let mut mix = |word: u64| hash = (hash ^ word).wrapping_mul(0x0000_0100_0000_01B3);
    for pair in 0..pairs.len() {
        mix(pairs.query_key(pair));
        mix(pairs.document_key(pair));
        let negatives = (0..pairs.hard_negatives()).map(|which| pairs.negative(pair, which));
        for text in [pairs.query(pair), pairs.document(pair)].into_iter().chain(negatives) {
            mix(text.len() as u64);
            text.iter().for_each(|&token| mix(u64::from(token)));
        }
    }
    hash
}

/// The losses of a metrics log.
fn read_curve(path: &Path) -> Result<Vec<(u64, f32)>> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, "read it", error))?;
    let records = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    Ok(records
        .filter_map(|record| Some((record.get("step")?.as_u64()?, record.get("loss")?.as_f64()? as f32)))
        .collect())
}
