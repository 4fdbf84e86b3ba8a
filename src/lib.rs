//! nearfar: contrastive losses, computed fast and in little memory.
#![deny(missing_docs)]

pub mod autograd;
pub mod backend;
pub mod error;
#[cfg(feature = "train")]
pub mod evaluate;
#[cfg(feature = "train")]
pub mod files;
pub mod loss;
#[cfg(feature = "train")]
pub mod model;
pub mod nn;
#[cfg(feature = "train")]
pub mod npy;
pub mod objective;
#[cfg(feature = "train")]
pub mod report;
#[cfg(feature = "train")]
pub mod text;
#[cfg(feature = "train")]
pub mod train;

pub use backend::{Device, Tensor};
pub use error::{Error, Result};
pub use loss::Batch;
pub use objective::{Objective, Similarity};
