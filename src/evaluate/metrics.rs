//! Retrieval metrics with the semantics of trec_eval, the tool of the Text REtrieval Conference that BEIR scores with.

use std::collections::HashMap;

use serde::Serialize;

use super::{Judgment, Ranking, ranking_order};
use crate::{Error, Result};

/// How many documents of each ranking count at most, as in BEIR: what stands below is not looked at. A ranking that was
/// retrieved less deep (a smaller corpus, a smaller `k`) counts as far as it goes.
pub const DEPTH: usize = 1000;

/// The depth of nDCG@10 and MRR@10.
const TOP: usize = 10;

/// The depth of Recall@100.
const RECALL_DEPTH: usize = 100;

/// How well one query was answered; every value lies between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct QueryMetrics {
    /// Normalised discounted cumulative gain of the first 10 documents (trec_eval's `ndcg_cut_10`): a document at rank
    /// `r` gains its grade divided by log₂(r + 1); the sum is divided by that of the best ranking of the judged
    /// documents (Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002).
    pub ndcg_at_10: f64,
    /// The reciprocal of the rank of the first relevant document, 0 unless it is among the first 10 (trec_eval's
    /// `recip_rank` of a ranking cut at 10).
    pub mrr_at_10: f64,
    /// The share of the relevant documents that are among the first 100 (trec_eval's `recall_100`).
    pub recall_at_100: f64,
    /// The mean, over all relevant documents, of the precision at the rank of each, 0 for those not found within
    /// [`DEPTH`] (trec_eval's `map_cut_1000`).
    pub average_precision: f64,
}

/// How well a set of queries was answered: the means of the queries' metrics.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    /// The mean of [`QueryMetrics::ndcg_at_10`].
    pub ndcg_at_10: f64,
    /// The mean of [`QueryMetrics::mrr_at_10`].
    pub mrr_at_10: f64,
    /// The mean of [`QueryMetrics::recall_at_100`].
    pub recall_at_100: f64,
    /// Mean average precision: the mean of [`QueryMetrics::average_precision`].
    pub map: f64,
    /// How many queries there were.
    pub queries: usize,
    /// The metrics of each query, in the order given. Not serialised with the rest.
    #[serde(skip)]
    pub per_query: Vec<QueryMetrics>,
}

impl Metrics {
    /// Scores rankings, one for each query, against the judgments of the same queries.
    ///
    /// As in trec_eval, documents are ranked by score (in single precision), those of equal score by id in descending
    /// lexicographic order, whatever order they come in; a judgment of 0 or below is not relevant, nor is a document
    /// without judgment; gains are the grades themselves. Scores that are not a number rank last.
    ///
    /// The means are over all queries given, as with `trec_eval -c`: a query with an empty ranking, or without any
    /// relevant document, counts with zeros. (A dense retriever finds something for every query, so that both ways of
    /// averaging trec_eval knows agree.)
    ///
    /// `document_id_ranks` are those of the whole corpus, see [`id_ranks`](super::id_ranks).
    ///
    /// # Errors
    /// [`Error::Value`] if there is no query, if the numbers of rankings and judgments differ, if a document lies
    /// outside `document_id_ranks`, or if a ranking or a query's judgments name a document twice.
    pub fn of(rankings: &[Ranking], judgments: &[Vec<Judgment>], document_id_ranks: &[u32]) -> Result<Self> {
        const OPERATION: &str = "metrics";
        if rankings.is_empty() {
            return Err(Error::value(OPERATION, "rankings", "are empty, there is nothing to average"));
        }
        if rankings.len() != judgments.len() {
            let reason = format!("are of {} queries, the rankings of {}", judgments.len(), rankings.len());
            return Err(Error::value(OPERATION, "judgments", reason));
        }
        let per_query = rankings
            .iter()
            .zip(judgments)
            .map(|(ranking, judgments)| {
                QueryMetrics::of(&grades_in_order(ranking, judgments, document_id_ranks)?, judgments)
            })
            .collect::<Result<Vec<_>>>()?;
        let count = per_query.len() as f64;
        let mean = |value: fn(&QueryMetrics) -> f64| per_query.iter().map(value).sum::<f64>() / count;
        Ok(Self {
            ndcg_at_10: mean(|query| query.ndcg_at_10),
            mrr_at_10: mean(|query| query.mrr_at_10),
            recall_at_100: mean(|query| query.recall_at_100),
            map: mean(|query| query.average_precision),
            queries: per_query.len(),
            per_query,
        })
    }
}

