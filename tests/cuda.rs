//! CUDA as users of the program and of the library meet it, on a GPU that is emulated.
//!
//! `tests/cuda/build` makes a driver and a compiler that run kernels on the processor. A process finds them by
//! LD_LIBRARY_PATH, so everything here runs in processes of its own, what is tested through the library too. Where they
//! cannot be built the tests pass and say that they were skipped, unless NEARFAR_TEST_CUDA says that they have to run.
#![cfg(all(feature = "cli", feature = "cuda"))]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Instant;
use std::{env, fs};

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;

/// Variables of a process.
type Variables<'a> = &'a [(&'a str, &'a str)];

/// The emulated libraries.
struct Emulation {
    folder: PathBuf,
}

/// They, if this machine can build them.
fn emulation() -> Option<&'static Emulation> {
    static EMULATION: LazyLock<Result<Emulation, String>> = LazyLock::new(Emulation::build);
    match &*EMULATION {
        Ok(emulation) => Some(emulation),
        Err(reason) if env::var_os("NEARFAR_TEST_CUDA").is_none() => {
            println!("skipped: {reason}");
            None
        }
        Err(reason) => panic!("{reason}"),
    }
}

/// What a process came to.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    /// What it printed, as nothing went wrong and nothing was to be said about it.
    #[track_caller]
    fn stdout(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{}", self.stdout);
        self.stdout
    }

    /// What it said went wrong: one line, with all of this in it.
    #[track_caller]
    fn refused(self, expected: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:?}");
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert!(lines.len() == 1 && lines[0].starts_with("error: "), "{self:?}");
        for expected in expected {
            assert!(self.stderr.contains(expected), "no `{expected}` in: {}", self.stderr);
        }
    }
}

fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

