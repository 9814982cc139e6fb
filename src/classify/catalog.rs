//! What a database's catalog says about names: which functions, relations, types and operators make a
//! statement unsafe on a replica, and which of a user's functions are proven harmless. A value; pure.
//! `catalogs` reads the rows from the primary.
//!
//! Closed: an object is unsafe until what it consists of is known, and what reaches an unsafe one is unsafe: a
//! function with an unsafe default or type, an operator or cast over it, a type with such a cast, check or operator
//! class, a table with a column of that type, a policy or folded expression over it, its parents, views and their
//! views. `pg_depend` does not record built-in functions, so stored expressions are read (`tree`).
//!
//! A user's function is harmless when its body is known: a stored query, a text that the scan calls a read (`body`), a
//! built-in or a known extension's code (`extension`), an aggregate of such. What it is declared to be decides
//! nothing: IMMUTABLE may lie, and VOLATILE is only what nobody has said otherwise
//! (docs/decisions/0012). A name is taken for all functions that bear it, in whatever schema; behind a schema's name
//! (`s.f(..)`), for those of that schema (docs/decisions/0016).
//!
//! An unsafe operator makes its token unsafe, unless both operands are of users' types to which nothing built-in
//! is cast implicitly and a built-in operator of that token wins over it for constants: then only an unsafe
//! relation, function, type name or parameter can bring such an operand along.
//!
//! Of what a write runs (triggers, defaults, checks, rules) it is only looked at what of session state that may leave behind.
//! Deliberately not looked at: temporary relations (a session that made one is pinned).

use std::collections::BTreeMap;

use hashbrown::{HashMap, HashSet};

use super::builtin::Vocabulary;
use super::tree::{self, Reference, Use};
use super::{body, extension, transaction};
use crate::config::FunctionOverrides;

/// The first object identifier that PostgreSQL gives to users' objects.
pub const FIRST_USER_OID: u32 = 16_384;

/// What one function is found to do spreads to those that call it so many times; then all are taken for unsafe.
const MAX_ROUNDS: usize = 32;

/// Facts about one database at one moment.
#[derive(Debug)]
pub struct Catalog {
    identity: u64,
    facts: Option<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    server_major: u16,
    names: HashMap<Box<[u8]>, Flags>,
    /// By their numbers ([`Flags::schema`]), from 1 on.
    schemas: Vec<Schema>,
    operators: HashSet<Box<[u8]>>,
    safe_types: HashSet<u32>,
    /// Code that is not known can be reached where no name shows it: a cast between built-in types, an
    /// operator class of one.
    anywhere: bool,
}

/// A schema, and the names of functions that are harmless in it and unsafe in another.
#[derive(Debug)]
struct Schema {
    name: Box<[u8]>,
    harmless: HashSet<Box<[u8]>>,
}

/// What is known of a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// A function that is not known to be harmless: unsafe where it is called.
    pub called: bool,
    /// A function of one argument: unsafe after a dot too, as `t.f` may mean `f(t)`.
    pub attribute: bool,
    /// A relation whose rows are not those of the primary: sequence, unlogged, foreign.
    pub elsewhere: bool,
    /// A relation or type that runs code which is not known.
    pub code: bool,
    /// A user's function whose body may change settings, of which those of applications do not show afterwards.
    pub sets: bool,
    /// A relation of which a change may fire a trigger that changes settings.
    pub fires: bool,
    /// A relation of which a change may run code (a trigger, a default, a check...) that leaves other session state.
    pub leaves: bool,
    /// A user's function whose body may define what makes other statements unsafe.
    pub defines: bool,
    /// All functions of this name are harmless.
    pub proven: bool,
    /// A relation or function that asks for the time of its transaction, or whose code may.
    pub moment: bool,
    /// A schema in which a function is harmless although another of its name is not: its number; else 0.
    pub schema: u16,
}

/// The rows of the catalog queries, as they come.
#[derive(Debug, Default)]
pub struct CatalogRows {
    /// The server's major version, for example 15.
    pub server_major: u16,
    /// The database's encoding is UTF-8.
    pub utf8: bool,
    /// What the operator says of functions.
    pub overrides: FunctionOverrides,
    /// [`SAFE_FUNCTIONS_SQL`]
    pub safe_functions: HashSet<u32>,
    /// [`TEXT_SEARCH_SQL`]: built-in objects that may run users' code, with their names.
    pub text_search: HashMap<Object, String>,
    /// [`ATTRIBUTES_SQL`]
    pub attributes: Vec<String>,
    /// [`UNSAFE_RELATIONS_SQL`]
    pub unsafe_relations: HashSet<u32>,
    /// [`FUNCTIONS_SQL`]
    pub functions: Vec<FunctionRow>,
    /// Those of them that are written in SQL.
    pub in_sql: HashSet<u32>,
    /// [`SETTERS_SQL`]
    pub setters: Vec<String>,
    /// [`FIRING_SQL`]
    pub firing: Vec<String>,
    /// [`LEAVING_SQL`]
    pub leaving: Vec<String>,
    /// [`OPERATORS_SQL`]
    pub operators: Vec<OperatorRow>,
    /// [`TYPES_SQL`]
    pub types: Vec<TypeRow>,
    /// [`MARKS_SQL`], and what [`CatalogRows::tree`] and [`CatalogRows::cast`] add.
    pub marks: Vec<(Object, Mark)>,
    /// [`EDGES_SQL`], and what the other rows add: what is unsafe on the left makes the right unsafe.
    pub edges: Vec<(Object, Object)>,
    /// Types that are reached from built-in types by implicit casts, with what they are reached from.
    pub implicit: Vec<(u32, u32)>,
    /// [`ALIASES_SQL`]: types that stand for another object: a row type for its relation, an array for its element.
    pub aliases: HashMap<u32, Object>,
    /// [`NAMES_SQL`]: names of relations and of their arrays' types.
    pub relations: Vec<(u32, String)>,
    /// What asks for the time of its transaction, as [`CatalogRows::tree`] finds it.
    pub moments: Vec<Object>,
}

/// A user's function.
#[derive(Debug, Default)]
pub struct FunctionRow {
    /// `pg_proc.oid`
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// The name of its schema.
    pub schema: String,
    /// `pg_language.lanname`
    pub language: String,
    /// `pg_proc.prokind`
    pub kind: String,
    /// Declared (or by default) VOLATILE.
    pub volatile: bool,
    /// May be called with one argument.
    pub one_argument: bool,
    /// SET clauses other than search_path.
    pub settings: bool,
    /// `prosrc`; of compiled code the symbol.
    pub source: String,
    /// `probin`
    pub library: String,
    /// The extension it belongs to, or nothing.
    pub extension: String,
    /// It takes `internal`, of which SQL has no value: only the server calls it.
    pub takes_internal: bool,
    /// Its body is stored as a tree, which is among the edges.
    pub stored: bool,
    /// In language internal, and all built-in functions with the same code are immutable, on the
    /// allow-list, or read and write values of a built-in type.
    pub internal: bool,
    /// A built-in function of the same name is not on the allow-list.
    pub shadows: bool,
}

/// A user's operator.
#[derive(Debug, Default)]
pub struct OperatorRow {
    /// `pg_operator.oid`
    pub oid: u32,
    /// Its token.
    pub token: String,
    /// Types of the operands; 0 where there is none.
    pub operands: [u32; 2],
    /// For operands that are constants or built-in a built-in operator is chosen before it: see [`OPERATORS_SQL`].
    pub outdone: bool,
}

/// A user's type, row types of tables and their arrays left out.
#[derive(Debug, Default)]
pub struct TypeRow {
    /// `pg_type.oid`
    pub oid: u32,
    /// Its name.
    pub name: String,
}

/// What an edge joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    /// `pg_class.oid`
    Relation(u32),
    /// `pg_type.oid`
    Type(u32),
    /// `pg_proc.oid`
    Function(u32),
    /// `pg_operator.oid`
    Operator(u32),
    /// Every statement.
    Anywhere,
}

impl Object {
    /// From the queries' letter and oid.
    pub fn from_columns(letter: &str, oid: u32) -> Option<Object> {
        match letter {
            "r" => Some(Object::Relation(oid)),
            "t" => Some(Object::Type(oid)),
            "f" => Some(Object::Function(oid)),
            "o" => Some(Object::Operator(oid)),
            "*" => Some(Object::Anywhere),
            _ => None,
        }
    }
}

/// Why an object is unsafe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Its rows are not those of the primary.
    Elsewhere,
    /// It runs code that is not known.
    Code,
}

impl Mark {
    /// From the queries' letter; what is not known counts as code.
    pub fn from_letter(letter: &str) -> Mark {
        if letter == "e" { Mark::Elsewhere } else { Mark::Code }
    }
}

