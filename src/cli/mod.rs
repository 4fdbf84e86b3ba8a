//! The command line: one file a command, and what they share.
//!
//! A new command is a module, a variant of [`Command`] and an arm of [`run`]. Results go to stdout, everything else to
//! stderr, so that `--json` can be piped.

mod bench;
mod check;
mod devices;
mod embed;
mod evaluate;
mod loss;
mod memory;
mod objectives;
mod progress;
mod train;

use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use nearfar::Device;
use nearfar::backend::Timing;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

/// Trains retrieval encoders with contrastive losses.
#[derive(Debug, Parser)]
#[command(name = "nearfar", version, after_help = AFTER_HELP)]
struct Cli {
    /// Print what is being done to stderr.
    ///
    /// The variable NEARFAR_LOG sets this finer, and is followed where it is set: `NEARFAR_LOG=nearfar=trace`.
    #[arg(long, short, global = true, display_order = 900)]
    verbose: bool,

    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
`nearfar help COMMAND` explains a command and ends with an example. Results are printed to stdout; messages and errors \
go to stderr. The exit code is 0 on success, 1 if something went wrong, 2 if the command line could not be understood.

Environment:
  RAYON_NUM_THREADS  how many threads the CPU computes with (default: one for each core)
  NEARFAR_LOG        which messages go to stderr: error, warn, info, debug, trace, or nearfar=LEVEL
  NEARFAR_CACHE      where compiled shaders are kept (default: nearfar in the user's folder for caches); empty for
                     nowhere
  WGPU_BACKEND, WGPU_ADAPTER_NAME, VK_DRIVER_FILES
                     which devices wgpu finds

Example:
  nearfar loss --queries queries.npy --documents documents.npy";

// One value is made and used once: that it is as large as its largest variant costs nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Bench),
    Check(check::Check),
    Devices(devices::Devices),
    Embed(embed::Embed),
    Evaluate(evaluate::Evaluate),
    Loss(loss::Loss),
    Objectives(objectives::Objectives),
    Train(train::Train),
}

/// Parses the command line and does what it says.
pub(crate) fn run() -> Result<()> {
    let cli = Cli::parse();
    start_log(cli.verbose)?;
    match cli.command {
        Command::Bench(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Devices(command) => command.run(),
        Command::Embed(command) => command.run(),
        Command::Evaluate(command) => command.run(),
        Command::Loss(command) => command.run(),
        Command::Objectives(command) => command.run(),
        Command::Train(command) => command.run(),
    }
}

fn start_log(verbose: bool) -> Result<()> {
    let default = if verbose { "warn,nearfar=debug" } else { "warn,nearfar=info" };
    let filter = match std::env::var("NEARFAR_LOG") {
        Ok(filter) if !filter.trim().is_empty() => filter,
        Ok(_) | Err(std::env::VarError::NotPresent) => default.into(),
        Err(error) => return Err(error).context("NEARFAR_LOG"),
    };
    let filter = EnvFilter::builder().parse(&filter).with_context(|| {
        format!("NEARFAR_LOG is `{filter}`; it must be a level (error, warn, info, debug, trace) or nearfar=LEVEL")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// A command line that lacks something which only its other options ask for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Prints an error and its causes to stderr, on one line, and says what to exit with.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let mut message = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // The library's errors say what the operating system said, and carry it as their source too.
        if !message.contains(&cause) {
            message.push_str(": ");
            message.push_str(&cause);
        }
    }
    // Nobody is left to be told that stderr is closed.
    let _ = writeln!(std::io::stderr(), "error: {message}");
    if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}

/// The device to compute on.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Device to compute on: auto, cpu, cuda, cuda:1, wgpu, wgpu:1, …
    ///
    /// `auto` takes the first graphics processor that works, else the CPU. `cuda` is the first NVIDIA one, by CUDA; after
    /// a comma follows how it multiplies matrices: `cuda,exact` as exactly as single precision, `plain` without tensor
    /// cores, `bf16` or `f16` with factors rounded, `tensor-cores` exactly on tensor cores however small. `wgpu` is the first device of Vulkan, Metal
    /// or Direct3D 12 that `nearfar devices` lists, be it a driver in software, `wgpu:1` the second. After a comma
    /// follows how it is opened, to find out what makes a difference: `wgpu:0,checked` checks every index,
    /// `default-limits` takes what any browser has, `no-subgroups` and `no-f16` do without.
    #[arg(long, value_name = "DEVICE", default_value = "auto", display_order = 800)]
    device: String,
}

impl DeviceArgs {
    pub(crate) fn open(&self) -> Result<Device> {
        if self.device == "auto" {
            let (device, errors) = Device::automatic();
            for error in errors {
                tracing::warn!("computing on {device}, as another device cannot be used: {error}");
            }
            tracing::debug!(%device, "computing on {}", device.description());
            return Ok(device);
        }
        let device: Device = self.device.parse().context("--device")?;
        tracing::debug!(%device, "computing on {}", device.description());
        Ok(device)
    }
}

/// Prints how long a device was at what, if it was opened to be measured.
pub(crate) fn print_timings(device: &Device) {
    let timings = device.timings();
    let all: f64 = timings.iter().map(|timing| timing.seconds).sum();
    if timings.is_empty() {
        return;
    }
    eprintln!("{:>9}  {:>5}  {:>8}  launch", "ms", "%", "times");
    for Timing { name, count, seconds } in timings {
        eprintln!("{:9.3}  {:5.1}  {count:8}  {name}", 1e3 * seconds, 100.0 * seconds / all);
    }
}

/// How results are printed.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Print exactly one JSON object to stdout instead of text.
    #[arg(long, display_order = 800)]
    json: bool,
}

impl OutputArgs {
    /// Prints a result as one line of JSON or as text.
    pub(crate) fn print(&self, json: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
        print_line(if self.json { serde_json::to_string(json)? } else { text() })
    }

