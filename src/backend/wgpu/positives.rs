//! Launches of `shaders/positives.wgsl`.

use super::engine::{Engine, Launch};
use super::rows::{ROWS, elements_of};
use crate::Result;
use crate::backend::operations::{PositivesBackward, PositivesForward};

/// Rows of a workgroup where each is one number.
const GROUP: usize = 256;

pub(super) fn forward(engine: &Engine, arguments: PositivesForward<'_>) -> Result<()> {
    let PositivesForward { queries, documents, norms, similarity } = arguments;
    let (rows, width) = (queries.shape().rows(), queries.shape().width());
    for part in engine.parts(rows, width) {
        let mut launch = Launch::new("positives", "forward")
            .read_part("queries", queries, elements_of(&part, width), "queries_base")
            .read_part("documents", documents, elements_of(&part, width), "documents_base")
            .write("similarity", &*similarity)
            .size("count", part.len())
            .size("width", width)
            .size("first_row", part.start)
            .row_of_groups(part.len().div_ceil(ROWS));
        if let Some((of_queries, of_documents)) = norms {
            launch = launch.flag("NORMS", true).read("query_norms", of_queries).read("document_norms", of_documents);
        }
        engine.launch(launch)?;
    }
    Ok(())
}

pub(super) fn backward(engine: &Engine, arguments: PositivesBackward<'_>) -> Result<()> {
    let PositivesBackward {
        queries,
        documents,
        norms,
        log_scale,
        similarity,
        gradient,
        d_queries,
        d_documents,
        d_log_scale,
    } = arguments;
    let (rows, width) = (queries.shape().rows(), queries.shape().width());
    let sides = [
        (documents, norms.map(|(_, of_documents)| of_documents), &*d_queries),
        (queries, norms.map(|(of_queries, _)| of_queries), &*d_documents),
    ];
    for (input, norms, output) in sides {
        for part in engine.parts(rows, width) {
            engine.launch(
                Launch::new("positives", "backward")
                    .read_part("input", input, elements_of(&part, width), "input_base")
                    .read_if("NORMS", "norms", norms)
                    .read("log_scale", log_scale)
                    .read("gradient", gradient)
                    .write_part("output", output, elements_of(&part, width), "output_base")
                    .size("count", part.len())
                    .size("width", width)
                    .size("first_row", part.start)
                    .row_of_groups(part.len().div_ceil(ROWS)),
            )?;
        }
    }
    engine.launch(
        Launch::new("positives", "log_scale_gradient")
            .read("log_scale", log_scale)
            .read("gradient", gradient)
            .read("similarity", similarity)
            .write("output", &*d_log_scale)
            .size("count", rows)
            .row_of_groups(rows.div_ceil(GROUP)),
    )
}
