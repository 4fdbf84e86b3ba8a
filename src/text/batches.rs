//! A training set as token ids, and which of its pairs form which batch.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::hash::stable_hash;
use super::{Pair, PairReader, Tokenizer};
use crate::{Error, Result};

/// How many pairs are tokenised in one go.
const PAIRS_AT_ONCE: usize = 1024;

/// Sequences of different lengths, end to end.
#[derive(Debug, Clone)]
struct Sequences {
    tokens: Vec<u32>,
    /// Where each sequence starts, and where the last one ends.
    offsets: Vec<usize>,
}

impl Sequences {
    fn new() -> Self {
        Self { tokens: Vec::new(), offsets: vec![0] }
    }

    fn push(&mut self, sequence: &[u32]) {
        self.tokens.extend_from_slice(sequence);
        self.offsets.push(self.tokens.len());
    }

    fn get(&self, i: usize) -> &[u32] {
        &self.tokens[self.offsets[i]..self.offsets[i + 1]]
    }
}

/// A training set as token ids.
#[derive(Debug, Clone)]
pub struct TokenisedPairs {
    queries: Sequences,
    documents: Sequences,
    /// `hard_negatives` for each pair.
    negatives: Sequences,
    hard_negatives: usize,
    query_keys: Vec<u64>,
    document_keys: Vec<u64>,
    ids: Vec<u32>,
    negative_ids: Vec<Option<u32>>,
}

impl TokenisedPairs {
    /// Reads and tokenises a file of pairs (see [`PairReader`] for its format), using all threads.
    ///
    /// Queries are cut at `max_query_length` tokens, documents and negatives at `max_document_length`, special tokens
    /// included. Of every pair the first `hard_negatives` negatives are kept, which can be 0. After every 1,024 pairs
    /// and at the end `progress` is told how many pairs there are so far. Of the file's text only a small part is in
    /// memory at any time.
    ///
    /// # Errors
    /// Those of [`PairReader`] and [`Tokenizer::encode`]; [`Error::Line`] for a pair with fewer than `hard_negatives`
    /// negatives and for a text that comes to no token at all; [`Error::File`] for more than `u32::MAX` pairs.
    pub fn read(
        path: impl AsRef<Path>,
        tokenizer: &Tokenizer,
        max_query_length: usize,
        max_document_length: usize,
        hard_negatives: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let path = path.as_ref();
        let mut reader = PairReader::open(path)?;
        let mut this = Self {
            queries: Sequences::new(),
            documents: Sequences::new(),
            negatives: Sequences::new(),
            hard_negatives,
            query_keys: Vec::new(),
            document_keys: Vec::new(),
            ids: Vec::new(),
            negative_ids: Vec::new(),
        };
        let mut negative_keys: Vec<u64> = Vec::new();
        loop {
            let mut lines = Vec::with_capacity(PAIRS_AT_ONCE);
            let (mut queries, mut documents, mut negatives) = (Vec::new(), Vec::new(), Vec::new());
            while lines.len() < PAIRS_AT_ONCE
                && let Some(pair) = reader.next()
            {
                let Pair { query, document, negatives: mut own, .. } = pair?;
                if own.len() < hard_negatives {
                    return Err(reader.error(format!(
                        "the pair has {} negatives, expected at least {hard_negatives}, as many as each pair is to be \
                         trained with",
                        own.len()
                    )));
                }
                own.truncate(hard_negatives);
                this.query_keys.push(stable_hash(query.as_bytes()));
                this.document_keys.push(stable_hash(document.as_bytes()));
                negative_keys.extend(own.iter().map(|negative| stable_hash(negative.as_bytes())));
                lines.push(reader.line());
                queries.push(query);
                documents.push(document);
                negatives.extend(own);
            }
            if lines.is_empty() {
                break;
            }
            if u32::try_from(this.query_keys.len()).is_err() {
                return Err(Error::file(path, format!("holds more than {} pairs", u32::MAX)));
            }
            for (what, texts, length, per_pair, into) in [
                ("query", queries, max_query_length, 1, &mut this.queries),
                ("document", documents, max_document_length, 1, &mut this.documents),
                ("negative", negatives, max_document_length, hard_negatives, &mut this.negatives),
            ] {
                for (i, sequence) in tokenizer.encode_batch(&texts, length)?.iter().enumerate() {
                    if sequence.is_empty() {
                        let reason = format!("the {what} comes to no token at all under this tokenizer");
                        return Err(Error::line(path, lines[i / per_pair], reason));
                    }
                    into.push(sequence);
                }
            }
            progress(this.query_keys.len());
        }
        this.ids = groups(&this.query_keys, &this.document_keys);
        let id_of_document: HashMap<u64, u32> =
            this.document_keys.iter().copied().zip(this.ids.iter().copied()).collect();
        this.negative_ids = negative_keys.iter().map(|key| id_of_document.get(key).copied()).collect();
        Ok(this)
    }

