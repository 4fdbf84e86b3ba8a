//! WGSL sources, and the preprocessor that turns one of them into a module.
//!
//! A file under `shaders/` belongs to one operation; its entry points are the passes of that operation. What several
//! files need stands under `shaders/shared/`. The preprocessor knows six lines:
//!
//! ```text
//! #import NAME        the text of shaders/shared/NAME.wgsl, once
//! #ifdef FLAG         the lines up to #else or #endif if the flag is set
//! #ifndef FLAG        … if it is not
//! #else
//! #endif
//! #define FLAG        sets it from here on
//! ```
//!
//! The name of the entry point in capitals is a flag that is always set. A constant of a launch becomes
//! `const NAME: u32 = value;` in front of everything, and sets the flag `NAME_value`. SUBGROUPS is set for all modules of
//! a device whose subgroups can be used; `override SUBGROUP` is then how large they are. `shaders/permutations` lists which flags and constants each entry
//! point knows: tests validate all of their combinations, and what is not listed is refused.
//!
//! While working on a shader, run a build with debug assertions with `NEARFAR_SHADERS=shaders`.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::backend::gpu::{self, Listed, Permutation, Scalar};

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        /// Name and text of every file, `shared/` ones with that prefix.
        pub(super) const SOURCES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../../shaders/", $name, ".wgsl")))),*];
    };
}

sources! {
    "adamw",
    "aggregate",
    "attention",
    "cast",
    "dropout",
    "elementwise",
    "embedding",
    "gelu",
    "l2_norm",
    "layer_norm",
    "materialised",
    "matmul",
    "merge_statistics",
    "pair_scores",
    "partition",
    "pooling",
    "positives",
    "prefix_norms",
    "reduce",
    "row_function",
    "row_sweep",
    "shared/columns",
    "shared/cooperative_tile",
    "shared/dropout",
    "shared/gelu",
    "shared/groups",
    "shared/numerics",
    "shared/philox",
    "shared/reduce",
    "shared/row_norm",
    "shared/rows",
    "shared/scales",
    "shared/statistics",
    "shared/subgroups",
    "shared/tile",
    "similarity_sweep",
    "subgroups",
}

/// Which flags and constants each entry point knows.
pub(super) const PERMUTATIONS: &str = include_str!("../../../shaders/permutations");

/// A storage buffer that a module declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binding {
    pub(super) name: String,
    pub(super) number: u32,
    pub(super) read_only: bool,
}

/// A module's text and what it says of its interface.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) text: String,
    pub(super) bindings: Vec<Binding>,
    /// Fields of `struct Params`, each of four bytes.
    pub(super) params: Vec<(String, Scalar)>,
}

/// A file of the folder that `NEARFAR_SHADERS` names, for who works on shaders: builds with debug assertions read it
/// instead of what was compiled in, so that a change needs no build.
fn from_folder(file: &str) -> Option<&'static str> {
    let folder = std::env::var_os("NEARFAR_SHADERS").filter(|_| cfg!(debug_assertions))?;
    let text = std::fs::read_to_string(std::path::Path::new(&folder).join(file)).ok()?;
    Some(Box::leak(text.into_boxed_str()))
}

fn source(name: &str) -> Result<&'static str, String> {
    if let Some(text) = from_folder(&format!("{name}.wgsl")) {
        return Ok(text);
    }
    SOURCES
        .iter()
        .find(|(of, _)| *of == name)
        .map(|(_, text)| *text)
        .ok_or_else(|| format!("there is no shader `{name}`"))
}

