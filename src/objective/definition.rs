//! The definition of every objective: float64, entry by entry, with closed-form gradients.
//!
//! Slow and obvious on purpose. It lists the entries of each row, sums their exponentials, and sends each entry's
//! gradient to the two embeddings it came from. Kernels are right when they agree with this.

use super::{Block, Objective, Similarity};
use crate::{Error, Result};

const OPERATION: &str = "definition";

/// A batch in float64. All matrices are row-major.
#[derive(Debug, Clone, Copy)]
pub struct DefinitionInput<'a> {
    /// (N, d)
    pub queries: &'a [f64],
    /// (N, d); document i is the positive of query i.
    pub documents: &'a [f64],
    /// (N, K, d), or empty: the hard negatives of each pair.
    pub hard_negatives: &'a [f64],
    /// d
    pub width: usize,
    /// N ids: pairs that share one are no negatives of each other.
    pub ids: Option<&'a [i64]>,
    /// `log(1 / temperature)`
    pub log_scale: f64,
}

/// The loss and all its gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct Definition {
    /// The loss.
    pub loss: f64,
    /// Per partition the log-sum-exp of each row.
    pub log_sum_exp: Vec<Vec<f64>>,
    /// (N, d)
    pub d_queries: Vec<f64>,
    /// (N, d)
    pub d_documents: Vec<f64>,
    /// (N, K, d)
    pub d_hard_negatives: Vec<f64>,
    /// The gradient with respect to `log(1 / temperature)`.
    pub d_log_scale: f64,
}

/// An entry of a row: which two embeddings, and whether it is the row's positive.
struct Entry {
    left: usize,
    right: usize,
    positive: bool,
}

