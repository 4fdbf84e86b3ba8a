//! `nearfar check`: whether a device computes what it should.

use anyhow::{Result, bail};
use clap::Args;
use nearfar::conformance::{self, Case, Outcome, Verdict};
use serde::Serialize;

use super::{DeviceArgs, OutputArgs};

/// Check that a device computes what it should: every loss and every operation against its definition.
///
/// Each row is a small computation that is made twice: on the device, in single precision, and on the processor, in
/// double precision, straight from the definition. Its line shows the result that came closest to its bound, how far
/// off it is and how far off it may be; the bounds follow from the rounding of single-precision numbers. A row fails
/// if any result is beyond its bound, if a second run gives other bits, or if memory was written that was not to be.
///
/// On a machine in order all rows hold. If one fails, please report it with everything that this command prints.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Check {
    /// Check only the rows whose name contains this, such as `samtone`, `/257x33/` or `temperature-0.001`. [default:
    /// all rows]
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    output: OutputArgs,
}

const AFTER_HELP: &str = "\
A row's name is what is computed, of what shape (pairs x width of the embeddings), of what input, and in what \
precision. The exit code is 0 if all rows hold and 1 if one fails; those that fail are listed once more on stderr. \
A row that a driver is known to get wrong is to fail on it; such rows are marked \"known\", and have a \"known_failure\" \
that says what is wrong with the driver. \
With --json the object is
  {\"device\", \"description\", \"version\", \"rows\": [{\"name\", \"quantity\", \"error\", \"bound\", \
\"reproducible\", \"holds\"}, …], \"holds\"}
where an error is null if it is not a number.

Example:
  nearfar check --device cpu --only samtone";

/// The result, as `--json` prints it.
#[derive(Serialize)]
struct Report<'a> {
    device: String,
    description: String,
    version: &'static str,
    rows: Vec<Row<'a>>,
    holds: bool,
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    quantity: &'static str,
    error: f64,
    bound: f64,
    reproducible: bool,
    holds: bool,
    /// What is wrong with the driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    known_failure: Option<&'static str>,
    #[serde(skip)]
    is_fine: bool,
    /// What is wrong beside errors.
    #[serde(skip)]
    outcome: String,
}

impl<'a> Row<'a> {
    fn new(description: &str, case: &'a Case, outcome: &Outcome) -> Self {
        let verdict = Verdict::of(description, case.name(), outcome);
        let (known_failure, outcome_text) = match verdict {
            Verdict::Holds | Verdict::Fails => (None, outcome.to_string()),
            Verdict::FailsAsExpected(reason) => (Some(reason), outcome.to_string()),
            Verdict::HoldsUnexpectedly(reason) => (Some(reason), format!("holds, but was to fail: {reason}")),
        };
        Self {
            name: case.name(),
            quantity: outcome.quantity,
            error: outcome.worst,
            bound: outcome.bound,
            reproducible: outcome.reproducible,
            holds: outcome.holds(),
            known_failure,
            is_fine: verdict.is_fine(),
            outcome: outcome_text,
        }
    }
}

impl Check {
    pub(crate) fn run(self) -> Result<()> {
        let device = self.device.open()?;
        let cases = conformance::cases();
        let wanted = |case: &&Case| self.only.as_ref().is_none_or(|text| case.name().contains(text.as_str()));
        let cases: Vec<&Case> = cases.iter().filter(wanted).collect();
        if cases.is_empty() {
            bail!(
                "--only: no row's name contains `{}`; without it all rows are checked and their names printed",
                self.only.as_deref().unwrap_or_default()
            );
        }
        let line = Line::new(&cases);
        self.output.print_part(|| line.heading())?;
        let mut rows = Vec::with_capacity(cases.len());
        let description = device.description();
        conformance::run(&device, &cases, |case, outcome| {
            let row = Row::new(&description, case, &outcome);
            let printed = self.output.print_part(|| line.of(&row));
            rows.push(row);
            printed
        })?;
        let report = Report {
            device: device.name(),
            description,
            version: env!("CARGO_PKG_VERSION"),
            holds: rows.iter().all(|row| row.is_fine),
            rows,
        };
        self.output.print(&report, || summary(&report))?;
        let failing: Vec<&Row<'_>> = report.rows.iter().filter(|row| !row.is_fine).collect();
        if !failing.is_empty() {
            let lines: Vec<String> = failing.iter().map(|row| format!("\n  {}: {}", row.name, row.outcome)).collect();
            bail!("{} of {} rows fail on {}:{}", failing.len(), report.rows.len(), report.device, lines.concat());
        }
        Ok(())
    }
}

/// How a row is printed; it is printed before the next one is known.
struct Line {
    name: usize,
}

impl Line {
    fn new(cases: &[&Case]) -> Self {
        Self { name: cases.iter().map(|case| case.name().len()).max().unwrap_or_default().max("row".len()) }
    }

    fn heading(&self) -> String {
        format!("{:name$}  {:17}  {:>8}  {:>8}", "row", "worst", "error", "bound", name = self.name)
    }

    fn of(&self, row: &Row<'_>) -> String {
        let verdict = match (row.is_fine, row.known_failure) {
            (true, None) => "ok",
            (true, Some(_)) => "known",
            (false, _) => "FAIL",
        };
        let (error, bound) = (format!("{:.1e}", row.error), format!("{:.1e}", row.bound));
        format!("{:name$}  {:17}  {error:>8}  {bound:>8}  {verdict}", row.name, row.quantity, name = self.name)
    }
}

fn summary(report: &Report<'_>) -> String {
    let fine = report.rows.iter().filter(|row| row.is_fine).count();
    let known = report.rows.iter().filter(|row| row.is_fine && !row.holds).count();
    let of_known = if known > 0 { format!(", {known} as this driver is known to") } else { String::new() };
    format!(
        "\n{} rows hold, {} fail{of_known}\ndevice   {}: {}\nversion  nearfar {} on {}-{}",
        fine - known,
        report.rows.len() - fine + known,
        report.device,
        report.description,
        report.version,
        std::env::consts::ARCH,
        std::env::consts::OS,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_fails_says_so() {
        let line = Line { name: 12 };
        let row = Row {
            name: "gte/7x3/f32",
            quantity: "d_queries",
            error: f64::NAN,
            bound: 1.25e-7,
            reproducible: true,
            holds: false,
            known_failure: None,
            is_fine: false,
            outcome: "d_queries is off".into(),
        };
        assert_eq!(line.heading(), "row           worst                 error     bound");
        assert_eq!(line.of(&row), "gte/7x3/f32   d_queries               NaN    1.2e-7  FAIL");
        let (device, description) = ("idle".to_owned(), "does nothing".to_owned());
        let report = Report { device, description, version: "1.2.3", rows: vec![row], holds: false };
        assert!(
            summary(&report).starts_with("\n0 rows hold, 1 fail\ndevice   idle: does nothing\nversion  nearfar 1.2.3")
        );
        assert!(serde_json::to_string(&report).unwrap().contains("\"error\":null,\"bound\":1.25e-7"));
    }
}
