//! `nearfar embed` and `nearfar evaluate` as their users meet them, with a tiny model made through the library.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin;
use nearfar::backend::operations::Pooling;
use nearfar::evaluate::{Beir, evaluate};
use nearfar::model::Model;
use nearfar::nn::{DualEncoder, DualEncoderSettings, EncoderSettings, Tower, Towers};
use nearfar::text::Tokenizer;
use nearfar::{Device, Similarity, npy};
use tempfile::TempDir;

const WORDS: [&str; 3] = ["the cat sat on the mat", "a dog ran to the cat", "the dog sat on a red mat"];

fn tiny_model(towers: Towers, similarity: Similarity) -> Model {
    let tokenizer = Tokenizer::train(WORDS, 60).unwrap();
    let encoder = EncoderSettings {
        vocabulary_size: tokenizer.id_bound(),
        hidden_size: 8,
        layers: 1,
        heads: 2,
        feed_forward_size: 12,
        max_positions: 16,
        token_types: 2,
        layer_norm_epsilon: 1e-12,
        dropout: 0.1,
        attention_dropout: 0.1,
        pooling: Pooling::Mean,
    };
    let settings = DualEncoderSettings { encoder, towers, projection: None };
    let mut encoder = DualEncoder::new(&Device::cpu(), settings, 3.0, 5).unwrap();
    // Both towers start the same; which of them was used must show.
    let parameters = encoder.parameters_mut();
    let changed: Vec<(usize, Vec<f32>)> = parameters
        .iter()
        .enumerate()
        .filter(|(_, parameter)| parameter.name() == "document.embeddings.word_embeddings.weight")
        .map(|(index, parameter)| (index, parameter.tensor().to_host::<f32>().unwrap()))
        .collect();
    for (index, mut values) in changed {
        values.reverse();
        parameters.write(index, &values).unwrap();
    }
    Model { encoder, tokenizer, similarity, max_query_length: 6, max_document_length: 16 }
}

/// A folder with a model and a test collection; arguments and files are relative to it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        tiny_model(Towers::Separate, Similarity::Cosine).save(&folder.path("model")).unwrap();
        fs::create_dir_all(folder.path("beir/qrels")).unwrap();
        folder.write(
            "beir/corpus.jsonl",
            "{\"_id\": \"d1\", \"title\": \"the cat\", \"text\": \"sat on the mat\"}\n\
             {\"_id\": \"d2\", \"title\": \"\", \"text\": \"a dog ran to the cat and on and on and on to the red mat\"}\n\
             {\"_id\": \"d3\", \"text\": \"a red dog\"}\n\
             {\"_id\": \"q1\", \"text\": \"the red cat\"}\n",
        );
        folder.write(
            "beir/queries.jsonl",
            "{\"_id\": \"q1\", \"text\": \"the red cat\"}\n{\"_id\": \"q2\", \"text\": \"dog on the mat on the red mat\"}\n",
        );
        folder.write("beir/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t2\nq2\td3\t1\n");
        folder.write("texts.txt", "the cat\n\na red dog sat on the mat of the cat\n");
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    fn model(&self) -> Model {
        Model::load(&self.path("model"), &Device::cpu()).unwrap()
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(cargo_bin!("nearfar"));
        command.current_dir(self.0.path()).args(arguments.split_whitespace()).env_remove("NEARFAR_LOG");
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs with a text on stdin.
    fn run_with(&self, arguments: &str, input: &[u8]) -> Output {
        self.write("stdin", input);
        let stdin = fs::File::open(self.path("stdin")).unwrap();
        self.command(arguments).stdin(stdin).stderr(Stdio::piped()).output().unwrap()
    }

    /// What a command that must succeed without a message prints.
    #[track_caller]
    fn stdout(&self, output: Output) -> String {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && stderr.is_empty(), "{stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn json(&self, arguments: &str) -> serde_json::Value {
        let stdout = self.stdout(self.run(arguments));
        assert_eq!(stdout.matches('\n').count(), 1, "{stdout}");
        serde_json::from_str(&stdout).unwrap()
    }

    /// Runs what must be refused with all of `expected` in the message. Nothing may be printed to stdout, no file may
    /// change and none may appear.
    #[track_caller]
    fn refused(&self, arguments: &str, expected: &[&str]) {
        let before = contents(self.0.path());
        let output = self.run(arguments);
        self.check_refusal(arguments, output, expected);
        assert!(contents(self.0.path()) == before, "{arguments}: changed files");
    }

    #[track_caller]
    fn check_refusal(&self, arguments: &str, output: Output, expected: &[&str]) {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments}: {:?} {stderr}", output.status);
        assert!(output.stdout.is_empty(), "{arguments}: {:?}", output.stdout);
        assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{arguments}: {stderr}");
        for expected in expected {
            assert!(stderr.contains(expected), "{arguments}: no `{expected}` in: {stderr}");
        }
    }

    /// Both commands must refuse the model.
    #[track_caller]
    fn model_refused(&self, expected: &[&str]) {
        self.write("e.npy", "old");
        self.refused(EMBED, expected);
        self.refused(EVALUATE, expected);
    }
}

