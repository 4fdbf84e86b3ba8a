//! Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//!
//! A counter and a key give four random words with no state in between, so an element's random number depends on
//! where the element is and not on who computes it or when. Every device gives the same stream, a backward pass
//! repeats the mask of its forward pass without storing it, and a resumed training repeats an uninterrupted one.

/// The four random words of a counter under a key.
#[inline(always)]
pub const fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut k0, mut k1] = key;
    let mut round = 0;
    while round < 10 {
        let first = 0xD251_1F53_u64 * a as u64;
        let second = 0xCD9E_8D57_u64 * c as u64;
        (a, b, c, d) = ((second >> 32) as u32 ^ b ^ k0, second as u32, (first >> 32) as u32 ^ d ^ k1, first as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
        round += 1;
    }
    [a, b, c, d]
}

/// A random number of (0, 1), from 23 bits of a random word.
#[inline(always)]
pub const fn uniform(word: u32) -> f32 {
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// Which elements of a matrix are dropped, and where in the random stream it stands.
///
/// A random word decides about two elements, 16 bits each: element (r, c) is dropped when half `c % 2` (the low one
/// first) of word `c % 8 / 2` of `philox([c / 8, row_offset + r, site, step], seed)` is below `probability · 2¹⁶`,
/// rounded. What is kept is scaled by the probability as it was rounded, so that means are kept exactly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// How likely an element is dropped, at least 0 and below 1.
    pub probability: f32,
    /// The key: one for a training.
    pub seed: u64,
    /// Which of the model's dropouts this is: no two of one step share a site.
    pub site: u32,
    /// The training step.
    pub step: u32,
    /// The row of the whole batch at which this matrix begins, so that a part of a batch gets the numbers that it
    /// gets as part of the whole.
    pub row_offset: u32,
}

impl Dropout {
    /// The key of the generator.
    pub fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Halves of random words below this drop their element.
    pub fn threshold(&self) -> u16 {
        (f64::from(self.probability) * 65_536.0).round().min(65_535.0) as u16
    }

    /// What the elements that stay are multiplied with.
    pub fn scale(&self) -> f32 {
        65_536.0 / (65_536.0 - f32::from(self.threshold()))
    }

    /// What element (row, column) is multiplied with: 0 or [`scale`](Self::scale). The definition; slow.
    pub fn factor(&self, row: u32, column: u32) -> f32 {
        let counter = [column / 8, self.row_offset.wrapping_add(row), self.site, self.step];
        let word = philox(counter, self.key())[column as usize % 8 / 2];
        let half = (word >> (16 * (column % 2))) as u16;
        if half < self.threshold() { 0.0 } else { self.scale() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with their implementation.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(counter, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn as_many_are_dropped_as_asked_for() {
        let dropout = Dropout { probability: 0.1, seed: 7, site: 3, step: 11, row_offset: 0 };
        let dropped = (0..100_000u32).filter(|i| dropout.factor(i / 250, i % 250) == 0.0).count();
        assert!((9_700..10_300).contains(&dropped), "{dropped}");
        let whole = dropout.factor(40, 9);
        assert_eq!(Dropout { row_offset: 30, ..dropout }.factor(10, 9), whole);
    }

    #[test]
    fn uniform_stays_inside() {
        assert!(uniform(0) > 0.0 && uniform(u32::MAX) < 1.0);
    }
}
