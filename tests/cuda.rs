//! CUDA as users of the program and of the library meet it, on a GPU that is emulated.
//!
//! `tests/cuda/build` makes a driver and a compiler that run kernels on the processor. A process finds them by
//! LD_LIBRARY_PATH, so everything here runs in processes of its own, what is tested through the library too. Where they
//! cannot be built the tests pass and say that they were skipped, unless NEARFAR_TEST_CUDA says that they have to run.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "common/products.rs"]
mod products;

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
        command.env("NEARFAR_TEST_CUDA", "1").args([
            "--ignored",
            "--exact",
            "--nocapture",
            &format!("library::{test}"),
        ]);
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
    let compiled =
        Command::new(compiler).args(["-x", "c", "-shared", "-fPIC", "-o"]).args([&library, &source]).status();
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
    assert_eq!(
        emulation.nearfar("devices --json", &[("NEARFAR_EMULATED_DEVICES", "3")]).stdout().matches("cuda:").count(),
        3
    );
}

/// What takes longest, so it is called what is run first.
#[test]
fn all_rows_of_the_table_hold() {
    let Some(emulation) = emulation() else { return };
    emulation.holds("cuda", "", &[]);
}

/// Parts of the table where something else runs, or in another order.
#[test]
fn other_ways_of_computing_hold() {
    let Some(emulation) = emulation() else { return };
    for name in ["matmul", "samtone/", "gte/33"] {
        emulation.holds("cuda,plain", name, &[]);
    }
    // What is exact is left to ordinary arithmetic where matrices are as small as these.
    for name in ["matmul", "samtone/", "gte/33", "symmetric/"] {
        emulation.holds("cuda,tensor-cores", name, &[]);
    }
    for device in ["cuda,bf16", "cuda,f16", "cuda,bf16,wgmma", "cuda,f16,wgmma"] {
        for name in ["matmul", "samtone/", "gte/33"] {
            emulation.holds(device, name, &[]);
        }
    }
    for name in ["samtone/", "infonce/", "symmetric/", "hinge/"] {
        emulation.holds("cuda,workspace=3000", name, &[]);
    }
    emulation.holds("cuda,workspace=0", "samtone/33x17", &[]);
    emulation.holds("cuda:2", "clamp", &[("NEARFAR_EMULATED_DEVICES", "3")]);
    // Without tensor cores, and with those that are not Hopper's.
    for (architecture, device) in [("7.5", "cuda"), ("8.0", "cuda,tensor-cores"), ("10.0", "cuda,f16")] {
        for name in ["/33x65x130", "/3x5x2500", "samtone/33x17", "attention"] {
            emulation.holds(device, name, &[("NEARFAR_EMULATED_ARCHITECTURE", architecture)]);
        }
    }
    // Threads and blocks take turns in another order, and few multiprocessors want larger tiles.
    for name in ["layer_norm", "samtone/", "decoupled/", "sum/"] {
        emulation.holds("cuda", name, &[("NEARFAR_EMULATED_SEED", "7"), ("NEARFAR_EMULATED_WORKERS", "3")]);
    }
    for name in ["matmul", "samtone/", "gte/33"] {
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
    // A caller's memory may end anywhere.
    emulation.inside("a_callers_stream_and_memory_are_used_as_they_are", &guards);
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
    let without = libraries(emulation, &COMPILER, &DRIVER);
    let compiler = ["cuda:0 (Emulated GPU): the CUDA compiler NVRTC was not found", "libnvrtc.so.12", "NEARFAR_NVRTC"];
    refused("cuda", &[("LD_LIBRARY_PATH", &path(&without))], &compiler);
    let missing = [("NEARFAR_NVRTC", "/missing/libnvrtc.so")];
    refused("cuda", &missing, &["NVRTC was not found: /missing/libnvrtc.so: cannot open", "No such file"]);
    let poor = library(without.path(), "poor.so", "int nvrtcVersion(int *major, int *minor) { return 0; }");
    refused("cuda", &[("NEARFAR_NVRTC", &poor)], &["poor.so lacks nvrtcGetNumSupportedArchs, ", "nvrtcGetCUBIN, "]);
    let old = [("NEARFAR_EMULATED_ARCHITECTURE", "3.5")];
    refused("cuda", &old, &["has compute capability 3.5", "a CUDA toolkit that is older is needed"]);
    let broken = [("NEARFAR_EMULATED_COMPILER", "/missing/g++"), ("NEARFAR_CACHE", ""), ("NEARFAR_EMULATED_CACHE", "")];
    let found = emulation.nearfar("check --only clamp --device cuda", &broken);
    assert!(found.code == Some(1) && found.stderr.contains("cannot be compiled: /missing/g++"), "{found:?}");

    // No such device.
    refused("cuda", &[("NEARFAR_EMULATED_DEVICES", "0")], &["cuda:0: the NVIDIA driver finds no GPU here"]);
    refused("cuda:7", &[], &["there is no device `cuda:7` here; available: cpu, cuda:0"]);
    refused("cuda:4294967296", &[], &["there is no device `cuda:4294967296` here"]);
    refused("cuda:x", &[], &["there is no device `cuda:x` here; available: cpu, cuda:0"]);
    refused("cuda,fast", &[], &["`fast` is none of: exact, plain", "workspace=VALUES"]);
    refused("cuda,workspace=-1", &[], &["`workspace=-1` is none of"]);
}

#[test]
fn auto_is_the_gpu_or_says_why_not() {
    let Some(emulation) = emulation() else { return };
    let device = |stdout: &str| serde_json::from_str::<Value>(stdout).unwrap()["device"].as_str().unwrap().to_owned();
    let automatic = |variables: Variables<'_>| emulation.nearfar("check --only clamp --device auto --json", variables);
    assert_eq!(device(&automatic(&[]).stdout()), "cuda:0");
    // A machine without a driver or a GPU has nothing to say about it.
    let none = libraries(emulation, &DRIVER, &[]);
    assert_eq!(device(&automatic(&[("LD_LIBRARY_PATH", none.path().to_str().unwrap())]).stdout()), "cpu");
    assert_eq!(device(&automatic(&[("NEARFAR_EMULATED_DEVICES", "0")]).stdout()), "cpu");
    for (variable, expected) in [
        (("NEARFAR_NVRTC", "/missing/libnvrtc.so"), "cuda:0 (Emulated GPU): the CUDA compiler NVRTC was not found"),
        (("NEARFAR_EMULATED_DRIVER_VERSION", "11080"), "cuda:0: the NVIDIA driver is for CUDA 11.8"),
    ] {
        let found = automatic(&[variable]);
        assert_eq!((found.code, device(&found.stdout).as_str(), found.stderr.lines().count()), (Some(0), "cpu", 1));
        assert!(found.stderr.contains("computing on cpu") && found.stderr.contains(expected), "{}", found.stderr);
    }
}

/// The files of compiled kernels in a cache, by name.
fn kept(cache: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(cache.join("cubins")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn compiled_kernels_are_kept() {
    let Some(emulation) = emulation() else { return };
    let cache = tempfile::tempdir().unwrap();
    let cache = cache.path();
    let check = |more: Variables<'_>| {
        let ours = [("NEARFAR_CACHE", cache.to_str().unwrap()), ("NEARFAR_EMULATED_CACHE", "")];
        emulation.nearfar("check --only clamp --device cuda", &[&ours[..], more].concat())
    };
    const NO_COMPILER: Variables<'_> = &[("NEARFAR_EMULATED_COMPILER", "/missing/g++")];
    assert!(check(NO_COMPILER).stderr.contains("cannot be compiled"));
    check(&[]).stdout();
    let files = kept(cache);
    assert!(files.len() >= 2 && files.iter().all(|file| file.extension().is_some_and(|of| of == "cubin")), "{files:?}");
    check(NO_COMPILER).stdout();

    // What is not whole, or something else, is compiled again and replaced.
    let whole = fs::read(&files[0]).unwrap();
    let other = fs::read(&files[1]).unwrap();
    for damaged in [&whole[..0], &whole[..7], &whole[..whole.len() / 2], b"what somebody left here", &other] {
        fs::write(&files[0], damaged).unwrap();
        assert!(check(NO_COMPILER).stderr.contains("cannot be compiled"), "{} bytes", damaged.len());
        check(&[]).stdout();
        check(NO_COMPILER).stdout();
        assert_eq!(kept(cache), files);
    }
    // Another architecture's are others.
    assert!(check(&[NO_COMPILER[0], ("NEARFAR_EMULATED_ARCHITECTURE", "8.0")]).stderr.contains("cannot be compiled"));

    // A cache that cannot be is no error.
    for nowhere in ["", files[0].to_str().unwrap(), "/proc/nearfar"] {
        check(&[("NEARFAR_CACHE", nowhere)]).stdout();
    }
    assert_eq!(kept(cache), files);
}

#[test]
fn processes_share_compiled_kernels() {
    let Some(emulation) = emulation() else { return };
    let cache = tempfile::tempdir().unwrap();
    let variables = [("NEARFAR_CACHE", cache.path().to_str().unwrap()), ("NEARFAR_EMULATED_CACHE", "")];
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| emulation.nearfar("check --only clamp --device cuda", &variables).stdout());
        }
    });
    let files = kept(cache.path());
    assert!(files.len() >= 2 && files.iter().all(|file| file.extension().is_some_and(|of| of == "cubin")), "{files:?}");
}

