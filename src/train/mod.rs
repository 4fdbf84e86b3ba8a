//! Training a dual encoder: settings, steps, checkpoints, the loop.
//!
//! Everything random is a function of the seed and of where it is used (which epoch, which step, which token), so a
//! training that is stopped and resumed makes the same steps as one that is not, bit for bit.

mod checkpoint;
mod run;
mod settings;
mod step;

pub use checkpoint::Checkpoint;
pub use run::{Event, Outcome, Watcher, resume, train};
pub use settings::{Length, TrainSettings};
pub use step::Trainer;
