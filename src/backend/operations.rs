//! What each operation takes: the contract between callers and backends.
//!
//! Matrices are row-major; a tensor of more than two extents counts as a matrix of its first extent by the product of
//! the others. `T` is the number of rows of a packed batch (all tokens of all its sequences, one after the other,
//! without padding), `S` the number of its sequences, `N` and `M` numbers of embeddings, `d` their width, `K` a number
//! of hard negatives.

pub use super::philox::Dropout;
use super::{Device, Tensor};
use crate::error::{DType, Shape};
use crate::named::named;
use crate::objective::scores::ScoreFunction;
use crate::objective::{Aggregate, Block, Candidates, Objective, Tower};
use crate::{Error, Result};

/// Checks the arguments of one operation.
#[derive(Debug)]
pub struct Checker<'a> {
    operation: &'static str,
    device: &'a Device,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(operation: &'static str, device: &'a Device) -> Self {
        Self { operation, device }
    }

    fn elements(&self, argument: &'static str, tensor: &Tensor, dtype: DType, elements: usize) -> Result<()> {
        if tensor.device() != self.device {
            return Err(Error::OtherDevice {
                operation: self.operation,
                argument,
                expected: self.device.name(),
                found: tensor.device().name(),
            });
        }
        if tensor.dtype() != dtype {
            return Err(Error::ElementType {
                operation: self.operation,
                argument,
                expected: dtype.to_string(),
                found: tensor.dtype().to_string(),
            });
        }
        if tensor.elements() != elements {
            return Err(self.shape(argument, [elements], tensor));
        }
        Ok(())
    }

    /// A tensor of a floating point type.
    fn float(&self, argument: &'static str, tensor: &Tensor) -> Result<()> {
        if tensor.dtype().is_float() {
            return Ok(());
        }
        Err(Error::ElementType {
            operation: self.operation,
            argument,
            expected: DType::FLOATS.into(),
            found: tensor.dtype().to_string(),
        })
    }

    fn shape(&self, argument: &'static str, expected: impl Into<Shape>, tensor: &Tensor) -> Error {
        Error::shape(self.operation, argument, expected, tensor.shape().clone())
    }

    /// A tensor that is read, as a matrix of a shape.
    pub(crate) fn input(
        &self,
        argument: &'static str,
        tensor: &Tensor,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<()> {
        let shape = shape.into();
        self.elements(argument, tensor, dtype, shape.elements()).map_err(|error| match error {
            Error::Shape { .. } => self.shape(argument, shape.clone(), tensor),
            other => other,
        })?;
        let matrix = |shape: &Shape| (shape.rows(), shape.width());
        if matrix(&shape) != matrix(tensor.shape()) {
            return Err(self.shape(argument, shape, tensor));
        }
        Ok(())
    }

    /// A tensor that is written.
    pub(crate) fn output(
        &self,
        argument: &'static str,
        tensor: &Tensor,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<()> {
        let shape = shape.into();
        if shape.extents().len() == 1 {
            self.elements(argument, tensor, dtype, shape.elements())?;
        } else {
            self.input(argument, tensor, dtype, shape)?;
        }
        if tensor.is_shared() {
            return Err(Error::Shared { operation: self.operation, argument });
        }
        Ok(())
    }

    fn require(&self, argument: &'static str, holds: bool, reason: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { Err(Error::value(self.operation, argument, reason())) }
    }

    fn dropout(&self, dropout: Option<Dropout>) -> Result<()> {
        let probability = dropout.map_or(0.0, |dropout| dropout.probability);
        self.require("dropout", (0.0..1.0).contains(&probability), || {
            format!("has probability {probability}; it must be at least 0 and below 1")
        })
    }
}

const F32: DType = DType::F32;
const U32: DType = DType::U32;

fn matrix(tensor: &Tensor) -> (usize, usize) {
    (tensor.shape().rows(), tensor.shape().width())
}

/// Arguments of [`Device::fill`].
#[derive(Debug)]
pub struct Fill<'a> {
    /// f32, any shape.
    pub output: &'a mut Tensor,
    /// What every element becomes.
    pub value: f32,
}

impl Fill<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.output("output", self.output, F32, [self.output.elements()])
    }
}

/// Arguments of [`Device::copy`].
#[derive(Debug)]
pub struct Copy<'a> {
    /// f32, any shape.
    pub input: &'a Tensor,
    /// The first element that is read.
    pub input_offset: usize,
    /// f32, any shape.
    pub output: &'a mut Tensor,
    /// The first element that is written.
    pub output_offset: usize,
    /// How many elements are copied.
    pub elements: usize,
    /// Add to what is there instead of replacing it.
    pub accumulate: bool,
}

impl Copy<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("output", self.output, F32, [self.output.elements()])?;
        let fits = |offset: usize, tensor: &Tensor| {
            offset.checked_add(self.elements).is_some_and(|end| end <= tensor.elements())
        };
        let reason = |offset: usize, tensor: &Tensor| {
            format!("has {} elements, not {} from {offset} on", tensor.elements(), self.elements)
        };
        c.require("input", fits(self.input_offset, self.input), || reason(self.input_offset, self.input))?;
        c.require("output", fits(self.output_offset, self.output), || reason(self.output_offset, self.output))
    }
}

/// Arguments of [`Device::cast`].
#[derive(Debug)]
pub struct Cast<'a> {
    /// f32, f16 or bf16, any shape.
    pub input: &'a Tensor,
    /// f32, f16 or bf16, the same shape; what it cannot hold becomes the nearest value that it can, of two that are
    /// equally near the even one, and beyond its range infinity.
    pub output: &'a mut Tensor,
}

impl Cast<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.float("input", self.input)?;
        c.float("output", self.output)?;
        c.elements("input", self.input, self.input.dtype(), self.input.elements())?;
        c.output("output", self.output, self.output.dtype(), self.input.shape().clone())
    }
}

/// Arguments of [`Device::add`].
#[derive(Debug)]
pub struct Add<'a> {
    /// f32, any shape.
    pub input: &'a Tensor,
    /// f32, the same shape; `input` is added to it.
    pub output: &'a mut Tensor,
}

impl Add<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("output", self.output, F32, self.input.shape().clone())
    }
}

/// Arguments of [`Device::scale`].
#[derive(Debug)]
pub struct Scale<'a> {
    /// f32, one element.
    pub factor: &'a Tensor,
    /// f32, any shape; multiplied in place.
    pub output: &'a mut Tensor,
}

impl Scale<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("factor", self.factor, F32, 1)?;
        c.output("output", self.output, F32, [self.output.elements()])
    }
}

/// Arguments of [`Device::sum`].
#[derive(Debug)]
pub struct Sum<'a> {
    /// f32, any shape.
    pub input: &'a Tensor,
    /// What the sum is multiplied with.
    pub factor: f32,
    /// f32, one element.
    pub output: &'a mut Tensor,
    /// Add to what is there instead of replacing it.
    pub accumulate: bool,
}

impl Sum<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("output", self.output, F32, [1])
    }
}

/// Arguments of [`Device::square_sum`].
#[derive(Debug)]
pub struct SquareSum<'a> {
    /// f32, any shape.
    pub input: &'a Tensor,
    /// f32, one element.
    pub output: &'a mut Tensor,
    /// Add to what is there instead of replacing it.
    pub accumulate: bool,
}

