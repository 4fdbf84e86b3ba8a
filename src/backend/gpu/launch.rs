//! Launches that name what they bind, whatever the device: buffers and parameters have the names that the shader and the
//! kernel of an operation give them.

use std::fmt;
use std::ops::Range;

use crate::backend::{Buffer, Tensor};
use crate::{Error, Result};

/// Values that live for one operation, of four bytes each.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) buffer: Box<dyn Buffer>,
    pub(crate) elements: usize,
}

/// What can be bound: a tensor, or scratch values.
pub(crate) trait Bindable {
    /// The memory and how many bytes of it are meant.
    fn bind(&self) -> (&dyn Buffer, usize);
}

impl Bindable for Tensor {
    fn bind(&self) -> (&dyn Buffer, usize) {
        (self.buffer(), self.elements() * self.dtype().size())
    }
}

impl Bindable for Scratch {
    fn bind(&self) -> (&dyn Buffer, usize) {
        (&*self.buffer, self.elements * 4)
    }
}

/// What makes one module of a file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Permutation {
    /// The file's name, without what it ends with: the operation.
    pub(crate) file: &'static str,
    pub(crate) entry: &'static str,
    /// Sorted.
    pub(crate) flags: Vec<&'static str>,
    /// Sorted by name.
    pub(crate) constants: Vec<(&'static str, u32)>,
}

impl fmt::Display for Permutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.entry)?;
        for flag in &self.flags {
            write!(f, " {flag}")?;
        }
        for (name, value) in &self.constants {
            write!(f, " {name}={value}")?;
        }
        Ok(())
    }
}

/// A type of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    U32,
    I32,
    F32,
}

/// A buffer under a name.
pub(crate) struct Bound<'a> {
    pub(crate) name: &'static str,
    pub(crate) buffer: &'a dyn Buffer,
    /// Of what is bound, from the buffer's beginning.
    pub(crate) bytes: usize,
    /// A run of elements of four bytes, and the parameter for the place of its first one in what is bound, where a
    /// binding cannot begin anywhere.
    pub(crate) part: Option<(Range<usize>, &'static str)>,
    pub(crate) writes: bool,
    /// The flag that says that it is bound.
    pub(crate) flag: Option<&'static str>,
}

/// How many workgroups run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Groups {
    /// In each direction.
    Grid([usize; 3]),
    /// In a row, which may be longer than a direction allows.
    Row(usize),
}

/// One run of an entry point over so many workgroups. What it declares and a launch does not give, or the other way
/// round, is an error.
pub(crate) struct Launch<'a> {
    pub(crate) permutation: Permutation,
    pub(crate) bound: Vec<Bound<'a>>,
    pub(crate) params: Vec<(&'static str, Scalar, u32)>,
    pub(crate) groups: Groups,
    error: Option<Error>,
}

impl<'a> Launch<'a> {
    /// Of an entry point of an operation's file.
    pub(crate) fn new(file: &'static str, entry: &'static str) -> Self {
        Self {
            permutation: Permutation { file, entry, flags: Vec::new(), constants: Vec::new() },
            bound: Vec::with_capacity(8),
            params: Vec::with_capacity(16),
            groups: Groups::Grid([1; 3]),
            error: None,
        }
    }

    fn fail(&mut self, reason: String) {
        let operation = self.permutation.file;
        self.error.get_or_insert(Error::Value { operation, argument: self.permutation.entry, reason });
    }

