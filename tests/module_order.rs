//! The shape of the source tree: who may use whom, and what the pure modules must do without. The
//! tables below are the rules; an error names file and line.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// Each module, and the modules it may use. Whoever is left out of a line may not be used there;
/// above all, `client`, `backend` and `route` meet in `session` alone, and the two ways (of a
/// statement, of the cluster) share values, never each other's shells.
const MAY_USE: &[(&str, &str)] = &[
    // Values: facts in, a value out.
    ("wal", ""),
    ("wire", ""),
    ("consistency", "wal"),
    ("topology", "config wal"),
    ("positions", "topology wal"),
    // What both ways stand at: the cluster's sets it, the statements' passes it.
    ("gate", "topology"),
    ("classify", "config consistency wal wire"),
    ("route", "classify topology positions wal"),
    // A value too, once it has been read.
    ("config", "consistency wal"),
    // Leaves of the shells; metrics names its labels by the values that the cores decide on.
    ("metrics", "classify config route topology wal"),
    ("scram", "config"),
    ("net", "config wire"),
    ("login", "config net scram wire"),
    // The way of the cluster.
    ("node", "config login net scram topology wal wire"),
    ("etcd", "config net"),
    ("monitor", "config metrics node topology positions wal"),
    ("failover", "config etcd gate node topology wal"),
    ("control", "config failover gate metrics monitor node topology positions wal"),
    ("catalogs", "classify config metrics node topology wal"),
    // The way of a statement. A session and its backends tell `control` and `node` of failures they
    // meet (a handle that sends); they ask them nothing.
    ("client", "config metrics net node scram topology wal wire"),
    ("backend", "classify config gate login metrics net node scram topology positions wal wire"),
    (
        "session",
        "backend catalogs classify client config consistency control gate log metrics net node positions route scram topology wal wire",
    ),
    ("listener", "backend catalogs client config console metrics net node session topology wal wire"),
    // The way of the operator.
    (
        "console",
        "backend classify config control explain metrics net positions reload route session topology wal wire",
    ),
    ("log", "config"),
    ("admin", "config metrics positions topology wal"),
    ("check", "catalogs classify config etcd failover monitor net node topology wal"),
    ("rejoin", "config failover net node topology"),
    ("explain", "catalogs classify config consistency net node topology wal"),
    ("reload", "config"),
    (
        "server",
        "admin backend catalogs classify client config console control failover gate listener log metrics monitor net node positions \
         reload route session supervisor topology wal",
    ),
    ("supervisor", ""),
    ("healthcheck", ""),
    ("manual", ""),
    ("progress", ""),
    ("demo", "config metrics progress rejoin server topology"),
    ("main", "check config demo explain healthcheck log manual progress rejoin server classify route"),
];

/// Files (or folders) of pure code: no I/O, clock, chance, logging, metrics.
const PURE: &[&str] = &[
    "wal.rs",
    "wire.rs",
    "node/answer.rs",
    "consistency.rs",
    "topology.rs",
    "classify/",
    "route/",
    "session/mark.rs",
    "session/state.rs",
    "session/prepared.rs",
    "console/command.rs",
    "config/near.rs",
    "session/settings.rs",
    "backend/applied.rs",
    "backend/parameters.rs",
    "session/pins.rs",
    "monitor/health.rs",
    "monitor/lag.rs",
    "monitor/floor.rs",
    "monitor/replay.rs",
    "failover/mod.rs",
    "failover/event.rs",
    "monitor/clock.rs",
    "failover/decide.rs",
    "failover/lease.rs",
    "failover/detect.rs",
    "failover/candidate.rs",
    "admin/history.rs",
    "admin/chart.rs",
    "admin/page.rs",
    "admin/words.rs",
    "failover/command.rs",
    "failover/record.rs",
    "failover/sync.rs",
    "failover/slots.rs",
    "failover/conninfo.rs",
    "failover/recipe.rs",
    "failover/text.rs",
];

/// What lies in a pure folder and is not: `opinion` keeps a thread for the second parser, and the
/// folder's face asks it and keys the cache by chance. `fuzz` is tests.
const NOT_PURE: &[&str] =
    &["classify/mod.rs", "classify/catalogs.rs", "classify/opinion.rs", "classify/fuzz.rs"];

/// What pure code must not name.
const IMPURE: &[&str] = &[
    "tokio::",
    "Instant::now",
    "SystemTime",
    "rand::",
    "tracing::",
    "prometheus::",
    "crate::metrics",
    "std::net::Tcp",
    "std::fs",
    "std::thread",
    "std::env",
    "async fn",
    ".await",
    "println!",
];

/// Exceptions to [`IMPURE`], by file: the handle that publishes topologies wakes its readers; the status page
/// shows values that metrics names.
const ALLOWED: &[(&str, &str)] = &[
    ("topology.rs", "tokio::sync"),
    ("topology.rs", "async fn"),
    ("topology.rs", ".await"),
    ("admin/history.rs", "crate::metrics"),
    ("admin/page.rs", "crate::metrics"),
];

