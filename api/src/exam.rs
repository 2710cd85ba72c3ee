//! What an exam is: read from YAML files and from the API's JSON alike, by the same rules.
//!
//! A value that cannot work is refused where it is read, with its line or path and what is allowed: a fault shown to
//! whoever writes the exam costs nothing, the same fault shown to a candidate costs an exam.
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

mod field;
pub(crate) mod network;
mod recipe;

pub use network::Network;
pub use recipe::Recipe;

/// One exam. Fields and defaults are described in `docs/exams.md`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exam {
    /// `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
    #[serde(deserialize_with = "field::id")]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    pub id: String,
    /// For people: 1 to 200 characters on one line.
    #[serde(deserialize_with = "field::title")]
    #[schema(min_length = 1, max_length = 200)]
    pub title: String,
    /// 1 to 10080 (a week).
    #[serde(deserialize_with = "field::duration_minutes")]
    #[schema(minimum = 1, maximum = 10080)]
    pub duration_minutes: u32,
    /// A session that is ready and never used ends after this: 10 to 86400 (a day). Default 900.
    #[serde(default = "default_start_within", deserialize_with = "field::start_within_seconds")]
    #[schema(minimum = 10, maximum = 86400)]
    pub start_within_seconds: u32,
    /// A shell without its client is kept this long: 0 to 86400 (a day). Default 300.
    #[serde(default = "default_reconnect_window", deserialize_with = "field::reconnect_window_seconds")]
    #[schema(minimum = 0, maximum = 86400)]
    pub reconnect_window_seconds: u32,
    /// Environments kept ready before anybody asks: 0 to 1000. Default 0.
    #[serde(default, deserialize_with = "field::warm")]
    #[schema(minimum = 0, maximum = 1000)]
    pub warm: u32,
    /// Where candidates work.
    #[serde(default)]
    pub environment: EnvironmentSpec,
}

const fn default_start_within() -> u32 {
    900
}

const fn default_reconnect_window() -> u32 {
    300
}

/// What an exam asks of its environments. Sizes are bytes; in a file they may be written as Kubernetes quantities (`256Mi`, `1G`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EnvironmentSpec {
    /// Container image; the local environment has none and uses the machine's own system, read-only.
    #[serde(deserialize_with = "field::image")]
    pub image: Option<String>,
    /// Login shell, an absolute path; default: the image's own for the user, else `/bin/bash`, else `/bin/sh`.
    #[serde(deserialize_with = "field::shell")]
    pub shell: Option<String>,
    /// The user inside: a name, or a number up to 65534.
    #[serde(deserialize_with = "field::user")]
    pub user: Option<String>,
    /// Variables every process gets: at most 128 and 64 KiB in all, named `[A-Za-z_][A-Za-z0-9_]*`.
    #[serde(deserialize_with = "field::env")]
    pub env: BTreeMap<String, String>,
    /// A script run once before ready, at most 256 KiB.
    #[serde(deserialize_with = "field::setup")]
    pub setup: Option<String>,
    /// Thousandths of a core, 10 to 256000. In a file: `500m`, `0.5` or `2` (cores).
    #[serde(deserialize_with = "field::cpu", serialize_with = "field::write_cpu")]
    #[schema(schema_with = field::quantity_schema)]
    pub cpu: Option<u64>,
    /// Bytes of memory, 16Mi to 4Ti.
    #[serde(deserialize_with = "field::memory")]
    #[schema(schema_with = field::quantity_schema)]
    pub memory: Option<u64>,
    /// Bytes of writable storage, 1Mi to 64Ti.
    #[serde(deserialize_with = "field::storage")]
    #[schema(schema_with = field::quantity_schema)]
    pub storage: Option<u64>,
    /// Processes and threads at once, 8 to 65536.
    #[serde(deserialize_with = "field::processes")]
    #[schema(minimum = 8, maximum = 65536)]
    pub processes: Option<u32>,
    /// What may be reached from inside.
    pub network: Network,
    /// Kubernetes RuntimeClass.
    #[serde(deserialize_with = "field::runtime_class")]
    pub runtime_class: Option<String>,
    /// May an SSH client open TCP connections to the environment's own loopback?
    pub allow_port_forward: bool,
}

/// Why an exam was not taken. Never shows more of the text than names and limits.
#[derive(Debug, thiserror::Error)]
pub enum ExamError {
    /// A value, a field or the text itself is wrong.
    #[error("{0}")]
    Invalid(Fault),
    /// A file or directory cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Two files give the same id.
    #[error("{} and {} both define the exam {id:?}: give one of them another id", first.display(), second.display())]
    Duplicate {
        /// The id.
        id: String,
        /// The file read first, by name.
        first: PathBuf,
        /// The other one.
        second: PathBuf,
    },
}

