//! What a device computes, held to the float64 definition: one table for our tests and for users' own machines.
//!
//! [`cases`] is the table. A [`Case`] makes its input, the same everywhere, computes it in float64 on the host and in
//! single precision on a device, and compares the two, quantity by quantity, with a bound. `nearfar check` prints it.
//!
//! ```
//! use nearfar::{Device, conformance};
//!
//! for case in conformance::cases().iter().filter(|case| case.name().starts_with("samtone/7x")) {
//!     let outcome = case.run(&Device::cpu())?;
//!     assert!(outcome.holds(), "{}: {outcome}", case.name());
//! }
//! # Ok::<(), nearfar::Error>(())
//! ```
//!
//! # The bounds
//!
//! They follow from a model of single precision and are not tuned to any device. With ε = 2⁻²³:
//!
//! * A **sum of n products** is off by `ε·(1 + √n/2)` of the sum of their magnitudes (for a dot product, of the product
//!   of the lengths): roundings are independent, so they grow with √n, in whatever order a device adds. The sums of
//!   errors over a gradient use the same n.
//! * Where a device **rounds factors** of products to 16 bits, by u of themselves, a sum of products is off by `2u` more
//!   of the sum of their magnitudes. That is a model of small errors: it says little where `σ·u` is not small, and
//!   decisions are close then.
//! * A **normalised** embedding is off by 2ε, so a cosine by 2ε more than a dot product: η in all.
//! * The **scale** σ, the exponential of a rounded logarithm, is off by `ρ = ε·(1 + |log σ|)` of itself.
//! * A **logit** is off by `δ = σ·η + ρ·σ·|s| + ε·|z|`, and ε of a bias, a margin or a hardness weight. All logits of
//!   a row count as off by the largest δ among them, and `2ε·(max |z| + log n + 1)` for the rounding of the
//!   log-sum-exp.
//! * A **row's loss** f is off by `Σ|∂f/∂z|·δ + 4ε·|f|` and no more, so losses near zero keep their digits. Only where
//!   the formula subtracts larger numbers (several positives, smoothing, a teacher) are 4ε of those added.
//! * A **coefficient** `g = ∂f/∂z` is off by how far it moves when all logits move by δ against each other, and 4ε of
//!   itself. For a softmax p that is `2p·(1 − p)·δ`. A row function that amplifies has its factor: Hybrid-NCE `1 + β`
//!   on its logits, the debiased estimate the size of its terms over their difference.
//! * **Row weights** and averages are off by 2ε of themselves; the softmax over rows of a log-mean-exp by twice the
//!   error of the rows' losses.
//! * An embedding's **gradient** sums `σ·g·(the other embedding)`, each term with the errors above, and is divided by
//!   the embedding's length. Each embedding is held to its own bound, in the Euclidean norm.
//! * The **definition** subtracts in float64: losses and coefficients may be off by `10⁻¹⁵·(max |z| + log n + 1)` for
//!   that.
//! * What leaves single precision's normal numbers may become zero: `2·10⁻³⁸` a term.
//!
//! The bounds of encoder operations are those of their sums and products, with the number of roundings on the longest
//! way to an element as a factor.
//!
//! Decisions (hinges, thresholds, the hardest negative) are no matter of rounding: data is chosen so that none is
//! close.
//!
//! # What else is checked
//!
//! Every case runs twice and must give the same bits, must leave its input as it was, and must not write beyond its
//! buffers: while a case runs, the CPU and wgpu end each buffer with guard words, and another backend that can tell
//! reports it by [`Backend::guard_violations`](crate::backend::Backend::guard_violations). On the CPU the value of that
//! is for the matrix products, the one part that is not safe Rust; shaders run without checks of their indices.

mod expectations;
mod inputs;
mod losses;
mod operations;
mod scores;

use std::fmt;

use rayon::prelude::*;

use crate::backend::guards::Guards;
use crate::{Device, Result, Tensor};

pub use expectations::{EXPECTED_FAILURES, Expectation, Verdict};

/// ε: the distance from 1 to the next single-precision number.
const EPSILON: f64 = f32::EPSILON as f64;

/// What the definition, in float64, may be off by where it subtracts numbers of size 1.
const DEFINITION: f64 = 4.0 * f64::EPSILON;

/// What a term may lose by leaving the normal numbers.
const TINY: f64 = 2e-38;