impl SquareSum<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("output", self.output, F32, [1])
    }
}

/// Arguments of [`Device::column_sum`].
#[derive(Debug)]
pub struct ColumnSum<'a> {
    /// f32 (R, C).
    pub input: &'a Tensor,
    /// f32 (C).
    pub output: &'a mut Tensor,
    /// Add to what is there instead of replacing it.
    pub accumulate: bool,
}

impl ColumnSum<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("output", self.output, F32, [self.input.shape().width()])
    }
}

/// What [`Device::matmul`] does with each element of the product, after the bias.
#[derive(Debug)]
pub enum Activation<'a> {
    /// Nothing.
    Identity,
    /// `gelu(x) = x · Φ(x)` with the exact (error function) Φ, as BERT has it (arXiv 1606.08415).
    Gelu {
        /// f32 (M, N): receives the elements before the activation, which the backward pass needs.
        input: Option<&'a mut Tensor>,
    },
}

/// Arguments of [`Device::matmul`]: `output = activation(op(a) · op(b) + bias)`.
#[derive(Debug)]
pub struct MatMul<'a> {
    /// f32 (M, K), or (K, M) if transposed.
    pub a: &'a Tensor,
    /// Whether `a` is stored as (K, M).
    pub transpose_a: bool,
    /// f32 (K, N), or (N, K) if transposed.
    pub b: &'a Tensor,
    /// Whether `b` is stored as (N, K).
    pub transpose_b: bool,
    /// f32 (N), added to each row.
    pub bias: Option<&'a Tensor>,
    /// Applied last.
    pub activation: Activation<'a>,
    /// Add to what is there instead of replacing it; only without bias and activation.
    pub accumulate: bool,
    /// f32 (M, N).
    pub output: &'a mut Tensor,
}

impl MatMul<'_> {
    /// (M, N, K)
    pub(crate) fn extents(&self) -> (usize, usize, usize) {
        let flip =
            |(rows, columns): (usize, usize), transpose| if transpose { (columns, rows) } else { (rows, columns) };
        let (m, k) = flip(matrix(self.a), self.transpose_a);
        let (_, n) = flip(matrix(self.b), self.transpose_b);
        (m, n, k)
    }

    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (m, n, k) = self.extents();
        c.elements("a", self.a, F32, m * k)?;
        c.input("b", self.b, F32, if self.transpose_b { [n, k] } else { [k, n] })?;
        if let Some(bias) = self.bias {
            c.elements("bias", bias, F32, n)?;
        }
        if let Activation::Gelu { input: Some(input) } = &self.activation {
            c.output("activation input", input, F32, [m, n])?;
        }
        let plain = self.bias.is_none() && matches!(self.activation, Activation::Identity);
        c.require("accumulate", plain || !self.accumulate, || "goes with neither bias nor activation".into())?;
        c.output("output", self.output, F32, [m, n])
    }
}

/// Arguments of [`Device::gelu_backward`].
#[derive(Debug)]
pub struct GeluBackward<'a> {
    /// f32, any shape: what the activation was applied to.
    pub input: &'a Tensor,
    /// f32, the same shape: the gradient of the output, which becomes the gradient of the input.
    pub gradient: &'a mut Tensor,
}

impl GeluBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("gradient", self.gradient, F32, self.input.shape().clone())
    }
}

/// Arguments of [`Device::dropout`].
#[derive(Debug)]
pub struct DropoutInPlace<'a> {
    /// Which elements are dropped.
    pub dropout: Dropout,
    /// f32 (R, C).
    pub output: &'a mut Tensor,
}

impl DropoutInPlace<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.dropout(Some(self.dropout))?;
        c.output("output", self.output, F32, [self.output.elements()])
    }
}

/// Arguments of [`Device::layer_norm_forward`] (arXiv 1607.06450), with the residual connection of a post-norm block:
///
/// ```text
/// x[r] = residual[r] + dropout(input[r]) ;  output[r] = (x[r] − mean) · rstd · gain + bias
/// ```
#[derive(Debug)]
pub struct LayerNormForward<'a> {
    /// f32 (R, C).
    pub input: &'a Tensor,
    /// f32 (R, C).
    pub residual: Option<&'a Tensor>,
    /// Applied to `input`.
    pub dropout: Option<Dropout>,
    /// f32 (C).
    pub gain: &'a Tensor,
    /// f32 (C).
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub epsilon: f32,
    /// f32 (R, C).
    pub output: &'a mut Tensor,
    /// f32 (R, C): receives `(x[r] − mean) · rstd`, which the backward pass needs.
    pub normalised: Option<&'a mut Tensor>,
    /// f32 (R): receives `rstd = 1 / √(variance + ε)`, which the backward pass needs.
    pub rstd: Option<&'a mut Tensor>,
}

impl LayerNormForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.input);
        c.elements("input", self.input, F32, rows * width)?;
        if let Some(residual) = self.residual {
            c.input("residual", residual, F32, [rows, width])?;
        }
        c.dropout(self.dropout)?;
        c.elements("gain", self.gain, F32, width)?;
        c.elements("bias", self.bias, F32, width)?;
        c.require("epsilon", self.epsilon >= 0.0, || format!("is {}", self.epsilon))?;
        if let Some(normalised) = &self.normalised {
            c.output("normalised", normalised, F32, [rows, width])?;
        }
        if let Some(rstd) = &self.rstd {
            c.output("rstd", rstd, F32, [rows])?;
        }
        c.output("output", self.output, F32, [rows, width])
    }
}

/// Arguments of [`Device::layer_norm_backward`].
#[derive(Debug)]
pub struct LayerNormBackward<'a> {
    /// f32 (R, C): the gradient of the output.
    pub upstream: &'a Tensor,
    /// f32 (R, C), from the forward pass.
    pub normalised: &'a Tensor,
    /// f32 (R), from the forward pass.
    pub rstd: &'a Tensor,
    /// f32 (C).
    pub gain: &'a Tensor,
    /// The forward pass's.
    pub dropout: Option<Dropout>,
    /// f32 (R, C): receives the gradient of `input`.
    pub d_input: &'a mut Tensor,
    /// f32 (R, C): receives the gradient of `residual`.
    pub d_residual: Option<&'a mut Tensor>,
    /// f32 (C): the gain's gradient is added to it.
    pub d_gain: &'a mut Tensor,
    /// f32 (C): the bias's gradient is added to it.
    pub d_bias: &'a mut Tensor,
}

impl LayerNormBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.upstream);
        c.elements("upstream", self.upstream, F32, rows * width)?;
        c.input("normalised", self.normalised, F32, [rows, width])?;
        c.elements("rstd", self.rstd, F32, rows)?;
        c.elements("gain", self.gain, F32, width)?;
        c.dropout(self.dropout)?;
        c.output("d_input", self.d_input, F32, [rows, width])?;
        if let Some(d_residual) = &self.d_residual {
            c.output("d_residual", d_residual, F32, [rows, width])?;
        }
        c.output("d_gain", self.d_gain, F32, [width])?;
        c.output("d_bias", self.d_bias, F32, [width])
    }
}

/// Arguments of [`Device::embedding_forward`].
#[derive(Debug)]
pub struct EmbeddingForward<'a> {
    /// u32 (T), each below V.
    pub tokens: &'a Tensor,
    /// u32 (T), each below P: the position of a token in its sequence.
    pub positions: &'a Tensor,
    /// f32 (V, C).
    pub word: &'a Tensor,
    /// f32 (P, C).
    pub position: &'a Tensor,
    /// f32 (Y, C); every token is of type 0.
    pub token_type: &'a Tensor,
    /// f32 (T, C).
    pub output: &'a mut Tensor,
}

