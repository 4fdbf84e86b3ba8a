//! All objectives and settings as a document: `docs/objectives.md` is this text.

use std::fmt::Write;

use super::relations::Relations;
use super::scores::SCORE_PRESETS;
use super::{Aggregate, Objective, PRESETS, Partition, SETTINGS};

/// What computes every objective: the float64 [`definition`](super::definition) and the devices that can do all
/// operations, as a test makes sure.
const RUNS_ON: &str = "definition, cpu, cuda, wgpu";

impl Objective {
    /// What stands in the rows of each partition and what they cost, with its weight: the formula for a reader who
    /// knows the notation of [`table`]. One line a partition.
    pub fn partition_lines(&self) -> Vec<String> {
        self.partitions().iter().map(partition_line).collect()
    }

    /// How a device computes the objective without further settings: `fast`, by sweeps over whole matrices of
    /// similarities, or `general`, row by row with every entry at hand.
    pub fn path(&self) -> &'static str {
        if self.plan(true, &Relations::default()).row_sweeps.is_empty() { "fast" } else { "general" }
    }
}

fn partition_line(partition: &Partition) -> String {
    let blocks = partition.blocks.iter().map(|block| block.notation()).collect::<Vec<_>>().join(", ");
    let weight = if partition.weight == 1.0 { String::new() } else { format!("{} · ", partition.weight) };
    let aggregate = match partition.aggregate {
        Aggregate::Mean => "mean",
        Aggregate::MeanOfEntries => "mean over entries",
        Aggregate::LogMeanExp => "log mean exp",
    };
    format!("{weight}{aggregate} [ {} ] of {blocks}", partition.function.formula())
}

fn row(out: &mut String, cells: &[&str]) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "| {} |", cells.iter().map(|cell| cell.replace('|', "\\|")).collect::<Vec<_>>().join(" | "));
}

fn head(out: &mut String, cells: &[&str]) {
    row(out, cells);
    row(out, &vec!["---"; cells.len()]);
}

/// The Markdown document of all objectives and settings, made of [`PRESETS`], [`SCORE_PRESETS`] and [`SETTINGS`].
///
/// ```
/// assert!(nearfar::objective::table().contains("| `samtone` |"));
/// ```
pub fn table() -> String {
    let mut out = String::from(INTRODUCTION);
    head(
        &mut out,
        &[
            "objective",
            "source",
            "what stands in a row",
            "formula",
            "needs beside queries",
            "similarity, temperature",
            "computed by",
            "path",
            "held to",
        ],
    );
    for preset in PRESETS {
        let objective = (preset.make)();
        let lines: Vec<String> = objective.partition_lines().iter().map(|line| format!("`{line}`")).collect();
        row(
            &mut out,
            &[
                &format!("`{}`", preset.name),
                preset.source,
                preset.summary,
                &lines.join("<br>+ "),
                &objective.needs().join(", "),
                &format!("{}, {}", objective.similarity_kind(), objective.temperature_value()),
                RUNS_ON,
                objective.path(),
                preset.oracle,
            ],
        );
    }
    out.push_str(GRADED);
    head(
        &mut out,
        &["objective", "source", "what is compared", "formula", "needs beside queries", "computed by", "held to"],
    );
    for preset in SCORE_PRESETS {
        let formula = (preset.make)().to_string();
        let loss = formula.lines().last().unwrap_or_default().trim();
        row(
            &mut out,
            &[
                &format!("`{}`", preset.name),
                preset.source,
                preset.summary,
                &format!("`{loss}`"),
                "documents, scores",
                RUNS_ON,
                preset.oracle,
            ],
        );
    }
    out.push_str(OF_SETTINGS);
    head(&mut out, &["setting", "`nearfar loss`", "source", "what was decided"]);
    for setting in SETTINGS {
        let options: Vec<String> = setting.options.split(", ").map(|option| format!("`{option}`")).collect();
        row(&mut out, &[setting.name, &options.join(" "), setting.source, setting.meaning]);
    }
    out.push_str(SEMANTICS);
    for preset in PRESETS {
        let _ = writeln!(out, "{}\n", (preset.make)());
    }
    for preset in SCORE_PRESETS {
        let _ = writeln!(out, "{}\n", (preset.make)());
    }
    out.truncate(out.trim_end().len());
    out.push_str("\n```\n");
    out
}

const INTRODUCTION: &str = "\
# Objectives

Made by `nearfar objectives --markdown` from the code that computes them; a test holds this file to it. To change it,
change the tables in `src/objective` and run

```sh
cargo run -- objectives --markdown > docs/objectives.md
```

## Contrastive objectives

An objective is a list of partitions. Each gives every pair i of a batch a row of logits
`z(a, b) = σ · similarity(a, b) + bias`, with σ = 1 / temperature, and a row function that makes a loss of it. The blocks
that stand in a row are written anchor–candidates: q is the query and d the document of a pair, h are hard negatives, g
hard queries, b a bank. A block is over the whole batch, over the row's `own` pair, or over the `others`; an anchor is
never compared with itself.

