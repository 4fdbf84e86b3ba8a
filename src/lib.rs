//! nearfar: contrastive losses, computed fast and in little memory.
#![deny(missing_docs)]

pub mod error;
#[cfg(feature = "train")]
pub mod files;
#[cfg(feature = "train")]
pub mod text;

pub use error::{Error, Result};
