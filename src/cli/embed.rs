//! `nearfar embed`: from texts to embeddings in a file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use nearfar::model::Model;
use nearfar::nn::Tower;
use nearfar::npy;
use nearfar::text::TextReader;
use serde::Serialize;

use super::progress::bar;
use super::{DeviceArgs, OutputArgs, check_output};

/// Embed texts and write their embeddings to an .npy file, row i for text i.
///
/// Embeddings have length 1 if the model compares them by cosine similarity. Texts longer than the model's length for
/// the tower are cut.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Embed {
    /// Folder of the model: one that nearfar wrote, or one of sentence-transformers with a BERT encoder.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// Texts to embed, in UTF-8: .txt, .jsonl, .csv or .tsv as explained below; - for stdin, one text a line.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,

    /// File to write, replacing it: float32 of shape (texts, d), as numpy.load reads it.
    #[arg(long, value_name = "E.npy")]
    output: PathBuf,

    /// Tower to embed with. What is searched goes through `document`, what is asked through `query`; where both are
    /// one encoder, they differ by the length that texts are cut at only.
    #[arg(long, value_name = "TOWER", default_value = "document", value_parser = PossibleValuesParser::new(["query", "document"]))]
    tower: String,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    print: OutputArgs,
}

const AFTER_HELP: &str = "\
The extension of the input says what it holds:
  .txt          one text a line; a blank line is a text too and has its row
  .jsonl        one JSON string or object a line; .ndjson and .json are the same
  .csv, .tsv    a header and records
In objects and tables the text stands under `text`, or else under the name of the tower, or else under that of the \
other (`document`, `query`). If there is a `title`, it is put before the text with \". \" between them.

The time printed is that of embedding the texts, without reading or writing files. With --json the object is
  {\"texts\", \"width\": d, \"output\", \"seconds\"}

Example:
  nearfar embed --model model --tower query --input questions.txt --output questions.npy";

/// The result, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    texts: usize,
    width: usize,
    output: String,
    seconds: f64,
}

/// The files of a model, none of which is to be overwritten with embeddings.
const MODEL_FILES: [&str; 4] = ["config.json", "model.safetensors", "nearfar.json", "tokenizer.json"];

impl Embed {
    pub(crate) fn run(self) -> Result<()> {
        let tower: Tower = self.tower.parse()?;
        let model_files = MODEL_FILES.map(|name| self.model.join(name));
        let inputs: Vec<&Path> = model_files.iter().chain([&self.input]).map(PathBuf::as_path).collect();
        check_output("--output", &self.output, &inputs)?;
        let device = self.device.open()?;
        let names = match tower {
            Tower::Query => ["text", "query", "document"],
            Tower::Document => ["text", "document", "query"],
        };
        let reader = if self.input == Path::new("-") {
            TextReader::from_lines("stdin", std::io::stdin())
        } else {
            TextReader::open(&self.input, &names)?
        };
        let model = Model::load(&self.model, &device)?;
        // All of them before the first is embedded: what is wrong with the last line should not be told after an hour.
        let texts: Vec<String> = reader.collect::<nearfar::Result<_>>()?;
        tracing::debug!(texts = texts.len(), "read the texts");

        let bar = bar("texts", texts.len());
        let start = Instant::now();
        let embeddings = model.embed(tower, &texts, &mut |done| bar.set_position(done as u64))?;
        let seconds = start.elapsed().as_secs_f64();
        drop(bar);
        let width = model.embedding_size();
        if let Some(at) = embeddings.iter().position(|value| !value.is_finite()) {
            bail!(
                "the embedding of text {} holds {}: the weights in {} are spoilt; nothing was written",
                at / width + 1,
                embeddings[at],
                self.model.display()
            );
        }
        npy::write_f32(&self.output, &[texts.len(), width], &embeddings)?;

        let report = Report { texts: texts.len(), width, output: self.output.display().to_string(), seconds };
        self.print.print(&report, || {
            format!("texts   {}\nwidth   {width}\ntime    {seconds:.3} s\noutput  {}", report.texts, report.output)
        })
    }
}
