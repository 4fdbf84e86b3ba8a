//! The `nearfar` program as its users meet it: what it prints, what it refuses and what it leaves alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin;
use nearfar::objective::definition::{Definition, DefinitionInput};
use nearfar::objective::relations::Relations;
use nearfar::{Objective, Similarity};
use npyz::WriterBuilder;
use safetensors::SafeTensors;
use tempfile::TempDir;

/// A folder of inputs; arguments and files are relative to it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Three pairs of width 4 with two hard negatives each, and ids: what each test then spoils.
    fn with_batch() -> Self {
        let folder = Self::new();
        folder.npy("q.npy", &[3, 4], &random(12, 1));
        folder.npy("d.npy", &[3, 4], &random(12, 2));
        folder.npy("h.npy", &[3, 2, 4], &random(24, 3));
        folder.npy("i.npy", &[3], &[7i64, 8, 7]);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn npy<T: npyz::AutoSerialize + Copy>(&self, name: &str, shape: &[u64], values: &[T]) {
        let mut file = Vec::new();
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(&mut file).begin_nd().unwrap();
        writer.extend(values.iter().copied()).unwrap();
        writer.finish().unwrap();
        fs::write(self.path(name), file).unwrap();
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(cargo_bin!("nearfar"));
        command.current_dir(self.0.path()).args(arguments.split_whitespace()).env_remove("NEARFAR_LOG");
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs what must succeed without a message, and returns what it prints.
    fn stdout(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && stderr.is_empty(), "{arguments}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &str) -> serde_json::Value {
        let stdout = self.stdout(arguments);
        assert_eq!(stdout.matches('\n').count(), 1, "{stdout}");
        serde_json::from_str(&stdout).unwrap()
    }

    /// Runs `nearfar loss` on what must be refused with all of `expected` in the message. Nothing may be printed to
    /// stdout, no file may change and none may appear.
    #[track_caller]
    fn refused(&self, arguments: &str, expected: &[&str]) {
        let before = self.contents();
        let output = self.run(&format!("loss {arguments}"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments}: {:?} {stderr}", output.status);
        assert!(output.stdout.is_empty(), "{arguments}: {:?}", output.stdout);
        assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{arguments}: {stderr}");
        for expected in expected {
            assert!(stderr.contains(expected), "{arguments}: no `{expected}` in: {stderr}");
        }
        assert!(self.contents() == before, "{arguments}: changed files");
    }

    fn contents(&self) -> Vec<(PathBuf, Option<Vec<u8>>)> {
        let entries = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut contents: Vec<_> = entries.map(|path| (path.clone(), fs::read(path).ok())).collect();
        contents.sort();
        contents
    }
}

const PAIRS: &str = "--queries q.npy --documents d.npy";

/// Values in (-1, 1), the same for the same seed.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u32 << 23) as f32) - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// ‖a − b‖ / ‖b‖
fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

fn tensor(file: &[u8], name: &str, shape: &[usize]) -> Vec<f64> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let view = tensors.tensor(name).unwrap();
    assert_eq!((view.dtype(), view.shape()), (safetensors::Dtype::F32, shape), "{name}");
    view.data().chunks_exact(4).map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()))).collect()
}

