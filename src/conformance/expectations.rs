//! Rows that a driver is known to get wrong, through no fault of ours.

use super::Outcome;

/// A row that fails on a driver. That it holds one day is worth knowing, too, so then it is a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expectation {
    /// Part of the device's description: the adapter, its driver, or a version.
    pub device: &'static str,
    /// Part of the row's name.
    pub row: &'static str,
    /// What is wrong with the driver, and where that is reported.
    pub reason: &'static str,
}

/// All that is known.
pub const EXPECTED_FAILURES: &[Expectation] = &[];

/// What an outcome means, given what is known of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Everything is as it must be.
    Holds,
    /// It is not, and nobody knows why.
    Fails,
    /// It is not, for this reason.
    FailsAsExpected(&'static str),
    /// It is, though it was to fail for this reason.
    HoldsUnexpectedly(&'static str),
}

impl Verdict {
    /// What to make of the outcome of a row on a device of some description.
    pub fn of(description: &str, row: &str, outcome: &Outcome) -> Self {
        Self::given(EXPECTED_FAILURES, description, row, outcome.holds())
    }

    fn given(known: &[Expectation], description: &str, row: &str, holds: bool) -> Self {
        let expected = known.iter().find(|known| description.contains(known.device) && row.contains(known.row));
        match (expected, holds) {
            (None, true) => Self::Holds,
            (None, false) => Self::Fails,
            (Some(known), false) => Self::FailsAsExpected(known.reason),
            (Some(known), true) => Self::HoldsUnexpectedly(known.reason),
        }
    }

    /// Whether nothing is to be done about it.
    pub fn is_fine(self) -> bool {
        matches!(self, Self::Holds | Self::FailsAsExpected(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::cases;

    #[test]
    fn an_unexpected_outcome_is_not_fine() {
        let known = [Expectation { device: "llvmpipe (LLVM 15", row: "gelu/", reason: "tanh is wrong" }];
        let here = "llvmpipe (LLVM 15.0.6, 256 bits), Vulkan, Mesa 22.3.6";
        for (description, row, holds, expected) in [
            (here, "matmul+gelu/7x3x17/f32", false, Verdict::FailsAsExpected("tanh is wrong")),
            (here, "matmul+gelu/7x3x17/f32", true, Verdict::HoldsUnexpectedly("tanh is wrong")),
            (here, "matmul/7x3x17/f32", false, Verdict::Fails),
            ("llvmpipe (LLVM 16.0.1)", "matmul+gelu/7x3x17/f32", false, Verdict::Fails),
            ("llvmpipe (LLVM 16.0.1)", "matmul+gelu/7x3x17/f32", true, Verdict::Holds),
        ] {
            let verdict = Verdict::given(&known, description, row, holds);
            assert_eq!(verdict, expected);
            assert_eq!(verdict.is_fine(), matches!(expected, Verdict::Holds | Verdict::FailsAsExpected(_)));
        }
    }

    #[test]
    fn expectations_name_rows_that_exist_and_say_why() {
        let cases = cases();
        for Expectation { device, row, reason } in EXPECTED_FAILURES {
            assert!(cases.iter().any(|case| case.name().contains(row)), "{row}");
            assert!(!device.is_empty() && !reason.is_empty(), "{row}");
        }
    }
}