impl CatalogRows {
    /// A stored expression of `owner`: what it mentions makes the owner unsafe. Needs the system's rows.
    pub fn tree(&mut self, owner: Object, tree: &str, used: Use) {
        let CatalogRows {
            safe_functions, unsafe_relations, text_search, in_sql, marks, edges, moments, ..
        } = self;
        if used == Use::Evaluated && tree::names_the_clock(tree) {
            moments.push(owner);
        }
        tree::references(tree, used, |reference| {
            let from = match reference {
                Reference::OwnSetting => return,
                Reference::Writes => return marks.push((owner, Mark::Code)),
                Reference::Function(oid) if oid < FIRST_USER_OID => {
                    if tree::MOMENTS.contains(&oid) {
                        moments.push(owner);
                    }
                    if !safe_functions.contains(&oid) {
                        marks.push((owner, Mark::Code));
                    }
                    if !text_search.contains_key(&Object::Function(oid)) {
                        return;
                    }
                    Object::Function(oid)
                }
                Reference::Operator(oid) if text_search.contains_key(&Object::Operator(oid)) => {
                    Object::Operator(oid)
                }
                Reference::Relation(oid) if oid < FIRST_USER_OID => {
                    if unsafe_relations.contains(&oid) {
                        marks.push((owner, Mark::Code));
                    }
                    return;
                }
                Reference::Operator(oid) | Reference::Type(oid) if oid < FIRST_USER_OID => return,
                Reference::Inlined(oid) if !in_sql.contains(&oid) => return,
                Reference::Inlined(oid) => Object::Function(oid),
                Reference::Function(oid) => Object::Function(oid),
                Reference::Relation(oid) => Object::Relation(oid),
                Reference::Operator(oid) => Object::Operator(oid),
                Reference::Type(oid) => Object::Type(oid),
            };
            if from != owner && edges.last() != Some(&(from, owner)) {
                edges.push((from, owner));
            }
        });
    }

    /// One row of [`EDGES_SQL`]. Needs the system's rows.
    pub fn edge(&mut self, from: Object, to: Object) {
        match from {
            Object::Function(oid) if oid < FIRST_USER_OID => {
                if !self.safe_functions.contains(&oid) {
                    self.marks.push((to, Mark::Code));
                }
            }
            _ => self.edges.push((from, to)),
        }
    }

    /// One row of [`TEXT_SEARCH_SQL`].
    pub fn text_search(&mut self, code: u32, object: Object, name: String) {
        self.edges.push((Object::Function(code), object));
        self.text_search.insert(object, name);
    }

    /// A user's cast, by a function or (0) by none: [`CASTS_SQL`].
    pub fn cast(&mut self, source: u32, target: u32, function: u32, implicit: bool) {
        if implicit {
            self.implicit.push((source, target));
        }
        if function == 0 {
            return;
        }
        // It runs where there is a value of the source. If that is a user's type, whatever has one is reached from it, and
        // the target's other values do not come by this cast; what is built in is everywhere, so there the target is.
        let reached = match [source, target].into_iter().find(|oid| *oid >= FIRST_USER_OID) {
            Some(users) => Object::Type(users),
            None => Object::Anywhere,
        };
        self.edge(Object::Function(function), reached);
    }

    /// The types among the edges whose alias is not known yet: `$1` of [`ALIASES_SQL`].
    pub fn mentioned_types(&self) -> Vec<u32> {
        let known: HashSet<u32> = self.types.iter().map(|row| row.oid).collect();
        let mut oids: Vec<u32> = self
            .edges
            .iter()
            .flat_map(|(from, to)| [*from, *to])
            .chain(self.marks.iter().map(|(object, _)| *object))
            .filter_map(|object| match object {
                Object::Type(oid) if !known.contains(&oid) => Some(oid),
                _ => None,
            })
            .collect();
        oids.sort_unstable();
        oids.dedup();
        oids
    }

    /// The relations that are unsafe, or ask for the time, as long as no body is proven: `$1` of [`NAMES_SQL`].
    pub fn unsafe_relations(&self) -> Vec<u32> {
        let functions = self.functions.iter().map(|row| Object::Function(row.oid));
        let moments: Vec<Object> = self.moments.iter().copied().chain(functions).collect();
        let mut oids: Vec<u32> = self
            .reached(&HashSet::new())
            .into_keys()
            .chain(self.spread(&moments))
            .filter_map(|object| match object {
                Object::Relation(oid) => Some(oid),
                _ => None,
            })
            .collect();
        oids.sort_unstable();
        oids
    }

    /// What an edge's end stands for.
    fn resolved(&self, object: Object) -> Object {
        match object {
            Object::Type(oid) => self.aliases.get(&oid).copied().unwrap_or(object),
            _ => object,
        }
    }

    /// Spreads the marks along the edges; each object is visited at most twice (elsewhere, then code).
    fn reached(&self, proven: &HashSet<u32>) -> HashMap<Object, Mark> {
        let mut next: HashMap<Object, Vec<Object>> = HashMap::with_capacity(self.edges.len());
        for (from, to) in &self.edges {
            next.entry(self.resolved(*from)).or_default().push(self.resolved(*to));
        }
        let known_safe: HashSet<u32> = self
            .functions
            .iter()
            .filter(|row| row.is_named(&self.overrides.safe))
            .map(|row| row.oid)
            .collect();
        let functions = self
            .functions
            .iter()
            .filter(|row| {
                row.is_named(&self.overrides.primary)
                    || !(row.is_harmless(&self.overrides.extensions) || proven.contains(&row.oid))
            })
            .map(|row| (Object::Function(row.oid), Mark::Code));
        let seeds: Vec<(Object, Mark)> = self
            .marks
            .iter()
            .map(|(object, mark)| (self.resolved(*object), *mark))
            .chain(functions)
            .collect();
        let mut reached: HashMap<Object, Mark> = HashMap::new();
        for mark in [Mark::Elsewhere, Mark::Code] {
            let mut pending: Vec<Object> =
                seeds.iter().filter(|(_, own)| *own == mark).map(|(object, _)| *object).collect();
            while let Some(object) = pending.pop() {
                if matches!(object, Object::Function(oid) if known_safe.contains(&oid)) {
                    continue;
                }
                if reached.insert(object, mark) != Some(mark) {
                    pending.extend(next.get(&object).into_iter().flatten());
                }
            }
        }
        reached
    }

    /// What is reached from some objects along the edges, with themselves.
    fn spread(&self, from: &[Object]) -> HashSet<Object> {
        let mut next: HashMap<Object, Vec<Object>> = HashMap::with_capacity(self.edges.len());
        for (from, to) in &self.edges {
            next.entry(self.resolved(*from)).or_default().push(self.resolved(*to));
        }
        let mut reached = HashSet::new();
        let mut pending: Vec<Object> = from.iter().map(|object| self.resolved(*object)).collect();
        while let Some(object) = pending.pop() {
            if reached.insert(object) {
                pending.extend(next.get(&object).into_iter().flatten());
            }
        }
        reached
    }

    /// Marks the names of what asks for the time of its transaction, be it through others. A body that is not
    /// known may.
    fn mark_moments(&self, catalog: &mut Catalog) {
        let unknown = |row: &&FunctionRow| {
            row.is_named(&self.overrides.safe) || row.language == "internal" && row.kind != "a"
        };
        let mut found = self.moments.clone();
        found.extend(self.functions.iter().filter(unknown).map(|row| Object::Function(row.oid)));
        let mut texts: Vec<&FunctionRow> = self.functions.iter().filter(|row| row.has_a_text()).collect();
        for round in 0.. {
            let reached = self.spread(&found);
            let functions = self.functions.iter().map(|row| (Object::Function(row.oid), &row.name));
            let relations = self.relations.iter().map(|(oid, name)| (Object::Relation(*oid), name));
            if let Some(facts) = &mut catalog.facts {
                for (_, name) in functions.chain(relations).filter(|(object, _)| reached.contains(object)) {
                    facts.names.entry(name.as_bytes().into()).or_default().moment = true;
                }
            }
            let before = texts.len();
            texts.retain(|row| {
                let depends =
                    round == MAX_ROUNDS || transaction::asks_for_time(row.source.as_bytes(), catalog);
                found.extend(depends.then_some(Object::Function(row.oid)));
                !depends
            });
            if texts.len() == before {
                return;
            }
        }
    }

    /// Marks the functions that define objects, be it through others.
    fn mark_definers(&self, catalog: &mut Catalog) {
        let written = |row: &&FunctionRow| !matches!(&*row.language, "internal" | "c");
        let mut others: Vec<&FunctionRow> = self.functions.iter().filter(written).collect();
        loop {
            let before = others.len();
            let (found, rest): (Vec<_>, Vec<_>) = others
                .into_iter()
                .partition(|row| body::defines(row.source.as_bytes(), |name| catalog.name(name).defines));
            others = rest;
            if let Some(facts) = &mut catalog.facts {
                for row in found {
                    facts.names.entry(row.name.as_bytes().into()).or_default().defines = true;
                }
            }
            if others.len() == before {
                return;
            }
        }
    }

    /// The users' types to which a value of a built-in type is cast without a word.
    fn implicitly_reached(&self) -> HashSet<u32> {
        let mut reached = HashSet::new();
        loop {
            let before = reached.len();
            for (from, to) in &self.implicit {
                if *to >= FIRST_USER_OID && (*from < FIRST_USER_OID || reached.contains(from)) {
                    reached.insert(*to);
                }
            }
            if reached.len() == before {
                return reached;
            }
        }
    }

