//! Encoders and how they learn: parameters, a BERT-shaped encoder, the two towers of a dual encoder, AdamW.

mod adamw;
mod dual_encoder;
mod encoder;
mod parameters;
mod schedule;

pub use adamw::{AdamW, AdamWSettings};
pub use dual_encoder::{DualEncoder, DualEncoderSettings, Tower, Towers};
pub use encoder::{Encoder, EncoderSettings, StepDropout};
pub use parameters::{Initial, Parameter, Parameters};
pub use schedule::{Decay, Schedule};
