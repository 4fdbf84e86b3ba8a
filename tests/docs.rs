//! What is written about the objectives is what the program says of them.

use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use nearfar::backend::OPERATIONS;
use nearfar::objective::scores::SCORE_PRESETS;
use nearfar::objective::{PRESETS, SETTINGS, table};
use nearfar::{Objective, ScoreObjective};

fn stdout(arguments: &[&str]) -> String {
    let output = Command::new(cargo_bin!("nearfar")).args(arguments).env_remove("NEARFAR_LOG").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn read(path: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_committed_document_is_the_generated_one() {
    assert!(
        read("docs/objectives.md") == table(),
        "docs/objectives.md is not what the code says; run: cargo run -- objectives --markdown > docs/objectives.md"
    );
    assert_eq!(stdout(&["objectives", "--markdown"]), table());
}

/// What stands in the README between `<!-- support -->` and `<!-- end -->`.
#[cfg(all(feature = "cuda", feature = "wgpu"))]
#[test]
fn the_support_table_is_the_generated_one() {
    let generated = nearfar::backend::support_table();
    let readme = read("README.md");
    let table = readme.split_once("<!-- support -->\n").and_then(|(_, rest)| rest.split_once("<!-- end -->"));
    assert_eq!(
        table.map(|(table, _)| table.trim()),
        Some(generated.trim()),
        "the table in README.md is not what the code says; it is what `cargo run -- devices --support` prints"
    );
    assert_eq!(stdout(&["devices", "--support"]), generated);
}

/// Objectives are computed by the backends that can do all operations.
#[test]
fn objectives_run_where_the_document_says() {
    let document = table();
    for (name, supported) in nearfar::backend::backends() {
        let missing: Vec<_> = OPERATIONS.iter().filter(|operation| !supported.contains(operation)).collect();
        let said = document.contains("| definition, cpu, cuda, wgpu |") || name == "cpu";
        assert_eq!(missing.is_empty(), said, "{name} cannot do {missing:?}, and src/objective/table.rs says otherwise");
    }
}

#[test]
fn objectives_are_listed() {
    let names: Vec<&str> = Objective::NAMES.into_iter().chain(ScoreObjective::NAMES).collect();
    let json: serde_json::Value = serde_json::from_str(&stdout(&["objectives", "--json"])).unwrap();
    let listed = json["objectives"].as_array().unwrap();
    assert_eq!(listed.iter().map(|entry| entry["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
    assert_eq!(json["settings"].as_array().unwrap().len(), SETTINGS.len());
    let sigmoid = listed.iter().find(|entry| entry["name"] == "sigmoid").unwrap();
    assert_eq!((&sigmoid["temperature"], &sigmoid["bias"]), (&0.1.into(), &serde_json::Value::from(-10.0)));
    assert_eq!(sigmoid["needs"], serde_json::json!(["documents"]));
    assert_eq!(sigmoid["formula"], Objective::sigmoid().to_string());
    let text = stdout(&["objectives", "gte", "rank-kl"]);
    assert!(text.starts_with("gte: ") && text.contains("\n\nrank-kl: ") && !text.contains("samtone"), "{text}");
    let output = Command::new(cargo_bin!("nearfar")).args(["objectives", "clip"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

/// A setting's options are options of `nearfar loss`.
#[test]
fn options_of_settings_exist() {
    let help = stdout(&["loss", "--help"]);
    for setting in SETTINGS {
        for option in setting.options.split(", ") {
            assert!(help.contains(&format!("      {option}")), "{}: {option}", setting.name);
        }
    }
}

/// The classes that objectives are held to have cases.
#[test]
fn oracles_have_cases() {
    let sources = ["formulas", "open_clip", "pytorch_metric_learning", "sentence_transformers"]
        .map(|source| read(&format!("tests/fixtures/peers/{source}.json")));
    let of_presets = PRESETS.iter().map(|preset| preset.oracle);
    for oracle in of_presets.chain(SCORE_PRESETS.iter().map(|preset| preset.oracle)) {
        let classes = oracle.split([' ', ';', ',']).filter(|word| word.ends_with("Loss"));
        for class in classes {
            assert!(sources.iter().any(|source| source.contains(&format!(" {class}("))), "{class}");
        }
        assert!(oracle.contains("PyTorch") || oracle.contains("Loss"), "{oracle}");
    }
}