    /// What went wrong while it was put together.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.error.take().map_or(Ok(()), Err)
    }

    /// Sets a flag of the preprocessor.
    pub(crate) fn flag(mut self, flag: &'static str, set: bool) -> Self {
        if set {
            let at = self.permutation.flags.partition_point(|other| *other < flag);
            self.permutation.flags.insert(at, flag);
        }
        self
    }

    /// Sets a constant of the module.
    pub(crate) fn constant(mut self, name: &'static str, value: u32) -> Self {
        let at = self.permutation.constants.partition_point(|(other, _)| *other < name);
        self.permutation.constants.insert(at, (name, value));
        self
    }

    fn bind<T: Bindable + ?Sized>(
        mut self,
        name: &'static str,
        what: &'a T,
        part: Option<(Range<usize>, &'static str)>,
        writes: bool,
    ) -> Self {
        let (buffer, bytes) = what.bind();
        self.bound.push(Bound { name, buffer, bytes, part, writes, flag: None });
        self
    }

    fn bind_if<T: Bindable + ?Sized>(
        mut self,
        flag: &'static str,
        name: &'static str,
        what: Option<&'a T>,
        writes: bool,
    ) -> Self {
        if let Some(what) = what {
            self = self.flag(flag, true).bind(name, what, None, writes);
            if let Some(bound) = self.bound.last_mut() {
                bound.flag = Some(flag);
            }
        }
        self
    }

    /// Binds what is read.
    pub(crate) fn read<T: Bindable + ?Sized>(self, name: &'static str, what: &'a T) -> Self {
        self.bind(name, what, None, false)
    }

    /// Binds what is read, if it is there, and sets a flag.
    pub(crate) fn read_if<T: Bindable + ?Sized>(
        self,
        flag: &'static str,
        name: &'static str,
        what: Option<&'a T>,
    ) -> Self {
        self.bind_if(flag, name, what, false)
    }

    /// Binds what is written, or read and written.
    pub(crate) fn write<T: Bindable + ?Sized>(self, name: &'static str, what: &'a T) -> Self {
        self.bind(name, what, None, true)
    }

    /// Binds what is written, if it is there, and sets a flag.
    pub(crate) fn write_if<T: Bindable + ?Sized>(
        self,
        flag: &'static str,
        name: &'static str,
        what: Option<&'a T>,
    ) -> Self {
        self.bind_if(flag, name, what, true)
    }

    /// Binds a run of elements of 4 bytes, of a buffer that may be too large for a binding; the parameter `base` is the
    /// place of the first of them in the binding, where bindings cannot begin anywhere.
    pub(crate) fn read_part<T: Bindable + ?Sized>(
        self,
        name: &'static str,
        what: &'a T,
        elements: Range<usize>,
        base: &'static str,
    ) -> Self {
        self.bind(name, what, Some((elements, base)), false)
    }

    /// The same to be written.
    pub(crate) fn write_part<T: Bindable + ?Sized>(
        self,
        name: &'static str,
        what: &'a T,
        elements: Range<usize>,
        base: &'static str,
    ) -> Self {
        self.bind(name, what, Some((elements, base)), true)
    }

    /// Binds the first so many elements, of 4 bytes, of what is read.
    pub(crate) fn read_first<T: Bindable + ?Sized>(self, name: &'static str, what: &'a T, elements: usize) -> Self {
        self.first(name, what, elements, false)
    }

    /// The same of what is written.
    pub(crate) fn write_first<T: Bindable + ?Sized>(self, name: &'static str, what: &'a T, elements: usize) -> Self {
        self.first(name, what, elements, true)
    }

    fn first<T: Bindable + ?Sized>(mut self, name: &'static str, what: &'a T, elements: usize, writes: bool) -> Self {
        self = self.bind(name, what, None, writes);
        if let Some(bound) = self.bound.last_mut() {
            bound.bytes = bound.bytes.min(4 * elements).max(4);
        }
        self
    }

    /// A parameter that is a size or a place.
    pub(crate) fn size(mut self, name: &'static str, value: usize) -> Self {
        match u32::try_from(value) {
            Ok(value) => self.params.push((name, Scalar::U32, value)),
            Err(_) => self.fail(format!("`{name}` is {value}, which is beyond 32 bits")),
        }
        self
    }

    /// A parameter of 32 bits.
    pub(crate) fn bits(mut self, name: &'static str, value: u32) -> Self {
        self.params.push((name, Scalar::U32, value));
        self
    }

    /// A signed parameter.
    pub(crate) fn signed(mut self, name: &'static str, value: i32) -> Self {
        self.params.push((name, Scalar::I32, value as u32));
        self
    }

    /// A parameter that is a number.
    pub(crate) fn float(mut self, name: &'static str, value: f32) -> Self {
        self.params.push((name, Scalar::F32, value.to_bits()));
        self
    }

    /// How many workgroups in each direction.
    pub(crate) fn groups(mut self, groups: [usize; 3]) -> Self {
        self.groups = Groups::Grid(groups);
        self
    }

    /// So many workgroups in a row.
    pub(crate) fn row_of_groups(mut self, count: usize) -> Self {
        self.groups = Groups::Row(count);
        self
    }
}
