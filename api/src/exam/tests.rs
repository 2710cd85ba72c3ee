#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use super::*;

const FULL: &str = r#"
id: cks-1
title: Certified "K" Exam
duration_minutes: 120
start_within_seconds: 600
reconnect_window_seconds: 0
warm: 2
environment:
  image: registry.example.org:5000/exams/cks:1.2
  shell: /bin/bash
  user: candidate
  env: { LANG: C.UTF-8, _A1: "2" }
  setup: |
    echo hello
  cpu: 500m
  memory: 256Mi
  storage: 1G
  processes: 128
  network: [10.0.0.0/8, "2001:db8::/32"]
  runtime_class: gvisor
  allow_port_forward: true
"#;

fn minimal(extra: &str) -> String {
    format!("id: e\ntitle: E\nduration_minutes: 5\n{extra}\n")
}

fn fault(text: &str) -> Fault {
    match Exam::from_yaml(text) {
        Err(ExamError::Invalid(fault)) => fault,
        other => panic!("{text} gave {other:?}"),
    }
}

#[test]
fn every_field_is_read_and_survives_a_round_trip_through_json_and_yaml() {
    let exam = Exam::from_yaml(FULL).unwrap();
    assert_eq!(exam.environment.cpu, Some(500));
    assert_eq!(exam.environment.memory, Some(256 << 20));
    assert_eq!(exam.environment.storage, Some(1_000_000_000));
    assert_eq!(exam.environment.network, Network::Cidrs(vec!["10.0.0.0/8".into(), "2001:db8::/32".into()]));
    assert_eq!(exam.environment.setup.as_deref(), Some("echo hello\n"));
    let json = serde_json::to_vec(&exam).unwrap();
    assert_eq!(Exam::from_json(&json).unwrap(), exam);
    let yaml = serde_saphyr::to_string(&exam).unwrap();
    assert_eq!(Exam::from_yaml(&yaml).unwrap(), exam);
}

#[test]
fn what_is_left_out_has_its_default() {
    let exam = Exam::from_yaml(&minimal("")).unwrap();
    assert_eq!((exam.start_within_seconds, exam.reconnect_window_seconds, exam.warm), (900, 300, 0));
    assert_eq!(exam.environment, EnvironmentSpec::default());
    assert_eq!(Exam::from_json(&serde_json::to_vec(&exam).unwrap()).unwrap(), exam);
}

#[test]
fn quantities_are_read_as_kubernetes_reads_them() {
    let cpu = |text: &str| {
        Exam::from_yaml(&minimal(&format!("environment: {{ cpu: {text} }}"))).unwrap().environment.cpu
    };
    assert_eq!(
        (cpu("2"), cpu("0.5"), cpu("1500m"), cpu("\"1\"")),
        (Some(2000), Some(500), Some(1500), Some(1000))
    );
    let memory = |text: &str| {
        Exam::from_yaml(&minimal(&format!("environment: {{ memory: {text} }}"))).unwrap().environment.memory
    };
    assert_eq!(memory("1.5Gi"), Some(3 << 29));
    assert_eq!(memory("64M"), Some(64_000_000));
    assert_eq!(memory("33554432"), Some(33_554_432));
}

#[test]
fn an_impossible_value_is_refused_with_its_line_its_name_and_what_is_allowed() {
    for (extra, field, message) in [
        ("warm: 1001", "warm", "1001 is not between 0 and 1000"),
        ("warm: -1", "warm", "-1 is not between 0 and 1000"),
        ("start_within_seconds: 9", "start_within_seconds", "9 is not between 10 and 86400"),
        ("reconnect_window_seconds: 86401", "reconnect_window_seconds", "between 0 and 86400"),
        ("environment: { cpu: 5m }", "environment.cpu", "between 10m and 256 cores"),
        ("environment: { cpu: 1Gi }", "environment.cpu", "between 10m and 256 cores"),
        ("environment: { cpu: .nan }", "environment.cpu", "non-finite"),
        ("environment: { memory: 1Mi }", "environment.memory", "between 16Mi and 4Ti"),
        ("environment: { memory: 64mb }", "environment.memory", "between 16Mi and 4Ti"),
        ("environment: { memory: -5 }", "environment.memory", "between 16Mi and 4Ti"),
        ("environment: { storage: 9999999999999999999999Ti }", "environment.storage", "between 1Mi and 64Ti"),
        ("environment: { processes: 7 }", "environment.processes", "between 8 and 65536"),
        ("environment: { env: { 1A: x } }", "environment.env", "not a variable's name"),
        ("environment: { env: { A-B: x } }", "environment.env", "not a variable's name"),
        ("environment: { env: { A: \"x\\0y\" } }", "environment.env", "the value of A contains a NUL"),
        ("environment: { shell: bash }", "environment.shell", "absolute path"),
        ("environment: { user: Root User }", "environment.user", "a-z, 0-9"),
        ("environment: { user: 70000 }", "environment.user", "up to 65534"),
        ("environment: { network: everything }", "environment.network", "`none`, `internet`"),
        ("environment: { network: [] }", "environment.network", "write `none`"),
        ("environment: { network: [10.0.0.0] }", "environment.network", "not a network"),
        ("environment: { network: [10.0.0.0/33] }", "environment.network", "0 to 32"),
        ("environment: { network: [10.0.0.1/8] }", "environment.network", "bits set behind"),
        ("environment: { network: [example.org/8] }", "environment.network", "not a network"),
        ("environment: { image: \"Upper/Case\" }", "environment.image", "an image is written"),
        ("environment: { image: \"a b\" }", "environment.image", "an image is written"),
        ("environment: { image: \"x@sha256:12\" }", "environment.image", "an image is written"),
        ("environment: { runtime_class: g_v }", "environment.runtime_class", "runtime class"),
    ] {
        let fault = fault(&minimal(extra));
        assert_eq!((fault.line, fault.field.as_str()), (Some(4), field), "{extra}: {fault}");
        assert!(fault.message.contains(message), "{extra}: {fault}");
    }
}