/// The part of the sum of n magnitudes that their sum may be off by.
fn sum_error(n: usize) -> f64 {
    EPSILON * (1.0 + 0.5 * (n as f64).sqrt())
}

/// One of the numbers that a case compares: a scalar, or whatever part of a tensor came closest to its bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantity {
    /// What it is: `loss`, `d_queries`, …
    pub name: &'static str,
    /// How far the device is off the definition.
    pub error: f64,
    /// How far it may be off.
    pub bound: f64,
}

impl Quantity {
    /// The error as a part of the bound; infinite if it is not a number, 0 for nothing wrong where nothing may be.
    pub fn ratio(&self) -> f64 {
        match (self.error, self.bound) {
            (error, bound) if error.is_nan() || bound.is_nan() => f64::INFINITY,
            (0.0, _) => 0.0,
            (error, bound) => error / bound,
        }
    }

    /// Compares rows of some width in the Euclidean norm and keeps the one that is worst for its bound.
    fn of_rows(
        name: &'static str,
        found: &[f64],
        expected: &[f64],
        width: usize,
        bound: impl Fn(usize) -> f64,
    ) -> Self {
        let mut worst = Self { name, error: 0.0, bound: 0.0 };
        if found.len() != expected.len() {
            return Self { error: f64::NAN, ..worst };
        }
        let width = width.max(1);
        for (row, (found, expected)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
            let error = norm(found.iter().zip(expected).map(|(a, b)| if a == b { 0.0 } else { a - b }));
            let here = Self { name, error, bound: bound(row) };
            if row == 0 || here.ratio() > worst.ratio() {
                worst = here;
            }
        }
        worst
    }
}

/// The Euclidean norm, of values whose squares may leave the range of numbers too.
fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |norm: f64, value| norm.hypot(value))
}

/// What became of a case on a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The error of the quantity that is worst for its bound.
    pub worst: f64,
    /// The bound of that quantity.
    pub bound: f64,
    /// Its name.
    pub quantity: &'static str,
    /// All that were compared.
    pub quantities: Vec<Quantity>,
    /// Whether the case gave the same bits twice.
    pub reproducible: bool,
    /// Whether the input was left as it was.
    pub input_kept: bool,
    /// How many buffers were written beyond their end.
    pub guard_violations: usize,
}

impl Outcome {
    /// Whether everything is as it must be.
    pub fn holds(&self) -> bool {
        self.quantities.iter().all(|quantity| quantity.ratio() <= 1.0)
            && self.reproducible
            && self.input_kept
            && self.guard_violations == 0
    }

    /// The worst error as a part of its bound.
    pub fn ratio(&self) -> f64 {
        self.quantities.iter().map(Quantity::ratio).fold(0.0, f64::max)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is off by {:.2e}, bound {:.2e}", self.quantity, self.worst, self.bound)?;
        if !self.reproducible {
            f.write_str("; not reproducible")?;
        }
        if !self.input_kept {
            f.write_str("; the input was changed")?;
        }
        match self.guard_violations {
            0 => Ok(()),
            count => write!(f, "; {count} buffers written beyond their end"),
        }
    }
}

/// A quantity on the device, and what it is compared with.
struct Expected {
    name: &'static str,
    values: Vec<f64>,
    /// Values that are compared together.
    width: usize,
    /// One for each `width` values.
    bounds: Vec<f64>,
}

impl Expected {
    fn new(name: &'static str, values: Vec<f64>, bounds: Vec<f64>) -> Self {
        Self { name, values, width: 1, bounds }
    }

    fn rows(name: &'static str, values: Vec<f64>, width: usize, bounds: Vec<f64>) -> Self {
        Self { name, values, width, bounds }
    }
}

/// The tensors of a run: what was read and what came out, the latter in the order of what is expected.
pub(crate) struct Ran {
    inputs: Vec<Vec<u32>>,
    outputs: Vec<Vec<f32>>,
}

/// The bits of tensors as they stand on the device.
fn bits(tensors: &[&Tensor]) -> Result<Vec<Vec<u32>>> {
    let of = |tensor: &&Tensor| match tensor.dtype() {
        crate::error::DType::U32 => tensor.to_host::<u32>(),
        // What is narrower is compared as it widens, which loses nothing.
        _ => Ok(tensor.cast(crate::error::DType::F32)?.to_host::<f32>()?.into_iter().map(f32::to_bits).collect()),
    };
    tensors.iter().map(of).collect()
}

