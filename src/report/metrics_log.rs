//! The metrics of a training run as JSON lines.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::files::write_atomically;
use crate::{Error, Result};

/// A file with one JSON object per line, that grows while a run goes on.
///
/// Every record is handed to the operating system as a whole line at once: whoever reads the file during training sees
/// complete records, and a crash can tear the last one at most, which [`MetricsLog::resume`] then removes.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
    /// The bytes of complete records in the file.
    length: u64,
}

impl MetricsLog {
    /// Starts an empty log; what stood at `path` is lost.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        write_atomically(path, |_| Ok(()))?;
        Self::open(path, 0)
    }

    /// Goes on with a log as it stood after `last_step`.
    ///
    /// Every record whose `step` lies beyond `last_step` is dropped, and so is all that follows the first record of
    /// `last_step`: what came after a checkpoint, be it steps or an evaluation, is done again when training resumes from
    /// it. The last line is dropped too if it is not a complete record, as a crash leaves it. What stays is kept byte
    /// for byte. The file is replaced in one step or not at all. A missing file is taken as an empty one.
    ///
    /// # Errors
    /// [`Error::Line`] if a line other than the last is not a JSON object or if a `step` is not a whole number;
    /// [`Error::File`] if the file cannot be read or written.
    pub fn resume(path: impl AsRef<Path>, last_step: u64) -> Result<Self> {
        let path = path.as_ref();
        let content = match std::fs::read(path) {
            Ok(content) => content,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io(path, "read it", error)),
        };
        let mut lines: Vec<(usize, &[u8])> =
            (1..).zip(content.split(|&byte| byte == b'\n')).filter(|(_, line)| !line.trim_ascii().is_empty()).collect();
        if lines.last().is_some_and(|(_, line)| parse(line).is_err()) {
            lines.pop();
        }
        let mut kept = Vec::with_capacity(content.len());
        let mut reached = false;
        for (number, line) in lines {
            let record = parse(line).map_err(|reason| Error::line(path, number, reason))?;
            let step = match record.get("step") {
                None => None,
                Some(step) => Some(
                    step.as_u64()
                        .ok_or_else(|| Error::line(path, number, format!("the step `{step}` is not a whole number")))?,
                ),
            };
            if !reached && step.is_none_or(|step| step <= last_step) {
                kept.extend_from_slice(line);
                kept.push(b'\n');
                reached = step == Some(last_step);
            }
        }
        write_atomically(path, |file| file.write_all(&kept))?;
        Self::open(path, kept.len() as u64)
    }

    fn open(path: &Path, length: u64) -> Result<Self> {
        let file =
            OpenOptions::new().append(true).open(path).map_err(|error| Error::io(path, "open it to append", error))?;
        Ok(Self { file, path: path.to_path_buf(), length })
    }

    /// Adds a record, which must serialise to a JSON object, as one line. Numbers that are not finite become `null`,
    /// JSON having no way to write them.
    ///
    /// # Errors
    /// [`Error::Value`] if `record` is not an object or cannot be serialised; [`Error::File`] if it cannot be written,
    /// for example because the disk is full. In either case the log holds the records from before and can be used on.
    pub fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| Error::value("metrics log", "record", format!("cannot be written as JSON: {error}")))?;
        if line.first() != Some(&b'{') {
            return Err(Error::value("metrics log", "record", "is not a JSON object"));
        }
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line).and_then(|()| self.file.flush()) {
            // Whatever part of the line came through would garble the next one. If even this fails, the file system is
            // beyond repair and the error below tells.
            let _ = self.file.set_len(self.length);
            return Err(Error::io(&self.path, "append to it", error));
        }
        self.length += line.len() as u64;
        Ok(())
    }
}