impl QueryMetrics {
    /// The metrics of a ranking, given as the grades of its documents from the first on.
    fn of(grades: &[i32], judgments: &[Judgment]) -> Result<Self> {
        let mut ideal: Vec<i32> =
            judgments.iter().map(|judgment| judgment.relevance).filter(|&grade| grade > 0).collect();
        if ideal.is_empty() {
            return Ok(Self::default());
        }
        ideal.sort_unstable_by(|left, right| right.cmp(left));
        let relevant = ideal.len() as f64;
        let mut found = 0_u32;
        let mut found_in_recall_depth = 0_u32;
        let mut first = None;
        let mut precisions = 0.0;
        for (rank, _) in (1_usize..).zip(grades).filter(|&(_, &grade)| grade > 0) {
            found += 1;
            first = first.or(Some(rank));
            precisions += f64::from(found) / rank as f64;
            if rank <= RECALL_DEPTH {
                found_in_recall_depth = found;
            }
        }
        Ok(Self {
            ndcg_at_10: discounted_gain(grades) / discounted_gain(&ideal),
            mrr_at_10: first.filter(|&rank| rank <= TOP).map_or(0.0, |rank| 1.0 / rank as f64),
            recall_at_100: f64::from(found_in_recall_depth) / relevant,
            average_precision: precisions / relevant,
        })
    }
}

/// The discounted cumulative gain of the first 10 grades.
fn discounted_gain(grades: &[i32]) -> f64 {
    (1_u32..).zip(grades).take(TOP).map(|(rank, &grade)| f64::from(grade.max(0)) / f64::from(rank + 1).log2()).sum()
}