/// The loss that is printed and the gradients that are written are those of the float64 definition.
fn agrees_with_the_definition(name: &str, similarity: Similarity, k: usize, with_ids: bool, smoothing: f64) {
    let case = format!("{name} {similarity} k={k} ids={with_ids} smoothing={smoothing}");
    let (n, d) = (13, 9);
    let (q, p, h) = (random(n * d, 11), random(n * d, 12), random(n * k * d, 13));
    let ids: Vec<i64> = (0..n as i64).map(|i| i * i % 5 - 2).collect();
    let folder = Folder::new();
    folder.npy("q.npy", &[n as u64, d as u64], &q);
    folder.npy("d.npy", &[n as u64, d as u64], &p);
    folder.npy("h.npy", &[n as u64, k as u64, d as u64], &h);
    folder.npy("i.npy", &[n as u64], &ids);

    let objective = Objective::named(name)
        .and_then(|objective| objective.temperature(0.3))
        .and_then(|objective| objective.similarity(similarity).label_smoothing(smoothing))
        .unwrap();
    let expected: Definition = objective
        .definition(DefinitionInput {
            queries: &wide(&q),
            documents: &wide(&p),
            hard_negatives: &wide(&h),
            width: d,
            relations: Relations { ids: with_ids.then_some(&ids[..]), ..Relations::default() },
            log_scale: objective.log_scale(),
            ..DefinitionInput::default()
        })
        .unwrap();

    let mut arguments = format!(
        "loss {PAIRS} --objective {name} --similarity {similarity} --temperature 0.3 --label-smoothing {smoothing} \
         --device cpu --json"
    );
    if k > 0 {
        arguments.push_str(" --hard-negatives h.npy");
    }
    if with_ids {
        arguments.push_str(" --ids i.npy");
    }
    let alone = folder.json(&arguments);
    let keys: Vec<&String> = alone.as_object().unwrap().keys().collect();
    let mut sorted = vec!["loss", "objective", "rows", "columns", "width", "device", "milliseconds"];
    sorted.sort_unstable();
    let mut found = keys.clone();
    found.sort_unstable();
    assert_eq!(found, sorted);
    let close = |value: &serde_json::Value| {
        let error = (value.as_f64().unwrap() - expected.loss).abs() / expected.loss.abs().max(1.0);
        assert!(error < 1e-5, "{case}: {value} {}", expected.loss);
    };
    close(&alone["loss"]);
    assert_eq!((&alone["objective"], &alone["device"]), (&name.into(), &"cpu".into()));
    assert_eq!(
        (&alone["rows"], &alone["columns"], &alone["width"]),
        (&n.into(), &(n * (1 + k)).into(), &d.into()),
        "{case}"
    );
    assert!(alone["milliseconds"].as_f64().unwrap() > 0.0);

    let with_gradients = folder.json(&format!("{arguments} --gradients out.safetensors"));
    close(&with_gradients["loss"]);
    let file = fs::read(folder.path("out.safetensors")).unwrap();
    let check = |tensor_name: &str, shape: &[usize], expected: &[f64]| {
        let error = relative_error(&tensor(&file, tensor_name, shape), expected);
        assert!(error < 1e-5, "{case} {tensor_name}: {error:e}");
    };
    check("d_queries", &[n, d], &expected.d_queries);
    check("d_documents", &[n, d], &expected.d_documents);
    check("d_log_scale", &[1], &[expected.d_log_scale]);
    let tensors = SafeTensors::deserialize(&file).unwrap();
    assert_eq!(tensors.len(), if k > 0 { 4 } else { 3 });
    if k > 0 {
        check("d_hard_negatives", &[n, k, d], &expected.d_hard_negatives);
    }
}

#[test]
fn losses_and_gradients_are_those_of_the_definition() {
    for name in Objective::CENTRE {
        agrees_with_the_definition(name, Similarity::Cosine, 0, false, 0.0);
        agrees_with_the_definition(name, Similarity::Cosine, 3, true, 0.0);
        agrees_with_the_definition(name, Similarity::Dot, 1, true, 0.0);
    }
    for name in ["infonce", "symmetric"] {
        agrees_with_the_definition(name, Similarity::Cosine, 2, true, 0.2);
    }
}

#[test]
fn the_default_is_samtone_at_the_default_temperature() {
    let folder = Folder::with_batch();
    let text = folder.stdout(&format!("loss {PAIRS} --hard-negatives h.npy --gradients out.safetensors"));
    assert!(text.starts_with(&format!("{}\n", Objective::samtone())), "{text}");
    let json = folder.json(&format!(
        "loss {PAIRS} --hard-negatives h.npy --objective samtone --similarity cosine --temperature 0.05 --json"
    ));
    for line in [
        &format!("loss       {}", json["loss"]),
        "rows       3 queries",
        "columns    9: 3 documents and 6 hard negatives",
        "width      4",
        "gradients  out.safetensors",
    ] {
        assert!(text.lines().any(|found| found == line), "no `{line}` in:\n{text}");
    }
    assert!(text.contains(" ms, loss and gradients"), "{text}");
    assert!(folder.stdout(&format!("loss {PAIRS}")).contains(" ms, loss alone"));
}