/// Pairs to train on, in a folder.
fn pairs() -> tempfile::TempDir {
    const WORDS: [&str; 12] =
        ["amber", "berry", "cloud", "delta", "ember", "frost", "glass", "honey", "ivory", "jewel", "koala", "lilac"];
    let word = |i: usize| WORDS[i % WORDS.len()];
    let pair = |i: usize| {
        let (query, document) = (format!("what is {} {i}", word(i)), format!("{} {i} by {}", word(i), word(7 * i)));
        serde_json::json!({ "query": query, "document": document }).to_string()
    };
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("pairs.jsonl"), (0..36).map(pair).collect::<Vec<_>>().join("\n")).unwrap();
    folder
}

/// A training of 14 steps.
const TRAINING: &str = "train --pairs pairs.jsonl --layers 1 --hidden-size 16 --feed-forward-size 32 \
                        --vocabulary-size 200 --batch-size 12 --max-query-length 8 --max-document-length 16 --steps 14 \
                        --checkpoint-every 5";

#[test]
fn a_training_follows_that_of_the_processor_and_survives_the_loss_of_its_device() {
    let Some(emulation) = emulation() else { return };
    let folder = pairs();
    let nearfar = |arguments: &str, variables: Variables<'_>| {
        let mut command = emulation.command(cargo_bin!("nearfar"), variables);
        ran(command.current_dir(folder.path()).args(arguments.split_whitespace()))
    };
    let run = |device: &str, output: &str, variables: Variables<'_>| {
        nearfar(&format!("{TRAINING} --device {device} --output {output}"), variables)
    };
    // The losses in a folder, step by step.
    let losses = |output: &str| -> Vec<f64> {
        let text = fs::read_to_string(folder.path().join(output).join("metrics.jsonl")).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.filter_map(|record| record["loss"].as_f64()).collect()
    };
    assert_eq!(run("cpu", "cpu", &[]).code, Some(0));
    let profiled = run("cuda,profile", "whole", &[]);
    assert_eq!(profiled.code, Some(0), "{}", profiled.stderr);
    let (expected, found) = (losses("cpu"), losses("whole"));
    assert_eq!((expected.len(), found.len()), (14, 14));
    for (step, (expected, found)) in expected.iter().zip(&found).enumerate() {
        assert!((found - expected).abs() <= 1e-3 * expected.abs(), "step {}: {found}, not {expected}", step + 1);
    }

    // The table of how long launches took says how many there were; one of the eighth step fails.
    let table = profiled.stderr.lines().skip_while(|line| !line.ends_with("  launch")).skip(1);
    let launches: usize = table.map(|line| line.split_whitespace().nth(2).unwrap().parse::<usize>().unwrap()).sum();
    let failure = format!("launch:{}", launches * 15 / 28);
    let lost = run("cuda", "parts", &[("NEARFAR_EMULATED_FAILURE", &failure)]);
    let stderr = lost.stderr.lines().last().unwrap_or_default();
    assert!(lost.code == Some(1) && stderr.starts_with("error: cuda:0 (Emulated GPU) was lost: "), "{lost:?}");
    for expected in
        ["CUDA_ERROR_ILLEGAL_ADDRESS", "the checkpoint of step 5 is kept in", "nearfar train --resume --output parts"]
    {
        assert!(stderr.contains(expected), "{stderr}");
    }
    let resumed = nearfar("train --resume --output parts --device cuda", &[]);
    assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
    let weights = |name: &str| fs::read(folder.path().join(name).join("checkpoint.safetensors")).unwrap();
    assert!(weights("whole") == weights("parts"), "the weights are not those of a training without interruption");
    assert_eq!(losses("parts"), found);

    let small = run("cuda", "none", &[("NEARFAR_EMULATED_MEMORY", "40000")]);
    let stderr = small.stderr.lines().last().unwrap_or_default();
    let expected = "error: cuda:0 (Emulated GPU) has no room for a buffer of ";
    assert!(small.code == Some(1) && stderr.starts_with(expected) && stderr.ends_with(" bytes"), "{small:?}");
}

