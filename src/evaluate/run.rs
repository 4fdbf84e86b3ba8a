//! From a model and a test collection to metrics.

use super::{Beir, DEPTH, Metrics, top_k};
use crate::model::Model;
use crate::nn::Tower;
use crate::{Error, Result};

const OPERATION: &str = "evaluate";

/// Documents whose full texts are in memory together: enough to group them well by length.
const DOCUMENTS_AT_ONCE: usize = 16_384;

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvaluationProgress {
    /// So many queries are embedded.
    Queries {
        /// How many.
        done: usize,
        /// Of how many.
        total: usize,
    },
    /// So many documents are embedded.
    Documents {
        /// How many.
        done: usize,
        /// Of how many.
        total: usize,
    },
    /// All embeddings are there and are compared; what follows is the result.
    Searching,
}

/// Measures how well a model finds the documents that answer the queries of a test collection.
///
/// Queries go through the query tower and documents, as [`Document::full_text`](super::Document::full_text), through
/// the document tower. Every document is compared with every query ([`top_k`]): by the dot product of the embeddings,
/// which under [`Similarity::Cosine`](crate::Similarity::Cosine) have length 1. A document with the query's own id is
/// no answer to it ([`Beir::leave_out_identical_ids`]). Of the [`DEPTH`] best documents that are left, [`Metrics::of`]
/// are taken.
///
/// # Errors
/// [`Error::Value`] naming the query or document whose embedding is not finite; else what the tokenizer, the device
/// and the metrics report.
pub fn evaluate(model: &Model, beir: &Beir, progress: &mut dyn FnMut(EvaluationProgress)) -> Result<Metrics> {
    let width = model.embedding_size();

    let total = beir.queries.len();
    let texts: Vec<&str> = beir.queries.iter().map(|query| query.text.as_str()).collect();
    let queries =
        model.embed(Tower::Query, &texts, &mut |done| progress(EvaluationProgress::Queries { done, total }))?;
    check_finite("queries", &queries, width, |index| beir.queries.get(index).map_or("", |query| &query.id))?;

    let total = beir.documents.len();
    let mut documents = Vec::with_capacity(total * width);
    for (part, chunk) in beir.documents.chunks(DOCUMENTS_AT_ONCE).enumerate() {
        let texts: Vec<String> = chunk.iter().map(super::Document::full_text).collect();
        let before = part * DOCUMENTS_AT_ONCE;
        documents.extend(model.embed(Tower::Document, &texts, &mut |done| {
            progress(EvaluationProgress::Documents { done: before + done, total });
        })?);
    }
    check_finite("documents", &documents, width, |index| {
        beir.documents.get(index).map_or("", |document| &document.id)
    })?;

    progress(EvaluationProgress::Searching);
    let ranks = beir.document_id_ranks();
    // One more than is scored: the document with the query's own id may be among them.
    let mut rankings = top_k(&queries, &documents, width, DEPTH + 1, &ranks)?;
    beir.leave_out_identical_ids(&mut rankings, DEPTH);
    Metrics::of(&rankings, &beir.judgments, &ranks)
}