    /// Prints a part of a result that is shown as it comes, unless there will be an object in the end.
    pub(crate) fn print_part(&self, text: impl FnOnce() -> String) -> Result<()> {
        if self.json { Ok(()) } else { print_line(text()) }
    }
}

fn print_line(mut output: String) -> Result<()> {
    output.push('\n');
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(output.as_bytes()).and_then(|()| stdout.flush()) {
        // Whoever read the output has seen enough of it, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to stdout"),
    }
}

/// Refuses a file that cannot be written, or must not be, before anything is computed.
///
/// A finished file is renamed to its path. Where a device file stands that would replace it, which the superuser is
/// allowed to; so only files and nothing are replaced, and no input of the same command.
pub(crate) fn check_output(option: &str, path: &Path, inputs: &[&Path]) -> Result<()> {
    let name = path.display();
    let Some(file_name) = path.file_name() else {
        bail!("{option}: `{name}` does not name a file");
    };
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => bail!("{option}: {name} is a folder; give the path of a file in it"),
        Ok(metadata) if !metadata.is_file() => {
            bail!("{option}: {name} is a device or a pipe; give the path of a file on disk")
        }
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(anyhow!(error).context(format!("{option}: {name}"))),
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match std::fs::metadata(folder) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => bail!("{option}: {} is not a folder, so {name} cannot be written", folder.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("{option}: the folder of {name} does not exist; create {} first", folder.display())
        }
        Err(error) => return Err(anyhow!(error).context(format!("{option}: {}", folder.display()))),
    }
    let folder = folder.canonicalize().with_context(|| format!("{option}: {}", folder.display()))?;
    let target = folder.join(file_name);
    let target = target.canonicalize().unwrap_or(target);
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input == target) {
            bail!("{option}: {name} is an input of this command and would be overwritten; give another path");
        }
    }
    Ok(())
}