    fn facts(&self, proven: &HashSet<u32>, implicit: &HashSet<u32>) -> Facts {
        let reached = self.reached(proven);
        let mut facts = Facts {
            server_major: self.server_major,
            anywhere: reached.contains_key(&Object::Anywhere),
            ..Facts::default()
        };
        let mut flag = |name: &str, set: &dyn Fn(&mut Flags)| {
            if let Some(flags) = facts.names.get_mut(name.as_bytes()) {
                set(flags);
            } else {
                set(facts.names.entry(name.as_bytes().into()).or_default());
            }
        };
        for name in &self.overrides.primary {
            // Built-in ones have no row; PostgreSQL's own are named without their schema.
            let name = name.strip_prefix("pg_catalog.").unwrap_or(name);
            if !name.contains('.') {
                flag(name, &|flags| (flags.called, flags.attribute) = (true, true));
            }
        }
        for name in &self.attributes {
            flag(name, &|flags| flags.attribute = true);
        }
        for (object, name) in &self.text_search {
            if matches!(object, Object::Function(_)) && reached.contains_key(object) {
                flag(name, &|flags| (flags.called, flags.attribute) = (true, true));
            }
        }
        for row in &self.functions {
            match reached.get(&Object::Function(row.oid)) {
                None => flag(&row.name, &|flags| flags.proven |= !row.shadows),
                Some(_) => flag(&row.name, &|flags| {
                    flags.called = true;
                    flags.attribute |= row.one_argument;
                }),
            }
        }
        let schemas = self.harmless_in_their_schemas(&reached);
        for (number, (schema, _)) in (1..).zip(&schemas) {
            flag(schema, &|flags| flags.schema = number);
        }
        for name in &self.setters {
            flag(name, &|flags| flags.sets = true);
        }
        for name in &self.firing {
            flag(name, &|flags| flags.fires = true);
        }
        for name in &self.leaving {
            flag(name, &|flags| flags.leaves = true);
        }
        let mut unsafe_object = |name: &str, mark: Mark| {
            flag(name, &|flags| {
                flags.code |= mark == Mark::Code;
                flags.elsewhere |= mark == Mark::Elsewhere;
            });
        };
        for (oid, name) in &self.relations {
            if let Some(mark) = reached.get(&Object::Relation(*oid)) {
                unsafe_object(name, *mark);
            }
        }
        for row in &self.types {
            match reached.get(&self.resolved(Object::Type(row.oid))) {
                Some(mark) => unsafe_object(&row.name, *mark),
                None => {
                    facts.safe_types.insert(row.oid);
                }
            }
        }
        facts.operators = self
            .operators
            .iter()
            .filter(|row| reached.contains_key(&Object::Operator(row.oid)))
            .filter(|row| !row.outdone || row.operands.iter().any(|operand| implicit.contains(operand)))
            .map(|row| row.token.as_bytes().into())
            .collect();
        let parsing = self.text_search.iter().filter(|(object, _)| matches!(object, Object::Operator(_)));
        let unsafe_ones = parsing.filter(|(object, _)| reached.contains_key(*object));
        facts.operators.extend(unsafe_ones.map(|(_, name)| name.as_bytes().into()));
        facts.schemas = schemas
            .into_iter()
            .map(|(name, harmless)| Schema {
                name: name.as_bytes().into(),
                harmless: harmless.into_iter().map(|name| name.as_bytes().into()).collect(),
            })
            .collect();
        facts
    }

    /// What is unsafe, without what only [`Catalog::from_rows`] adds. Functions whose bodies are texts count as harmless until
    /// one of them is seen to be more than calls of harmless ones: what is left in the end does nothing itself and calls
    /// nothing that does, be it in a circle.
    pub(super) fn closed(&self) -> Catalog {
        let vocabulary = Vocabulary::new();
        let implicit = self.implicitly_reached();
        let mut texts: Vec<&FunctionRow> = self.functions.iter().filter(|row| row.has_a_text()).collect();
        let mut rounds = 0;
        loop {
            let proven: HashSet<u32> = texts.iter().map(|row| row.oid).collect();
            let catalog = Catalog { identity: 0, facts: Some(self.facts(&proven, &implicit)) };
            let before = texts.len();
            texts.retain(|row| {
                body::only_reads(&row.language, row.source.as_bytes(), self.utf8, &vocabulary, &catalog)
            });
            if texts.len() == before {
                return catalog;
            }
            rounds += 1;
            if rounds == MAX_ROUNDS {
                texts.clear();
            }
        }
    }

    /// The schemas that have harmless functions of names of which others have unsafe ones. PostgreSQL's own is left out:
    /// its functions are no rows.
    fn harmless_in_their_schemas(&self, reached: &HashMap<Object, Mark>) -> Vec<(&str, HashSet<&str>)> {
        let is_unsafe = |row: &&FunctionRow| reached.contains_key(&Object::Function(row.oid));
        let unsafe_names: HashSet<&str> =
            self.functions.iter().filter(is_unsafe).map(|row| &*row.name).collect();
        let unsafe_ones: HashSet<(&str, &str)> =
            self.functions.iter().filter(is_unsafe).map(|row| (&*row.schema, &*row.name)).collect();
        let mut found: BTreeMap<&str, HashSet<&str>> = BTreeMap::new();
        for row in self.functions.iter().filter(|row| row.schema != "pg_catalog") {
            if unsafe_names.contains(&*row.name) && !unsafe_ones.contains(&(&*row.schema, &*row.name)) {
                found.entry(&row.schema).or_default().insert(&row.name);
            }
        }
        // Their numbers have 16 bits.
        found.into_iter().take(usize::from(u16::MAX)).collect()
    }
}

impl FunctionRow {
    /// Whether one of the names, with a schema or without, is its own.
    fn is_named(&self, names: &[String]) -> bool {
        names.iter().any(|name| {
            *name == self.name
                || name.strip_suffix(&*self.name).and_then(|rest| rest.strip_suffix('.'))
                    == Some(&self.schema)
        })
    }

    /// Harmless by itself; what it consists of is among the edges. `trusted`: the extensions that the operator vouches for.
    pub(super) fn is_harmless(&self, trusted: &[String]) -> bool {
        if self.settings || self.kind == "p" {
            return false;
        }
        match &*self.language {
            "internal" if self.kind == "a" => true,
            "internal" => self.internal,
            "c" => extension::is_harmless(&self.compiled(), trusted),
            "sql" => self.stored,
            _ => false,
        }
    }

    fn compiled(&self) -> extension::Compiled<'_> {
        extension::Compiled {
            extension: &self.extension,
            library: &self.library,
            name: &self.name,
            volatile: self.volatile,
            takes_internal: self.takes_internal,
        }
    }

    /// Its body is a text that may prove it harmless.
    fn has_a_text(&self) -> bool {
        !self.settings
            && self.kind == "f"
            && (self.language == "sql" && !self.stored || self.language == "plpgsql")
    }
}

impl Catalog {
    /// Nothing is known: no statement of this database is a read. `identity` is a number that no other
    /// catalog of this process has.
    pub fn unknown(identity: u64) -> Catalog {
        Catalog { identity, facts: None }
    }

    /// From the queries' rows.
    pub fn from_rows(identity: u64, rows: CatalogRows) -> Catalog {
        let mut catalog = Catalog { identity, ..rows.closed() };
        rows.mark_definers(&mut catalog);
        rows.mark_moments(&mut catalog);
        if let Some(facts) = &mut catalog.facts {
            facts.names.shrink_to_fit();
        }
        catalog
    }

    /// Whether something is safe by these facts that is not by those of `before`: a replica that has not replayed what made
    /// it so still runs it as it was. Rows that are not the primary's do not count, as a late replica's never are.
    pub fn allows_more_than(&self, before: &Catalog) -> bool {
        let (Some(now), Some(then)) = (&self.facts, &before.facts) else { return false };
        let safer = |name: &[u8], then: &Flags| {
            let now = self.name(name);
            then.code && !now.code || then.called && !now.called || then.attribute && !now.attribute
        };
        let safer_there = |schema: &[u8], name: &[u8]| {
            before.name(name).called && !before.is_harmless_within(before.name(schema).schema, name)
        };
        then.anywhere && !now.anywhere
            || now
                .schemas
                .iter()
                .any(|schema| schema.harmless.iter().any(|name| safer_there(&schema.name, name)))
            || then.names.iter().any(|(name, flags)| safer(name, flags))
            || then.operators.iter().any(|token| !now.operators.contains(token))
    }

    /// A number that no other catalog of this process has: it keys caches.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Whether the facts are there.
    pub fn is_loaded(&self) -> bool {
        self.facts.is_some()
    }

    /// Whether any statement of this database may run code that is not known, without naming anything.
    pub fn unsafe_anywhere(&self) -> bool {
        self.facts.as_ref().is_none_or(|facts| facts.anywhere)
    }

    /// The server's major version; 0 while it is not known.
    pub fn server_major(&self) -> u16 {
        self.facts.as_ref().map_or(0, |facts| facts.server_major)
    }