In the formulas L is the log-sum-exp over the row, L⁻ over its negatives, L⁺ over its positives with their weights ω;
P are the positives, y the target, n the number of negatives, K that of all entries, and z⁺ the logit of the own
positive (σ, the anchor with itself, if none is in the row). Lines joined by + are partitions that are added. The whole
formulas stand at the end of this page.

Path: a *fast* objective is computed by sweeps over whole matrices of similarities, a *general* one row by row; the
settings that bend logits or positives (squared-l2, labels, listed positives, a teacher, false negatives, hardness,
frozen towers, widths, padding, segments) take any objective to the general path. Neither stores a matrix.

Held to: every objective's float64 definition is held to its own finite differences, and every device to the
definition. Beside that, the cases of `tests/fixtures`: PyTorch 2.15 is automatic differentiation of the formula as its
source has it; classes are those of sentence-transformers 6.2, open_clip 3.3 and pytorch-metric-learning 2.9.

";

const GRADED: &str = "
## Objectives for graded pairs

N pairs with a gold score each; no pair meets the documents of another. They take cosine or dot similarity, a temperature
(without effect on pearson), and no other setting.

";

const OF_SETTINGS: &str = "
## Settings

";

const SEMANTICS: &str = "
## What to know before comparing numbers

* **Columns of a row.** The blocks stand in the order of the formula. A block over the batch or the others has a column
  for each candidate, in their order; one over the own pair has one column, or for hard negatives as many as the pair
  that has most of them. A teacher's scores (N, C) follow this. All blocks of a partition share one softmax: q–d and q–q
  in one partition compete, two partitions do not.
* **Two directions.** `symmetric` and `nt-xent` average them, as CLIP and SimCLR do; `samtone-bidirectional` and
  `hardest-negative` sum them, as their papers do. The factor between the two is the factor between the gradients, so a
  learning rate moves with it. `--directions` changes it.
* **Hard negatives in document–document blocks.** They are documents, so `gte` compares document i with them too, but
  only with those of the other pairs, as sentence-transformers does.
* **Masks act after the temperature and never on positives.** A masked entry is as if it were not there, in the loss, in
  label smoothing's K, and in every gradient, that by log σ among them. A positive that shares an id or looks like a
  false negative stays.
* **Rows with nothing to compare.** A row whose entries are all masked, or that lacks what its function compares, costs
  0, has no gradient, and counts in the mean. Only rows that are padding do not count.
* **Thresholds with negative positives.** `s > r·s⁺` would move the wrong way below 0, so the ratio is
  `s > s⁺ − (1 − r)·|s⁺|`: the same above 0, and as far below s⁺ elsewhere. Similarities are compared before temperature
  and margin. A negative `--false-negatives-above` masks some entries below the positive, too.
* **Hardness** weighs negatives of query anchors among documents and hard negatives, nothing in q–q, d–q or d–d.
  `in-batch` are those of other pairs, `hard-negatives` the query's own.
* **The clamp of the scale** stops the gradient by log σ strictly above the bound; at the bound and below it flows.
* **Teachers.** A cross-entropy's gradient is that of the divergence; its value is larger by the teacher's entropy.
* **Gradient caching.** With `nearfar train --mini-batch-size` the embeddings of the whole batch come first, then one
  loss over all of them, then the encoder again part by part: loss and gradients are those of the whole batch, not the
  mean of small ones.
* **Sharding.** The loss of part of a batch is another loss, with fewer negatives. `nearfar::loss::shard` has the
  primitives for the whole one: statistics of shards of the columns that merge, and gradients from the merged ones. They
  are exact, so nothing is multiplied with the number of shards. A bank holds what others computed earlier, frozen.

## Formulas

```text
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_stands_in_it() {
        let text = table();
        for preset in PRESETS {
            assert!(text.contains(&format!("| `{}` | {} |", preset.name, preset.source)), "{}", preset.name);
            assert!(!preset.oracle.is_empty() && text.contains(&(preset.make)().to_string()));
        }
        for setting in SETTINGS {
            assert!(text.contains(&setting.meaning.replace('|', "\\|")), "{}", setting.name);
        }
        // Every row of a table has the cells of its head.
        let cells = |line: &str| line.replace("\\|", "").matches('|').count();
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.windows(2).filter(|pair| pair.iter().all(|line| line.starts_with('|'))) {
            assert_eq!(cells(pair[0]), cells(pair[1]), "{pair:?}");
        }
    }

    #[test]
    fn lines_are_short_formulas() {
        assert_eq!(
            Objective::symmetric().partition_lines(),
            ["0.5 · mean [ L − Σ y·z ] of q–d, q–h", "0.5 · mean [ L − Σ y·z ] of d–q"]
        );
        assert_eq!(Objective::gte().partition_lines(), ["mean [ L − Σ y·z ] of q–d, q–q, q–h, d–q, d–d, d–h others"]);
        assert_eq!((Objective::gte().path(), Objective::gecko().path()), ("fast", "general"));
    }
}
