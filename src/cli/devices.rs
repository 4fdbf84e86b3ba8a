//! `nearfar devices`: what there is to compute on.

use anyhow::Result;
use clap::Args;
use nearfar::Device;
use nearfar::backend::{OPERATIONS, support_table};
use serde::Serialize;
use serde_json::{Map, Value};

use super::OutputArgs;

/// List the devices that losses and encoders can be computed on.
///
/// Each is a name, as the option --device of the other commands takes it, and a description. Below a device of wgpu
/// stand its driver, the features that were found, and the limits that decide what fits; sizes are in bytes.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Devices {
    /// Print which operations each kind of device can do, as a Markdown table.
    #[arg(long, conflicts_with = "json")]
    support: bool,

    #[command(flatten)]
    output: OutputArgs,
}

const AFTER_HELP: &str = "\
With --json the object is
  {\"devices\": [{\"name\", \"description\", \"properties\": {NAME: VALUE, …},
    \"unsupported\": [operations that it cannot do]}], \"operations\": [all that make up computations]}

Example:
  nearfar devices --json";

#[derive(Serialize)]
struct Listing {
    devices: Vec<Entry>,
    operations: &'static [&'static str],
}

#[derive(Serialize)]
struct Entry {
    name: String,
    description: String,
    properties: Map<String, Value>,
    unsupported: Vec<&'static str>,
}

impl Entry {
    fn new(device: &Device) -> Self {
        let properties = device.properties().into_iter();
        Self {
            name: device.name(),
            description: device.description(),
            properties: properties.map(|(name, value)| (name.to_owned(), value.into())).collect(),
            unsupported: OPERATIONS.iter().copied().filter(|operation| !device.supports(operation)).collect(),
        }
    }
}

impl Devices {
    pub(crate) fn run(self) -> Result<()> {
        if self.support {
            return self.output.print(&(), || support_table().trim_end().into());
        }
        for error in Device::automatic().1 {
            tracing::warn!("not listed: {error}");
        }
        let devices: Vec<Entry> = Device::available().iter().map(Entry::new).collect();
        let listing = Listing { devices, operations: OPERATIONS };
        self.output.print(&listing, || table(&listing.devices))
    }
}

fn table(devices: &[Entry]) -> String {
    let width = devices.iter().map(|device| device.name.len()).chain(["device".len()]).max().unwrap_or(0);
    let mut lines = vec![format!("{:width$}  description", "device")];
    for Entry { name, description, properties, unsupported } in devices {
        lines.push(format!("{name:width$}  {description}"));
        let longest = properties.keys().map(String::len).max().unwrap_or(0);
        for (property, value) in properties {
            lines.push(format!("{:width$}  {property:longest$}  {}", "", value.as_str().unwrap_or_default()));
        }
        if !unsupported.is_empty() {
            lines.push(format!("{:width$}  cannot do: {}", "", unsupported.join(", ")));
        }
    }
    lines.join("\n")
}