const EMBED: &str = "embed --model model --input texts.txt --output e.npy";
const EVALUATE: &str = "evaluate --model model --dataset beir";

/// Every file under a folder with its content.
fn contents(folder: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut contents = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        contents.push((path.clone(), fs::read(&path).ok()));
        if path.is_dir() {
            contents.extend(self::contents(&path));
        }
    }
    contents.sort();
    contents
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} instead of {expected}");
    }
}

#[test]
fn embeddings_are_those_of_the_library() {
    let folder = Folder::new();
    let texts = ["the cat", "", "a red dog sat on the mat of the cat"];
    let expected = |tower| folder.model().embed(tower, &texts, &mut |_| ()).unwrap();
    let (queries, documents) = (expected(Tower::Query), expected(Tower::Document));
    assert!(queries.iter().zip(&documents).any(|(q, d)| (q - d).abs() > 1e-2), "the towers must differ");

    folder.write("e.npy", "old");
    let text = folder.stdout(folder.run(EMBED));
    let (shape, values) = npy::read_f32(&folder.path("e.npy")).unwrap();
    assert_eq!(shape, [3, 8]);
    assert_close(&values, &documents);
    for line in ["texts   3", "width   8", "output  e.npy"] {
        assert!(text.lines().any(|found| found == line), "no `{line}` in:\n{text}");
    }

    for (tower, expected) in [("query", &queries), ("document", &documents)] {
        let json = folder.json(&format!("{EMBED} --tower {tower} --device cpu --json"));
        let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        assert_eq!(keys.len(), 4, "{keys:?}");
        assert_eq!((&json["texts"], &json["width"], &json["output"]), (&3.into(), &8.into(), &"e.npy".into()));
        assert!(json["seconds"].as_f64().unwrap() > 0.0);
        assert_close(&npy::read_f32(&folder.path("e.npy")).unwrap().1, expected);
    }
}

