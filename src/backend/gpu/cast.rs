//! Launches of `cast`.

use super::{Engine, Launch};
use crate::Result;
use crate::backend::operations::Cast;
use crate::error::DType;

/// Elements of a workgroup.
const GROUP: usize = 512;

pub(crate) fn forward(engine: &dyn Engine, arguments: Cast<'_>) -> Result<()> {
    let Cast { input, output } = arguments;
    let (from, to) = (input.dtype(), output.dtype());
    if from == to {
        let bytes = (input.elements() * from.size()).next_multiple_of(4);
        return if bytes == 0 { Ok(()) } else { engine.copy((input.buffer(), 0), (output.buffer(), 0), bytes) };
    }
    let words = |dtype: DType, elements: usize| (elements * dtype.size()).div_ceil(4);
    for part in engine.parts(input.elements(), 1) {
        // Parts begin at even elements.
        let words_of = |dtype| words(dtype, part.start)..words(dtype, part.end);
        engine.launch(
            Launch::new("cast", "forward")
                .flag("FROM_F32", from == DType::F32)
                .flag("FROM_F16", from == DType::F16)
                .flag("TO_F32", to == DType::F32)
                .flag("TO_F16", to == DType::F16)
                .read_part("input", input, words_of(from), "input_base")
                .write_part("output", &*output, words_of(to), "output_base")
                .size("count", part.len())
                .row_of_groups(part.len().div_ceil(GROUP)),
        )?;
    }
    Ok(())
}