    /// How many pairs there are; at least one.
    pub fn len(&self) -> usize {
        self.query_keys.len()
    }

    /// Whether there is no pair, which does not happen: reading a file without pairs is an error.
    pub fn is_empty(&self) -> bool {
        self.query_keys.is_empty()
    }

    /// How many hard negatives every pair has.
    pub fn hard_negatives(&self) -> usize {
        self.hard_negatives
    }

    /// The token ids of a query; at least one.
    ///
    /// # Panics
    /// If there is no such pair, as indexing a slice would; so do the methods below.
    pub fn query(&self, pair: usize) -> &[u32] {
        self.queries.get(pair)
    }

    /// The token ids of a document; at least one.
    pub fn document(&self, pair: usize) -> &[u32] {
        self.documents.get(pair)
    }

    /// The token ids of the hard negative `which` of a pair, counted from 0; at least one.
    pub fn negative(&self, pair: usize, which: usize) -> &[u32] {
        self.negatives.get(self.place_of_negative(pair, which))
    }

    /// A hash of the text of a query: equal texts have equal keys, in every run.
    pub fn query_key(&self, pair: usize) -> u64 {
        self.query_keys[pair]
    }

    /// A hash of the text of a document: equal texts have equal keys, in every run.
    pub fn document_key(&self, pair: usize) -> u64 {
        self.document_keys[pair]
    }

    /// For every pair the group it belongs to, shape `(len,)`: pairs with equal query texts or equal document texts
    /// are in one group, and so are pairs that are linked over others in this way. A group is called by its first
    /// pair.
    ///
    /// Documents of a query's own group are no negatives of that query, or at least doubtful ones.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The group of the pairs that have the text of this hard negative as their document; `None` if there are none.
    pub fn negative_id(&self, pair: usize, which: usize) -> Option<u32> {
        self.negative_ids[self.place_of_negative(pair, which)]
    }

    fn place_of_negative(&self, pair: usize, which: usize) -> usize {
        assert!(which < self.hard_negatives, "hard negative {which} of {}", self.hard_negatives);
        pair * self.hard_negatives + which
    }
}

/// For every pair the first pair of those that are linked with it by equal keys.
fn groups(query_keys: &[u64], document_keys: &[u64]) -> Vec<u32> {
    // Disjoint sets; every set is led by its first pair, as the later leader of two always joins the earlier one.
    let mut leaders: Vec<u32> = (0u32..).take(query_keys.len()).collect();
    fn leader(leaders: &mut [u32], mut pair: u32) -> u32 {
        while leaders[pair as usize] != pair {
            let next = leaders[leaders[pair as usize] as usize];
            leaders[pair as usize] = next;
            pair = next;
        }
        pair
    }
    for keys in [query_keys, document_keys] {
        let mut first: HashMap<u64, u32> = HashMap::with_capacity(keys.len());
        for (pair, key) in (0u32..).zip(keys) {
            let first = *first.entry(*key).or_insert(pair);
            let (a, b) = (leader(&mut leaders, first), leader(&mut leaders, pair));
            leaders[a.max(b) as usize] = a.min(b);
        }
    }
    (0u32..).take(query_keys.len()).map(|pair| leader(&mut leaders, pair)).collect()
}

