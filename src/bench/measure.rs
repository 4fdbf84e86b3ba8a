//! Measuring.

use std::time::Instant;

use serde::Serialize;

use super::check::{Checked, Values, check};
use super::naive::{self, Loops, MAXIMUM_NAIVE_BYTES, Naive, naive_bytes};
use super::statistics::{Spreads, median, spread};
use super::{Case, Grid, Precision, matrices, minimal_flops};
use crate::backend::cpu::Cpu;
use crate::backend::operations::{Activation, MatMul};
use crate::error::DType;
use crate::loss::LossAndGradients;
use crate::objective::relations::Relations;
use crate::{Batch, Device, Error, Objective, Result, Tensor};

/// Nothing is timed less often than this, unless asked.
const REPETITIONS: usize = 5;
/// The loss and its gradients are timed for at least this long, in seconds, unless asked.
const SECONDS: f64 = 1.0;
/// Nothing is timed more often than this.
const MAXIMUM_REPETITIONS: usize = 1_000_000;

/// What is measured and how often.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// The losses.
    pub grid: Grid,
    /// How often each is timed; without it at least five times, and for a second.
    pub repetitions: Option<usize>,
}

/// What has been done so far.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device's rate of matrix products is being measured.
    MeasuringProducts,
    /// A loss is being measured.
    Measuring {
        /// Its number, from 1.
        number: usize,
        /// How many there are.
        total: usize,
        /// The loss.
        case: &'a Case,
    },
    /// A loss has been measured.
    Measured(&'a Measurement),
}

/// Follows a benchmark.
pub trait Watcher {
    /// Is told what has been done.
    fn event(&mut self, event: Event<'_>);

    /// Does some work, once, and says how much more memory the program had allocated at most than when it began, if
    /// that is known.
    fn peak_bytes(&mut self, work: &mut dyn FnMut()) -> Option<u64> {
        work();
        None
    }
}

/// A watcher that says nothing and knows no memory.
#[derive(Debug, Clone, Copy)]
pub struct Quiet;

impl Watcher for Quiet {
    fn event(&mut self, _: Event<'_>) {}
}

/// What was measured, of what, on what.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The device's name.
    pub device: String,
    /// The device in words.
    pub description: String,
    /// The version of this crate.
    pub version: String,
    /// The rate of the device's own product of two large square matrices of 32-bit numbers.
    pub matmul_gflops: f64,
    /// How many threads computed, if the device is the processor.
    pub threads: Option<usize>,
    /// The losses.
    pub measurements: Vec<Measurement>,
}

/// One loss, measured. Times are medians, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// The objective's name.
    pub objective: String,
    /// N: queries.
    pub rows: usize,
    /// M: documents that each query is compared with.
    pub columns: usize,
    /// d
    pub width: usize,
    /// The type of the embeddings; the loss and its gradients are f32 always.
    pub precision: Precision,
    /// The loss alone.
    pub forward_ms: f64,
    /// The difference of the other two: no gradient is computed without its loss.
    pub backward_ms: f64,
    /// The loss and its gradients.
    pub total_ms: f64,
    /// How far the repetitions lie apart.
    pub spread_ms: Spreads,
    /// How often each was timed.
    pub repetitions: usize,
    /// Pairs of a query and its document per second of loss and gradients: N of them a batch.
    pub pairs_per_second: f64,
    /// Entries of all similarity matrices per second of loss and gradients.
    pub similarities_per_second: f64,
    /// [`minimal_flops`] per second of loss and gradients.
    pub gflops: f64,
    /// `gflops` as a share of the report's `matmul_gflops`.
    pub share_of_matmul: f64,
    /// What one computation of loss and gradients allocates at most at a time, beyond its inputs and the gradients.
    pub peak_extra_bytes: Option<u64>,
    /// Loss and gradients by the method that stores the similarity matrices.
    pub naive_total_ms: Option<f64>,
    /// What that method allocates, counted in the same way.
    pub naive_peak_extra_bytes: Option<u64>,
    /// Why that method was left out, if it was.
    pub naive_skipped: Option<String>,
    /// What the result was held against.
    pub checked: Checked,
    /// How far the loss and the gradients were off at most, relative to their size.
    pub worst_error: f64,
}