fn host(tensors: &[&Tensor]) -> Result<Vec<Vec<f32>>> {
    tensors.iter().map(|tensor| tensor.to_host()).collect()
}

/// What a case computes.
enum Kind {
    Loss(losses::LossCase),
    Scores(scores::ScoreCase),
    Operation(operations::OperationCase),
}

/// A row of the table.
pub struct Case {
    name: String,
    slow: bool,
    kind: Kind,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Case({})", self.name)
    }
}

impl Case {
    /// What is computed, of what shape and input, in what precision: `samtone/257x33/ties/f32`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the definition takes so long that one leaves the case out where time is short.
    pub fn is_slow(&self) -> bool {
        self.slow
    }

    /// Computes the case in float64 and on a device, and compares.
    ///
    /// # Errors
    /// What the device reports.
    pub fn run(&self, device: &Device) -> Result<Outcome> {
        self.compare(device, &self.expected(device.product_rounding())?)
    }

    /// In float64, for a device that rounds factors of products so far.
    fn expected(&self, rounding: f64) -> Result<Vec<Expected>> {
        match &self.kind {
            Kind::Loss(case) => case.expected(rounding),
            Kind::Scores(case) => case.expected(),
            Kind::Operation(case) => Ok(case.expected(rounding)),
        }
    }

    pub(crate) fn on_device(&self, device: &Device) -> Result<Ran> {
        match &self.kind {
            Kind::Loss(case) => case.on_device(device),
            Kind::Scores(case) => case.on_device(device),
            Kind::Operation(case) => case.on_device(device),
        }
    }

    fn compare(&self, device: &Device, expected: &[Expected]) -> Result<Outcome> {
        let guards = Guards::raise();
        let before = device.guard_violations();
        let first = self.on_device(device)?;
        // Buffers that were looked at are used again: the second run begins with what the first one has left in them.
        device.guard_violations();
        let second = self.on_device(device)?;
        let guard_violations = device.guard_violations() - before;
        drop(guards);
        let same_bits = |a: &[Vec<f32>], b: &[Vec<f32>]| {
            let bits = |outputs: &[Vec<f32>]| outputs.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>();
            bits(a) == bits(b)
        };
        let quantities: Vec<Quantity> = expected
            .iter()
            .zip(&first.outputs)
            .map(|(expected, found)| {
                let found: Vec<f64> = found.iter().copied().map(f64::from).collect();
                Quantity::of_rows(expected.name, &found, &expected.values, expected.width, |row| expected.bounds[row])
            })
            .collect();
        let worst = quantities.iter().copied().reduce(|a, b| if b.ratio() > a.ratio() { b } else { a });
        let worst = worst.unwrap_or(Quantity { name: "nothing", error: f64::NAN, bound: 0.0 });
        Ok(Outcome {
            worst: worst.error,
            bound: worst.bound,
            quantity: worst.name,
            reproducible: same_bits(&first.outputs, &second.outputs),
            input_kept: self.inputs() == first.inputs && first.inputs == second.inputs,
            guard_violations,
            quantities,
        })
    }

    /// The bits of what is uploaded.
    fn inputs(&self) -> Vec<Vec<u32>> {
        match &self.kind {
            Kind::Loss(case) => case.inputs(),
            Kind::Scores(case) => case.inputs(),
            Kind::Operation(case) => case.inputs(),
        }
    }
}

/// The table: losses, then the losses of graded pairs, then the operations of encoders.
pub fn cases() -> Vec<Case> {
    let mut cases = losses::cases();
    cases.extend(scores::cases());
    cases.extend(operations::cases());
    cases
}

/// Runs cases in their order, showing each outcome as it comes. The definitions of several are computed at a time; the
/// device runs one after the other.
///
/// # Errors
/// What the device reports, or `show`.
pub fn run<'a, E: From<crate::Error>>(
    device: &Device,
    cases: &[&'a Case],
    mut show: impl FnMut(&'a Case, Outcome) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let rounding = device.product_rounding();
    for cases in cases.chunks(16) {
        let expected: Vec<Result<Vec<Expected>>> = cases.par_iter().map(|case| case.expected(rounding)).collect();
        for (case, expected) in cases.iter().zip(expected) {
            show(case, case.compare(device, &expected?)?)?;
        }
    }
    Ok(())
}
