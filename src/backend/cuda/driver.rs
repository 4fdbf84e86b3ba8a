//! The driver of CUDA, and one device of it with one stream.
//!
//! Contexts and streams are cudarc's, so that a caller can bring its own. Everything else is called through a table of
//! functions that is filled when the driver is opened: a driver that lacks one of them is an error then, where cudarc
//! would panic at the first call, and a result that this crate has never heard of is a number.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use crate::{Error, Result};

/// The oldest driver that will do, as it counts: CUDA 12.0.
const OLDEST: i32 = 12_000;

/// A table of a library's functions that return a number, 0 if all went well.
macro_rules! functions {
    ($table:ident: $($name:ident($($argument:ty),* $(,)?);)*) => {
        #[allow(non_snake_case)]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> std::ffi::c_int,)*
        }

        impl $table {
            /// The functions of a library, or the names of those that it lacks.
            ///
            /// # Safety
            /// The library has the functions under these names as they are declared here, and is never closed.
            pub(super) unsafe fn load(library: &libloading::Library) -> std::result::Result<Self, Vec<&'static str>> {
                let missing: Vec<&'static str> = [$(stringify!($name)),*]
                    .into_iter()
                    // SAFETY: it is only looked for, not used.
                    .filter(|name| unsafe { library.get::<*const ()>(*name) }.is_err())
                    .collect();
                Ok(Self {
                    $($name: {
                        // SAFETY: the caller says that this is its type.
                        match unsafe { library.get(stringify!($name)) } {
                            Ok(symbol) => *symbol,
                            Err(_) => return Err(missing),
                        }
                    },)*
                })
            }
        }
    };
}
pub(super) use functions;

functions! { Functions:
    cuInit(c_uint);
    cuGetErrorName(c_int, *mut *const c_char);
    cuGetErrorString(c_int, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGetName(*mut c_char, c_int, c_int);
    cuDeviceGetAttribute(*mut c_int, c_int, c_int);
    cuDeviceTotalMem_v2(*mut usize, c_int);
    cuCtxGetCurrent(*mut sys::CUcontext);
    cuCtxSetCurrent(sys::CUcontext);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemAllocHost_v2(*mut *mut c_void, usize);
    cuMemFreeHost(*mut c_void);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, sys::CUstream);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, sys::CUstream);
    cuMemcpyDtoDAsync_v2(u64, u64, usize, sys::CUstream);
    cuMemsetD8Async(u64, u8, usize, sys::CUstream);
    cuStreamSynchronize(sys::CUstream);
    cuStreamWaitEvent(sys::CUstream, sys::CUevent, c_uint);
    cuEventCreate(*mut sys::CUevent, c_uint);
    cuEventDestroy_v2(sys::CUevent);
    cuEventRecord(sys::CUevent, sys::CUstream);
    cuEventSynchronize(sys::CUevent);
    cuEventElapsedTime(*mut f32, sys::CUevent, sys::CUevent);
    cuModuleLoadData(*mut sys::CUmodule, *const c_void);
    cuModuleUnload(sys::CUmodule);
    cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    cuFuncSetAttribute(sys::CUfunction, c_int, c_int);
    cuLaunchKernel(
        sys::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, sys::CUstream, *mut *mut c_void,
        *mut *mut c_void,
    );
    cuTensorMapEncodeTiled(
        *mut c_void, c_uint, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32, c_uint, c_uint,
        c_uint, c_uint,
    );
}

/// What cudarc calls for us beside these, when a context or a stream begins or ends. Every driver since CUDA 12.0 has
/// all of both lists.
const OF_CUDARC: [&str; 11] = [
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSynchronize",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
];

/// Why there is no CUDA here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unavailable {
    /// There is no driver.
    #[error("no NVIDIA driver was found (libcuda.so.1, or nvcuda.dll on Windows)")]
    Driver,
    /// It is too old.
    #[error(
        "the NVIDIA driver is for CUDA {}, at least {} is needed: install a newer driver",
        Version(*found), Version(*needed)
    )]
    Version {
        /// The driver's version.
        found: i32,
        /// The oldest that will do.
        needed: i32,
    },
    /// It lacks functions.
    #[error("the NVIDIA driver lacks {}: install a newer driver", missing.join(", "))]
    Functions {
        /// Their names.
        missing: Vec<&'static str>,
    },
    /// It reports an error.
    #[error("the NVIDIA driver cannot be used: {reason}")]
    Refused {
        /// What it says.
        reason: String,
    },
}