/// Measures all losses of a grid on a device.
///
/// # Errors
/// [`Error::Setting`] if a setting makes no sense; [`Error::OutOfMemory`] and whatever else the device reports;
/// [`Error::Value`] if a result is wrong.
pub fn run(settings: &Settings, device: &Device, watcher: &mut dyn Watcher) -> Result<Report> {
    let cases = settings.grid.cases()?;
    if let Some(repetitions) = settings.repetitions
        && !(1..=MAXIMUM_REPETITIONS).contains(&repetitions)
    {
        let reason = format!("is {repetitions}; it must be at least 1 and at most {MAXIMUM_REPETITIONS}");
        return Err(Error::setting("repetitions", reason));
    }
    watcher.event(Event::MeasuringProducts);
    let matmul_gflops = measure_products(settings.repetitions, device)?;
    let mut measurements = Vec::with_capacity(cases.len());
    for (case, number) in cases.iter().zip(1..) {
        watcher.event(Event::Measuring { number, total: cases.len(), case });
        let measurement = measure(case, settings.repetitions, device, matmul_gflops, watcher)?;
        watcher.event(Event::Measured(&measurement));
        measurements.push(measurement);
    }
    Ok(Report {
        device: device.name(),
        description: device.description(),
        version: env!("CARGO_PKG_VERSION").into(),
        matmul_gflops,
        threads: naive::is_host(device).then(rayon::current_num_threads),
        measurements,
    })
}

/// The same device; if it is the processor, with memory of its own that is given back when the device is dropped.
fn fresh(device: &Device) -> Device {
    if naive::is_host(device) { Device::new(Cpu::new()) } else { device.clone() }
}

/// Does something and says how many seconds it took.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let start = Instant::now();
    let result = work()?;
    Ok((start.elapsed().as_secs_f64(), result))
}

/// Whether something has been timed often enough.
fn is_enough(repetitions: Option<usize>, seconds: &[f64]) -> bool {
    match repetitions {
        Some(repetitions) => seconds.len() >= repetitions,
        None => {
            let long_enough = seconds.iter().sum::<f64>() >= SECONDS || seconds.len() >= MAXIMUM_REPETITIONS;
            seconds.len() >= REPETITIONS && long_enough
        }
    }
}

/// The rate of a product that is large enough to keep the device busy, in GFLOP/s.
fn measure_products(repetitions: Option<usize>, device: &Device) -> Result<f64> {
    const LARGEST: usize = 8192;
    const LONG_ENOUGH: f64 = 0.02;
    let device = fresh(device);
    // Operations run in order, so reading this waits for those before.
    let last = device.zeros([1])?;
    let mut size = 1024;
    loop {
        let values: Vec<f32> = (0..size * size).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
        let (a, b) = (device.tensor(&values, [size, size])?, device.tensor(&values, [size, size])?);
        let mut output = device.empty([size, size], DType::F32)?;
        let mut product = || {
            device.matmul(MatMul {
                a: &a,
                transpose_a: false,
                b: &b,
                transpose_b: false,
                bias: None,
                activation: Activation::Identity,
                accumulate: false,
                output: &mut output,
            })?;
            last.to_scalar()
        };
        product()?;
        let mut seconds = vec![timed(&mut product)?.0];
        if seconds[0] < LONG_ENOUGH && size < LARGEST {
            size *= 2;
            continue;
        }
        while !is_enough(repetitions, &seconds) {
            seconds.push(timed(&mut product)?.0);
        }
        return Ok(2.0 * (size as f64).powi(3) / median(&seconds).max(f64::MIN_POSITIVE) / 1e9);
    }
}

/// A case on a device, ready to be computed.
struct Ready {
    objective: Objective,
    device: Device,
    queries: Tensor,
    documents: Tensor,
}

impl Ready {
    fn new(case: &Case, device: &Device, (queries, documents): (&[f32], &[f32])) -> Result<Self> {
        let (device, shape) = (fresh(device), [case.rows, case.width]);
        let objective = Objective::named(&case.objective)?;
        Ok(Self {
            objective,
            queries: case.precision.tensor(&device, queries, shape)?,
            documents: case.precision.tensor(&device, documents, shape)?,
            device,
        })
    }

    /// Waits for the loss.
    fn forward(&self) -> Result<f32> {
        self.objective.forward(&self.device, Batch::new(&self.queries, &self.documents))?.to_scalar()
    }

    /// Waits for the loss and the gradients.
    fn forward_backward(&self) -> Result<(f32, LossAndGradients)> {
        let out = self.objective.forward_backward(&self.device, Batch::new(&self.queries, &self.documents))?;
        // Operations run in order, so reading what is computed last waits for everything.
        out.d_log_scale.to_scalar()?;
        Ok((out.loss.to_scalar()?, out))
    }

    fn naive(&self) -> Result<Naive> {
        naive::forward_backward(&self.objective, &self.device, &self.queries, &self.documents)
    }
}

