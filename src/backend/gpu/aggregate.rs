//! Launches of `aggregate`.

use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{AggregateRows, ROW_STATISTICS};
use crate::objective::Aggregate;

pub(crate) fn forward(engine: &dyn Engine, arguments: AggregateRows<'_>) -> Result<()> {
    let AggregateRows { statistics, row_weights, aggregate, weight, width_weights, upstream, loss } = arguments;
    let rows = statistics.elements() / (width_weights.len().max(1) * ROW_STATISTICS);
    let aggregate = match aggregate {
        Aggregate::Mean => 0,
        Aggregate::MeanOfEntries => 1,
        Aggregate::LogMeanExp => 2,
    };
    for (w, width_weight) in width_weights.iter().enumerate() {
        engine.launch(
            Launch::new("aggregate", "aggregate")
                .constant("AGGREGATE", aggregate)
                .read("statistics", statistics)
                .read_if("ROW_WEIGHTS", "row_weights", row_weights)
                .write("upstream", &*upstream)
                .write("loss", &*loss)
                .size("count", rows)
                .size("first", w * rows)
                .float("weight", weight * width_weight),
        )?;
    }
    Ok(())
}