#[test]
fn other_float_types_and_orders_of_axes_give_the_same_loss() {
    let folder = Folder::with_batch();
    let loss = |queries: &str| {
        folder.json(&format!("loss --documents d.npy --queries {queries} --json"))["loss"].as_f64().unwrap()
    };
    let expected = loss("q.npy");
    let values = random(12, 1);
    folder.npy("q64.npy", &[3, 4], &wide(&values));
    assert_eq!(loss("q64.npy"), expected);

    let halves: Vec<half::f16> = values.iter().map(|&value| half::f16::from_f32(value)).collect();
    folder.npy("q16.npy", &[3, 4], &halves);
    assert!((loss("q16.npy") - expected).abs() < 0.01 * expected.max(1.0));

    let columns_first: Vec<f32> = (0..12).map(|i| values[i % 3 * 4 + i / 3]).collect();
    let mut file = Vec::new();
    let big_endian = npyz::DType::new_scalar(">f4".parse().unwrap());
    let options = npyz::WriteOptions::new().order(npyz::Order::Fortran).dtype(big_endian);
    let mut writer = options.shape(&[3, 4]).writer(&mut file).begin_nd().unwrap();
    writer.extend(columns_first).unwrap();
    writer.finish().unwrap();
    fs::write(folder.path("fortran.npy"), file).unwrap();
    assert_eq!(loss("fortran.npy"), expected);
}

#[test]
fn no_hard_negatives_of_each_pair_have_an_empty_gradient() {
    let folder = Folder::with_batch();
    folder.npy::<f32>("none.npy", &[3, 0, 4], &[]);
    let with = format!("loss {PAIRS} --hard-negatives none.npy --gradients out.safetensors --json");
    let json = folder.json(&with);
    assert_eq!(json["columns"], 3);
    assert_eq!(json["loss"], folder.json(&format!("loss {PAIRS} --json"))["loss"]);
    let file = fs::read(folder.path("out.safetensors")).unwrap();
    assert!(tensor(&file, "d_hard_negatives", &[3, 0, 4]).is_empty());
}

#[test]
fn devices_are_listed() {
    let folder = Folder::new();
    let text = folder.stdout("devices");
    assert!(text.lines().any(|line| line.starts_with("cpu ")), "{text}");
    let json = folder.json("devices --json");
    let devices = json["devices"].as_array().unwrap();
    assert_eq!(text.lines().filter(|line| !line.starts_with(' ')).count(), devices.len() + 1, "{text}");
    for device in devices {
        let description = device["description"].as_str().unwrap();
        assert!(!description.is_empty() && text.contains(description), "{text}");
        for (name, value) in device["properties"].as_object().unwrap() {
            let value = value.as_str().unwrap();
            let shown = |line: &str| line.trim_start().starts_with(&format!("{name} ")) && line.ends_with(value);
            assert!(text.lines().any(shown), "{name}: {value}: {text}");
        }
        assert_eq!(device["unsupported"], serde_json::json!([]), "{}", device["name"]);
        if device["name"].as_str().unwrap().starts_with("wgpu:") {
            for property in ["adapter", "backend", "driver", "features", "max_storage_buffer_binding_size"] {
                assert!(device["properties"][property].is_string(), "{property}");
            }
        }
    }
    assert!(devices.iter().any(|device| device["name"] == "cpu"));
    assert_eq!(json["operations"], serde_json::json!(nearfar::backend::OPERATIONS));
}

#[test]
fn help_explains_and_ends_with_an_example() {
    let folder = Folder::new();
    for arguments in ["--help", "devices --help", "loss --help", "help loss"] {
        let help = folder.stdout(arguments);
        let example = help.split("Example:").nth(1).unwrap_or_else(|| panic!("{help}"));
        assert!(example.trim_start().starts_with("nearfar "), "{help}");
    }
    let help = folder.stdout("loss --help");
    for name in Objective::CENTRE {
        assert!(help.contains(name), "{help}");
    }
    assert!(folder.stdout("--help").contains("RAYON_NUM_THREADS"));
    assert!(folder.stdout("--version").starts_with("nearfar "));
}