/// What to do about pairs of equal query texts or equal document texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Duplicates {
    /// Batches are drawn as if all texts were different.
    Keep,
    /// No batch holds two pairs with equal query texts or equal document texts.
    #[default]
    Avoid,
}

/// Which pairs form which batch.
///
/// Each epoch is a shuffle of its own that follows from the seed and the number of the epoch alone: training that goes
/// on in the middle sees the batches it would have seen.
///
/// With [`Duplicates::Keep`] the shuffled pairs are cut into batches of `batch_size`; what remains at the end and is no
/// full batch is left out in this epoch.
///
/// With [`Duplicates::Avoid`] each of the shuffled pairs joins the first batch that has room and no equal text; that
/// opens a new one if need be. Then all batches that are not full are left out. Every pair is thus at most once in an
/// epoch, and fewer than `batch_size` are missing if no text is there twice. The more copies a text has, the more pairs
/// are missing, as there cannot be more pairs with it than batches; another epoch leaves out others. If no batch is
/// full, the epoch is its largest batch alone.
#[derive(Debug, Clone)]
pub struct Batches {
    pairs: u32,
    batch_size: usize,
    seed: u64,
    /// The texts that several pairs have, if these are to be kept apart.
    shared: Option<SharedTexts>,
}

/// For every pair the number of its query text and of its document text among those that several pairs have.
#[derive(Debug, Clone)]
struct SharedTexts {
    of_pairs: Vec<[Option<u32>; 2]>,
    count: usize,
}

impl Batches {
    /// Plans batches of `batch_size` pairs.
    ///
    /// # Errors
    /// [`Error::Setting`] if `batch_size` is 0, is more than there are pairs or, with [`Duplicates::Avoid`], is more
    /// than there are different queries or documents.
    pub fn new(pairs: &TokenisedPairs, batch_size: usize, seed: u64, duplicates: Duplicates) -> Result<Self> {
        Self::from_keys(&pairs.query_keys, &pairs.document_keys, batch_size, seed, duplicates)
    }

    fn from_keys(
        query_keys: &[u64],
        document_keys: &[u64],
        batch_size: usize,
        seed: u64,
        duplicates: Duplicates,
    ) -> Result<Self> {
        let refuse = |reason: String| Err(Error::setting("batch-size", reason));
        let pairs = query_keys.len();
        if batch_size == 0 {
            return refuse("0 pairs make no batch, expected at least 1".into());
        }
        if batch_size > pairs {
            return refuse(format!("{batch_size} is more than the {pairs} pairs there are"));
        }
        let shared = match duplicates {
            Duplicates::Keep => None,
            Duplicates::Avoid => {
                for (what, keys) in [("queries", query_keys), ("documents", document_keys)] {
                    let different = keys.iter().collect::<HashSet<_>>().len();
                    if batch_size > different {
                        return refuse(format!(
                            "{batch_size} is more than the {different} different {what} there are, and no batch is to \
                             hold one twice"
                        ));
                    }
                }
                Some(SharedTexts::new(query_keys, document_keys)).filter(|shared| shared.count > 0)
            }
        };
        let Ok(pairs) = u32::try_from(pairs) else {
            return Err(Error::value("Batches::new", "pairs", format!("are {pairs}, more than {}", u32::MAX)));
        };
        Ok(Self { pairs, batch_size, seed, shared })
    }

    /// How many pairs a batch has.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// How many batches every epoch has, where that is the same for all of them; `None` if it depends on the shuffle,
    /// because equal texts are to be kept apart and there are some. [`steps`](Self::steps) counts in either case.
    pub fn batches_per_epoch(&self) -> Option<usize> {
        self.shared.is_none().then_some(self.pairs as usize / self.batch_size)
    }

