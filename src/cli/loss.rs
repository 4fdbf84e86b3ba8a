//! `nearfar loss`: the loss of embeddings in files, and its gradients.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use nearfar::error::Shape;
use nearfar::files::write_atomically;
use nearfar::loss::{LossAndGradients, check_embeddings};
use nearfar::objective::DEFAULT_TEMPERATURE;
use nearfar::{Batch, Device, Error, Objective, Similarity, Tensor, npy};
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use super::{DeviceArgs, OutputArgs, check_output};

/// Compute a contrastive loss, and on request its gradients, of embeddings in .npy files.
///
/// Row i of the documents is the positive of row i of the queries; all other rows are negatives, and what else is one
/// depends on the objective. Files are what numpy.save writes.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Loss {
    /// Loss to compute; its formula is part of the output.
    #[arg(long, value_name = "NAME", default_value = "samtone", value_parser = PossibleValuesParser::new(Objective::NAMES))]
    objective: String,

    /// Embeddings of the queries: an .npy file of shape (N, d), float16, float32 or float64.
    #[arg(long, value_name = "Q.npy")]
    queries: PathBuf,

    /// Embeddings of the documents: shape (N, d); document i is the positive of query i.
    #[arg(long, value_name = "D.npy")]
    documents: PathBuf,

    /// Embeddings of K hard negatives for each query: shape (N, K, d). Every query of the batch is compared with all
    /// of them. [default: none]
    #[arg(long, value_name = "H.npy")]
    hard_negatives: Option<PathBuf>,

    /// One id for each pair: shape (N,), int32, int64 or uint32. Pairs that share an id are no negatives of each
    /// other. [default: every pair its own]
    #[arg(long, value_name = "I.npy")]
    ids: Option<PathBuf>,

    /// What similarities are divided by before the softmax; no unit, above 0.
    #[arg(long, value_name = "T", default_value_t = DEFAULT_TEMPERATURE, allow_negative_numbers = true)]
    temperature: f64,

    /// How two embeddings are compared.
    #[arg(long, value_name = "NAME", default_value = "cosine", value_parser = PossibleValuesParser::new(["cosine", "dot"]))]
    similarity: String,

    /// Share of the target that is spread over all candidates of a row: at least 0, below 1. Above 0 only for
    /// infonce and symmetric.
    #[arg(long, value_name = "E", default_value_t = 0.0, allow_negative_numbers = true)]
    label_smoothing: f64,

    /// Compute the gradients too and write them to this file, replacing it: float32 tensors d_queries (N, d),
    /// d_documents (N, d), d_hard_negatives (N, K, d) if there are any, and d_log_scale (1), the gradient by
    /// log(1 / temperature). [default: the loss alone]
    #[arg(long, value_name = "OUT.safetensors")]
    gradients: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    output: OutputArgs,
}

const AFTER_HELP: &str = "\
The time printed is that of computing the loss once, or the loss and its gradients with --gradients, without reading \
or writing files. With --json the object is
  {\"loss\", \"objective\", \"rows\": N, \"columns\": N·(1+K), \"width\": d, \"device\", \"milliseconds\"}

Example:
  nearfar loss --objective infonce --temperature 0.02 \\
    --queries queries.npy --documents documents.npy \\
    --gradients gradients.safetensors --json";

/// The result, as `--json` prints it.
#[derive(Serialize)]
struct Report<'a> {
    loss: f32,
    objective: &'a str,
    rows: usize,
    columns: usize,
    width: usize,
    device: String,
    milliseconds: f64,
}

impl Loss {
    pub(crate) fn run(self) -> Result<()> {
        let similarity: Similarity = self.similarity.parse()?;
        let objective = Objective::named(&self.objective)?
            .similarity(similarity)
            .temperature(self.temperature)?
            .label_smoothing(self.label_smoothing)?;
        let inputs: Vec<&Path> = [Some(&self.queries), Some(&self.documents)]
            .into_iter()
            .chain([self.hard_negatives.as_ref(), self.ids.as_ref()])
            .flatten()
            .map(PathBuf::as_path)
            .collect();
        if let Some(path) = &self.gradients {
            check_output("--gradients", path, &inputs)?;
        }
        let device = self.device.open()?;

        let input = self.read(similarity)?;
        let queries = device.tensor(&input.queries, [input.n, input.d])?;
        let documents = device.tensor(&input.documents, [input.n, input.d])?;
        let hard_negatives = match &input.hard_negatives {
            Some((k, values)) => Some(device.tensor(values, [input.n, *k, input.d])?),
            None => None,
        };
        let mut batch = Batch::new(&queries, &documents);
        if let Some(tensor) = &hard_negatives {
            batch = batch.hard_negatives(tensor);
        }
        if let Some(ids) = &input.ids {
            batch = batch.ids(ids);
        }

        let start = Instant::now();
        // A device may still be computing when a call returns; reading the last result waits for all of it.
        let (loss, gradients) = match &self.gradients {
            Some(path) => {
                let out = objective.forward_backward(&device, batch)?;
                out.d_log_scale.to_scalar()?;
                (out.loss.to_scalar()?, Some((path, out)))
            }
            None => (objective.forward(&device, batch)?.to_scalar()?, None),
        };
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        if !loss.is_finite() {
            bail!(
                "the loss is {loss}: similarities divided by the temperature exceed single precision; use --similarity \
                 cosine or a larger --temperature"
            );
        }
        if let Some((path, out)) = gradients {
            write_gradients(path, &device, hard_negatives.as_ref(), &out)?;
        }

        let k = input.hard_negatives.as_ref().map_or(0, |(k, _)| *k);
        let report = Report {
            loss,
            objective: objective.name(),
            rows: input.n,
            columns: input.n * (1 + k),
            width: input.d,
            device: device.name(),
            milliseconds,
        };
        self.output.print(&report, || {
            let what = if self.gradients.is_some() { "loss and gradients" } else { "loss alone" };
            let mut text = format!(
                "{objective}\n\n\
                 loss       {loss}\n\
                 rows       {n} queries\n\
                 columns    {columns}: {n} documents and {negatives} hard negatives\n\
                 width      {d}\n\
                 device     {device}\n\
                 time       {milliseconds:.3} ms, {what}",
                n = report.rows,
                columns = report.columns,
                negatives = report.columns - report.rows,
                d = report.width,
            );
            if let Some(path) = &self.gradients {
                text.push_str(&format!("\ngradients  {}", path.display()));
            }
            text
        })
    }

