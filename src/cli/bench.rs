//! `nearfar bench`: how fast the loss is.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::PossibleValuesParser;
use nearfar::Objective;
use nearfar::bench::{Event, Grid, Measurement, Precision, Report, Settings, Watcher, check_folder, run, write_report};

use super::memory::peak_of;
use super::{DeviceArgs, OutputArgs};

/// Measure how fast a loss and its gradients are computed, in how much memory, and whether they are right.
///
/// Every combination of the listed objectives, batch sizes, widths and precisions is measured on embeddings made up
/// for it, beside the naive method: the same loss and gradients with all similarity matrices stored.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Bench {
    /// Losses to measure, with commas between them.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_values_t = Grid::default().objectives, value_parser = PossibleValuesParser::new(Objective::of_pairs()))]
    objective: Vec<String>,

    /// Batch sizes N, with commas between them: so many queries, each with its document.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = Grid::default().rows, allow_negative_numbers = true)]
    rows: Vec<usize>,

    /// Widths d of the embeddings, with commas between them; at most 65536.
    #[arg(long, value_name = "d,…", value_delimiter = ',', default_values_t = Grid::default().widths, allow_negative_numbers = true)]
    width: Vec<usize>,

    /// Types of the embeddings, with commas between them: they are rounded to it and compared in float32, and
    /// gradients are float32 always.
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',', default_values_t = Grid::default().precisions.iter().map(Precision::to_string), value_parser = PossibleValuesParser::new(Precision::NAMES))]
    precision: Vec<String>,

    /// How often each loss is timed, after once that does not count. [default: at least 5 times, and for a second]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    repetitions: Option<usize>,

    /// Folder for a report, made if it is not there: bench.json, report.md and drawings of time and memory against N
    /// as .svg and .png. Files of these names are replaced, others left alone. [default: none]
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    output: OutputArgs,
}

const AFTER_HELP: &str = "\
What the numbers mean:
  forward   median time of the loss alone, in ms
  total     median time of the loss and its gradients; ± is its median absolute deviation
  backward  total - forward: no gradient is computed without its loss
  pairs/s   N / total: pairs of a query and its document
  GFLOP/s   operations per second of total: 3·2·N·N·d for each distinct similarity matrix (1 in
            infonce and symmetric, 2 in samtone, 3 in the others), however the method computes it
  share     GFLOP/s as a share of what a product of two large float32 matrices reaches
  MB        what one computation allocates at most at a time, beyond embeddings and gradients
  naive     total and MB of the naive method; none where its matrices would take over 2 GiB,
            or one of them more than the device binds at a time
  error     largest relative error of the loss and of each gradient; above 1e-3 it is a failure, unless
             the device rounds factors of products to 16 bits

What was timed is checked: up to N = 512 (less where d is over 512) against the definition in double precision, else \
against the naive method. Where that is left out the first pairs alone are computed again and checked (sub-batch). \
Fused and naive loss take turns, so that other programs disturb both alike; still, let nothing else run.

With --json the object is
  {\"device\", \"description\", \"version\", \"matmul_gflops\", \"threads\", \"measurements\": [
    {\"objective\", \"rows\": N, \"columns\": N, \"width\": d, \"precision\",
     \"forward_ms\", \"backward_ms\", \"total_ms\", \"spread_ms\": {\"forward\", \"total\", \"naive\"},
     \"repetitions\", \"pairs_per_second\", \"similarities_per_second\", \"gflops\",
     \"share_of_matmul\", \"peak_extra_bytes\", \"naive_total_ms\", \"naive_peak_extra_bytes\",
     \"naive_skipped\": why, \"checked\": definition, naive or sub-batch, \"worst_error\"}]}
where each spread is {\"median_absolute_deviation\", \"minimum\", \"maximum\"}, with null for what was not \
measured.

Example:
  nearfar bench --objective infonce,samtone --rows 512,2048 --width 384 --report bench-report";

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        let precisions = self.precision.iter().map(|name| name.parse()).collect::<nearfar::Result<_>>()?;
        let grid = Grid { objectives: self.objective, rows: self.rows, widths: self.width, precisions };
        let cases = grid.cases()?;
        let settings = Settings { grid, repetitions: self.repetitions };
        if let Some(folder) = &self.report {
            check_folder(folder, &cases).context("--report")?;
        }
        let device = self.device.open()?;
        let report = run(&settings, &device, &mut Progress)?;
        super::print_timings(&device);
        if let Some(folder) = &self.report {
            write_report(&report, folder).context("--report")?;
        }
        self.output.print(&report, || {
            let mut text = describe(&report);
            if let Some(folder) = &self.report {
                text.push_str(&format!("\nthe report is in {}", folder.display()));
            }
            text
        })
    }
}

/// Says on stderr what is being measured, and counts memory.
struct Progress;

impl Watcher for Progress {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::MeasuringProducts => tracing::info!("measuring matrix products"),
            Event::Measuring { number, total, case } => tracing::info!("{number}/{total}: measuring {case}"),
            Event::Measured(m) => {
                if let Some(reason) = &m.naive_skipped {
                    tracing::info!("the naive method was left out: {reason}");
                }
            }
            _ => {}
        }
    }

    fn peak_bytes(&mut self, work: &mut dyn FnMut()) -> Option<u64> {
        Some(peak_of(work))
    }
}

const HEADINGS: [&str; 14] = [
    "objective",
    "N",
    "width",
    "type",
    "forward",
    "backward",
    "total ms",
    "±",
    "pairs/s",
    "GFLOP/s",
    "share",
    "MB",
    "naive ms",
    "MB",
];

fn row(m: &Measurement) -> Vec<String> {
    let time = |milliseconds: f64| format!("{milliseconds:.3}");
    let megabytes = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| format!("{:.2}", bytes as f64 / 1e6));
    vec![
        m.objective.clone(),
        m.rows.to_string(),
        m.width.to_string(),
        m.precision.to_string(),
        time(m.forward_ms),
        time(m.backward_ms),
        time(m.total_ms),
        time(m.spread_ms.total.median_absolute_deviation),
        format!("{:.0}", m.pairs_per_second),
        format!("{:.1}", m.gflops),
        format!("{:.0}%", 100.0 * m.share_of_matmul),
        megabytes(m.peak_extra_bytes),
        m.naive_total_ms.map_or("-".into(), time),
        megabytes(m.naive_peak_extra_bytes),
        format!("{:.0e} ({})", m.worst_error, m.checked),
    ]
}

fn describe(report: &Report) -> String {
    let Report { device, description, matmul_gflops, .. } = report;
    let mut rows = vec![HEADINGS.iter().copied().chain(["error"]).map(String::from).collect::<Vec<_>>()];
    rows.extend(report.measurements.iter().map(row));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=HEADINGS.len()).map(width).collect();
    let mut lines =
        vec![format!("{device}: {description}, {matmul_gflops:.1} GFLOP/s in matrix products"), String::new()];
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            // The first and the last column are words.
            if column == 0 || column == HEADINGS.len() { format!("{cell:width$}") } else { format!("{cell:>width$}") }
        });
        lines.push(cells.collect::<Vec<_>>().join("  ").trim_end().to_owned());
    }
    lines.join("\n")
}
