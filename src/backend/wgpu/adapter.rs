//! Finding adapters and opening devices on them.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use ::wgpu;

use crate::{Error, Result};

/// How a device is opened, beside which one: `wgpu:0,checked,default-limits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Settings {
    /// With the checks of indices and loops that wgpu puts into shaders.
    pub(super) checked: bool,
    /// With WebGPU's default limits, whatever the adapter can.
    pub(super) default_limits: bool,
    /// Without subgroup operations.
    pub(super) no_subgroups: bool,
    /// Without 16-bit arithmetic.
    pub(super) no_f16: bool,
    /// Without cooperative matrices.
    pub(super) no_matrices: bool,
    /// As with cooperative matrices, but by ordinary 16-bit arithmetic.
    pub(super) emulate_matrices: bool,
    /// Values of a workspace of the loss at most, instead of as many as are fast.
    pub(super) workspace: Option<usize>,
}

impl Settings {
    const NAMES: [&str; 6] = ["checked", "default-limits", "no-subgroups", "no-f16", "no-matrices", "emulate-matrices"];

    fn values(self) -> [bool; 6] {
        let Self { checked, default_limits, no_subgroups, no_f16, no_matrices, emulate_matrices, .. } = self;
        [checked, default_limits, no_subgroups, no_f16, no_matrices, emulate_matrices]
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, set) in Self::NAMES.iter().zip(self.values()) {
            if set {
                write!(f, ",{name}")?;
            }
        }
        self.workspace.map_or(Ok(()), |values| write!(f, ",workspace={values}"))
    }
}

/// Which adapter, and how: `wgpu`, `wgpu:1`, `wgpu:0,checked`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Request {
    pub(super) index: usize,
    pub(super) settings: Settings,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wgpu:{}{}", self.index, self.settings)
    }
}

impl FromStr for Request {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let mut parts = text.split(',');
        let index = match parts.next().and_then(|kind| kind.strip_prefix("wgpu")) {
            Some("") => 0,
            Some(rest) => rest.strip_prefix(':').and_then(|index| index.parse().ok()).ok_or(())?,
            None => return Err(()),
        };
        let mut settings = Settings::default();
        for part in parts {
            match part {
                "checked" => settings.checked = true,
                "default-limits" => settings.default_limits = true,
                "no-subgroups" => settings.no_subgroups = true,
                "no-f16" => settings.no_f16 = true,
                "no-matrices" => settings.no_matrices = true,
                "emulate-matrices" => settings.emulate_matrices = true,
                _ => {
                    let values = part.strip_prefix("workspace=").and_then(|values| values.parse().ok());
                    settings.workspace = Some(values.ok_or(())?);
                }
            }
        }
        Ok(Self { index, settings })
    }
}

/// The adapters of this machine, the fastest kinds first. wgpu's own variables choose among them: `WGPU_BACKEND`,
/// `WGPU_ADAPTER_NAME`.
pub(super) fn adapters() -> &'static [wgpu::Adapter] {
    static ADAPTERS: LazyLock<Vec<wgpu::Adapter>> = LazyLock::new(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
        // Validation layers are for who works on the shaders.
        descriptor.flags.remove(wgpu::InstanceFlags::VALIDATION | wgpu::InstanceFlags::DEBUG);
        let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
        let instance = wgpu::Instance::new(descriptor);
        let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
        adapters.retain(|adapter| {
            adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
        });
        if let Ok(wanted) = std::env::var("WGPU_ADAPTER_NAME") {
            let wanted = wanted.to_lowercase();
            adapters.retain(|adapter| adapter.get_info().name.to_lowercase().contains(&wanted));
        }
        adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        });
        adapters
    });
    &ADAPTERS
}

/// Whether an adapter is hardware of its own.
pub(super) fn is_hardware(adapter: &wgpu::Adapter) -> bool {
    adapter.get_info().device_type != wgpu::DeviceType::Cpu
}

/// Whether an adapter has the cooperative matrices that shaders use: 16 × 16 of 16-bit numbers with f32 sums, by
/// subgroups of 32.
fn has_matrices(adapter: &wgpu::Adapter) -> bool {
    let info = adapter.get_info();
    let fits = |properties: &wgpu::CooperativeMatrixProperties| {
        (properties.m_size, properties.n_size, properties.k_size) == (16, 16, 16)
            && properties.ab_type == wgpu::CooperativeScalarType::F16
            && properties.cr_type == wgpu::CooperativeScalarType::F32
    };
    (info.subgroup_min_size, info.subgroup_max_size) == (32, 32)
        && adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
        && adapter.cooperative_matrix_properties().iter().any(fits)
}

/// Opens a device.
pub(super) fn open(request: Request) -> Result<(wgpu::AdapterInfo, wgpu::Device, wgpu::Queue)> {
    let adapters = adapters();
    let adapter = adapters.get(request.index).ok_or_else(|| Error::NoDevice {
        requested: request.to_string(),
        available: std::iter::once("cpu".to_owned())
            .chain((0..adapters.len()).map(|index| format!("wgpu:{index}")))
            .collect(),
    })?;
    let Settings { default_limits, no_subgroups, no_f16, no_matrices, .. } = request.settings;
    let mut wanted = wgpu::Features::TIMESTAMP_QUERY;
    wanted.set(wgpu::Features::SUBGROUP, !no_subgroups);
    wanted.set(wgpu::Features::SHADER_F16, !no_f16);
    let matrices = !default_limits && !no_matrices && has_matrices(adapter);
    wanted.set(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, matrices);
    let experimental_features = if matrices {
        // SAFETY: what is experimental is used by one shader, and only after its products were compared with those of
        // ordinary arithmetic on this very device.
        unsafe { wgpu::ExperimentalFeatures::enabled() }
    } else {
        wgpu::ExperimentalFeatures::disabled()
    };
    let limits = if default_limits { wgpu::Limits::default() } else { adapter.limits() };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("nearfar"),
        required_features: adapter.features() & wanted,
        required_limits: limits,
        experimental_features,
        memory_hints: wgpu::MemoryHints::Performance,
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
        .map_err(|error| Error::Device { device: request.to_string(), reason: format!("cannot be opened: {error}") })?;
    Ok((adapter.get_info(), device, queue))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_and_printed() {
        for (text, printed) in [
            ("wgpu", "wgpu:0"),
            ("wgpu:3", "wgpu:3"),
            ("wgpu,checked", "wgpu:0,checked"),
            ("wgpu,workspace=4096,checked", "wgpu:0,checked,workspace=4096"),
            ("wgpu:1,no-f16,default-limits", "wgpu:1,default-limits,no-f16"),
        ] {
            assert_eq!(text.parse::<Request>().unwrap().to_string(), printed);
        }
        for text in ["cpu", "wgpu:", "wgpu:x", "wgpus", "wgpu,fast", "wgpu,workspace=", ""] {
            assert!(text.parse::<Request>().is_err(), "{text}");
        }
    }
}