    /// What is known of a name (decoded and folded).
    #[inline]
    pub fn name(&self, name: &[u8]) -> Flags {
        match &self.facts {
            Some(facts) => facts.names.get(name).copied().unwrap_or_default(),
            None => Flags::default(),
        }
    }

    /// Whether all functions of this name in the schema of this number ([`Flags::schema`]) are harmless, which those of
    /// other schemas are not.
    pub fn is_harmless_within(&self, schema: u16, name: &[u8]) -> bool {
        let Some(place) = usize::from(schema).checked_sub(1) else { return false };
        let schema = self.facts.as_ref().and_then(|facts| facts.schemas.get(place));
        schema.is_some_and(|schema| schema.harmless.contains(name))
    }

    /// Whether an operator's token may mean a user's function.
    #[inline]
    pub fn operator_is_unsafe(&self, token: &[u8]) -> bool {
        match &self.facts {
            Some(facts) => !facts.operators.is_empty() && facts.operators.contains(token),
            None => true,
        }
    }

    /// Whether a parameter of this type can be bound on a replica.
    #[inline]
    pub fn type_is_safe(&self, oid: u32) -> bool {
        oid < FIRST_USER_OID || self.facts.as_ref().is_some_and(|facts| facts.safe_types.contains(&oid))
    }
}

/// One row: whether the database's encoding is UTF-8.
pub const ENCODING_SQL: &str = "SELECT pg_catalog.current_setting('server_encoding') = 'UTF8'";

/// Rows (oid): the built-in functions on the allow-list, `$1`.
pub const SAFE_FUNCTIONS_SQL: &str = "\
SELECT p.oid FROM pg_catalog.pg_proc p WHERE p.oid < 16384 AND p.proname::text = ANY ($1::text[])";

/// Rows (oid of a user's function, letter, oid, name): the built-in functions and operators that parse texts, which may run the
/// code of any text search parser or template, under a configuration that a string or a setting names.
pub const TEXT_SEARCH_SQL: &str = "\
WITH code AS MATERIALIZED ( \
  SELECT f FROM pg_catalog.pg_ts_parser p, LATERAL (VALUES (p.prsstart::pg_catalog.oid), (p.prstoken), (p.prsend), \
         (p.prsheadline), (p.prslextype)) v (f) WHERE f >= 16384 \
  UNION SELECT f FROM pg_catalog.pg_ts_template t, LATERAL (VALUES (t.tmplinit::pg_catalog.oid), (t.tmpllexize)) v (f) \
   WHERE f >= 16384) \
SELECT c.f, 'f', p.oid, p.proname::text FROM code c, pg_catalog.pg_proc p \
 WHERE p.oid < 16384 AND p.proname IN ('to_tsvector', 'json_to_tsvector', 'jsonb_to_tsvector', 'to_tsquery', \
   'plainto_tsquery', 'phraseto_tsquery', 'websearch_to_tsquery', 'ts_headline', 'ts_lexize', 'ts_parse', 'ts_token_type', \
   'ts_match_tt', 'ts_match_tq') \
UNION ALL \
SELECT c.f, 'o', o.oid, o.oprname::text FROM code c, pg_catalog.pg_operator o \
  JOIN pg_catalog.pg_proc p ON p.oid = o.oprcode::pg_catalog.oid \
 WHERE o.oid < 16384 AND p.proname IN ('ts_match_tt', 'ts_match_tq')";

/// Users' functions in languages that nobody reads here, those of which the body (`prosrc`, or what is stored of it: `body`)
/// meets a condition, and those that mention the name of such a function, as a WITH list.
macro_rules! functions_that {
    ($condition:literal) => {
        concat!(
            "\
WITH RECURSIVE named AS ( \
  SELECT p.oid, p.proname FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang, \
         LATERAL pg_catalog.pg_get_function_sqlbody(p.oid) AS body \
   WHERE p.oid >= 16384 AND l.lanname NOT IN ('internal', 'c') \
     AND (l.lanname NOT IN ('sql', 'plpgsql') OR ",
            $condition,
            ") \
  UNION SELECT p.oid, p.proname FROM pg_catalog.pg_proc p, named s \
   WHERE p.oid >= 16384 AND p.oid <> s.oid \
     AND pg_catalog.strpos(pg_catalog.lower(p.prosrc), pg_catalog.lower(s.proname::text)) > 0)"
        )
    };
}

/// Users' functions that may change settings. What is set for the transaction alone (a last argument `true`, seen as such)
/// does not count.
macro_rules! setters {
    () => {
        functions_that!(
            "\
pg_catalog.regexp_replace(p.prosrc, \
               '\\mset_config\\s*\\([^()]*,\\s*(is_local\\s*(=>|:=)\\s*)?true\\s*\\)', '', 'gi') \
             ~* '\\m(set_config|reset|discard)\\M' \
          OR p.prosrc ~* '(^|;|''|\\mbegin\\M|\\mthen\\M|\\melse\\M|\\mloop\\M)\\s*set\\M' \
          OR body ~* '\\mset_config\\M'"
        )
    };
}

/// Rows (name) of relations of which a change may reach those that a query gives: a partition or heir, what refers to them
/// with an action, what a view or rule stands for.
macro_rules! of_which_a_change_reaches {
    ($relations:literal) => {
        concat!(
            ", firing AS ( ",
            $relations,
            " UNION SELECT e.up FROM firing f JOIN ( \
      SELECT inhrelid AS down, inhparent AS up FROM pg_catalog.pg_inherits \
      UNION ALL SELECT conrelid, confrelid FROM pg_catalog.pg_constraint \
       WHERE contype = 'f' AND (confupdtype IN ('c', 'n', 'd') OR confdeltype IN ('c', 'n', 'd')) \
      UNION ALL SELECT d.refobjid, r.ev_class FROM pg_catalog.pg_rewrite r JOIN pg_catalog.pg_depend d \
         ON d.classid = 2618 AND d.objid = r.oid AND d.refclassid = 1259) AS e ON e.down = f.oid) \
SELECT DISTINCT c.relname::text FROM firing f JOIN pg_catalog.pg_class c ON c.oid = f.oid"
        )
    };
}

/// Rows (name): users' functions that may change settings. Bodies that mention set_config, RESET or DISCARD, or SET
/// where a statement begins (not that of UPDATE); those in languages that nobody reads here; and those that
/// mention the name of such a function.
pub const SETTERS_SQL: &str = concat!(setters!(), " SELECT DISTINCT s.proname::text FROM named s");

/// Rows (name): relations of which a change may fire a trigger that is such a function.
pub const FIRING_SQL: &str = concat!(
    setters!(),
    of_which_a_change_reaches!(
        "SELECT t.tgrelid AS oid FROM pg_catalog.pg_trigger t JOIN named s ON s.oid = t.tgfoid WHERE NOT t.tgisinternal"
    )
);

/// Rows (name): relations of which a change may run a user's function that leaves what a look at the server shows: an
/// advisory lock, something temporary, a channel that is listened to, a cursor that outlives its transaction. As a trigger,
/// or in a default, a generated column, a check, an index, a rule or a policy; and those with a rule that calls a built-in
/// one.
pub const LEAVING_SQL: &str = concat!(
    functions_that!(
        "\
p.prosrc ~* '\\mpg_(try_)?advisory_lock|\\mpg_temp|\\m(temp|temporary|listen|hold)\\M' \
          OR body ~* '\\mpg_(try_)?advisory_lock'"
    ),
    of_which_a_change_reaches!(
        "SELECT t.tgrelid AS oid FROM pg_catalog.pg_trigger t JOIN named s ON s.oid = t.tgfoid WHERE NOT t.tgisinternal \
  UNION ALL SELECT coalesce(a.adrelid, k.conrelid, i.indrelid, r.ev_class, y.polrelid) \
   FROM named s JOIN pg_catalog.pg_depend d ON d.refclassid = 1255 AND d.refobjid = s.oid \
   LEFT JOIN pg_catalog.pg_attrdef a ON d.classid = 2604 AND a.oid = d.objid \
   LEFT JOIN pg_catalog.pg_constraint k ON d.classid = 2606 AND k.oid = d.objid \
   LEFT JOIN pg_catalog.pg_index i ON d.classid = 1259 AND i.indexrelid = d.objid \
   LEFT JOIN pg_catalog.pg_rewrite r ON d.classid = 2618 AND r.oid = d.objid \
   LEFT JOIN pg_catalog.pg_policy y ON d.classid = 3256 AND y.oid = d.objid \
  UNION ALL SELECT r.ev_class FROM pg_catalog.pg_rewrite r \
   WHERE r.ev_type <> '1' AND r.ev_action::text ~ (SELECT ':funcid (' || pg_catalog.string_agg(p.oid::text, '|') || ') ' \
     FROM pg_catalog.pg_proc p WHERE p.oid < 16384 AND p.proname ~ '^pg_(try_)?advisory_lock')"
    )
);

/// Rows (name): built-in functions that are not on the allow-list (`$1`) and may be called with one argument, as in
/// `t.f`. Those of other than safe name that only a trigger can call are left out.
pub const ATTRIBUTES_SQL: &str = "\
SELECT DISTINCT p.proname::text FROM pg_catalog.pg_proc p \
 WHERE p.oid < 16384 AND NOT p.proname::text = ANY ($1::text[]) \
   AND p.prorettype NOT IN (2279, 3838) \
   AND p.pronargs >= 1 AND p.pronargs - p.pronargdefaults <= 1";

