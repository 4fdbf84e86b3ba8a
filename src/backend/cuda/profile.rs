//! How long each entry takes on the device, for devices that are opened with `profile`.
//!
//! Every launch is waited for then: what is measured is the launches, not how well they follow each other.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::driver::Gpu;
use crate::Result;
use crate::backend::Timing;

/// How often each entry ran, and for how many seconds.
#[derive(Debug, Default)]
pub(super) struct Profile {
    totals: Mutex<BTreeMap<String, (usize, f64)>>,
}

impl Profile {
    /// Adds how long something takes on the device.
    pub(super) fn time(&self, gpu: &Gpu, name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let (from, to) = (gpu.event(true)?, gpu.event(true)?);
        gpu.record(&from)?;
        run()?;
        gpu.record(&to)?;
        let seconds = gpu.seconds(&from, &to)?;
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let total = totals.entry(name.to_owned()).or_default();
        total.0 += 1;
        total.1 += seconds;
        Ok(())
    }

    /// What took how long so far, the longest first.
    pub(super) fn timings(&self) -> Vec<Timing> {
        Timing::longest_first(&self.totals.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