/// A version as the driver counts, as everybody writes it.
struct Version(i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// The driver.
pub(super) struct Driver {
    functions: Functions,
    version: i32,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver({})", Version(self.version))
    }
}

impl Driver {
    /// The driver of this machine, opened once.
    pub(super) fn get() -> std::result::Result<&'static Self, Unavailable> {
        static DRIVER: OnceLock<std::result::Result<Driver, Unavailable>> = OnceLock::new();
        DRIVER.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> std::result::Result<Self, Unavailable> {
        // SAFETY: loading the driver's library runs its initialisation, which is made for that.
        if !unsafe { sys::is_culib_present() } {
            return Err(Unavailable::Driver);
        }
        // SAFETY: it is there, as was just seen.
        let library = unsafe { sys::culib() };
        // SAFETY: it is only looked for, not used.
        let lacks = |name: &&str| unsafe { library.get::<*const ()>(*name) }.is_err();
        // A driver that is too old says so, whatever it lacks.
        // SAFETY: the function takes a place for a number; it may be called before everything else.
        let version = unsafe {
            let mut version: c_int = 0;
            let get: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> = library
                .get("cuDriverGetVersion")
                .map_err(|_| Unavailable::Functions { missing: vec!["cuDriverGetVersion"] })?;
            match get(&raw mut version) {
                0 => version,
                code => {
                    return Err(Unavailable::Refused { reason: format!("error {code} when asked for its version") });
                }
            }
        };
        if version < OLDEST {
            return Err(Unavailable::Version { found: version, needed: OLDEST });
        }
        // SAFETY: these are declared as in the driver's header; cudarc keeps the library open for ever.
        let functions = unsafe { Functions::load(library) }.map_err(|missing| Unavailable::Functions { missing })?;
        let missing: Vec<&'static str> = OF_CUDARC.into_iter().filter(lacks).collect();
        if !missing.is_empty() {
            return Err(Unavailable::Functions { missing });
        }
        let driver = Self { functions, version };
        // SAFETY: there are no flags.
        match unsafe { (driver.functions.cuInit)(0) } {
            // No device is not an error: there are none then.
            0 | NO_DEVICE => Ok(driver),
            code => Err(Unavailable::Refused { reason: driver.describe(code) }),
        }
    }

    /// The newest CUDA that it knows: (12, 4).
    pub(super) fn version(&self) -> (i32, i32) {
        (self.version / 1000, self.version % 1000 / 10)
    }

    /// How many devices there are.
    pub(super) fn devices(&self) -> usize {
        let mut count = 0;
        // SAFETY: there is a place for the number.
        let code = unsafe { (self.functions.cuDeviceGetCount)(&raw mut count) };
        if code == 0 { usize::try_from(count).unwrap_or(0) } else { 0 }
    }

    fn device_name(&self, device: sys::CUdevice) -> std::result::Result<String, String> {
        let mut name = [0u8; 256];
        // SAFETY: there is room for so many bytes, the last of which stays 0.
        match unsafe { (self.functions.cuDeviceGetName)(name.as_mut_ptr().cast(), 255, device) } {
            0 => {
                let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
                Ok(name.to_string_lossy().trim().to_owned())
            }
            code => Err(self.describe(code)),
        }
    }

    fn attribute(&self, device: sys::CUdevice, of: sys::CUdevice_attribute) -> std::result::Result<u32, String> {
        let mut value = 0;
        // SAFETY: there is a place for the number.
        match unsafe { (self.functions.cuDeviceGetAttribute)(&raw mut value, of as c_int, device) } {
            0 => Ok(u32::try_from(value).unwrap_or(0)),
            code => Err(self.describe(code)),
        }
    }