/// Rows (oid): system relations that are not on the list `$1`.
pub const UNSAFE_RELATIONS_SQL: &str = "\
SELECT c.oid FROM pg_catalog.pg_class c \
 WHERE c.oid < 16384 AND c.relnamespace = 'pg_catalog'::pg_catalog.regnamespace AND NOT c.relname::text = ANY ($1::text[])";

/// Rows: users' functions as [`FunctionRow`], then their stored body and defaults. `$1`: the safe built-in
/// functions. Functions that only a trigger can call are left out.
pub const FUNCTIONS_SQL: &str = "\
WITH io AS MATERIALIZED ( \
  SELECT DISTINCT f FROM pg_catalog.pg_type t, \
         LATERAL (VALUES (t.typinput::pg_catalog.oid), (t.typoutput), (t.typreceive), (t.typsend)) v (f) WHERE t.oid < 16384), \
code AS MATERIALIZED ( \
  SELECT b.prosrc, bool_and(b.provolatile = 'i' OR b.proname::text = ANY ($1::text[]) OR b.oid IN (SELECT io.f FROM io)) \
           AS harmless \
    FROM pg_catalog.pg_proc b JOIN pg_catalog.pg_language l ON l.oid = b.prolang \
   WHERE b.oid < 16384 AND l.lanname = 'internal' GROUP BY b.prosrc), \
unsafe AS MATERIALIZED ( \
  SELECT DISTINCT b.proname FROM pg_catalog.pg_proc b WHERE b.oid < 16384 AND NOT b.proname::text = ANY ($1::text[])), \
member AS MATERIALIZED ( \
  SELECT d.objid, e.extname::text AS name FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid \
   WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.deptype = 'e' \
     AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass) \
SELECT p.oid, p.proname::text, l.lanname::text, p.prokind::text, p.provolatile = 'v', \
       p.pronargs >= 1 AND p.pronargs - p.pronargdefaults <= 1, \
       EXISTS (SELECT FROM pg_catalog.unnest(p.proconfig) s WHERE s NOT LIKE 'search\\_path=%'), \
       p.prosrc, coalesce(p.probin, ''), coalesce(m.name, ''), p.prosqlbody IS NOT NULL, \
       l.lanname = 'internal' AND coalesce(c.harmless, false), u.proname IS NOT NULL, \
       p.prosqlbody::text, p.proargdefaults::text, n.nspname::text, 2281 = ANY (p.proargtypes) \
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang \
  JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace \
  LEFT JOIN member m ON m.objid = p.oid LEFT JOIN code c ON c.prosrc = p.prosrc LEFT JOIN unsafe u ON u.proname = p.proname \
 WHERE p.oid >= 16384 AND p.prorettype NOT IN (2279, 3838)";

/// Rows (oid, token, left and right operand's type, outdone).
///
/// Outdone: a constant without a type takes the type of the other operand or becomes text, so with a built-in
/// operator of the same token that takes a text on each side where this one takes a user's type (and the same
/// type on the other), that one is chosen. ROW(..) fits every composite type: those need a built-in operator on
/// records, which is an exact match; for arrays of them there is none.
pub const OPERATORS_SQL: &str = "\
SELECT o.oid, o.oprname::text, o.oprleft, o.oprright, \
       o.oprleft <> 0 AND (o.oprleft < 16384 OR lt.typcategory <> 'S') \
   AND o.oprright <> 0 AND (o.oprright < 16384 OR rt.typcategory <> 'S') \
   AND (o.oprleft >= 16384 OR o.oprright >= 16384) \
   AND EXISTS (SELECT FROM pg_catalog.pg_operator b \
          JOIN pg_catalog.pg_type bl ON bl.oid = b.oprleft JOIN pg_catalog.pg_type br ON br.oid = b.oprright \
         WHERE b.oid < 16384 AND b.oprname = o.oprname \
           AND CASE WHEN o.oprleft < 16384 THEN b.oprleft = o.oprleft ELSE bl.typcategory = 'S' END \
           AND CASE WHEN o.oprright < 16384 THEN b.oprright = o.oprright ELSE br.typcategory = 'S' END) \
   AND (NOT 'c' = ANY (ARRAY[lt.typtype, le.typtype, rt.typtype, re.typtype]) \
     OR lt.typtype = 'c' AND rt.typtype = 'c' AND EXISTS (SELECT FROM pg_catalog.pg_operator b \
         WHERE b.oid < 16384 AND b.oprname = o.oprname AND b.oprleft = 2249 AND b.oprright = 2249)) \
  FROM pg_catalog.pg_operator o \
  LEFT JOIN pg_catalog.pg_type lt ON lt.oid = o.oprleft LEFT JOIN pg_catalog.pg_type rt ON rt.oid = o.oprright \
  LEFT JOIN pg_catalog.pg_type le ON le.oid = lt.typelem LEFT JOIN pg_catalog.pg_type re ON re.oid = rt.typelem \
 WHERE o.oid >= 16384";

/// Rows (oid, name): users' types, but for the row types of tables and views and arrays of them, which go by
/// their relation.
pub const TYPES_SQL: &str = "\
SELECT t.oid, t.typname::text FROM pg_catalog.pg_type t \
  LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem AND t.typcategory = 'A' \
  LEFT JOIN pg_catalog.pg_class c ON c.oid = coalesce(e.typrelid, t.typrelid) AND c.oid <> 0 \
 WHERE t.oid >= 16384 AND (c.oid IS NULL OR c.relkind = 'c')";

/// Rows (letter, oid, letter of the mark): what is unsafe by itself: sequences, foreign and unlogged relations
/// (`e`), types that are only announced (`c`).
pub const MARKS_SQL: &str = "\
SELECT 'r', c.oid, 'e' FROM pg_catalog.pg_class c \
 WHERE c.oid >= 16384 AND (c.relkind IN ('S', 'f') OR c.relkind IN ('r', 'p', 'm') AND c.relpersistence = 'u') \
UNION ALL \
SELECT 't', t.oid, 'c' FROM pg_catalog.pg_type t WHERE t.oid >= 16384 AND NOT t.typisdefined";

