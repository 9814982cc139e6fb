//! What the file says, key by key, for people: each key's value, its default, and where the value is from.
//!
//! Promises: no secret is kept here, not even the name of where one is. The defaults are those of `config.yaml`, which a
//! test holds against the code.

use std::fmt;

use super::live::{self, Applies};
use super::{MAX_VALUES, SECTIONS, Tree};

/// The example, whose values are the defaults.
const EXAMPLE: &str = include_str!("../../config.yaml");

/// Keys of the example that are examples, not defaults.
const NO_DEFAULT: &[&str] = &["nodes", "control.user", "control.password"];

/// What stands for a secret.
const HIDDEN: &str = "********";

/// What a file says: leaves by their path, as `pool.size` or `nodes[1].host`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Given(Vec<(String, Option<String>)>);

/// Two configurations that say the same are the same, whatever of it was left out.
impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Given")
    }
}

/// Where a value is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The file says it.
    File,
    /// Nobody says it.
    Default,
    /// A variable of the environment, which the file names.
    Environment,
    /// Another file, which the file names.
    SecretFile,
}

impl Source {
    /// One word, or two.
    pub fn label(self) -> &'static str {
        match self {
            Source::File => "file",
            Source::Default => "default",
            Source::Environment => "environment",
            Source::SecretFile => "secret file",
        }
    }
}

/// A key of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// As `pool.size` or `nodes[1].host`.
    pub key: String,
    /// Its value; `None`: none. Of a secret, stars.
    pub value: Option<String>,
    /// The same if nobody says it.
    pub default: Option<String>,
    /// Where the value is from.
    pub source: Source,
    /// When a change of it takes effect.
    pub applies: Applies,
}

impl Given {
    pub(super) fn of(tree: &Tree) -> Given {
        let mut given = Given::default();
        given.take("", tree);
        given.0.truncate(MAX_VALUES);
        given
    }

    fn take(&mut self, path: &str, tree: &Tree) {
        let last = path.rsplit('.').next().unwrap_or_default();
        if last.starts_with("password") {
            return self.0.push((path.to_owned(), Some(HIDDEN.to_owned())));
        }
        match tree {
            Tree::Map(entries) => {
                for (key, value) in entries {
                    let dot = if path.is_empty() { "" } else { "." };
                    self.take(&format!("{path}{dot}{key}"), value);
                }
            }
            Tree::List(items) if items.iter().any(|item| matches!(item, Tree::Map(_))) => {
                for (index, item) in items.iter().enumerate() {
                    self.take(&format!("{path}[{index}]"), item);
                }
            }
            Tree::List(items) => {
                let items: Vec<String> = items.iter().filter_map(scalar).collect();
                self.0.push((path.to_owned(), Some(format!("[{}]", items.join(", ")))));
            }
            other => self.0.push((path.to_owned(), scalar(other))),
        }
    }

    fn get(&self, key: &str) -> Option<&Option<String>> {
        self.0.iter().find(|(path, _)| path == key).map(|(_, value)| value)
    }

    /// What takes a restart is as it was: the file may say something else by now.
    pub(super) fn keep(&mut self, before: &Given) {
        let restarts = |key: &str| live::applies(&general(key)) == Some(Applies::Restart);
        self.0.retain(|(key, _)| !restarts(key));
        self.0.extend(before.0.iter().filter(|(key, _)| restarts(key)).cloned());
    }

    /// Every key, in the order of the reference page; entries of lists as far as they are given.
    pub fn settings(&self) -> Vec<Setting> {
        let example = super::walk(EXAMPLE, None).map(|tree| Given::of(&tree)).unwrap_or_default();
        let mut found = Vec::new();
        for (section, keys) in SECTIONS {
            if let Some(list) = section.strip_suffix("[]") {
                let of_list = |key: &str| {
                    key.strip_prefix(list).and_then(|rest| rest.strip_prefix('[')).is_some_and(|rest| {
                        rest.split_once("].").is_some_and(|(_, name)| keys.contains(&name))
                    })
                };
                let entries = self.0.iter().filter(|(key, _)| of_list(key));
                found.extend(entries.map(|(key, value)| Setting {
                    key: key.clone(),
                    value: value.clone(),
                    default: None,
                    source: source(key),
                    applies: applies(key),
                }));
                continue;
            }
            for key in *keys {
                let dot = if section.is_empty() { "" } else { "." };
                let key = format!("{section}{dot}{key}");
                if is_section(&key) {
                    continue;
                }
                let default = match key.as_str() {
                    "workers" => Some("one per core".to_owned()),
                    _ if NO_DEFAULT.contains(&key.as_str()) => None,
                    _ => example.get(&key).cloned().flatten(),
                };
                let given = self.get(&key);
                // Of the three ways to give a secret only the one that was taken is shown.
                if given.is_none() && key.rsplit('.').next().is_some_and(|last| last.starts_with("password_"))
                {
                    continue;
                }
                found.push(Setting {
                    value: given.cloned().unwrap_or_else(|| default.clone()),
                    default,
                    source: if given.is_some() { source(&key) } else { Source::Default },
                    applies: applies(&key),
                    key,
                });
            }
        }
        found
    }
}

