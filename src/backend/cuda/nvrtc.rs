//! NVRTC, the compiler of CUDA as a library, which is looked for when it is needed.
//!
//! It compiles without a device and without a driver. `NEARFAR_NVRTC` names the library where it is not found by itself.

use std::error::Error;
use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use super::driver::{Driver, functions};

functions! { Functions:
    nvrtcVersion(*mut c_int, *mut c_int);
    nvrtcGetNumSupportedArchs(*mut c_int);
    nvrtcGetSupportedArchs(*mut c_int);
    nvrtcCreateProgram(*mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    nvrtcDestroyProgram(*mut *mut c_void);
    nvrtcCompileProgram(*mut c_void, c_int, *const *const c_char);
    nvrtcGetCUBINSize(*mut c_void, *mut usize);
    nvrtcGetCUBIN(*mut c_void, *mut c_char);
    nvrtcGetProgramLogSize(*mut c_void, *mut usize);
    nvrtcGetProgramLog(*mut c_void, *mut c_char);
}

/// There is no NVRTC here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the CUDA compiler NVRTC was not found: {}; it is part of the CUDA toolkit and of the Python package \
     nvidia-cuda-nvrtc, and NEARFAR_NVRTC can name its library",
    reasons.join(", ")
)]
pub(super) struct Missing {
    /// What became of each name under which it was looked for.
    pub(super) reasons: Vec<String>,
}

/// What came of a compilation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compiled {
    /// What the driver loads.
    pub(super) cubin: Vec<u8>,
    /// What the compiler says beside.
    pub(super) log: String,
}

/// The compiler.
pub(super) struct Nvrtc {
    functions: Functions,
    version: (i32, i32),
    supported: Vec<u32>,
    /// Open as long as its functions may be called.
    _library: Library,
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nvrtc({}.{})", self.version.0, self.version.1)
    }
}

/// The names of the library, the best first: what the driver is of comes before what is older or newer.
fn candidates(driver: Option<i32>) -> Vec<String> {
    let name = |major: i32| match (cfg!(windows), major) {
        (true, 11) => "nvrtc64_112_0.dll".to_owned(),
        (true, _) => format!("nvrtc64_{major}0_0.dll"),
        (false, 11) => "libnvrtc.so.11.2".to_owned(),
        (false, _) => format!("libnvrtc.so.{major}"),
    };
    let mut majors = vec![13, 12, 11];
    majors.sort_by_key(|&major| Some(major) != driver);
    let plain = if cfg!(windows) { "nvrtc64.dll" } else { "libnvrtc.so" };
    std::iter::once(plain.to_owned()).chain(majors.into_iter().map(name)).collect()
}