/// The grades of a ranking's documents, best first and no deeper than [`DEPTH`]; 0 for those without judgment.
fn grades_in_order(ranking: &Ranking, judgments: &[Judgment], document_id_ranks: &[u32]) -> Result<Vec<i32>> {
    const OPERATION: &str = "metrics";
    let mut grades = HashMap::with_capacity(judgments.len());
    for judgment in judgments {
        if grades.insert(judgment.document, judgment.relevance).is_some() {
            let reason = format!("name document {} twice for one query", judgment.document);
            return Err(Error::value(OPERATION, "judgments", reason));
        }
    }
    let mut hits = Vec::with_capacity(ranking.len());
    for &(document, score) in ranking {
        let rank = document_id_ranks.get(document as usize).ok_or_else(|| {
            let reason = format!("name document {document}, but there are only {}", document_id_ranks.len());
            Error::value(OPERATION, "rankings", reason)
        })?;
        hits.push((score, *rank, document));
    }
    hits.sort_unstable_by(|&left, &right| ranking_order(left, right));
    let mut documents: Vec<u32> = ranking.iter().map(|&(document, _)| document).collect();
    documents.sort_unstable();
    if let Some(&[twice, _]) = documents.array_windows().find(|[left, right]| left == right) {
        return Err(Error::value(OPERATION, "rankings", format!("name document {twice} twice for one query")));
    }
    Ok(hits.iter().take(DEPTH).map(|&(_, _, document)| grades.get(&document).copied().unwrap_or(0)).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde::Deserialize;

    use super::super::id_ranks;
    use super::*;

    fn judged(grades: &[(u32, i32)]) -> Vec<Judgment> {
        grades.iter().map(|&(document, relevance)| Judgment { document, relevance }).collect()
    }

    #[test]
    fn small_cases_agree_with_hand_computed_values() {
        // Ranked: document 1 (judged −1), 0 (grade 2), 2 (grade 1), 3 (unjudged).
        let ranking = vec![(1, 4.0), (0, 3.0), (2, 2.0), (3, 1.0)];
        let metrics = Metrics::of(&[ranking], &[judged(&[(0, 2), (1, -1), (2, 1)])], &[0, 1, 2, 3]).unwrap();
        let log3 = 3_f64.log2();
        approx::assert_relative_eq!(metrics.ndcg_at_10, (2.0 / log3 + 0.5) / (2.0 + 1.0 / log3), max_relative = 1e-12);
        approx::assert_relative_eq!(metrics.mrr_at_10, 0.5);
        approx::assert_relative_eq!(metrics.recall_at_100, 1.0);
        approx::assert_relative_eq!(metrics.map, (1.0 / 2.0 + 2.0 / 3.0) / 2.0, max_relative = 1e-12);
    }

    #[test]
    fn queries_without_anything_relevant_or_found_count_with_zeros() {
        let rankings = [vec![(0, 1.0)], vec![(0, 1.0)], vec![]];
        let judgments = [judged(&[(0, 1)]), judged(&[(0, 0)]), judged(&[(0, 1)])];
        let metrics = Metrics::of(&rankings, &judgments, &[0]).unwrap();
        assert_eq!(metrics.queries, 3);
        for mean in [metrics.ndcg_at_10, metrics.mrr_at_10, metrics.recall_at_100, metrics.map] {
            approx::assert_relative_eq!(mean, 1.0 / 3.0);
        }
        assert_eq!(metrics.per_query[1], QueryMetrics::default());
    }

    #[test]
    fn scores_that_are_not_a_number_rank_last() {
        let rankings = [vec![(0, f32::NAN), (1, f32::NEG_INFINITY), (2, 0.5)]];
        let metrics = Metrics::of(&rankings, &[judged(&[(0, 1)])], &[2, 1, 0]).unwrap();
        approx::assert_relative_eq!(metrics.mrr_at_10, 1.0 / 3.0);
    }

    #[test]
    fn arguments_that_make_no_sense_are_named() {
        let one = [judged(&[(0, 1)])];
        type Case<'a> = (&'a [Ranking], &'a [Vec<Judgment>], &'a str);
        let cases: [Case<'_>; 5] = [
            (&[], &[], "`rankings` are empty"),
            (&[vec![], vec![]], &one, "`judgments` are of 1 queries, the rankings of 2"),
            (&[vec![(2, 1.0)]], &one, "`rankings` name document 2, but there are only 2"),
            (&[vec![(1, 1.0), (0, 1.0), (1, 0.5)]], &one, "`rankings` name document 1 twice"),
            (&[vec![]], &[judged(&[(0, 1), (0, 1)])], "`judgments` name document 0 twice"),
        ];
        for (rankings, judgments, expected) in cases {
            let error = Metrics::of(rankings, judgments, &[0, 1]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    /// What `scripts/golden-metrics.py` wrote.
    #[derive(Deserialize)]
    struct Golden {
        run: BTreeMap<String, BTreeMap<String, f64>>,
        qrels: BTreeMap<String, BTreeMap<String, i32>>,
        per_query: BTreeMap<String, Expected>,
        mean: Expected,
    }

    #[derive(Deserialize)]
    struct Expected {
        ndcg_at_10: f64,
        mrr_at_10: f64,
        recall_at_100: f64,
        map: f64,
    }

    #[test]
    fn metrics_equal_those_of_trec_eval() {
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/trec_eval.json");
        let golden: Golden = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
        let ids: BTreeSet<&str> = golden
            .run
            .values()
            .flat_map(BTreeMap::keys)
            .chain(golden.qrels.values().flat_map(BTreeMap::keys))
            .map(String::as_str)
            .collect();
        // Indices at odds with the order of ids, so that only the ranks can break ties the right way.
        let mut ids: Vec<&str> = ids.into_iter().collect();
        ids.sort_by_key(|id| (id.len(), id.chars().rev().collect::<String>()));
        let index: HashMap<&str, u32> = ids.iter().copied().zip(0..).collect();
        let judgments: Vec<Vec<Judgment>> = golden
            .qrels
            .values()
            .map(|grades| {
                grades.iter().map(|(id, &relevance)| Judgment { document: index[id.as_str()], relevance }).collect()
            })
            .collect();
        let rankings: Vec<Ranking> = golden
            .qrels
            .keys()
            .map(|query| golden.run[query].iter().map(|(id, &score)| (index[id.as_str()], score as f32)).collect())
            .collect();
        let metrics = Metrics::of(&rankings, &judgments, &id_ranks(ids)).unwrap();
        let check = |found: [f64; 4], expected: &Expected, what: &str| {
            let expected = [expected.ndcg_at_10, expected.mrr_at_10, expected.recall_at_100, expected.map];
            for (found, expected) in found.into_iter().zip(expected) {
                assert!((found - expected).abs() < 1e-12, "{what}: {found} instead of {expected}");
            }
        };
        assert_eq!(metrics.per_query.len(), golden.per_query.len());
        for (found, (query, expected)) in metrics.per_query.iter().zip(&golden.per_query) {
            let found = [found.ndcg_at_10, found.mrr_at_10, found.recall_at_100, found.average_precision];
            check(found, expected, &format!("query {query}"));
        }
        let found = [metrics.ndcg_at_10, metrics.mrr_at_10, metrics.recall_at_100, metrics.map];
        check(found, &golden.mean, "the mean");
    }
}
