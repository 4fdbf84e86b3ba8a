//! Devices and what they can compute: the one seam between operations and hardware.
//!
//! Every operation is one method of [`Backend`] with one struct of arguments, all in [`operations`]; a backend has one
//! file for each, of the same name. Backends know nothing of gradients as a graph: a backward pass is just another
//! operation. Arguments are checked once, in [`Device`], before a backend sees them.
//!
//! * [`Device`]: what callers hold. Makes tensors and runs operations.
//! * [`Tensor`]: data on a device. [`PackedBatch`]: token sequences on a device.
//! * [`cpu`]: the backend that is always there.
//! * [`philox`]: the random numbers that are the same on every device.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) mod gpu;
pub(crate) mod guards;
pub mod operations;
mod packed;
pub mod philox;
mod support;
mod tensor;
#[cfg(feature = "wgpu")]
pub mod wgpu;

use std::any::Any;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, LazyLock};

pub use packed::PackedBatch;
pub use support::{backends, support_table};
pub use tensor::{Buffer, Element, Tensor};

use crate::error::{DType, Shape};
use crate::{Error, Result};

/// What runs the launches of a device that is a GPU.
#[cfg(all(feature = "train", any(feature = "cuda", feature = "wgpu")))]
pub(crate) fn engine_of(device: &Device) -> Option<&dyn gpu::Engine> {
    #[cfg(feature = "cuda")]
    if let Some(cuda) = device.backend::<cuda::Cuda>() {
        return Some(cuda.engine());
    }
    #[cfg(feature = "wgpu")]
    if let Some(wgpu) = device.backend::<wgpu::Wgpu>() {
        return Some(wgpu.engine());
    }
    None
}

macro_rules! backend {
    ($($(#[$doc:meta])* $operation:ident($arguments:ident);)*) => {
        /// What a device has to be able to do.
        ///
        /// Operations may run after the call has returned, in the order in which they were asked for; only
        /// [`download`](Backend::download) waits. An operation that a backend does not override is refused with
        /// [`Error::Unsupported`], never skipped.
        pub trait Backend: Any + fmt::Debug + Send + Sync {
            /// The device's name as a user writes it, such as `cpu` or `wgpu:0`.
            fn name(&self) -> String;

            /// What the device is, in words.
            fn description(&self) -> String;

            /// The names of the operations that devices of this type can do, of [`OPERATIONS`]; none if it is not said.
            fn supported() -> &'static [&'static str]
            where
                Self: Sized,
            {
                &[]
            }

            /// The names of the operations that this device can do; none if it does not tell.
            fn operations(&self) -> &'static [&'static str] {
                &[]
            }

            /// What there is to know of the device beside its description: names and values, to be shown to who asks
            /// what a machine has.
            fn properties(&self) -> Vec<(&'static str, String)> {
                Vec::new()
            }

            /// Whether reading a scalar costs nothing, because operations have run when their call returns.
            fn is_synchronous(&self) -> bool;

            /// Whether a pass forward and backward in one, over rectangles of so many columns together, is faster than
            /// two passes.
            fn prefers_one_way(&self, columns: usize) -> bool {
                let _ = columns;
                true
            }

            /// Starts everything that was asked for so far, without waiting for it. Devices that collect operations
            /// start when something is downloaded, at the latest.
            ///
            /// # Errors
            /// What the device reports.
            fn submit(&self) -> Result<()> {
                Ok(())
            }

            /// How far the factors of large matrix products are rounded, as a part of themselves, where they do not
            /// keep single precision: 2⁻⁸ in bf16, 2⁻¹¹ in f16.
            fn product_rounding(&self) -> f64 {
                0.0
            }

            /// How long the device was at what so far, the longest first; nothing unless it was opened to be measured.
            fn timings(&self) -> Vec<Timing> {
                Vec::new()
            }

            /// How many buffers have been found written beyond their end, for a backend that can tell; see
            /// [`conformance`](crate::conformance).
            fn guard_violations(&self) -> usize {
                0
            }

            /// How many bytes of memory the device has taken for buffers, in use or kept to be used again; none if it
            /// does not count.
            fn held_bytes(&self) -> Option<usize> {
                None
            }

            /// Makes a buffer of so many elements; what is in it is unspecified.
            ///
            /// # Errors
            /// [`Error::OutOfMemory`].
            fn allocate(&self, elements: usize, dtype: DType) -> Result<Arc<dyn Buffer>>;

            /// Copies bytes from the host to a tensor of the same size.
            ///
            /// # Errors
            /// What the device reports.
            fn upload(&self, bytes: &[u8], tensor: &mut Tensor) -> Result<()>;

            /// Copies a tensor to bytes of the same size on the host.
            ///
            /// # Errors
            /// What the device reports.
            fn download(&self, tensor: &Tensor, bytes: &mut [u8]) -> Result<()>;

            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// [`Error::Unsupported`] if the device cannot; else what the device reports.
                fn $operation(&self, arguments: operations::$arguments<'_>) -> Result<()> {
                    let _ = arguments;
                    Err(Error::Unsupported { operation: stringify!($operation), device: self.name() })
                }
            )*
        }

        /// The names of all operations.
        pub const OPERATIONS: &[&str] = &[$(stringify!($operation)),*];

        impl Device {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// A typed error naming the argument if shapes, element types or devices do not fit together;
                /// [`Error::Unsupported`] if the device cannot.
                pub fn $operation(&self, arguments: operations::$arguments<'_>) -> Result<()> {
                    arguments.check(&operations::Checker::new(stringify!($operation), self))?;
                    self.0.$operation(arguments)
                }
            )*
        }
    };
}

