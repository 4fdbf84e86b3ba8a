//! `nearfar train`

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use nearfar::evaluate::Metrics;
use nearfar::train::{Checkpoint, Event, Outcome, TrainSettings, Watcher};
use serde_json::json;

use super::{DeviceArgs, OutputArgs};

const AFTER_HELP: &str = "\
Settings come from --config, a TOML file with the same names as the options here (without the hyphens in front), and \
options on the command line override it. Without any, a small dual encoder is trained on Python docstrings and \
functions in data/pydoc and evaluated on functions it has not seen.

Ctrl-C writes a checkpoint and says how to go on; so does a training that was killed, from its last checkpoint.

Examples:
  nearfar train
  nearfar train --pairs pairs.jsonl --evaluate-on my-beir-folder --epochs 10 --output my-model
  nearfar train --pairs pairs.csv --batch-size 4096 --mini-batch-size 256
  nearfar train --resume --output my-model";

/// Train a dual encoder on pairs of texts.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Train {
    /// TOML file with settings; options given here override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Folder for the model, the metrics log and the loss curve; must not exist or be empty [default: nearfar-output]
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,

    /// Go on with the training in --output from its last checkpoint
    #[arg(long)]
    resume: bool,

    #[command(flatten)]
    settings: Settings,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    print: OutputArgs,
}

/// Options of which a model folder has its own value; given with one they would have no effect.
const BROUGHT_BY_MODEL: [&str; 11] = [
    "tokenizer",
    "vocabulary_size",
    "towers",
    "projection",
    "layers",
    "hidden_size",
    "heads",
    "feed_forward_size",
    "pooling",
    "dropout",
    "attention_dropout",
];

