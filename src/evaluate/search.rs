//! Exact nearest-neighbour search by inner product.

use rayon::prelude::*;

use super::{Ranking, ranking_order};
use crate::{Error, Result, error::Shape};

const OPERATION: &str = "top-k search";

/// Queries that are scored together. With [`DOCUMENT_BLOCK`] large enough for the matrix product to run at full speed,
/// small enough for the scores (256 KiB) to stay in a core's cache and for a few hundred queries to occupy all cores.
const QUERY_BLOCK: usize = 64;

/// Documents that are scored together.
const DOCUMENT_BLOCK: usize = 1024;

/// The `k` documents of highest inner product with each query, best first, found by looking at all of them.
///
/// `queries` (Q × `width`) and `documents` (N × `width`) hold one embedding per row, row after row.
/// `document_id_ranks` (N) breaks ties as trec_eval does, see [`id_ranks`](super::id_ranks): of documents with equal
/// scores, the one with the higher rank comes first and is the one that is kept. Scores that are not a number come
/// last. Each ranking holds `min(k, N)` documents.
///
/// A score depends on its two embeddings only, neither on where they stand nor on the number of threads, so that equal
/// documents tie and results are the same on every run on one machine. Beside the result, each thread takes memory for
/// a block of 64 × 1,024 scores and 64 × 2k candidates; never all Q × N scores exist.
///
/// # Errors
/// [`Error::Value`] if `width` or `k` is 0, if a matrix does not consist of whole rows or holds more than 2³² of them;
/// [`Error::Shape`] if `document_id_ranks` has not one entry per document.
pub fn top_k(
    queries: &[f32],
    documents: &[f32],
    width: usize,
    k: usize,
    document_id_ranks: &[u32],
) -> Result<Vec<Ranking>> {
    if width == 0 {
        return Err(Error::value(OPERATION, "width", "is 0"));
    }
    if k == 0 {
        return Err(Error::value(OPERATION, "k", "is 0"));
    }
    for (argument, matrix) in [("queries", queries), ("documents", documents)] {
        if !matrix.len().is_multiple_of(width) {
            let reason = format!("has {} elements, which are no whole rows of {width}", matrix.len());
            return Err(Error::value(OPERATION, argument, reason));
        }
    }
    let count = documents.len() / width;
    if u32::try_from(count).is_err() {
        return Err(Error::value(OPERATION, "documents", format!("has {count} rows, more than {}", u32::MAX)));
    }
    if document_id_ranks.len() != count {
        let (expected, found) = (Shape::from([count]), Shape::from([document_id_ranks.len()]));
        return Err(Error::shape(OPERATION, "document_id_ranks", expected, found));
    }
    if queries.is_empty() || documents.is_empty() {
        return Ok(vec![Ranking::new(); queries.len() / width]);
    }
    // The matrix product picks its way of summing by the sizes of the block, so every block has the same size: the last
    // ones are filled up with zeros, whose scores are never read.
    let documents = Blocks::new(documents, width, DOCUMENT_BLOCK);
    let queries = Blocks::new(queries, width, QUERY_BLOCK);
    let rankings: Vec<Vec<Ranking>> = (0..queries.blocks())
        .into_par_iter()
        .map_init(
            || vec![0.0; QUERY_BLOCK * DOCUMENT_BLOCK],
            |scores, block| search_block(&queries, block, &documents, k.min(count), document_id_ranks, scores),
        )
        .collect();
    Ok(rankings.into_iter().flatten().collect())
}

/// The rankings of one block of queries; `scores` is scratch memory.
fn search_block(
    queries: &Blocks<'_>,
    block: usize,
    documents: &Blocks<'_>,
    k: usize,
    document_id_ranks: &[u32],
    scores: &mut [f32],
) -> Vec<Ranking> {
    let (query_rows, query_count) = queries.block(block);
    let mut candidates: Vec<Candidates> = (0..query_count).map(|_| Candidates::new(k)).collect();
    for document_block in 0..documents.blocks() {
        let (document_rows, document_count) = documents.block(document_block);
        multiply(query_rows, document_rows, queries.width, scores);
        let first = document_block * DOCUMENT_BLOCK;
        for (candidates, scores) in candidates.iter_mut().zip(scores.chunks_exact(DOCUMENT_BLOCK)) {
            let ranks = document_id_ranks.iter().skip(first).take(document_count);
            for ((&score, &rank), document) in scores.iter().zip(ranks).zip(first as u32..) {
                candidates.offer((score, rank, document));
            }
        }
    }
    candidates.into_iter().map(Candidates::into_ranking).collect()
}

