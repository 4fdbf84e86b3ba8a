//! Whether what was timed is right.

use serde::Serialize;

use super::Case;
use crate::objective::definition::DefinitionInput;
use crate::{Batch, Device, Error, Objective, Result, Tensor};

/// A loss or a gradient that is off by more than this is an error, not a measurement. Where a device rounds the factors
/// of products, logits are off by about so much times their scale, and four times that is allowed beside.
pub const TOLERANCE: f64 = 1e-3;

/// What the result was held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checked {
    /// The result that was timed, all of it, against the definition in double precision.
    Definition,
    /// The result that was timed, all of it, against the naive method in single precision.
    Naive,
    /// Not the result that was timed, of which it is only known that it is finite, but that of its first pairs alone,
    /// against the definition in double precision.
    SubBatch,
}

impl std::fmt::Display for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Definition => "definition",
            Self::Naive => "naive",
            Self::SubBatch => "sub-batch",
        })
    }
}

/// A loss and its gradients on the host.
#[derive(Debug, Clone)]
pub(super) struct Values {
    pub(super) loss: f64,
    pub(super) d_queries: Vec<f64>,
    pub(super) d_documents: Vec<f64>,
}

impl Values {
    pub(super) fn new(loss: f32, d_queries: &Tensor, d_documents: &Tensor) -> Result<Self> {
        let wide = |tensor: &Tensor| Ok::<_, Error>(tensor.to_host::<f32>()?.into_iter().map(f64::from).collect());
        Ok(Self { loss: loss.into(), d_queries: wide(d_queries)?, d_documents: wide(d_documents)? })
    }

    /// The largest distance of the loss and the gradients from what is expected, relative to it.
    ///
    /// What is expected may be 0, as the gradient of a batch of one pair is: nothing counts as smaller than a
    /// thousandth of its natural size, which is 1 for a loss and `natural` for the norm of a gradient.
    fn error(&self, expected: &Self, natural: f64) -> f64 {
        let gradients = [(&self.d_queries, &expected.d_queries), (&self.d_documents, &expected.d_documents)];
        let of_gradients = gradients.map(|(found, expected)| distance(found, expected, 1e-3 * natural));
        // f64::max would lose what is not a number.
        let larger = |worst: f64, error: f64| if error > worst || error.is_nan() { error } else { worst };
        of_gradients.into_iter().fold(distance(&[self.loss], &[expected.loss], 1e-3), larger)
    }

    fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.d_queries.iter().chain(&self.d_documents).all(|value| value.is_finite())
    }
}

/// ‖found − expected‖ / ‖expected‖, the latter at least `floor`.
fn distance(found: &[f64], expected: &[f64], floor: f64) -> f64 {
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f64 = expected.iter().map(|b| b * b).sum();
    difference.sqrt() / size.sqrt().max(floor)
}

/// The largest batch that is compared with the definition, which takes a while.
fn largest_defined(width: usize) -> usize {
    const ROWS: usize = 512;
    const TERMS: usize = 1 << 27;
    (TERMS / width.max(1)).isqrt().clamp(1, ROWS)
}

/// Compares what was timed with the definition, or else with the naive method, or else checks a part of the batch.
///
/// # Errors
/// [`Error::Value`] if the result is wrong.
pub(super) fn check(
    case: &Case,
    objective: &Objective,
    device: &Device,
    (queries, documents): (&[f32], &[f32]),
    found: &Values,
    naive: Option<&Values>,
) -> Result<(Checked, f64)> {
    let wrong = |what: String| Err(Error::value("bench", "result", format!("of {case} is wrong: {what}")));
    if !found.is_finite() {
        return wrong("it is not finite".into());
    }
    let rows = case.rows.min(largest_defined(case.width));
    let part = rows * case.width;
    let (checked, error) = match naive {
        Some(naive) if rows < case.rows => (Checked::Naive, found.error(naive, natural(objective, queries, case.rows))),
        _ => {
            let (queries, documents) = (&queries[..part], &documents[..part]);
            let of_part;
            let (checked, found) = if rows == case.rows {
                (Checked::Definition, found)
            } else {
                let shape = [rows, case.width];
                let tensor = |values| case.precision.tensor(device, values, shape);
                let (queries, documents) = (tensor(queries)?, tensor(documents)?);
                let out = objective.forward_backward(device, Batch::new(&queries, &documents))?;
                of_part = Values::new(out.loss.to_scalar()?, &out.d_queries, &out.d_documents)?;
                (Checked::SubBatch, &of_part)
            };
            let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<_>>();
            let definition = objective.definition(DefinitionInput {
                queries: &wide(queries),
                documents: &wide(documents),
                width: case.width,
                log_scale: objective.log_scale(),
                bias: objective.bias_value(),
                ..DefinitionInput::default()
            })?;
            let expected =
                Values { loss: definition.loss, d_queries: definition.d_queries, d_documents: definition.d_documents };
            (checked, found.error(&expected, natural(objective, queries, rows)))
        }
    };
    let rounding = 4.0 * objective.log_scale().exp() * device.product_rounding();
    if error > TOLERANCE + rounding || error.is_nan() {
        return wrong(format!("it differs from that of the {checked} check by a relative {error:.1e}"));
    }
    Ok((checked, error))
}

