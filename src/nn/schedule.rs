//! The learning rate over the steps of a training.

use crate::named::named;

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// Not at all.
    Constant,
    /// In a straight line to zero.
    Linear,
    /// Along half a cosine to zero (arXiv 1608.03983, eq. 5).
    Cosine,
}

named!(Decay, "decay", Constant => "constant", Linear => "linear", Cosine => "cosine");

/// Warm-up in a straight line from zero, then decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The learning rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of the warm-up.
    pub warmup_steps: u64,
    /// Steps of the whole training.
    pub total_steps: u64,
    /// What comes after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// The learning rate of a step, counted from 1.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        // The first step after the warm-up has the peak, the last is one short of zero.
        let length = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = ((step - self.warmup_steps - 1) as f64 / length).min(1.0);
        self.peak
            * match self.decay {
                Decay::Constant => 1.0,
                Decay::Linear => 1.0 - done,
                Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let schedule = |decay| Schedule { peak: 2.0, warmup_steps: 4, total_steps: 12, decay };
        let rates = |decay| (1..=12).map(|step| schedule(decay).learning_rate(step)).collect::<Vec<_>>();
        assert_eq!(rates(Decay::Linear)[..6], [0.5, 1.0, 1.5, 2.0, 2.0, 1.75]);
        assert_eq!(rates(Decay::Linear)[11], 0.25);
        assert!(rates(Decay::Cosine).windows(2).skip(3).all(|pair| pair[1] <= pair[0]));
        assert!((rates(Decay::Cosine)[8] - 1.0).abs() < 1e-12);
        assert_eq!(rates(Decay::Constant)[11], 2.0);
        let immediate = Schedule { warmup_steps: 0, ..schedule(Decay::Linear) };
        assert_eq!(immediate.learning_rate(1), 2.0);
        assert_eq!(immediate.learning_rate(1000), 0.0);
    }
}