/// `scores` (64 × 1,024) becomes `queries` (64 × `width`) times `documents` (1,024 × `width`) transposed.
fn multiply(queries: &[f32], documents: &[f32], width: usize, scores: &mut [f32]) {
    assert_eq!(queries.len(), QUERY_BLOCK * width);
    assert_eq!(documents.len(), DOCUMENT_BLOCK * width);
    assert_eq!(scores.len(), QUERY_BLOCK * DOCUMENT_BLOCK);
    // SAFETY: gemm reads and writes the elements `row * row_stride + column * column_stride` of the three matrices, with
    // rows and columns below the sizes given. With these strides the largest is, for each, one below the length that was
    // asserted above. The slices are live for the whole call and, `scores` being borrowed exclusively, do not overlap.
    unsafe {
        gemm::gemm(
            QUERY_BLOCK,
            DOCUMENT_BLOCK,
            width,
            scores.as_mut_ptr(),
            1,
            DOCUMENT_BLOCK as isize,
            false,
            queries.as_ptr(),
            1,
            width as isize,
            documents.as_ptr(),
            width as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// The rows of a matrix in blocks of equal size, the last one filled up with zeros.
struct Blocks<'a> {
    matrix: &'a [f32],
    width: usize,
    /// Rows of a block.
    rows: usize,
    /// The last block where the matrix does not fill it, else empty.
    last: Vec<f32>,
}

impl<'a> Blocks<'a> {
    fn new(matrix: &'a [f32], width: usize, rows: usize) -> Self {
        let mut last = matrix.chunks_exact(rows * width).remainder().to_vec();
        if !last.is_empty() {
            last.resize(rows * width, 0.0);
        }
        Self { matrix, width, rows, last }
    }

    fn blocks(&self) -> usize {
        self.matrix.len().div_ceil(self.rows * self.width)
    }

    /// The elements of a block and how many of its rows are real.
    fn block(&self, block: usize) -> (&[f32], usize) {
        let size = self.rows * self.width;
        let rest = self.matrix.get(block * size..).unwrap_or_default();
        match rest.get(..size) {
            Some(full) => (full, self.rows),
            None => (&self.last, rest.len() / self.width),
        }
    }
}

/// The best documents for one query among those seen so far.
struct Candidates {
    k: usize,
    /// Score, rank of the id and index of each; never more than 2k.
    hits: Vec<(f32, u32, u32)>,
    /// The worst of the best k when they were last told apart from the rest: nothing behind it can be among them.
    worst: Option<(f32, u32, u32)>,
}

impl Candidates {
    fn new(k: usize) -> Self {
        Self { k, hits: Vec::new(), worst: None }
    }

    fn offer(&mut self, hit: (f32, u32, u32)) {
        if self.worst.is_some_and(|worst| ranking_order(hit, worst).is_gt()) {
            return;
        }
        self.hits.push(hit);
        if self.hits.len() >= 2 * self.k {
            self.shrink();
        }
    }

    /// Leaves the best k. Done once per k newcomers, so that the cost per document stays constant.
    fn shrink(&mut self) {
        if self.hits.len() > self.k {
            let (_, &mut worst, _) =
                self.hits.select_nth_unstable_by(self.k - 1, |&left, &right| ranking_order(left, right));
            self.worst = Some(worst);
            self.hits.truncate(self.k);
        }
    }

    fn into_ranking(mut self) -> Ranking {
        self.shrink();
        self.hits.sort_unstable_by(|&left, &right| ranking_order(left, right));
        self.hits.into_iter().map(|(score, _, document)| (document, score)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::id_ranks;
    use super::*;

    /// Small whole numbers, whose inner products are exact in any order of summation and often equal.
    fn whole_numbers(rows: usize, width: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..rows * width).map(|_| rng.random_range(-2_i8..=2).into()).collect()
    }

    fn ids(count: usize) -> Vec<u32> {
        let ids: Vec<String> = (0..count).map(|id| id.to_string()).collect();
        id_ranks(ids.iter().map(String::as_str))
    }

    /// Every inner product in double precision, all of them sorted.
    fn naive(queries: &[f32], documents: &[f32], width: usize, k: usize) -> Vec<Vec<(u32, f64)>> {
        let rank_by_query = |query: &[f32]| {
            let score = |document: &[f32]| query.iter().zip(document).map(|(&q, &d)| f64::from(q) * f64::from(d)).sum();
            let mut hits: Vec<(f64, String, u32)> = documents
                .chunks_exact(width)
                .zip(0_u32..)
                .map(|(document, index)| (score(document), index.to_string(), index))
                .collect();
            // Not by `total_cmp`, which tells 0 from −0.
            hits.sort_by(|left, right| right.0.partial_cmp(&left.0).unwrap().then(right.1.cmp(&left.1)));
            hits.into_iter().take(k).map(|(score, _, index)| (index, score)).collect()
        };
        queries.chunks_exact(width).map(rank_by_query).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn rankings_with_many_ties_equal_a_full_sort(
            queries in 0_usize..140, documents in 0_usize..2500, width in 1_usize..20, k in 1_usize..1200, seed: u64,
        ) {
            let query_rows = whole_numbers(queries, width, seed);
            let document_rows = whole_numbers(documents, width, !seed);
            let found = top_k(&query_rows, &document_rows, width, k, &ids(documents)).unwrap();
            let expected = naive(&query_rows, &document_rows, width, k);
            prop_assert_eq!(found.len(), queries);
            for (found, expected) in found.iter().zip(&expected) {
                let found: Vec<(u32, f64)> = found.iter().map(|&(index, score)| (index, score.into())).collect();
                prop_assert_eq!(&found, expected);
            }
        }
    }

    #[test]
    fn scores_of_real_numbers_are_close_to_double_precision() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (width, queries, documents) = (384, 65, 2049);
        let query_rows: Vec<f32> = (0..queries * width).map(|_| rng.random_range(-0.1..0.1)).collect();
        let document_rows: Vec<f32> = (0..documents * width).map(|_| rng.random_range(-0.1..0.1)).collect();
        let found = top_k(&query_rows, &document_rows, width, 50, &ids(documents)).unwrap();
        let expected = naive(&query_rows, &document_rows, width, 50);
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((f64::from(found.1) - expected.1).abs() < 1e-6, "{found:?} instead of {expected:?}");
        }
    }

    #[test]
    fn equal_documents_tie_wherever_they_stand_and_whatever_the_number_of_threads() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for width in [1, 2, 3, 7, 64, 100, 384, 1000] {
            let document: Vec<f32> = (0..width).map(|_| rng.random_range(-1.0..1.0)).collect();
            let query: Vec<f32> = (0..width).map(|_| rng.random_range(-1.0..1.0)).collect();
            let (documents, queries) = (document.repeat(1100), query.repeat(70));
            let search = || top_k(&queries, &documents, width, 1100, &ids(1100)).unwrap();
            let found = search();
            let order: Vec<u32> = found[0].iter().map(|hit| hit.0).collect();
            assert_eq!(order[..3], [999, 998, 997]);
            for ranking in &found {
                assert_eq!(ranking, &found[0]);
                assert!(ranking.iter().all(|hit| hit.1.to_bits() == ranking[0].1.to_bits()), "width {width}");
            }
            let alone = top_k(&query, &document, width, 1, &[0]).unwrap();
            assert_eq!(alone[0][0].1.to_bits(), found[0][0].1.to_bits());
            let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            assert_eq!(single.install(search), found);
        }
    }

    #[test]
    fn scores_that_are_not_a_number_come_last() {
        let documents = [f32::NAN, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let found = top_k(&[1.0], &documents, 1, 9, &[0, 1, 2, 3, 4]).unwrap();
        let order: Vec<u32> = found[0].iter().map(|hit| hit.0).collect();
        assert_eq!(order, [2, 1, 3, 4, 0]);
        let found = top_k(&[f32::NAN], &[1.0; 3000], 1, 2, &ids(3000)).unwrap();
        assert_eq!(found[0].iter().map(|hit| hit.0).collect::<Vec<_>>(), [999, 998]);
    }

    #[test]
    fn nothing_to_search_in_or_for_gives_empty_rankings() {
        assert_eq!(top_k(&[1.0, 2.0], &[], 1, 5, &[]).unwrap(), [vec![], vec![]]);
        assert_eq!(top_k(&[], &[1.0], 1, 5, &[0]).unwrap(), Vec::<Ranking>::new());
        assert_eq!(top_k(&[], &[], usize::MAX, usize::MAX, &[]).unwrap(), Vec::<Ranking>::new());
        assert_eq!(top_k(&[1.0], &[2.0], 1, usize::MAX, &[0]).unwrap(), [[(0, 2.0)]]);
    }

    #[test]
    fn arguments_at_odds_are_named() {
        let cases: [(Result<_>, &str); 5] = [
            (top_k(&[1.0], &[1.0], 0, 1, &[0]), "`width` is 0"),
            (top_k(&[1.0], &[1.0], 1, 0, &[0]), "`k` is 0"),
            (top_k(&[1.0], &[1.0, 2.0], 2, 1, &[0]), "`queries` has 1 elements, which are no whole rows of 2"),
            (top_k(&[1.0, 2.0], &[1.0], 2, 1, &[0]), "`documents` has 1 elements"),
            (top_k(&[1.0], &[1.0, 2.0], 1, 1, &[0]), "`document_id_ranks` has shape (1), expected (2)"),
        ];
        for (result, expected) in cases {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
