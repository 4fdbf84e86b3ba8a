//! Finding adapters and opening devices on them.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use ::wgpu;

use crate::{Error, Result};

/// How a device is opened, beside which one: `wgpu:0,checked,default-limits`.
///
/// ```
/// use nearfar::backend::wgpu::Settings;
///
/// let mut settings = Settings::default();
/// settings.checked = true;
/// assert_eq!("checked".parse::<Settings>()?, settings);
/// # Ok::<(), nearfar::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct Settings {
    /// With the checks of indices and loops that wgpu puts into shaders.
    pub checked: bool,
    /// With WebGPU's default limits, whatever the adapter can.
    pub default_limits: bool,
    /// Without subgroup operations.
    pub no_subgroups: bool,
    /// Without 16-bit arithmetic.
    pub no_f16: bool,
    /// Without cooperative matrices.
    pub no_matrices: bool,
    /// As with cooperative matrices, but by ordinary 16-bit arithmetic: to test what is not the matrices themselves.
    pub emulate_matrices: bool,
    /// With a time stamp around every launch, for [`Device::timings`](crate::Device::timings). Slower.
    pub profile: bool,
    /// Values of a workspace of the loss at most, instead of as many as are fast.
    pub workspace: Option<usize>,
}

impl Settings {
    const NAMES: [&str; 7] =
        ["checked", "default-limits", "no-subgroups", "no-f16", "no-matrices", "emulate-matrices", "profile"];

    fn values(self) -> [bool; 7] {
        let Self { checked, default_limits, no_subgroups, no_f16, no_matrices, emulate_matrices, profile, .. } = self;
        [checked, default_limits, no_subgroups, no_f16, no_matrices, emulate_matrices, profile]
    }
}

/// The names of what is set, with commas between them.
impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Self::NAMES.into_iter().zip(self.values()).filter(|(_, set)| *set).map(|(name, _)| name.to_owned());
        let workspace = self.workspace.map(|values| format!("workspace={values}"));
        f.write_str(&names.chain(workspace).collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Settings {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut settings = Self::default();
        for name in text.split(',').filter(|name| !name.is_empty()) {
            match name {
                "checked" => settings.checked = true,
                "default-limits" => settings.default_limits = true,
                "no-subgroups" => settings.no_subgroups = true,
                "no-f16" => settings.no_f16 = true,
                "no-matrices" => settings.no_matrices = true,
                "emulate-matrices" => settings.emulate_matrices = true,
                "profile" => settings.profile = true,
                _ => {
                    let values = name.strip_prefix("workspace=").and_then(|values| values.parse().ok());
                    settings.workspace = Some(values.ok_or_else(|| {
                        let names = Self::NAMES.join(", ");
                        let reason = format!("`{name}` is none of: {names}, workspace=VALUES");
                        Error::setting("device", reason)
                    })?);
                }
            }
        }
        Ok(settings)
    }
}

/// What the kind of devices is called.
pub(super) const KIND: &str = "wgpu";

/// Which adapter, and how.
pub(super) type Request = crate::backend::gpu::Request<Settings>;

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
    let mut wanted = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE;
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

/// The limits that decide what can be computed.
fn limits(limits: &wgpu::Limits) -> [(&'static str, u64); 6] {
    [
        ("max_buffer_size", limits.max_buffer_size),
        ("max_storage_buffer_binding_size", limits.max_storage_buffer_binding_size),
        ("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage.into()),
        ("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into()),
        ("max_compute_invocations_per_workgroup", limits.max_compute_invocations_per_workgroup.into()),
        ("max_compute_workgroups_per_dimension", limits.max_compute_workgroups_per_dimension.into()),
    ]
}

/// Whether a device can do what all of WebGPU's can.
pub(super) fn check_limits(name: &str, found: &wgpu::Limits) -> Result<()> {
    for ((limit, needed), (_, most)) in limits(&wgpu::Limits::default()).into_iter().zip(limits(found)) {
        if needed > most {
            return Err(Error::Limit { device: name.into(), limit, needed, most });
        }
    }
    Ok(())
}

/// What there is to know of a device.
pub(super) fn properties(
    info: &wgpu::AdapterInfo,
    device: &wgpu::Device,
    settings: Settings,
) -> Vec<(&'static str, String)> {
    let features = device.features();
    let mut names: Vec<String> = features.iter_names().map(|(name, _)| name.to_lowercase().replace('_', "-")).collect();
    if let Some(subgroup) = names.iter_mut().find(|name| *name == "subgroup") {
        *subgroup = format!("subgroup {} to {}", info.subgroup_min_size, info.subgroup_max_size);
    }
    let mut properties = vec![
        ("adapter", info.name.clone()),
        ("kind", format!("{:?}", info.device_type)),
        ("backend", format!("{:?}", info.backend)),
        ("driver", format!("{} {}", info.driver, info.driver_info)),
        ("features", names.join(", ")),
        ("shaders", if settings.checked { "checked" } else { "unchecked" }.into()),
    ];
    properties.extend(limits(&device.limits()).map(|(limit, most)| (limit, most.to_string())));
    properties
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
            assert_eq!(Request::named(KIND, text).unwrap().unwrap().to_string(), printed);
        }
        for text in ["cpu", "wgpu:", "wgpu:x", "wgpus", ""] {
            assert!(Request::named(KIND, text).is_none(), "{text}");
        }
        for setting in ["fast", "workspace=", "workspace=x"] {
            let error = Request::named(KIND, &format!("wgpu:1,{setting}")).unwrap().unwrap_err().to_string();
            assert!(error.contains(&format!("`{setting}`")) && error.contains("checked, default-limits"), "{error}");
        }
    }

    #[test]
    fn limits_below_the_default_ones_are_named() {
        check_limits("own", &wgpu::Limits::default()).unwrap();
        let few = wgpu::Limits { max_storage_buffers_per_shader_stage: 4, ..wgpu::Limits::default() };
        let error = check_limits("own", &few).unwrap_err().to_string();
        assert_eq!(error, "own: 8 is more than the device's `max_storage_buffers_per_shader_stage` of 4");
    }
}