/// Adds a file's lines that the flags let through.
fn append(
    name: &str,
    flags: &mut BTreeSet<String>,
    imported: &mut BTreeSet<String>,
    output: &mut String,
) -> Result<(), String> {
    // Of each condition around a line, whether it holds.
    let mut conditions: Vec<bool> = Vec::new();
    for (number, line) in source(name)?.lines().enumerate() {
        let at = |what: &str| format!("shaders/{name}.wgsl:{}: {what}", number + 1);
        let mut words = line.split_whitespace();
        let directive = words.next().unwrap_or("");
        let argument = || words.clone().next().ok_or_else(|| at("what?"));
        match directive {
            "#ifdef" => conditions.push(flags.contains(argument()?)),
            "#ifndef" => conditions.push(!flags.contains(argument()?)),
            "#else" => {
                let last = conditions.last_mut().ok_or_else(|| at("#else without a condition"))?;
                *last = !*last;
            }
            "#endif" => {
                conditions.pop().ok_or_else(|| at("#endif without a condition"))?;
            }
            _ if conditions.contains(&false) => {}
            "#define" => {
                flags.insert(argument()?.to_owned());
            }
            "#import" => {
                let shared = format!("shared/{}", argument()?);
                if imported.insert(shared.clone()) {
                    append(&shared, flags, imported, output)?;
                }
            }
            _ if directive.starts_with('#') => return Err(at("no such directive")),
            _ => {
                output.push_str(line);
                output.push('\n');
            }
        }
    }
    if conditions.is_empty() { Ok(()) } else { Err(format!("shaders/{name}.wgsl: a condition without #endif")) }
}

/// The module of a permutation, for a device with or without subgroups.
pub(super) fn module(permutation: &Permutation, subgroups: bool) -> Result<Module, String> {
    let mut flags: BTreeSet<String> = permutation.flags.iter().map(|flag| (*flag).to_owned()).collect();
    flags.insert(permutation.entry.to_uppercase());
    if subgroups {
        flags.insert("SUBGROUPS".into());
    }
    flags.extend(permutation.constants.iter().map(|(name, value)| format!("{name}_{value}")));
    let mut body = String::new();
    append(permutation.file, &mut flags, &mut BTreeSet::new(), &mut body)?;
    let mut text = String::new();
    // `enable` has to come first.
    for line in body.lines().filter(|line| line.starts_with("enable ")) {
        text.push_str(line);
        text.push('\n');
    }
    for (name, value) in &permutation.constants {
        let _ = writeln!(text, "const {name}: u32 = {value}u;");
    }
    for line in body.lines().filter(|line| !line.starts_with("enable ")) {
        text.push_str(line);
        text.push('\n');
    }
    let (bindings, params) = (bindings(&text)?, params(&text)?);
    Ok(Module { text, bindings, params })
}

/// The storage buffers of a text: lines that begin with `@group(0) @binding(N) var<storage`.
fn bindings(text: &str) -> Result<Vec<Binding>, String> {
    let mut bindings = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("@group(0) @binding(") else { continue };
        let parsed = rest.split_once(')').and_then(|(number, rest)| {
            let number = number.parse().ok()?;
            let rest = rest.trim_start().strip_prefix("var<")?;
            let (space, rest) = rest.split_once('>')?;
            let (name, _) = rest.split_once(':')?;
            Some((number, space.replace(' ', ""), name.trim().to_owned()))
        });
        let (number, space, name) = parsed.ok_or_else(|| format!("cannot read `{line}`"))?;
        match space.as_str() {
            "uniform" => {}
            "storage,read" => bindings.push(Binding { name, number, read_only: true }),
            "storage,read_write" => bindings.push(Binding { name, number, read_only: false }),
            _ => return Err(format!("cannot read `{line}`")),
        }
    }
    Ok(bindings)
}

/// The fields of `struct Params`, one a line.
fn params(text: &str) -> Result<Vec<(String, Scalar)>, String> {
    let mut fields = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or("").trim();
        if line == "struct Params {" {
            inside = true;
        } else if inside && line.starts_with('}') {
            return Ok(fields);
        } else if inside && !line.is_empty() {
            let field = line.trim_end_matches(',').split_once(':').map(|(name, of)| (name.trim(), of.trim()));
            let scalar = match field {
                Some((_, "u32")) => Scalar::U32,
                Some((_, "i32")) => Scalar::I32,
                Some((_, "f32")) => Scalar::F32,
                _ => return Err(format!("cannot read `{line}` of Params")),
            };
            fields.push((field.map_or(String::new(), |(name, _)| name.to_owned()), scalar));
        }
    }
    if inside { Err("Params does not end".into()) } else { Ok(fields) }
}

/// What `shaders/permutations` lists.
pub(super) fn listed() -> Result<Vec<Listed>, String> {
    gpu::listed("shaders/permutations", from_folder("permutations").unwrap_or(PERMUTATIONS))
}

