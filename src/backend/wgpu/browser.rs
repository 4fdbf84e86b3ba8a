//! What the browser's test is given: every permutation of every shader, and of each the smallest launch that the
//! conformance table makes, with what it binds before and after.
//!
//! `scripts/browser` runs this test with a folder in `NEARFAR_BROWSER` and hands what is then in it to
//! `tests/browser/run.mjs`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::engine::Traced;
use super::shader;
use super::{Settings, Wgpu};
use crate::backend::gpu::Permutation;
use crate::{Device, conformance};

/// Launches that bind more bytes than this are left out.
const LARGEST: usize = 1 << 18;

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// The type of a storage buffer's elements, as the shader declares it.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.contains("var<storage") && line.contains(&format!("> {name}:")))?;
    let name = line.split_once("array<")?.1.trim_end().trim_end_matches(';').strip_suffix('>')?;
    // It may have another name.
    let alias = text.lines().find_map(|line| line.strip_prefix("alias ")?.strip_prefix(name)?.strip_prefix(" = "));
    Some(alias.map_or(name, |of| of.trim_end_matches(';')))
}

fn launch(permutation: &Permutation, traced: &Traced) -> Value {
    let text = shader::module(permutation, false).unwrap().text;
    let bindings: Vec<Value> = traced
        .bindings
        .iter()
        .map(|binding| {
            json!({
                "name": binding.name,
                "number": binding.number,
                "element": element(&text, binding.name).unwrap_or_else(|| panic!("{permutation}: {}", binding.name)),
                "before": words(&binding.before),
                // What is only read stays as it was.
                "after": binding.after.as_deref().map(words),
            })
        })
        .collect();
    let params = (!traced.params.is_empty()).then(|| words(&traced.params));
    json!({ "permutation": permutation.to_string(), "params": params, "groups": traced.groups, "bindings": bindings })
}

fn write(path: &Path, value: &Value) {
    std::fs::write(path, serde_json::to_vec(value).unwrap()).unwrap();
}

#[test]
fn export_for_the_browser() {
    let Some(folder) = std::env::var_os("NEARFAR_BROWSER") else {
        return println!("skipped: NEARFAR_BROWSER names no folder");
    };
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder).unwrap();
    let mut shaders: Vec<Value> = Vec::new();
    for permutation in shader::permutations() {
        let texts = [false, true].map(|subgroups| shader::module(&permutation, subgroups).unwrap().text);
        for (number, text) in texts.iter().enumerate().filter(|(number, text)| *number == 0 || **text != texts[0]) {
            // Browsers want to be told what naga does not let one say.
            let enabled = if text.contains("subgroupShuffle") { "enable subgroups;\n" } else { "" };
            let name = format!("{permutation}{}", if number == 0 { "" } else { " SUBGROUPS" });
            shaders
                .push(json!({ "permutation": name, "entry": permutation.entry, "text": format!("{enabled}{text}") }));
        }
    }
    write(&folder.join("shaders.json"), &shaders.into());

    let settings = Settings { default_limits: true, no_subgroups: true, ..Settings::default() };
    let device = Device::new(Wgpu::open(0, settings).unwrap());
    let engine = &device.backend::<Wgpu>().unwrap().engine;
    engine.trace(LARGEST);
    for case in conformance::cases().iter().filter(|case| !case.is_slow()) {
        case.on_device(&device).unwrap();
    }
    let traced: BTreeMap<String, Value> = engine
        .traced()
        .iter()
        .map(|(permutation, traced)| (permutation.to_string(), launch(permutation, traced)))
        .collect();
    println!("{} launches", traced.len());
    write(&folder.join("launches.json"), &traced.into_values().collect());
}