impl Nvrtc {
    /// The compiler of this machine, opened once.
    pub(super) fn load() -> Result<&'static Self, Missing> {
        static NVRTC: OnceLock<Result<Nvrtc, Missing>> = OnceLock::new();
        NVRTC.get_or_init(Self::find).as_ref().map_err(Clone::clone)
    }

    fn find() -> Result<Self, Missing> {
        let named = std::env::var("NEARFAR_NVRTC").ok().filter(|path| !path.is_empty());
        let looked_for = match named {
            Some(path) => vec![path],
            None => candidates(Driver::get().ok().map(|driver| driver.version().0)),
        };
        let mut reasons = Vec::new();
        for name in &looked_for {
            match Self::open(name) {
                Ok(found) => return Ok(found),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(Missing { reasons })
    }

    fn open(name: &str) -> Result<Self, String> {
        // SAFETY: loading NVRTC runs its initialisation, which is made for that.
        let library = unsafe { Library::new(name) }.map_err(|error| {
            // The system's own words name the library, or one that it needs in turn.
            let words = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            if words.contains(name) { words } else { format!("{name}: {words}") }
        })?;
        // SAFETY: these are declared as in NVRTC's header; the library is kept.
        let functions =
            unsafe { Functions::load(&library) }.map_err(|missing| format!("{name} lacks {}", missing.join(", ")))?;
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: there are places for the numbers.
        let codes = unsafe {
            [
                (functions.nvrtcVersion)(&raw mut major, &raw mut minor),
                (functions.nvrtcGetNumSupportedArchs)(&raw mut count),
            ]
        };
        let mut supported = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: there is room for as many as it has said.
        let code = unsafe { (functions.nvrtcGetSupportedArchs)(supported.as_mut_ptr()) };
        if codes != [0, 0] || code != 0 {
            return Err(format!("{name} does not say what it can do"));
        }
        let supported = supported.into_iter().filter_map(|number| u32::try_from(number).ok()).collect();
        Ok(Self { functions, version: (major, minor), supported, _library: library })
    }

    /// (13, 0)
    pub(super) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The architectures that it compiles for: 75, 80, 90, …
    pub(super) fn supported(&self) -> Vec<u32> {
        self.supported.clone()
    }

    /// Compiles a text, which includes headers by their names, or says what is wrong with it.
    pub(super) fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        options: &[String],
    ) -> Result<Compiled, String> {
        let owned = |text: &str| CString::new(text).map_err(|_| format!("{name}: a text with a zero in it"));
        let (name, source) = (owned(name)?, owned(source)?);
        let names = headers.iter().map(|(name, _)| owned(name)).collect::<Result<Vec<_>, _>>()?;
        let texts = headers.iter().map(|(_, text)| owned(text)).collect::<Result<Vec<_>, _>>()?;
        let options = options.iter().map(|option| owned(option)).collect::<Result<Vec<_>, _>>()?;
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (names, texts, option_pointers) = (pointers(&names), pointers(&texts), pointers(&options));
        let mut program = Program { nvrtc: self, raw: ptr::null_mut() };
        // SAFETY: there is a place for the program, and there are as many names and texts as is said, which end with
        // zeros.
        let code = unsafe {
            let (texts_at, names_at) = (texts.as_ptr(), names.as_ptr());
            let count = headers.len() as c_int;
            (self.functions.nvrtcCreateProgram)(
                &raw mut program.raw,
                source.as_ptr(),
                name.as_ptr(),
                count,
                texts_at,
                names_at,
            )
        };
        self.check(code, "nvrtcCreateProgram")?;
        // SAFETY: the program lives, and there are as many options as is said.
        let code = unsafe {
            (self.functions.nvrtcCompileProgram)(program.raw, options.len() as c_int, option_pointers.as_ptr())
        };
        let Functions { nvrtcGetProgramLogSize: log_size, nvrtcGetProgramLog: log, .. } = self.functions;
        let log = program.bytes(log_size, log, "nvrtcGetProgramLog");
        let log = log.map(|bytes| String::from_utf8_lossy(&bytes).trim_matches(['\0', '\n', ' ']).to_owned());
        if code != 0 {
            let log = log.unwrap_or_default();
            return Err(if log.is_empty() { format!("NVRTC reports error {code} and no more") } else { log });
        }
        let Functions { nvrtcGetCUBINSize: size, nvrtcGetCUBIN: get, .. } = self.functions;
        let cubin = program.bytes(size, get, "nvrtcGetCUBIN")?;
        if cubin.is_empty() {
            return Err("NVRTC has made nothing of it".into());
        }
        Ok(Compiled { cubin, log: log? })
    }

    fn check(&self, code: c_int, what: &str) -> Result<(), String> {
        if code == 0 { Ok(()) } else { Err(format!("{what} reports error {code}")) }
    }
}

/// A text that is being compiled.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    raw: *mut c_void,
}

impl Program<'_> {
    /// Something of the program of which one function says how long it is and another what.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int,
        get: unsafe extern "C" fn(*mut c_void, *mut c_char) -> c_int,
        what: &str,
    ) -> Result<Vec<u8>, String> {
        let mut length = 0;
        // SAFETY: the program lives; there is a place for the number, then room for so many bytes.
        unsafe {
            self.nvrtc.check(size(self.raw, &raw mut length), what)?;
            let mut bytes = vec![0; length];
            self.nvrtc.check(get(self.raw, bytes.as_mut_ptr().cast()), what)?;
            Ok(bytes)
        }
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: it was made by this library, and nobody uses it any more.
            unsafe { (self.nvrtc.functions.nvrtcDestroyProgram)(&raw mut self.raw) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_looked_for_is_named() {
        if cfg!(not(windows)) {
            let names = ["libnvrtc.so", "libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so.11.2"];
            assert_eq!(candidates(Some(12)), names);
            assert_eq!(candidates(None)[1], "libnvrtc.so.13");
        }
        let reason = Nvrtc::open("no-such-library").unwrap_err();
        assert!(reason.contains("no-such-library") && reason.len() > 20, "{reason}");
        let missing = Missing { reasons: vec![reason.clone(), "another reason".into()] }.to_string();
        assert!(missing.contains(&reason) && missing.contains("another reason; it is part of"), "{missing}");
    }

    #[test]
    fn texts_are_compiled_or_explained() {
        // Where there is no compiler there is nothing to test.
        let Ok(nvrtc) = Nvrtc::load() else { return };
        assert!(nvrtc.version() >= (11, 2));
        let newest = nvrtc.supported().into_iter().max().unwrap();
        let options = [format!("--gpu-architecture=sm_{newest}"), "--std=c++17".to_owned()];
        let headers = [("two.cuh", "#define TWO 2")];
        let text = "#include \"two.cuh\"\nextern \"C\" __global__ void two(int *a) { *a = TWO; }";
        let compiled = nvrtc.compile("two.cu", text, &headers, &options).unwrap();
        assert!(!compiled.cubin.is_empty());
        let error = nvrtc.compile("three.cu", &text.replace("TWO", "THREE"), &headers, &options).unwrap_err();
        assert!(error.contains("three.cu") && error.contains("THREE"), "{error}");
        let error = nvrtc.compile("two.cu", text, &headers, &["--gpu-architecture=sm_1".into()]).unwrap_err();
        assert!(!error.is_empty());
    }
}
