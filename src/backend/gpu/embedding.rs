//! Launches of `embedding`.

use super::reduce::column_sum_of;
use super::rows::{COLUMNS, ROWS, elements_of};
use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::{EmbeddingBackward, EmbeddingForward};
use crate::error::DType;

/// Rows that one invocation adds in their order, as the shader has it, and such runs of a workgroup.
const RUN: usize = 32;
const RUNS: usize = 8;

pub(crate) fn forward(engine: &dyn Engine, arguments: EmbeddingForward<'_>) -> Result<()> {
    let EmbeddingForward { tokens, positions, word, position, token_type, output } = arguments;
    let (rows, width) = (tokens.elements(), word.shape().width());
    for table in engine.parts(word.shape().rows(), width) {
        for part in engine.parts(rows, width) {
            engine.launch(
                Launch::new("embedding", "forward")
                    .read("tokens", tokens)
                    .read("positions", positions)
                    .read_part("word", word, elements_of(&table, width), "word_base")
                    .read("position", position)
                    .read("token_type", token_type)
                    .write_part("output", &*output, elements_of(&part, width), "output_base")
                    .size("first_row", part.start)
                    .size("count", part.len())
                    .size("width", width)
                    .size("first_token", table.start)
                    .size("table_rows", table.len())
                    .size("vocabulary", word.shape().rows())
                    .size("position_rows", position.shape().rows())
                    .row_of_groups(part.len().div_ceil(ROWS)),
            )?;
        }
    }
    Ok(())
}

pub(crate) fn backward(engine: &dyn Engine, arguments: EmbeddingBackward<'_>) -> Result<()> {
    let EmbeddingBackward { upstream, tokens, order, offsets, d_word, d_position, d_token_type } = arguments;
    let (rows, width) = (upstream.shape().rows(), upstream.shape().width());
    let (runs, columns) = (rows.div_ceil(RUN), width.div_ceil(COLUMNS));
    let (heads, tails) = (engine.scratch(runs * width, DType::F32)?, engine.scratch(runs * width, DType::F32)?);
    for part in engine.parts(rows, width) {
        for table in engine.parts(d_word.shape().rows(), width) {
            let launch = |entry| {
                Launch::new("embedding", entry)
                    .read("tokens", tokens)
                    .read("order", order)
                    .write_part("output", &*d_word, elements_of(&table, width), "d_word_base")
                    .size("first_row", part.start)
                    .size("count", part.len())
                    .size("rows", rows)
                    .size("width", width)
                    .size("columns", columns)
                    .size("first_token", table.start)
                    .size("table_rows", table.len())
            };
            engine.launch(
                launch("runs")
                    .read_part("upstream", upstream, elements_of(&part, width), "upstream_base")
                    .write("heads", &heads)
                    .write("tails", &tails)
                    .row_of_groups(runs.div_ceil(RUNS) * columns),
            )?;
            engine.launch(launch("joins").read("heads", &heads).read("tails", &tails).row_of_groups(runs * columns))?;
        }
        // No sequence is longer than the batch.
        let positions = d_position.shape().rows().min(rows);
        engine.launch(
            Launch::new("embedding", "positions")
                .read_part("upstream", upstream, elements_of(&part, width), "upstream_base")
                .read("offsets", offsets)
                .write("output", &*d_position)
                .size("first_row", part.start)
                .size("count", part.len())
                .size("width", width)
                .size("columns", columns)
                .size("sequences", offsets.elements().saturating_sub(1))
                .row_of_groups(positions * columns),
        )?;
    }
    // Every token is of type 0, the first row.
    column_sum_of(engine, upstream, rows, width, d_token_type, true)
}