    /// What an error is called and what the driver says of it.
    fn describe(&self, code: c_int) -> String {
        let text = |of: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = ptr::null();
            // SAFETY: there is a place for the text, which is the driver's own and stays.
            unsafe {
                let code = of(code, &raw mut text);
                (code == 0 && !text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        match (text(self.functions.cuGetErrorName), text(self.functions.cuGetErrorString)) {
            (Some(name), Some(reason)) => format!("{name}: {reason}"),
            (Some(name), None) => name,
            _ => format!("error {code}"),
        }
    }
}

const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;

/// Whether nothing works any more in a context that has seen an error.
fn is_lost(code: c_int) -> bool {
    matches!(
        code,
        // The driver has been taken down, or the device away.
        4 | 46 |
        // Memory or links that are broken, and errors that were contained.
        214 | 220 | 226 |
        // Kernels that went wrong: an address, a time limit, an assertion, an instruction.
        700 | 702 | 709 | 710 | 714..=719 | 721 | 999
    )
}

/// An address that is bound to a kernel's argument, or a number, in the low bytes; or a description of a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value {
    Word(u64),
    TensorMap(TensorMap),
}

/// How the tensor memory accelerator sees a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(128))]
pub(super) struct TensorMap([u64; 16]);

/// What a [`TensorMap`] is made from. Extents, tile and strides begin with the innermost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiled<'a> {
    pub(super) data_type: sys::CUtensorMapDataType,
    /// A multiple of 16.
    pub(super) address: u64,
    pub(super) extents: &'a [u64],
    /// Bytes from one to the next, multiples of 16; not of the innermost, which is contiguous.
    pub(super) strides: &'a [u64],
    /// What one copy brings.
    pub(super) tile: &'a [u32],
    pub(super) swizzle: sys::CUtensorMapSwizzle,
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch<'a> {
    pub(super) function: &'a Function,
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: u32,
    /// In the order of the kernel.
    pub(super) arguments: &'a [Value],
}

/// A device: its primary context, or a caller's, and the stream that everything runs on.
pub(super) struct Gpu {
    driver: &'static Driver,
    /// What it is called in errors.
    title: String,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    properties: Properties,
    staging: Mutex<Staging>,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Properties {
    pub(super) name: String,
    /// (9, 0)
    pub(super) capability: (u32, u32),
    pub(super) multiprocessors: u32,
    /// Bytes.
    pub(super) memory: usize,
    /// Bytes of shared memory of a block, of a kernel that asks for more than the usual 48 KiB.
    pub(super) shared: u32,
    /// Bytes.
    pub(super) l2_cache: u32,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.title)
    }
}

/// What cudarc reports, in the driver's words.
fn refused(driver: &Driver, device: &str, what: &str, error: DriverError) -> Error {
    failure(driver, device, error.0 as c_int, what)
}

/// What an error means.
fn failure(driver: &Driver, device: &str, code: c_int, what: &str) -> Error {
    let reason = format!("{what}: {}", driver.describe(code));
    if is_lost(code) {
        Error::DeviceLost { device: device.into(), reason }
    } else {
        Error::Device { device: device.into(), reason }
    }
}

impl Gpu {
    /// Opens a device by its number, with a stream of its own; `name` is what it is called in errors.
    pub(super) fn open(name: &str, index: usize) -> Result<Self> {
        let driver = Driver::get().map_err(|error| Error::Device { device: name.into(), reason: error.to_string() })?;
        let what = "opening the device";
        let context = CudaContext::new(index).map_err(|error| refused(driver, name, what, error))?;
        let stream = context.new_stream().map_err(|error| refused(driver, name, what, error))?;
        Self::on(name, driver, stream)
    }

    /// A device on a caller's own stream.
    pub(super) fn of_stream(name: &str, stream: Arc<CudaStream>) -> Result<Self> {
        let driver = Driver::get().map_err(|error| Error::Device { device: name.into(), reason: error.to_string() })?;
        Self::on(name, driver, stream)
    }

