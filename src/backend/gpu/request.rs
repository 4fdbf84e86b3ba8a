//! Which device, and how it is opened: `wgpu`, `cuda:1`, `wgpu:0,checked`.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// A kind of devices, one of them by its number, and how it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Request<S> {
    pub(crate) kind: &'static str,
    pub(crate) index: usize,
    pub(crate) settings: S,
}

impl<S: Default + PartialEq + fmt::Display> fmt::Display for Request<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let comma = if self.settings == S::default() { "" } else { "," };
        write!(f, "{}:{}{comma}{}", self.kind, self.index, self.settings)
    }
}

impl<S: FromStr<Err = Error>> Request<S> {
    /// What a name asks for, if it is one of this kind.
    pub(crate) fn named(kind: &'static str, name: &str) -> Option<Result<Self>> {
        let (device, settings) = name.split_once(',').unwrap_or((name, ""));
        let index = match device.strip_prefix(kind)? {
            "" => 0,
            number => number.strip_prefix(':')?.parse().ok()?,
        };
        Some(settings.parse().map(|settings| Self { kind, index, settings }))
    }
}
