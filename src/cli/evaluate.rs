//! `nearfar evaluate`: how well a model retrieves.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use nearfar::evaluate::{Beir, EvaluationProgress, evaluate};
use nearfar::model::Model;
use serde::Serialize;

use super::progress::bar;
use super::{DeviceArgs, OutputArgs};

/// Measure how well a model finds the documents that answer the queries of a test collection.
///
/// Every document is compared with every query; metrics are those of trec_eval, of the 1,000 best documents of each
/// query, averaged over the queries that have judgments. A document with the query's own id is left out, as BEIR does.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Evaluate {
    /// Folder of the model: one that nearfar wrote, or one of sentence-transformers with a BERT encoder.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// Folder of the test collection, in BEIR's layout: corpus.jsonl, queries.jsonl and qrels/test.tsv.
    #[arg(long, value_name = "DIR")]
    dataset: PathBuf,

    /// Cut queries after so many tokens, [CLS] and [SEP] included. [default: what the model says]
    #[arg(long, value_name = "TOKENS")]
    max_query_length: Option<usize>,

    /// Cut documents after so many tokens, [CLS] and [SEP] included. [default: what the model says]
    #[arg(long, value_name = "TOKENS")]
    max_document_length: Option<usize>,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    output: OutputArgs,
}

const AFTER_HELP: &str = "\
With --json the object is
  {\"ndcg@10\", \"mrr@10\", \"recall@100\", \"map\", \"queries\", \"documents\"}
where the last two count the queries that have judgments and the documents of the corpus.

Example:
  nearfar evaluate --model model --dataset scifact --json";

/// The result, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    #[serde(rename = "ndcg@10")]
    ndcg_at_10: f64,
    #[serde(rename = "mrr@10")]
    mrr_at_10: f64,
    #[serde(rename = "recall@100")]
    recall_at_100: f64,
    map: f64,
    queries: usize,
    documents: usize,
}

impl Evaluate {
    pub(crate) fn run(self) -> Result<()> {
        let device = self.device.open()?;
        let mut model = Model::load(&self.model, &device)?;
        if let Some(length) = self.max_query_length {
            check_length("--max-query-length", length, &model)?;
            model.max_query_length = length;
        }
        if let Some(length) = self.max_document_length {
            check_length("--max-document-length", length, &model)?;
            model.max_document_length = length;
        }
        let beir = Beir::open(&self.dataset)?;
        tracing::debug!(queries = beir.queries.len(), documents = beir.documents.len(), "read the test collection");

        let queries = bar("queries", beir.queries.len());
        let mut documents = None;
        let metrics = evaluate(&model, &beir, &mut |progress| match progress {
            EvaluationProgress::Queries { done, .. } => queries.set_position(done as u64),
            EvaluationProgress::Documents { done, total } => {
                queries.finish_and_clear();
                documents.get_or_insert_with(|| bar("documents", total)).set_position(done as u64);
            }
            EvaluationProgress::Searching => drop(documents.take()),
        })?;

        let report = Report {
            ndcg_at_10: metrics.ndcg_at_10,
            mrr_at_10: metrics.mrr_at_10,
            recall_at_100: metrics.recall_at_100,
            map: metrics.map,
            queries: metrics.queries,
            documents: beir.documents.len(),
        };
        self.output.print(&report, || table(&report))
    }
}

/// Refuses a number of tokens that the encoder has no positions for, or that leaves no room for a text.
fn check_length(option: &str, length: usize, model: &Model) -> Result<()> {
    let positions = model.encoder.settings().encoder.max_positions;
    if length > positions {
        bail!(
            "{option}: {length} tokens are too many, the model's encoder has {positions} positions; give at most that"
        );
    }
    // Only the tokenizer knows how many tokens it adds to every text.
    model.tokenizer.encode("", length).map(drop).with_context(|| option.to_owned())
}

fn table(report: &Report) -> String {
    let (queries, documents) = (report.queries.to_string(), report.documents.to_string());
    let width = [queries.len(), documents.len(), "0.0000".len()].into_iter().max().unwrap_or(0);
    let value = |value: f64| format!("{value:.4}");
    let rows = [
        ("ndcg@10", value(report.ndcg_at_10)),
        ("mrr@10", value(report.mrr_at_10)),
        ("recall@100", value(report.recall_at_100)),
        ("map", value(report.map)),
        ("queries", queries),
        ("documents", documents),
    ];
    rows.map(|(name, value)| format!("{name:10}  {value:>width$}")).join("\n")
}
