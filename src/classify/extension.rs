//! Which compiled functions of which extensions are harmless on a replica. Pure data and one question.
//!
//! An allow-list of extensions of PostgreSQL's own contrib. What it rests on: their documentation, and a test
//! (`tests/end_to_end/allow_lists.rs`) that calls each function which this list lets pass on a primary and on its
//! standby: the same answers or errors, no lock, no transaction id, no setting changed. Functions that SQL cannot call
//! (they take `internal`: index support, estimators) are reached through operators and indexes only; for those nothing
//! stands but the extension's being what it is. Nobody has read all of the code. Named beside an extension are the
//! exceptions: those that are volatile and harmless all the same (random numbers), and those that run a text as
//! SQL, keep state or write. Functions that an extension has written in SQL or PL/pgSQL are judged by their bodies like
//! any other.
//!
//! Deliberately absent: what could not be tested (PostGIS, pgvector: `routing.functions.safe` may name theirs); dblink, postgres_fdw, file_fdw (another server, another machine's files), and whatever looks
//! at the server itself (pg_stat_statements, pageinspect, pg_buffercache, sslinfo, adminpack).

/// An extension that is known.
struct Known {
    name: &'static str,
    /// What the name of its library begins with, behind `$libdir/`.
    library: &'static str,
    /// Volatile and harmless.
    volatile: &'static str,
    /// Not harmless whatever is declared.
    except: &'static str,
    /// Harmless are only those named under `volatile`.
    only_named: bool,
}

const fn computes(name: &'static str, library: &'static str) -> Known {
    Known { name, library, volatile: "", except: "", only_named: false }
}

const KNOWN: &[Known] = &[
    computes("btree_gin", "btree_gin"),
    computes("btree_gist", "btree_gist"),
    computes("citext", "citext"),
    computes("cube", "cube"),
    computes("dict_int", "dict_int"),
    computes("dict_xsyn", "dict_xsyn"),
    computes("earthdistance", "earthdistance"),
    computes("fuzzystrmatch", "fuzzystrmatch"),
    computes("hstore", "hstore"),
    computes("intarray", "_int"),
    Known { except: "isn_weak", ..computes("isn", "isn") },
    computes("ltree", "ltree"),
    // set_limit changes a setting of the session; show_limit reads it.
    Known { except: "set_limit show_limit", ..computes("pg_trgm", "pg_trgm") },
    Known {
        volatile: "gen_salt gen_random_bytes gen_random_uuid armor pgp_sym_encrypt pgp_sym_encrypt_bytea pgp_pub_encrypt \
                   pgp_pub_encrypt_bytea",
        ..computes("pgcrypto", "pgcrypto")
    },
    computes("seg", "seg"),
    // crosstab and connectby run their argument.
    Known { volatile: "normal_rand", only_named: true, ..computes("tablefunc", "tablefunc") },
    Known {
        volatile: "tsm_system_rows_handler system_rows",
        ..computes("tsm_system_rows", "tsm_system_rows")
    },
    Known {
        volatile: "tsm_system_time_handler system_time",
        ..computes("tsm_system_time", "tsm_system_time")
    },
    computes("unaccent", "unaccent"),
    Known {
        volatile: "uuid_generate_v1 uuid_generate_v1mc uuid_generate_v4",
        ..computes("uuid-ossp", "uuid-ossp")
    },
];

/// Whether a function in C that belongs to this extension, in this library, computes and does nothing else. A
/// function that was put into an extension by hand has another library, and is not known.
pub fn is_harmless(extension: &str, library: &str, function: &str, volatile: bool) -> bool {
    let listed = |names: &str| names.split_ascii_whitespace().any(|name| name == function);
    KNOWN.iter().filter(|known| known.name == extension).any(|known| {
        let version = library.strip_prefix("$libdir/").and_then(|file| file.strip_prefix(known.library));
        // `$libdir/hstore`, or with a suffix such as `.so`; not `$libdir/hstore_plperl`.
        let its_library = version.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        its_library && !listed(known.except) && (listed(known.volatile) || !volatile && !known.only_named)
    })
}

#[cfg(test)]
mod tests {
    use super::is_harmless;

    #[test]
    fn known_code_only() {
        for (extension, library, function, volatile, harmless) in [
            ("hstore", "$libdir/hstore", "hstore_in", false, true),
            ("hstore", "$libdir/hstore", "made_volatile", true, false),
            ("hstore", "$libdir/mine", "put_into_it", false, false),
            ("hstore", "$libdir/hstore_plperl", "another", false, false),
            ("hstore", "hstore", "by_path", false, false),
            ("", "$libdir/hstore", "by_hand", false, false),
            ("pg_trgm", "$libdir/pg_trgm", "similarity", false, true),
            ("pg_trgm", "$libdir/pg_trgm", "set_limit", true, false),
            ("tablefunc", "$libdir/tablefunc", "crosstab", false, false),
            ("tablefunc", "$libdir/tablefunc", "connectby", false, false),
            ("tablefunc", "$libdir/tablefunc", "normal_rand", true, true),
            ("uuid-ossp", "$libdir/uuid-ossp", "uuid_generate_v4", true, true),
            ("pgcrypto", "$libdir/pgcrypto", "digest", false, true),
            ("postgis", "$libdir/postgis-3", "st_area", false, false),
            ("vector", "$libdir/vector", "l2_distance", false, false),
            ("dblink", "$libdir/dblink", "dblink_exec", true, false),
            ("dblink", "$libdir/dblink", "dblink_get_pkey", false, false),
            ("postgres_fdw", "$libdir/postgres_fdw", "postgres_fdw_get_connections", true, false),
            ("file_fdw", "$libdir/file_fdw", "file_fdw_handler", false, false),
        ] {
            assert_eq!(
                is_harmless(extension, library, function, volatile),
                harmless,
                "{extension} {function}"
            );
        }
    }
}