    fn on(name: &str, driver: &'static Driver, stream: Arc<CudaStream>) -> Result<Self> {
        let context = stream.context().clone();
        let device = context.cu_device();
        let properties = || {
            let of = |attribute| driver.attribute(device, attribute);
            let mut memory = 0;
            // SAFETY: there is a place for the number.
            let code = unsafe { (driver.functions.cuDeviceTotalMem_v2)(&raw mut memory, device) };
            if code != 0 {
                return Err(driver.describe(code));
            }
            Ok(Properties {
                name: driver.device_name(device)?,
                capability: (
                    of(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    of(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ),
                multiprocessors: of(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                memory,
                shared: of(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
                l2_cache: of(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            })
        };
        let properties = properties().map_err(|reason| Error::Device { device: name.into(), reason })?;
        let title = format!("{name} ({})", properties.name);
        let gpu = Self { driver, title, context, stream, properties, staging: Mutex::default() };
        gpu.bound()?;
        Ok(gpu)
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.driver
    }

    /// The name and what the device is called, for errors.
    pub(super) fn title(&self) -> &str {
        &self.title
    }

    pub(super) fn properties(&self) -> &Properties {
        &self.properties
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Something that should not have happened.
    pub(super) fn broken(&self, reason: impl Into<String>) -> Error {
        Error::Device { device: self.title.clone(), reason: reason.into() }
    }

    /// What cudarc reports.
    pub(super) fn refused(&self, what: &str, error: DriverError) -> Error {
        refused(self.driver, &self.title, what, error)
    }

    fn check(&self, code: c_int, what: &str) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(failure(self.driver, &self.title, code, what)) }
    }

    /// The functions, to be called by this thread, on which the context is current from now on.
    fn bound(&self) -> Result<&'static Functions> {
        bind(self.driver, &self.context).map_err(|code| failure(self.driver, &self.title, code, "using the device"))
    }

    /// Bytes of memory that are free, and of all.
    pub(super) fn free_memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut all) = (0, 0);
        // SAFETY: there are places for both numbers.
        let code = unsafe { (self.bound()?.cuMemGetInfo_v2)(&raw mut free, &raw mut all) };
        self.check(code, "asking how much memory is free")?;
        Ok((free, all))
    }

    /// The address of so many new bytes, a multiple of 256; [`Error::OutOfMemory`] if there is no room.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut address = 0;
        // SAFETY: there is a place for the address.
        let code = unsafe { (self.bound()?.cuMemAlloc_v2)(&raw mut address, bytes) };
        if code == OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { device: self.title.clone(), bytes });
        }
        self.check(code, "allocating memory")?;
        Ok(address)
    }

    /// Frees what [`allocate`](Self::allocate) has returned.
    ///
    /// # Safety
    /// Nobody uses it any more, nor will what was launched.
    pub(super) unsafe fn free(&self, address: u64) -> Result<()> {
        // SAFETY: as the caller says.
        let code = unsafe { (self.bound()?.cuMemFree_v2)(address) };
        self.check(code, "freeing memory")
    }

    /// Copies from the host, in the stream's order. The source is free when this returns; a small one has not been
    /// waited for.
    ///
    /// # Safety
    /// There are so many bytes of the device's memory at `to`.
    pub(super) unsafe fn upload(&self, bytes: &[u8], to: u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let functions = self.bound()?;
        let stream = self.stream.cu_stream();
        let what = "copying to the device";
        if bytes.len() <= SLOT {
            let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
            // Where the host has no room for that, it waits instead.
            if let Ok(staged) = staging.stage(self, bytes) {
                // SAFETY: the caller says what is at `to`; what is staged stays until the event behind it.
                let code = unsafe { (functions.cuMemcpyHtoDAsync_v2)(to, staged, bytes.len(), stream) };
                return self.check(code, what);
            }
        }
        // SAFETY: the caller says what is at `to`; the source stays until it was waited for.
        let code = unsafe { (functions.cuMemcpyHtoDAsync_v2)(to, bytes.as_ptr().cast(), bytes.len(), stream) };
        let waited = self.synchronize();
        self.check(code, what)?;
        waited
    }

    /// Copies from the host whenever what is being recorded runs, for as long as what is returned is kept.
    ///
    /// # Safety
    /// There are so many bytes of the device's memory at `to`.
    pub(super) unsafe fn upload_again(&self, bytes: &[u8], to: u64) -> Result<Pinned> {
        let functions = self.bound()?;
        let mut memory = ptr::null_mut();
        // SAFETY: there is a place for the address.
        let code = unsafe { (functions.cuMemAllocHost_v2)(&raw mut memory, bytes.len().max(1)) };
        self.check(code, "allocating memory of the host")?;
        let pinned = Pinned { memory, driver: self.driver, context: self.context.clone() };
        // SAFETY: there is room for the bytes, and the caller says what is at `to`.
        let code = unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), memory.cast(), bytes.len());
            (functions.cuMemcpyHtoDAsync_v2)(to, memory, bytes.len(), self.stream.cu_stream())
        };
        self.check(code, "copying to the device")?;
        Ok(pinned)
    }

    /// Copies to the host, when everything before is done.
    ///
    /// # Safety
    /// There are so many bytes of the device's memory at `from`.
    pub(super) unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        if !bytes.is_empty() {
            let (functions, stream) = (self.bound()?, self.stream.cu_stream());
            // SAFETY: the caller says what is at `from`; the destination stays until it was waited for.
            let code =
                unsafe { (functions.cuMemcpyDtoHAsync_v2)(bytes.as_mut_ptr().cast(), from, bytes.len(), stream) };
            let waited = self.synchronize();
            self.check(code, "copying from the device")?;
            waited?;
        }
        Ok(())
    }

    /// Copies within the device, in the stream's order.
    ///
    /// # Safety
    /// There are so many bytes of the device's memory at both addresses, and they do not overlap.
    pub(super) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as the caller says.
        let code = unsafe { (self.bound()?.cuMemcpyDtoDAsync_v2)(to, from, bytes, self.stream.cu_stream()) };
        self.check(code, "copying on the device")
    }

    /// Sets every byte, in the stream's order.
    ///
    /// # Safety
    /// There are so many bytes of the device's memory.
    pub(super) unsafe fn set(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as the caller says.
        let code = unsafe { (self.bound()?.cuMemsetD8Async)(to, byte, bytes, self.stream.cu_stream()) };
        self.check(code, "setting memory")
    }

    /// Waits for everything on the stream. What has gone wrong since the last time is reported here at the latest.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as this.
        let code = unsafe { (self.bound()?.cuStreamSynchronize)(self.stream.cu_stream()) };
        self.check(code, "waiting for the device")
    }

    /// An event on this device, with which times can be taken if it is for that.
    pub(super) fn event(&self, timed: bool) -> Result<Event> {
        let mut raw = ptr::null_mut();
        let flags =
            if timed { sys::CUevent_flags::CU_EVENT_DEFAULT } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING };
        // SAFETY: there is a place for the event.
        let code = unsafe { (self.bound()?.cuEventCreate)(&raw mut raw, flags as c_uint) };
        self.check(code, "making an event")?;
        Ok(Event { raw, driver: self.driver, context: self.context.clone() })
    }

    /// Has an event happen when everything before on the stream is done.
    pub(super) fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both live, and are of one context.
        let code = unsafe { (self.bound()?.cuEventRecord)(event.raw, self.stream.cu_stream()) };
        self.check(code, "recording an event")
    }

    /// Waits until an event has happened; not at all if it was never recorded.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: it lives.
        let code = unsafe { (self.bound()?.cuEventSynchronize)(event.raw) };
        self.check(code, "waiting for the device")
    }

    /// Has this stream wait for everything that is on another one of the device so far.
    ///
    /// # Safety
    /// The other is a stream of this context, and alive.
    pub(super) unsafe fn follow(&self, other: sys::CUstream) -> Result<()> {
        let (event, functions) = (self.event(false)?, self.bound()?);
        // SAFETY: both live, as the caller says; the driver keeps an event until it has happened.
        unsafe {
            self.check((functions.cuEventRecord)(event.raw, other), "recording an event")?;
            let code = (functions.cuStreamWaitEvent)(self.stream.cu_stream(), event.raw, 0);
            self.check(code, "waiting for another stream")
        }
    }

    /// Seconds from one event to another, waiting for both.
    pub(super) fn seconds(&self, from: &Event, to: &Event) -> Result<f64> {
        let functions = self.bound()?;
        let mut milliseconds = 0.0;
        self.wait(from)?;
        self.wait(to)?;
        // SAFETY: there is a place for the number; both events live.
        let code = unsafe { (functions.cuEventElapsedTime)(&raw mut milliseconds, from.raw, to.raw) };
        self.check(code, "taking the time")?;
        Ok(f64::from(milliseconds) * 1e-3)
    }

    /// Loads what was compiled for this device.
    pub(super) fn load(&self, cubin: &[u8], entry: &str) -> Result<Function> {
        let functions = self.bound()?;
        let what = format!("loading `{entry}`");
        let name = CString::new(entry).map_err(|_| self.broken("a name with a zero in it"))?;
        // The driver reads how long an image is from its header: nothing too short for one reaches it.
        if cubin.len() < 64 {
            return Err(self.broken(format!("{what}: {} bytes are no module", cubin.len())));
        }
        let mut module = ptr::null_mut();
        // SAFETY: there is a place for the module, which does not need the image any more.
        let code = unsafe { (functions.cuModuleLoadData)(&raw mut module, cubin.as_ptr().cast()) };
        if code == OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { device: self.title.clone(), bytes: cubin.len() });
        }
        self.check(code, &what)?;
        let mut function = Function {
            module,
            raw: ptr::null_mut(),
            driver: self.driver,
            context: self.context.clone(),
            shared: AtomicU32::new(0),
        };
        // SAFETY: there is a place for the function; the module lives as long as it.
        let code = unsafe { (functions.cuModuleGetFunction)(&raw mut function.raw, module, name.as_ptr()) };
        self.check(code, &what)?;
        Ok(function)
    }

    /// Starts a kernel behind everything before. What goes wrong in it is reported later.
    ///
    /// # Safety
    /// The arguments are of the kernel's types, in its order and all of them; it stays within the memory at its
    /// addresses, which lives until it is done.
    pub(super) unsafe fn launch(&self, launch: &Launch<'_>, label: &str) -> Result<()> {
        let functions = self.bound()?;
        let Launch { function, grid: [x, y, z], threads, shared, arguments } = *launch;
        if shared > function.shared.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = c_int::try_from(shared).unwrap_or(c_int::MAX);
            // SAFETY: the function lives.
            let code = unsafe { (functions.cuFuncSetAttribute)(function.raw, attribute as c_int, bytes) };
            self.check(code, label)?;
            function.shared.fetch_max(shared, Ordering::Relaxed);
        }
        // The driver copies of each as many bytes as the kernel says.
        let pointer = |value: &Value| match value {
            Value::Word(word) => ptr::from_ref(word).cast::<c_void>().cast_mut(),
            Value::TensorMap(map) => ptr::from_ref(map).cast::<c_void>().cast_mut(),
        };
        let mut few = [ptr::null_mut(); 32];
        let mut many: Vec<*mut c_void>;
        let pointers = if let Some(pointers) = few.get_mut(..arguments.len()) {
            for (place, value) in pointers.iter_mut().zip(arguments) {
                *place = pointer(value);
            }
            pointers
        } else {
            many = arguments.iter().map(pointer).collect();
            many.as_mut_slice()
        };
        // SAFETY: function and stream live; there are the kernel's arguments, as the caller says, and they are only
        // read. A number is in the low bytes of its word: every host of CUDA is little-endian.
        let code = unsafe {
            let (stream, arguments) = (self.stream.cu_stream(), pointers.as_mut_ptr());
            (functions.cuLaunchKernel)(function.raw, x, y, z, threads, 1, 1, shared, stream, arguments, ptr::null_mut())
        };
        self.check(code, label)
    }

    /// Describes a tensor to the tensor memory accelerator.
    pub(super) fn tensor_map(&self, tiled: &Tiled<'_>) -> Result<TensorMap> {
        let Tiled { data_type, address, extents, strides, tile, swizzle } = *tiled;
        let rank = extents.len();
        if !(1..=5).contains(&rank) || strides.len() + 1 != rank || tile.len() != rank {
            return Err(self.broken(format!("{rank} extents, {} strides, {} of a tile", strides.len(), tile.len())));
        }
        let mut map = TensorMap([0; 16]);
        // The driver reads one stride even where there is none to read.
        let mut rest = [0; 5];
        rest[..strides.len()].copy_from_slice(strides);
        // SAFETY: there is a place for the map, and as many numbers as the rank says; the address is not read.
        let code = unsafe {
            (self.bound()?.cuTensorMapEncodeTiled)(
                (&raw mut map).cast(),
                data_type as c_uint,
                rank as c_uint,
                ptr::with_exposed_provenance_mut(address as usize),
                extents.as_ptr(),
                rest.as_ptr(),
                tile.as_ptr(),
                [1; 5].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE as c_uint,
                swizzle as c_uint,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B as c_uint,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE as c_uint,
            )
        };
        self.check(code, &format!("describing a tensor of {extents:?} by {tile:?}"))?;
        Ok(map)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What is staged must not go before it was copied.
        let _ = self.synchronize();
    }
}