impl Objective {
    /// Computes the loss and its gradients in float64.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Value`] if the lengths do not fit together or the batch is empty.
    pub fn definition(&self, input: DefinitionInput<'_>) -> Result<Definition> {
        let d = input.width;
        if d == 0 || input.queries.is_empty() || !input.queries.len().is_multiple_of(d) {
            return Err(Error::value(OPERATION, "queries", format!("has {} values of width {d}", input.queries.len())));
        }
        let n = input.queries.len() / d;
        if input.documents.len() != n * d {
            return Err(Error::shape(OPERATION, "documents", [n, d], [input.documents.len() / d, d]));
        }
        if !input.hard_negatives.len().is_multiple_of(n * d) {
            let found = [input.hard_negatives.len() / d, d];
            return Err(Error::shape(OPERATION, "hard_negatives", [n, d], found));
        }
        if let Some(ids) = input.ids
            && ids.len() != n
        {
            return Err(Error::shape(OPERATION, "ids", [n], [ids.len()]));
        }
        let k = input.hard_negatives.len() / (n * d);

        // All embeddings in one list: queries, documents, hard negatives.
        let raw: Vec<&[f64]> =
            input.queries.chunks(d).chain(input.documents.chunks(d)).chain(input.hard_negatives.chunks(d)).collect();
        let (query, document, negative) = (0, n, 2 * n);
        let length = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
        let unit: Vec<Vec<f64>> = match self.similarity {
            Similarity::Cosine => raw.iter().map(|x| x.iter().map(|v| v / length(x)).collect()).collect(),
            Similarity::Dot => raw.iter().map(|x| x.to_vec()).collect(),
        };
        let scale = input.log_scale.exp();
        let logit = |e: &Entry| scale * unit[e.left].iter().zip(&unit[e.right]).map(|(a, b)| a * b).sum::<f64>();
        let same_id = |i: usize, j: usize| input.ids.is_some_and(|ids| ids[i] == ids[j]);

        let entries = |block: Block, i: usize| -> Vec<Entry> {
            let pairs = |left: usize, first: usize, positive: bool| {
                (0..n).filter(move |&j| if j == i { positive } else { !same_id(i, j) }).map(move |j| Entry {
                    left,
                    right: first + j,
                    positive: j == i,
                })
            };
            let negatives = |left: usize, own: bool| {
                (0..n * k).filter(move |j| own || j / k != i).map(move |j| Entry {
                    left,
                    right: negative + j,
                    positive: false,
                })
            };
            match block {
                Block::QueryDocument => pairs(query + i, document, true).chain(negatives(query + i, true)).collect(),
                Block::QueryQuery => pairs(query + i, query, false).collect(),
                Block::DocumentQuery => pairs(document + i, query, true).collect(),
                Block::DocumentDocument { hard_negatives: false } => pairs(document + i, document, false).collect(),
                Block::DocumentDocument { hard_negatives: true } => {
                    pairs(document + i, document, false).chain(negatives(document + i, false)).collect()
                }
            }
        };

        let mut out = Definition {
            loss: 0.0,
            log_sum_exp: Vec::new(),
            d_queries: Vec::new(),
            d_documents: Vec::new(),
            d_hard_negatives: Vec::new(),
            d_log_scale: 0.0,
        };
        let mut d_unit = vec![vec![0.0; d]; raw.len()];
        for partition in &self.partitions {
            let weight = partition.weight / n as f64;
            let mut log_sum_exp = Vec::with_capacity(n);
            for i in 0..n {
                let row: Vec<Entry> = partition.blocks.iter().flat_map(|&block| entries(block, i)).collect();
                let logits: Vec<f64> = row.iter().map(logit).collect();
                let maximum = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = maximum + logits.iter().map(|z| (z - maximum).exp()).sum::<f64>().ln();
                let positives = partition.positives() as f64;
                let smoothed = self.label_smoothing / row.len() as f64;
                out.loss += weight * lse;
                for (entry, &z) in row.iter().zip(&logits) {
                    // The target of a row sums to one, also where the positive stands in it twice.
                    let target = smoothed + if entry.positive { (1.0 - self.label_smoothing) / positives } else { 0.0 };
                    out.loss -= weight * target * z;
                    let g = weight * ((z - lse).exp() - target);
                    out.d_log_scale += g * z;
                    for c in 0..d {
                        d_unit[entry.left][c] += scale * g * unit[entry.right][c];
                        d_unit[entry.right][c] += scale * g * unit[entry.left][c];
                    }
                }
                log_sum_exp.push(lse);
            }
            out.log_sum_exp.push(log_sum_exp);
        }

        if self.similarity == Similarity::Cosine {
            for ((g, u), x) in d_unit.iter_mut().zip(&unit).zip(&raw) {
                let along: f64 = g.iter().zip(u).map(|(g, u)| g * u).sum();
                let length = length(x);
                g.iter_mut().zip(u).for_each(|(g, u)| *g = (*g - u * along) / length);
            }
        }
        out.d_queries = d_unit[..n].concat();
        out.d_documents = d_unit[n..2 * n].concat();
        out.d_hard_negatives = d_unit[2 * n..].concat();
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(n: usize, d: usize, seed: u64) -> Vec<f64> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..n * d)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
            })
            .collect()
    }

    /// Every gradient of every objective against central differences.
    #[test]
    fn gradients_are_the_derivatives_of_the_loss() {
        let (n, k, d) = (5, 2, 4);
        let (q, p, h) = (batch(n, d, 1), batch(n, d, 2), batch(n * k, d, 3));
        let ids = [7, 3, 7, 9, 1];
        for name in Objective::NAMES {
            for similarity in [Similarity::Cosine, Similarity::Dot] {
                let mut objective = Objective::named(name).unwrap().similarity(similarity);
                if objective.partitions().iter().all(|p| p.blocks.len() == 1) {
                    objective = objective.label_smoothing(0.2).unwrap();
                }
                let value = |q: &[f64], p: &[f64], h: &[f64], log_scale: f64| {
                    objective
                        .definition(DefinitionInput {
                            queries: q,
                            documents: p,
                            hard_negatives: h,
                            width: d,
                            ids: Some(&ids),
                            log_scale,
                        })
                        .unwrap()
                };
                let t = 1.3;
                let out = value(&q, &p, &h, t);
                let step = 1e-5;
                let check = |what: &str, analytic: f64, plus: f64, minus: f64| {
                    let numeric = (plus - minus) / (2.0 * step);
                    assert!((analytic - numeric).abs() < 1e-8, "{name} {similarity} {what}: {analytic} {numeric}");
                };
                let moved = |x: &[f64], i: usize, by: f64| {
                    let mut x = x.to_vec();
                    x[i] += by;
                    x
                };
                for i in 0..n * d {
                    let (plus, minus) = (moved(&q, i, step), moved(&q, i, -step));
                    check("q", out.d_queries[i], value(&plus, &p, &h, t).loss, value(&minus, &p, &h, t).loss);
                    let (plus, minus) = (moved(&p, i, step), moved(&p, i, -step));
                    check("d", out.d_documents[i], value(&q, &plus, &h, t).loss, value(&q, &minus, &h, t).loss);
                }
                for i in 0..n * k * d {
                    let (plus, minus) = (moved(&h, i, step), moved(&h, i, -step));
                    check("h", out.d_hard_negatives[i], value(&q, &p, &plus, t).loss, value(&q, &p, &minus, t).loss);
                }
                check("t", out.d_log_scale, value(&q, &p, &h, t + step).loss, value(&q, &p, &h, t - step).loss);
            }
        }
    }

    /// The closed forms of `N` identical embeddings and the identities between objectives.
    #[test]
    fn known_values() {
        let (n, d) = (6, 3);
        let same = batch(1, d, 5).repeat(n);
        let (q, p) = (batch(n, d, 6), batch(n, d, 7));
        fn input<'a>(queries: &'a [f64], documents: &'a [f64]) -> DefinitionInput<'a> {
            DefinitionInput { queries, documents, hard_negatives: &[], width: 3, ids: None, log_scale: 2.0 }
        }
        let loss =
            |name: &str, q: &[f64], p: &[f64]| Objective::named(name).unwrap().definition(input(q, p)).unwrap().loss;
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(loss("infonce", &same, &same), (n as f64).ln());
        close(loss("samtone", &same, &same), ((2 * n - 1) as f64).ln());
        close(loss("gte", &q[..d], &p[..d]), 2f64.ln());
        close(loss("infonce", &q[..d], &p[..d]), 0.0);
        close(loss("samtone-bidirectional", &q, &p), 2.0 * loss("nt-xent", &q, &p));
        close(loss("samtone-bidirectional", &q, &p), loss("samtone", &q, &p) + loss("samtone", &p, &q));
        close(loss("symmetric", &q, &p), 0.5 * (loss("infonce", &q, &p) + loss("infonce", &p, &q)));
    }

    #[test]
    fn shapes_are_checked() {
        let input = DefinitionInput {
            queries: &[1.0; 6],
            documents: &[1.0; 4],
            hard_negatives: &[],
            width: 2,
            ids: None,
            log_scale: 0.0,
        };
        let error = Objective::infonce().definition(input).unwrap_err().to_string();
        assert_eq!(error, "definition: `documents` has shape (2, 2), expected (3, 2)");
        assert!(Objective::infonce().definition(DefinitionInput { queries: &[], ..input }).is_err());
        let input = DefinitionInput { documents: &[1.0; 6], ids: Some(&[1, 2]), ..input };
        assert!(Objective::infonce().definition(input).unwrap_err().to_string().contains("`ids` has shape (2)"));
    }
}