/// Whichever call of the driver fails first: an error in one line, or nothing, where there was another way.
#[test]
fn every_failure_is_an_error() {
    let Some(emulation) = emulation() else { return };
    let folder = pairs();
    let mut outcomes = [0; 2];
    for number in [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144] {
        for (call, expected) in [("allocation", "has no room for a buffer of"), ("launch", "was lost: ")] {
            let failure = format!("{call}:{number}");
            let mut command =
                emulation.command(cargo_bin!("nearfar"), &[("NEARFAR_EMULATED_FAILURE", failure.as_str())]);
            let arguments = format!("{TRAINING} --device cuda --json --output {call}-{number}");
            let found = ran(command.current_dir(folder.path()).args(arguments.split_whitespace()));
            let last = found.stderr.lines().last().unwrap_or_default();
            match found.code {
                Some(0) => assert_eq!(call, "allocation"),
                Some(1) => {
                    assert!(last.starts_with("error: cuda:0 (Em") && last.contains(expected), "{failure} {found:?}")
                }
                _ => panic!("{failure}: {found:?}"),
            }
            assert!(!found.stderr.contains("panicked"), "{failure}: {found:?}");
            outcomes[found.code.unwrap() as usize] += 1;
        }
    }
    println!("{} went on, {} ended", outcomes[0], outcomes[1]);
    assert!(outcomes[1] >= 11);
}

