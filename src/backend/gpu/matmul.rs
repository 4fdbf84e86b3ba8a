//! Products of matrices, as operations ask for them. How one is computed is the engine's own.

use std::ops::Range;

use super::{Bindable, Engine};
use crate::Result;
use crate::backend::Tensor;
use crate::backend::operations::{Activation, MatMul};

/// A matrix that is part of a buffer.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    /// What it is part of.
    pub(crate) buffer: &'a dyn Bindable,
    /// Its first element.
    pub(crate) first: usize,
    /// Elements from row to row, as stored.
    pub(crate) stride: usize,
    /// Whether it is stored with its columns as rows.
    pub(crate) transposed: bool,
    /// What each row, as stored, is multiplied with: the factors from a place on.
    pub(crate) norms: Option<(&'a dyn Bindable, usize)>,
}

impl<'a> Operand<'a> {
    /// Of the elements (rows, columns) those of some rows and columns, in memory.
    pub(crate) fn range(&self, rows: &Range<usize>, columns: &Range<usize>) -> Range<usize> {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let first = self.first + rows.start * self.stride + columns.start;
        first..first + (rows.len().max(1) - 1) * self.stride + columns.len()
    }

    /// The norms of those rows or columns that are stored as rows.
    pub(crate) fn norms(
        &self,
        rows: &Range<usize>,
        columns: &Range<usize>,
    ) -> Option<(&'a dyn Bindable, Range<usize>)> {
        let stored = if self.transposed { columns } else { rows };
        self.norms.map(|(norms, first)| (norms, first + stored.start..first + stored.end))
    }
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    pub(crate) buffer: &'a dyn Bindable,
    pub(crate) first: usize,
    pub(crate) stride: usize,
    /// Add to what is there.
    pub(crate) accumulate: bool,
}

/// What happens to a product before it is written.
#[derive(Clone, Copy, Default)]
pub(crate) struct Finish<'a> {
    /// The product is multiplied with its exponential.
    pub(crate) log_scale: Option<&'a Tensor>,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) gelu: bool,
    /// Where the input of the activation goes.
    pub(crate) kept: Option<&'a Tensor>,
}

/// `output (+)= finish(op(a) · op(b))`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) a: Operand<'a>,
    pub(crate) b: Operand<'a>,
    /// (M, N, K)
    pub(crate) extents: (usize, usize, usize),
    pub(crate) output: Output<'a>,
    pub(crate) finish: Finish<'a>,
}

pub(crate) fn forward(engine: &dyn Engine, arguments: MatMul<'_>) -> Result<()> {
    let extents = arguments.extents();
    let MatMul { a, transpose_a, b, transpose_b, bias, activation, accumulate, output } = arguments;
    let stride = |rows: usize, columns: usize, transposed: bool| if transposed { rows } else { columns };
    let (m, n, k) = extents;
    let operand = |tensor, stride, transposed| Operand { buffer: tensor, first: 0, stride, transposed, norms: None };
    let (gelu, kept) = match activation {
        Activation::Identity => (false, None),
        Activation::Gelu { input } => (true, input),
    };
    engine.product(&Product {
        a: operand(a, stride(m, k, transpose_a), transpose_a),
        b: operand(b, stride(k, n, transpose_b), transpose_b),
        extents,
        output: Output { buffer: &*output, first: 0, stride: n, accumulate },
        finish: Finish { log_scale: None, bias, gelu, kept: kept.as_deref() },
    })
}
