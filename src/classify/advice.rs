//! Which operators that everybody uses are kept off replicas by code that nobody knows, and what the operator of the
//! database could say to change that. For people; no class rests on it. Pure.

use std::collections::BTreeSet;

use super::catalog::{CatalogRows, Object};

/// Operators that hardly any statement does without.
const COMMON: &[&str] = &[
    "=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "/", "%", "||", "~", "~*", "!~", "!~*", "~~", "~~*",
    "!~~", "!~~*", "->", "->>", "@>", "<@", "&&",
];

/// Extensions of one database that are tried one by one.
const MAX_TRIALS: usize = 32;

/// Common operators that keep reads on the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBack {
    /// Which; empty: every statement of the database is kept back.
    pub operators: Vec<String>,
    /// What could be said.
    pub cure: Cure,
}

/// What would let them be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cure {
    /// Vouching for these extensions (`routing.functions.extensions`).
    Extensions(Vec<String>),
    /// Vouching for these functions behind them (`routing.functions.safe`), in as far as they are known.
    Functions(Vec<String>),
}

/// What is kept back: `None` stands for every statement.
type Found = BTreeSet<Option<&'static str>>;

/// What is kept back by the facts of a database, and by whose code.
pub fn kept_back(mut rows: CatalogRows) -> Vec<KeptBack> {
    let all = found(&rows);
    if all.is_empty() {
        return Vec::new();
    }
    let said = std::mem::take(&mut rows.overrides.extensions);
    let unknown = unknown_extensions(&rows, &said);
    let mut without = |extensions: &[String]| {
        rows.overrides.extensions = said.iter().chain(extensions).cloned().collect();
        let left = found(&rows);
        all.iter().filter(|what| !left.contains(*what)).copied().collect::<Found>()
    };
    let mut advice = Vec::new();
    let mut explained = Found::new();
    for extension in &unknown {
        let freed = without(std::slice::from_ref(extension));
        advice.extend(parts(&freed, &Cure::Extensions(vec![extension.clone()])));
        explained.extend(freed);
    }
    let together: Found = without(&unknown).difference(&explained).copied().collect();
    advice.extend(parts(&together, &Cure::Extensions(unknown)));
    explained.extend(together);
    let rest: Found = all.difference(&explained).copied().collect();
    let functions = functions_behind(&rows, &rest);
    advice.extend(parts(&rest, &Cure::Functions(functions)));
    advice
}

/// One line for every statement, one for the operators.
fn parts(found: &Found, cure: &Cure) -> Vec<KeptBack> {
    let operators: Vec<String> = found.iter().flatten().map(|token| (*token).to_owned()).collect();
    let everything = found.contains(&None).then(Vec::new);
    let some = (!operators.is_empty()).then_some(operators);
    everything.into_iter().chain(some).map(|operators| KeptBack { operators, cure: cure.clone() }).collect()
}

fn found(rows: &CatalogRows) -> Found {
    let facts = rows.closed();
    let everything = facts.unsafe_anywhere().then_some(None);
    let operators =
        COMMON.iter().filter(|token| facts.operator_is_unsafe(token.as_bytes())).map(|token| Some(*token));
    everything.into_iter().chain(operators).collect()
}

/// The extensions whose compiled code is neither known nor vouched for, and would be if they were.
fn unknown_extensions(rows: &CatalogRows, said: &[String]) -> Vec<String> {
    let freed = |row: &&super::catalog::FunctionRow| {
        !row.extension.is_empty()
            && row.language == "c"
            && !row.is_harmless(said)
            && row.is_harmless(std::slice::from_ref(&row.extension))
    };
    let names: BTreeSet<&str> = rows.functions.iter().filter(freed).map(|row| &*row.extension).collect();
    names.into_iter().take(MAX_TRIALS).map(str::to_owned).collect()
}

