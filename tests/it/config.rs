//! The configuration, as an operator looks at it: shown, checked, refused.

use std::process::Stdio;

use serde_json::Value;

use crate::support::process::{Flow, workspace};

fn json(flow: &Flow, args: &[&str]) -> Value {
    let told = flow.command(&[args, &["--output", "json"]].concat());
    serde_json::from_slice(&told.stdout)
        .unwrap_or_else(|_| panic!("{args:?}: {}", String::from_utf8_lossy(&told.stderr)))
}

#[test]
fn what_is_in_force_is_shown_with_its_place() {
    let mut flow = Flow::embedded();
    std::fs::write(
        flow.folder.path().join("l.toml"),
        "[log.kafka.properties]\n\"sasl.password\" = \"hunter2\"\n\"ssl.key.password\" = \"file:key\"\n",
    )
    .expect("written");
    std::fs::write(flow.folder.path().join("key"), "hunter3").expect("written");
    flow.set("LANEWAY_ROUTER__IN_FLIGHT", "7");
    let shown = json(&flow, &["config", "show", "--changed", "--config", "l.toml", "--set", "router.timeout=3s"]);
    let find =
        |key: &str| shown.as_array().into_iter().flatten().find(|it| it["key"] == key).cloned().unwrap_or_default();
    let told = |key: &str| (find(key)["value"].clone(), find(key)["from"].clone());
    assert_eq!(told("router.in_flight"), (7.into(), "LANEWAY_ROUTER__IN_FLIGHT".into()));
    assert_eq!(told("router.timeout"), ("3s".into(), "--set".into()));
    assert_eq!(told("log.kafka.properties.sasl.password"), ("(hidden)".into(), "l.toml".into()));
    assert_eq!(told("log.kafka.properties.ssl.key.password").0, "file:key");
    assert_eq!(find("gateway.listen")["from"], "LANEWAY_GATEWAY__LISTEN");
    assert!(!shown.to_string().contains("hunter") && find("log.backend").is_null(), "{shown}");
    let schema: Value = serde_json::from_slice(&flow.command(&["config", "schema"]).stdout).expect("JSON");
    assert_eq!(schema["properties"]["router"]["properties"]["in_flight"]["type"], "integer");
    assert!(flow.command(&["config", "defaults", "own.toml"]).status.success());
    assert!(!flow.command(&["config", "defaults", "own.toml"]).status.success(), "it is left alone");
    assert!(flow.command(&["config", "show", "--config", "own.toml"]).status.success());
}

#[test]
fn everything_is_found_at_once() {
    let mut flow = Flow::on_kafka();
    let first = flow.command(&["check"]);
    assert!(first.status.success(), "{first:?}");
    assert!(flow.command(&["topics", "diff"]).status.success());

    // Other declarations than what is there, a broken workspace, an id that cannot be one.
    let declared = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("topics");
    for name in ["deliveries.yaml", "progress.yaml"] {
        let text = std::fs::read_to_string(declared.join(name)).expect("a declaration");
        let text = text.replace("partitions: 12", "partitions: 6").replace("604800000", "604800001");
        std::fs::write(flow.folder.path().join(name), text).expect("written");
    }
    flow.set("LANEWAY_TOPICS__DIR", ".");
    flow.set("LANEWAY_INSTANCE__ID", "a b");
    flow.set("LANEWAY_ROUTER__RETRY_WINDOW", "200h");
    std::fs::write(flow.folder.path().join("workspace.json"), "{").expect("written");
    let told = flow.command(&["check", "--output", "json"]);
    assert_eq!(told.status.code(), Some(3), "{}", String::from_utf8_lossy(&told.stderr));
    let found: Vec<Value> = serde_json::from_slice(&told.stdout).expect("JSON");
    let of = |subject: &str, state: &str| {
        let it = found.iter().find(|it| it["subject"] == subject && it["state"] == state);
        it.unwrap_or_else(|| panic!("{subject} {state}: {found:?}"))["says"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(of("topic deliveries", "problem"), "partitions is declared as 6 and is 12");
    assert_eq!(of("topic deliveries", "warning"), "retention.ms is declared as 604800001 and is 604800000");
    assert_eq!(of("topic events", "ok"), "as declared");
    assert!(of("workspace", "problem").contains("not a workspace configuration"));
    assert!(of("instance", "problem").contains("\"a b\""));
    assert!(of("retention", "problem").contains("retention.ms keeps"));
    let told = flow.command(&["topics", "diff", "--output", "json"]);
    let rows: Vec<Value> = serde_json::from_slice(&told.stdout).expect("JSON");
    assert_eq!((told.status.code(), rows.len()), (Some(3), 3), "{rows:?}");
}

/// A script must not take half an answer for a whole one.
#[test]
fn an_answer_that_cannot_be_written_is_a_failure() {
    let flow = Flow::embedded();
    let ends = |args: &[&str], into: Stdio| {
        let ended = flow.prepared(args).stdout(into).output().expect("run");
        (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    for args in [&["metrics"][..], &["config", "defaults"], &["config", "show", "--output", "json"], &["--help"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a device that is full");
        let (code, said) = ends(args, full.into());
        assert!(code == Some(1) && said.contains("cannot write to standard output"), "{args:?}: {code:?} {said}");
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        assert_eq!(ends(args, writer.into()), (Some(0), String::new()), "{args:?}: nobody reads any more");
    }
}

#[test]
fn what_has_to_be_mended_ends_with_2() {
    let flow = Flow::embedded();
    let ends = |args: &[&str]| {
        let told = flow.command(args);
        (told.status.code(), String::from_utf8_lossy(&told.stderr).into_owned())
    };
    let kafka = ["--set", "log.backend=kafka", "--set", "log.kafka.properties.nonsense=hunter2"];
    let (code, said) = ends(&[&["topics", "list"][..], &kafka].concat());
    assert!(code == Some(2) && said.contains("nonsense") && !said.contains("hunter2"), "{code:?} {said}");
    std::fs::remove_file(flow.folder.path().join("workspace.json")).expect("removed");
    let (code, said) = ends(&["run", "all"]);
    assert!(code == Some(2) && said.contains("workspace.json"), "{code:?} {said}");
    std::fs::write(flow.folder.path().join("workspace.json"), workspace(&[])).expect("written");
    std::fs::write(flow.folder.path().join("x.yaml"), "name: x\n").expect("written");
    let (code, said) = ends(&["topics", "list", "--set", "topics.dir=."]);
    assert!(code == Some(2) && said.contains("x.yaml"), "{code:?} {said}");
}