#[test]
fn the_form_of_the_input_does_not_matter() {
    let folder = Folder::new();
    folder.stdout(folder.run("embed --model model --input texts.txt --output expected.npy"));
    let expected = npy::read_f32(&folder.path("expected.npy")).unwrap();
    folder.write(
        "texts.jsonl",
        "{\"text\": \"the cat\"}\n\n\"\"\n{\"document\": \"a red dog sat on the mat of the cat\", \"query\": \"no\"}\n",
    );
    folder.write("texts.csv", "id,text\n1,the cat\n2,\"\"\n3,\"a red dog\nsat on the mat of the cat\"\n");
    folder.write("texts.tsv", "text\tid\nthe cat\t1\n\t2\na red dog sat on the mat of the cat\t3\n");
    for input in ["texts.jsonl", "texts.csv", "texts.tsv"] {
        folder.stdout(folder.run(&format!("embed --model model --input {input} --output e.npy")));
        assert_eq!(npy::read_f32(&folder.path("e.npy")).unwrap(), expected, "{input}");
    }
    let input = fs::read(folder.path("texts.txt")).unwrap();
    folder.stdout(folder.run_with("embed --model model --input - --output e.npy", &input));
    assert_eq!(npy::read_f32(&folder.path("e.npy")).unwrap(), expected);

    // Of a pair, the tower says which text is meant.
    folder.write("pairs.jsonl", "{\"query\": \"the cat\", \"document\": \"a red dog\"}\n");
    for (tower, name, text) in [("query", Tower::Query, "the cat"), ("document", Tower::Document, "a red dog")] {
        folder.stdout(folder.run(&format!("embed --model model --input pairs.jsonl --output e.npy --tower {tower}")));
        let expected = folder.model().embed(name, &[text], &mut |_| ()).unwrap();
        assert_close(&npy::read_f32(&folder.path("e.npy")).unwrap().1, &expected);
    }
}

#[test]
fn metrics_are_those_of_the_library() {
    let folder = Folder::new();
    let expected = |change: &dyn Fn(&mut Model)| {
        let mut model = folder.model();
        change(&mut model);
        evaluate(&model, &Beir::open(folder.path("beir")).unwrap(), &mut |_| ()).unwrap()
    };
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        tiny_model(Towers::Separate, similarity).save(&folder.path("model")).unwrap();
        let metrics = expected(&|_| ());
        assert!(metrics.ndcg_at_10 > 0.0 && metrics.ndcg_at_10 < 1.0, "the case must tell rankings apart");
        let line = folder.stdout(folder.run(&format!("{EVALUATE} --device cpu --json")));
        let value = |value: f64| serde_json::to_string(&value).unwrap();
        // The keys and their order are what scripts rely on.
        let contract = format!(
            "{{\"ndcg@10\":{},\"mrr@10\":{},\"recall@100\":{},\"map\":{},\"queries\":2,\"documents\":4}}\n",
            value(metrics.ndcg_at_10),
            value(metrics.mrr_at_10),
            value(metrics.recall_at_100),
            value(metrics.map),
        );
        assert_eq!(line, contract);

        let text = folder.stdout(folder.run(EVALUATE));
        let table = format!(
            "ndcg@10     {:.4}\nmrr@10      {:.4}\nrecall@100  {:.4}\nmap         {:.4}\nqueries          2\ndocuments        4\n",
            metrics.ndcg_at_10, metrics.mrr_at_10, metrics.recall_at_100, metrics.map
        );
        assert_eq!(text, table);
    }
}