/// The example, if cargo has built it with this test: `cargo test --test cuda` does not.
#[test]
fn the_example_computes_on_its_own_stream() {
    let Some(emulation) = emulation() else { return };
    let folder = env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
    let (example, library) = (folder.join("examples/cuda_own_stream"), folder.join("libnearfar.rlib"));
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    if modified(&example).is_none() || modified(&example) < modified(&library) {
        return println!("skipped: {} is not there, or of another day", example.display());
    }
    let found = ran(&mut emulation.command(&example, &[])).stdout();
    assert!(found.starts_with("Emulated GPU") && found.contains("\nloss ") && found.lines().count() == 3, "{found}");
    let none = libraries(emulation, &DRIVER, &[]);
    let found = ran(&mut emulation.command(&example, &[("LD_LIBRARY_PATH", none.path().to_str().unwrap())]));
    assert_eq!((found.code, found.stderr.trim_end()), (Some(1), "Error: \"there is no NVIDIA driver here\""));
}

#[test]
fn threads_may_share_a_device() {
    let Some(emulation) = emulation() else { return };
    emulation.inside("threads_share_a_device", &[]);
}

#[test]
fn a_callers_stream_and_memory_may_be_used() {
    let Some(emulation) = emulation() else { return };
    emulation.inside("a_callers_stream_and_memory_are_used_as_they_are", &[]);
    emulation.inside("memory_that_cannot_be_a_tensor_is_refused", &[]);
}

#[test]
fn work_may_be_recorded_and_run_again() {
    let Some(emulation) = emulation() else { return };
    emulation.inside("graphs_run_what_was_recorded", &[]);
    emulation.inside("graphs_keep_what_they_use", &[]);
    emulation.inside("what_cannot_be_recorded_is_an_error_and_leaves_the_device_usable", &[]);
}

#[test]
fn a_lost_device_stays_lost() {
    let Some(emulation) = emulation() else { return };
    emulation.inside("a_lost_device_is_an_error_everywhere", &[("NEARFAR_EMULATED_FAILURE", "launch:20")]);
}

#[test]
fn memory_may_run_out() {
    let Some(emulation) = emulation() else { return };
    emulation.inside("memory_that_is_not_there_is_an_error", &[("NEARFAR_EMULATED_MEMORY", "67108864")]);
}

#[test]
fn memory_stays_flat() {
    let Some(emulation) = emulation() else { return };
    emulation.inside("a_training_takes_no_more_memory", &[]);
}

/// What is tested through the library, in processes that find the emulated GPU.
mod library {
    use std::fmt::Debug;
    use std::sync::Arc;

    use nearfar::backend::cuda::{Cuda, Products, Settings};
    use nearfar::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
    use nearfar::error::DType;
    use nearfar::train::{Event, TrainSettings, train};
    use nearfar::{Batch, Device, Error, Objective, Result, Tensor};

    use crate::products::{expected, matmul, values};