    /// Reads all inputs and checks that they fit together.
    fn read(&self, similarity: Similarity) -> Result<Input> {
        let (shape, queries) = npy::read_f32(&self.queries)?;
        let &[n, d] = &shape[..] else {
            return Err(wrong_shape(&self.queries, &shape, "(N, d), one row of d numbers for each query").into());
        };
        if n == 0 || d == 0 {
            let reason =
                format!("is empty: its shape is ({n}, {d}), and a loss needs at least one query of one number");
            return Err(Error::file(&self.queries, reason).into());
        }
        check(&self.queries, "queries", &queries, d, similarity)?;

        let (shape, documents) = npy::read_f32(&self.documents)?;
        match shape[..] {
            [rows, width] if (rows, width) == (n, d) => {}
            [rows, width] if width == d => {
                let reason = format!(
                    "holds {rows} documents for {n} queries; document i must be the positive of query i, so there are \
                     as many of one as of the other, and extra candidates go to --hard-negatives"
                );
                return Err(Error::file(&self.documents, reason).into());
            }
            [_, width] => {
                let reason = format!(
                    "has rows of {width} numbers, {} has rows of {d}; embeddings that are compared must be equally wide",
                    self.queries.display()
                );
                return Err(Error::file(&self.documents, reason).into());
            }
            _ => {
                let expected = format!("({n}, {d}), one row for each query");
                return Err(wrong_shape(&self.documents, &shape, &expected).into());
            }
        }
        check(&self.documents, "documents", &documents, d, similarity)?;

        let hard_negatives = match &self.hard_negatives {
            Some(path) => {
                let (shape, values) = npy::read_f32(path)?;
                let k = match shape[..] {
                    [rows, k, width] if (rows, width) == (n, d) => k,
                    _ => {
                        let expected = format!("({n}, K, {d}), K hard negatives for each query");
                        return Err(wrong_shape(path, &shape, &expected).into());
                    }
                };
                check(path, "hard_negatives", &values, d, similarity)?;
                Some((k, values))
            }
            None => None,
        };
        let ids = match &self.ids {
            Some(path) => {
                let (shape, ids) = npy::read_i64(path)?;
                if shape != [n] {
                    return Err(wrong_shape(path, &shape, &format!("({n}), one id for each pair")).into());
                }
                Some(ids)
            }
            None => None,
        };
        tracing::debug!(rows = n, width = d, "read the embeddings");
        Ok(Input { n, d, queries, documents, hard_negatives, ids })
    }
}

/// What was read: embeddings row by row.
struct Input {
    n: usize,
    d: usize,
    queries: Vec<f32>,
    documents: Vec<f32>,
    /// K and N·K rows.
    hard_negatives: Option<(usize, Vec<f32>)>,
    ids: Option<Vec<i64>>,
}

fn wrong_shape(path: &Path, found: &[usize], expected: &str) -> Error {
    Error::file(path, format!("has shape {}, expected {expected}", Shape::from(found)))
}

fn check(path: &Path, argument: &'static str, values: &[f32], width: usize, similarity: Similarity) -> Result<()> {
    check_embeddings(argument, values, width, similarity).with_context(|| {
        let of = if argument == "hard_negatives" { ", over the N·K hard negatives" } else { "" };
        format!("{}: correct or remove the row at fault (rows count from 0{of})", path.display())
    })
}

/// Writes the gradients as safetensors, unless one of them is not finite.
fn write_gradients(
    path: &Path,
    device: &Device,
    hard_negatives: Option<&Tensor>,
    out: &LossAndGradients,
) -> Result<()> {
    let mut tensors = vec![("d_queries", out.d_queries.clone()), ("d_documents", out.d_documents.clone())];
    match (&out.d_hard_negatives, hard_negatives) {
        (Some(tensor), _) => tensors.push(("d_hard_negatives", tensor.clone())),
        // None of each pair: what was given has a gradient, an empty one.
        (None, Some(empty)) => tensors.push(("d_hard_negatives", device.zeros(empty.shape().clone())?)),
        (None, None) => {}
    }
    tensors.push(("d_log_scale", out.d_log_scale.clone()));

    let mut arrays: Vec<(&str, Shape, Vec<u8>)> = Vec::new();
    for (name, tensor) in tensors {
        let values = tensor.to_host::<f32>()?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            bail!(
                "{name} holds {value}: the gradients exceed single precision; nothing was written; scale the \
                 embeddings or use a larger --temperature"
            );
        }
        // The format is little-endian on every machine.
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        arrays.push((name, tensor.shape().clone(), bytes));
    }
    let mut views = Vec::new();
    for (name, shape, bytes) in &arrays {
        views.push((*name, TensorView::new(Dtype::F32, shape.extents().to_vec(), bytes)?));
    }
    let file = safetensors::serialize(views, None)?;
    write_atomically(path, |output| output.write_all(&file))?;
    Ok(())
}
