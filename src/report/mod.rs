//! What a training run leaves for people and programs to look at: a drawing of the loss and a log of the metrics.

mod curve;
mod metrics_log;

pub use curve::loss_curve;
pub use metrics_log::MetricsLog;
