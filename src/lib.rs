//! nearfar: contrastive losses, computed fast and in little memory.
#![deny(missing_docs)]

pub mod error;

pub use error::{Error, Result};