#[test]
fn ids_titles_and_durations_are_held_to_their_limits() {
    let long = "x".repeat(65);
    for (id, title, minutes, field) in [
        ("-a", "E", "5", "id"),
        ("\"\"", "E", "5", "id"),
        ("a/b", "E", "5", "id"),
        (long.as_str(), "E", "5", "id"),
        ("a", "\" \"", "5", "title"),
        ("a", "\"two\\nlines\"", "5", "title"),
        ("a", "E", "0", "duration_minutes"),
        ("a", "E", "10081", "duration_minutes"),
        ("a", "E", "five", "duration_minutes"),
        ("a", "E", "1.5", "duration_minutes"),
    ] {
        let fault = fault(&format!("id: {id}\ntitle: {title}\nduration_minutes: {minutes}\n"));
        assert_eq!(fault.field, field, "{fault}");
        assert!(fault.line.is_some(), "{fault}");
    }
}

#[test]
fn a_setup_script_of_256_kib_is_taken_and_one_byte_more_is_not() {
    let with = |bytes: usize| minimal(&format!("environment: {{ setup: \"{}\" }}", "x".repeat(bytes)));
    assert!(Exam::from_yaml(&with(256 * 1024)).is_ok());
    let fault = fault(&with(256 * 1024 + 1));
    assert_eq!(fault.field, "environment.setup");
    assert!(!fault.message.contains("xxxx"), "the text itself is not shown");
}

#[test]
fn an_unknown_or_repeated_or_missing_field_is_refused_by_name() {
    let unknown = fault(&minimal("durations: 5"));
    assert_eq!(unknown.line, Some(4), "{unknown}");
    assert!(
        unknown.message.contains("durations") && unknown.message.contains("duration_minutes"),
        "{unknown}"
    );
    let unknown = fault(&minimal("environment:\n  cpus: 2"));
    assert_eq!(unknown.line, Some(5), "{unknown}");
    assert!(unknown.message.contains("cpus"), "{unknown}");
    let repeated = fault(&minimal("id: again"));
    assert_eq!(repeated.line, Some(4), "{repeated}");
    let missing = fault("id: a\ntitle: b\n");
    assert!(missing.message.contains("duration_minutes"), "{missing}");
    assert!(fault("id: [").line.is_some());
    assert!(Exam::from_yaml("").is_err());
    assert!(Exam::from_yaml(&format!("{}---\n{}", minimal(""), minimal(""))).is_err());
}

#[test]
fn json_is_held_to_the_same_rules_with_the_path_of_the_fault() {
    let json = br#"{"id":"a","title":"b","duration_minutes":5,"environment":{"network":["10.0.0.0/40"]}}"#;
    let Err(ExamError::Invalid(fault)) = Exam::from_json(json) else { panic!("taken") };
    assert_eq!(fault.field, "environment.network");
    assert!(fault.message.contains("0 to 32"), "{fault}");
    for text in [&br#"{"id":"a","title":"b","duration_minutes":5,"x":1}"#[..], b"{", b"[]", b"", b"{} {}"] {
        assert!(Exam::from_json(text).is_err());
    }
}

#[test]
fn image_references_in_every_usual_form_are_taken() {
    let digest = "a".repeat(64);
    for image in [
        "debian",
        "debian:12",
        "library/debian:12-slim",
        "ghcr.io/owner/name:v1.0_rc",
        "localhost:5000/x",
        "localhost/x",
        &format!("r.example/x@sha256:{digest}"),
        &format!("r.example:443/x:1@sha256:{digest}"),
    ] {
        assert!(
            Exam::from_yaml(&minimal(&format!("environment: {{ image: \"{image}\" }}"))).is_ok(),
            "{image}"
        );
    }
}

#[test]
fn a_directory_is_read_in_the_order_of_ids_and_other_files_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    put("b.yaml", "id: b\ntitle: B\nduration_minutes: 5\n");
    put("a.yml", "id: a\ntitle: A\nduration_minutes: 5\n");
    put("README.md", "not an exam");
    std::fs::create_dir(directory.path().join("c.yaml")).unwrap();
    let ids: Vec<_> = load_dir(directory.path()).unwrap().into_iter().map(|exam| exam.id).collect();
    assert_eq!(ids, ["a", "b"]);
    put("c.yml", "id: b\ntitle: C\nduration_minutes: 5\n");
    let error = load_dir(directory.path()).unwrap_err().to_string();
    assert!(error.contains("b.yaml") && error.contains("c.yml"), "{error}");
    put("c.yml", "id: c\ntitle: C\nduration_minutes: 0\n");
    let error = load_dir(directory.path()).unwrap_err().to_string();
    assert!(error.contains("c.yml:3: duration_minutes: 0 is not between 1 and 10080"), "{error}");
    assert!(load_dir(&directory.path().join("none")).unwrap_err().to_string().contains("none"));
}
