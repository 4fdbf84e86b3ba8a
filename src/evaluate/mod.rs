//! Measuring retrieval: reading test collections, searching them exactly and scoring the result as trec_eval does.
//!
//! [`evaluate`] does it all in this order: embeddings, search, leaving out documents with the query's own id, metrics.

mod beir;
mod metrics;
mod run;
mod search;

use std::cmp::Ordering;

pub use beir::{Beir, Document, Judgment, Query};
pub use metrics::{DEPTH, Metrics, QueryMetrics};
pub use run::{EvaluationProgress, evaluate};
pub use search::top_k;

/// The documents found for one query, each with its score: indices into the corpus, and the higher the better.
pub type Ranking = Vec<(u32, f32)>;

/// The place of each id in the ascending lexicographic (byte) order of all of them, in the order given; equal ids get
/// places in the order given.
///
/// trec_eval puts documents of equal score in descending order of their ids, so the higher place comes first; comparing
/// numbers made once is what keeps that affordable in a search.
pub fn id_ranks<'a>(ids: impl IntoIterator<Item = &'a str>) -> Vec<u32> {
    let mut order: Vec<(&str, u32)> = ids.into_iter().zip(0..).collect();
    order.sort();
    let mut ranks = vec![0; order.len()];
    for (rank, &(_, index)) in (0..).zip(&order) {
        if let Some(place) = ranks.get_mut(index as usize) {
            *place = rank;
        }
    }
    ranks
}

/// The order of two documents in a ranking, each given as its score, the rank of its id and its index: higher scores
/// first, among equal ones higher ranks. Scores that are not a number come last, as if lower than any other.
fn ranking_order(left: (f32, u32, u32), right: (f32, u32, u32)) -> Ordering {
    let scores = match right.0.partial_cmp(&left.0) {
        Some(order) => order,
        None => left.0.is_nan().cmp(&right.0.is_nan()),
    };
    scores.then(right.1.cmp(&left.1)).then(left.2.cmp(&right.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_ranked_as_text_not_as_numbers() {
        assert_eq!(id_ranks(["9", "10", "é", "1", "Z", "a"]), [2, 1, 5, 0, 3, 4]);
        assert_eq!(id_ranks([]), [0_u32; 0]);
    }

    #[test]
    fn rankings_are_ordered_by_score_then_id_with_nan_last() {
        let mut hits = [
            (f32::NAN, 9, 0),
            (1.0, 0, 1),
            (f32::NEG_INFINITY, 3, 2),
            (0.0, 1, 3),
            (-0.0, 2, 4),
            (f32::INFINITY, 4, 5),
            (f32::NAN, 10, 6),
        ];
        hits.sort_by(|&left, &right| ranking_order(left, right));
        assert_eq!(hits.map(|hit| hit.2), [5, 1, 4, 3, 2, 6, 0]);
    }
}