impl EmbeddingForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = (self.tokens.elements(), self.word.shape().width());
        c.elements("tokens", self.tokens, U32, rows)?;
        c.elements("positions", self.positions, U32, rows)?;
        c.elements("word", self.word, F32, self.word.elements())?;
        c.input("position", self.position, F32, [self.position.shape().rows(), width])?;
        c.input("token_type", self.token_type, F32, [self.token_type.shape().rows(), width])?;
        c.require("token_type", self.token_type.elements() > 0, || "is empty".into())?;
        c.output("output", self.output, F32, [rows, width])
    }
}

/// Arguments of [`Device::embedding_backward`].
#[derive(Debug)]
pub struct EmbeddingBackward<'a> {
    /// f32 (T, C): the gradient of the output.
    pub upstream: &'a Tensor,
    /// u32 (T).
    pub tokens: &'a Tensor,
    /// u32 (T): the rows in an order in which equal tokens are neighbours, ascending by token, then by row. It makes
    /// the sums reproducible without atomics.
    pub order: &'a Tensor,
    /// u32 (S + 1): where each sequence begins, and T.
    pub offsets: &'a Tensor,
    /// f32 (V, C): the gradient is added to it.
    pub d_word: &'a mut Tensor,
    /// f32 (P, C): the gradient is added to it.
    pub d_position: &'a mut Tensor,
    /// f32 (Y, C): the gradient is added to row 0.
    pub d_token_type: &'a mut Tensor,
}

impl EmbeddingBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.upstream);
        c.elements("upstream", self.upstream, F32, rows * width)?;
        c.elements("tokens", self.tokens, U32, rows)?;
        c.elements("order", self.order, U32, rows)?;
        c.elements("offsets", self.offsets, U32, self.offsets.elements())?;
        c.output("d_word", self.d_word, F32, [self.d_word.shape().rows(), width])?;
        c.output("d_position", self.d_position, F32, [self.d_position.shape().rows(), width])?;
        c.output("d_token_type", self.d_token_type, F32, [self.d_token_type.shape().rows(), width])
    }
}

/// How attention looks at a packed batch.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape<'a> {
    /// u32 (S + 1): where each sequence begins, and T.
    pub offsets: &'a Tensor,
    /// The length of the longest sequence, below 65,536.
    pub longest: usize,
    /// The number of heads; divides C.
    pub heads: usize,
    /// Applied to the attention weights; row t of head h and key j is element (t, 65,536·h + j).
    pub dropout: Option<Dropout>,
}

impl AttentionShape<'_> {
    fn check(&self, c: &Checker<'_>, width: usize) -> Result<()> {
        c.elements("offsets", self.offsets, U32, self.offsets.elements())?;
        c.require("offsets", self.offsets.elements() > 0, || "is empty".into())?;
        c.require("longest", self.longest < 65_536, || format!("is {}; it must be below 65,536", self.longest))?;
        c.require("heads", self.heads > 0 && width.is_multiple_of(self.heads), || {
            format!("is {}, which does not divide the width {width}", self.heads)
        })?;
        c.dropout(self.dropout)
    }
}

/// Arguments of [`Device::attention_forward`] (arXiv 1706.03762, eq. 1), each sequence over itself:
///
/// ```text
/// weights = softmax(query · keyᵀ / √(C / heads)) ;  output = dropout(weights) · value
/// ```
#[derive(Debug)]
pub struct AttentionForward<'a> {
    /// f32 (T, 3·C): query, key and value of each token, each with its heads one after the other.
    pub query_key_value: &'a Tensor,
    /// Sequences, heads and dropout.
    pub shape: AttentionShape<'a>,
    /// f32 (T, C).
    pub output: &'a mut Tensor,
    /// f32 (T, heads): receives each softmax's log-sum-exp, which the backward pass needs.
    pub log_sum_exp: Option<&'a mut Tensor>,
}

impl AttentionForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.output);
        c.input("query_key_value", self.query_key_value, F32, [rows, 3 * width])?;
        self.shape.check(c, width)?;
        if let Some(log_sum_exp) = &self.log_sum_exp {
            c.output("log_sum_exp", log_sum_exp, F32, [rows, self.shape.heads])?;
        }
        c.output("output", self.output, F32, [rows, width])
    }
}

/// Arguments of [`Device::attention_backward`].
#[derive(Debug)]
pub struct AttentionBackward<'a> {
    /// f32 (T, C): the gradient of the output.
    pub upstream: &'a Tensor,
    /// f32 (T, 3·C), the forward pass's.
    pub query_key_value: &'a Tensor,
    /// f32 (T, C), from the forward pass.
    pub output: &'a Tensor,
    /// f32 (T, heads), from the forward pass.
    pub log_sum_exp: &'a Tensor,
    /// The forward pass's.
    pub shape: AttentionShape<'a>,
    /// f32 (T, 3·C): receives the gradient.
    pub d_query_key_value: &'a mut Tensor,
}

impl AttentionBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.upstream);
        c.elements("upstream", self.upstream, F32, rows * width)?;
        c.input("query_key_value", self.query_key_value, F32, [rows, 3 * width])?;
        c.input("output", self.output, F32, [rows, width])?;
        c.input("log_sum_exp", self.log_sum_exp, F32, [rows, self.shape.heads])?;
        self.shape.check(c, width)?;
        c.output("d_query_key_value", self.d_query_key_value, F32, [rows, 3 * width])
    }
}

/// How the rows of a sequence become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all rows.
    Mean,
    /// The first row, the one of the `[CLS]` token.
    Cls,
}

named!(Pooling, "pooling", Mean => "mean", Cls => "cls");

/// Arguments of [`Device::pooling_forward`].
#[derive(Debug)]
pub struct PoolingForward<'a> {
    /// f32 (T, C).
    pub input: &'a Tensor,
    /// u32 (S + 1): where each sequence begins, and T; no sequence is empty.
    pub offsets: &'a Tensor,
    /// How.
    pub pooling: Pooling,
    /// f32 (S, C).
    pub output: &'a mut Tensor,
}

impl PoolingForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (sequences, width) = matrix(self.output);
        c.input("input", self.input, F32, [self.input.shape().rows(), width])?;
        c.elements("offsets", self.offsets, U32, sequences + 1)?;
        c.output("output", self.output, F32, [sequences, width])
    }
}

/// Arguments of [`Device::pooling_backward`].
#[derive(Debug)]
pub struct PoolingBackward<'a> {
    /// f32 (S, C): the gradient of the output.
    pub upstream: &'a Tensor,
    /// u32 (S + 1), the forward pass's.
    pub offsets: &'a Tensor,
    /// The forward pass's.
    pub pooling: Pooling,
    /// f32 (T, C): receives the gradient.
    pub d_input: &'a mut Tensor,
}

impl PoolingBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (sequences, width) = matrix(self.upstream);
        c.elements("upstream", self.upstream, F32, sequences * width)?;
        c.elements("offsets", self.offsets, U32, sequences + 1)?;
        c.output("d_input", self.d_input, F32, [self.d_input.shape().rows(), width])
    }
}

