//! nearfar: contrastive losses, computed fast and in little memory.
#![deny(missing_docs)]

pub mod backend;
pub mod error;
#[cfg(feature = "train")]
pub mod files;
pub mod objective;

pub use backend::{Device, Tensor};
pub use error::{Error, Result};
pub use objective::{Objective, Similarity};
