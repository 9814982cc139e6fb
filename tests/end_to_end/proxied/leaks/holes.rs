//! Ways in which state gets into a session, or out of it again, that a look at the statement's first word misses.

use super::Twins;
use crate::fixture::*;

/// What code of the database does to the session that calls it.
pub const FUNCTIONS: &str = "
    CREATE FUNCTION set_it(value text) RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN RETURN set_config('work_mem', value, false); END $$;
    CREATE FUNCTION set_by_sql(value text) RETURNS text LANGUAGE sql AS $$ SELECT set_config('work_mem', value, false) $$;
    CREATE FUNCTION set_for_itself() RETURNS text LANGUAGE sql SET work_mem = '9MB' AS $$ SELECT current_setting('work_mem') $$;
    CREATE FUNCTION lock_it(key bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_lock(key); END $$;
    CREATE PROCEDURE set_and_end(kept text, lost text) LANGUAGE plpgsql AS
        $$ BEGIN PERFORM set_config('work_mem', kept, false); COMMIT; PERFORM set_config('work_mem', lost, false); ROLLBACK; END $$;
    CREATE TABLE late (client int UNIQUE DEFERRABLE INITIALLY DEFERRED);
    GRANT SELECT, INSERT ON late TO app, leaking;
    DO $$ BEGIN FOR n IN 0..999 LOOP EXECUTE format('CREATE SEQUENCE drawn_%s; GRANT ALL ON SEQUENCE drawn_%1$s TO app, leaking', n); END LOOP; END $$;
";

/// A cursor that can be declared and not be kept.
const BAD_CURSOR: &str = "DECLARE bad CURSOR WITH HOLD FOR SELECT 1 / (x - 3) FROM generate_series(1, 5) x";

/// An extended query of texts, each parsed, bound and executed; no Sync.
fn pipelined(texts: &[&str]) -> Vec<u8> {
    texts.iter().flat_map(|sql| [parse("", sql), bind("", &[]), execute()].concat()).collect()
}

impl Twins {
    /// One of them.
    pub(super) async fn hole(&mut self) {
        let value = format!("{}MB", 2 + self.dice.below(6));
        match self.dice.below(7) {
            0 => self.by_code(&value).await,
            1 => self.by_expressions(&value).await,
            2 => self.by_pipelines(&value).await,
            3 => self.by_transactions(&value).await,
            4 => self.by_several_in_one_message(&value).await,
            5 => self.by_other_commands(&value).await,
            _ => self.in_the_temporary_schema().await,
        }
    }

    async fn by_code(&mut self, value: &str) {
        let key = self.number * 100 + self.dice.below(3) as u64;
        let channel = format!("channel_{}_{}", self.number, self.dice.below(2));
        let sql = match self.dice.below(11) {
            0 => format!("SELECT set_it('{value}')"),
            1 => format!("SELECT set_by_sql('{value}')"),
            2 => "SELECT set_for_itself()".to_owned(),
            3 => format!("CALL set_and_end('{value}', '8MB')"),
            4 => format!("SELECT lock_it({key})"),
            5 => format!("DO $$ BEGIN PERFORM set_config('work_mem', '{value}', false); END $$"),
            6 => format!("DO $$ BEGIN EXECUTE 'SET work_mem = ''{value}'''; END $$"),
            7 => format!(
                "DO $$ BEGIN BEGIN PERFORM set_config('work_mem', '{value}', false); RAISE 'no'; \
                 EXCEPTION WHEN others THEN NULL; END; END $$"
            ),
            8 => format!("DO $$ BEGIN SET LOCAL work_mem = '{value}'; END $$"),
            9 => format!("DO $$ BEGIN EXECUTE 'LISTEN {channel}'; END $$"),
            _ => format!(
                "DO $$ BEGIN PERFORM set_config('work_mem', '{value}', false); COMMIT; \
                 PERFORM set_config('work_mem', '8MB', false); RAISE 'no'; END $$"
            ),
        };
        self.sql(&sql).await;
    }

    async fn by_expressions(&mut self, value: &str) {
        let set = format!("set_config('work_mem', '{value}', false)");
        let sql = match self.dice.below(13) {
            0 => format!("SELECT {set} WHERE false"),
            1 => format!("SELECT CASE WHEN false THEN {set} END"),
            2 => format!("VALUES ({set})"),
            3 => format!("COPY (SELECT {set}) TO STDOUT"),
            4 => format!("EXPLAIN (ANALYZE, TIMING off, SUMMARY off, COSTS off) SELECT {set}"),
            5 => format!("EXPLAIN (COSTS off) SELECT {set}"),
            // `UPDATE pg_settings` belongs here: it is not noticed yet (docs/COMPATIBILITY.md).
            6 => format!("SELECT {set}, {set}"),
            7 => format!("WITH x AS MATERIALIZED (SELECT {set} AS s) SELECT s FROM x"),
            8 => format!("UPDATE public.own SET n = n + 1 WHERE client = {} RETURNING {set}", self.number),
            9 => "SELECT set_config('work_mem', x || 'MB', false) FROM generate_series(3, 4) x".to_owned(),
            10 => {
                self.sql("DEALLOCATE cfg").await;
                self.sql("PREPARE cfg AS SELECT set_config('work_mem', $1, false)").await;
                format!("EXECUTE cfg('{value}')")
            }
            11 => {
                self.sql("BEGIN").await;
                self.sql(&format!("DECLARE setting CURSOR FOR SELECT {set}")).await;
                if self.dice.below(2) == 0 {
                    self.sql("FETCH ALL FROM setting").await;
                }
                "COMMIT".to_owned()
            }
            _ => {
                let bytes = [
                    parse("", "SELECT set_config($1, $2, $3)"),
                    bind("", &["work_mem", value, self.dice.of(&["true", "false"])]),
                    describe(b'P', ""),
                    execute(),
                    sync(),
                ];
                return self.both("(set_config, bound)", &bytes.concat()).await;
            }
        };
        self.sql(&sql).await;
    }

    async fn by_pipelines(&mut self, value: &str) {
        let set = format!("SET work_mem = '{value}'");
        let zone = format!("SET TimeZone = '{}'", self.dice.of(&["UTC", "Asia/Tokyo"]));
        let texts: &[&str] = match self.dice.below(8) {
            0 => &[&set, "SELECT 1/0"],
            1 => &["BEGIN", &set, "COMMIT", &zone, "SELECT 1/0"],
            2 => &[&set, "COMMIT", "SELECT 1/0"],
            3 => &["SELECT 1", &set, &zone],
            4 => &[&set, "RESET ALL", "SELECT 1/0"],
            5 => &[&set, "DISCARD ALL"],
            6 => &["BEGIN", &set, "SAVEPOINT x", &zone, "ROLLBACK TO x", "COMMIT"],
            _ => &["BEGIN", &set, BAD_CURSOR, "COMMIT", "SELECT 2"],
        };
        let mut bytes = pipelined(texts);
        if self.dice.below(3) == 0 {
            // It is never executed.
            bytes.extend([parse("", "SET work_mem = '8MB'"), bind("", &[])].concat());
        }
        bytes.extend(sync());
        self.both(&format!("(pipelined {texts:?})"), &bytes).await;
    }

    async fn by_transactions(&mut self, value: &str) {
        let set = format!("SET work_mem = '{value}'");
        let local = format!("SET LOCAL work_mem = '{value}'");
        let listen = format!("LISTEN channel_{}_0", self.number);
        let insert = format!("INSERT INTO public.late VALUES ({0}), ({0})", self.number);
        let (update, prepare, end) = (
            format!("UPDATE public.own SET n = n + 1 WHERE client = {}", self.number),
            format!("PREPARE TRANSACTION 'of {}'", self.number),
            format!("{} PREPARED 'of {}'", self.dice.of(&["COMMIT", "ROLLBACK"]), self.number),
        );
        let steps: &[&str] = match self.dice.below(11) {
            // What fails at its commit has set nothing.
            0 => &["BEGIN", &set, BAD_CURSOR, "COMMIT"],
            1 => &["BEGIN", &set, &insert, "COMMIT"],
            2 => &["BEGIN", &set, &insert, "SET CONSTRAINTS ALL IMMEDIATE", "COMMIT"],
            3 => &["BEGIN", &set, "COMMIT AND CHAIN", "SET work_mem = '8MB'", "ROLLBACK"],
            4 => &["BEGIN", &set, "ROLLBACK AND CHAIN", &local, "COMMIT"],
            5 => &["BEGIN", "SAVEPOINT x", &local, "ROLLBACK TO x", "COMMIT"],
            6 => &["BEGIN", &set, "SAVEPOINT x", "SET LOCAL work_mem = '8MB'", "RELEASE x", "COMMIT"],
            7 => &[
                "BEGIN",
                "SAVEPOINT x",
                "SET work_mem = '8MB'",
                "SELECT 1/0",
                "ROLLBACK TO x",
                &listen,
                "COMMIT",
            ],
            8 => &["BEGIN", &listen, &set, "ROLLBACK"],
            9 => &["BEGIN", "SAVEPOINT x", &listen, "SAVEPOINT y", &set, "ROLLBACK TO x", "COMMIT"],
            // Whoever leaves it open has the row locked for ever.
            _ if self.proxied.idle => &["BEGIN", &set, &update, &prepare, "SHOW work_mem", &end],
            _ => &["ROLLBACK"],
        };
        for sql in steps {
            self.sql(sql).await;
        }
    }

    async fn by_several_in_one_message(&mut self, value: &str) {
        let set = format!("SET work_mem = '{value}'");
        let n = self.number;
        let sql = match self.dice.below(11) {
            0 => format!("{set}; SELECT 1/0"),
            1 => format!("{set}; COMMIT; SELECT 1/0"),
            2 => format!("{set}; ROLLBACK; SET TimeZone = 'Asia/Tokyo'"),
            3 => format!("BEGIN; {set}; COMMIT; SET work_mem = '8MB'; SELECT 1/0"),
            4 => format!("{set}; BEGIN; SET TimeZone = 'UTC'; ROLLBACK"),
            5 => "RESET ALL; SELECT 1/0".to_owned(),
            6 => "SELECT 1; DISCARD ALL".to_owned(),
            7 => format!("SET LOCAL work_mem = '8MB'; SHOW work_mem; {set}"),
            8 => format!("{set}; {BAD_CURSOR}"),
            9 => format!("{set}; INSERT INTO public.late VALUES ({n}), ({n})"),
            _ => format!("SELECT nextval('drawn_{n}'); SELECT currval('drawn_{n}'), lastval()"),
        };
        self.sql(&sql).await;
    }

    async fn by_other_commands(&mut self, value: &str) {
        let sql = match self.dice.below(15) {
            0 => "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
            1 => "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            2 | 3 => "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
            4 => "SET SESSION AUTHORIZATION leaking",
            5 => "SET SESSION AUTHORIZATION DEFAULT",
            6 => "SET TIME ZONE LOCAL",
            7 => "SET TIME ZONE INTERVAL '-08:00' HOUR TO MINUTE",
            8 => self.dice.of(&[
                "SET NAMES 'LATIN1'",
                "SET NAMES DEFAULT",
                "SET client_encoding = 'SQL_ASCII'",
            ]),
            9 => "SET lock_timeout = '1ms'",
            10 => "SET statement_timeout = '3h'",
            11 => "SET work_mem TO DEFAULT",
            12 => "SET search_path = public, pg_temp",
            13 => "SET search_path = pg_temp, public",
            _ => return self.sql(&format!("SET SESSION work_mem = {value}")).await,
        };
        self.sql(sql).await;
    }

    /// Nothing names `pg_temp` before it is there: that it is there already is known to differ.
    async fn in_the_temporary_schema(&mut self) {
        let create = format!(
            "CREATE OR REPLACE FUNCTION pg_temp.own() RETURNS text LANGUAGE sql AS $$ SELECT 'of {}' $$",
            self.number
        );
        let then = match self.dice.below(4) {
            0 => "SELECT pg_temp.own()",
            1 => "DROP FUNCTION pg_temp.own()",
            2 => "CREATE TEMP SEQUENCE counted; SELECT nextval('pg_temp.counted'), lastval()",
            _ => "SELECT 1/0",
        };
        self.sql(&format!("{create}; {then}")).await;
    }
}