/// Rows (letter, oid, letter, oid), each for [`CatalogRows::edge`]: what is unsafe on the left makes the right unsafe.
/// A built-in function is on the left only where its being immutable, or its place, does not speak for it.
///
/// The code of an operator class runs where its index or partition key is used, and where one of its family's operators
/// is: sorting and joining by it compare and hash by the family's functions. The planner finds B-tree and hash families by
/// their operators, so one that has a built-in operator may be found by any statement. It also puts an operator's negator
/// or commutator in its place.
pub const EDGES_SQL: &str = "\
WITH member AS MATERIALIZED ( \
  SELECT 'f' AS kind, a.amproc::pg_catalog.oid AS oid, a.amprocfamily AS family, a.amproclefttype AS lefttype, \
         a.amprocrighttype AS righttype \
    FROM pg_catalog.pg_amproc a WHERE a.amproc::pg_catalog.oid >= 16384 OR a.amprocfamily >= 16384 \
     AND a.amproc::pg_catalog.oid IN (SELECT b.oid FROM pg_catalog.pg_proc b WHERE b.oid < 16384 AND b.provolatile <> 'i') \
  UNION ALL \
  SELECT 'o', a.amopopr, a.amopfamily, a.amoplefttype, a.amoprighttype FROM pg_catalog.pg_amop a WHERE a.amopopr >= 16384), \
used AS MATERIALIZED ( \
  SELECT DISTINCT i.indrelid AS rel, k.opcfamily AS family \
    FROM pg_catalog.pg_index i, LATERAL pg_catalog.unnest(i.indclass::pg_catalog.oid[]) c (oid) \
    JOIN pg_catalog.pg_opclass k ON k.oid = c.oid \
   WHERE i.indrelid >= 16384 AND c.oid >= 16384 \
  UNION \
  SELECT p.partrelid, k.opcfamily \
    FROM pg_catalog.pg_partitioned_table p, LATERAL pg_catalog.unnest(p.partclass::pg_catalog.oid[]) c (oid) \
    JOIN pg_catalog.pg_opclass k ON k.oid = c.oid WHERE c.oid >= 16384) \
SELECT 'r', i.inhrelid, 'r', i.inhparent FROM pg_catalog.pg_inherits i \
UNION ALL \
SELECT DISTINCT 't', a.atttypid, 'r', a.attrelid \
  FROM pg_catalog.pg_attribute a WHERE a.atttypid >= 16384 AND a.attnum > 0 AND NOT a.attisdropped \
UNION ALL \
SELECT 't', t.typbasetype, 't', t.oid FROM pg_catalog.pg_type t WHERE t.typbasetype >= 16384 \
UNION ALL \
SELECT 't', t.typelem, 't', t.oid FROM pg_catalog.pg_type t \
  JOIN pg_catalog.pg_type e ON e.oid = t.typelem LEFT JOIN pg_catalog.pg_class c ON c.oid = e.typrelid \
 WHERE t.typelem >= 16384 AND (c.oid IS NULL OR c.relkind = 'c') \
UNION ALL \
SELECT 'r', c.oid, 't', t.oid FROM pg_catalog.pg_type t JOIN pg_catalog.pg_class c ON c.oid = t.typrelid \
 WHERE t.oid >= 16384 AND c.relkind = 'c' \
UNION ALL \
SELECT 'f', f, 't', t.oid FROM pg_catalog.pg_type t, \
       LATERAL (VALUES (t.typinput::pg_catalog.oid), (t.typoutput), (t.typreceive), (t.typsend), (t.typmodin), \
         (t.typmodout), (t.typanalyze), (t.typsubscript)) v (f) \
 WHERE t.oid >= 16384 AND f >= 16384 \
UNION ALL \
SELECT 'f', f, 't', t FROM pg_catalog.pg_range r, \
       LATERAL (VALUES (r.rngcanonical::pg_catalog.oid), (r.rngsubdiff)) v (f), \
       LATERAL (VALUES (r.rngtypid), (r.rngmultitypid)) w (t) WHERE f >= 16384 \
UNION ALL \
SELECT DISTINCT m.kind, m.oid, 't', t FROM pg_catalog.pg_range r JOIN pg_catalog.pg_opclass k ON k.oid = r.rngsubopc \
  JOIN member m ON m.family = k.opcfamily, LATERAL (VALUES (r.rngtypid), (r.rngmultitypid)) w (t) \
 WHERE r.rngtypid >= 16384 \
UNION ALL \
SELECT 't', r.rngsubtype, 't', t FROM pg_catalog.pg_range r, \
       LATERAL (VALUES (r.rngtypid), (r.rngmultitypid)) w (t) WHERE r.rngsubtype >= 16384 \
UNION ALL \
SELECT 't', r.rngtypid, 't', r.rngmultitypid FROM pg_catalog.pg_range r WHERE r.rngtypid >= 16384 \
UNION ALL \
SELECT DISTINCT 't', t, 'f', p.oid FROM pg_catalog.pg_proc p, \
       LATERAL pg_catalog.unnest(coalesce(p.proallargtypes, p.proargtypes::pg_catalog.oid[]) || p.prorettype) t \
 WHERE p.oid >= 16384 AND t >= 16384 \
UNION ALL \
SELECT 'f', p.prosupport::pg_catalog.oid, 'f', p.oid FROM pg_catalog.pg_proc p WHERE p.prosupport::pg_catalog.oid >= 16384 \
UNION ALL \
SELECT 'f', f, 'f', a.aggfnoid::pg_catalog.oid FROM pg_catalog.pg_aggregate a, \
       LATERAL (VALUES (a.aggtransfn::pg_catalog.oid), (a.aggfinalfn), (a.aggcombinefn), (a.aggserialfn), \
         (a.aggdeserialfn), (a.aggmtransfn), (a.aggminvtransfn), (a.aggmfinalfn)) v (f) \
 WHERE a.aggfnoid >= 16384 AND (f >= 16384 \
    OR f IN (SELECT b.oid FROM pg_catalog.pg_proc b WHERE b.oid < 16384 AND b.provolatile <> 'i')) \
UNION ALL \
SELECT 'o', a.aggsortop, 'f', a.aggfnoid::pg_catalog.oid FROM pg_catalog.pg_aggregate a WHERE a.aggsortop >= 16384 \
UNION ALL \
SELECT 'f', o.oprcode::pg_catalog.oid, 'o', o.oid FROM pg_catalog.pg_operator o WHERE o.oid >= 16384 \
UNION ALL \
SELECT 'o', other, CASE WHEN o.oid >= 16384 THEN 'o' ELSE '*' END, o.oid FROM pg_catalog.pg_operator o, \
       LATERAL (VALUES (o.oprnegate), (o.oprcom)) v (other) WHERE other >= 16384 AND other <> o.oid \
UNION ALL \
SELECT 'f', f, 'o', o.oid FROM pg_catalog.pg_operator o, \
       LATERAL (VALUES (o.oprrest::pg_catalog.oid), (o.oprjoin)) v (f) WHERE o.oid >= 16384 AND f >= 16384 \
UNION ALL \
SELECT 't', t, 'o', o.oid FROM pg_catalog.pg_operator o, \
       LATERAL (VALUES (o.oprleft), (o.oprright), (o.oprresult)) v (t) WHERE o.oid >= 16384 AND t >= 16384 \
UNION ALL \
SELECT 'o', o.oid, 't', t FROM pg_catalog.pg_operator o, \
       LATERAL (VALUES (o.oprleft), (o.oprright)) v (t) WHERE o.oid >= 16384 AND t >= 16384 \
UNION ALL \
SELECT m.kind, m.oid, 't', m.lefttype FROM member m WHERE m.lefttype >= 16384 \
UNION ALL \
SELECT m.kind, m.oid, 't', m.righttype FROM member m WHERE m.righttype >= 16384 \
UNION ALL \
SELECT DISTINCT m.kind, m.oid, 't', k.opcintype FROM member m JOIN pg_catalog.pg_opclass k ON k.opcfamily = m.family \
 WHERE k.opcintype >= 16384 \
UNION ALL \
SELECT DISTINCT m.kind, m.oid, '*', 0::pg_catalog.oid FROM member m \
 WHERE m.lefttype < 16384 AND m.righttype < 16384 AND (m.family < 16384 \
    OR m.family IN (SELECT k.opcfamily FROM pg_catalog.pg_opclass k WHERE k.opcdefault AND k.opcintype < 16384) \
    OR m.family IN (SELECT f.oid FROM pg_catalog.pg_opfamily f JOIN pg_catalog.pg_amop a ON a.amopfamily = f.oid \
         WHERE f.oid >= 16384 AND f.opfmethod IN (403, 405) AND a.amopopr < 16384)) \
UNION ALL \
SELECT DISTINCT m.kind, m.oid, 'o', a.amopopr FROM member m JOIN pg_catalog.pg_amop a ON a.amopfamily = m.family \
 WHERE a.amopopr >= 16384 AND a.amopopr <> m.oid \
UNION ALL \
SELECT 'f', c.conproc::pg_catalog.oid, '*', 0::pg_catalog.oid FROM pg_catalog.pg_conversion c \
 WHERE c.oid >= 16384 AND c.conproc::pg_catalog.oid >= 16384 \
UNION ALL \
SELECT m.kind, m.oid, 'r', u.rel FROM member m JOIN used u ON u.family = m.family \
UNION ALL \
SELECT 'f', a.amhandler::pg_catalog.oid, 'r', r FROM pg_catalog.pg_am a JOIN pg_catalog.pg_class c ON c.relam = a.oid \
  LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid, LATERAL (VALUES (coalesce(i.indrelid, c.oid))) v (r) \
 WHERE a.amhandler::pg_catalog.oid >= 16384";

/// Rows (letter, oid, stored expression, is folded): views, policies for reading, domains' checks, virtual columns; and of tables
/// what the planner folds: see [`Use::Folded`].
pub const TREES_SQL: &str = "\
SELECT 'r', r.ev_class, r.ev_action::text, false FROM pg_catalog.pg_rewrite r WHERE r.oid >= 16384 AND r.ev_type = '1' \
UNION ALL \
SELECT 'r', p.polrelid, p.polqual::text, false FROM pg_catalog.pg_policy p \
  JOIN pg_catalog.pg_class c ON c.oid = p.polrelid AND c.relrowsecurity \
 WHERE p.polcmd IN ('r', '*') AND p.polqual IS NOT NULL \
UNION ALL \
SELECT 't', k.contypid, k.conbin::text, false FROM pg_catalog.pg_constraint k WHERE k.contypid <> 0 AND k.contype = 'c' \
UNION ALL \
SELECT 'r', k.conrelid, k.conbin::text, true FROM pg_catalog.pg_constraint k WHERE k.contype = 'c' AND k.conrelid >= 16384 \
UNION ALL \
SELECT 'r', i.indrelid, e::text, true FROM pg_catalog.pg_index i, LATERAL (VALUES (i.indexprs), (i.indpred)) v (e) \
 WHERE e IS NOT NULL AND i.indrelid >= 16384 \
UNION ALL \
SELECT 'r', d.adrelid, d.adbin::text, false FROM pg_catalog.pg_attribute a \
  JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
 WHERE a.attrelid >= 16384 AND a.attgenerated = 'v' \
UNION ALL \
SELECT 'r', p.partrelid, p.partexprs::text, true FROM pg_catalog.pg_partitioned_table p WHERE p.partexprs IS NOT NULL \
UNION ALL \
SELECT 'r', s.stxrelid, s.stxexprs::text, true FROM pg_catalog.pg_statistic_ext s WHERE s.stxexprs IS NOT NULL";

/// Rows (source, target, function or 0, implicit): users' casts, and from a domain's base to the domain, which
/// needs no cast.
pub const CASTS_SQL: &str = "\
SELECT c.castsource, c.casttarget, c.castfunc, c.castcontext = 'i' FROM pg_catalog.pg_cast c WHERE c.oid >= 16384 \
UNION ALL \
SELECT t.typbasetype, t.oid, 0::pg_catalog.oid, true FROM pg_catalog.pg_type t WHERE t.oid >= 16384 AND t.typtype = 'd'";