    /// How many batches the first `epochs` epochs have together. Takes as long as planning them all where
    /// [`batches_per_epoch`](Self::batches_per_epoch) is unknown.
    pub fn steps(&self, epochs: u64) -> u64 {
        match self.batches_per_epoch() {
            Some(batches) => epochs.saturating_mul(batches as u64),
            None => (0..epochs).map(|epoch| self.epoch(epoch).len() as u64).sum(),
        }
    }

    /// The batches of an epoch, each of them the indices of its pairs; at least one batch.
    pub fn epoch(&self, epoch: u64) -> Vec<Vec<u32>> {
        let mut order: Vec<u32> = (0..self.pairs).collect();
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(epoch);
        order.shuffle(&mut random);
        match &self.shared {
            None => order.chunks_exact(self.batch_size).map(<[u32]>::to_vec).collect(),
            Some(shared) => self.keep_apart(shared, &order),
        }
    }

    fn keep_apart(&self, shared: &SharedTexts, order: &[u32]) -> Vec<Vec<u32>> {
        let mut batches: Vec<Vec<u32>> = Vec::new();
        let mut first_with_room = 0;
        // Which batch has which text; and for every text a batch before which all have it or are full. The latter
        // saves a common text from going through all of its batches again and again.
        let mut taken: HashSet<(u32, usize)> = HashSet::new();
        let mut free_from: Vec<usize> = vec![0; shared.count];
        for pair in order {
            let texts = shared.of_pairs[*pair as usize];
            while batches.get(first_with_room).is_some_and(|batch| batch.len() >= self.batch_size) {
                first_with_room += 1;
            }
            let mut place = first_with_room;
            for text in texts.into_iter().flatten() {
                let free = &mut free_from[text as usize];
                *free = (*free).max(first_with_room);
                while taken.contains(&(text, *free)) {
                    *free += 1;
                }
                place = place.max(*free);
            }
            while batches.get(place).is_some_and(|batch| batch.len() >= self.batch_size)
                || texts.into_iter().flatten().any(|text| taken.contains(&(text, place)))
            {
                place += 1;
            }
            if place >= batches.len() {
                batches.resize_with(place + 1, Vec::new);
            }
            batches[place].push(*pair);
            taken.extend(texts.into_iter().flatten().map(|text| (text, place)));
        }
        if batches.iter().any(|batch| batch.len() == self.batch_size) {
            batches.retain(|batch| batch.len() == self.batch_size);
        } else if let Some(size) = batches.iter().map(Vec::len).max() {
            batches.retain(|batch| batch.len() == size);
            batches.truncate(1);
        }
        batches
    }
}