/// Arguments of [`Device::l2_norm_forward`].
#[derive(Debug)]
pub struct L2NormForward<'a> {
    /// f32 (N, d).
    pub input: &'a Tensor,
    /// f32 (N, d): receives `input[r] / max(|input[r]|, 1e-12)`.
    pub output: &'a mut Tensor,
    /// f32 (N): receives `1 / max(|input[r]|, 1e-12)`.
    pub inverse_norm: &'a mut Tensor,
}

impl L2NormForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.input);
        c.elements("input", self.input, F32, rows * width)?;
        c.output("output", self.output, F32, [rows, width])?;
        c.output("inverse_norm", self.inverse_norm, F32, [rows])
    }
}

/// Arguments of [`Device::l2_norm_backward`]: `d_input = (upstream − output · (output · upstream)) · inverse_norm`.
#[derive(Debug)]
pub struct L2NormBackward<'a> {
    /// f32 (N, d): the gradient of the output.
    pub upstream: &'a Tensor,
    /// f32 (N, d), from the forward pass.
    pub output: &'a Tensor,
    /// f32 (N), from the forward pass.
    pub inverse_norm: &'a Tensor,
    /// f32 (N, d): receives the gradient.
    pub d_input: &'a mut Tensor,
}

impl L2NormBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.upstream);
        c.elements("upstream", self.upstream, F32, rows * width)?;
        c.input("output", self.output, F32, [rows, width])?;
        c.elements("inverse_norm", self.inverse_norm, F32, rows)?;
        c.output("d_input", self.d_input, F32, [rows, width])
    }
}

/// Arguments of [`Device::positives_forward`].
#[derive(Debug)]
pub struct PositivesForward<'a> {
    /// f32 (N, d).
    pub queries: &'a Tensor,
    /// f32 (N, d).
    pub documents: &'a Tensor,
    /// f32 (N) and f32 (N): what the products are multiplied with; nothing if not given.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    /// f32 (N): receives `queries[i] · documents[i]`, times the norms.
    pub similarity: &'a mut Tensor,
}

fn check_norms(c: &Checker<'_>, norms: Option<(&Tensor, &Tensor)>, rows: usize, columns: usize) -> Result<()> {
    let Some((of_rows, of_columns)) = norms else { return Ok(()) };
    c.elements("row norms", of_rows, F32, rows)?;
    c.elements("column norms", of_columns, F32, columns)
}

impl PositivesForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.queries);
        c.elements("queries", self.queries, F32, rows * width)?;
        c.input("documents", self.documents, F32, [rows, width])?;
        check_norms(c, self.norms, rows, rows)?;
        c.output("similarity", self.similarity, F32, [rows])
    }
}

/// Arguments of [`Device::positives_backward`]. With `σ = exp(log_scale)`, `g = gradient` and the embeddings times
/// their norms where there are any:
///
/// ```text
/// d_queries[i] += σ·g[i]·documents[i] ;  d_documents[i] += σ·g[i]·queries[i] ;  d_log_scale[i] += g[i]·σ·similarity[i]
/// ```
#[derive(Debug)]
pub struct PositivesBackward<'a> {
    /// f32 (N, d).
    pub queries: &'a Tensor,
    /// f32 (N, d).
    pub documents: &'a Tensor,
    /// f32 (N) and f32 (N), as in the forward pass.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    /// f32, one element.
    pub log_scale: &'a Tensor,
    /// f32 (N), from the forward pass.
    pub similarity: &'a Tensor,
    /// f32 (N): the gradient of each positive's logit.
    pub gradient: &'a Tensor,
    /// f32 (N, d).
    pub d_queries: &'a mut Tensor,
    /// f32 (N, d).
    pub d_documents: &'a mut Tensor,
    /// f32 (N).
    pub d_log_scale: &'a mut Tensor,
}

impl PositivesBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.queries);
        c.elements("queries", self.queries, F32, rows * width)?;
        c.input("documents", self.documents, F32, [rows, width])?;
        check_norms(c, self.norms, rows, rows)?;
        c.elements("log_scale", self.log_scale, F32, 1)?;
        c.elements("similarity", self.similarity, F32, rows)?;
        c.elements("gradient", self.gradient, F32, rows)?;
        c.output("d_queries", self.d_queries, F32, [rows, width])?;
        c.output("d_documents", self.d_documents, F32, [rows, width])?;
        c.output("d_log_scale", self.d_log_scale, F32, [rows])
    }
}

/// The similarities that a sweep visits, `z[r, c] = exp(log_scale) · rows[r] · columns[c]`, and those it leaves out.
#[derive(Debug, Clone, Copy)]
pub struct SimilarityMatrix<'a> {
    /// f32 (R, d).
    pub rows: &'a Tensor,
    /// f32 (C, d); none for a Gram: the rows against themselves, whose symmetric matrix is swept by half its tiles.
    pub columns: Option<&'a Tensor>,
    /// f32 (R) and f32 (C): what the rows and columns are multiplied with to be compared, the inverses of their
    /// lengths; nothing if not given. Similarities are then taken to be at most 1.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    /// f32, one element.
    pub log_scale: &'a Tensor,
    /// Leave out the entries with `c = r + offset`; of an offset of 0 in a Gram, always.
    pub diagonal: Option<isize>,
    /// u32 (R) and u32 (C): leave out the entries whose row and column key are equal.
    pub keys: Option<(&'a Tensor, &'a Tensor)>,
}

impl SimilarityMatrix<'_> {
    /// (R, C, d)
    pub(crate) fn extents(&self) -> (usize, usize, usize) {
        let (rows, width) = matrix(self.rows);
        (rows, self.columns.map_or(rows, |columns| columns.shape().rows()), width)
    }

    fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, columns, width) = self.extents();
        c.elements("rows", self.rows, F32, rows * width)?;
        if let Some(tensor) = self.columns {
            c.input("columns", tensor, F32, [columns, width])?;
        }
        check_norms(c, self.norms, rows, columns)?;
        c.elements("log_scale", self.log_scale, F32, 1)?;
        c.require("diagonal", self.diagonal == Some(0) || self.columns.is_some(), || {
            "of a Gram must be left out: it is no similarity of two embeddings".into()
        })?;
        if let Some((row_keys, column_keys)) = self.keys {
            c.elements("row keys", row_keys, U32, rows)?;
            c.elements("column keys", column_keys, U32, columns)?;
        }
        Ok(())
    }
}

/// The value a maximum has over no entries: finite, because infinities are not safe on every device.
pub const NO_ENTRY: f32 = f32::MIN;

/// How many numbers the statistics of a row are.
pub const STATISTICS: usize = 5;

/// Arguments of [`Device::similarity_sweep_forward`].
///
/// Statistics are f32 (R, 5) or (C, 5), over the entries that are not left out: a reference m near the largest logit
/// ([`NO_ENTRY`] if there is no entry), `Σ exp(z − m)`, `Σ exp(z − m)·z`, and if `sums` are wanted `Σ z` and the number
/// of entries, else 0 and 0. Statistics of parts of a row, such as shards of its columns, make those of the whole:
/// [`Device::merge_statistics`] merges them, and [`Device::partition`] those of several blocks.
#[derive(Debug)]
pub struct SimilaritySweepForward<'a> {
    /// What is swept.
    pub matrix: SimilarityMatrix<'a>,
    /// Whether the last two statistics are wanted.
    pub sums: bool,
    /// Receives the statistics of each row.
    pub row_statistics: Option<&'a mut Tensor>,
    /// Receives the statistics of each column; not for a Gram, whose columns are its rows.
    pub column_statistics: Option<&'a mut Tensor>,
    /// f32, of any size: room for what the backward pass would otherwise compute again. What a device keeps there is
    /// its own.
    pub kept: Option<&'a mut Tensor>,
}