#[test]
fn lengths_can_be_set_up_to_the_positions() {
    let folder = Folder::new();
    // Cut to one word, three documents are the same, so that ranks follow ids; in full the second is another.
    folder.write(
        "beir/corpus.jsonl",
        "{\"_id\": \"1\", \"text\": \"cat red dog\"}\n{\"_id\": \"2\", \"text\": \"cat mat\"}\n{\"_id\": \"3\", \"text\": \"cat\"}\n",
    );
    folder.write("beir/queries.jsonl", "{\"_id\": \"q\", \"text\": \"cat red mat\"}\n");
    folder.write("beir/qrels/test.tsv", "q\t1\t1\n");
    let cut = folder.json(&format!("{EVALUATE} --max-document-length 3 --max-query-length 3 --json"));
    assert!((cut["mrr@10"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-12, "{cut}");
    folder.stdout(folder.run(&format!("{EVALUATE} --max-document-length 16 --max-query-length 16")));
    for option in ["--max-document-length", "--max-query-length"] {
        folder.refused(&format!("{EVALUATE} {option} 17"), &[option, "17", "16 positions"]);
        folder.refused(&format!("{EVALUATE} {option} 2"), &[option, "2"]);
        folder.refused(&format!("{EVALUATE} {option} 0"), &[option]);
        folder.refused(&format!("{EVALUATE} {option} many"), &[option, "many"]);
    }
}

#[test]
fn broken_models_are_refused() {
    let folder = Folder::new();
    for command in ["embed --model missing --input texts.txt --output e.npy", "evaluate --model missing --dataset beir"]
    {
        folder.refused(command, &["missing", "there is no such folder"]);
    }
    let weights = fs::read(folder.path("model/model.safetensors")).unwrap();
    folder.write("model/model.safetensors", &weights[..weights.len() - 5]);
    folder.model_refused(&["model.safetensors: is not a whole safetensors file"]);
    fs::remove_file(folder.path("model/model.safetensors")).unwrap();
    folder.model_refused(&["model.safetensors: cannot read it"]);
    folder.write("model/model.safetensors", &weights);

    let foreign: Vec<String> = ('a'..='z').map(|letter| format!("{letter}{letter} {letter}x{letter}")).collect();
    let tokenizer = fs::read(folder.path("model/tokenizer.json")).unwrap();
    Tokenizer::train(&foreign, 200).unwrap().save(folder.path("model/tokenizer.json")).unwrap();
    folder.model_refused(&["tokenizer.json: has token ids up to", "vocabulary of"]);
    folder.write("model/tokenizer.json", "{}");
    folder.model_refused(&["tokenizer.json", "no tokenizer"]);
    folder.write("model/tokenizer.json", tokenizer);

    let extra = fs::read_to_string(folder.path("model/nearfar.json")).unwrap();
    let longer = extra.replace("\"max_document_length\": 16", "\"max_document_length\": 17");
    assert_ne!(longer, extra);
    folder.write("model/nearfar.json", longer);
    folder.model_refused(&["nearfar.json", "allows 17 tokens", "16 positions"]);
    folder.write("model/nearfar.json", extra);

    // Weights that are not finite make embeddings that are not.
    let mut model = folder.model();
    let count = model.encoder.parameters().get(0).unwrap().tensor().elements();
    model.encoder.parameters_mut().write(0, &vec![f32::NAN; count]).unwrap();
    model.save(&folder.path("model")).unwrap();
    folder.refused(&format!("{EMBED} --tower query"), &["text 1 holds NaN", "nothing was written"]);
    folder.refused(EVALUATE, &["`queries` with the id `q1`", "NaN"]);
}

#[test]
fn broken_collections_are_refused() {
    let folder = Folder::new();
    folder.refused("evaluate --model model --dataset missing", &["missing: is not a folder", "corpus.jsonl"]);
    for (file, broken) in [
        (
            "beir/corpus.jsonl",
            [
                (
                    "{\"_id\": \"d1\", \"text\": \"a\"}\n{\"_id\": \"d1\", \"text\": \"b\"}\n",
                    "corpus.jsonl:2: the id `d1` was already used in line 1",
                ),
                ("{\"_id\": \"d1\", \"text\": \"a\"}\n\n{\"_id\": \"d2\", \"text\": \n", "corpus.jsonl:3: "),
            ],
        ),
        (
            "beir/queries.jsonl",
            [
                (
                    "{\"_id\": \"q1\", \"text\": \"a\"}\n{\"_id\": \"q1\", \"text\": \"a\"}\n",
                    "queries.jsonl:2: the id `q1`",
                ),
                ("{\"_id\": \"q1\"}\n", "queries.jsonl:1: missing field `text`"),
            ],
        ),
        (
            "beir/qrels/test.tsv",
            [
                ("q1\td1\t1\nq9\td1\t1\n", "test.tsv:2: the query `q9` is not in queries.jsonl"),
                ("q1\td1\tvery\n", "test.tsv:1: the score `very`"),
            ],
        ),
    ] {
        let whole = fs::read(folder.path(file)).unwrap();
        for (content, expected) in broken {
            folder.write(file, content);
            folder.refused(EVALUATE, &[expected]);
        }
        fs::remove_file(folder.path(file)).unwrap();
        folder.refused(EVALUATE, &[file.rsplit('/').next().unwrap(), "is missing; a BEIR folder holds"]);
        folder.write(file, whole);
    }
    folder.stdout(folder.run(EVALUATE));
}

#[test]
fn broken_texts_are_refused() {
    let folder = Folder::new();
    let embed = |input: &str| format!("embed --model model --input {input} --output e.npy");
    folder.write("e.npy", "old");
    folder.refused(&embed("missing.txt"), &["missing.txt: cannot open it"]);
    folder.refused(&embed("model"), &["model", "no extension"]);
    fs::create_dir(folder.path("folder.txt")).unwrap();
    folder.refused(&embed("folder.txt"), &["folder.txt: is a folder"]);
    for (name, content, expected) in [
        ("empty.txt", "", "empty.txt: holds no text"),
        ("empty.jsonl", "\n", "empty.jsonl: holds no text"),
        ("empty.csv", "", "empty.csv: is empty, expected a header with a column `text`"),
        ("header.csv", "text\n", "header.csv: holds no text"),
        ("broken.jsonl", "\"the cat\"\n{\"text\": \"the\n", "broken.jsonl:2: not valid JSON"),
        ("names.jsonl", "{\"body\": \"the cat\"}\n", "names.jsonl:1: no `text`, `document` or `query`, found `body`"),
        ("names.tsv", "body\nthe cat\n", "names.tsv:1: the header names no `text`"),
        ("texts.pdf", "the cat\n", "texts.pdf: unknown extension `.pdf`, expected .txt, .jsonl"),
    ] {
        folder.write(name, content);
        folder.refused(&embed(name), &[expected]);
    }
    folder.write("latin.txt", b"the cat\nna\xefve\n");
    folder.refused(&embed("latin.txt"), &["latin.txt:2: the line is not UTF-8", "convert the file"]);
    for (input, expected) in [(&b""[..], "stdin: holds no text"), (b"the\n\xff\n", "stdin:2: ")] {
        folder.check_refusal("stdin", folder.run_with(&embed("-"), input), &[expected]);
    }
    assert_eq!(fs::read(folder.path("e.npy")).unwrap(), b"old");
}

#[test]
fn embeddings_go_only_where_a_file_can_stand() {
    let folder = Folder::new();
    fs::create_dir(folder.path("folder")).unwrap();
    let embed = |output: &str| format!("embed --model model --input texts.txt --output {output}");
    folder.refused(&embed("folder"), &["--output: folder is a folder"]);
    folder.refused(&embed("missing/e.npy"), &["--output", "create missing first"]);
    folder.refused(&embed("texts.txt"), &["texts.txt is an input of this command"]);
    folder.refused(&embed("model/model.safetensors"), &["model.safetensors is an input of this command"]);
    folder.stdout(folder.run(&embed("folder/e.npy")));
    assert_eq!(npy::read_f32(&folder.path("folder/e.npy")).unwrap().0, [3, 8]);
}

#[test]
fn command_lines_that_make_no_sense_are_refused() {
    let folder = Folder::new();
    folder.refused(&format!("{EMBED} --tower left"), &["left", "query", "document"]);
    folder.refused(&format!("{EMBED} --device abacus"), &["--device", "`abacus`", "available: cpu"]);
    folder.refused(&format!("{EVALUATE} --device abacus"), &["--device", "`abacus`"]);
    folder.refused("embed --model model --input texts.txt", &["--output"]);
    folder.refused("evaluate --model model", &["--dataset"]);
    for command in ["embed", "evaluate"] {
        let help = folder.stdout(folder.run(&format!("{command} --help")));
        assert!(help.contains("Example:") && help.contains("--json"), "{help}");
    }
    let help = folder.stdout(folder.run("embed --help"));
    assert!(help.contains("[default: document]"), "{help}");
}
