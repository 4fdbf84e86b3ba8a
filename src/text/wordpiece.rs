//! Choosing a WordPiece vocabulary.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// What stands before every token that continues a word.
pub(super) const CONTINUATION: &str = "##";

/// A word of more characters is one unknown token, as BERT has it.
pub(super) const MAX_WORD_CHARACTERS: usize = 100;

/// A pair of tokens that occurs less often is not worth a token of its own.
const MIN_FREQUENCY: u64 = 2;

/// Chooses a vocabulary for words and their counts: `reserved` tokens, then single characters, then what byte-pair
/// merging builds from them, most frequent pair first.
///
/// The same words give the same vocabulary in the same order, whatever the order of `words`. The trainer that comes
/// with the `tokenizers` crate does not: it numbers the characters inside words in the order of a randomly seeded
/// hash map and breaks ties between equally frequent pairs by these numbers.
///
/// The result is the list of tokens in the order of their ids, at most `size` of them. Characters take at most half of
/// the room, so that a text with a huge alphabet still gets whole words; words with a character that found no room
/// have no part in it, as they will be unknown words anyway.
pub(super) fn vocabulary(words: Vec<(String, u64)>, reserved: &[&str], size: usize) -> Vec<String> {
    let mut words = words;
    words.retain(|(word, _)| !word.is_empty() && word.chars().count() <= MAX_WORD_CHARACTERS);
    words.sort_unstable();

    let mut tokens: Vec<String> = reserved.iter().map(|token| (*token).to_owned()).collect();
    let mut ids: HashMap<String, u32> = (0u32..).zip(&tokens).map(|(id, token)| (token.clone(), id)).collect();
    for symbol in alphabet(&words, size.saturating_sub(tokens.len()) / 2) {
        let token = symbol.token();
        if !ids.contains_key(&token) {
            ids.insert(token.clone(), tokens.len() as u32);
            tokens.push(token);
        }
    }

    let mut pieces: Vec<(Vec<u32>, u64)> = words
        .iter()
        .filter_map(|(word, count)| {
            let word: Option<Vec<u32>> = symbols(word).map(|symbol| ids.get(&symbol.token()).copied()).collect();
            Some((word?, *count))
        })
        .collect();

    // Invariant: for every pair the queue holds an entry that is at least its count, so the greatest entry that is
    // exact belongs to the most frequent pair. `places` may name words that have lost the pair since.
    let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
    let mut places: HashMap<(u32, u32), Vec<usize>> = HashMap::new();
    for (place, (word, count)) in pieces.iter().enumerate() {
        for pair in pairs_of(word) {
            *counts.entry(pair).or_default() += count;
            let places = places.entry(pair).or_default();
            if places.last() != Some(&place) {
                places.push(place);
            }
        }
    }
    let mut queue: BinaryHeap<(u64, Reverse<(u32, u32)>)> =
        counts.iter().map(|(pair, count)| (*count, Reverse(*pair))).collect();

    while tokens.len() < size {
        let Some((claimed, Reverse(pair))) = queue.pop() else { break };
        let count = counts.get(&pair).copied().unwrap_or(0);
        if count != claimed {
            if count >= MIN_FREQUENCY && count < claimed {
                queue.push((count, Reverse(pair)));
            }
            continue;
        }
        if count < MIN_FREQUENCY {
            break;
        }
        let merged = {
            let (left, right) = (&tokens[pair.0 as usize], &tokens[pair.1 as usize]);
            format!("{left}{}", right.strip_prefix(CONTINUATION).unwrap_or(right))
        };
        // Two different pairs can spell the same token.
        let id = *ids.entry(merged).or_insert_with_key(|merged| {
            tokens.push(merged.clone());
            (tokens.len() - 1) as u32
        });

        let mut grown: Vec<(u32, u32)> = Vec::new();
        for place in places.remove(&pair).unwrap_or_default() {
            let (word, frequency) = &mut pieces[place];
            let Some(after) = merge(word, pair, id) else { continue };
            for pair in pairs_of(word) {
                if let Some(count) = counts.get_mut(&pair) {
                    *count -= *frequency;
                }
            }
            for pair in pairs_of(&after) {
                *counts.entry(pair).or_default() += *frequency;
                if pair.0 == id || pair.1 == id {
                    grown.push(pair);
                    let places = places.entry(pair).or_default();
                    if places.last() != Some(&place) {
                        places.push(place);
                    }
                }
            }
            *word = after;
        }
        counts.remove(&pair);
        grown.sort_unstable();
        grown.dedup();
        queue.extend(grown.into_iter().filter_map(|pair| Some((*counts.get(&pair)?, Reverse(pair)))));
    }
    tokens
}

/// One character of a word. All initial characters sort before all continuing ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Symbol {
    continues: bool,
    character: char,
}

impl Symbol {
    fn token(self) -> String {
        let prefix = if self.continues { CONTINUATION } else { "" };
        format!("{prefix}{}", self.character)
    }
}

