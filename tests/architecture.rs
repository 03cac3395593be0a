//! The shape of the code, held by tests: who may import whom, how files open, how long they grow, where `unsafe` lives.
//!
//! It reads source text, not a syntax tree: comments and string literals are blanked first, which
//! is enough for `use crate::…` and `crate::…` paths. Every rule is also tried on samples that break it, so that a
//! checker which has gone blind fails too. What it is not: a formatter or a linter (rustfmt and clippy are).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules in their order: a module may use those before it, never those after it.
const ORDER: &[&str] = &[
    "types",
    "page",
    "config",
    "telemetry",
    "trust",
    "proto",
    "store",
    "data",
    "checkpoint",
    "ledger",
    "kv",
    "bridge",
    "collective",
    "model",
    "loss",
    "eval",
    "method",
    "coordinator",
    "worker",
    "trainer",
    "bench",
    "cli",
    "bin",
];

/// What the order alone would allow and the design does not: the module, what it may not use, and why.
const BANS: &[(&str, &[&str], &str)] = &[
    (
        "model",
        &["config", "telemetry", "proto", "store", "data", "checkpoint", "ledger", "collective"],
        "a network is built from numbers; it knows no processes, storage or configuration",
    ),
    (
        "loss",
        &["config", "telemetry", "proto", "store", "data", "checkpoint", "ledger"],
        "an objective is a function of tensors; it knows no storage or configuration",
    ),
    (
        "method",
        &["config", "telemetry", "proto", "store", "data", "checkpoint", "ledger", "collective"],
        "a method is a function of tensors and networks; the trainer builds it from a configuration",
    ),
    (
        "coordinator",
        &["bridge", "collective", "model", "loss", "method", "eval"],
        "the coordinator knows nothing of tensors",
    ),
    (
        "worker",
        &["bridge", "collective", "model", "loss", "method", "eval", "coordinator"],
        "the agent is small and cannot hang: no tensors, and only the wire between it and the coordinator",
    ),
    (
        "bridge",
        &["config", "telemetry", "proto", "store", "data", "checkpoint", "ledger"],
        "the bridge wraps libtorch and nothing else",
    ),
];

/// The modules that may name `tch` or `torch_sys`. `bridge` is how the others reach what tch lacks.
const TENSOR_MODULES: &[&str] =
    &["bridge", "collective", "model", "loss", "method", "eval", "trainer", "bench"];

/// The lines that a file may have.
const LINES_MAX: usize = 500;

/// Blanks comments, strings and character literals, keeping line breaks, so that what is left is code.
fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = vec![b' '; bytes.len()];
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let skip = if rest.starts_with(b"//") {
            rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            block_comment_len(rest)
        } else if rest[0] == b'"' {
            quoted_len(rest, b'"')
        } else if let Some(length) = raw_string_len(bytes, at) {
            length
        } else if rest[0] == b'\'' && is_char_literal(rest) {
            quoted_len(rest, b'\'')
        } else {
            out[at] = rest[0];
            at += 1;
            continue;
        };
        let end = (at + skip).min(bytes.len());
        for index in at..end {
            if bytes[index] == b'\n' {
                out[index] = b'\n';
            }
        }
        at = end;
    }
    // Multi-byte characters outside literals are copied whole, so this loses nothing.
    String::from_utf8_lossy(&out).into_owned()
}

fn block_comment_len(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

fn quoted_len(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// The length of the raw string `r"…"`, `r#"…"#`, … that starts at `at`, if one does.
fn raw_string_len(bytes: &[u8], at: usize) -> Option<usize> {
    let inside_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if bytes[at] != b'r' || (inside_word && bytes[at - 1] != b'b') {
        return None;
    }
    let hashes = bytes[at + 1..].iter().take_while(|&&b| b == b'#').count();
    let open = at + 1 + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let mut close = vec![b'"'];
    close.extend(std::iter::repeat_n(b'#', hashes));
    let body = &bytes[open + 1..];
    let end = body.windows(close.len()).position(|window| window == close);
    Some(end.map_or(bytes.len() - at, |end| open + 1 + end + close.len() - at))
}

/// Tells `'a'` and `'\n'` from the lifetime `'a`.
fn is_char_literal(rest: &[u8]) -> bool {
    match rest.get(1) {
        Some(b'\\') => true,
        Some(first) => {
            let width = match first {
                0xF0.. => 4,
                0xE0.. => 3,
                0xC0.. => 2,
                _ => 1,
            };
            rest.get(1 + width) == Some(&b'\'')
        }
        None => false,
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Where `word` stands as a whole identifier in `code`.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let bytes = code.as_bytes();
        let before = at.checked_sub(1).is_none_or(|index| !is_word(bytes[index]));
        let after = bytes.get(at + word.len()).is_none_or(|&byte| !is_word(byte));
        before && after
    })
}

/// The modules of this crate that `code` names: `crate::x`, `cpcr::x`, and each head of `crate::{x::…, y}`.
/// Paths by `super::` are `modules_climbed_to`'s.
fn modules_named(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for root in ["crate", "cpcr"] {
        for at in words(code, root) {
            let rest = code[at + root.len()..].trim_start();
            let Some(rest) = rest.strip_prefix("::") else { continue };
            let rest = rest.trim_start();
            if let Some(group) = rest.strip_prefix('{') {
                found.extend(group_heads(group));
            } else {
                found.extend(leading_word(rest));
            }
        }
    }
    found
}

fn leading_word(code: &str) -> Option<String> {
    let word: String = code.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!word.is_empty()).then_some(word)
}