fn measure(
    case: &Case,
    repetitions: Option<usize>,
    device: &Device,
    matmul_gflops: f64,
    watcher: &mut dyn Watcher,
) -> Result<Measurement> {
    let host = case.embeddings();
    let host = (&host.0[..], &host.1[..]);
    let ready = Ready::new(case, device, host)?;
    let naive_skipped = why_not_naive(&ready.objective, case.rows, &ready.device);

    // Once for what is only done once, and then in turns: what disturbs one of them disturbs the others too.
    ready.forward()?;
    let mut forward_loss = 0.0;
    let mut fused = ready.forward_backward()?;
    let mut naive = match naive_skipped {
        None => Some(ready.naive()?),
        Some(_) => None,
    };
    let (mut forward_seconds, mut seconds, mut naive_seconds) = (Vec::new(), Vec::new(), Vec::new());
    while !is_enough(repetitions, &seconds) {
        let (time, result) = timed(|| ready.forward())?;
        forward_loss = result;
        forward_seconds.push(time);
        let (time, result) = timed(|| ready.forward_backward())?;
        fused = result;
        seconds.push(time);
        if let Some(naive) = &mut naive {
            let (time, result) = timed(|| ready.naive())?;
            *naive = result;
            naive_seconds.push(time);
        }
    }

    let (loss, gradients) = &fused;
    // The gradients of the loss alone: there are none.
    if forward_loss.to_bits() != loss.to_bits() {
        let reason = format!("of {case} is wrong: the loss alone is {forward_loss}, with its gradients it is {loss}");
        return Err(Error::value("bench", "result", reason));
    }
    let found = Values::new(*loss, &gradients.d_queries, &gradients.d_documents)?;
    let expected = match &naive {
        Some(naive) => Some(Values::new(naive.loss, &naive.d_queries, &naive.d_documents)?),
        None => None,
    };
    drop((naive, fused));
    let (checked, worst_error) = check(case, &ready.objective, &ready.device, host, &found, expected.as_ref())?;
    drop((found, expected));
    let objective = ready.objective.clone();
    drop(ready);

    let gradient_bytes = (2 * case.rows * case.width * size_of::<f32>()) as u64;
    let mut peak = |work: fn(&Ready) -> Result<()>| -> Result<Option<u64>> {
        let ready = Ready::new(case, device, host)?;
        let mut result = Ok(());
        let bytes = watcher.peak_bytes(&mut || result = work(&ready));
        result?;
        // What the program allocates says nothing about the memory of another device.
        Ok(bytes.filter(|_| naive::is_host(device)).map(|bytes| bytes.saturating_sub(gradient_bytes)))
    };
    let peak_extra_bytes = peak(|ready| ready.forward_backward().map(drop))?;
    let naive_peak_extra_bytes = match naive_skipped {
        None => peak(|ready| ready.naive().map(drop))?,
        Some(_) => None,
    };

    let total = median(&seconds);
    let forward = median(&forward_seconds);
    // A clock may be too coarse for the smallest batches.
    let per_second = |count: f64| count / total.max(1e-9);
    let gflops = per_second(minimal_flops(&objective, case.rows, case.width)) / 1e9;
    let milliseconds = |seconds: &[f64]| seconds.iter().map(|seconds| seconds * 1e3).collect::<Vec<_>>();
    let similarities = matrices(&objective).len() as f64 * (case.rows as f64).powi(2);
    Ok(Measurement {
        objective: case.objective.clone(),
        rows: case.rows,
        columns: case.rows,
        width: case.width,
        precision: case.precision,
        forward_ms: forward * 1e3,
        backward_ms: (total - forward) * 1e3,
        total_ms: total * 1e3,
        spread_ms: Spreads {
            forward: spread(&milliseconds(&forward_seconds)),
            total: spread(&milliseconds(&seconds)),
            naive: naive_skipped.is_none().then(|| spread(&milliseconds(&naive_seconds))),
        },
        repetitions: seconds.len(),
        pairs_per_second: per_second(case.rows as f64),
        similarities_per_second: per_second(similarities),
        gflops,
        share_of_matmul: gflops / matmul_gflops,
        peak_extra_bytes,
        naive_total_ms: naive_skipped.is_none().then(|| median(&naive_seconds) * 1e3),
        naive_peak_extra_bytes,
        naive_skipped,
        checked,
        worst_error,
    })
}