/// Rows (oid of a type, letter, oid): what each type of `$1` stands for, where it stands for something else.
pub const ALIASES_SQL: &str = "\
SELECT t.oid, CASE WHEN c.oid IS NULL THEN 't' ELSE 'r' END, coalesce(c.oid, e.oid) FROM pg_catalog.pg_type t \
  LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem AND t.typcategory = 'A' \
  LEFT JOIN pg_catalog.pg_class c ON c.oid = coalesce(e.typrelid, t.typrelid) AND c.oid <> 0 AND c.relkind <> 'c' \
 WHERE t.oid = ANY ($1::pg_catalog.oid[]) AND (c.oid IS NOT NULL OR e.oid IS NOT NULL)";

/// Rows (oid, name): the relations of `$1`, each by its own name and by that of its row type's array.
pub const NAMES_SQL: &str = "\
SELECT c.oid, c.relname::text FROM pg_catalog.pg_class c WHERE c.oid = ANY ($1::pg_catalog.oid[]) \
UNION ALL \
SELECT c.oid, a.typname::text FROM pg_catalog.pg_class c \
  JOIN pg_catalog.pg_type t ON t.oid = c.reltype JOIN pg_catalog.pg_type a ON a.oid = t.typarray \
 WHERE c.oid = ANY ($1::pg_catalog.oid[])";

/// One row (sum, server version, hash of what logins are given, when the configuration was read): the sum moves with every change of a catalog that the facts are made of; the counts of another
/// session's transaction arrive within about a second of its commit. DML on users' tables does not move it. Where
/// nothing is counted there is no sum.
pub const CHANGES_SQL: &str = "\
SELECT CASE WHEN pg_catalog.current_setting('track_counts') = 'on' THEN \
       pg_catalog.sum(pg_catalog.pg_stat_get_tuples_inserted(c.oid) + pg_catalog.pg_stat_get_tuples_updated(c.oid) \
         + pg_catalog.pg_stat_get_tuples_deleted(c.oid))::pg_catalog.int8 END, \
       pg_catalog.current_setting('server_version_num')::pg_catalog.int4, \
       (SELECT pg_catalog.hashtextextended(coalesce(pg_catalog.string_agg( \
                 s.setdatabase || ' ' || s.setrole || ' ' || s.setconfig::text, ';' ORDER BY s.setdatabase, s.setrole), ''), 0) \
          FROM pg_catalog.pg_db_role_setting s), \
       pg_catalog.date_part('epoch', pg_catalog.pg_conf_load_time()) \
  FROM pg_catalog.pg_class c \
 WHERE c.oid IN ('pg_catalog.pg_proc'::pg_catalog.regclass, 'pg_catalog.pg_operator'::pg_catalog.regclass, \
   'pg_catalog.pg_cast'::pg_catalog.regclass, 'pg_catalog.pg_rewrite'::pg_catalog.regclass, \
   'pg_catalog.pg_policy'::pg_catalog.regclass, 'pg_catalog.pg_class'::pg_catalog.regclass, \
   'pg_catalog.pg_type'::pg_catalog.regclass, 'pg_catalog.pg_constraint'::pg_catalog.regclass, \
   'pg_catalog.pg_inherits'::pg_catalog.regclass, 'pg_catalog.pg_aggregate'::pg_catalog.regclass, \
   'pg_catalog.pg_attribute'::pg_catalog.regclass, 'pg_catalog.pg_opclass'::pg_catalog.regclass, \
   'pg_catalog.pg_index'::pg_catalog.regclass, 'pg_catalog.pg_partitioned_table'::pg_catalog.regclass, \
   'pg_catalog.pg_statistic_ext'::pg_catalog.regclass, 'pg_catalog.pg_amop'::pg_catalog.regclass, \
   'pg_catalog.pg_amproc'::pg_catalog.regclass, 'pg_catalog.pg_conversion'::pg_catalog.regclass, \
   'pg_catalog.pg_ts_parser'::pg_catalog.regclass, 'pg_catalog.pg_ts_template'::pg_catalog.regclass)";

#[cfg(test)]
mod tests {
    use super::*;

    fn function(oid: u32, name: &str, language: &str, source: &str) -> FunctionRow {
        FunctionRow {
            oid,
            name: name.into(),
            language: language.into(),
            kind: "f".into(),
            source: source.into(),
            one_argument: true,
            ..FunctionRow::default()
        }
    }

    fn rows() -> CatalogRows {
        CatalogRows {
            server_major: 15,
            attributes: vec!["nextval".into()],
            functions: vec![
                function(30_001, "reads", "sql", "select lower($1)"),
                function(30_002, "calls_it", "plpgsql", "begin return reads(a) || 'x'; end"),
                function(30_003, "locks", "sql", "select pg_advisory_lock(1)"),
                function(30_004, "calls_that", "sql", "select locks(1)"),
                function(30_005, "circle", "sql", "select circle($1)"),
                FunctionRow { volatile: true, ..function(30_006, "changes", "sql", "select nextval('s')") },
                FunctionRow { volatile: true, ..function(30_015, "by_default", "sql", "select 1") },
                FunctionRow {
                    volatile: true,
                    stored: true,
                    ..function(30_016, "stored_by_default", "sql", "")
                },
                FunctionRow {
                    volatile: true,
                    internal: true,
                    ..function(30_017, "built_in", "internal", "x")
                },
                FunctionRow { volatile: true, ..function(30_018, "compiled", "c", "x") },
                FunctionRow { settings: true, ..function(30_007, "sets", "sql", "select 1") },
                function(30_008, "both", "sql", "select 1"),
                function(30_009, "both", "sql", "select locks(1)"),
                FunctionRow { shadows: true, ..function(30_010, "nextval", "sql", "select 1") },
                FunctionRow { stored: true, ..function(30_011, "stored", "sql", "") },
                FunctionRow { stored: true, ..function(30_012, "stored_lock", "sql", "") },
                function(30_013, "perl", "plperl", "1"),
                function(30_014, "of_type", "sql", "select 1"),
            ],
            marks: vec![(Object::Relation(1), Mark::Elsewhere), (Object::Type(20_005), Mark::Code)],
            edges: vec![
                (Object::Relation(1), Object::Relation(2)),
                (Object::Relation(2), Object::Relation(3)),
                (Object::Relation(3), Object::Relation(2)),
                (Object::Type(20_005), Object::Relation(6)),
                (Object::Type(20_005), Object::Function(30_014)),
                (Object::Function(30_001), Object::Relation(7)),
                (Object::Function(30_003), Object::Function(30_012)),
                (Object::Function(30_003), Object::Operator(40_001)),
                (Object::Function(30_003), Object::Operator(40_003)),
                (Object::Function(30_003), Object::Operator(40_004)),
                (Object::Function(30_001), Object::Operator(40_002)),
                (Object::Type(21_000), Object::Relation(8)),
            ],
            relations: (1..=8).map(|oid| (oid, format!("r{oid}"))).collect(),
            types: vec![
                TypeRow { oid: 20_000, name: "mood".into() },
                TypeRow { oid: 20_005, name: "touched".into() },
            ],
            operators: vec![
                OperatorRow { oid: 40_001, token: "#*#".into(), operands: [20_000, 23], outdone: false },
                OperatorRow { oid: 40_002, token: "#+#".into(), operands: [23, 23], outdone: false },
                OperatorRow { oid: 40_003, token: "=".into(), operands: [20_000, 20_000], outdone: true },
                OperatorRow { oid: 40_004, token: "<".into(), operands: [20_001, 20_001], outdone: true },
            ],
            implicit: vec![(20_000, 23), (23, 20_002), (20_002, 20_001)],
            aliases: [(21_000, Object::Relation(2))].into_iter().collect(),
            ..CatalogRows::default()
        }
    }

    #[test]
    fn unsafety_spreads_and_ends() {
        let catalog = Catalog::from_rows(1, rows());
        for name in ["r1", "r2", "r3", "r8"] {
            assert!(catalog.name(name.as_bytes()).elsewhere, "{name}");
        }
        assert!(catalog.name(b"r6").code);
        for name in ["r4", "r5", "r7", "mood"] {
            assert_eq!(catalog.name(name.as_bytes()), Flags::default(), "{name}");
        }
        assert!(catalog.name(b"nextval").attribute);
    }

    #[test]
    fn bodies_are_harmless_as_long_as_all_that_they_call_is() {
        let catalog = Catalog::from_rows(1, rows());
        for name in ["reads", "calls_it", "stored", "circle"] {
            let flags = catalog.name(name.as_bytes());
            assert!(flags.proven && !flags.called && !flags.attribute, "{name}");
        }
        for name in
            ["locks", "calls_that", "changes", "sets", "both", "stored_lock", "perl", "of_type", "compiled"]
        {
            let flags = catalog.name(name.as_bytes());
            assert!(flags.called && flags.attribute, "{name}");
        }
        // Beside a built-in function that is not safe, a safe one of a user's proves nothing of the name.
        assert!(!catalog.name(b"nextval").proven);
    }