/// A source file as far as the rules go: comments, texts and unit tests blanked out, lines kept.
struct Source {
    /// Relative to src/.
    path: String,
    code: String,
}

impl Source {
    /// `main` for main.rs, else the top-level module.
    fn module(&self) -> &str {
        self.path.split('/').next().unwrap().trim_end_matches(".rs")
    }

    fn line_of(&self, offset: usize) -> usize {
        self.code[..offset].matches('\n').count() + 1
    }

    fn at(&self, offset: usize) -> String {
        format!("src/{}:{}", self.path, self.line_of(offset))
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => folders.push(path),
                // Unit tests in a file of their own.
                path if path.ends_with("tests.rs") => {}
                path if path.extension().is_some_and(|extension| extension == "rs") => files.push(path),
                _ => {}
            }
        }
    }
    files.sort();
    files
        .iter()
        .map(|file| Source {
            path: file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(),
            code: code_only(&std::fs::read_to_string(file).unwrap()),
        })
        .collect()
}

/// Blanks comments, string literals and everything from the unit tests on (they are at the bottom).
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    // Keeps the lines of what is left out.
    let blank =
        |out: &mut String, piece: &str| out.extend(piece.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
    while at < bytes.len() {
        let rest = &text[at..];
        let literal = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(hashes) = raw_string(rest, bytes[..at].last()) {
            let end = format!("\"{}", "#".repeat(hashes));
            let body = hashes + 2;
            rest[body..].find(&end).map_or(rest.len(), |found| body + found + end.len())
        } else if rest.starts_with('"') {
            end_of_string(rest)
        } else if rest.starts_with("'\"'") || rest.starts_with("b'\"'") {
            rest.find("\"'").map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with("'\\\"'") {
            4
        } else {
            0
        };
        if literal > 0 {
            blank(&mut out, &rest[..literal]);
            at += literal;
        } else {
            let next = rest.chars().next().unwrap();
            out.push(next);
            at += next.len_utf8();
        }
    }
    // A `#[cfg(test)]` on anything but a module with a body is code among code.
    let tests = out.match_indices("#[cfg(test)]").map(|(at, _)| at).find(|at| {
        let mut lines = out[*at..].lines().skip(1).skip_while(|line| line.trim_start().starts_with("#["));
        lines.next().is_some_and(|line| {
            let line = line.trim_start().trim_start_matches("pub(crate) ").trim_start_matches("pub ");
            line.starts_with("mod ") && line.contains('{')
        })
    });
    match tests {
        Some(tests) => out[..tests].to_owned(),
        None => out,
    }
}

/// Whether a raw string starts here, and its number of `#`.
fn raw_string(rest: &str, before: Option<&u8>) -> Option<usize> {
    if before.is_some_and(|byte| byte.is_ascii_alphanumeric() && *byte != b'b' || *byte == b'_') {
        return None;
    }
    let after = rest.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some(hashes)
}

fn end_of_string(rest: &str) -> usize {
    let mut escaped = false;
    for (index, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return index + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The top-level modules that a file names through `root` (`crate::` or `highwater::`), and where.
fn named<'a>(source: &'a Source, root: &'a str) -> Vec<(usize, &'a str)> {
    let word = |text: &'a str| text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
    let mut found = Vec::new();
    for (offset, _) in source.code.match_indices(root) {
        let before = source.code[..offset].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let start = offset + root.len();
        let rest = &source.code[start..];
        if !rest.starts_with('{') {
            found.push((offset, word(rest)));
            continue;
        }
        // `use crate::{a::B, c};`: the first word of each item at the outermost level.
        let (mut depth, mut item) = (0, None);
        for (index, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            let starts = depth == 1 && matches!(c, '{' | ',');
            if starts {
                item = Some(index + 1);
            } else if let Some(begin) = item
                && !c.is_whitespace()
            {
                item = None;
                debug_assert!(begin <= index);
                if c.is_alphabetic() {
                    found.push((start + index, word(&rest[index..])));
                }
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

#[test]
fn modules_use_only_those_below_them() {
    let sources = sources();
    let mut wrong = Vec::new();
    let modules: Vec<&str> = sources
        .iter()
        .map(Source::module)
        .filter(|module| !matches!(*module, "lib" | "main" | "bin"))
        .collect();
    assert!(modules.len() > 10, "the tree was not found");
    for source in sources.iter().filter(|source| source.path != "lib.rs") {
        let Some((_, may)) = MAY_USE.iter().find(|(module, _)| *module == source.module()) else {
            wrong.push(format!("src/{}: module {} has no line in MAY_USE", source.path, source.module()));
            continue;
        };
        for (offset, used) in named(source, "crate::").into_iter().chain(named(source, "highwater::")) {
            let known = modules.contains(&used);
            if known && used != source.module() && !may.split(' ').any(|allowed| allowed == used) {
                wrong.push(format!("{}: {} may not use {used}", source.at(offset), source.module()));
            }
        }
        // Paths upwards are for siblings in one folder; the crate is named from its root.
        let depth = source.path.matches('/').count() - usize::from(source.path.ends_with("/mod.rs"));
        let climb = "super::".repeat(depth + 1);
        if let Some(offset) = source.code.find(&climb) {
            wrong.push(format!("{}: write crate:: for what lies outside the module", source.at(offset)));
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn pure_modules_do_no_io_and_ask_neither_clock_nor_chance() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for source in sources() {
        let pure = PURE
            .iter()
            .any(|pure| source.path == *pure || pure.ends_with('/') && source.path.starts_with(pure));
        if !pure || NOT_PURE.contains(&source.path.as_str()) {
            continue;
        }
        seen += 1;
        for impure in IMPURE {
            for (offset, _) in source.code.match_indices(impure) {
                let excused = ALLOWED
                    .iter()
                    .any(|(file, text)| source.path == *file && source.code[offset..].starts_with(text));
                let word_before = source.code[..offset].ends_with(|c: char| c.is_alphanumeric() || c == '_');
                let part_of_a_word = word_before && impure.starts_with(char::is_alphabetic);
                if !excused && !part_of_a_word {
                    wrong.push(format!("{}: {impure} in a pure module", source.at(offset)));
                }
            }
        }
    }
    assert!(seen > 3, "the pure modules were not found");
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn no_file_goes_without_its_head() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for source in sources() {
        let text = std::fs::read_to_string(root.join(&source.path)).unwrap();
        assert!(text.starts_with("//! "), "src/{} does not say what it is for", source.path);
    }
}

/// A table of promises is worth as much as the tests behind it.
#[test]
fn the_compatibility_page_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/COMPATIBILITY.md")).unwrap();
    let mut named = 0;
    let mut wrong = Vec::new();
    for (file, test) in page.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::")) {
        named += 1;
        let path = format!("tests/end_to_end/proxied/{file}.rs");
        let text = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
        if !text.contains(&format!("async fn {test}()")) {
            wrong.push(format!("{path} has no test {test}"));
        }
    }
    assert!(named > 50, "the tables were not found");
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_check_sees_what_it_should_see() {
    let source = |code: &str| Source { path: "route/x.rs".into(), code: code_only(code) };
    let modules = |code: &str| -> Vec<String> {
        named(&source(code), "crate::").into_iter().map(|(_, module)| module.to_owned()).collect()
    };
    assert_eq!(modules("use crate::backend::Pool;"), ["backend"]);
    assert_eq!(
        modules("use crate::{wal::{Lsn, TimelineId}, client, topology::Topology};"),
        ["wal", "client", "topology"]
    );
    assert_eq!(modules("fn f() { let x = crate::net::open(); }"), ["net"]);
    assert_eq!(
        modules("// crate::net\n/* crate::net */ const X: &str = \"crate::net\";"),
        Vec::<String>::new()
    );
    assert_eq!(modules("const X: &str = r#\"crate::net \" \"#; use crate::wal;"), ["wal"]);
    assert_eq!(modules("let quote = '\"'; use crate::wal; let other = b'\"';"), ["wal"]);
    assert_eq!(modules("use crate::wal;\n#[cfg(test)]\nmod tests { use crate::net; }"), ["wal"]);
    let tests =
        "use crate::wal;\n#[cfg(test)]\n#[allow(dead_code)]\npub(crate) mod tests {\n use crate::net; }";
    assert_eq!(modules(tests), ["wal"]);
    assert_eq!(modules("#[cfg(test)]\nmod tests;\nuse crate::net;"), ["net"]);
    assert_eq!(source("\"two\nlines\"\nuse crate::wal;").line_of(13), 3);
}

#[test]
fn the_map_of_the_architecture_has_each_source_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/ARCHITECTURE.md")).unwrap();
    let map = page.split_once("## The map").unwrap().1.split_once("\n## ").unwrap().0;
    let named = |name: &str| {
        let code = map.split('`').skip(1).step_by(2);
        code.flat_map(|code| code.split(|c: char| !(c.is_ascii_lowercase() || c == '_')))
            .any(|word| word == name)
    };
    let mut files = Vec::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.extend(path.extension().is_some_and(|e| e == "rs").then_some(path)),
            }
        }
    }
    assert!(files.len() > 100, "{}", files.len());
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        // The face of a folder is under the folder's name; the rest is tests.
        if !matches!(name, "mod" | "lib" | "tests" | "fuzz") {
            assert!(named(name), "docs/ARCHITECTURE.md does not say what {} holds", file.display());
        }
    }
}