/// The users' functions behind these operators.
fn functions_behind(rows: &CatalogRows, operators: &Found) -> Vec<String> {
    let of_them: BTreeSet<u32> = rows
        .operators
        .iter()
        .filter(|row| operators.iter().flatten().any(|token| *token == row.token))
        .map(|row| row.oid)
        .collect();
    let functions: BTreeSet<u32> = rows
        .edges
        .iter()
        .filter_map(|edge| match edge {
            (Object::Function(function), Object::Operator(operator)) if of_them.contains(operator) => {
                Some(*function)
            }
            _ => None,
        })
        .collect();
    let behind = rows.functions.iter().filter(|row| functions.contains(&row.oid) && !row.is_harmless(&[]));
    let names: BTreeSet<String> = behind.map(|row| format!("{}.{}", row.schema, row.name)).collect();
    names.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::catalog::{FIRST_USER_OID, FunctionRow, Mark, OperatorRow};

    const TEXT: u32 = 25;

    fn compiled(oid: u32, extension: &str, volatile: bool) -> FunctionRow {
        FunctionRow {
            oid,
            name: format!("f{oid}"),
            schema: "app".into(),
            language: "c".into(),
            kind: "f".into(),
            library: "$libdir/x".into(),
            extension: extension.into(),
            volatile,
            ..FunctionRow::default()
        }
    }

    /// Functions, each with the token of an operator over it.
    fn rows(functions: Vec<(FunctionRow, &str)>) -> CatalogRows {
        let mut rows = CatalogRows { server_major: 15, ..CatalogRows::default() };
        for (oid, (function, token)) in (FIRST_USER_OID + 9_000..).zip(functions) {
            rows.operators.push(OperatorRow {
                oid,
                token: token.into(),
                operands: [TEXT, TEXT],
                outdone: false,
            });
            rows.edges.push((Object::Function(function.oid), Object::Operator(oid)));
            rows.functions.push(function);
        }
        rows
    }

    fn advice(operators: &[&str], cure: Cure) -> KeptBack {
        KeptBack { operators: operators.iter().map(|token| (*token).to_owned()).collect(), cure }
    }

    fn extensions(names: &[&str]) -> Cure {
        Cure::Extensions(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn who_keeps_common_operators_back_is_named() {
        let found = kept_back(rows(vec![
            (compiled(20_001, "one", false), "="),
            (compiled(20_002, "one", false), "###"),
            (compiled(20_003, "two", false), "<"),
            (compiled(20_004, "two", true), "||"),
            (compiled(20_005, "", false), "+"),
        ]));
        let safe = Cure::Functions(vec!["app.f20004".into(), "app.f20005".into()]);
        let expected = [
            advice(&["="], extensions(&["one"])),
            advice(&["<"], extensions(&["two"])),
            advice(&["+", "||"], safe),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn two_that_keep_the_same_one_back_are_named_together() {
        let found = kept_back(rows(vec![
            (compiled(20_001, "one", false), "="),
            (compiled(20_002, "two", false), "="),
            (compiled(20_003, "two", false), "<"),
        ]));
        assert_eq!(
            found,
            [advice(&["<"], extensions(&["two"])), advice(&["="], extensions(&["one", "two"]))]
        );
    }

    #[test]
    fn what_is_vouched_for_or_not_common_is_not_spoken_of() {
        let mut vouched =
            rows(vec![(compiled(20_001, "one", false), "="), (compiled(20_002, "two", false), "###")]);
        vouched.overrides.extensions = vec!["one".into()];
        assert_eq!(kept_back(vouched), []);
        assert_eq!(kept_back(CatalogRows::default()), []);
    }

    #[test]
    fn a_database_that_is_kept_back_whole_is_spoken_of() {
        let mut rows = rows(vec![(compiled(20_001, "one", false), "###")]);
        rows.edges.push((Object::Function(20_001), Object::Anywhere));
        assert_eq!(kept_back(rows), [advice(&[], extensions(&["one"]))]);
        let marks = vec![(Object::Anywhere, Mark::Code)];
        let rows = CatalogRows { marks, ..CatalogRows::default() };
        assert_eq!(kept_back(rows), [advice(&[], Cure::Functions(Vec::new()))]);
    }
}