/// Why the naive method is left out, if it is.
fn why_not_naive(objective: &Objective, rows: usize, device: &Device) -> Option<String> {
    const GIB: f64 = (1 << 30) as f64;
    let Some(loops) = Loops::of(device) else {
        return Some(format!("{device} lacks operations that it needs"));
    };
    if !objective.plan(false, &Relations::default()).row_sweeps.is_empty() {
        return Some("it knows plain softmaxes over whole blocks alone".into());
    }
    let most = MAXIMUM_NAIVE_BYTES as f64 / GIB;
    match naive_bytes(objective, rows) {
        Some(bytes) if bytes <= MAXIMUM_NAIVE_BYTES => {
            let (matrix, most) = (4 * (rows * rows) as u64, loops.most_bytes());
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            (matrix > most).then(|| {
                let (matrix, most) = (mib(matrix), mib(most));
                format!("a similarity matrix takes {matrix:.0} MiB, and {device} can bind {most:.0} MiB at a time")
            })
        }
        Some(bytes) => {
            Some(format!("its similarity matrices would take {:.1} GiB, more than {most} GiB", bytes as f64 / GIB))
        }
        None => Some(format!("its similarity matrices would take more than {most} GiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_and_repetitions_are_both_waited_for() {
        assert!(!is_enough(None, &[10.0; 4]) && is_enough(None, &[0.2; 5]));
        assert!(!is_enough(None, &[0.0001; 100]) && is_enough(Some(2), &[0.0001; 2]));
        assert!(!is_enough(Some(7), &[10.0; 6]));
    }

    #[test]
    fn the_naive_method_stays_within_its_memory() {
        let reason = |rows| why_not_naive(&Objective::samtone(), rows, &Device::cpu());
        assert_eq!(reason(16_384), None);
        assert_eq!(reason(32_768).unwrap(), "its similarity matrices would take 8.0 GiB, more than 2 GiB");
        assert!(reason(usize::MAX).unwrap().contains("more than 2 GiB"));
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn the_naive_method_stays_within_a_binding() {
        let Ok(device) = "wgpu,default-limits".parse::<Device>() else { return println!("skipped: no device") };
        let reason = |rows| why_not_naive(&Objective::samtone(), rows, &device);
        assert_eq!(reason(5792), None);
        assert!(reason(8192).unwrap().starts_with("a similarity matrix takes 256 MiB, and wgpu"));
        assert!(reason(32_768).unwrap().contains("more than 2 GiB"));
    }

    /// Memory as a watcher says it, without what is handed out.
    struct Memory(u64);

    impl Watcher for Memory {
        fn event(&mut self, _: Event<'_>) {}

        fn peak_bytes(&mut self, work: &mut dyn FnMut()) -> Option<u64> {
            work();
            Some(self.0)
        }
    }

    #[test]
    fn a_report_has_every_case_and_its_numbers_fit_together() {
        let grid = Grid { rows: vec![20, 40], widths: vec![8], ..Grid::default() };
        let settings = Settings { grid, repetitions: Some(3) };
        let report = run(&settings, &Device::cpu(), &mut Memory(3000)).unwrap();
        assert_eq!((report.device.as_str(), report.measurements.len()), ("cpu", 2));
        let m = &report.measurements[0];
        assert_eq!((m.rows, m.columns, m.width, m.repetitions, m.checked), (20, 20, 8, 3, Checked::Definition));
        approx::assert_relative_eq!(m.backward_ms, m.total_ms - m.forward_ms, epsilon = 1e-9);
        assert_eq!((m.peak_extra_bytes, m.naive_peak_extra_bytes), (Some(3000 - 2 * 20 * 8 * 4), Some(1720)));
        approx::assert_relative_eq!(m.pairs_per_second * m.total_ms, 20.0 * 1e3, max_relative = 1e-9);
        approx::assert_relative_eq!(m.similarities_per_second, 40.0 * m.pairs_per_second, max_relative = 1e-9);
        approx::assert_relative_eq!(m.gflops * m.total_ms, 6.0 * 2.0 * 3200.0 / 1e6, max_relative = 1e-9);
        approx::assert_relative_eq!(m.share_of_matmul * report.matmul_gflops, m.gflops, max_relative = 1e-9);
        assert!(m.spread_ms.total.minimum <= m.total_ms && m.total_ms <= m.spread_ms.total.maximum);
        assert_eq!(report.measurements[1].peak_extra_bytes, Some(440));
    }

    #[test]
    fn repetitions_are_checked() {
        let settings = Settings { repetitions: Some(0), ..Settings::default() };
        let error = run(&settings, &Device::cpu(), &mut Quiet).unwrap_err().to_string();
        assert!(error.starts_with("`repetitions`: is 0"), "{error}");
    }
}