/// The functions, to be called by this thread, on which the context is current from now on.
fn bind<'a>(driver: &'a Driver, context: &CudaContext) -> std::result::Result<&'a Functions, c_int> {
    let functions = &driver.functions;
    let mut current = ptr::null_mut();
    // SAFETY: there is a place for the context, and the other one lives.
    let code = unsafe {
        match (functions.cuCtxGetCurrent)(&raw mut current) {
            0 if current == context.cu_ctx() => 0,
            0 => (functions.cuCtxSetCurrent)(context.cu_ctx()),
            code => code,
        }
    };
    if code == 0 { Ok(functions) } else { Err(code) }
}

/// A point on a stream.
pub(super) struct Event {
    raw: sys::CUevent,
    driver: &'static Driver,
    context: Arc<CudaContext>,
}

// SAFETY: every thread may use the driver's handles.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Event")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(functions) = bind(self.driver, &self.context) {
            // SAFETY: nobody uses it any more; the driver keeps it until it has happened.
            unsafe { (functions.cuEventDestroy_v2)(self.raw) };
        }
    }
}

/// A kernel on the device, with its module.
pub(super) struct Function {
    module: sys::CUmodule,
    raw: sys::CUfunction,
    driver: &'static Driver,
    context: Arc<CudaContext>,
    /// Bytes of dynamic shared memory that it has been allowed.
    shared: AtomicU32,
}

