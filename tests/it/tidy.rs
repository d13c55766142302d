//! The rules of the house that a compiler does not check: layers, sizes, banned words, which module may name which crate.

use std::fs;
use std::path::{Path, PathBuf};

const MAX_FILE: usize = 600;
const MAX_FUNCTION: usize = 70;

/// Lowest first: an import goes to a lower layer only. Modules of one layer do not import each other.
const LAYERS: [&[&str]; 10] = [
    &["clock"],
    &["model"],
    &["telemetry"],
    &["log", "store"],
    &["control", "transform", "delivery"],
    &["runtime"],
    &["stages"],
    &["config"],
    &["app", "console"],
    &["cli"],
];

/// A crate, and the only places that may name it.
const OWNED: [(&str, &[&str]); 6] = [
    ("rdkafka", &["src/log/kafka/"]),
    ("pulsar", &["src/log/pulsar/"]),
    ("sqlx", &["src/log/embedded/sqlite.rs", "src/log/embedded/sqlite/", "src/store/"]),
    ("apache_avro", &["src/model/codec/"]),
    ("schema_registry_converter", &["src/log/registry/"]),
    (
        "reqwest",
        &[
            "src/log/registry/",
            "src/log/pulsar/rest.rs",
            "src/log/pulsar/identity.rs",
            "src/control/remote.rs",
            "src/control/regulations.rs",
            "src/control/uploads.rs",
            "src/transform/http/",
            "src/delivery/",
            "src/cli/load/",
            "src/app/",
        ],
    ),
];

/// Names that say nothing.
const BANNED_FILES: [&str; 6] = ["utils", "util", "common", "helpers", "helper", "manager"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    found.sort();
    let name = |path: &Path| path.strip_prefix(root()).expect("inside").display().to_string();
    found.iter().map(|path| (name(path), fs::read_to_string(path).expect("text"))).collect()
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

#[test]
fn imports_go_to_lower_layers_only() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        let module = file.trim_start_matches("src/").split(['/', '.']).next().expect("a module").to_owned();
        let Some(own) = layer(&module) else { continue };
        for (number, line) in text.lines().enumerate() {
            for part in line.split("crate::").skip(1).filter(|_| !line.trim_start().starts_with("//")) {
                let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let Some(other) = layer(&name).filter(|_| name != module) else { continue };
                if other >= own {
                    wrong.push(format!("{file}:{}: {module} imports {name}", number + 1));
                }
            }
        }
        for stage in ["gateway", "processor", "router"] {
            for other in ["gateway", "processor", "router"].iter().filter(|other| **other != stage) {
                let inside = file.starts_with(&format!("src/stages/{stage}/"));
                if inside && text.contains(&format!("stages::{other}")) {
                    wrong.push(format!("{file}: stage {stage} imports stage {other}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_module_has_a_layer() {
    for entry in fs::read_dir(root().join("src")).expect("src") {
        let name = entry.expect("an entry").file_name().to_string_lossy().trim_end_matches(".rs").to_owned();
        assert!(["main", "lib"].contains(&name.as_str()) || layer(&name).is_some(), "src/{name} has no layer");
    }
}

#[test]
fn crates_are_named_only_where_they_belong() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        // A module of ours has the name of its crate.
        let named = text.replace("log::pulsar::", "");
        for (name, places) in OWNED {
            let used = [format!("use {name}"), format!("{name}::")];
            let allowed = places.iter().any(|place| file.starts_with(place));
            if !allowed && used.iter().any(|used| named.contains(used)) {
                wrong.push(format!("{file} names {name}"));
            }
        }
        for feature in ["kafka", "pulsar"] {
            let asks = text.contains(&format!("cfg(feature = \"{feature}\")"));
            if asks && !["src/log/mod.rs", "src/app/open.rs"].contains(&file.as_str()) {
                wrong.push(format!("{file} asks for the feature {feature}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_and_functions_are_short() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src").into_iter().chain(sources("tests")) {
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > MAX_FILE {
            wrong.push(format!("{file} has {} lines", lines.len()));
        }
        for (start, line) in lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let head = line.trim_start().trim_start_matches("pub ").trim_start_matches("pub(super) ");
            let head = head.trim_start_matches("async ").trim_start_matches("const ");
            // A trait's declaration ends without a body.
            let body = lines[start..].iter().find(|line| line.contains('{') || line.ends_with(';'));
            if !head.starts_with("fn ") || body.is_none_or(|line| line.ends_with(';')) {
                continue;
            }
            let end = format!("{}}}", " ".repeat(indent));
            let length = lines[start..].iter().position(|line| *line == end).unwrap_or(0) + 1;
            if length > MAX_FUNCTION {
                wrong.push(format!("{file}:{}: a function of {length} lines", start + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn names_say_something_and_nothing_is_left_unfinished() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        let stem = Path::new(&file).file_stem().expect("a name").to_string_lossy().into_owned();
        if BANNED_FILES.contains(&stem.as_str()) {
            wrong.push(format!("{file}: the name says nothing"));
        }
        if stem == "tests" {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().expect("a part");
        for (number, line) in code.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for word in ["todo!(", "unimplemented!(", "dbg!(", ".unwrap()", "panic!(", "query!("] {
                if line.contains(word) {
                    wrong.push(format!("{file}:{}: {word}", number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn modules_say_what_they_are() {
    let silent: Vec<String> = sources("src")
        .into_iter()
        .filter(|(file, text)| file != "src/main.rs" && !text.starts_with("//!"))
        .map(|(file, _)| file)
        .collect();
    assert!(silent.is_empty(), "no module documentation: {}", silent.join(", "));
}
