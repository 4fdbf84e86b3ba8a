//! nearfar: contrastive losses, computed fast and in little memory.
#![deny(missing_docs)]

pub mod error;
#[cfg(feature = "train")]
pub mod evaluate;
#[cfg(feature = "train")]
pub mod files;
#[cfg(feature = "train")]
pub mod report;

pub use error::{Error, Result};
