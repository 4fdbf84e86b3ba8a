//! `nearfar devices`: what there is to compute on.

use anyhow::Result;
use clap::Args;
use nearfar::Device;
use nearfar::backend::OPERATIONS;
use serde::Serialize;

use super::OutputArgs;

/// List the devices that losses and encoders can be computed on.
///
/// Each line is a name, as the option --device of the other commands takes it, and a description. With --json, the
/// object also lists the names of the operations that make up all computations.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  nearfar devices --json")]
pub(crate) struct Devices {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Listing {
    devices: Vec<Entry>,
    operations: &'static [&'static str],
}

#[derive(Serialize)]
struct Entry {
    name: String,
    description: String,
}

impl Devices {
    pub(crate) fn run(self) -> Result<()> {
        let devices: Vec<Entry> = Device::available()
            .iter()
            .map(|device| Entry { name: device.name(), description: device.description() })
            .collect();
        let listing = Listing { devices, operations: OPERATIONS };
        self.output.print(&listing, || table(&listing.devices))
    }
}

fn table(devices: &[Entry]) -> String {
    let width = devices.iter().map(|device| device.name.len()).chain(["device".len()]).max().unwrap_or(0);
    let mut lines = vec![format!("{:width$}  description", "device")];
    lines.extend(devices.iter().map(|device| format!("{:width$}  {}", device.name, device.description)));
    lines.join("\n")
}