fn symbols(word: &str) -> impl Iterator<Item = Symbol> + '_ {
    word.chars().enumerate().map(|(i, character)| Symbol { continues: i > 0, character })
}

/// The `room` most frequent symbols, in their own order.
fn alphabet(words: &[(String, u64)], room: usize) -> Vec<Symbol> {
    let mut counts: HashMap<Symbol, u64> = HashMap::new();
    for (word, count) in words {
        for symbol in symbols(word) {
            *counts.entry(symbol).or_default() += count;
        }
    }
    let mut ranked: Vec<(Reverse<u64>, Symbol)> =
        counts.into_iter().map(|(symbol, count)| (Reverse(count), symbol)).collect();
    ranked.sort_unstable();
    ranked.truncate(room);
    let mut kept: Vec<Symbol> = ranked.into_iter().map(|(_, symbol)| symbol).collect();
    kept.sort_unstable();
    kept
}

fn pairs_of(word: &[u32]) -> impl Iterator<Item = (u32, u32)> + '_ {
    word.windows(2).map(|pair| (pair[0], pair[1]))
}

/// The word with every occurrence of the pair replaced, left to right; `None` if it has none.
fn merge(word: &[u32], pair: (u32, u32), id: u32) -> Option<Vec<u32>> {
    let mut after = Vec::with_capacity(word.len());
    let mut i = 0;
    while i < word.len() {
        if i + 1 < word.len() && (word[i], word[i + 1]) == pair {
            after.push(id);
            i += 2;
        } else {
            after.push(word[i]);
            i += 1;
        }
    }
    (after.len() < word.len()).then_some(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition itself: recount every pair of every word before every merge.
    fn by_recounting(mut words: Vec<(String, u64)>, reserved: &[&str], size: usize) -> Vec<String> {
        words.sort_unstable();
        let mut tokens: Vec<String> = reserved.iter().map(|token| token.to_string()).collect();
        tokens.extend(alphabet(&words, (size - reserved.len()) / 2).into_iter().map(Symbol::token));
        let id = |tokens: &[String], token: &str| tokens.iter().position(|other| other == token).map(|id| id as u32);
        let mut pieces: Vec<(Vec<u32>, u64)> = words
            .iter()
            .filter_map(|(word, count)| {
                Some((symbols(word).map(|symbol| id(&tokens, &symbol.token())).collect::<Option<_>>()?, *count))
            })
            .collect();
        while tokens.len() < size {
            let mut counts = std::collections::BTreeMap::<(u32, u32), u64>::new();
            for (word, count) in &pieces {
                pairs_of(word).for_each(|pair| *counts.entry(pair).or_default() += count);
            }
            let best = counts.into_iter().max_by_key(|(pair, count)| (*count, Reverse(*pair)));
            let Some((pair, count)) = best else { break };
            if count < MIN_FREQUENCY {
                break;
            }
            let merged =
                format!("{}{}", tokens[pair.0 as usize], tokens[pair.1 as usize].trim_start_matches(CONTINUATION));
            let merged_id = id(&tokens, &merged).unwrap_or_else(|| {
                tokens.push(merged);
                tokens.len() as u32 - 1
            });
            for (word, _) in &mut pieces {
                if let Some(after) = merge(word, pair, merged_id) {
                    *word = after;
                }
            }
        }
        tokens
    }

    proptest! {
        #[test]
        fn merging_with_a_queue_is_merging_by_recounting(
            words in prop::collection::btree_map("[abc]{1,8}", 1u64..20, 0..40),
            size in 4usize..60,
            seed in any::<u64>(),
        ) {
            let words: Vec<(String, u64)> = words.into_iter().collect();
            let expected = by_recounting(words.clone(), &["[PAD]", "[UNK]"], size);
            let mut shuffled = words;
            let turn = seed as usize % shuffled.len().max(1);
            shuffled.rotate_left(turn);
            prop_assert_eq!(vocabulary(shuffled, &["[PAD]", "[UNK]"], size), expected);
        }
    }

    #[test]
    fn frequent_words_become_tokens_and_long_ones_have_no_say() {
        let words = vec![("tensor".to_owned(), 50), ("x".repeat(101), 1_000), ("once".to_owned(), 1)];
        let tokens = vocabulary(words, &["[UNK]"], 60);
        assert!(tokens.contains(&"tensor".to_owned()));
        assert!(!tokens.iter().any(|token| token.contains('x')));
        assert!(!tokens.contains(&"once".to_owned()));
    }

    #[test]
    fn a_large_alphabet_leaves_room_for_merges() {
        let mut words: Vec<(String, u64)> =
            ('\u{4e00}'..'\u{4f00}').map(|character| (character.to_string(), 1)).collect();
        words.push(("sum".to_owned(), 9));
        let tokens = vocabulary(words, &["[UNK]"], 21);
        assert!(tokens.contains(&"sum".to_owned()), "{tokens:?}");
        assert!(tokens.len() <= 21);
    }
}