/// Makes the options that override settings, and what applies them.
macro_rules! settings {
    ($($(#[$attribute:meta])* $field:ident: $type:ty $(=> $wrap:ident)?,)*) => {
        #[derive(Debug, Args)]
        struct Settings {
            $($(#[$attribute])* #[arg(long, allow_negative_numbers = true)] $field: Option<$type>,)*
        }

        impl Settings {
            fn apply(&self, settings: &mut TrainSettings) {
                $(if let Some(value) = &self.$field {
                    settings.$field = settings!(@value value.clone() $(, $wrap)?);
                })*
            }
        }
    };
    (@value $value:expr) => { $value };
    (@value $value:expr, $wrap:ident) => { $wrap($value) };
}

settings! {
    /// Pairs to learn from: JSONL, CSV or TSV with query and document (or anchor and positive), and perhaps negatives [default: data/pydoc/train.jsonl]
    #[arg(value_name = "FILE", help_heading = "Data")]
    pairs: PathBuf,
    /// BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv) to evaluate on, before and after
    #[arg(value_name = "FOLDER", help_heading = "Data")]
    evaluate_on: PathBuf => Some,
    /// Hard negatives of each pair that are used [default: 0]
    #[arg(value_name = "K", help_heading = "Data")]
    hard_negatives: usize,
    /// Pairs with the same query or document: avoid (never in one batch), mask (not each other's negatives) or keep [default: avoid]
    #[arg(value_name = "HOW", help_heading = "Data")]
    duplicates: String,
    /// A tokenizer.json; without it one is trained on the pairs
    #[arg(value_name = "FILE", help_heading = "Data")]
    tokenizer: PathBuf => Some,
    /// Largest vocabulary of a tokenizer that is trained [default: 16384]
    #[arg(value_name = "TOKENS", help_heading = "Data")]
    vocabulary_size: usize,
    /// Queries are cut after so many tokens [default: 32]
    #[arg(value_name = "TOKENS", help_heading = "Data")]
    max_query_length: usize,
    /// Documents are cut after so many tokens [default: 64]
    #[arg(value_name = "TOKENS", help_heading = "Data")]
    max_document_length: usize,
    /// The same when the model is used [default: as in training]
    #[arg(value_name = "TOKENS", help_heading = "Data")]
    inference_query_length: usize,
    /// The same when the model is used [default: as in training]
    #[arg(value_name = "TOKENS", help_heading = "Data")]
    inference_document_length: usize,

    /// infonce, symmetric, samtone, samtone-bidirectional, nt-xent or gte [default: samtone-bidirectional]
    #[arg(value_name = "NAME", help_heading = "Objective")]
    objective: String,
    /// Similarities are divided by it [default: 0.05]
    #[arg(value_name = "T", help_heading = "Objective")]
    temperature: f64,
    /// Learn the temperature, from there, not below 0.01 [default: false]
    #[arg(value_name = "true|false", num_args = 0..=1, default_missing_value = "true", help_heading = "Objective")]
    learn_temperature: bool,
    /// cosine or dot [default: cosine]
    #[arg(value_name = "NAME", help_heading = "Objective")]
    similarity: String,
    /// For infonce and symmetric [default: 0]
    #[arg(value_name = "E", help_heading = "Objective")]
    label_smoothing: f64,

    /// Model folder to start from instead of random weights; it brings its tokenizer and its shape
    #[arg(value_name = "FOLDER", help_heading = "Model", conflicts_with_all = BROUGHT_BY_MODEL)]
    model: PathBuf => Some,
    /// What the two towers share: shared (everything), separate or shared-projection [default: shared]
    #[arg(value_name = "WHAT", help_heading = "Model")]
    towers: String,
    /// Width of a projection after the encoder; 0 for none [default: 0]
    #[arg(value_name = "WIDTH", help_heading = "Model")]
    projection: usize,
    /// Blocks of the encoder [default: 2]
    #[arg(value_name = "N", help_heading = "Model")]
    layers: usize,
    /// Width of the token vectors [default: 128]
    #[arg(value_name = "WIDTH", help_heading = "Model")]
    hidden_size: usize,
    /// Attention heads [default: 2]
    #[arg(value_name = "N", help_heading = "Model")]
    heads: usize,
    /// Width of the feed-forward layer [default: 512]
    #[arg(value_name = "WIDTH", help_heading = "Model")]
    feed_forward_size: usize,
    /// mean or cls [default: mean]
    #[arg(value_name = "HOW", help_heading = "Model")]
    pooling: String,
    /// Dropout of the blocks' outputs [default: 0.1]
    #[arg(value_name = "P", help_heading = "Model")]
    dropout: f32,
    /// Dropout of the attention weights [default: 0.1]
    #[arg(value_name = "P", help_heading = "Model")]
    attention_dropout: f32,

    /// Pairs of a step; each is compared with all others [default: 128]
    #[arg(value_name = "PAIRS", help_heading = "Training")]
    batch_size: usize,
    /// Pairs that are encoded at a time, for batches larger than memory: same gradients, one more encoding [default: the batch]
    #[arg(value_name = "PAIRS", help_heading = "Training")]
    mini_batch_size: usize,
    /// Learning rate after the warm-up [default: 0.002]
    #[arg(value_name = "RATE", help_heading = "Training")]
    learning_rate: f64,
    /// Share of the steps in which the learning rate rises [default: 0.1]
    #[arg(value_name = "SHARE", help_heading = "Training")]
    warmup: f64,
    /// How the learning rate falls: constant, linear or cosine [default: linear]
    #[arg(value_name = "HOW", help_heading = "Training")]
    decay: String,
    /// Decoupled weight decay, none on biases and norms [default: 0.01]
    #[arg(value_name = "DECAY", help_heading = "Training")]
    weight_decay: f32,
    /// Norm that gradients are clipped to; 0 for no clipping [default: 1]
    #[arg(value_name = "NORM", help_heading = "Training")]
    max_gradient_norm: f32,
    /// Times through the pairs [default: 6]
    #[arg(value_name = "N", conflicts_with = "steps", help_heading = "Training")]
    epochs: u64 => Some,
    /// Steps, instead of epochs
    #[arg(value_name = "N", help_heading = "Training")]
    steps: u64 => Some,
    /// Seed of everything random [default: 1]
    #[arg(value_name = "SEED", help_heading = "Training")]
    seed: u64,
    /// Steps between checkpoints; 0 for none but the last [default: 200]
    #[arg(value_name = "STEPS", help_heading = "Training")]
    checkpoint_every: u64,
}

/// The test collection that comes with the pairs that are trained on by default.
const BUNDLED: &str = "data/pydoc";

const DEFAULT_OUTPUT: &str = "nearfar-output";

impl Train {
    pub(crate) fn run(&self) -> Result<()> {
        let device = self.device.open()?;
        let mut watcher = Bar::new()?;
        let output = match &self.output {
            Some(output) => output.clone(),
            None if self.resume => DEFAULT_OUTPUT.into(),
            None => unused(Path::new(DEFAULT_OUTPUT)),
        };
        let outcome = if self.resume {
            if !output.is_dir() {
                bail!("--resume: there is no folder {}; name the one of the training with --output", output.display());
            }
            let (settings, checkpoint) = (output.join("training.toml"), output.join("checkpoint.safetensors"));
            let settings = if settings.exists() {
                Some(self.settings(TrainSettings::from_toml(&settings)?)?)
            } else if checkpoint.exists() {
                Some(self.settings(Checkpoint::read(&checkpoint)?.0.settings)?)
            } else {
                None
            };
            nearfar::train::resume(settings.as_ref(), &output, &device, &mut watcher)
        } else {
            let settings = self.settings(TrainSettings::default())?;
            if settings.pairs == TrainSettings::default().pairs && !settings.pairs.exists() {
                bail!(
                    "there is no {} here; run from the project's folder, or give your own pairs with --pairs",
                    settings.pairs.display()
                );
            }
            nearfar::train::train(&settings, &output, &device, &mut watcher)
        };
        watcher.clear();
        let outcome = match outcome {
            Err(nearfar::Error::Interrupted { step, .. }) => {
                let output = output.display();
                bail!("stopped after step {step}; go on with: nearfar train --resume --output {output}");
            }
            Err(error @ nearfar::Error::DeviceLost { .. }) if output.join("checkpoint.safetensors").exists() => {
                let output = output.display();
                bail!("{error}; go on with: nearfar train --resume --output {output}");
            }
            outcome => outcome?,
        };
        self.print.print(&summary(&outcome), || describe(&outcome))
    }

    /// `base`, overridden by the file, overridden by the options.
    fn settings(&self, base: TrainSettings) -> Result<TrainSettings> {
        let mut settings = match &self.config {
            Some(path) => TrainSettings::from_toml(path).context("--config")?,
            None => base,
        };
        // Told one kind of length, the other kind of a file does not count.
        if self.settings.steps.is_some() {
            settings.epochs = None;
        }
        if self.settings.epochs.is_some() {
            settings.steps = None;
        }
        let default = TrainSettings::default().pairs;
        self.settings.apply(&mut settings);
        if settings.pairs == default && settings.evaluate_on.is_none() && Path::new(BUNDLED).is_dir() {
            settings.evaluate_on = Some(BUNDLED.into());
        }
        Ok(settings)
    }
}

/// The folder, or the first of `folder-2`, `folder-3`, … that is not there yet.
fn unused(folder: &Path) -> PathBuf {
    let numbered = (2..).map(|number| PathBuf::from(format!("{}-{number}", folder.display())));
    std::iter::once(folder.to_path_buf()).chain(numbered).find(|path| !path.exists()).unwrap_or_default()
}

fn metrics(metrics: &Metrics) -> serde_json::Value {
    json!({
        "ndcg@10": metrics.ndcg_at_10,
        "mrr@10": metrics.mrr_at_10,
        "recall@100": metrics.recall_at_100,
        "map": metrics.map,
    })
}

fn pairs_per_second(outcome: &Outcome) -> f64 {
    if outcome.seconds > 0.0 { outcome.pairs as f64 / outcome.seconds } else { 0.0 }
}

fn summary(outcome: &Outcome) -> serde_json::Value {
    json!({
        "steps": outcome.steps,
        "loss": outcome.loss,
        "seconds": outcome.seconds,
        "pairs_per_second": pairs_per_second(outcome),
        "before": outcome.before.as_ref().map(metrics),
        "after": outcome.after.as_ref().map(metrics),
        "output": outcome.output,
    })
}

fn describe(outcome: &Outcome) -> String {
    let mut text = String::new();
    if let Some(after) = &outcome.after {
        text.push_str("             nDCG@10   MRR@10  Recall@100      MAP\n");
        for (name, metrics) in [("before", outcome.before.as_ref()), ("after", Some(after))] {
            if let Some(m) = metrics {
                let (ndcg, mrr, recall, map) = (m.ndcg_at_10, m.mrr_at_10, m.recall_at_100, m.map);
                text.push_str(&format!("  {name:<8}  {ndcg:>8.4} {mrr:>8.4}  {recall:>10.4} {map:>8.4}\n"));
            }
        }
    }
    text.push_str(&format!(
        "trained {} steps in {:.1} s ({:.0} pairs/s), last loss {:.4}\nthe model is in {}",
        outcome.steps,
        outcome.seconds,
        pairs_per_second(outcome),
        outcome.loss,
        outcome.output.display()
    ));
    text
}

/// Shows a training on stderr and stops it on Ctrl-C.
struct Bar {
    bar: ProgressBar,
    /// Steps that earlier runs made.
    done_steps: u64,
    total_steps: u64,
    stop: Arc<AtomicBool>,
}

impl Bar {
    fn new() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        ctrlc::set_handler(move || {
            // The first asks nicely; a second one means it.
            if asked.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            tracing::info!("stopping after the next step, with a checkpoint; a second Ctrl-C stops at once");
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(Self { bar: ProgressBar::hidden(), done_steps: 0, total_steps: 0, stop })
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn say(&self, message: &str) {
        self.bar.suspend(|| tracing::info!("{message}"));
    }

    fn restart(&mut self, length: u64, template: &str) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::new(length);
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("━╸ "));
        }
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }
}

const STEPS: &str = "  step {pos}/{len} {bar:30} {msg}  {elapsed} gone, {eta} left";
const COUNT: &str = "  {msg} {human_pos}";
const TEXTS: &str = "  {msg} {bar:30} {pos}/{len}";

impl Watcher for Bar {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::TrainingTokenizer => {
                self.restart(0, "  {spinner} {msg}");
                self.bar.set_message("training a tokenizer");
            }
            Event::ReadPairs(count) => {
                if self.bar.message() != "reading pairs" {
                    self.restart(0, COUNT);
                    self.bar.set_message("reading pairs");
                }
                self.bar.set_position(count as u64);
            }
            Event::Ready { device, objective, parameters, vocabulary_size, pairs, done_steps, total_steps } => {
                self.bar.finish_and_clear();
                (self.done_steps, self.total_steps) = (done_steps, total_steps);
                self.say(&format!("{pairs} pairs, {vocabulary_size} tokens, {parameters} parameters, on {device}"));
                self.say(&format!("{objective}"));
                if done_steps > 0 {
                    self.say(&format!("resuming after step {done_steps} of {total_steps}"));
                }
            }
            Event::Evaluating { done, total } => {
                if self.bar.message() != "evaluating" || self.bar.length() != Some(total as u64) {
                    self.restart(total as u64, TEXTS);
                    self.bar.set_message("evaluating");
                }
                self.bar.set_position(done as u64);
            }
            Event::Evaluated { step, metrics } => {
                self.bar.finish_and_clear();
                self.bar.set_message("");
                self.say(&format!(
                    "after step {step}: nDCG@10 {:.4}, MRR@10 {:.4}, Recall@100 {:.4}",
                    metrics.ndcg_at_10, metrics.mrr_at_10, metrics.recall_at_100
                ));
            }
            Event::Steps { step, loss, pairs, seconds } => {
                if self.bar.length() != Some(self.total_steps) || self.bar.is_finished() {
                    self.restart(self.total_steps, STEPS);
                    self.bar.set_position(step);
                    self.bar.reset_eta();
                }
                self.bar.set_position(step);
                let rate = pairs as f64 / seconds.max(1e-9);
                self.bar.set_message(format!("loss {loss:.4}  {rate:.0} pairs/s"));
                // Where there is no bar, a line now and then.
                if self.bar.is_hidden() && (step == 1 || step % (self.total_steps / 10).max(1) == 0) {
                    let own_steps = step.saturating_sub(self.done_steps).max(1);
                    let left = seconds / own_steps as f64 * self.total_steps.saturating_sub(step) as f64;
                    self.say(&format!(
                        "step {step}/{}: loss {loss:.4}, {rate:.0} pairs/s, about {left:.0} s left",
                        self.total_steps
                    ));
                }
            }
            Event::Checkpoint { step } => tracing::debug!("checkpoint after step {step}"),
            _ => {}
        }
    }

    fn wants_to_stop(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}
