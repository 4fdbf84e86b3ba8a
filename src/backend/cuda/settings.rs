//! How a device of CUDA is opened.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How matrix products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Products {
    /// As exact as single precision: small products by ordinary arithmetic, large ones by tensor cores, with two f16 for
    /// each value.
    #[default]
    Exact,
    /// By ordinary arithmetic in single precision, without tensor cores.
    Plain,
    /// Factors rounded to bf16, sums in single precision.
    Bf16,
    /// Factors rounded to f16, each matrix scaled by a power of two, sums in single precision.
    F16,
}

impl Products {
    const NAMES: [(&str, Self); 4] =
        [("exact", Self::Exact), ("plain", Self::Plain), ("bf16", Self::Bf16), ("f16", Self::F16)];
}

impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, products)| products == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

/// How a device is opened, beside which one: `cuda:0,bf16,profile`.
///
/// ```
/// use nearfar::backend::cuda::{Products, Settings};
///
/// let mut settings = Settings::default();
/// settings.products = Products::Bf16;
/// assert_eq!("bf16".parse::<Settings>()?, settings);
/// # Ok::<(), nearfar::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct Settings {
    /// How matrix products are computed.
    pub products: Products,
    /// Exact products by tensor cores however small they are, where ordinary arithmetic is taken otherwise: to test them.
    pub tensor_cores: bool,
    /// Products of 16-bit factors by Hopper's warpgroups. They have run on no GPU yet.
    pub wgmma: bool,
    /// With an event around every launch, for [`Device::timings`](crate::Device::timings). Slower.
    pub profile: bool,
    /// Values of a workspace of the loss at most, instead of as many as are fast.
    pub workspace: Option<usize>,
}

/// The names of what is set, with commas between them.
impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let products = (self.products != Products::default()).then(|| self.products.to_string());
        let flags = [("tensor-cores", self.tensor_cores), ("wgmma", self.wgmma), ("profile", self.profile)];
        let flags = flags.into_iter().filter(|(_, set)| *set).map(|(name, _)| name.to_owned());
        let workspace = self.workspace.map(|values| format!("workspace={values}"));
        f.write_str(&products.into_iter().chain(flags).chain(workspace).collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Settings {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut settings = Self::default();
        for name in text.split(',').filter(|name| !name.is_empty()) {
            if let Some((_, products)) = Products::NAMES.iter().find(|(of, _)| *of == name) {
                settings.products = *products;
            } else if name == "profile" {
                settings.profile = true;
            } else if name == "wgmma" {
                settings.wgmma = true;
            } else if name == "tensor-cores" {
                settings.tensor_cores = true;
            } else {
                let values = name.strip_prefix("workspace=").and_then(|values| values.parse().ok());
                settings.workspace = Some(values.ok_or_else(|| {
                    let names = Products::NAMES.map(|(name, _)| name).join(", ");
                    Error::setting(
                        "device",
                        format!("`{name}` is none of: {names}, tensor-cores, wgmma, profile, workspace=VALUES"),
                    )
                })?);
            }
        }
        Ok(settings)
    }
}

/// What the kind of devices is called.
pub(super) const KIND: &str = "cuda";

/// Which device, and how.
pub(super) type Request = crate::backend::gpu::Request<Settings>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_how_a_device_is_opened() {
        for name in ["cuda:0", "cuda:3,plain", "cuda:1,bf16,profile,workspace=3000", "cuda:0,f16,tensor-cores,wgmma"] {
            assert_eq!(Request::named(KIND, name).unwrap().unwrap().to_string(), name);
        }
        assert_eq!(Request::named(KIND, "cuda,exact").unwrap().unwrap().to_string(), "cuda:0");
        assert!(Request::named(KIND, "cpu").is_none() && Request::named(KIND, "cudacity").is_none());
        let error = Request::named(KIND, "cuda,fast").unwrap().unwrap_err().to_string();
        assert!(error.contains("`fast` is none of: exact, plain"), "{error}");
    }
}
