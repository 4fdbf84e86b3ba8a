//! Launches of `positives`.

use super::rows::{ROWS, elements_of};
use super::{Bindable, Engine, Launch};
use crate::Result;
use crate::backend::Tensor;
use crate::backend::operations::{PositivesBackward, PositivesForward};

/// Rows of a workgroup where each is one number.
const GROUP: usize = 256;

/// `output[row] = a[row] · b[row]` of matrices of some rows and width, each row times its norm if there are norms.
pub(crate) fn row_products<T: Bindable + ?Sized>(
    engine: &dyn Engine,
    a: &Tensor,
    b: &Tensor,
    norms: Option<(&Tensor, &Tensor)>,
    (rows, width): (usize, usize),
    output: &T,
) -> Result<()> {
    for part in engine.parts(rows, width) {
        let mut launch = Launch::new("positives", "forward")
            .read_part("queries", a, elements_of(&part, width), "queries_base")
            .read_part("documents", b, elements_of(&part, width), "documents_base")
            .write("similarity", output)
            .size("count", part.len())
            .size("width", width)
            .size("first_row", part.start)
            .row_of_groups(part.len().div_ceil(ROWS));
        if let Some((of_a, of_b)) = norms {
            launch = launch.flag("NORMS", true).read("query_norms", of_a).read("document_norms", of_b);
        }
        engine.launch(launch)?;
    }
    Ok(())
}

pub(crate) fn forward(engine: &dyn Engine, arguments: PositivesForward<'_>) -> Result<()> {
    let PositivesForward { queries, documents, norms, similarity } = arguments;
    let size = (queries.shape().rows(), queries.shape().width());
    row_products(engine, queries, documents, norms, size, &*similarity)
}

pub(crate) fn backward(engine: &dyn Engine, arguments: PositivesBackward<'_>) -> Result<()> {
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
