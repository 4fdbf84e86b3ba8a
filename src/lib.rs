//! nearfar trains retrieval encoders with contrastive losses: fused losses that never store a similarity matrix, a
//! small autograd tape, and a BERT-shaped dual encoder that trains end to end.
//!
//! # Should I be using this?
//!
//! * You have embeddings and want **a contrastive loss and its gradients**, fast and in little memory, from Rust: yes,
//!   with `default-features = false`. See [`Objective::forward_backward`].
//! * You want to **train a dual encoder** on pairs of texts from the command line: yes, see the `nearfar` program.
//! * You want a general tensor library: no. The tape knows the operations of an encoder and a loss, and no others.
//! * You want it on **any GPU**: yes, with the feature `wgpu`, which is a default one. See `backend::wgpu`, also for
//!   computing on buffers and in encoders of one's own.
//! * You want it on **NVIDIA GPUs**: yes, with the feature `cuda`, which is a default one. Building needs no CUDA. See
//!   `backend::cuda`, also for computing on memory and streams of one's own.
//!
//! # The floors
//!
//! Each module knows only those above it in this list.
//!
//! | module | what it holds |
//! |---|---|
//! | [`error`] | typed errors, shapes, element types |
//! | [`objective`] | what is optimised, as data; its definition in float64; the plan of sweeps that computes it |
//! | [`backend`] | devices, tensors, one method for each operation; the CPU, CUDA, wgpu |
//! | [`loss`] | runs an objective on a device |
//! | [`conformance`] | holds a device to the definition |
//! | [`autograd`] | the tape |
//! | [`nn`] | encoder, towers, optimizer, schedule |
//! | `files`, `npy`, `report` | atomic writing, arrays, curves and logs |
//! | `bench` | how fast the loss is, and whether it is right |
//! | `text` | pairs, tokenizer, batches |
//! | `model` | a model and its folder |
//! | `evaluate` | test collections, search, metrics |
//! | `train` | steps, gradient caching, checkpoints, the loop |
//!
//! # A loss
//!
//! ```
//! use nearfar::{Batch, Device, Objective};
//!
//! let device = Device::cpu();
//! let queries = device.tensor(&[1.0f32, 0.0, 0.0, 1.0], [2, 2])?;
//! let documents = device.tensor(&[0.9f32, 0.1, 0.2, 0.8], [2, 2])?;
//! let out = Objective::samtone().temperature(0.05)?.forward_backward(&device, Batch::new(&queries, &documents))?;
//! println!("{} {:?}", out.loss.to_scalar()?, out.d_queries.to_host::<f32>()?);
//! # Ok::<(), nearfar::Error>(())
//! ```
//!
//! # Features
//!
//! | feature | default | adds | costs |
//! |---|---|---|---|
//! | (none) | | objectives, losses, tape, encoder, optimizer on the CPU | gemm, rayon, bytemuck, half |
//! | `cuda` | yes | losses, encoder and training on NVIDIA GPUs | cudarc |
//! | `wgpu` | yes | losses, encoder and training on Vulkan, Metal and Direct3D 12 | wgpu |
//! | `train` | yes | texts, tokenizers, model folders, training, evaluation | tokenizers, safetensors, plotters, serde |
//! | `cli` | yes | the `nearfar` program | clap, indicatif |
#![deny(missing_docs)]

pub mod autograd;
pub mod backend;
#[cfg(feature = "train")]
pub mod bench;
pub mod conformance;
pub mod error;
#[cfg(feature = "train")]
pub mod evaluate;
#[cfg(feature = "train")]
pub mod files;
pub mod loss;
#[cfg(feature = "train")]
pub mod model;
mod named;
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

/// The crate that [`backend::cuda`] is built with, so that callers with a stream of their own use the same version.
#[cfg(feature = "cuda")]
pub use ::cudarc;
/// The crate that [`backend::wgpu`] is built with, so that callers with a device of their own use the same version.
#[cfg(feature = "wgpu")]
pub use ::wgpu;
pub use backend::{Device, Tensor};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use loss::Batch;
pub use loss::scores::ScoreBatch;
pub use objective::scores::ScoreObjective;
pub use objective::{Objective, Similarity};

/// The README's programs are tests.
#[cfg(all(doctest, feature = "train"))]
#[doc = include_str!("../README.md")]
struct Readme;