impl Emulation {
    fn build() -> Result<Self, String> {
        if !cfg!(target_os = "linux") {
            return Err("the emulated GPU is for Linux".into());
        }
        let compiler = env::var("CXX").unwrap_or_else(|_| "g++".into());
        if Command::new(&compiler).arg("--version").output().is_err() {
            return Err(format!("the emulated GPU needs a C++ compiler, and there is no {compiler}"));
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/build");
        let built = Command::new("sh").arg(script).arg(&folder).output().map_err(|error| error.to_string())?;
        if !built.status.success() {
            return Err(format!("tests/cuda/build: {}", String::from_utf8_lossy(&built.stderr)));
        }
        // Kernels of another day would not be compiled again after a change of the emulation.
        let _ = fs::remove_dir_all(folder.join("cache"));
        Ok(Self { folder })
    }

    /// A process with the emulated GPU alone. Compiled kernels are kept for others of this test, and what the emulated
    /// compiler made of its exact input for those of other days.
    fn command(&self, program: impl AsRef<OsStr>, variables: Variables<'_>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("NEARFAR_")) {
            command.env_remove(name);
        }
        command
            .env("LD_LIBRARY_PATH", &self.folder)
            .env("NEARFAR_CACHE", self.folder.join("cache"))
            .env("NEARFAR_EMULATED_CACHE", self.folder.join("compiled"))
            .envs(["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].map(|name| (name, "/nonexistent")))
            .envs(variables.iter().copied());
        command
    }

    /// Runs the program.
    fn nearfar(&self, arguments: &str, variables: Variables<'_>) -> Ran {
        ran(self.command(cargo_bin!("nearfar"), variables).args(arguments.split_whitespace()))
    }

    /// Rows of the conformance table on a device; all of them if no part of their names is given.
    #[track_caller]
    fn holds(&self, device: &str, only: &str, variables: Variables<'_>) {
        let begin = Instant::now();
        let only = if only.is_empty() { String::new() } else { format!("--only {only}") };
        let found = self.nearfar(&format!("check --device {device} {only}"), variables);
        assert_eq!((found.code, found.stderr.as_str()), (Some(0), ""), "{device} {only} {variables:?}");
        let (stdout, seconds) = (found.stdout, begin.elapsed().as_secs_f64());
        let summary = stdout.lines().find(|line| line.ends_with(" rows hold, 0 fail")).expect(&stdout);
        println!("{device} {only} {variables:?}: {summary}, {seconds:.1} s");
    }

    /// Runs an ignored test of this file in a process that finds the emulated GPU.
    #[track_caller]
    fn inside(&self, test: &str, variables: Variables<'_>) {
        let mut command = self.command(env::current_exe().unwrap(), variables);
        command.env("NEARFAR_TEST_CUDA", "1").args(["--ignored", "--exact", "--nocapture", &format!("library::{test}")]);
        let found = ran(&mut command);
        assert!(found.code == Some(0) && found.stdout.contains("1 passed"), "{}{}", found.stdout, found.stderr);
        print!("{}", found.stdout);
    }
}

/// A folder in which names of libraries are no libraries, and others are those of the emulation.
fn libraries(emulation: &Emulation, broken: &[&str], emulated: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in broken {
        fs::write(folder.path().join(name), "no library").unwrap();
    }
    for name in emulated {
        fs::copy(emulation.folder.join(name), folder.path().join(name)).unwrap();
    }
    folder
}

const DRIVER: [&str; 2] = ["libcuda.so", "libcuda.so.1"];
const COMPILER: [&str; 4] = ["libnvrtc.so", "libnvrtc.so.11.2", "libnvrtc.so.12", "libnvrtc.so.13"];

/// A library with a text in C.
fn library(folder: &Path, name: &str, text: &str) -> String {
    let (source, library) = (folder.join("library.c"), folder.join(name));
    fs::write(&source, text).unwrap();
    let compiler = env::var("CXX").unwrap_or_else(|_| "g++".into());
    let compiled = Command::new(compiler).args(["-x", "c", "-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(compiled.unwrap().success());
    library.to_str().unwrap().to_owned()
}

#[test]
fn the_gpu_is_listed_with_what_it_is() {
    let Some(emulation) = emulation() else { return };
    let listing: Value = serde_json::from_str(&emulation.nearfar("devices --json", &[]).stdout()).unwrap();
    let devices = listing["devices"].as_array().unwrap();
    let names: Vec<&str> = devices.iter().map(|device| device["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["cpu", "cuda:0"]);
    assert_eq!(devices[1]["description"], "Emulated GPU, compute capability 9.0, driver for CUDA 12.8");
    let properties = devices[1]["properties"].as_object().unwrap();
    for (name, expected) in [
        ("multiprocessors", "132"),
        ("memory", "16384 MiB"),
        ("shared memory of a block", "227 KiB"),
        ("L2 cache", "50 MiB"),
        ("compiler", "NVRTC 12.8 for sm_90a"),
    ] {
        assert_eq!(properties[name], expected, "{name}");
    }
    assert!(properties.contains_key("products"));
    assert_eq!(devices[1]["unsupported"].as_array().unwrap().len(), 0, "{listing}");
    let text = emulation.nearfar("devices", &[("NEARFAR_EMULATED_ARCHITECTURE", "7.5")]).stdout();
    assert!(text.contains("cuda:0  Emulated GPU, compute capability 7.5") && text.contains("for sm_75"), "{text}");
    let support = emulation.nearfar("devices --support", &[]).stdout();
    let (heading, operations) = (support.lines().next().unwrap(), listing["operations"].as_array().unwrap());
    let column = heading.split('|').position(|cell| cell.trim() == "cuda").expect(heading);
    let cells: Vec<&str> = support.lines().skip(2).map(|line| line.split('|').nth(column).unwrap().trim()).collect();
    assert!(cells.len() == operations.len() && cells.iter().all(|cell| *cell == "yes"), "{support}");
    assert_eq!(emulation.nearfar("devices --json", &[("NEARFAR_EMULATED_DEVICES", "3")]).stdout().matches("cuda:").count(), 3);
}

#[test]
fn the_whole_table_holds() {
    let Some(emulation) = emulation() else { return };
    emulation.holds("cuda", "", &[]);
}

/// Parts of the table where something else runs, or in another order.
#[test]
fn other_ways_of_computing_hold() {
    let Some(emulation) = emulation() else { return };
    for name in ["matmul", "samtone/", "gte/", "decoupled/"] {
        emulation.holds("cuda,plain", name, &[]);
    }
    for name in ["samtone/", "infonce/", "symmetric/", "hinge/"] {
        emulation.holds("cuda,workspace=3000", name, &[]);
    }
    emulation.holds("cuda,workspace=0", "samtone/33x17", &[]);
    for architecture in ["7.5", "8.0", "10.0"] {
        for name in ["matmul", "samtone/", "attention"] {
            emulation.holds("cuda", name, &[("NEARFAR_EMULATED_ARCHITECTURE", architecture)]);
        }
    }
    // Threads and blocks take turns in another order, and few multiprocessors want larger tiles.
    for name in ["layer_norm", "samtone/", "decoupled/", "sum/"] {
        emulation.holds("cuda", name, &[("NEARFAR_EMULATED_SEED", "7"), ("NEARFAR_EMULATED_WORKERS", "3")]);
    }
    for name in ["matmul", "samtone/", "gte/"] {
        emulation.holds("cuda", name, &[("NEARFAR_EMULATED_MULTIPROCESSORS", "2")]);
    }
}

/// With unmapped pages behind all memory, and kernels compiled with checks of their arrays and of what is aligned.
#[test]
fn kernels_stay_within_their_memory() {
    let Some(emulation) = emulation() else { return };
    let cache = emulation.folder.join("cache/guards");
    let guards = [("NEARFAR_EMULATED_GUARDS", "1"), ("NEARFAR_CACHE", cache.to_str().unwrap())];
    for name in ["matmul", "layer_norm", "attention", "embedding", "pooling", "samtone/", "gte/33", "cosent"] {
        emulation.holds("cuda", name, &guards);
    }
}

#[test]
fn what_is_missing_is_named() {
    let Some(emulation) = emulation() else { return };
    let refused = |device: &str, variables: Variables<'_>, expected: &[&str]| {
        emulation.nearfar(&format!("check --only clamp --device {device}"), variables).refused(expected);
    };
    let path = |folder: &tempfile::TempDir| folder.path().to_str().unwrap().to_owned();

    // No driver, or none that can be used.
    let none = libraries(emulation, &DRIVER, &COMPILER[2..3]);
    refused("cuda", &[("LD_LIBRARY_PATH", &path(&none))], &["cuda:0: no NVIDIA driver was found (libcuda.so.1"]);
    let old = [("NEARFAR_EMULATED_DRIVER_VERSION", "11080")];
    refused("cuda", &old, &["cuda:0: the NVIDIA driver is for CUDA 11.8, at least 12.0 is needed", "newer driver"]);
    let lacking = libraries(emulation, &[], &COMPILER[2..3]);
    library(lacking.path(), "libcuda.so", "int cuDriverGetVersion(int *version) { *version = 12080; return 0; }");
    refused("cuda", &[("LD_LIBRARY_PATH", &path(&lacking))], &["the NVIDIA driver lacks cuInit, ", "cuLaunchKernel"]);
    library(lacking.path(), "libcuda.so", "int cuDriverGetVersion(int *version) { return 34; }");
    refused("cuda", &[("LD_LIBRARY_PATH", &path(&lacking))], &["the NVIDIA driver cannot be used", "error 34"]);

    // No compiler, or none that can be used.
    let without = path(&libraries(emulation, &COMPILER, &DRIVER)).into_boxed_str();
    let without = libraries_kept(emulation, without);
    let compiler = ["cuda:0 (Emulated GPU): the CUDA compiler NVRTC was not found", "libnvrtc.so.12", "NEARFAR_NVRTC"];
    refused("cuda", &[("LD_LIBRARY_PATH", &without)], &compiler);
}