/// The first word of every item at the top level of a `{…}` whose opening brace is already taken.
fn group_heads(group: &str) -> Vec<String> {
    let (mut heads, mut depth, mut item_opens) = (Vec::new(), 0_usize, true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => item_opens = true,
            c if item_opens && !c.is_whitespace() => {
                heads.extend(leading_word(&group[at..]));
                item_opens = false;
            }
            _ => {}
        }
    }
    heads
}

/// The modules that `code`, `depth` modules below the crate's root, names by `super::` repeated that often or more.
/// (In an inner module one `super` more is needed: then the word found is a name of the file's own, hardly ever in `ORDER`.)
fn modules_climbed_to(code: &str, depth: usize) -> BTreeSet<String> {
    let squeezed: String = code.chars().filter(|c| !c.is_whitespace()).collect();
    let climb = "super::".repeat(depth);
    squeezed
        .match_indices(&climb)
        .map(|(at, _)| squeezed[at + climb.len()..].trim_start_matches("super::"))
        .flat_map(|rest| match rest.strip_prefix('{') {
            Some(group) => group_heads(group),
            None => leading_word(rest).into_iter().collect(),
        })
        .collect()
}

/// The rules that the file at `path` (relative to `src/`) breaks, one sentence each.
fn breaches(path: &Path, source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let name = path.display();
    if !source.starts_with("//!") {
        found.push(format!("{name}: opens without `//!` that says what it is and what not"));
    }
    let lines = source.lines().count();
    if lines > LINES_MAX {
        found.push(format!("{name}: {lines} lines, {LINES_MAX} are allowed: split it by noun"));
    }
    let Some(module) = module_of(path) else { return found };
    let code = code_only(source);
    if module != "bridge" && words(&code, "unsafe").next().is_some() {
        found.push(format!("{name}: `unsafe` outside src/bridge"));
    }
    let Some(rank) = ORDER.iter().position(|known| *known == module) else {
        found.push(format!("{name}: module {module} is not in ORDER of tests/architecture.rs"));
        return found;
    };
    // `x.rs` and `x/mod.rs` are one `super` from the crate's root, `x/y.rs` two.
    let folders = path.components().count() - 1;
    let is_mod = path.file_name().is_some_and(|name| name == "mod.rs");
    let mut used_modules = modules_named(&code);
    used_modules.extend(modules_climbed_to(&code, folders + usize::from(!is_mod)));
    for used in used_modules {
        let Some(used_rank) = ORDER.iter().position(|known| *known == used) else { continue };
        if used_rank > rank {
            found.push(format!("{name}: {module} uses {used}, which stands above it"));
        }
        for (_, banned, why) in BANS.iter().filter(|(who, _, _)| *who == module) {
            if banned.contains(&used.as_str()) {
                found.push(format!("{name}: {module} uses {used}: {why}"));
            }
        }
    }
    if !TENSOR_MODULES.contains(&module.as_str()) {
        for name_of_tch in ["tch", "torch_sys"] {
            if words(&code, name_of_tch)
                .any(|at| code[at + name_of_tch.len()..].trim_start().starts_with("::"))
            {
                found.push(format!(
                    "{name}: {module} names {name_of_tch}: tensors live in {TENSOR_MODULES:?}"
                ));
            }
        }
    }
    found
}

/// The module a file belongs to: its first folder, or its own name. `lib.rs` belongs to none.
fn module_of(path: &Path) -> Option<String> {
    let first = path.components().next()?.as_os_str().to_str()?;
    let module = first.strip_suffix(".rs").unwrap_or(first);
    (module != "lib").then(|| module.to_owned())
}

