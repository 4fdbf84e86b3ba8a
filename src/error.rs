//! Everything that can go wrong, as typed values.
//!
//! Each value names the operation and the argument at fault, and, where shapes are at odds, both of them, so that
//! the message alone tells a user what to change.

use std::fmt;
use std::path::{Path, PathBuf};

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

/// The extents of a tensor, outermost first; prints as `(128, 384)`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// The extents.
    pub fn extents(&self) -> &[usize] {
        &self.0
    }

    /// How many elements a tensor of this shape has; the largest number if there are more than that.
    pub fn elements(&self) -> usize {
        self.0.iter().fold(1, |elements, &extent| elements.saturating_mul(extent))
    }

    /// The first extent, 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.0.first().copied().unwrap_or(1)
    }

    /// The product of all extents but the first.
    pub fn width(&self) -> usize {
        self.0.iter().skip(1).product()
    }
}

impl From<&[usize]> for Shape {
    fn from(extents: &[usize]) -> Self {
        Self(extents.to_vec())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Self {
        Self(extents.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(")?;
        for (i, extent) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{extent}")?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit floating point.
    F32,
    /// 16-bit floating point of IEEE 754: 5 bits of exponent, 10 of mantissa.
    F16,
    /// The upper half of a 32-bit floating point number: 8 bits of exponent, 7 of mantissa.
    BF16,
    /// 32-bit unsigned integer: token ids, offsets, keys of masks.
    U32,
}

impl DType {
    /// The types for which [`is_float`](Self::is_float) holds, in words.
    pub(crate) const FLOATS: &'static str = "f32, f16 or bf16";

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Whether the elements are floating point numbers: f32, f16 or bf16.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::U32 => "u32",
        })
    }
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two shapes that had to agree do not.
    #[error("{operation}: `{argument}` has shape {found}, expected {expected}")]
    Shape {
        /// The operation that was asked for.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The shape the argument should have had.
        expected: Shape,
        /// The shape it has.
        found: Shape,
    },

    /// An argument has elements of the wrong type.
    #[error("{operation}: `{argument}` holds {found}, expected {expected}")]
    ElementType {
        /// The operation that was asked for.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The type the elements should have had.
        expected: String,
        /// The type they have.
        found: String,
    },

    /// An argument lives on another device than the one that was asked to work on it.
    #[error("{operation}: `{argument}` lives on {found}, the operation runs on {expected}")]
    OtherDevice {
        /// The operation that was asked for.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The device the operation runs on.
        expected: String,
        /// The device the argument lives on.
        found: String,
    },

    /// An argument has a value that the operation cannot take.
    #[error("{operation}: `{argument}` {reason}")]
    Value {
        /// The operation that was asked for.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What is wrong with it, as the end of a sentence that began with the argument.
        reason: String,
    },

    /// A tensor is to be written while something else still reads it.
    #[error("{operation}: `{argument}` is shared and cannot be written")]
    Shared {
        /// The operation that was asked for.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
    },

    /// The device cannot run the operation.
    #[error("{operation} is not available on {device}")]
    Unsupported {
        /// The operation that was asked for.
        operation: &'static str,
        /// The device that was asked.
        device: String,
    },

    /// There is no such device here.
    #[error("there is no device `{requested}` here; available: {}", available.join(", "))]
    NoDevice {
        /// What was asked for.
        requested: String,
        /// What there is.
        available: Vec<String>,
    },

    /// The device has no room for a buffer.
    #[error("{device} has no room for a buffer of {bytes} bytes")]
    OutOfMemory {
        /// The device that was asked.
        device: String,
        /// The size of the buffer.
        bytes: usize,
    },

    /// A device cannot hold or start something so large.
    #[error("{device}: {needed} is more than the device's `{limit}` of {most}")]
    Limit {
        /// The device that was asked.
        device: String,
        /// The limit, under the name that WebGPU gives it.
        limit: &'static str,
        /// What was needed.
        needed: u64,
        /// What the device allows.
        most: u64,
    },

    /// A device has gone: its driver was reset, or it was taken away. Everything on it is lost.
    #[error("{device} was lost: {reason}")]
    DeviceLost {
        /// The device.
        device: String,
        /// What its driver says.
        reason: String,
    },

    /// A device could not be opened, or its driver refused something.
    #[error("{device}: {reason}")]
    Device {
        /// The device.
        device: String,
        /// What its driver says.
        reason: String,
    },

    /// A file or folder could not be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do about it.
        reason: String,
        /// What the operating system said, where it said something.
        #[source]
        source: Option<std::io::Error>,
    },

    /// A file holds something that cannot be understood.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },

    /// A setting, or two settings together, make no sense.
    #[error("`{setting}`: {reason}")]
    Setting {
        /// The setting, as the user writes it.
        setting: String,
        /// What is wrong with it and what would be right.
        reason: String,
    },

    /// Training left the realm of finite numbers.
    #[error("the loss became {loss} at step {step}; {advice}")]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// The loss at that step.
        loss: f32,
        /// What is left and what to try.
        advice: String,
    },

    /// The user asked training to stop; everything needed to go on was saved.
    #[error("stopped after step {step}; {advice}")]
    Interrupted {
        /// The last step that was finished.
        step: u64,
        /// How to go on.
        advice: String,
    },
}

impl Error {
    /// An [`Error::Shape`].
    pub fn shape(
        operation: &'static str,
        argument: &'static str,
        expected: impl Into<Shape>,
        found: impl Into<Shape>,
    ) -> Self {
        Self::Shape { operation, argument, expected: expected.into(), found: found.into() }
    }

    /// An [`Error::Value`].
    pub fn value(operation: &'static str, argument: &'static str, reason: impl Into<String>) -> Self {
        Self::Value { operation, argument, reason: reason.into() }
    }

    /// An [`Error::Setting`].
    pub fn setting(setting: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Setting { setting: setting.into(), reason: reason.into() }
    }

    /// An [`Error::File`] for a file whose content is at fault.
    pub fn file(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), reason: reason.into(), source: None }
    }

    /// An [`Error::File`] for something the operating system refused; `what` says what was tried.
    pub fn io(path: impl AsRef<Path>, what: &str, source: std::io::Error) -> Self {
        Self::File {
            path: path.as_ref().to_path_buf(),
            reason: format!("cannot {what}: {source}"),
            source: Some(source),
        }
    }

    /// An [`Error::Line`].
    pub fn line(path: impl AsRef<Path>, line: usize, reason: impl Into<String>) -> Self {
        Self::Line { path: path.as_ref().to_path_buf(), line, reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_operation_the_argument_and_both_shapes() {
        let error = Error::shape("loss", "documents", [4, 8], [3, 8]);
        assert_eq!(error.to_string(), "loss: `documents` has shape (3, 8), expected (4, 8)");
    }

    #[test]
    fn shapes_count_elements() {
        let shape = Shape::from([2, 3, 4]);
        assert_eq!((shape.elements(), shape.rows(), shape.width()), (24, 2, 12));
        assert_eq!(Shape::from([]).elements(), 1);
        assert_eq!(Shape::from([usize::MAX, 2]).elements(), usize::MAX);
    }
}