impl SharedTexts {
    fn new(query_keys: &[u64], document_keys: &[u64]) -> Self {
        let mut of_pairs = vec![[None; 2]; query_keys.len()];
        let mut count = 0;
        for (side, keys) in [query_keys, document_keys].into_iter().enumerate() {
            let mut copies: HashMap<u64, u32> = HashMap::with_capacity(keys.len());
            for key in keys {
                *copies.entry(*key).or_default() += 1;
            }
            let mut numbers: HashMap<u64, u32> = HashMap::new();
            for (texts, key) in of_pairs.iter_mut().zip(keys) {
                if copies.get(key).is_some_and(|copies| *copies > 1) {
                    texts[side] = Some(*numbers.entry(*key).or_insert_with(|| {
                        count += 1;
                        (count - 1) as u32
                    }));
                }
            }
        }
        Self { of_pairs, count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokenizer() -> Tokenizer {
        let texts = ["one two three four five six seven eight nine ten"; 2];
        Tokenizer::train(texts, 200).unwrap()
    }

    fn write(content: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs.jsonl");
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn line(query: &str, document: &str, negatives: &[&str]) -> String {
        format!("{}\n", serde_json::json!({"query": query, "document": document, "negatives": negatives}))
    }

    #[test]
    fn a_file_becomes_token_ids() {
        let tokenizer = tokenizer();
        let (_folder, path) = write(
            &[
                line("one two", "three four five six", &["seven", "eight"]),
                line("two", "one", &["three four five six", "nine ten", "ten"]),
            ]
            .concat(),
        );
        let mut seen = Vec::new();
        let pairs = TokenisedPairs::read(&path, &tokenizer, 3, 5, 2, &mut |pairs| seen.push(pairs)).unwrap();
        assert_eq!(seen, [2]);
        assert_eq!((pairs.len(), pairs.hard_negatives()), (2, 2));
        let encode = |text: &str, length| tokenizer.encode(text, length).unwrap();
        assert_eq!(pairs.query(0), encode("one", 9));
        assert_eq!(pairs.query(1), encode("two", 9));
        assert_eq!(pairs.document(0), encode("three four five", 9));
        assert_eq!(pairs.negative(0, 1), encode("eight", 9));
        assert_eq!(pairs.negative(1, 0), encode("three four five", 9));
        assert_eq!(pairs.negative(1, 1), encode("nine ten", 9));
        // A negative that is some pair's document carries that pair's group.
        assert_eq!(pairs.negative_id(1, 0), Some(0));
        assert_eq!(pairs.negative_id(1, 1), None);
        assert_eq!(pairs.ids(), [0, 1]);
    }

    #[test]
    fn progress_comes_with_every_chunk() {
        let content: String = (0..2500).map(|i| line(&format!("one {i}"), &format!("two {i}"), &[])).collect();
        let (_folder, path) = write(&content);
        let mut seen = Vec::new();
        let pairs = TokenisedPairs::read(&path, &tokenizer(), 8, 8, 0, &mut |pairs| seen.push(pairs)).unwrap();
        assert_eq!(seen, [1024, 2048, 2500]);
        assert_eq!(pairs.len(), 2500);
        assert_eq!(pairs.document(2400), tokenizer().encode("two 2400", 8).unwrap());
    }

    #[test]
    fn a_pair_with_too_few_negatives_is_named() {
        let (_folder, path) = write(&[line("one", "two", &["three", "four"]), line("one", "two", &["three"])].concat());
        let read = |hard_negatives| TokenisedPairs::read(&path, &tokenizer(), 8, 8, hard_negatives, &mut |_| ());
        assert_eq!(read(0).unwrap().hard_negatives(), 0);
        assert_eq!(read(1).unwrap().hard_negatives(), 1);
        let error = read(2).unwrap_err().to_string();
        assert!(error.contains("pairs.jsonl:2: the pair has 1 negatives, expected at least 2"), "{error}");
    }

    #[test]
    fn a_text_without_tokens_is_named() {
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": {"a": 0, "b": 1}, "merges": []
            }
        });
        let tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap();
        let read = |content: String| {
            let (_folder, path) = write(&content);
            TokenisedPairs::read(&path, &tokenizer, 8, 8, 2, &mut |_| ()).unwrap_err().to_string()
        };
        let good = line("a", "b", &["a", "b"]);
        let error = read(format!("{good}\n{}", line("a", "xyz", &["a", "b"])));
        assert!(error.contains("pairs.jsonl:3: the document comes to no token"), "{error}");
        let error = read(format!("{good}{good}{}", line("a", "b", &["a", "xyz"])));
        assert!(error.contains("pairs.jsonl:3: the negative comes to no token"), "{error}");
    }

    #[test]
    fn settings_and_files_without_sense_are_refused() {
        let (_folder, path) = write(&line("one", "two", &[]));
        let tokenizer = tokenizer();
        assert!(TokenisedPairs::read(&path, &tokenizer, 2, 8, 0, &mut |_| ()).is_err());
        assert!(TokenisedPairs::read(&path, &tokenizer, 8, 1, 0, &mut |_| ()).is_err());
        let (_folder, path) = write("");
        let error = TokenisedPairs::read(&path, &tokenizer, 8, 8, 0, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("holds no pair"), "{error}");
    }

