//! docs/ERRORS.md has what the proxy says to clients, and nothing else.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// An error: its SQLSTATE, and its words with a gap for each thing that differs from case to case.
type Said = (String, Vec<String>);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every source file, without its tests.
fn sources(folder: &Path, into: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap().to_owned();
            into.push((path, code));
        }
    }
}

/// The string literal that `text` begins with, and what follows it.
fn literal(text: &str) -> Option<(String, &str)> {
    let inside = text.trim_start().strip_prefix('"')?;
    let mut value = String::new();
    let mut rest = inside.chars();
    loop {
        match rest.next()? {
            '"' => return Some((value, rest.as_str())),
            '\\' => match rest.next()? {
                '\n' => rest = rest.as_str().trim_start().chars(),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
}

fn is_sqlstate(text: &str) -> bool {
    text.len() == 5 && text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// The words between what a format string fills in.
fn between_braces(format: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut inside = false;
    for c in format.chars() {
        match c {
            '{' => {
                inside = true;
                parts.push(String::new());
            }
            '}' => inside = false,
            c if !inside => parts.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    parts
}

/// What is made on the way and never sent: a client whose SASL message is malformed so is told that its password is
/// wrong.
const NEVER_SENT: (&str, &str) = ("28P01", "invalid message length");

/// What the code says to clients where both are written where the error is made; and the SQLSTATEs alone where the
/// words come from elsewhere.
fn in_the_code() -> (BTreeSet<Said>, BTreeSet<String>) {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let (mut said, mut codes) = (BTreeSet::new(), BTreeSet::new());
    for (_, code) in &files {
        for call in ["ErrorReport::error(", "ErrorReport::fatal("] {
            for rest in code.split(call).skip(1) {
                let Some((sqlstate, rest)) = literal(rest) else { continue };
                assert!(is_sqlstate(&sqlstate), "{sqlstate}");
                let words = rest.trim_start().strip_prefix(',').unwrap().trim_start();
                match literal(words.strip_prefix("format!(").unwrap_or(words)) {
                    Some((words, _)) => drop(said.insert((sqlstate, between_braces(&words)))),
                    None => drop(codes.insert(sqlstate)),
                }
            }
        }
    }
    (said, codes)
}

/// The rows of the page. `None`: any words.
fn on_the_page() -> Vec<(String, Option<Vec<String>>)> {
    let page = std::fs::read_to_string(root().join("docs/ERRORS.md")).unwrap();
    page.lines()
        .filter_map(|line| line.strip_prefix("| "))
        .map(|row| row.split(" | ").collect::<Vec<_>>())
        .filter(|cells| is_sqlstate(cells[0]))
        .map(|cells| {
            let words = cells[1].strip_prefix('`').and_then(|words| words.strip_suffix('`'));
            assert!(words.is_some() || cells[1] == "any", "{cells:?}");
            (cells[0].to_owned(), words.map(|words| words.split('…').map(str::to_owned).collect()))
        })
        .collect()
}

#[test]
fn the_page_of_errors_has_each_one_that_the_code_makes() {
    let (said, codes) = in_the_code();
    assert!(said.len() > 50 && codes.len() > 3, "{} {}", said.len(), codes.len());
    let page = on_the_page();
    let has = |sqlstate: &str, words: &[String]| {
        page.iter().any(|(code, row)| code == sqlstate && row.as_deref().is_none_or(|row| row == words))
    };
    for (sqlstate, words) in &said {
        if (sqlstate.as_str(), words.concat().as_str()) == NEVER_SENT {
            continue;
        }
        assert!(has(sqlstate, words), "docs/ERRORS.md lacks {sqlstate} {words:?}");
    }
    for sqlstate in codes {
        assert!(page.iter().any(|(code, _)| *code == sqlstate), "docs/ERRORS.md lacks {sqlstate}");
    }
}

#[test]
fn the_page_of_errors_has_none_that_the_code_does_not_make() {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    // As a reader of the code sees it: a long literal in one line, a quote as a quote.
    let code: String = files
        .iter()
        .map(|(_, code)| {
            let lines: Vec<&str> =
                code.lines().map(|line| line.trim_start().trim_end_matches('\\')).collect();
            lines.concat().replace("\\\"", "\"")
        })
        .collect();
    let mut rows = BTreeSet::new();
    for (sqlstate, words) in on_the_page() {
        assert!(rows.insert((sqlstate.clone(), words.clone())), "twice: {sqlstate} {words:?}");
        assert!(code.contains(&format!("\"{sqlstate}\"")), "no error has {sqlstate}");
        for part in words.into_iter().flatten() {
            assert!(code.contains(&part), "no error says {part:?}");
        }
    }
}

#[test]
fn what_other_pages_quote_of_errors_is_on_the_page() {
    let page = std::fs::read_to_string(root().join("docs/ERRORS.md")).unwrap();
    let operations = std::fs::read_to_string(root().join("docs/OPERATIONS.md")).unwrap();
    let mut quoted = 0;
    for row in operations.lines().filter_map(|line| line.strip_prefix("| client: ")) {
        let seen = row.split(" | ").next().unwrap();
        for words in seen.split('`').skip(1).step_by(2) {
            for part in words.split("...") {
                assert!(page.contains(part.trim()), "docs/OPERATIONS.md quotes {words:?}");
            }
            quoted += 1;
        }
    }
    assert!(quoted > 10, "{quoted}");
}