impl SimilaritySweepForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        self.matrix.check(c)?;
        let (rows, columns, _) = self.matrix.extents();
        if let Some(statistics) = &self.row_statistics {
            c.output("row_statistics", statistics, F32, [rows, STATISTICS])?;
        }
        if let Some(statistics) = &self.column_statistics {
            c.require("column_statistics", self.matrix.columns.is_some(), || "cannot be had of a Gram".into())?;
            c.output("column_statistics", statistics, F32, [columns, STATISTICS])?;
        }
        if let Some(kept) = &self.kept {
            c.output("kept", kept, F32, [kept.elements()])?;
        }
        Ok(())
    }
}

/// Arguments of [`Device::similarity_sweep_backward`].
///
/// Coefficients are f32 (R, 4) or (C, 4), from [`Device::partition`]: log-sum-exp L, weight w, what is subtracted
/// from every entry by label smoothing s, and 0. With them, and the embeddings times their norms where there are any:
///
/// ```text
/// G[r, c] = w_r·exp(z − L_r) − s_r  +  w_c·exp(z − L_c) − s_c        (0 where left out; a Gram has both for its rows)
/// d_rows += σ·G·columns ;  d_columns += σ·Gᵀ·rows
/// ```
#[derive(Debug)]
pub struct SimilaritySweepBackward<'a> {
    /// What is swept.
    pub matrix: SimilarityMatrix<'a>,
    /// The coefficients of each row.
    pub row_coefficients: Option<&'a Tensor>,
    /// The coefficients of each column; not for a Gram.
    pub column_coefficients: Option<&'a Tensor>,
    /// What the forward pass over the same matrix has kept.
    pub kept: Option<&'a Tensor>,
    /// f32 (R, d): the gradient is added to it, if it is wanted.
    pub d_rows: Option<&'a mut Tensor>,
    /// f32 (C, d): the gradient is added to it, if it is wanted; not for a Gram.
    pub d_columns: Option<&'a mut Tensor>,
}

impl SimilaritySweepBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        self.matrix.check(c)?;
        let (rows, columns, width) = self.matrix.extents();
        let gram = self.matrix.columns.is_none();
        if let Some(coefficients) = self.row_coefficients {
            c.input("row_coefficients", coefficients, F32, [rows, 4])?;
        }
        if let Some(coefficients) = self.column_coefficients {
            c.require("column_coefficients", !gram, || "do not go with a Gram".into())?;
            c.input("column_coefficients", coefficients, F32, [columns, 4])?;
        }
        if let Some(kept) = self.kept {
            c.elements("kept", kept, F32, kept.elements())?;
        }
        if let Some(d_rows) = &self.d_rows {
            c.output("d_rows", d_rows, F32, [rows, width])?;
        }
        if let Some(d_columns) = &self.d_columns {
            c.require("d_columns", !gram, || "does not go with a Gram".into())?;
            c.output("d_columns", d_columns, F32, [columns, width])?;
        }
        Ok(())
    }
}

/// Arguments of [`Device::merge_statistics`]: the rule by which the statistics of parts of a row, such as shards of its
/// columns, make those of the whole (online softmax, arXiv 1805.02867, eq. 4). With m a part's reference and S, T, Σz,
/// K its sums:
///
/// ```text
/// m = max(m_a, m_b) ;  S = S_a·exp(m_a − m) + S_b·exp(m_b − m) ;  T likewise ;  Σz = Σz_a + Σz_b ;  K = K_a + K_b
/// ```
///
/// A part without entries ([`NO_ENTRY`]) adds nothing.
#[derive(Debug)]
pub struct MergeStatistics<'a> {
    /// f32 (N, 5), as [`SimilaritySweepForward`] gives it.
    pub part: &'a Tensor,
    /// f32 (N, 5): the statistics of other entries of the same rows; receives those of both.
    pub statistics: &'a mut Tensor,
}

impl MergeStatistics<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, _) = matrix(self.part);
        c.input("part", self.part, F32, [rows, STATISTICS])?;
        c.output("statistics", self.statistics, F32, [rows, STATISTICS])
    }
}

/// Arguments of [`Device::partition`].
///
/// With μ positives in the partition, S and T the second and third statistic of a block, ε the smoothing,
/// `z⁺ = exp(log_scale)·similarity − margin`, a = `average` and `w_i = weight·row_weights[i]`:
///
/// ```text
/// L = log( μ·exp z⁺ + Σ_blocks S·exp m ) ;  K = μ + number of entries
/// losses[i]      += w_i·( L − (1−ε)·z⁺ − ε/K·(μ·z⁺ + Σ z) )
/// gradient[i]    += a·w_i·( −(Σ_blocks S·exp(m − L)) + ε − μ·ε/K )    = a·w_i·(μ·p⁺ − (1−ε) − μ·ε/K), without cancelling
/// d_log_scale[i] += a·w_i·( Σ_blocks T·exp(m − L) − ε/K·Σ z )
/// coefficients[i] = ( L, a·w_i, a·w_i·ε/K, 0 )
/// ```
#[derive(Debug)]
pub struct Partition<'a> {
    /// Each f32 (N, 5): the statistics of each block, without the positive; at most 6 of them.
    pub statistics: &'a [&'a Tensor],
    /// f32 (N).
    pub similarity: &'a Tensor,
    /// f32, one element.
    pub log_scale: &'a Tensor,
    /// μ: how often the positive stands in the partition, 1 or 2.
    pub positives: usize,
    /// ε, at least 0 and below 1.
    pub label_smoothing: f32,
    /// What is subtracted from the positive's logit.
    pub margin: f32,
    /// The partition's weight.
    pub weight: f32,
    /// f32 (N): the weight of each row; 1 if not given.
    pub row_weights: Option<&'a Tensor>,
    /// What gradients are multiplied with over losses: 1/N for a mean.
    pub average: f32,
    /// f32 (N, 4): receives the coefficients.
    pub coefficients: &'a mut Tensor,
    /// f32 (N): the losses are added to it.
    pub losses: &'a mut Tensor,
    /// f32 (N): the gradient of each positive's logit is added to it.
    pub gradient: &'a mut Tensor,
    /// f32 (N): each row's part of the gradient is added to it, without that of its positive.
    pub d_log_scale: &'a mut Tensor,
}

impl Partition<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let rows = self.similarity.elements();
        c.require("statistics", self.statistics.len() <= 6, || {
            format!("are of {} blocks; there can be 6 at most", self.statistics.len())
        })?;
        for statistics in self.statistics {
            c.input("statistics", statistics, F32, [rows, STATISTICS])?;
        }
        c.elements("similarity", self.similarity, F32, rows)?;
        c.elements("log_scale", self.log_scale, F32, 1)?;
        if let Some(row_weights) = self.row_weights {
            c.elements("row_weights", row_weights, F32, rows)?;
        }
        c.output("coefficients", self.coefficients, F32, [rows, 4])?;
        c.output("losses", self.losses, F32, [rows])?;
        c.output("gradient", self.gradient, F32, [rows])?;
        c.output("d_log_scale", self.d_log_scale, F32, [rows])
    }
}