    #[test]
    fn groups_reach_over_queries_and_documents() {
        // 0 and 2 share a query, 2 and 3 a document, 1 stands alone, 4 shares a document with 0.
        assert_eq!(groups(&[10, 11, 10, 13, 14], &[20, 21, 22, 22, 20]), [0, 1, 0, 0, 0]);
        // A query that equals a document is no link.
        assert_eq!(groups(&[1, 2], &[2, 3]), [0, 1]);
        assert!(groups(&[], &[]).is_empty());
    }

    #[test]
    fn batches_that_cannot_be_are_refused() {
        let new = |size, queries: &[u64], documents: &[u64], duplicates| {
            Batches::from_keys(queries, documents, size, 0, duplicates).map(|_| ()).map_err(|error| error.to_string())
        };
        let four = [1, 2, 3, 4];
        assert!(new(0, &four, &four, Duplicates::Keep).unwrap_err().contains("`batch-size`: 0"));
        let error = new(5, &four, &four, Duplicates::Keep).unwrap_err();
        assert!(error.contains("5 is more than the 4 pairs"), "{error}");
        let error = new(3, &four, &[1, 1, 2, 2], Duplicates::Avoid).unwrap_err();
        assert!(error.contains("3 is more than the 2 different documents"), "{error}");
        assert_eq!(new(3, &four, &[1, 1, 2, 2], Duplicates::Keep), Ok(()));
        assert_eq!(new(4, &four, &four, Duplicates::Avoid), Ok(()));
    }

    #[test]
    fn epochs_do_not_change_from_release_to_release() {
        // A checkpoint stores the seed and the epoch only; other batches after an update would go unnoticed.
        let keys: Vec<u64> = (0..6).collect();
        let batches = Batches::from_keys(&keys, &keys, 3, 42, Duplicates::Keep).unwrap();
        assert_eq!([batches.epoch(0), batches.epoch(1)], [[[2, 1, 5], [4, 3, 0]], [[0, 4, 5], [3, 2, 1]]]);
    }

    #[test]
    fn a_common_text_neither_fills_the_epoch_nor_takes_forever() {
        let queries: Vec<u64> = (0..20_000).collect();
        let documents: Vec<u64> = queries.iter().map(|query| if query % 2 == 0 { 0 } else { *query }).collect();
        let batches = Batches::from_keys(&queries, &documents, 32, 1, Duplicates::Avoid).unwrap();
        let epoch = batches.epoch(0);
        // 10,000 pairs of which each batch can hold any 31, beside one of the 10,000 that share a document.
        assert_eq!(epoch.len(), 10_000 / 31);
        let common = epoch.iter().flatten().filter(|pair| *pair % 2 == 0).count();
        assert_eq!(common, epoch.len());
    }

    #[test]
    fn without_a_full_batch_the_largest_one_remains() {
        // Three different queries and documents, but every pair has query 1 or document 1: no three fit together.
        let batches = Batches::from_keys(&[1, 1, 1, 2, 3], &[1, 2, 3, 1, 1], 3, 0, Duplicates::Avoid).unwrap();
        for epoch in 0..20 {
            let epoch = batches.epoch(epoch);
            assert_eq!(epoch.iter().map(Vec::len).collect::<Vec<_>>(), [2]);
        }
        assert_eq!((batches.batches_per_epoch(), batches.steps(20)), (None, 20));
    }

    fn keys() -> impl Strategy<Value = (Vec<u64>, Vec<u64>, usize)> {
        (1usize..120, 1u64..60).prop_flat_map(|(pairs, texts)| {
            let keys = || prop::collection::vec(0..texts, pairs);
            (keys(), keys(), 1..=pairs)
        })
    }

