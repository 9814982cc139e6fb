//! What a database's catalog says about names: which functions, relations, types and operators make a
//! statement unsafe on a replica. A value; pure. `catalogs` reads it from the primary.
//!
//! Coarse and closed: every user-defined function is unsafe, whatever its volatility says, and so is
//! what reaches one: views and their views, domains with checks, tables with row security, columns of a
//! type with code of its own, parents of such children. `pg_depend` does not record built-in
//! functions, so what a view reaches is read from its node tree.
//!
//! An operator is unsafe by its token when it may be chosen for operands of built-in types. One whose
//! operands are of a user's type needs such an operand, which only an unsafe relation, function, type
//! name or parameter can bring along.
//!
//! Deliberately not looked at: temporary relations (a session that made one is pinned), triggers and
//! defaults (they run for writes only), and support functions of a user's operator class on a
//! built-in type.

use hashbrown::{HashMap, HashSet};

/// The first object identifier that PostgreSQL gives to users' objects.
pub const FIRST_USER_OID: u32 = 16_384;

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
    operators: HashSet<Box<[u8]>>,
    safe_types: HashSet<u32>,
    /// A user-defined cast between built-in types, or from one, can be chosen where no name shows it.
    casts_everywhere: bool,
}

/// Why a name is unsafe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// A user's function: unsafe where it is called.
    pub called: bool,
    /// A function of one argument: unsafe after a dot too, as `t.f` may mean `f(t)`.
    pub attribute: bool,
    /// A relation whose rows are not those of the primary: sequence, unlogged, foreign.
    pub elsewhere: bool,
    /// A relation or type that runs code which is not known.
    pub code: bool,
    /// A user's function whose body may change settings, of which those of applications do not show afterwards.
    pub sets: bool,
}

/// The rows of the catalog queries, as they come.
#[derive(Debug, Default)]
pub struct CatalogRows {
    /// The server's major version, for example 15.
    pub server_major: u16,
    /// [`FUNCTIONS_SQL`]: name, is a user's, takes one argument, may change settings.
    pub functions: Vec<(String, bool, bool, bool)>,
    /// [`OBJECTS_SQL`]: object, name, mark.
    pub objects: Vec<(Object, String, Mark)>,
    /// [`EDGES_SQL`]: what is unsafe on the left makes the right unsafe.
    pub edges: Vec<(Object, Object)>,
    /// [`OPERATORS_SQL`]: tokens.
    pub operators: Vec<String>,
    /// [`CASTS_SQL`].
    pub casts_everywhere: bool,
}

/// A relation or a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    /// `pg_class.oid`
    Relation(u32),
    /// `pg_type.oid`
    Type(u32),
}

impl Object {
    /// From the queries' letter (`r` or `t`) and oid.
    pub fn from_columns(letter: &str, oid: u32) -> Option<Object> {
        match letter {
            "r" => Some(Object::Relation(oid)),
            "t" => Some(Object::Type(oid)),
            _ => None,
        }
    }
}

/// What the queries say about an object by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Safe as far as it shows by itself.
    Plain,
    /// Its rows are not those of the primary.
    Elsewhere,
    /// It runs code that is not known.
    Code,
    /// An enum, or an array of one: safe, and as a parameter's type too.
    Enum,
}

impl Mark {
    /// From the queries' letter; what is not known counts as code.
    pub fn from_letter(letter: &str) -> Mark {
        match letter {
            "p" => Mark::Plain,
            "e" => Mark::Elsewhere,
            "n" => Mark::Enum,
            _ => Mark::Code,
        }
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
        let mut facts = Facts {
            server_major: rows.server_major,
            casts_everywhere: rows.casts_everywhere,
            operators: rows
                .operators
                .into_iter()
                .map(|token| token.into_bytes().into_boxed_slice())
                .collect(),
            ..Facts::default()
        };
        for (name, user, attribute, sets) in rows.functions {
            let flags = facts.names.entry(name.into_bytes().into_boxed_slice()).or_default();
            flags.called |= user;
            flags.attribute |= attribute;
            flags.sets |= sets;
        }
        let unsafe_objects = closure(&rows.objects, &rows.edges);
        for (object, name, mark) in rows.objects {
            match unsafe_objects.get(&object) {
                Some(reached) => {
                    let flags = facts.names.entry(name.into_bytes().into_boxed_slice()).or_default();
                    flags.code |= *reached == Mark::Code;
                    flags.elsewhere |= *reached == Mark::Elsewhere;
                }
                None => {
                    if let (Object::Type(oid), Mark::Enum) = (object, mark) {
                        facts.safe_types.insert(oid);
                    }
                }
            }
        }
        facts.names.shrink_to_fit();
        Catalog { identity, facts: Some(facts) }
    }