#[test]
fn a_command_line_that_is_not_understood_exits_with_2() {
    let folder = Folder::with_batch();
    for (arguments, expected) in [
        ("losses", "losses"),
        ("loss --queries q.npy", "--documents"),
        ("loss --querys q.npy --documents d.npy", "--querys"),
        ("loss --queries q.npy --documents d.npy --temperature warm", "warm"),
        ("devices extra", "extra"),
    ] {
        let output = folder.run(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected) && output.stdout.is_empty(), "{stderr}");
    }
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let folder = Folder::with_batch();
    fs::write(folder.path("out.safetensors"), "old").unwrap();
    for temperature in ["0", "-0.05", "nan", "inf", "1e40", "1e300", "1e-50"] {
        folder.refused(
            &format!("{PAIRS} --temperature {temperature} --gradients out.safetensors"),
            &["temperature", "must be positive"],
        );
    }
    folder.refused(
        &format!("{PAIRS} --objective decoupled --label-smoothing 0.1"),
        &["not defined for decoupled", "cross-entropy"],
    );
    for smoothing in ["1", "-0.1", "nan"] {
        folder.refused(
            &format!("{PAIRS} --objective infonce --label-smoothing {smoothing}"),
            &["label smoothing", "at least 0 and below 1"],
        );
    }
    folder.refused(&format!("{PAIRS} --objective sam"), &["sam", "samtone-bidirectional", "gte"]);
    folder.refused(&format!("{PAIRS} --similarity l2"), &["l2", "cosine", "dot"]);
    for device in ["wgpu:7", "tpu", "cpu:0", "''"] {
        folder.refused(&format!("{PAIRS} --device {device}"), &["--device", device, "available: cpu"]);
    }
}

#[test]
fn files_that_are_no_embeddings_are_refused() {
    let folder = Folder::with_batch();
    let good = fs::read(folder.path("q.npy")).unwrap();
    fs::write(folder.path("out.safetensors"), "old").unwrap();
    fs::write(folder.path("empty.npy"), "").unwrap();
    fs::write(folder.path("text.npy"), "0.1 0.2\n0.3 0.4\n").unwrap();
    fs::write(folder.path("cut.npy"), &good[..good.len() - 5]).unwrap();
    fs::write(folder.path("header.npy"), &good[..40]).unwrap();
    fs::write(folder.path("long.npy"), [&good[..], b"\n"].concat()).unwrap();
    fs::create_dir(folder.path("folder.npy")).unwrap();
    folder.npy("integers.npy", &[3, 4], &[1i32; 12]);
    folder.npy("huge.npy", &[3, 4], &[1e300f64; 12]);
    let cases: &[(&str, &[&str])] = &[
        ("missing.npy", &["cannot read it"]),
        ("empty.npy", &["is not an .npy file", "numpy.save"]),
        ("text.npy", &["is not an .npy file", "numpy.save"]),
        ("cut.npy", &["is cut short", "(3, 4)", "48 bytes", "43"]),
        ("header.npy", &["is cut short"]),
        ("long.npy", &["is too long"]),
        ("folder.npy", &["is a folder"]),
        ("integers.npy", &["holds int32, expected float16, float32 or float64", "astype"]),
        ("huge.npy", &["holds 1e300", "float32"]),
    ];
    for (file, expected) in cases {
        let expected = [&[*file][..], expected].concat();
        folder.refused(&format!("--queries {file} --documents d.npy --gradients out.safetensors"), &expected);
        folder.refused(&format!("--queries q.npy --documents {file}"), &expected);
        folder.refused(&format!("{PAIRS} --hard-negatives {file}"), &expected);
        let expected_of_ids = match *file {
            "integers.npy" => vec!["integers.npy: has shape (3, 4), expected (3)"],
            "huge.npy" => vec!["huge.npy: holds float64, expected int32, int64 or uint32"],
            _ => expected,
        };
        folder.refused(&format!("{PAIRS} --ids {file}"), &expected_of_ids);
    }
}