/// Every permutation that the list allows.
#[cfg(test)]
pub(super) fn permutations() -> Vec<Permutation> {
    gpu::permutations(&listed().unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_permutation_is_valid_and_says_its_interface() {
        use naga::valid::{Capabilities, ValidationFlags, Validator};
        let with_and_without = |permutation: Permutation| {
            [false, true].map(|subgroups| (module(&permutation, subgroups), permutation.clone()))
        };
        for (module, permutation) in permutations().into_iter().flat_map(with_and_without) {
            let module = module.unwrap_or_else(|reason| panic!("{permutation}: {reason}"));
            let parsed = naga::front::wgsl::parse_str(&module.text)
                .unwrap_or_else(|error| panic!("{permutation}: {}", error.emit_to_string(&module.text)));
            let mut capabilities = Capabilities::default();
            capabilities |= Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP | Capabilities::COOPERATIVE_MATRIX;
            let info = Validator::new(ValidationFlags::all(), capabilities)
                .validate(&parsed)
                .unwrap_or_else(|error| panic!("{permutation}: {}", error.emit_to_string(&module.text)));
            let entry = parsed.entry_points.iter().position(|entry| entry.name == permutation.entry);
            let entry = entry.unwrap_or_else(|| panic!("{permutation}: there is no such entry point"));
            let invocations: u32 = parsed.entry_points[entry].workgroup_size.iter().product();
            assert!(invocations <= 256, "{permutation}: {invocations} invocations");
            let used = |handle: naga::Handle<naga::GlobalVariable>| !info.get_entry_point(entry)[handle].is_empty();
            let (mut storage, mut workgroup) = (0, 0);
            for (_, variable) in parsed.global_variables.iter().filter(|(handle, _)| used(*handle)) {
                let layout = &parsed.types[variable.ty];
                match variable.space {
                    naga::AddressSpace::Storage { access } => {
                        storage += 1;
                        let name = variable.name.as_deref().unwrap_or("");
                        let found = module.bindings.iter().find(|binding| binding.name == name);
                        let found = found.unwrap_or_else(|| panic!("{permutation}: `{name}` was not found"));
                        assert_eq!(Some(found.number), variable.binding.map(|binding| binding.binding), "{name}");
                        assert_eq!(found.read_only, !access.contains(naga::StorageAccess::STORE), "{name}");
                    }
                    naga::AddressSpace::Uniform => {
                        let naga::TypeInner::Struct { members, .. } = &layout.inner else { panic!("{permutation}") };
                        assert_eq!(members.len(), module.params.len(), "{permutation}");
                        for (i, (member, (name, scalar))) in members.iter().zip(&module.params).enumerate() {
                            assert_eq!(member.offset as usize, 4 * i, "{permutation}: {name}");
                            assert_eq!(member.name.as_deref(), Some(name.as_str()), "{permutation}");
                            let of = match parsed.types[member.ty].inner {
                                naga::TypeInner::Scalar(naga::Scalar::U32) => Scalar::U32,
                                naga::TypeInner::Scalar(naga::Scalar::I32) => Scalar::I32,
                                naga::TypeInner::Scalar(naga::Scalar::F32) => Scalar::F32,
                                ref other => panic!("{permutation}: {name} is {other:?}"),
                            };
                            assert_eq!(of, *scalar, "{permutation}: {name}");
                        }
                    }
                    naga::AddressSpace::WorkGroup => workgroup += layout.inner.size(parsed.to_ctx()),
                    _ => {}
                }
            }
            assert!(storage <= 8, "{permutation}: {storage} storage buffers");
            // Devices with cooperative matrices have more memory, and nobody else runs these.
            let most = if permutation.constants.iter().any(|(name, _)| *name == "MATRICES") { 32_768 } else { 16_384 };
            assert!(workgroup <= most, "{permutation}: {workgroup} bytes of workgroup memory");
        }
    }

    #[test]
    fn every_file_is_listed() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
        for (folder, prefix) in [(root.clone(), ""), (root.join("shared"), "shared/")] {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "wgsl") {
                    let name = format!("{prefix}{}", path.file_stem().unwrap().to_str().unwrap());
                    assert!(SOURCES.iter().any(|(of, _)| *of == name), "{name} is not among the sources");
                }
            }
        }
        let listed = listed().unwrap();
        for (name, _) in SOURCES.iter().filter(|(name, _)| !name.starts_with("shared/")) {
            assert!(listed.iter().any(|listed| listed.file == *name), "{name} has no permutation");
        }
    }
}