fn scalar(tree: &Tree) -> Option<String> {
    match tree {
        Tree::Bool(value) => Some(value.to_string()),
        Tree::Int(value) => Some(value.to_string()),
        Tree::Text(text) => Some(text.clone()),
        Tree::Null | Tree::Float | Tree::List(_) | Tree::Map(_) => None,
    }
}

fn is_section(key: &str) -> bool {
    SECTIONS.iter().any(|(section, _)| section.strip_suffix("[]").unwrap_or(section) == key)
}

fn source(key: &str) -> Source {
    match key.rsplit('.').next().unwrap_or_default() {
        "password_env" => Source::Environment,
        "password_file" => Source::SecretFile,
        _ => Source::File,
    }
}

/// `nodes[1].host` as `nodes[].host`.
fn general(key: &str) -> String {
    let mut out = String::with_capacity(key.len());
    let mut inside = false;
    for c in key.chars() {
        inside &= c != ']';
        if !inside {
            out.push(c);
        }
        inside |= c == '[';
    }
    out
}

fn applies(key: &str) -> Applies {
    live::applies(&general(key)).unwrap_or(Applies::Restart)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn each_key_with_its_value_default_and_source_but_no_secret() {
        let text = "control: { user: hw, password_env: WHERE_IT_IS }\npool: { size: 7 }\n\
                    auth: { admins: [ a, b ], source: list, users: [ { name: app, password: hunter2x } ] }\n\
                    nodes:\n  - { name: x, host: h, port: 1 }\n  - { name: y, host: i }\n";
        let env = |name: &str| (name == "WHERE_IT_IS").then(|| "hunter3x".to_owned());
        let settings = Config::parse(text, "f.yaml", &env).unwrap().given.settings();
        let of = |key: &str| settings.iter().find(|s| s.key == key).unwrap_or_else(|| panic!("{key}"));
        let said = |key: &str| {
            let s = of(key);
            (s.value.as_deref(), s.default.as_deref(), s.source, s.applies)
        };
        assert_eq!(said("pool.size"), (Some("7"), Some("20"), Source::File, Applies::Live));
        assert_eq!(said("pool.mode").0, Some("transaction"));
        assert_eq!(said("max_clients"), (Some("1000"), Some("1000"), Source::Default, Applies::Live));
        assert_eq!(said("listen").3, Applies::Restart);
        assert_eq!(said("nodes[1].host"), (Some("i"), None, Source::File, Applies::Live));
        assert_eq!(said("auth.admins").0, Some("[a, b]"));
        assert_eq!(said("control.password_env"), (Some(HIDDEN), None, Source::Environment, Applies::Live));
        assert_eq!(said("auth.users[0].password").0, Some(HIDDEN));
        let shown = format!("{settings:?}");
        assert!(!shown.contains("hunter") && !shown.contains("WHERE_IT_IS"), "{shown}");
        for (section, keys) in SECTIONS.iter().filter(|(section, _)| !section.ends_with("[]")) {
            for key in *keys {
                let dot = if section.is_empty() { "" } else { "." };
                let key = format!("{section}{dot}{key}");
                let way = key.contains("password");
                assert!(is_section(&key) || way || settings.iter().any(|s| s.key == key), "{key}");
            }
        }
    }

    #[test]
    fn what_takes_a_restart_is_shown_as_it_is_in_force() {
        let given = |text: &str| {
            let text = format!("control: {{ user: u }}\nnodes: [ {{ name: a, host: h }} ]\n{text}");
            Config::parse(&text, "f", &|_| None).unwrap().given
        };
        let mut after = given("listen: 127.0.0.1:2\npool: { size: 2 }");
        after.keep(&given("listen: 127.0.0.1:1\npool: { size: 1 }"));
        let value = |key: &str| after.settings().into_iter().find(|s| s.key == key).and_then(|s| s.value);
        assert_eq!(
            (value("listen").as_deref(), value("pool.size").as_deref()),
            (Some("127.0.0.1:1"), Some("2"))
        );
    }
}