    /// A number that no other catalog of this process has: it keys caches.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Whether the facts are there.
    pub fn is_loaded(&self) -> bool {
        self.facts.is_some()
    }

    /// Whether any statement of this database may call a user's function without naming anything.
    pub fn casts_everywhere(&self) -> bool {
        self.facts.as_ref().is_none_or(|facts| facts.casts_everywhere)
    }

    /// The server's major version; 0 while it is not known.
    pub fn server_major(&self) -> u16 {
        self.facts.as_ref().map_or(0, |facts| facts.server_major)
    }

    /// What is wrong with a name (decoded and folded).
    #[inline]
    pub fn name(&self, name: &[u8]) -> Flags {
        match &self.facts {
            Some(facts) => facts.names.get(name).copied().unwrap_or_default(),
            None => Flags::default(),
        }
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

/// Spreads the marks along the edges; each object is visited at most twice (elsewhere, then code).
fn closure(objects: &[(Object, String, Mark)], edges: &[(Object, Object)]) -> HashMap<Object, Mark> {
    let mut next: HashMap<Object, Vec<Object>> = HashMap::new();
    for (from, to) in edges {
        next.entry(*from).or_default().push(*to);
    }
    let mut reached: HashMap<Object, Mark> = HashMap::new();
    for mark in [Mark::Elsewhere, Mark::Code] {
        let mut pending: Vec<Object> =
            objects.iter().filter(|(_, _, own)| *own == mark).map(|(object, ..)| *object).collect();
        while let Some(object) = pending.pop() {
            if reached.insert(object, mark) != Some(mark) {
                pending.extend(next.get(&object).into_iter().flatten());
            }
        }
    }
    reached
}

/// Rows (name, is a user's, may be called with one argument, may change settings). `$1`: the safe built-in
/// functions. Functions that only a trigger can call are left out.
///
/// `setters`: bodies that mention set_config, RESET or DISCARD, or SET where a statement begins (not that of
/// UPDATE); those in languages that nobody reads here; and those that mention the name of such a function.
pub const FUNCTIONS_SQL: &str = "\
WITH RECURSIVE setters AS ( \
  SELECT p.oid, p.proname FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang \
   WHERE p.oid >= 16384 AND l.lanname NOT IN ('internal', 'c') \
     AND (l.lanname NOT IN ('sql', 'plpgsql') \
          OR p.prosrc ~* '\\m(set_config|reset|discard)\\M' \
          OR p.prosrc ~* '(^|;|''|\\mbegin\\M|\\mthen\\M|\\melse\\M|\\mloop\\M)\\s*set\\M' \
          OR pg_catalog.pg_get_function_sqlbody(p.oid) ~* '\\mset_config\\M') \
  UNION SELECT p.oid, p.proname FROM pg_catalog.pg_proc p, setters s \
   WHERE p.oid >= 16384 AND p.oid <> s.oid \
     AND pg_catalog.strpos(pg_catalog.lower(p.prosrc), pg_catalog.lower(s.proname::text)) > 0) \
SELECT p.proname::text, bool_or(p.oid >= 16384), \
       bool_or(p.pronargs >= 1 AND p.pronargs - p.pronargdefaults <= 1), \
       bool_or(p.oid IN (SELECT s.oid FROM setters s)) \
  FROM pg_catalog.pg_proc p \
 WHERE (p.oid >= 16384 OR NOT p.proname::text = ANY ($1::text[])) \
   AND p.prorettype NOT IN (2279, 3838) \
 GROUP BY p.proname \
HAVING bool_or(p.oid >= 16384) OR bool_or(p.pronargs >= 1 AND p.pronargs - p.pronargdefaults <= 1)";

/// Rows (letter of the kind, oid, name, letter of the mark). `$1`: the safe built-in functions, `$2`: the
/// safe system names.
///
/// `folded`: the planner folds constant calls in the expressions of a table's indexes, checks, partition
/// key and statistics, and so runs them for any SELECT from the table (measured: an index on `((f(1)))`
/// took f's advisory lock on a standby at `SELECT count(*)`). A user's function or operator whose first argument is
/// a column is not folded; any other use marks the table.
///
/// A table's row type is left out: it has the table's name, and what reaches one reaches the other.
pub const OBJECTS_SQL: &str = "\
WITH view_refs AS MATERIALIZED ( \
  SELECT DISTINCT r.ev_class AS rel, m[1] AS what, m[2]::pg_catalog.oid AS ref \
    FROM pg_catalog.pg_rewrite r, \
         LATERAL pg_catalog.regexp_matches(r.ev_action::text, \
           ':(funcid|aggfnoid|winfnoid|tsmhandler|opno|eqop|sortop|relid) ([0-9]+)', 'g') m \
   WHERE r.oid >= 16384), \
bad_views AS ( \
  SELECT v.rel FROM view_refs v LEFT JOIN pg_catalog.pg_proc p ON p.oid = v.ref \
   WHERE v.what IN ('funcid', 'aggfnoid', 'winfnoid', 'tsmhandler') \
     AND (v.ref >= 16384 OR p.proname IS NULL OR NOT p.proname::text = ANY ($1::text[])) \
  UNION SELECT v.rel FROM view_refs v WHERE v.what IN ('opno', 'eqop', 'sortop') AND v.ref >= 16384 \
  UNION SELECT v.rel FROM view_refs v JOIN pg_catalog.pg_class s ON s.oid = v.ref \
   WHERE v.what = 'relid' AND v.ref < 16384 \
     AND s.relnamespace = 'pg_catalog'::pg_catalog.regnamespace AND NOT s.relname::text = ANY ($2::text[]) \
  UNION SELECT r.ev_class FROM pg_catalog.pg_rewrite r \
   WHERE r.oid >= 16384 AND (r.ev_type <> '1' OR r.ev_action::text LIKE '%:hasForUpdate true%')), \
folded AS ( \
  SELECT e.rel FROM ( \
    SELECT i.indrelid AS rel, i.indexprs::text AS tree FROM pg_catalog.pg_index i WHERE i.indexprs IS NOT NULL \
    UNION ALL SELECT i.indrelid, i.indpred::text FROM pg_catalog.pg_index i WHERE i.indpred IS NOT NULL \
    UNION ALL SELECT k.conrelid, k.conbin::text FROM pg_catalog.pg_constraint k WHERE k.contype = 'c' AND k.conrelid <> 0 \
    UNION ALL SELECT p.partrelid, p.partexprs::text FROM pg_catalog.pg_partitioned_table p WHERE p.partexprs IS NOT NULL \
    UNION ALL SELECT s.stxrelid, s.stxexprs::text FROM pg_catalog.pg_statistic_ext s WHERE s.stxexprs IS NOT NULL) e \
   WHERE e.tree ~ ':(funcid|opno) [0-9]{5,} [^{}]*:args (?!\\(\\{(VAR|RELABELTYPE :arg \\{VAR) )'), \
touched AS ( \
  SELECT c.castsource AS typ FROM pg_catalog.pg_cast c WHERE c.oid >= 16384 \
  UNION SELECT c.casttarget FROM pg_catalog.pg_cast c WHERE c.oid >= 16384 \
  UNION SELECT o.oprleft FROM pg_catalog.pg_operator o WHERE o.oid >= 16384 \
  UNION SELECT o.oprright FROM pg_catalog.pg_operator o WHERE o.oid >= 16384 \
  UNION SELECT o.opcintype FROM pg_catalog.pg_opclass o WHERE o.oid >= 16384) \
SELECT 'r', c.oid, c.relname::text, \
       CASE WHEN c.relrowsecurity THEN 'c' \
            WHEN b.rel IS NOT NULL OR c.oid IN (SELECT f.rel FROM folded f) THEN 'c' \
            WHEN c.relkind IN ('S', 'f') OR c.relpersistence = 'u' THEN 'e' \
            ELSE 'p' END \
  FROM pg_catalog.pg_class c LEFT JOIN bad_views b ON b.rel = c.oid \
 WHERE c.oid >= 16384 AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND c.relpersistence <> 't' \
   AND c.relnamespace <> 'pg_toast'::pg_catalog.regnamespace \
UNION ALL \
SELECT 't', t.oid, t.typname::text, \
       CASE WHEN u.typ IS NOT NULL THEN 'c' \
            WHEN t.typtype = 'e' THEN 'n' \
            WHEN e.typtype = 'e' AND t.typcategory = 'A' THEN 'n' \
            WHEN t.typtype = 'c' OR t.typcategory = 'A' AND t.typelem <> 0 THEN 'p' \
            WHEN t.typtype = 'd' AND NOT EXISTS ( \
                   SELECT FROM pg_catalog.pg_constraint k WHERE k.contypid = t.oid AND k.contype = 'c') THEN 'p' \
            ELSE 'c' END \
  FROM pg_catalog.pg_type t LEFT JOIN touched u ON u.typ = t.oid LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem \
 WHERE t.oid >= 16384 AND t.typisdefined \
   AND (t.typtype <> 'c' OR u.typ IS NOT NULL \
        OR EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = t.typrelid AND c.relkind = 'c'))";

/// Rows (letter, oid, letter, oid): what is unsafe on the left makes the right unsafe: children and their
/// parents, relations and the views over them, types and the columns, arrays and domains made of them.
pub const EDGES_SQL: &str = "\
SELECT 'r', i.inhrelid, 'r', i.inhparent FROM pg_catalog.pg_inherits i \
UNION ALL \
SELECT DISTINCT CASE m[1] WHEN 'relid' THEN 'r' ELSE 't' END, m[2]::pg_catalog.oid, 'r', r.ev_class \
  FROM pg_catalog.pg_rewrite r, \
       LATERAL pg_catalog.regexp_matches(r.ev_action::text, ':(relid|resulttype) ([0-9]{5,10})', 'g') m \
 WHERE r.oid >= 16384 \
UNION ALL \
SELECT DISTINCT 't', a.atttypid, 'r', a.attrelid \
  FROM pg_catalog.pg_attribute a WHERE a.atttypid >= 16384 AND a.attnum > 0 AND NOT a.attisdropped \
UNION ALL \
SELECT 'r', c.oid, 't', c.reltype FROM pg_catalog.pg_class c WHERE c.oid >= 16384 AND c.reltype <> 0 \
UNION ALL \
SELECT 't', c.reltype, 'r', c.oid FROM pg_catalog.pg_class c WHERE c.oid >= 16384 AND c.reltype <> 0 \
UNION ALL \
SELECT 't', t.typbasetype, 't', t.oid FROM pg_catalog.pg_type t WHERE t.typbasetype >= 16384 \
UNION ALL \
SELECT 't', t.typelem, 't', t.oid FROM pg_catalog.pg_type t WHERE t.typelem >= 16384";

/// Rows (token): the operators that may mean a user's function on operands of built-in types, or that
/// have no built-in of the same token, or any of a user's when a user's implicit cast from a built-in
/// type exists.
pub const OPERATORS_SQL: &str = "\
SELECT DISTINCT o.oprname::text FROM pg_catalog.pg_operator o \
 WHERE o.oid >= 16384 AND ( \
       (o.oprleft < 16384 AND o.oprright < 16384) \
    OR NOT EXISTS (SELECT FROM pg_catalog.pg_operator b WHERE b.oid < 16384 AND b.oprname = o.oprname) \
    OR EXISTS (SELECT FROM pg_catalog.pg_cast c \
                WHERE c.oid >= 16384 AND c.castcontext = 'i' AND c.castsource < 16384))";

/// One row (boolean): a user-defined cast between built-in types exists.
pub const CASTS_SQL: &str = "\
SELECT EXISTS (SELECT FROM pg_catalog.pg_cast c \
 WHERE c.oid >= 16384 AND c.castsource < 16384 AND c.casttarget < 16384 AND c.castmethod <> 'b')";

/// One row (sum, server version, hash of what logins are given): the sum moves with every change of a catalog that the facts are made of; the counts of another
/// session's transaction arrive within about a second of its commit. DML on users' tables does not move it.
pub const CHANGES_SQL: &str = "\
SELECT pg_catalog.sum(pg_catalog.pg_stat_get_tuples_inserted(c.oid) + pg_catalog.pg_stat_get_tuples_updated(c.oid) \
         + pg_catalog.pg_stat_get_tuples_deleted(c.oid))::pg_catalog.int8, \
       pg_catalog.current_setting('server_version_num')::pg_catalog.int4, \
       (SELECT pg_catalog.hashtextextended(coalesce(pg_catalog.string_agg( \
                 s.setdatabase || ' ' || s.setrole || ' ' || s.setconfig::text, ';' ORDER BY s.setdatabase, s.setrole), ''), 0) \
          FROM pg_catalog.pg_db_role_setting s) \
  FROM pg_catalog.pg_class c \
 WHERE c.oid IN ('pg_catalog.pg_proc'::pg_catalog.regclass, 'pg_catalog.pg_operator'::pg_catalog.regclass, \
   'pg_catalog.pg_cast'::pg_catalog.regclass, 'pg_catalog.pg_rewrite'::pg_catalog.regclass, \
   'pg_catalog.pg_policy'::pg_catalog.regclass, 'pg_catalog.pg_class'::pg_catalog.regclass, \
   'pg_catalog.pg_type'::pg_catalog.regclass, 'pg_catalog.pg_constraint'::pg_catalog.regclass, \
   'pg_catalog.pg_inherits'::pg_catalog.regclass, 'pg_catalog.pg_aggregate'::pg_catalog.regclass, \
   'pg_catalog.pg_attribute'::pg_catalog.regclass, 'pg_catalog.pg_opclass'::pg_catalog.regclass, \
   'pg_catalog.pg_index'::pg_catalog.regclass, 'pg_catalog.pg_partitioned_table'::pg_catalog.regclass, \
   'pg_catalog.pg_statistic_ext'::pg_catalog.regclass)";

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> CatalogRows {
        CatalogRows {
            server_major: 15,
            functions: vec![
                ("f".into(), true, false, false),
                ("g".into(), true, true, true),
                ("nextval".into(), false, true, false),
            ],
            objects: vec![
                (Object::Relation(1), "seq".into(), Mark::Elsewhere),
                (Object::Relation(2), "over_seq".into(), Mark::Plain),
                (Object::Relation(3), "over_over".into(), Mark::Plain),
                (Object::Relation(4), "plain".into(), Mark::Plain),
                (Object::Type(5), "dom".into(), Mark::Code),
                (Object::Relation(6), "has_dom".into(), Mark::Plain),
                (Object::Type(20_000), "mood".into(), Mark::Enum),
                (Object::Type(20_001), "touched".into(), Mark::Code),
            ],
            edges: vec![
                (Object::Relation(1), Object::Relation(2)),
                (Object::Relation(2), Object::Relation(3)),
                (Object::Relation(3), Object::Relation(2)),
                (Object::Type(5), Object::Relation(6)),
            ],
            operators: vec!["#*#".into()],
            casts_everywhere: false,
        }
    }

    #[test]
    fn unsafety_spreads_and_ends() {
        let catalog = Catalog::from_rows(1, rows());
        for name in ["seq", "over_seq", "over_over"] {
            assert!(catalog.name(name.as_bytes()).elsewhere, "{name}");
        }
        assert!(catalog.name(b"has_dom").code);
        assert_eq!(catalog.name(b"plain"), Flags::default());
        assert!(catalog.name(b"f").called && !catalog.name(b"f").attribute);
        assert!(!catalog.name(b"nextval").called && catalog.name(b"nextval").attribute);
    }

    #[test]
    fn operators_and_types() {
        let catalog = Catalog::from_rows(1, rows());
        assert!(catalog.operator_is_unsafe(b"#*#") && !catalog.operator_is_unsafe(b"="));
        assert!(catalog.type_is_safe(23) && catalog.type_is_safe(20_000));
        assert!(!catalog.type_is_safe(20_001) && !catalog.type_is_safe(30_000));
    }

    #[test]
    fn nothing_is_safe_while_nothing_is_known() {
        let catalog = Catalog::unknown(1);
        assert!(!catalog.is_loaded() && catalog.casts_everywhere() && catalog.operator_is_unsafe(b"="));
        assert!(!catalog.type_is_safe(20_000));
    }
}