backend! {
    /// `output = value`, everywhere.
    fill(Fill);
    /// Copies a run of elements from one tensor into another.
    copy(Copy);
    /// `output = input` as another floating point type, rounded to nearest even.
    cast(Cast);
    /// `output += input`.
    add(Add);
    /// `output *= factor`, the factor a scalar on the device.
    scale(Scale);
    /// `output (+)= factor · Σ input`.
    sum(Sum);
    /// `output (+)= Σ input²`.
    square_sum(SquareSum);
    /// `output[c] += Σ_r input[r, c]`.
    column_sum(ColumnSum);
    /// `output = gelu(op(a) · op(b) + bias)`, or `output += op(a) · op(b)`.
    matmul(MatMul);
    /// `gradient *= gelu'(input)`, in place.
    gelu_backward(GeluBackward);
    /// Zeroes elements at random and scales the others up, in place; the same again is the backward pass.
    dropout(DropoutInPlace);
    /// `output = layer_norm(residual + dropout(input))`.
    layer_norm_forward(LayerNormForward);
    /// The gradients of [`layer_norm_forward`](Backend::layer_norm_forward).
    layer_norm_backward(LayerNormBackward);
    /// `output[t] = word[tokens[t]] + position[positions[t]] + token_type[0]`.
    embedding_forward(EmbeddingForward);
    /// Adds each row's gradient to the table rows it was gathered from, in a fixed order.
    embedding_backward(EmbeddingBackward);
    /// Softmax attention of each packed sequence over itself.
    attention_forward(AttentionForward);
    /// The gradient of [`attention_forward`](Backend::attention_forward), by recomputation.
    attention_backward(AttentionBackward);
    /// One vector per packed sequence: the mean of its rows, or its first.
    pooling_forward(PoolingForward);
    /// The gradient of [`pooling_forward`](Backend::pooling_forward).
    pooling_backward(PoolingBackward);
    /// `output[r] = input[r] / |input[r]|`.
    l2_norm_forward(L2NormForward);
    /// The gradient of [`l2_norm_forward`](Backend::l2_norm_forward).
    l2_norm_backward(L2NormBackward);
    /// The gradient of [`l2_norm_forward`](Backend::l2_norm_forward) in place, from its input.
    l2_norm_gradient(L2NormGradient);
    /// `similarity[i] = queries[i] · documents[i]`.
    positives_forward(PositivesForward);
    /// What the positives add to the gradients.
    positives_backward(PositivesBackward);
    /// Statistics of the rows and columns of a similarity matrix that is never stored.
    similarity_sweep_forward(SimilaritySweepForward);
    /// The gradient of a similarity matrix that is never stored, applied to both its sides.
    similarity_sweep_backward(SimilaritySweepBackward);
    /// Forward, partition and backward in one pass, where the similarities stand in their rows' partition alone.
    similarity_sweep_one_way(SimilaritySweepOneWay);
    /// The statistics of rows merged with those of other entries of the same rows.
    merge_statistics(MergeStatistics);
    /// From the statistics of a partition's blocks to its losses and the coefficients of its gradients.
    partition(Partition);
    /// Of every row's first values, for each of several widths: one over the length, or half its square.
    prefix_norms_forward(PrefixNormsForward);
    /// What the norms of prefixes add to the gradient.
    prefix_norms_backward(PrefixNormsBackward);
    /// `output[i] = input[first_row + i, column]`.
    column(Column);
    /// `output = min(input, largest)`.
    clamp(Clamp);
    /// The gradient of [`clamp`](Backend::clamp), in place.
    clamp_backward(ClampBackward);
    /// One partition of an objective with each row's entries at hand: its losses, statistics and gradients in one pass.
    row_sweep(RowSweep);
    /// Rows that are put together otherwise than by a mean: their loss, and what it makes of their gradients.
    aggregate(AggregateRows);
    /// One AdamW step, with the gradient clipped by a norm that is on the device.
    adamw(AdamW);
    /// The loss of graded pairs and the gradient of each pair's logit.
    pair_scores(PairScores);
}