    proptest! {
        #[test]
        fn keeping_duplicates_every_epoch_is_a_shuffle_cut_into_batches(
            pairs in 1usize..200, size in 1usize..200, seed in any::<u64>(), epoch in any::<u64>(),
        ) {
            prop_assume!(size <= pairs);
            let keys = vec![7; pairs];
            let batches = Batches::from_keys(&keys, &keys, size, seed, Duplicates::Keep).unwrap();
            let plan = batches.epoch(epoch);
            prop_assert_eq!(Some(plan.len()), batches.batches_per_epoch());
            prop_assert_eq!(plan.len(), pairs / size);
            prop_assert!(plan.iter().all(|batch| batch.len() == size));
            let different: HashSet<u32> = plan.iter().flatten().copied().collect();
            prop_assert_eq!(different.len(), plan.len() * size);
            prop_assert!(different.iter().all(|pair| (*pair as usize) < pairs));
        }

        #[test]
        fn avoiding_duplicates_no_batch_holds_a_text_twice(
            (queries, documents, size) in keys(), seed in any::<u64>(), epoch in 0u64..1000,
        ) {
            let Ok(batches) = Batches::from_keys(&queries, &documents, size, seed, Duplicates::Avoid) else {
                let different = |keys: &[u64]| keys.iter().collect::<HashSet<_>>().len();
                prop_assert!(size > different(&queries).min(different(&documents)));
                return Ok(());
            };
            let plan = batches.epoch(epoch);
            prop_assert!(!plan.is_empty());
            prop_assert!(plan.len() == 1 || plan.iter().all(|batch| batch.len() == size));
            for batch in &plan {
                for keys in [&queries, &documents] {
                    let different: HashSet<u64> = batch.iter().map(|pair| keys[*pair as usize]).collect();
                    prop_assert_eq!(different.len(), batch.len());
                }
            }
            let placed: HashSet<u32> = plan.iter().flatten().copied().collect();
            prop_assert_eq!(placed.len(), plan.iter().map(Vec::len).sum::<usize>());
            prop_assert_eq!(batches.epoch(epoch), plan.clone());
            prop_assert_eq!(batches.steps(2), (batches.epoch(0).len() + batches.epoch(1).len()) as u64);
        }

        #[test]
        fn different_texts_are_planned_alike_with_and_without_duplicates(
            pairs in 1u64..200, size in 1usize..50, seed in any::<u64>(), epoch in any::<u64>(),
        ) {
            prop_assume!(size as u64 <= pairs);
            let keys: Vec<u64> = (0..pairs).collect();
            let keep = Batches::from_keys(&keys, &keys, size, seed, Duplicates::Keep).unwrap();
            let avoid = Batches::from_keys(&keys, &keys, size, seed, Duplicates::Avoid).unwrap();
            prop_assert_eq!(avoid.batches_per_epoch(), keep.batches_per_epoch());
            prop_assert_eq!(keep.epoch(epoch), avoid.epoch(epoch));
        }

        #[test]
        fn epochs_and_seeds_differ(seed in any::<u64>(), epoch in 0u64..u64::MAX) {
            let keys: Vec<u64> = (0..100).collect();
            let plan = |seed, epoch| Batches::from_keys(&keys, &keys, 10, seed, Duplicates::Avoid).unwrap().epoch(epoch);
            prop_assert_ne!(plan(seed, epoch), plan(seed, epoch + 1));
            prop_assert_ne!(plan(seed, epoch), plan(seed.wrapping_add(1), epoch));
        }

        #[test]
        fn groups_are_the_connected_parts((queries, documents, _) in keys()) {
            // The definition: grow groups until nothing changes any more.
            let mut expected: Vec<u32> = (0..queries.len() as u32).collect();
            loop {
                let before = expected.clone();
                for i in 0..queries.len() {
                    for j in 0..queries.len() {
                        if queries[i] == queries[j] || documents[i] == documents[j] {
                            expected[i] = expected[i].min(expected[j]);
                        }
                    }
                }
                if expected == before {
                    break;
                }
            }
            prop_assert_eq!(groups(&queries, &documents), expected);
        }
    }
}