// SAFETY: every thread may use the driver's handles.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Function")
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        if let Ok(functions) = bind(self.driver, &self.context) {
            // SAFETY: nobody launches it any more; the driver waits for what runs.
            unsafe { (functions.cuModuleUnload)(self.module) };
        }
    }
}

/// Memory of the host that stays where it is.
pub(super) struct Pinned {
    memory: *mut c_void,
    driver: &'static Driver,
    context: Arc<CudaContext>,
}

// SAFETY: the memory is nobody else's.
unsafe impl Send for Pinned {}
// SAFETY: as above; nobody looks at it.
unsafe impl Sync for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(functions) = bind(self.driver, &self.context) {
            // SAFETY: who drops it has waited for what reads it.
            unsafe { (functions.cuMemFreeHost)(self.memory) };
        }
    }
}

/// Bytes that are staged before an event.
const SLOT: usize = 1 << 20;
/// How many such slots there are.
const SLOTS: usize = 4;

/// Memory of the host that the device copies from while the host goes on.
#[derive(Default)]
struct Staging {
    slots: Vec<Slot>,
    /// Which one is being filled, and how far.
    current: usize,
    used: usize,
}

struct Slot {
    memory: *mut c_void,
    /// When all of it was copied.
    copied: Event,
}

// SAFETY: the memory is nobody else's.
unsafe impl Send for Slot {}