fn rust_files(folder: &Path, into: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
    Ok(())
}

#[test]
fn sources_keep_the_rules() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files).unwrap();
    assert!(files.len() > ORDER.len() / 2, "found only {} files: is this the crate?", files.len());
    files.sort();
    let found: Vec<String> = files
        .iter()
        .flat_map(|path| {
            breaches(path.strip_prefix(&src).unwrap(), &fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "{} breaches:\n{}", found.len(), found.join("\n"));
}

#[test]
fn every_module_of_the_crate_has_a_place_in_the_order() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let code = code_only(&lib);
    for at in words(&code, "mod") {
        let module = leading_word(code[at + 3..].trim_start()).unwrap();
        assert!(ORDER.contains(&module.as_str()), "module {module} is missing from ORDER");
    }
}

/// One sample per rule: the checker must object, and say why in these words.
#[test]
fn the_checker_objects_to_bad_samples() {
    let long = format!("//! x\n{}", "\n".repeat(LINES_MAX));
    let samples: &[(&str, &str, &str)] = &[
        ("types.rs", "pub struct A;", "opens without"),
        ("types.rs", &long, "501 lines"),
        ("store/read.rs", "//! x\nuse crate::data::Manifest;", "store uses data"),
        ("data/mod.rs", "//! x\nuse crate::{types::Step, eval::{Dice, x}};", "data uses eval"),
        (
            "data/mod.rs",
            "//! x\nuse crate::{\n    types::{Step, Rank},\n    trainer,\n};",
            "data uses trainer",
        ),
        ("data/mod.rs", "//! x\nfn f() -> crate :: trainer::T { todo!() }", "data uses trainer"),
        ("model/dbpnet.rs", "//! x\nuse crate::config::Model;", "model uses config"),
        ("loss/cpcr.rs", "//! x\nuse crate::store;", "loss uses store"),
        ("coordinator/state.rs", "//! x\nuse crate::model::Dbpnet;", "nothing of tensors"),
        ("worker/agent.rs", "//! x\nuse crate::loss;", "worker uses loss"),
        ("worker/agent.rs", "//! x\nuse tch::Tensor;", "worker names tch"),
        ("coordinator/state.rs", "//! x\nfn f(t: &tch::Tensor) {}", "coordinator names tch"),
        ("data/load.rs", "//! x\nuse torch_sys::C_tensor;", "data names torch_sys"),
        ("trainer/step.rs", "//! x\nfn f() { unsafe { g() } }", "`unsafe` outside"),
        ("store/read.rs", "//! x\nuse super::super::data::M;", "store uses data"),
        ("store/mod.rs", "//! x\nuse super::data::M;", "store uses data"),
        ("bin/cpcr.rs", "//! x\nfn f() { let s = \"a\"; unsafe {} }", "`unsafe` outside"),
        ("novel/mod.rs", "//! x\n", "not in ORDER"),
    ];
    for (path, source, words) in samples {
        let found = breaches(Path::new(path), source);
        assert!(
            found.iter().any(|breach| breach.contains(words)),
            "{path} should be told '{words}', was told {found:?}:\n{source}"
        );
    }
}

#[test]
fn the_checker_lets_good_samples_pass() {
    let samples: &[(&str, &str)] = &[
        ("data/mod.rs", "//! crate::trainer\nuse crate::{store::Reader, types::{Rank, Step}};"),
        (
            "data/mod.rs",
            "//! x\n// unsafe, tch::Tensor\nconst A: &str = \"crate::cli\"; /* unsafe /* x */ crate::cli */",
        ),
        (
            "data/mod.rs",
            "//! x\nconst A: &str = r#\"\" crate::cli\"#; fn f<'a>(x: &'a str, c: char) -> bool { c == '\"' }",
        ),
        ("bridge/mod.rs", "//! x\n#![allow(unsafe_code)]\nfn f() { unsafe { tch::g() } }"),
        ("trainer/mod.rs", "//! x\nuse tch::Tensor; use crate::{loss, model, worker};"),
        ("store/read.rs", "//! x\nuse super::verified;\nmod tests { use super::*; }"),
        ("bin/cpcr.rs", "//! x\nuse cpcr::cli;\nfn main() {}"),
        ("lib.rs", "//! x\npub mod types;"),
    ];
    for (path, source) in samples {
        assert_eq!(breaches(Path::new(path), source), Vec::<String>::new(), "{path}:\n{source}");
    }
}
