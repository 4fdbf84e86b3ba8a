//! The `nearfar` program.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    quiet_drivers();
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::report(&error),
    }
}

/// Mesa brings a Vulkan layer that asks a Wayland compositor which device is the preferred one, and without a desktop
/// session that complains on stderr. Devices are chosen here otherwise, so then it is switched off.
fn quiet_drivers() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: no thread has been started that could read the environment.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}