/// Where an exam's text is wrong, and what is allowed there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file, when it was one.
    pub file: Option<PathBuf>,
    /// Line from 1, when the text has lines to speak of.
    pub line: Option<u64>,
    /// Path of the field, `environment.cpu`; empty for the text as a whole.
    pub field: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "{}:{line}: ", file.display())?,
            (Some(file), None) => write!(f, "{}: ", file.display())?,
            (None, Some(line)) => write!(f, "line {line}: ")?,
            (None, None) => {}
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// Largest exam file, bytes: the largest setup script with room for the rest.
pub const FILE_BYTES: u64 = 512 * 1024;

impl Exam {
    /// Reads one from YAML.
    ///
    /// # Errors
    /// [`ExamError::Invalid`] with the line of the fault.
    pub fn from_yaml(text: &str) -> Result<Self, ExamError> {
        let mut field = String::new();
        let options = serde_saphyr::options! { with_snippet: false };
        serde_saphyr::with_deserializer_from_str_with_options(text, options, |reader| {
            serde_path_to_error::deserialize(reader).map_err(|error| {
                field = named(error.path());
                error.into_inner()
            })
        })
        .map_err(|error| {
            let (line, message) = yaml_fault(&error);
            ExamError::Invalid(Fault { file: None, line, field, message })
        })
    }

    /// Reads one from JSON.
    ///
    /// # Errors
    /// [`ExamError::Invalid`] with the line and path of the fault.
    pub fn from_json(text: &[u8]) -> Result<Self, ExamError> {
        let mut reader = serde_json::Deserializer::from_slice(text);
        let read = serde_path_to_error::deserialize(&mut reader)
            .map_err(|error| (named(error.path()), error.into_inner()))
            .and_then(|exam| reader.end().map(|()| exam).map_err(|error| (String::new(), error)));
        read.map_err(|(field, error)| {
            let line = u64::try_from(error.line()).ok().filter(|line| *line > 0);
            let place = format!(" at line {} column {}", error.line(), error.column());
            let text = error.to_string();
            let message = text.strip_suffix(&place).unwrap_or(&text).to_owned();
            ExamError::Invalid(Fault { file: None, line, field, message })
        })
    }

    /// Reads one YAML file.
    ///
    /// # Errors
    /// [`ExamError`] naming the file and, for a fault in it, the line.
    pub fn from_file(path: &Path) -> Result<Self, ExamError> {
        let unreadable = |source| ExamError::Read { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(unreadable)?.len();
        if size > FILE_BYTES {
            return Err(ExamError::Invalid(Fault {
                file: Some(path.to_owned()),
                line: None,
                field: String::new(),
                message: format!("{size} bytes, an exam file has at most {FILE_BYTES}"),
            }));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Self::from_yaml(&text).map_err(|error| match error {
            ExamError::Invalid(fault) => ExamError::Invalid(Fault { file: Some(path.to_owned()), ..fault }),
            other => other,
        })
    }
}

/// Reads every `*.yaml` and `*.yml` of a directory, in the order of their names; other files and directories in it are left alone.
///
/// # Errors
/// [`ExamError`] for the first file that is no exam, and for two that have the same id.
pub fn load_dir(directory: &Path) -> Result<Vec<Exam>, ExamError> {
    let unreadable = |source| ExamError::Read { path: directory.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|ending| ending == "yaml" || ending == "yml") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    let mut exams: BTreeMap<String, (Exam, PathBuf)> = BTreeMap::new();
    for path in files {
        let exam = Exam::from_file(&path)?;
        if let Some((exam, first)) = exams.get(&exam.id) {
            return Err(ExamError::Duplicate { id: exam.id.clone(), first: first.clone(), second: path });
        }
        exams.insert(exam.id.clone(), (exam, path));
    }
    Ok(exams.into_values().map(|(exam, _)| exam).collect())
}

/// A path as the error shows it; the top of the document has none.
fn named(path: &serde_path_to_error::Path) -> String {
    let text = path.to_string();
    if text == "." { String::new() } else { text }
}

/// Line and bare message of a YAML fault: serde-saphyr puts the place in front of or behind it.
fn yaml_fault(error: &serde_saphyr::Error) -> (Option<u64>, String) {
    let place = error.location();
    let mut message = error.without_snippet().to_string();
    if let Some(place) = place {
        let suffix = format!(" at line {}, column {}", place.line(), place.column());
        let prefix = format!("line {} column {}: ", place.line(), place.column());
        message = message.strip_suffix(&suffix).unwrap_or(&message).to_owned();
        message = message.strip_prefix(&prefix).unwrap_or(&message).to_owned();
    }
    (place.map(|place| place.line()).filter(|line| *line > 0), message)
}

#[cfg(test)]
#[path = "exam/tests.rs"]
mod tests;