#[test]
fn shapes_that_do_not_fit_together_are_refused() {
    let folder = Folder::with_batch();
    let ones = |name: &str, shape: &[u64]| {
        folder.npy(name, shape, &vec![1f32; shape.iter().product::<u64>() as usize]);
    };
    ones("flat.npy", &[12]);
    ones("cube.npy", &[3, 2, 4]);
    ones("scalar.npy", &[]);
    ones("wide.npy", &[3, 5]);
    ones("two.npy", &[2, 4]);
    ones("four.npy", &[4, 4]);
    ones("no_rows.npy", &[0, 4]);
    ones("no_columns.npy", &[3, 0]);
    for (file, shape) in [("flat.npy", "(12)"), ("cube.npy", "(3, 2, 4)"), ("scalar.npy", "()")] {
        folder.refused(&format!("--queries {file} --documents d.npy"), &[file, shape, "expected (N, d)"]);
        folder.refused(&format!("--queries q.npy --documents {file}"), &[file, shape, "expected (3, 4)"]);
    }
    for file in ["no_rows.npy", "no_columns.npy"] {
        folder.refused(&format!("--queries {file} --documents {file}"), &[file, "is empty", "at least one query"]);
    }
    folder.refused("--queries q.npy --documents wide.npy", &["wide.npy", "5 numbers", "q.npy has rows of 4"]);
    for (file, rows) in [("two.npy", "2 documents"), ("four.npy", "4 documents"), ("no_rows.npy", "0 documents")] {
        folder.refused(
            &format!("--queries q.npy --documents {file}"),
            &[file, rows, "3 queries", "document i must be the positive of query i", "--hard-negatives"],
        );
    }
    ones("h_rows.npy", &[2, 2, 4]);
    ones("h_wide.npy", &[3, 2, 5]);
    for (file, shape) in [("h_rows.npy", "(2, 2, 4)"), ("h_wide.npy", "(3, 2, 5)"), ("two.npy", "(2, 4)")] {
        folder.refused(&format!("{PAIRS} --hard-negatives {file}"), &[file, shape, "expected (3, K, 4)"]);
    }
    folder.npy("i_short.npy", &[2], &[1i64, 2]);
    folder.npy("i_matrix.npy", &[3, 1], &[1i64, 2, 3]);
    folder.npy("i_float.npy", &[3], &[1f32, 2.0, 3.0]);
    folder.npy("i_narrow.npy", &[3], &[1u8, 2, 3]);
    folder
        .refused(&format!("{PAIRS} --ids i_short.npy"), &["i_short.npy", "(2)", "expected (3), one id for each pair"]);
    folder.refused(&format!("{PAIRS} --ids i_matrix.npy"), &["i_matrix.npy", "(3, 1)", "expected (3)"]);
    folder.refused(&format!("{PAIRS} --ids i_float.npy"), &["holds float32, expected int32, int64 or uint32"]);
    folder.refused(&format!("{PAIRS} --ids i_narrow.npy"), &["holds uint8, expected int32, int64 or uint32"]);
}

#[test]
fn values_without_a_loss_are_refused() {
    let folder = Folder::with_batch();
    fs::write(folder.path("out.safetensors"), "old").unwrap();
    let spoilt = |name: &str, shape: &[u64], at: std::ops::Range<usize>, value: f32| {
        let mut values = vec![0.5f32; shape.iter().product::<u64>() as usize];
        values[at].fill(value);
        folder.npy(name, shape, &values);
    };
    for (value, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        spoilt("bad.npy", &[3, 4], 9..10, value);
        spoilt("bad_h.npy", &[3, 2, 4], 13..14, value);
        let (in_row_2, in_row_3) = (format!("holds {word} in row 2"), format!("holds {word} in row 3"));
        for similarity in ["cosine", "dot"] {
            let options = format!("--similarity {similarity} --gradients out.safetensors");
            folder
                .refused(&format!("--queries bad.npy --documents d.npy {options}"), &["bad.npy", &in_row_2, "queries"]);
            folder.refused(&format!("--queries q.npy --documents bad.npy {options}"), &["bad.npy", &in_row_2]);
            folder.refused(&format!("{PAIRS} --hard-negatives bad_h.npy {options}"), &["bad_h.npy", &in_row_3]);
        }
    }
    spoilt("zero.npy", &[3, 4], 4..8, 0.0);
    spoilt("zero_h.npy", &[3, 2, 4], 16..20, 0.0);
    for (arguments, row) in [
        ("--queries zero.npy --documents d.npy", "is zero in row 1"),
        ("--queries q.npy --documents zero.npy", "is zero in row 1"),
        ("--queries q.npy --documents d.npy --hard-negatives zero_h.npy", "is zero in row 4"),
    ] {
        folder.refused(arguments, &["zero", row, "use dot similarity"]);
        let loss = folder.json(&format!("loss {arguments} --similarity dot --json"))["loss"].as_f64().unwrap();
        assert!(loss.is_finite());
    }
    // Finite values whose products are not.
    spoilt("large.npy", &[3, 4], 0..12, 1e30);
    let arguments = "--queries large.npy --documents large.npy --similarity dot";
    folder.refused(arguments, &["the loss is", "--similarity cosine", "--temperature"]);
    folder.refused(&format!("{arguments} --gradients out.safetensors"), &["the loss is"]);
    // Logits of ±1 from tiny queries, large documents and a tiny temperature: the gradient by the queries is 1e40.
    folder.npy("tiny.npy", &[2, 1], &[1e-40f32, 1e-40]);
    folder.npy("far.npy", &[2, 1], &[1e12f32, -1e12]);
    let arguments = "--queries tiny.npy --documents far.npy --objective infonce --similarity dot --temperature 1e-28";
    let loss = folder.json(&format!("loss {arguments} --json"))["loss"].as_f64().unwrap();
    assert!((loss - (2.0 * 1f64.cosh()).ln()).abs() < 1e-3, "{loss}");
    folder.refused(&format!("{arguments} --gradients out.safetensors"), &["d_queries holds", "nothing was written"]);
}

