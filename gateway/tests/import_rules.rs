//! The rooms of `docs/architecture.md`, held: which module may know which library.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test: a fault in it fails it")]
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A crate's name as it stands in paths, and the files (with what is in their folders) that may use it.
const RULES: [(&str, &[&str]); 8] = [
    ("sqlx", &["api/src/store"]),
    ("kube", &["api/src/environment/kubernetes"]),
    ("k8s_openapi", &["api/src/environment/kubernetes"]),
    ("russh", &["gateway/src/ssh"]),
    ("axum", &["api/src/http", "gateway/src/http", "gateway/src/web"]),
    ("h2", &["agent/src", "api/src/environment/link"]),
    ("shpool_vterm", &["agent/src/screen"]),
    ("argon2", &["api/src/credential"]),
];

fn sources(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders: Vec<_> =
        ["agent/src", "api/src", "gateway/src"].iter().map(|folder| root.join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}

fn uses(code: &str, library: &str) -> bool {
    let path = format!("{library}::");
    code.lines().filter(|line| !line.trim_start().starts_with("//")).any(|line| {
        line.match_indices(&path).any(|(at, _)| {
            !line[..at]
                .ends_with(|before: char| before.is_alphanumeric() || matches!(before, '_' | ':' | '-'))
                || line[..at].ends_with("::") && line[..at].trim_end_matches(':').trim().is_empty()
        }) || line.trim() == format!("use {library};")
    })
}

#[test]
fn each_library_is_used_only_where_the_map_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut broken = Vec::new();
    let mut used = [false; RULES.len()];
    for file in sources(root) {
        let code = fs::read_to_string(&file).unwrap();
        let place = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        for (index, (library, rooms)) in RULES.iter().enumerate() {
            if !uses(&code, library) {
                continue;
            }
            used[index] = true;
            let inside = rooms
                .iter()
                .any(|room| place.starts_with(&format!("{room}/")) || place == format!("{room}.rs"));
            if !inside {
                broken.push(format!("{place} uses {library}, which belongs to {rooms:?}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    // A rule that nothing touches would be a rule that no change can break.
    for (index, (library, _)) in RULES.iter().enumerate() {
        assert!(used[index] || matches!(*library, "kube" | "k8s_openapi"), "nothing uses {library}");
    }
}

#[test]
fn unsafe_code_stands_in_one_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let found: Vec<_> = sources(root)
        .into_iter()
        .filter(|file| fs::read_to_string(file).unwrap().contains("unsafe {"))
        .map(|file| file.strip_prefix(root).unwrap().to_owned())
        .collect();
    assert_eq!(found, [PathBuf::from("agent/src/spawn.rs")]);
}

#[test]
fn the_rule_checker_sees_a_path_and_no_more() {
    assert!(uses("use russh::server;", "russh"));
    assert!(uses("    let x = russh::Error;", "russh"));
    assert!(!uses("use crate::russhy::x;", "russh"));
    assert!(!uses("//! russh::server", "russh"));
}