impl Slot {
    fn new(gpu: &Gpu) -> Result<Self> {
        let copied = gpu.event(false)?;
        let mut memory = ptr::null_mut();
        // SAFETY: there is a place for the address.
        let code = unsafe { (gpu.bound()?.cuMemAllocHost_v2)(&raw mut memory, SLOT) };
        gpu.check(code, "allocating memory of the host")?;
        Ok(Self { memory, copied })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Ok(functions) = bind(self.copied.driver, &self.copied.context) {
            // SAFETY: the device that uses it waits before it goes.
            unsafe { (functions.cuMemFreeHost)(self.memory) };
        }
    }
}

impl Staging {
    /// Copies bytes, of which there is room in a slot, to where the device can read them.
    fn stage(&mut self, gpu: &Gpu, bytes: &[u8]) -> Result<*const c_void> {
        if self.slots.is_empty() {
            self.slots.push(Slot::new(gpu)?);
        }
        if self.used + bytes.len() > SLOT {
            gpu.record(&self.slots[self.current].copied)?;
            let next = (self.current + 1) % SLOTS;
            if next == self.slots.len() {
                self.slots.push(Slot::new(gpu)?);
            }
            gpu.wait(&self.slots[next].copied)?;
            (self.current, self.used) = (next, 0);
        }
        // SAFETY: there is room, and what was in it has been copied.
        let place = unsafe {
            let place = self.slots[self.current].memory.cast::<u8>().add(self.used);
            ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
            place
        };
        self.used = (self.used + bytes.len()).next_multiple_of(64);
        Ok(place.cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        match Driver::get() {
            Err(Unavailable::Driver) => assert!(Gpu::open("cuda:0", 0).unwrap_err().to_string().contains("no NVIDIA")),
            Err(error) => panic!("{error}"),
            Ok(driver) => assert!(driver.version() >= (12, 0)),
        }
        let old = Unavailable::Version { found: 11_040, needed: OLDEST };
        assert!(old.to_string().starts_with("the NVIDIA driver is for CUDA 11.4, at least 12.0 is needed"));
    }

    /// A device, where there is one.
    fn gpu() -> Option<Gpu> {
        Driver::get().ok().filter(|driver| driver.devices() > 0)?;
        let gpu = Gpu::open("cuda:0", 0).unwrap();
        Some(gpu)
    }

    #[test]
    fn bytes_go_to_the_device_and_come_back() {
        let Some(gpu) = gpu() else { return };
        assert!(gpu.properties().capability >= (5, 0) && gpu.properties().multiprocessors > 0);
        let most = 3 * SLOT;
        let (a, b) = (gpu.allocate(most).unwrap(), gpu.allocate(most).unwrap());
        assert!(a % 256 == 0 && b % 256 == 0);
        let mut found = vec![0; most];
        for round in 0..20usize {
            let bytes = [1, 100, SLOT - 3, SLOT, SLOT + 1, most][round % 6];
            let expected: Vec<u8> = (0..bytes).map(|i| (i * 7 + round) as u8).collect();
            // SAFETY: there are so many bytes at both addresses.
            unsafe {
                gpu.upload(&expected, a).unwrap();
                gpu.copy(a, b, bytes).unwrap();
                gpu.set(a, 3, bytes).unwrap();
                gpu.download(b, &mut found[..bytes]).unwrap();
            }
            assert!(found[..bytes] == expected, "{bytes}");
        }
        let (from, to) = (gpu.event(true).unwrap(), gpu.event(true).unwrap());
        gpu.record(&from).unwrap();
        gpu.record(&to).unwrap();
        assert!(gpu.seconds(&from, &to).unwrap() >= 0.0);
        // SAFETY: nobody uses them any more.
        unsafe {
            gpu.free(a).unwrap();
            gpu.free(b).unwrap();
        }
        assert!(matches!(gpu.allocate(1 << 50), Err(Error::OutOfMemory { bytes, .. }) if bytes == 1 << 50));
        assert!(gpu.load(&[0; 100], "forward").is_err());
        assert!(matches!(Gpu::open("cuda:99", 99), Err(Error::Device { .. })));
    }
}