/// Embeddings that are no numbers would give metrics all the same, near zero and without a word.
fn check_finite<'a>(
    argument: &'static str,
    embeddings: &[f32],
    width: usize,
    id: impl Fn(usize) -> &'a str,
) -> Result<()> {
    match embeddings.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let (value, id) = (embeddings[at], id(at / width));
            let reason =
                format!("with the id `{id}` got an embedding that holds {value}; the model's weights are spoilt");
            Err(Error::value(OPERATION, argument, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Document, Judgment, Query};
    use super::*;
    use crate::backend::operations::Pooling;
    use crate::nn::{DualEncoder, DualEncoderSettings, EncoderSettings, Towers};
    use crate::text::Tokenizer;
    use crate::{Device, Similarity};

    fn model(similarity: Similarity) -> Model {
        let tokenizer = Tokenizer::train(["red green blue", "one two three", "red one. blue two"], 60).unwrap();
        let encoder = EncoderSettings {
            vocabulary_size: tokenizer.id_bound(),
            hidden_size: 8,
            layers: 1,
            heads: 2,
            feed_forward_size: 16,
            max_positions: 16,
            token_types: 2,
            layer_norm_epsilon: 1e-12,
            dropout: 0.1,
            attention_dropout: 0.1,
            pooling: Pooling::Mean,
        };
        let settings = DualEncoderSettings { encoder, towers: Towers::Separate, projection: None };
        let encoder = DualEncoder::new(&Device::cpu(), settings, 3.0, 5).unwrap();
        Model { encoder, tokenizer, similarity, max_query_length: 16, max_document_length: 16 }
    }

    fn document(id: &str, title: &str, text: &str) -> Document {
        Document { id: id.into(), title: title.into(), text: text.into() }
    }

    /// Both towers start with the same weights, so a query finds the document of the same full text first.
    fn collection() -> Beir {
        let query = |id: &str, text: &str| Query { id: id.into(), text: text.into() };
        Beir {
            documents: vec![
                document("a", "", "red green blue"),
                document("b", "one", "two"),
                document("c", "", "three green"),
                document("d", "red one", "blue two"),
            ],
            queries: vec![query("q1", "red one. blue two"), query("c", "three green")],
            judgments: vec![
                vec![Judgment { document: 3, relevance: 1 }],
                vec![Judgment { document: 0, relevance: 1 }, Judgment { document: 2, relevance: 1 }],
            ],
        }
    }

    #[test]
    fn titles_count_and_a_document_of_the_querys_own_id_does_not() {
        let (beir, model) = (collection(), model(Similarity::Cosine));
        let mut steps = Vec::new();
        let metrics = evaluate(&model, &beir, &mut |step| steps.push(step)).unwrap();
        assert_eq!(metrics.queries, 2);
        // Document d is the query's own text, title included.
        assert_eq!(metrics.per_query[0].mrr_at_10, 1.0);
        // Of the two relevant documents of the other query, one has the query's own id and is never found.
        assert_eq!(metrics.per_query[1].recall_at_100, 0.5);
        assert_eq!(steps.last(), Some(&EvaluationProgress::Searching));
        assert!(steps.contains(&EvaluationProgress::Queries { done: 2, total: 2 }));
        assert!(steps.contains(&EvaluationProgress::Documents { done: 4, total: 4 }));
    }

    #[test]
    fn under_dot_similarity_lengths_count() {
        let beir = collection();
        let model = model(Similarity::Dot);
        let texts: Vec<String> = beir.documents.iter().map(Document::full_text).collect();
        let documents = model.embed(Tower::Document, &texts, &mut |_| ()).unwrap();
        let queries: Vec<&str> = beir.queries.iter().map(|query| query.text.as_str()).collect();
        let queries = model.embed(Tower::Query, &queries, &mut |_| ()).unwrap();
        let ranking = |query: &[f32]| {
            let score = |document: &[f32]| query.iter().zip(document).map(|(q, d)| q * d).sum::<f32>();
            let mut ranking: Vec<(u32, f32)> = (0..).zip(documents.chunks(8).map(score)).collect();
            ranking.sort_by(|left, right| right.1.total_cmp(&left.1));
            ranking
        };
        let mut rankings: Vec<_> = queries.chunks(8).map(ranking).collect();
        rankings[1].retain(|hit| hit.0 != 2);
        let expected = Metrics::of(&rankings, &beir.judgments, &beir.document_id_ranks()).unwrap();
        assert_eq!(evaluate(&model, &beir, &mut |_| ()).unwrap(), expected);
    }

    #[test]
    fn embeddings_that_are_no_numbers_are_an_error() {
        let (beir, mut model) = (collection(), model(Similarity::Cosine));
        let parameters = model.encoder.parameters_mut();
        let (index, count) = parameters
            .iter()
            .enumerate()
            .find(|(_, parameter)| parameter.name() == "document.embeddings.word_embeddings.weight")
            .map(|(index, parameter)| (index, parameter.tensor().elements()))
            .unwrap();
        parameters.write(index, &vec![f32::NAN; count]).unwrap();
        let error = evaluate(&model, &beir, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("`documents` with the id `a`") && error.contains("NaN"), "{error}");
    }
}