/// About the norm of the gradient of N embeddings of some length, none of which is told apart from the others.
fn natural(objective: &Objective, embeddings: &[f32], rows: usize) -> f64 {
    let squares: f64 = embeddings.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    let length = (squares / rows as f64).sqrt();
    objective.log_scale().exp() / ((rows as f64).sqrt() * length)
}

#[cfg(test)]
mod tests {
    use super::super::naive;
    use super::super::{Grid, Precision};
    use super::*;

    /// The result of a case and of the naive method.
    fn computed(case: &Case) -> (Objective, Values, Values) {
        computed_on(&Device::cpu(), case)
    }

    fn computed_on(device: &Device, case: &Case) -> (Objective, Values, Values) {
        let objective = Objective::named(&case.objective).unwrap();
        let (queries, documents) = case.embeddings();
        let tensor = |values: &[f32]| case.precision.tensor(device, values, [case.rows, case.width]).unwrap();
        let (queries, documents) = (tensor(&queries), tensor(&documents));
        let out = objective.forward_backward(device, Batch::new(&queries, &documents)).unwrap();
        let found = Values::new(out.loss.to_scalar().unwrap(), &out.d_queries, &out.d_documents).unwrap();
        let naive = naive::forward_backward(&objective, device, &queries, &documents).unwrap();
        let naive = Values::new(naive.loss, &naive.d_queries, &naive.d_documents).unwrap();
        (objective, found, naive)
    }

    fn checked(case: &Case, found: &Values, naive: Option<&Values>) -> Result<(Checked, f64)> {
        let (queries, documents) = case.embeddings();
        let objective = Objective::named(&case.objective).unwrap();
        check(case, &objective, &Device::cpu(), (&queries, &documents), found, naive)
    }

    #[test]
    fn both_methods_agree_with_the_definition() {
        let objectives = Objective::CENTRE.map(String::from).to_vec();
        let precisions = vec![Precision::F32, Precision::F16, Precision::BF16];
        let grid = Grid { objectives, rows: vec![1, 2, 33], widths: vec![1, 7], precisions };
        for case in grid.cases().unwrap() {
            let (_, found, naive) = computed(&case);
            for (method, values) in [("fused", &found), ("naive", &naive)] {
                let (checked, error) = checked(&case, values, None).unwrap();
                assert_eq!(checked, Checked::Definition, "{method} {case}: {error}");
                // Where no gradient vanishes nothing is excused.
                assert!(case.rows < 33 || case.width < 7 || error < 1e-5, "{method} {case}: {error}");
            }
        }
    }

    #[test]
    fn large_batches_are_compared_with_the_naive_method_or_in_part() {
        for objective in ["samtone-bidirectional", "gte"] {
            let precision = if objective == "gte" { Precision::BF16 } else { Precision::F32 };
            let case = Case { objective: objective.into(), rows: 600, width: 16, precision };
            let (_, found, naive) = computed(&case);
            let (how, error) = checked(&case, &found, Some(&naive)).unwrap();
            assert!(how == Checked::Naive && error < 1e-4, "{error}");
            let (how, error) = checked(&case, &found, None).unwrap();
            assert!(how == Checked::SubBatch && error < 1e-5, "{error}");
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn both_methods_agree_on_the_first_device_of_wgpu() {
        let Ok(device) = "wgpu".parse::<Device>() else { return println!("skipped: no device") };
        let objectives = ["infonce", "symmetric", "samtone", "samtone-bidirectional", "nt-xent", "gte"];
        let objectives = objectives.map(String::from).to_vec();
        // More rows than a part of columns has, than a workgroup, and than one pass over a row.
        let grid = Grid { objectives, rows: vec![1, 2, 33, 300, 1100], widths: vec![7], ..Grid::default() };
        for case in grid.cases().unwrap() {
            let (objective, found, naive) = computed_on(&device, &case);
            let error = found.error(&naive, natural(&objective, &case.embeddings().0, case.rows));
            assert!(error < if case.rows < 33 { TOLERANCE } else { 1e-5 }, "{case}: {error}");
            if case.rows <= 300 {
                let (checked, error) = checked(&case, &naive, None).unwrap();
                assert_eq!(checked, Checked::Definition, "{case}: {error}");
            }
        }
    }

    #[test]
    fn wrong_results_are_errors() {
        let case = Case { objective: "samtone".into(), rows: 20, width: 8, precision: Precision::F32 };
        let (_, found, _) = computed(&case);
        let spoilt = |spoil: fn(&mut Values)| {
            let mut values = found.clone();
            spoil(&mut values);
            checked(&case, &values, None).unwrap_err().to_string()
        };
        assert!(spoilt(|values| values.loss *= 1.01).contains("samtone, 20 rows, width 8, f32 is wrong: it differs"));
        assert!(spoilt(|values| values.d_documents[3] += 0.1).contains("definition"));
        assert!(spoilt(|values| values.d_queries[0] = f64::NAN).contains("not finite"));
        let mut naive = found.clone();
        naive.loss = f64::NAN;
        assert!(found.error(&naive, 1.0).is_nan());
    }

    #[test]
    fn wide_batches_are_checked_in_part() {
        assert_eq!((largest_defined(1), largest_defined(512), largest_defined(1024)), (512, 512, 362));
        assert_eq!(largest_defined(65_536), 45);
    }
}