#[test]
fn gradients_go_only_where_a_file_can_stand() {
    let folder = Folder::with_batch();
    fs::create_dir(folder.path("folder")).unwrap();
    let gradients = |path: &str| format!("{PAIRS} --hard-negatives h.npy --ids i.npy --gradients {path}");
    folder.refused(&gradients("missing/out.safetensors"), &["missing/out.safetensors", "create missing first"]);
    folder.refused(&gradients("folder"), &["folder is a folder", "a file in it"]);
    folder.refused(&gradients("q.npy/out.safetensors"), &["q.npy"]);
    folder.refused(&gradients(".."), &["does not name a file"]);
    for input in ["q.npy", "./d.npy", "folder/../h.npy", "i.npy"] {
        folder.refused(&gradients(input), &[input, "is an input of this command"]);
    }
    folder.stdout(&format!("loss {}", gradients("folder/out.safetensors")));
    assert!(SafeTensors::deserialize(&fs::read(folder.path("folder/out.safetensors")).unwrap()).is_ok());
}

/// A device file is not replaced by a regular one, not even by the superuser.
#[cfg(unix)]
#[test]
fn gradients_do_not_replace_a_device() {
    let folder = Folder::with_batch();
    folder.refused(&format!("{PAIRS} --gradients /dev/full"), &["/dev/full is a device or a pipe"]);
    assert!(!fs::metadata("/dev/full").unwrap().is_file());
}

/// In place of a read-only folder, which the superuser could write all the same.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_takes_no_files_is_named() {
    let folder = Folder::with_batch();
    folder.refused(&format!("{PAIRS} --gradients /proc/out.safetensors"), &["/proc/out.safetensors: cannot create"]);
}

/// A limit on the size of files stands in for a full disk: writing fails half-way.
#[cfg(target_os = "linux")]
#[test]
fn a_write_that_fails_half_way_leaves_the_old_file() {
    let folder = Folder::new();
    folder.npy("q.npy", &[40, 100], &random(4000, 1));
    folder.npy("d.npy", &[40, 100], &random(4000, 2));
    let arguments = "loss --queries q.npy --documents d.npy --gradients out.safetensors --json";
    folder.stdout(arguments);
    fs::write(folder.path("out.safetensors"), "old").unwrap();
    let before = folder.contents();
    let output = Command::new("sh")
        .current_dir(folder.0.path())
        .args(["-c", &format!("trap '' XFSZ; ulimit -f 1; exec \"$0\" {arguments}")])
        .arg(cargo_bin!("nearfar"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("out.safetensors: cannot write it"), "{stderr}");
    assert!(output.stdout.is_empty());
    assert!(folder.contents() == before);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let folder = Folder::new();
    for arguments in ["devices --json", "devices", "--help"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = folder
            .command(arguments)
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && stderr.is_empty(), "{arguments}: {:?} {stderr}", output.status);
    }
}

/// A result that could not be delivered is not a success.
#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_an_error() {
    let folder = Folder::new();
    let full = fs::OpenOptions::new().write(true).open(Path::new("/dev/full")).unwrap();
    let output =
        folder.command("devices").stdout(full).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: cannot write to stdout: "), "{stderr}");
}

#[test]
fn messages_go_to_stderr_on_request() {
    let folder = Folder::with_batch();
    let quiet = folder.stdout(&format!("loss {PAIRS} --json"));
    for output in [
        folder.run(&format!("loss {PAIRS} --json --verbose")),
        folder.command(&format!("loss {PAIRS} --json")).env("NEARFAR_LOG", "nearfar=debug").output().unwrap(),
    ] {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && stderr.contains("read the embeddings"), "{stderr}");
        assert!(!stderr.contains('\u{1b}'), "colours in a file: {stderr}");
        let stdout: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(stdout["loss"], serde_json::from_str::<serde_json::Value>(&quiet).unwrap()["loss"]);
    }
    let output = folder.command("devices").env("NEARFAR_LOG", "nearfar=loudly").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("NEARFAR_LOG is `nearfar=loudly`") && stderr.contains("debug"), "{stderr}");
}