/// A line as a JSON object, or what is wrong with it.
fn parse(line: &[u8]) -> std::result::Result<Value, String> {
    match serde_json::from_slice(line) {
        Ok(record @ Value::Object(_)) => Ok(record),
        Ok(_) => Err("is not a JSON object".to_owned()),
        Err(error) => Err(format!("is not JSON: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    fn file(content: &[u8]) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, content).unwrap();
        (folder, path)
    }

    #[derive(Serialize)]
    struct Record {
        step: u64,
        loss: f32,
    }

    #[test]
    fn records_are_readable_as_soon_as_they_are_appended() {
        let (_folder, path) = file(b"from an earlier run");
        let mut log = MetricsLog::create(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
        log.append(&Record { step: 1, loss: 0.5 }).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1,\"loss\":0.5}\n");
        log.append(&json!({"step": 2, "note": "two\nlines"})).unwrap();
        log.append(&Record { step: 3, loss: f32::NAN }).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"note\":\"two\\nlines\"}\n{\"step\":3,\"loss\":null}\n"
        );
    }

    #[test]
    fn resuming_drops_what_comes_after_the_checkpoint() {
        let (_folder, path) =
            file(b"{\"seed\": 7}\n{\"step\": 1}\r\n\n{\"step\":2}\n{\"step\":2,\"x\":1}\n{\"x\":1}\n{\"step\":3}\n");
        let mut log = MetricsLog::resume(&path, 2).unwrap();
        log.append(&json!({"step": 3, "again": true})).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"seed\": 7}\n{\"step\": 1}\r\n{\"step\":2}\n{\"step\":3,\"again\":true}\n"
        );
    }

    #[test]
    fn a_record_torn_anywhere_is_dropped_and_a_whole_one_without_line_end_is_kept() {
        let (first, second) = ("{\"step\":1,\"loss\":1.5}\n", "{\"step\":2,\"name\":\"é\",\"loss\":1.25}");
        for length in 0..=second.len() {
            let mut content = first.as_bytes().to_vec();
            content.extend_from_slice(&second.as_bytes()[..length]);
            let (_folder, path) = file(&content);
            let mut log = MetricsLog::resume(&path, 9).unwrap();
            log.append(&json!({"step": 3})).unwrap();
            let second = if length == second.len() { format!("{second}\n") } else { String::new() };
            assert_eq!(
                fs::read_to_string(&path).unwrap(),
                format!("{first}{second}{{\"step\":3}}\n"),
                "torn at {length}"
            );
        }
        // What a power cut leaves where a file had grown but its content had not reached the disk.
        let (_folder, path) = file(b"{\"step\":1}\n\0\0\0\0");
        MetricsLog::resume(&path, 9).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{\"step\":1}\n");
    }

    #[test]
    fn a_missing_log_is_started_afresh() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsLog::resume(&path, 5).unwrap().append(&json!({"step": 6})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":6}\n");
    }

    #[test]
    fn damage_before_the_last_line_is_an_error_and_changes_nothing() {
        for (broken, expected) in [
            ("{\"step\":", "is not JSON"),
            ("[1]", "is not a JSON object"),
            ("{\"step\":-1}", "the step `-1` is not a whole number"),
            ("{\"step\":\"2\"}", "the step `\"2\"` is not a whole number"),
        ] {
            let content = format!("{{\"step\":1}}\n\n{broken}\n{{\"step\":4}}\n");
            let (_folder, path) = file(content.as_bytes());
            match MetricsLog::resume(&path, 2) {
                Err(Error::Line { line: 3, reason, .. }) => assert!(reason.starts_with(expected), "{reason}"),
                other => panic!("{other:?}"),
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
    }

    #[test]
    fn what_is_no_object_is_not_logged() {
        let (_folder, path) = file(b"");
        let mut log = MetricsLog::create(&path).unwrap();
        let error = log.append(&[1, 2]).unwrap_err();
        assert_eq!(error.to_string(), "metrics log: `record` is not a JSON object");
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_folder_that_does_not_exist_is_named() {
        let error = MetricsLog::create("no/such/folder/metrics.jsonl").unwrap_err();
        assert!(error.to_string().starts_with("no/such/folder/metrics.jsonl: "), "{error}");
    }
}