    #[test]
    fn the_operator_knows_better() {
        let with = |safe: &[&str], primary: &[&str]| {
            let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let mut rows = rows();
            rows.overrides =
                FunctionOverrides { safe: list(safe), primary: list(primary), extensions: Vec::new() };
            for row in &mut rows.functions {
                row.schema = "app".into();
            }
            Catalog::from_rows(1, rows)
        };
        let safe = with(&["locks", "app.perl", "other.changes"], &[]);
        for name in ["locks", "calls_that", "stored_lock", "perl", "both"] {
            assert!(safe.name(name.as_bytes()).proven, "{name}");
        }
        assert!(!safe.operator_is_unsafe(b"#*#") && safe.name(b"changes").called);
        let primary = with(&[], &["app.reads", "lower", "pg_catalog.upper"]);
        for name in ["reads", "calls_it", "lower", "upper"] {
            assert!(primary.name(name.as_bytes()).called, "{name}");
        }
    }

    #[test]
    fn behind_a_schemas_name_only_its_own_functions_count() {
        let with = |schemas: [&str; 3], body: &str| {
            let mut rows = rows();
            for (schema, (oid, body)) in
                schemas.into_iter().zip([(31_000, "select 1"), (31_001, body), (31_002, "select 2")])
            {
                rows.functions
                    .push(FunctionRow { schema: schema.into(), ..function(oid, "shared", "sql", body) });
            }
            rows.functions.push(function(31_003, "through", "sql", "select good.shared(1)"));
            rows.functions.push(function(31_004, "without", "sql", "select shared(1)"));
            Catalog::from_rows(1, rows)
        };
        let locks = "select pg_advisory_lock(1)";
        let catalog = with(["good", "bad", "good"], locks);
        let within = |catalog: &Catalog, schema: &str| {
            catalog.is_harmless_within(catalog.name(schema.as_bytes()).schema, b"shared")
        };
        assert!(catalog.name(b"shared").called);
        assert!(within(&catalog, "good") && !within(&catalog, "bad") && !within(&catalog, "public"));
        assert!(catalog.name(b"through").proven && catalog.name(b"without").called);
        for schemas in [["good", "good", "good"], ["good", "bad", "bad"], ["pg_catalog", "bad", "pg_catalog"]]
        {
            let catalog = with(schemas, locks);
            assert!(catalog.name(b"shared").called, "{schemas:?}");
            assert_eq!(within(&catalog, "good"), schemas[2] == "bad", "{schemas:?}");
            assert!(!within(&catalog, "pg_catalog") && !within(&catalog, "bad"), "{schemas:?}");
        }
        let harmless = with(["good", "bad", "good"], "select 3");
        assert!(harmless.name(b"shared").proven && !within(&harmless, "good"));
        // Late replicas have still what was there.
        let before = with(["good", "bad", "bad"], locks);
        assert!(!before.allows_more_than(&before) && !catalog.allows_more_than(&catalog));
        let moved = with(["good", "bad", "other"], locks);
        assert!(moved.allows_more_than(&before) && !before.allows_more_than(&moved));
    }

    #[test]
    fn operators_and_types() {
        let catalog = Catalog::from_rows(1, rows());
        assert!(catalog.operator_is_unsafe(b"#*#") && !catalog.operator_is_unsafe(b"#+#"));
        assert!(!catalog.operator_is_unsafe(b"="));
        // Its operands can be reached from a built-in type over two implicit casts.
        assert!(catalog.operator_is_unsafe(b"<"));
        assert!(catalog.type_is_safe(23) && catalog.type_is_safe(20_000));
        assert!(!catalog.type_is_safe(20_005) && !catalog.type_is_safe(30_000));
    }

    #[test]
    fn casts() {
        let with = |source, target, function| {
            let mut rows = rows();
            rows.safe_functions.insert(100);
            rows.cast(source, target, function, false);
            Catalog::from_rows(1, rows)
        };
        assert!(!with(23, 25, 100).unsafe_anywhere() && !with(23, 25, 30_001).unsafe_anywhere());
        assert!(with(23, 25, 101).unsafe_anywhere() && with(23, 25, 30_003).unsafe_anywhere());
        assert!(with(23, 20_000, 100).type_is_safe(20_000));
        assert!(
            !with(23, 20_000, 101).type_is_safe(20_000) && !with(20_000, 23, 30_003).type_is_safe(20_000)
        );
    }

    #[test]
    fn a_cast_between_users_types_taints_what_it_is_cast_from() {
        let mut rows = rows();
        rows.types.push(TypeRow { oid: 20_010, name: "topology".into() });
        rows.relations.push((9, "r9".into()));
        rows.edges.push((Object::Type(20_010), Object::Relation(9)));
        rows.cast(20_010, 20_000, 30_003, true);
        let catalog = Catalog::from_rows(1, rows);
        assert!(!catalog.type_is_safe(20_010) && catalog.name(b"topology").code && catalog.name(b"r9").code);
        assert!(catalog.type_is_safe(20_000) && catalog.name(b"mood") == Flags::default());
    }

    #[test]
    fn stored_expressions() {
        let mut rows = rows();
        rows.safe_functions.insert(870);
        rows.unsafe_relations.insert(12_000);
        rows.in_sql.insert(30_004);
        for (relation, tree, used) in [
            (5, "{F :funcid 870 :args ({VAR :x 1})}", Use::Evaluated),
            (6, "{F :funcid 871 :args ({VAR :x 1})}", Use::Evaluated),
            (7, "{R :relid 12000}", Use::Evaluated),
            (8, "{F :funcid 30003 :args ({VAR :x 1})}", Use::Folded),
            (4, "{F :funcid 30004 :args ({VAR :x 1})}", Use::Folded),
        ] {
            rows.edges.retain(|(_, to)| *to != Object::Relation(relation));
            rows.tree(Object::Relation(relation), tree, used);
        }
        let catalog = Catalog::from_rows(1, rows);
        assert!(catalog.name(b"r6").code && catalog.name(b"r7").code && catalog.name(b"r4").code);
        assert_eq!((catalog.name(b"r5"), catalog.name(b"r8")), (Flags::default(), Flags::default()));
    }

    #[test]
    fn users_code_behind_text_search_reaches_all_that_parses_texts() {
        let with = |known: bool| {
            let mut rows = rows();
            rows.safe_functions.insert(3_745);
            rows.functions.push(FunctionRow {
                takes_internal: true,
                library: "$libdir/dict_int".into(),
                extension: if known { "dict_int".into() } else { String::new() },
                ..function(31_000, "lexize", "c", "dintdict_lexize")
            });
            rows.text_search(31_000, Object::Function(3_745), "to_tsvector".into());
            rows.text_search(31_000, Object::Operator(3_762), "@@".into());
            for (relation, tree) in
                [(4, "{F :funcid 3745 :args ({VAR :x 1})}"), (5, "{O :opno 3762 :args ({VAR :x 1})}")]
            {
                rows.tree(Object::Relation(relation), tree, Use::Evaluated);
            }
            Catalog::from_rows(1, rows)
        };
        let (known, unknown) = (with(true), with(false));
        assert!(unknown.name(b"to_tsvector").called && unknown.operator_is_unsafe(b"@@"));
        assert!(unknown.name(b"r4").code && unknown.name(b"r5").code);
        assert_eq!(known.name(b"to_tsvector"), Flags::default());
        assert!(!known.operator_is_unsafe(b"@@"));
        assert_eq!((known.name(b"r4"), known.name(b"r5")), (Flags::default(), Flags::default()));
        assert!(known.allows_more_than(&unknown));
    }

    #[test]
    fn what_has_become_safe_is_noticed() {
        let then = Catalog::from_rows(1, rows());
        assert!(!Catalog::from_rows(2, rows()).allows_more_than(&then));
        assert!(!then.allows_more_than(&Catalog::unknown(3)));
        let mut fewer = rows();
        fewer.functions.retain(|row| row.name != "perl");
        assert!(Catalog::from_rows(4, fewer).allows_more_than(&then));
        let mut other = rows();
        other.functions[2].source = "select 1".into();
        assert!(Catalog::from_rows(5, other).allows_more_than(&then));
        let mut logged = rows();
        logged.marks.retain(|(_, mark)| *mark == Mark::Code);
        assert!(!Catalog::from_rows(6, logged).allows_more_than(&then));
    }

    #[test]
    fn functions_that_define_are_found_through_others() {
        let mut rows = rows();
        rows.functions.push(function(30_020, "defines", "plpgsql", "begin create view v as select 1; end"));
        rows.functions.push(function(30_021, "through", "sql", "select defines()"));
        let catalog = Catalog::from_rows(1, rows);
        assert!(catalog.name(b"defines").defines && catalog.name(b"through").defines);
        assert!(!catalog.name(b"locks").defines);
    }

    #[test]
    fn nothing_is_safe_while_nothing_is_known() {
        let catalog = Catalog::unknown(1);
        assert!(!catalog.is_loaded() && catalog.unsafe_anywhere() && catalog.operator_is_unsafe(b"="));
        assert!(!catalog.type_is_safe(20_000));
    }
}