/// Arguments of [`Device::similarity_sweep_one_way`]: [`Device::similarity_sweep_forward`],
/// [`Device::partition`] and [`Device::similarity_sweep_backward`] in one pass, over rectangles whose entries stand in
/// the partition of their rows and nowhere else.
#[derive(Debug)]
pub struct SimilaritySweepOneWay<'a> {
    /// What is swept: rectangles with the same rows.
    pub matrices: &'a [SimilarityMatrix<'a>],
    /// The partition; its statistics are those of its other blocks. Without label smoothing.
    pub partition: Partition<'a>,
    /// f32 (R, d): the gradient is added to it.
    pub d_rows: &'a mut Tensor,
    /// Of each matrix f32 (C, d): the gradient is added to it.
    pub d_columns: Vec<&'a mut Tensor>,
}

impl SimilaritySweepOneWay<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        self.partition.check(c)?;
        let (rows, width) = matrix(self.d_rows);
        c.require("label_smoothing", self.partition.label_smoothing == 0.0, || "must be 0".into())?;
        c.require("d_columns", self.d_columns.len() == self.matrices.len(), || {
            format!("are {}, of {} matrices", self.d_columns.len(), self.matrices.len())
        })?;
        c.elements("similarity", self.partition.similarity, F32, rows)?;
        for (matrix, d_columns) in self.matrices.iter().zip(&self.d_columns) {
            matrix.check(c)?;
            c.require("matrices", matrix.columns.is_some(), || "must be rectangles".into())?;
            let (_, columns, _) = matrix.extents();
            c.input("rows", matrix.rows, F32, [rows, width])?;
            c.output("d_columns", d_columns, F32, [columns, width])?;
        }
        c.output("d_rows", self.d_rows, F32, [rows, width])
    }
}

/// How [`Device::adamw`] clips a gradient by the norm of all gradients together.
#[derive(Debug, Clone, Copy)]
pub struct Clip<'a> {
    /// f32, one element: the sum of the squares of all gradients.
    pub square_norm: &'a Tensor,
    /// The norm that gradients are scaled down to where theirs is larger.
    pub largest: f32,
}

/// Arguments of [`Device::adamw`] (arXiv 1711.05101, algorithm 2):
///
/// ```text
/// m = β₁·m + (1−β₁)·g ;  v = β₂·v + (1−β₂)·g²
/// p = p − rate·( (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε) + decay·p )
/// ```
#[derive(Debug)]
pub struct AdamW<'a> {
    /// p: f32, any shape.
    pub parameter: &'a mut Tensor,
    /// g: f32, the same shape.
    pub gradient: &'a Tensor,
    /// m: f32, the same shape.
    pub first_moment: &'a mut Tensor,
    /// v: f32, the same shape.
    pub second_moment: &'a mut Tensor,
    /// If given, g is scaled down first.
    pub clip: Option<Clip<'a>>,
    /// The learning rate of this step.
    pub learning_rate: f32,
    /// (β₁, β₂)
    pub betas: (f32, f32),
    /// ε
    pub epsilon: f32,
    /// The decoupled weight decay.
    pub weight_decay: f32,
    /// No element gets larger than this; infinity for no limit.
    pub largest: f32,
    /// t: the step, counted from 1.
    pub step: u64,
}

impl AdamW<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let shape = self.parameter.shape();
        c.output("parameter", self.parameter, F32, shape.clone())?;
        c.input("gradient", self.gradient, F32, shape.clone())?;
        c.output("first_moment", self.first_moment, F32, shape.clone())?;
        c.output("second_moment", self.second_moment, F32, shape.clone())?;
        c.require("step", self.step > 0, || "is 0; steps are counted from 1".into())?;
        match self.clip {
            Some(clip) => c.elements("square_norm", clip.square_norm, F32, 1),
            None => Ok(()),
        }
    }
}

/// Arguments of [`Device::l2_norm_gradient`]: [`Device::l2_norm_backward`] in place, from the input.
///
/// ```text
/// i = 1 / |input[r]| ;  gradient[r] = i · ( gradient[r] − input[r] · i² · (input[r] · gradient[r]) )
/// ```
#[derive(Debug)]
pub struct L2NormGradient<'a> {
    /// f32 (R, d).
    pub input: &'a Tensor,
    /// f32 (R, d).
    pub gradient: &'a mut Tensor,
}

impl L2NormGradient<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.input);
        c.elements("input", self.input, F32, rows * width)?;
        c.output("gradient", self.gradient, F32, [rows, width])
    }
}

/// What [`Device::prefix_norms_forward`] computes of each prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixNorm {
    /// `1 / |x|`
    Inverse,
    /// `|x|² / 2`
    HalfSquare,
}

/// Arguments of [`Device::prefix_norms_forward`].
#[derive(Debug)]
pub struct PrefixNormsForward<'a> {
    /// f32 (R, d).
    pub input: &'a Tensor,
    /// W widths, rising, at most d.
    pub widths: &'a [usize],
    /// What to compute.
    pub norm: PrefixNorm,
    /// f32 (W, R): receives it for the first `width` values of each row.
    pub output: &'a mut Tensor,
}

/// Checks widths of prefixes.
fn check_widths(c: &Checker<'_>, widths: &[usize], width: usize) -> Result<()> {
    let rise = widths.first().is_none_or(|&first| first > 0) && widths.is_sorted_by(|a, b| a < b);
    c.require("widths", rise && widths.last().is_some_and(|&last| last <= width), || {
        format!("are {widths:?}; they must rise from above 0 to at most {width}")
    })
}

impl PrefixNormsForward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.input);
        c.elements("input", self.input, F32, rows * width)?;
        check_widths(c, self.widths, width)?;
        c.output("output", self.output, F32, [self.widths.len(), rows])
    }
}

/// Arguments of [`Device::prefix_norms_backward`].
///
/// ```text
/// d_input[r, c] −= input[r, c] · Σ_{w: c < widths[w]} along[w, r] · inverse_norms[w, r]²       (1 where there are none)
/// ```
#[derive(Debug)]
pub struct PrefixNormsBackward<'a> {
    /// f32 (R, d).
    pub input: &'a Tensor,
    /// W widths, rising, at most d.
    pub widths: &'a [usize],
    /// f32 (W, R): how much of each row's gradient is along the row, from [`Device::row_sweep`].
    pub along: &'a Tensor,
    /// f32 (W, R), from the forward pass with [`PrefixNorm::Inverse`].
    pub inverse_norms: Option<&'a Tensor>,
    /// f32 (R, d).
    pub d_input: &'a mut Tensor,
}

impl PrefixNormsBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.input);
        c.elements("input", self.input, F32, rows * width)?;
        check_widths(c, self.widths, width)?;
        c.input("along", self.along, F32, [self.widths.len(), rows])?;
        if let Some(inverse_norms) = self.inverse_norms {
            c.input("inverse_norms", inverse_norms, F32, [self.widths.len(), rows])?;
        }
        c.output("d_input", self.d_input, F32, [rows, width])
    }
}

/// Arguments of [`Device::column`].
#[derive(Debug)]
pub struct Column<'a> {
    /// f32 (R, C).
    pub input: &'a Tensor,
    /// The first row that is read.
    pub first_row: usize,
    /// Which column.
    pub column: usize,
    /// f32 (N): receives it, of N rows.
    pub output: &'a mut Tensor,
}