/// How long a device was at one kind of launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// What was launched.
    pub name: String,
    /// How often.
    pub count: usize,
    /// All of them together.
    pub seconds: f64,
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl Timing {
    /// Of counts and seconds by name, the longest first.
    fn longest_first(totals: &std::collections::BTreeMap<String, (usize, f64)>) -> Vec<Self> {
        let timing = |(name, &(count, seconds)): (&String, &(usize, f64))| Self { name: name.clone(), count, seconds };
        let mut timings: Vec<Self> = totals.iter().map(timing).collect();
        timings.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        timings
    }
}

/// A device to compute on. Cheap to clone; equal if it is the same device.
#[derive(Clone)]
pub struct Device(Arc<dyn Backend>);

impl Device {
    /// The processor this program runs on.
    pub fn cpu() -> Self {
        static CPU: LazyLock<Device> = LazyLock::new(|| Device(Arc::new(cpu::Cpu::new())));
        CPU.clone()
    }

    /// A device of one's own.
    pub fn new(backend: impl Backend) -> Self {
        Self(Arc::new(backend))
    }

    /// The devices that are here: the processor, NVIDIA GPUs and what wgpu finds, if the crate was built with them.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut, reason = "there may be no other backend")]
        let mut devices = vec![Self::cpu()];
        #[cfg(feature = "cuda")]
        devices.extend(cuda::available());
        #[cfg(feature = "wgpu")]
        devices.extend(wgpu::available());
        devices
    }

    /// The device that `auto` names: the first one that is hardware of its own and works, CUDA before wgpu, else the
    /// processor. The errors are those of devices that would have been taken instead.
    pub fn automatic() -> (Self, Vec<Error>) {
        #[allow(unused_mut, reason = "there may be no other backend")]
        let mut errors = Vec::new();
        #[cfg(feature = "cuda")]
        match cuda::hardware() {
            Some(Ok(device)) => return (device, errors),
            Some(Err(error)) => errors.push(error),
            None => {}
        }
        #[cfg(feature = "wgpu")]
        match wgpu::hardware() {
            Some(Ok(device)) => return (device, errors),
            Some(Err(error)) => errors.push(error),
            None => {}
        }
        (Self::cpu(), errors)
    }

    /// The device's name as a user writes it, such as `cpu`.
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// What the device is, in words.
    pub fn description(&self) -> String {
        self.0.description()
    }

    /// What there is to know of the device beside its description: names and values.
    pub fn properties(&self) -> Vec<(&'static str, String)> {
        self.0.properties()
    }

    /// Whether the device says that it can do an operation, one of [`OPERATIONS`].
    pub fn supports(&self, operation: &str) -> bool {
        self.0.operations().contains(&operation)
    }

    /// The backend as its own type, for what only devices of that type can do.
    pub fn backend<T: Backend>(&self) -> Option<&T> {
        let backend: &dyn Any = self.0.as_ref();
        backend.downcast_ref()
    }

    /// Whether reading a scalar costs nothing, because operations have run when their call returns.
    pub fn is_synchronous(&self) -> bool {
        self.0.is_synchronous()
    }

    /// Whether a pass forward and backward in one, over rectangles of so many columns together, is faster than two.
    pub fn prefers_one_way(&self, columns: usize) -> bool {
        self.0.prefers_one_way(columns)
    }

    /// Starts everything that was asked for so far, without waiting for it: the end of a step, for devices that collect
    /// operations. What is downloaded later is right with or without it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn submit(&self) -> Result<()> {
        self.0.submit()
    }

    /// How far the factors of large matrix products are rounded, as a part of themselves, where they do not keep single
    /// precision: 2⁻⁸ in bf16, 2⁻¹¹ in f16.
    pub fn product_rounding(&self) -> f64 {
        self.0.product_rounding()
    }

    /// How long the device was at what so far, the longest first; nothing unless it was opened to be measured, such as
    /// with the name `wgpu,profile`.
    pub fn timings(&self) -> Vec<Timing> {
        self.0.timings()
    }

    /// How many buffers have been found written beyond their end, where the device can tell.
    pub fn guard_violations(&self) -> usize {
        self.0.guard_violations()
    }

    /// How many bytes of memory the device has taken for buffers, in use or kept to be used again; none if it does not
    /// count. Where the same shapes come again and again it stops growing.
    pub fn held_bytes(&self) -> Option<usize> {
        self.0.held_bytes()
    }

    /// Makes a tensor; what is in it is unspecified until it is written.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        let buffer = self.0.allocate(shape.elements(), dtype)?;
        Ok(Tensor::new(self, shape, dtype, buffer))
    }

    /// Makes an f32 tensor of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn zeros(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let mut tensor = self.empty(shape, DType::F32)?;
        self.fill(operations::Fill { output: &mut tensor, value: 0.0 })?;
        Ok(tensor)
    }

    /// Copies values from the host into a new tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more or fewer values than the shape has elements; [`Error::OutOfMemory`].
    pub fn tensor<T: Element>(&self, values: &[T], shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if values.len() != shape.elements() {
            return Err(Error::Shape {
                operation: "tensor",
                argument: "values",
                expected: shape,
                found: [values.len()].into(),
            });
        }
        let mut tensor = self.empty(shape, T::DTYPE)?;
        self.0.upload(bytemuck::cast_slice(values), &mut tensor)?;
        Ok(tensor)
    }

    /// Overwrites a tensor with values from the host.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::ElementType`], [`Error::OtherDevice`] or [`Error::Shared`].
    pub fn write<T: Element>(&self, tensor: &mut Tensor, values: &[T]) -> Result<()> {
        operations::Checker::new("write", self).output("tensor", tensor, T::DTYPE, [values.len()])?;
        self.0.upload(bytemuck::cast_slice(values), tensor)
    }

    fn download(&self, tensor: &Tensor, bytes: &mut [u8]) -> Result<()> {
        self.0.download(tensor, bytes)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

/// The name of a device, or `auto`: the first one that is hardware of its own, else the processor.
///
/// `cuda` is the first GPU of CUDA, `cuda:1` the second; `wgpu` the first device of wgpu. After a comma follows how it is
/// opened: see `Settings` of the backend.
impl FromStr for Device {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "cpu" => return Ok(Self::cpu()),
            "auto" => return Ok(Self::automatic().0),
            _ => {}
        }
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda::by_name(name) {
            return device;
        }
        #[cfg(feature = "wgpu")]
        if let Some(device) = wgpu::by_name(name) {
            return device;
        }
        Err(Error::NoDevice { requested: name.into(), available: Self::available().iter().map(Self::name).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Idle;

    impl Backend for Idle {
        fn name(&self) -> String {
            "idle".into()
        }
        fn description(&self) -> String {
            "a device that can do nothing".into()
        }
        fn is_synchronous(&self) -> bool {
            true
        }
        fn allocate(&self, elements: usize, dtype: DType) -> Result<Arc<dyn Buffer>> {
            cpu::Cpu::new().allocate(elements, dtype)
        }
        fn upload(&self, _: &[u8], _: &mut Tensor) -> Result<()> {
            Ok(())
        }
        fn download(&self, _: &Tensor, _: &mut [u8]) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_backend_lacks_is_refused_by_name() {
        let error = Device::new(Idle).zeros([2]).unwrap_err().to_string();
        assert_eq!(error, "fill is not available on idle");
    }

    #[test]
    fn a_tensor_of_another_device_is_refused() {
        let mut tensor = Device::cpu().zeros([2]).unwrap();
        let error = Device::new(Idle).fill(operations::Fill { output: &mut tensor, value: 1.0 }).unwrap_err();
        assert_eq!(error.to_string(), "fill: `output` lives on cpu, the operation runs on idle");
    }

    #[test]
    fn a_shared_tensor_is_not_written() {
        let mut tensor = Device::cpu().zeros([2]).unwrap();
        let reader = tensor.clone();
        let error = Device::cpu().write(&mut tensor, &[1.0f32, 2.0]).unwrap_err();
        assert!(matches!(error, Error::Shared { .. }), "{error}");
        assert_eq!(reader.to_host::<f32>().unwrap(), [0.0, 0.0]);
        drop(reader);
        Device::cpu().write(&mut tensor, &[1.0f32, 2.0]).unwrap();
        assert_eq!(tensor.to_host::<f32>().unwrap(), [1.0, 2.0]);
        assert!(tensor.to_host::<u32>().is_err() && tensor.to_scalar().is_err());
    }

    #[test]
    fn devices_are_found_by_name() {
        assert_eq!("cpu".parse::<Device>().unwrap(), Device::cpu());
        let available = Device::available();
        assert_eq!(available[0], Device::cpu());
        assert!(available.contains(&"auto".parse().unwrap()));
        for device in &available {
            assert_eq!(device.name().parse::<Device>().unwrap(), *device);
        }
        let error = "tpu:3".parse::<Device>().unwrap_err().to_string();
        let names: Vec<String> = available.iter().map(Device::name).collect();
        assert_eq!(error, format!("there is no device `tpu:3` here; available: {}", names.join(", ")));
    }
}