    /// A device of the test's own.
    fn open(settings: Settings) -> Option<Device> {
        match Cuda::open(0, settings) {
            Ok(opened) => Some(Device::new(opened)),
            Err(error) if std::env::var_os("NEARFAR_TEST_CUDA").is_none() => {
                println!("skipped: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[track_caller]
    fn assert_near(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= tolerance, "{found}, not {expected}");
        }
    }

    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn threads_share_a_device() {
        // The thread that opens it has gone when the others use it.
        let Some(device) = std::thread::spawn(|| open(Settings::default())).join().unwrap() else { return };
        let (send, receive) = std::sync::mpsc::channel::<(Tensor, Vec<f32>)>();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (device, send) = (device.clone(), send.clone());
                scope.spawn(move || {
                    for round in 0..25 {
                        let (m, k, n) = (5 + 9 * thread + round, 3 + round % 7, 30 - round);
                        let (a, b) = (values(m * k, thread + round), values(k * n, round));
                        let (on_a, on_b) = (device.tensor(&a, [m, k]).unwrap(), device.tensor(&b, [k, n]).unwrap());
                        let product = matmul(&device, &on_a, &on_b).unwrap();
                        let expected = expected(&a, &b, m, n);
                        if round % 2 == 0 {
                            assert_near(&product.to_host::<f32>().unwrap(), &expected, 1e-4);
                        } else {
                            send.send((product, expected)).unwrap();
                        }
                    }
                });
            }
            drop(send);
            // What others have computed is read and dropped by this thread.
            for (product, expected) in receive {
                assert_near(&product.to_host::<f32>().unwrap(), &expected, 1e-4);
            }
        });
        let named: Vec<Device> = (0..2).map(|_| "cuda:0".parse().unwrap()).collect();
        assert!(named[0] == named[1] && named[0] != device);
        for (products, tolerance) in [(Products::Plain, 1e-4), (Products::Bf16, 0.2), (Products::F16, 0.02)] {
            let mut settings = Settings::default();
            settings.products = products;
            let Some(device) = open(settings) else { return };
            let (a, b) = (values(70 * 50, 1), values(50 * 40, 2));
            let (on_a, on_b) = (device.tensor(&a, [70, 50]).unwrap(), device.tensor(&b, [50, 40]).unwrap());
            let product = matmul(&device, &on_a, &on_b).unwrap().to_host::<f32>().unwrap();
            assert_near(&product, &expected(&a, &b, 70, 40), tolerance);
        }
    }

    fn upload(stream: &Arc<CudaStream>, values: &[f32]) -> CudaSlice<f32> {
        stream.clone_htod(values).unwrap()
    }

    /// The loss and its gradients of some embeddings.
    fn loss(device: &Device, queries: &Tensor, documents: &Tensor) -> Vec<f32> {
        let out = Objective::samtone().forward_backward(device, Batch::new(queries, documents)).unwrap();
        let gradients = [&out.d_queries, &out.d_documents].map(|gradient| gradient.to_host::<f32>().unwrap());
        [vec![out.loss.to_scalar().unwrap()], gradients.concat()].concat()
    }

    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn a_callers_stream_and_memory_are_used_as_they_are() {
        if open(Settings::default()).is_none() {
            return;
        }
        let (n, d) = (33, 18);
        let (q, p) = (values(n * d, 1), values(n * d, 2));
        let cpu = Device::cpu();
        let expected = loss(&cpu, &cpu.tensor(&q, [n, d]).unwrap(), &cpu.tensor(&p, [n, d]).unwrap());
        // The primary context, as nearfar itself uses, and one of the caller's.
        for context in [CudaContext::new(0).unwrap(), CudaContext::new_non_primary(0, 0).unwrap()] {
            let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
            for stream in [stream, context.default_stream()] {
                let device = Device::new(Cuda::from_stream("own", stream.clone(), Settings::default()).unwrap());
                assert_eq!((device.name().as_str(), device.backend::<Cuda>().unwrap().stream()), ("own", &stream));
                let free = context.mem_get_info().unwrap().0;
                for from in [&stream, &other] {
                    let (queries, documents) = (upload(&stream, &q), upload(from, &p));
                    let address = documents.device_ptr(&stream).0;
                    let queries = Cuda::tensor_of(&device, queries, [n, d]).unwrap();
                    let documents = Cuda::tensor_of(&device, documents, [n, d]).unwrap();
                    assert_eq!(Cuda::address(&documents).unwrap(), address);
                    assert_near(&loss(&device, &queries, &documents), &expected, 1e-5);
                    // Both are the caller's still.
                    assert_eq!(documents.to_host::<f32>().unwrap(), p);
                    let error = loss_error(&cpu, &queries, &documents);
                    assert!(matches!(error, Error::OtherDevice { .. }), "{error}");
                }
                // Slices went with their tensors.
                let held = device.held_bytes().unwrap();
                assert_eq!(context.mem_get_info().unwrap().0 + held, free);
                // Elements may begin anywhere.
                for offset in [1, 2, 3] {
                    let shifted = |values: &[f32]| upload(&stream, &[&vec![9.0; offset], values, &[9.0; 5]].concat());
                    let slices = [shifted(&q), shifted(&p)];
                    let tensors = slices.each_ref().map(|slice| {
                        let address = slice.device_ptr(&stream).0 + 4 * offset as u64;
                        // SAFETY: there are so many elements, which are only read and live longer than the tensor.
                        unsafe { Cuda::tensor(&device, address, [n, d], DType::F32).unwrap() }
                    });
                    assert_near(&loss(&device, &tensors[0], &tensors[1]), &expected, 1e-5);
                }
            }
        }
    }

    fn loss_error(device: &Device, queries: &Tensor, documents: &Tensor) -> Error {
        Objective::samtone().forward(device, Batch::new(queries, documents)).unwrap_err()
    }

    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn memory_that_cannot_be_a_tensor_is_refused() {
        let Some(device) = open(Settings::default()) else { return };
        let refused = |found: Result<Tensor>, expected: &str| {
            let error = found.unwrap_err().to_string();
            assert!(error.contains(expected), "no `{expected}` in: {error}");
        };
        let stream = device.backend::<Cuda>().unwrap().stream().clone();
        let slice = || upload(&stream, &[1.0; 11]);
        refused(Cuda::tensor_of(&device, slice(), [3, 4]), "has 11 elements, (3, 4) takes 12");
        refused(Cuda::tensor_of(&device, slice(), [1 << 40, 1 << 40]), "has 11 elements");
        assert_eq!(Cuda::tensor_of(&device, slice(), [2, 5]).unwrap().to_host::<f32>().unwrap(), [1.0; 10]);
        refused(Cuda::tensor_of(&Device::cpu(), slice(), [11]), "`device` lives on cpu");
        let context = CudaContext::new_non_primary(0, 0).unwrap();
        let foreign = upload(&context.default_stream(), &[1.0; 12]);
        refused(Cuda::tensor_of(&device, foreign, [12]), "is of another context than cuda:0");
        // SAFETY: they are refused.
        unsafe {
            refused(
                Cuda::tensor(&device, 4098, [3], DType::F32),
                "is 0x1002, which is no multiple of the 4 bytes of f32",
            );
            refused(Cuda::tensor(&device, 4097, [3], DType::BF16), "no multiple of the 2 bytes");
            refused(Cuda::tensor(&Device::cpu(), 4096, [3], DType::F32), "`device` lives on cpu");
        }
        let error = Cuda::address(&Device::cpu().zeros([3]).unwrap()).unwrap_err();
        assert!(matches!(error, Error::OtherDevice { .. }), "{error}");
        let each = stream.context().per_thread_stream();
        let error = Cuda::from_stream("own", each, Settings::default()).unwrap_err().to_string();
        assert!(error.contains("`stream` is the default stream of each thread"), "{error}");
        let error = Cuda::open(1, Settings::default()).unwrap_err();
        assert!(matches!(&error, Error::NoDevice { requested, .. } if requested == "cuda:1"), "{error}");
        for shape in [[1 << 20, 1 << 20], [1 << 40, 1 << 40], [usize::MAX / 8, 4]] {
            let error = device.empty(shape, DType::F32).unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        }
        assert_eq!(device.tensor(&[2.5f32], [1]).unwrap().to_scalar().unwrap(), 2.5);
    }

    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn a_lost_device_is_an_error_everywhere() {
        fn lost<T: Debug>(what: &str, result: Result<T>) {
            match result {
                Err(Error::DeviceLost { device, .. }) => assert!(device.contains("cuda:0"), "{device}"),
                other => panic!("{what}: {other:?}"),
            }
        }
        let Some(device) = open(Settings::default()) else { return };
        let tensor = device.tensor(&values(300, 0), [20, 15]).unwrap();
        let turned = tensor.reshape([15, 20]).unwrap();
        let multiplied = (0..100).try_for_each(|_| matmul(&device, &tensor, &turned).map(drop));
        lost("matmul", multiplied);
        lost("to_host", tensor.to_host::<f32>());
        lost("an upload", device.tensor(&[1.0f32; 100], [100]));
        lost("a large upload", device.tensor(&vec![0.0f32; 1 << 20], [1 << 20]));
        lost("memory", device.empty([12345], DType::F32));
        lost("zeros", device.zeros([3]));
        lost("matmul", matmul(&device, &tensor, &turned));
        let mut profiled = Settings::default();
        profiled.profile = true;
        lost("another device", Cuda::open(0, profiled));
        assert!(device.timings().is_empty() && device.guard_violations() == 0 && device.submit().is_ok());
    }

    #[test]
    #[ignore = "is run by the test above, with 64 MiB of memory"]
    fn memory_that_is_not_there_is_an_error() {
        let Some(device) = open(Settings::default()) else { return };
        const MEBIBYTE: usize = 1 << 20;
        let mut taken = Vec::new();
        let error = loop {
            match device.empty([MEBIBYTE / 4], DType::F32) {
                Ok(tensor) => taken.push(tensor),
                Err(error) => break error,
            }
            assert!(taken.len() <= 64, "more memory than there is");
        };
        assert!(matches!(error, Error::OutOfMemory { bytes: MEBIBYTE, .. }), "{error}");
        assert!(taken.len() > 60, "{}", taken.len());
        let error = device.tensor(&vec![1.0f32; 10 * MEBIBYTE], [10 * MEBIBYTE]).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        // What was given back makes room for something larger, and the device goes on.
        taken.truncate(10);
        let large = device.tensor(&values(10 * MEBIBYTE, 1), [10 * MEBIBYTE]).unwrap();
        assert_eq!(large.to_host::<f32>().unwrap()[..1000], values(1000, 1));
    }

    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn graphs_run_what_was_recorded() {
        let Some(device) = open(Settings::default()) else { return };
        let (a, b, c) = (values(20 * 30, 1), values(30 * 20, 2), values(20 * 10, 3));
        let mut input = device.tensor(&a, [20, 30]).unwrap();
        let on_b = device.tensor(&b, [30, 20]).unwrap();
        let (graph, output) = Cuda::capture(&device, || {
            let first = matmul(&device, &input, &on_b)?;
            matmul(&device, &first, &device.tensor(&c, [20, 10])?)
        })
        .unwrap();
        let whole = |a: &[f32]| expected(&expected(a, &b, 20, 20), &c, 20, 10);
        for seed in [1, 4, 9] {
            let a = values(20 * 30, seed);
            device.write(&mut input, &a).unwrap();
            // Work of the device's own meanwhile, on as much memory as the graph uses.
            let busy: Vec<Tensor> = (0..9).map(|_| device.tensor(&[1.5f32; 400], [20, 20]).unwrap()).collect();
            graph.launch().unwrap();
            assert_near(&output.to_host::<f32>().unwrap(), &whole(&a), 1e-3);
            assert!(busy.iter().all(|tensor| tensor.to_host::<f32>().unwrap() == [1.5; 400]));
        }
        // Its memory is used again when it has gone.
        let kept = output.to_host::<f32>().unwrap();
        drop(graph);
        let product = || matmul(&device, &input, &on_b);
        let mut held = Vec::new();
        for _ in 0..5 {
            let (graph, output) = Cuda::capture(&device, product).unwrap();
            graph.launch().unwrap();
            assert_near(&output.to_host::<f32>().unwrap(), &product().unwrap().to_host::<f32>().unwrap(), 0.0);
            drop(graph);
            held.push(device.held_bytes());
        }
        assert!(held[1..].iter().all(|bytes| *bytes == held[1]), "{held:?}");
        assert_eq!(output.to_host::<f32>().unwrap(), kept);
    }

    /// Whatever the program drops, what a graph uses stays until the graph goes.
    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn graphs_keep_what_they_use() {
        let Some(device) = open(Settings::default()) else { return };
        let stream = device.backend::<Cuda>().unwrap().stream().clone();
        let (a, b) = (values(400, 1), values(400, 2));
        let expected = expected(&expected(&a, &b, 20, 20), &b, 20, 20);
        let consumed = |on_a: Tensor, on_b: Tensor| {
            let shared = &device;
            Cuda::capture(&device, move || {
                let first = matmul(shared, &on_a, &on_b)?;
                drop(on_a);
                let second = matmul(shared, &first, &on_b)?;
                drop((first, on_b));
                let third = matmul(shared, &second, &second)?;
                drop(third);
                Ok(second)
            })
            .unwrap()
        };
        let tensors = || [&a, &b].map(|values| device.tensor(values, [20, 20]).unwrap());
        let other = stream.context().new_stream().unwrap();
        let slices = |of: &Arc<CudaStream>| {
            [&a, &b].map(|values| Cuda::tensor_of(&device, upload(of, values), [20, 20]).unwrap())
        };
        for [on_a, on_b] in [tensors(), slices(&stream), slices(&other)] {
            let (graph, output) = consumed(on_a, on_b);
            for _ in 0..3 {
                let busy: Vec<Tensor> = (0..9).map(|_| device.tensor(&[1.5f32; 400], [20, 20]).unwrap()).collect();
                graph.launch().unwrap();
                assert_near(&output.to_host::<f32>().unwrap(), &expected, 1e-3);
                assert!(busy.iter().all(|tensor| tensor.to_host::<f32>().unwrap() == [1.5; 400]));
            }
        }
        // A graph goes on when everything else of its device has gone.
        let graph = consumed(device.tensor(&a, [20, 20]).unwrap(), device.tensor(&b, [20, 20]).unwrap()).0;
        drop(device);
        graph.launch().unwrap();
    }

    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn what_cannot_be_recorded_is_an_error_and_leaves_the_device_usable() {
        let Some(device) = open(Settings::default()) else { return };
        let stream = device.backend::<Cuda>().unwrap().stream().clone();
        let (a, b) = (values(400, 1), values(400, 2));
        let (on_a, on_b) = (device.tensor(&a, [20, 20]).unwrap(), device.tensor(&b, [20, 20]).unwrap());
        let product = || matmul(&device, &on_a, &on_b);
        let works = || assert_near(&product().unwrap().to_host::<f32>().unwrap(), &expected(&a, &b, 20, 20), 1e-4);
        let refused = |found: Result<()>, expected: &str| {
            let error = found.unwrap_err().to_string();
            assert!(error.contains(expected), "no `{expected}` in: {error}");
            works();
        };
        let capture = |ask: &dyn Fn() -> Result<()>| Cuda::capture(&device, ask).map(drop);
        refused(capture(&|| product()?.to_host::<f32>().map(drop)), "cannot be read while a graph is recorded");
        refused(capture(&|| capture(&|| product().map(drop))), "is being recorded already");
        capture(&|| Ok(())).unwrap();
        refused(Cuda::capture(&Device::cpu(), || Ok(())).map(drop), "`device` lives on cpu");
        refused(capture(&|| device.empty([1 << 40], DType::F32).map(drop)), "has no room for a buffer");
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = capture(&|| {
                product()?;
                panic!("on purpose")
            });
        }));
        assert!(panicked.is_err());
        works();
        // What else is dropped meanwhile makes no difference.
        let (old, _) = Cuda::capture(&device, product).unwrap();
        let other = stream.context().new_stream().unwrap();
        let slice = Cuda::tensor_of(&device, upload(&other, &a), [20, 20]).unwrap();
        let (graph, output) = Cuda::capture(&device, || {
            drop((old, slice));
            product()
        })
        .unwrap();
        graph.launch().unwrap();
        assert_near(&output.to_host::<f32>().unwrap(), &expected(&a, &b, 20, 20), 1e-4);
        // A way of computing that looks at the clock cannot be recorded.
        let mut profiled = Settings::default();
        profiled.profile = true;
        let Some(device) = open(profiled) else { return };
        let (on_a, on_b) = (device.tensor(&a, [20, 20]).unwrap(), device.tensor(&b, [20, 20]).unwrap());
        let error = Cuda::capture(&device, || matmul(&device, &on_a, &on_b)).unwrap_err().to_string();
        assert!(error.contains("profile"), "{error}");
        matmul(&device, &on_a, &on_b).unwrap().to_host::<f32>().unwrap();
    }

    /// Bytes of this process that are in memory.
    fn resident() -> usize {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[test]
    #[ignore = "is run by the test above, on the emulated GPU"]
    fn a_training_takes_no_more_memory() {
        let Some(device) = open(Settings::default()) else { return };
        let folder = super::pairs();
        let settings = TrainSettings {
            pairs: folder.path().join("pairs.jsonl"),
            evaluate_on: None,
            layers: 1,
            hidden_size: 16,
            feed_forward_size: 32,
            vocabulary_size: 200,
            batch_size: 12,
            max_query_length: 8,
            max_document_length: 16,
            steps: Some(300),
            checkpoint_every: 50,
            ..TrainSettings::default()
        };
        // At every checkpoint, after a step or more of each length that there is.
        let (mut held, mut memory) = (Vec::new(), Vec::new());
        let watched = device.clone();
        let mut watcher = |event: Event<'_>| {
            if let Event::Checkpoint { .. } = event {
                held.push(watched.held_bytes().unwrap());
                memory.push(resident());
            }
        };
        train(&settings, &folder.path().join("model"), &device, &mut watcher).unwrap();
        println!("held {held:?}, resident {memory:?}");
        assert!(held.len() >= 6 && held[1..].iter().all(|bytes| *bytes == held[1]), "{held:?}");
        assert!(memory[memory.len() - 1] < memory[1] + (8 << 20), "{memory:?}");
    }
}