impl Column<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let (rows, width) = matrix(self.input);
        c.elements("input", self.input, F32, rows * width)?;
        c.require("column", self.column < width, || format!("is {}; there are {width}", self.column))?;
        c.output("output", self.output, F32, [self.output.elements()])?;
        let count = self.output.elements();
        c.require("first_row", self.first_row.checked_add(count).is_some_and(|end| end <= rows), || {
            format!("is {}, but from there {count} rows do not fit into {rows}", self.first_row)
        })
    }
}

/// Arguments of [`Device::clamp`].
#[derive(Debug)]
pub struct Clamp<'a> {
    /// f32.
    pub input: &'a Tensor,
    /// The largest value let through.
    pub largest: f32,
    /// f32, of the input's shape: receives `min(input, largest)`.
    pub output: &'a mut Tensor,
}

impl Clamp<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("output", self.output, F32, self.input.shape().clone())
    }
}

/// Arguments of [`Device::clamp_backward`].
#[derive(Debug)]
pub struct ClampBackward<'a> {
    /// f32, the input of [`Device::clamp`].
    pub input: &'a Tensor,
    /// The largest value let through.
    pub largest: f32,
    /// f32, of the input's shape: is set to 0 where the input was above.
    pub gradient: &'a mut Tensor,
}

impl ClampBackward<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.elements("input", self.input, F32, self.input.elements())?;
        c.output("gradient", self.gradient, F32, self.input.shape().clone())
    }
}

/// One kind of embeddings in a row sweep.
#[derive(Debug)]
pub struct RowSweepSide<'a> {
    /// f32 (n, d).
    pub embeddings: &'a Tensor,
    /// f32 (W, n): what the prefixes of each width are multiplied with to be compared, the inverses of their lengths;
    /// nothing if not given.
    pub inverse_norms: Option<&'a Tensor>,
    /// f32 (W, n): what is subtracted from dot products at each width; nothing if not given.
    pub half_squares: Option<&'a Tensor>,
    /// f32 (n, g): a guide's embeddings of the same, of length 1.
    pub guide: Option<&'a Tensor>,
    /// f32 (n, d): the gradient is added to it; none is wanted if it is not given. At the full width alone, with norms, it
    /// is that of the embeddings times their norms, for [`Device::l2_norm_gradient`].
    pub gradient: Option<&'a mut Tensor>,
    /// f32 (W, n): what [`PrefixNormsBackward::along`] needs is added to it. There if and only if there is a gradient,
    /// and half squares or norms of prefixes.
    pub along: Option<&'a mut Tensor>,
}

/// Listed positives on a device.
#[derive(Debug, Clone, Copy)]
pub struct PositiveTensors<'a> {
    /// u32 (N + 1).
    pub offsets: &'a Tensor,
    /// u32 (T).
    pub candidates: &'a Tensor,
    /// f32 (T); 1 if not given.
    pub weights: Option<&'a Tensor>,
}

/// A pair whose segment is this one is padding.
pub const PADDING: u32 = u32::MAX;

/// What a row's statistics are, in their order.
pub const ROW_STATISTICS: usize = 8;

/// Arguments of [`Device::row_sweep`]: one partition of an objective, each row with all its entries at hand.
///
/// Sides are in the order queries, documents, hard negatives, hard queries, bank. Each row's statistics are: its loss
/// f, the log-sum-exp of its logits ([`NO_ENTRY`] without entries), the number of its entries, that of its negatives,
/// its largest positive logit and its largest negative one ([`NO_ENTRY`] without any), the rank of the former among
/// the negatives (1 is first; 0 without a positive), and 0.
#[derive(Debug)]
pub struct RowSweep<'a> {
    /// What is computed.
    pub objective: &'a Objective,
    /// Which of its partitions.
    pub partition: usize,
    /// The embeddings; candidates that are missing have no entries. Anchors have N rows.
    pub sides: [Option<RowSweepSide<'a>>; 5],
    /// W widths at which the rows are computed, with the weight of each; one, with weight 1, for the full width.
    pub widths: &'a [(usize, f32)],
    /// f32, one element.
    pub log_scale: &'a Tensor,
    /// f32, one element; 0 if not given.
    pub bias: Option<&'a Tensor>,
    /// u32 (N): negatives of equal ids are masked.
    pub ids: Option<&'a Tensor>,
    /// u32 (N), for [`Positives::Labels`](crate::objective::Positives::Labels).
    pub labels: Option<&'a Tensor>,
    /// u32 (N): entries of different segments are masked; [`PADDING`] is in none.
    pub segments: Option<&'a Tensor>,
    /// u32 (N + 1): where each pair's hard negatives begin.
    pub hard_negative_offsets: Option<&'a Tensor>,
    /// u32 (N + 1): where each pair's hard queries begin.
    pub hard_query_offsets: Option<&'a Tensor>,
    /// The largest number of hard negatives that one pair has, so that nobody has to read the offsets for it.
    pub most_hard_negatives: usize,
    /// The largest number of hard queries that one pair has.
    pub most_hard_queries: usize,
    /// For [`Positives::Listed`](crate::objective::Positives::Listed).
    pub positives: Option<PositiveTensors<'a>>,
    /// f32 (N, C), for [`Target::Scores`](crate::objective::Target::Scores).
    pub scores: Option<&'a Tensor>,
    /// f32 (N): what each row's loss and gradient are multiplied with; 1 if not given.
    pub row_weights: Option<&'a Tensor>,
    /// f32 (W, N): what each row's gradient is multiplied with instead of its weight, from [`Device::aggregate`].
    pub upstream: Option<&'a Tensor>,
    /// What gradients are multiplied with over losses: 1/N for a mean.
    pub average: f32,
    /// f32 (N): each row's loss times its weights is added to it.
    pub losses: Option<&'a mut Tensor>,
    /// f32 (W, N, 8): receives each row's statistics.
    pub statistics: Option<&'a mut Tensor>,
    /// f32 (N): each row's part of the gradient is added to it. There if and only if gradients are wanted.
    pub d_log_scale: Option<&'a mut Tensor>,
    /// f32 (N): each row's part of the gradient of the bias is added to it.
    pub d_bias: Option<&'a mut Tensor>,
}

/// The place of a kind of candidates among the sides of a row sweep.
pub fn side_of(candidates: Candidates) -> usize {
    match candidates {
        Candidates::Queries => 0,
        Candidates::Documents => 1,
        Candidates::HardNegatives => 2,
        Candidates::HardQueries => 3,
        Candidates::Bank => 4,
    }
}

/// The place of a tower among the sides of a row sweep.
pub fn side_of_tower(tower: Tower) -> usize {
    match tower {
        Tower::Query => 0,
        Tower::Document => 1,
    }
}

