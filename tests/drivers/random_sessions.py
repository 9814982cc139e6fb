"""Sessions that do anything in any order, from a seed (SEED, default 1): five connections take turns, and
all that libpq shows of each step is printed: results, errors, transaction state, reported parameters. Traps:
whatever nobody thought of. STEPS is how long it goes on."""
import os
import random

import psycopg
from psycopg import pq

SEED, STEPS = int(os.environ.get("SEED", "1")), int(os.environ.get("STEPS", "1500"))
rand = random.Random(SEED)
CONNECTIONS = 5
# What ties a session to its server process, mostly left out with an even SEED: the others take turns more often.
PINS = ("LISTEN", "CREATE TEMP", "DECLARE h", "PREPARE p", "SELECT pg_advisory_lock", "COPY t", "DO $$ BEGIN PERFORM")
# Without application_name: RESET ALL knows only the server's own default (docs/COMPATIBILITY.md).
REPORTED = [b"TimeZone", b"DateStyle", b"IntervalStyle", b"client_encoding", b"standard_conforming_strings",
            b"is_superuser", b"session_authorization", b"in_hot_standby"]


class Connection:
    def __init__(self, number):
        self.number, self.names = number, []
        self.connect()

    def connect(self):
        self.con = psycopg.connect("", autocommit=True, application_name=f"number {self.number}")
        self.pg = self.con.pgconn
        self.pg.notice_handler = lambda notice: print(
            "  notice", notice.error_field(pq.DiagnosticField.SQLSTATE), notice.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
        self.names = []
        # Of one connection waiting for another nothing good comes: they take turns.
        self.pg.exec_(b"SET lock_timeout = '100ms'")

    def show(self, results):
        for result in results:
            status = pq.ExecStatus(result.status)
            print("  ", status.name, result.command_status, result.nparams, end=" ")
            if status == pq.ExecStatus.FATAL_ERROR:
                print(result.error_field(pq.DiagnosticField.SQLSTATE), result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
            elif status == pq.ExecStatus.TUPLES_OK:
                print([(result.fname(c), result.ftype(c)) for c in range(result.nfields)],
                      [[result.get_value(r, c) for c in range(result.nfields)] for r in range(min(result.ntuples, 20))])
            elif status == pq.ExecStatus.COMMAND_OK:
                print([result.param_type(p) for p in range(result.nparams)], [result.ftype(c) for c in range(result.nfields)])
            else:
                print()
        # Of notifications only what they say: process ids differ from server to server.
        while (note := self.pg.notifies()) is not None:
            print("  notified", note.relname, note.extra)
        print("  ", pq.TransactionStatus(self.pg.transaction_status).name,
              [self.pg.parameter_status(name) for name in REPORTED])

    def drain(self):
        """All results of what was sent, with COPY both ways."""
        results = []
        while (result := self.pg.get_result()) is not None:
            results.append(result)
            if result.status == pq.ExecStatus.COPY_OUT:
                size = 0
                while True:
                    length, data = self.pg.get_copy_data(0)
                    if length < 0:
                        break
                    size += len(data)
                print("  copied", size)
            elif result.status == pq.ExecStatus.COPY_IN:
                for row in range(3):
                    self.pg.put_copy_data(f"{next_key()}\tcopied {row}\n".encode())
                self.pg.put_copy_end(b"given up" if rand.random() < 0.3 else None)
        return results


keys = iter(range(1, 10**9))


def next_key():
    return next(keys)


# Statements: text, and parameters where it has some. A number of them are wrong on purpose.
def statement():
    key, value = next_key(), rand.randrange(100)
    return rand.choice([
        lambda: ("SELECT count(*), sum(n) FROM t", ()),
        lambda: ("SELECT n, x FROM t WHERE id = $1", (value,)),
        lambda: ("SELECT n FROM t WHERE n > $1::int ORDER BY id DESC LIMIT 3", (value,)),
        lambda: ("INSERT INTO t VALUES ($1, $2, 'new') RETURNING id, n", (key, value)),
        lambda: ("INSERT INTO t VALUES ($1, $2)", (value, value)),
        lambda: ("UPDATE t SET n = n + 1 WHERE id = $1", (value,)),
        lambda: ("DELETE FROM t WHERE id = $1", (value + 100,)),
        lambda: ("SELECT doubled($1)", (value,)),
        lambda: ("SELECT writes($1)", (key,)),
        lambda: ("SELECT * FROM changing ORDER BY 1 LIMIT 2", ()),
        lambda: ("SELECT 1 / $1::int", (value % 3,)),
        lambda: ("SELECT '2020-01-02 03:04:05+00'::timestamptz, '1 day 2 hours'::interval", ()),
        lambda: ("SELECT '01/02/2020'::date::text", ()),
        # A server process that has seen the name says '' and not NULL once it is reset.
        lambda: ("SELECT coalesce(current_setting('app.tenant', true), ''), current_setting('work_mem')", ()),
        lambda: ("SELECT set_config('app.tenant', $1, $2)", (f"tenant {value}", "tf"[value % 2])),
        lambda: ("SELECT current_user, session_user, current_schemas(false)", ()),
        lambda: ("SELECT count(*) FROM missing", ()),
        lambda: ("SELEC 1", ()),
        lambda: ("", ()),
        lambda: ("SELECT pg_notify('channel', $1)", (f"n {value}",)),
        lambda: ("SELECT pg_try_advisory_xact_lock($1)", (value % 3,)),
        lambda: ("SELECT n FROM t WHERE id = $1 FOR UPDATE SKIP LOCKED", (value,)),
        lambda: ("SELECT txid_current() > 0, nextval('s') > 0", ()),
        lambda: ("SELECT lo_from_bytea(0, 'x') > 0", ()),
        lambda: ("TABLE t ORDER BY id LIMIT 1", ()),
        lambda: ("VALUES (1, 'a'), (2, 'b')", ()),
        lambda: ("EXPLAIN (COSTS off) SELECT 1", ()),
        lambda: ("SELECT $1::int[] || 1", ("{1,2}",)),
        lambda: ("WITH w AS (INSERT INTO t VALUES ($1, 0) RETURNING id) SELECT count(*) FROM w", (key,)),
    ])()


def command():
    while True:
        sql = any_command()
        if SEED % 2 or not sql.startswith(PINS) or rand.random() < 0.02:
            return sql


def any_command():
    value = rand.randrange(100)
    return rand.choice([
        lambda: "BEGIN", lambda: "COMMIT", lambda: "ROLLBACK", lambda: "BEGIN", lambda: "COMMIT", lambda: "COMMIT", lambda: "ROLLBACK",
        lambda: "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", lambda: "START TRANSACTION READ ONLY",
        lambda: "COMMIT AND CHAIN", lambda: "END",
        lambda: f"SAVEPOINT s{value % 3}", lambda: f"ROLLBACK TO s{value % 3}", lambda: f"RELEASE s{value % 3}",
        lambda: f"SET TimeZone TO '{rand.choice(['UTC', 'Asia/Tokyo', 'America/New_York', 'Nowhere'])}'",
        lambda: f"SET LOCAL TimeZone TO '{rand.choice(['UTC', 'Asia/Tokyo'])}'",
        lambda: f"SET DateStyle TO {rand.choice(['German', 'ISO, DMY', 'SQL, MDY'])}",
        lambda: f"SET IntervalStyle TO {rand.choice(['iso_8601', 'postgres'])}",
        lambda: f"SET work_mem TO '{1 + value % 7}MB'", lambda: f"SET LOCAL work_mem TO '{1 + value % 7}MB'",
        lambda: "SET search_path TO other, public", lambda: "RESET search_path", lambda: "RESET ALL; SET lock_timeout = '100ms'",
        lambda: f"SET application_name TO 'app {value}'", lambda: "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        lambda: "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE", lambda: "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        lambda: "SET ROLE random_role", lambda: "RESET ROLE", lambda: "SET client_encoding TO LATIN1", lambda: "RESET client_encoding",
        lambda: "SHOW TimeZone", lambda: "SHOW work_mem", lambda: "SHOW search_path", lambda: "SHOW transaction_read_only",
        lambda: "DISCARD ALL; SELECT 1", lambda: "DISCARD TEMP",
        lambda: "LISTEN channel", lambda: "UNLISTEN *", lambda: f"NOTIFY channel, 'payload {value}'",
        lambda: f"CREATE TEMP TABLE IF NOT EXISTS temporary AS SELECT {value} AS x", lambda: "SELECT * FROM temporary", lambda: "DROP TABLE temporary",
        lambda: "CREATE TEMP TABLE short (x int) ON COMMIT DROP",
        lambda: "DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id", lambda: "DECLARE h CURSOR WITH HOLD FOR SELECT generate_series(1, 5)",
        lambda: "FETCH 2 FROM c", lambda: "FETCH 2 FROM h", lambda: "CLOSE h", lambda: "CLOSE ALL",
        lambda: "PREPARE p AS SELECT $1::int + 1", lambda: f"EXECUTE p({value})", lambda: "DEALLOCATE p", lambda: "DEALLOCATE ALL",
        lambda: "COPY t (id, x) FROM STDIN", lambda: "COPY (SELECT * FROM t ORDER BY id LIMIT 10) TO STDOUT",
        lambda: "SELECT 1; SELECT 2", lambda: f"INSERT INTO t VALUES ({next_key()}, 1); SELECT max(n) FROM t WHERE id < 50",
        lambda: f"INSERT INTO t VALUES ({next_key()}, 2); SELECT 1 / 0", lambda: f"BEGIN; INSERT INTO t VALUES ({next_key()}, 3); COMMIT",
        lambda: "ALTER TABLE changing ADD COLUMN IF NOT EXISTS b int DEFAULT 7", lambda: "ALTER TABLE changing DROP COLUMN IF EXISTS b",
        lambda: "DO $$ BEGIN RAISE NOTICE 'said'; END $$", lambda: "DO $$ BEGIN PERFORM set_config('app.tenant', 'from DO', false); END $$",
        lambda: "TRUNCATE other.u; INSERT INTO other.u VALUES (1); SELECT * FROM other.u",
        lambda: "CREATE OR REPLACE FUNCTION doubled(x int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1 * 2'",
        lambda: "SELECT pg_advisory_lock(7)", lambda: "SELECT pg_advisory_unlock(7)", lambda: "SELECT pg_advisory_unlock_all()",
        lambda: "VACUUM t", lambda: "ANALYZE t", lambda: "LOCK TABLE t IN SHARE MODE", lambda: "CHECKPOINT",
        lambda: "PREPARE TRANSACTION 'random'", lambda: "COMMIT PREPARED 'random'", lambda: "ROLLBACK PREPARED 'random'",
    ])()


def as_bytes(parameters):
    return [str(value).encode() for value in parameters]


def simple(c):
    sql = command()
    if c.pg.transaction_status == pq.TransactionStatus.INERROR and rand.random() < 0.4:
        sql = "ROLLBACK"
    elif rand.random() < 0.4:
        sql, parameters = statement()
        for number, value in enumerate(parameters, 1):
            sql = sql.replace(f"${number}", f"'{value}'")
    print("query", sql)
    c.pg.send_query(sql.encode())
    c.show(c.drain())


def extended(c):
    sql, parameters = statement() if rand.random() < 0.8 else (command(), ())
    print("parameters", sql, parameters)
    c.pg.send_query_params(sql.encode(), as_bytes(parameters))
    c.show(c.drain())


def prepare(c):
    sql, parameters = statement() if rand.random() < 0.9 else (command(), ())
    name = f"st{rand.randrange(4)}"
    print("prepare", name, sql)
    c.pg.send_prepare(name.encode(), sql.encode())
    c.names.append((name, parameters))
    c.show(c.drain())
    c.pg.send_describe_prepared(name.encode())
    c.show(c.drain())


def execute(c):
    name, parameters = rand.choice(c.names) if c.names else ("none", ())
    print("execute", name, parameters)
    c.pg.send_query_prepared(name.encode(), as_bytes(parameters))
    c.show(c.drain())


def pipeline(c):
    c.pg.enter_pipeline_mode()
    syncs = 1
    for _ in range(rand.randrange(1, 6)):
        sql, parameters = statement()
        print("pipelined", sql, parameters)
        c.pg.send_query_params(sql.encode(), as_bytes(parameters))
        if rand.random() < 0.3:
            c.pg.pipeline_sync()
            syncs += 1
    c.pg.pipeline_sync()
    results = []
    while syncs:
        result = c.pg.get_result()
        if result is not None:
            results.append(result)
            syncs -= result.status == pq.ExecStatus.PIPELINE_SYNC
    while c.pg.get_result() is not None:
        pass
    c.show(results)
    c.pg.exit_pipeline_mode()


def again(c):
    print("new connection")
    c.con.close()
    c.connect()
    c.show([])


with psycopg.connect("", autocommit=True) as admin:
    admin.execute("""
        CREATE TABLE t (id int PRIMARY KEY, n int, x text);
        INSERT INTO t SELECT i, i, 'row ' || i FROM generate_series(-100, 0) i;
        CREATE TABLE changing (a int); INSERT INTO changing VALUES (1), (2);
        CREATE SCHEMA other; CREATE TABLE other.u (x int); CREATE TABLE other.t (id int, n int, x text);
        CREATE SEQUENCE s;
        CREATE FUNCTION doubled(x int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1 * 2';
        CREATE FUNCTION writes(k int) RETURNS bigint LANGUAGE plpgsql AS
            'BEGIN INSERT INTO t VALUES (k, 0); RETURN (SELECT count(*) FROM t WHERE id = k); END';
        DO $$ BEGIN CREATE ROLE random_role; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
        GRANT SELECT ON t, changing TO random_role;
    """)

connections = [Connection(number) for number in range(CONNECTIONS)]
for step in range(STEPS):
    c = rand.choice(connections)
    print(f"{step} on {c.number}:", end=" ")
    rand.choices([simple, extended, prepare, execute, pipeline, again], [40, 25, 10, 15, 8, 2])[0](c)
for c in connections:
    c.con.close()