impl RowSweep<'_> {
    /// Whether rows are computed at other widths than the full one.
    pub(crate) fn is_nested(&self) -> bool {
        let width = self.sides.iter().flatten().next().map_or(0, |side| side.embeddings.shape().width());
        !matches!(self.widths, [(only, _)] if *only == width)
    }

    /// N
    pub(crate) fn rows(&self) -> usize {
        let anchor = |block: &Block| self.sides[side_of_tower(block.anchor)].as_ref();
        let partition = &self.objective.partitions()[self.partition];
        partition.blocks.first().and_then(anchor).map_or(0, |side| side.embeddings.shape().rows())
    }

    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        c.require("partition", self.partition < self.objective.partitions().len(), || {
            format!("is {}; the objective has {}", self.partition, self.objective.partitions().len())
        })?;
        let blocks = &self.objective.partitions()[self.partition].blocks;
        for side in blocks.iter().map(|block| side_of_tower(block.anchor)) {
            c.require("sides", self.sides[side].is_some(), || format!("lack side {side}, which has anchors"))?;
        }
        let rows = self.rows();
        let width = self.sides.iter().flatten().next().map_or(0, |side| side.embeddings.shape().width());
        let widths: Vec<usize> = self.widths.iter().map(|&(width, _)| width).collect();
        check_widths(c, &widths, width)?;
        for (s, side) in self.sides.iter().enumerate() {
            let Some(side) = side else { continue };
            let (n, _) = matrix(side.embeddings);
            c.input("embeddings", side.embeddings, F32, [n, width])?;
            let anchors = blocks.iter().any(|block| side_of_tower(block.anchor) == s);
            c.require("embeddings", !anchors || n == rows, || format!("of side {s} have {n} rows, not {rows}"))?;
            for (name, norms) in [("inverse_norms", side.inverse_norms), ("half_squares", side.half_squares)] {
                if let Some(norms) = norms {
                    c.input(name, norms, F32, [widths.len(), n])?;
                }
            }
            if let Some(guide) = side.guide {
                c.elements("guide", guide, F32, n * guide.shape().width())?;
            }
            if let Some(gradient) = &side.gradient {
                c.output("gradient", gradient, F32, [n, width])?;
            }
            let norms = (side.inverse_norms.is_some() && self.is_nested()) || side.half_squares.is_some();
            let wanted = norms && side.gradient.is_some();
            c.require("along", side.along.is_some() == wanted, || "goes with norms and a gradient".into())?;
            if let Some(along) = &side.along {
                c.output("along", along, F32, [widths.len(), n])?;
            }
        }
        c.elements("log_scale", self.log_scale, F32, 1)?;
        if let Some(bias) = self.bias {
            c.elements("bias", bias, F32, 1)?;
        }
        for (name, tensor) in [("ids", self.ids), ("labels", self.labels), ("segments", self.segments)] {
            if let Some(tensor) = tensor {
                c.elements(name, tensor, U32, rows)?;
            }
        }
        for (name, tensor) in
            [("hard_negative_offsets", self.hard_negative_offsets), ("hard_query_offsets", self.hard_query_offsets)]
        {
            if let Some(tensor) = tensor {
                c.elements(name, tensor, U32, rows + 1)?;
            }
        }
        for (side, name, tensor) in [
            (2, "hard_negative_offsets", self.hard_negative_offsets),
            (3, "hard_query_offsets", self.hard_query_offsets),
        ] {
            let named = self.sides[side].is_some() && blocks.iter().any(|block| side_of(block.candidates) == side);
            c.require(name, !named || tensor.is_some(), || "are missing".into())?;
        }
        if let Some(positives) = self.positives {
            let count = positives.candidates.elements();
            c.elements("positive offsets", positives.offsets, U32, rows + 1)?;
            c.elements("positive candidates", positives.candidates, U32, count)?;
            if let Some(weights) = positives.weights {
                c.elements("positive weights", weights, F32, count)?;
            }
        }
        if let Some(scores) = self.scores {
            c.elements("scores", scores, F32, rows * scores.shape().width())?;
        }
        if let Some(row_weights) = self.row_weights {
            c.elements("row_weights", row_weights, F32, rows)?;
        }
        if let Some(upstream) = self.upstream {
            c.input("upstream", upstream, F32, [widths.len(), rows])?;
        }
        if let Some(losses) = &self.losses {
            c.output("losses", losses, F32, [rows])?;
        }
        if let Some(statistics) = &self.statistics {
            c.output("statistics", statistics, F32, [widths.len(), rows, ROW_STATISTICS])?;
        }
        for (name, tensor) in [("d_log_scale", &self.d_log_scale), ("d_bias", &self.d_bias)] {
            if let Some(tensor) = tensor {
                c.output(name, tensor, F32, [rows])?;
            }
        }
        Ok(())
    }
}

/// Arguments of [`Device::aggregate`]: the loss of rows that are put together otherwise than by a mean, and what that
/// makes of their gradients. With f a row's loss, w its weight, a = `weight`·`width_weights[v]` at width v:
///
/// ```text
/// MeanOfEntries  loss += a · Σ w·f / K ;  upstream = a·w / K          K the number of all negatives
/// LogMeanExp     loss += a · log( Σ w·exp f / N ) ;  upstream = a·w·exp f / Σ w·exp f        N rows with entries
/// ```
#[derive(Debug)]
pub struct AggregateRows<'a> {
    /// f32 (W, N, 8), from [`Device::row_sweep`].
    pub statistics: &'a Tensor,
    /// f32 (N); 1 if not given.
    pub row_weights: Option<&'a Tensor>,
    /// How.
    pub aggregate: Aggregate,
    /// The partition's weight.
    pub weight: f32,
    /// W
    pub width_weights: &'a [f32],
    /// f32 (W, N).
    pub upstream: &'a mut Tensor,
    /// f32, one element: the loss is added to it.
    pub loss: &'a mut Tensor,
}

impl AggregateRows<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let widths = self.width_weights.len();
        let rows = self.statistics.elements() / (widths.max(1) * ROW_STATISTICS);
        c.input("statistics", self.statistics, F32, [widths, rows, ROW_STATISTICS])?;
        if let Some(row_weights) = self.row_weights {
            c.elements("row_weights", row_weights, F32, rows)?;
        }
        c.output("upstream", self.upstream, F32, [widths, rows])?;
        c.output("loss", self.loss, F32, [1])
    }
}

/// Arguments of [`Device::pair_scores`]: a [`ScoreFunction`] of `z = exp(log_scale)·similarity` and the gold scores.
///
/// Takes O(N log N) time and O(N) memory: where the order of the gold scores counts, pairs are sorted by it, and what
/// stands for the lower and the higher ones of a pair is a running sum.
#[derive(Debug)]
pub struct PairScores<'a> {
    /// f32 (N), N > 0: the similarity of each pair.
    pub similarity: &'a Tensor,
    /// f32 (N): the gold score of each pair; finite.
    pub scores: &'a Tensor,
    /// f32, one element.
    pub log_scale: &'a Tensor,
    /// What is computed.
    pub function: ScoreFunction,
    /// f32, one element: receives the loss.
    pub loss: &'a mut Tensor,
    /// f32 (N): receives the gradient of each z, as [`Device::positives_backward`] takes it.
    pub gradient: &'a mut Tensor,
}

impl PairScores<'_> {
    pub(super) fn check(&self, c: &Checker<'_>) -> Result<()> {
        let rows = self.similarity.elements();
        c.elements("similarity", self.similarity, F32, rows)?;
        c.require("similarity", rows > 0, || "is empty".into())?;
        c.elements("scores", self.scores, F32, rows)?;
        c.elements("log_scale", self.log_scale, F32, 1)?;
        c.output("loss", self.loss, F32, [1])?;
        c.output("gradient", self.gradient, F32, [rows])
    }
}
