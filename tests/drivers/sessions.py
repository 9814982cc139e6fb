"""What belongs to a session, with psycopg 3 and many connections at once. Traps: read-your-writes in
loops, tenants by set_config and row-level security, DateStyle and TimeZone, temporary tables,
advisory locks, cursors, notifications between connections, two phases, cancelling, a lost server
connection, role and search_path."""
import os
import threading

import psycopg
from psycopg import errors


def connect(**options):
    return psycopg.connect("", autocommit=True, **options)


def threads(count, work):
    failed = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            failed.append(repr(error))

    started = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return sorted(failed)


admin = connect()
admin.execute("CREATE TABLE items (id int PRIMARY KEY, tenant text, n int)")


# A write is there for the next read: autocommit, in a transaction before, by a function, over COPY.
def reads_its_writes(number):
    with connect() as con:
        for i in range(100):
            key = number * 1000 + i
            con.execute("INSERT INTO items VALUES (%s, %s, %s)", (key, f"t{number % 3}", i))
            assert con.execute("SELECT n FROM items WHERE id = %s", (key,)).fetchone() == (i,)
            with con.transaction():
                con.execute("UPDATE items SET n = n + 1 WHERE id = %s", (key,))
            assert con.execute("SELECT n FROM items WHERE id = %s", (key,)).fetchone() == (i + 1,)
            with con.transaction():
                count = con.execute("SELECT count(*) FROM items WHERE id / 1000 = %s", (number,)).fetchone()
                assert count == (i + 1,), count


print("read your writes", threads(6, reads_its_writes), admin.execute("SELECT count(*) FROM items").fetchone())

# A write on one connection, then (after it was acknowledged) a read on a new one.
stale = 0
for i in range(30):
    admin.execute("UPDATE items SET n = %s WHERE id = 0", (i,))
    with connect() as con:
        stale += con.execute("SELECT n FROM items WHERE id = 0").fetchone() != (i,)
print("seen by a new connection", stale)

# Tenants: what set_config has set decides which rows are seen, and is nobody else's.
admin.execute("""
    CREATE ROLE tenant_user NOLOGIN;
    GRANT SELECT, INSERT ON items TO tenant_user;
    ALTER TABLE items ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON items USING (tenant = current_setting('app.tenant', true));
""")


def sees_its_tenant(number):
    tenant = f"t{number % 3}"
    with connect() as con:
        con.execute("SET ROLE tenant_user")
        for _ in range(40):
            with con.transaction():
                con.execute("SELECT set_config('app.tenant', %s, true)", (tenant,))
                seen = con.execute("SELECT DISTINCT tenant FROM items").fetchall()
                assert seen == [(tenant,)], seen
            assert con.execute("SELECT count(*) FROM items").fetchone() == (0,)
        con.execute("SELECT set_config('app.tenant', %s, false)", (tenant,))
        for _ in range(40):
            seen = con.execute("SELECT DISTINCT tenant FROM items").fetchall()
            assert seen == [(tenant,)], seen
        try:
            con.execute("INSERT INTO items VALUES (-1, 'another')")
        except errors.InsufficientPrivilege:
            pass
        con.execute("RESET ROLE")
        assert con.execute("SELECT count(DISTINCT tenant) FROM items").fetchone() == (3,)


print("tenants", threads(6, sees_its_tenant))


# Each connection has its own DateStyle, TimeZone and search_path, from the start or by SET.
def has_its_settings(number):
    zone = ["Asia/Tokyo", "America/New_York", "UTC"][number % 3]
    style = ["German", "SQL, DMY", "ISO, MDY"][number % 3]
    moment = ["01.02.2020 12:00:00 JST", "31/01/2020 22:00:00 EST", "2020-02-01 03:00:00+00"][number % 3]
    options = f"-c timezone={zone}" if number % 2 else ""
    with connect(options=options) as con:
        if not options:
            con.execute(f"SET TimeZone TO '{zone}'")
        con.execute(f"SET DateStyle TO {style}")
        con.execute(f"SET search_path TO private_{number}, public")
        for _ in range(30):
            shown = con.execute("SELECT '2020-02-01 03:00:00+00'::timestamptz::text").fetchone()
            assert shown == (moment,), shown
            literal = con.execute("SELECT extract(hour FROM ('2020-02-01 03:00'::timestamptz AT TIME ZONE 'UTC'))").fetchone()
            assert literal == ([18, 8, 3][number % 3],), literal
            assert con.execute("SHOW search_path").fetchone() == (f"private_{number}, public",)
        assert con.info.parameter_status("TimeZone") == zone
        con.execute("RESET TimeZone")
        assert con.execute("SHOW TimeZone").fetchone() == (zone if options else default_zone,)


default_zone = admin.execute("SHOW TimeZone").fetchone()[0]
print("settings", threads(6, has_its_settings))

# SET LOCAL and a SET that is rolled back are gone with the transaction.
with connect() as con:
    with con.transaction():
        con.execute("SET LOCAL work_mem TO '7MB'")
        print("local", con.execute("SHOW work_mem").fetchone())
    print("local after", con.execute("SHOW work_mem").fetchone())
    try:
        with con.transaction():
            con.execute("SET work_mem TO '9MB'")
            con.execute("SELECT 1 / 0")
    except errors.DivisionByZero:
        print("rolled back", con.execute("SHOW work_mem").fetchone())
    con.execute("SET work_mem TO '11MB'")
    con.execute("DISCARD ALL")
    print("discarded", con.execute("SHOW work_mem").fetchone())


# Temporary tables of one name on several connections; gone with them.
def has_its_temporary_table(number):
    with connect() as con:
        con.execute("CREATE TEMPORARY TABLE mine (x int)")
        for i in range(20):
            con.execute("INSERT INTO mine VALUES (%s)", (number,))
            assert con.execute("SELECT count(*), min(x), max(x) FROM mine").fetchone() == (i + 1, number, number)


print("temporary tables", threads(5, has_its_temporary_table))
try:
    admin.execute("SELECT * FROM mine")
except errors.UndefinedTable as error:
    print("gone", error.sqlstate)

# Advisory locks exclude each other, and end with the session.
holder, waiter = connect(), connect()
print("locked", holder.execute("SELECT pg_try_advisory_lock(42)").fetchone(), waiter.execute("SELECT pg_try_advisory_lock(42)").fetchone())
with waiter.transaction():
    print("in transaction", waiter.execute("SELECT pg_try_advisory_xact_lock(43)").fetchone(), holder.execute("SELECT pg_try_advisory_lock(43)").fetchone())
print("unlocked", holder.execute("SELECT pg_advisory_unlock(42)").fetchone(), waiter.execute("SELECT pg_try_advisory_lock(42)").fetchone())
waiter.close()
holder.execute("SELECT pg_advisory_lock(42)")
print("inherited", holder.execute("SELECT pg_advisory_unlock(42)").fetchone())
holder.close()

# Cursors: in a transaction, and one that outlives it while others work.
with connect() as con:
    with con.transaction():
        con.execute("DECLARE c SCROLL CURSOR FOR SELECT generate_series(1, 100)")
        con.execute("MOVE 50 IN c")
        print("cursor", con.execute("FETCH 2 FROM c").fetchall(), con.execute("FETCH BACKWARD 1 FROM c").fetchall())
    con.execute("DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 5)")
    print("held", con.execute("FETCH 2 FROM held").fetchall())
    con.execute("INSERT INTO items VALUES (-5, 'held', 0)")
    print("held", con.execute("FETCH ALL FROM held").fetchall(), con.execute("SELECT n FROM items WHERE id = -5").fetchone())
    con.execute("CLOSE held")

# Notifications from another connection, at its commit and in order.
with connect() as listener, psycopg.connect("") as sender:
    listener.execute('LISTEN "Some Channel"')
    for i in range(5):
        sender.execute("SELECT pg_notify('Some Channel', %s)", (f"message {i}",))
    print("before commit", [n.payload for n in listener.notifies(timeout=0.2)])
    sender.commit()
    print("after", [n.payload for n in listener.notifies(timeout=10, stop_after=5)])
    listener.execute("UNLISTEN *")
    sender.execute('NOTIFY "Some Channel"')
    sender.commit()
    print("unlistened", list(listener.notifies(timeout=0.2)))

# Two phases: prepared on one connection, finished on another.
with connect() as one, connect() as other:
    one.execute("BEGIN")
    one.execute("INSERT INTO items VALUES (-10, 'two', 1)")
    one.execute("PREPARE TRANSACTION 'drivers two'")
    print("prepared", other.execute("SELECT count(*) FROM items WHERE id = -10").fetchone(),
          other.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()").fetchall())
    other.execute("COMMIT PREPARED 'drivers two'")
    print("committed", one.execute("SELECT count(*) FROM items WHERE id = -10").fetchone(),
          other.execute("SELECT count(*) FROM items WHERE id = -10").fetchone())

# A cancelled statement fails alone, and its connection goes on.
with connect() as con:
    for _ in range(3):
        timer = threading.Timer(0.3, con.cancel)
        timer.start()
        try:
            con.execute("SELECT pg_sleep(60)")
        except errors.QueryCanceled as error:
            timer.join()
            print("cancelled", error.sqlstate, con.execute("SELECT 1").fetchone())
    con.execute("SET statement_timeout TO '200ms'")
    try:
        con.execute("SELECT pg_sleep(60)")
    except errors.QueryCanceled as error:
        print("timed out", error.diag.message_primary)

# SQL's PREPARE beside the driver's prepared statements, which outlive what the server closes.
with connect() as con:
    con.prepare_threshold = 0
    con.execute("PREPARE plus AS SELECT $1::int + 1")
    for i in range(3):
        print("prepared", con.execute(f"EXECUTE plus({i})").fetchone(), con.execute("SELECT %s::int + 2", (i,)).fetchone())
    con.execute("DEALLOCATE plus")
    try:
        con.execute("EXECUTE plus(1)")
    except errors.InvalidSqlStatementName as error:
        print("deallocated", error.sqlstate)

# Rows of large objects, and a COPY between two connections.
with connect() as con:
    with con.transaction():
        oid = con.execute("SELECT lo_from_bytea(0, %s)", (os.urandom(4) + b"x" * 100000,)).fetchone()[0]
        print("large object", con.execute("SELECT length(lo_get(%s))", (oid,)).fetchone())
    print("later", con.execute("SELECT length(lo_get(%s, 4, 1000))", (oid,)).fetchone(), con.execute("SELECT lo_unlink(%s)", (oid,)).fetchone())
    con.execute("CREATE TABLE copied (LIKE items)")
    with connect() as source, source.cursor().copy("COPY (SELECT * FROM items WHERE id >= 0 ORDER BY id) TO STDOUT") as out:
        with con.cursor().copy("COPY copied FROM STDIN") as into:
            for data in out:
                into.write(data)
    print("copied", con.execute("SELECT count(*), sum(id) FROM copied").fetchone())

# Transactions: isolation, read only, deferred constraints, sequences at once.
with connect() as con:
    con.execute("CREATE TABLE parent (id serial PRIMARY KEY, other int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    for i in range(5):
        key = con.execute("INSERT INTO parent DEFAULT VALUES RETURNING id").fetchone()
        assert con.execute("SELECT currval('parent_id_seq')").fetchone() == key
        assert con.execute("SELECT last_value FROM parent_id_seq").fetchone() == key
    print("sequence", con.execute("SELECT setval('parent_id_seq', 100)").fetchone(), con.execute("SELECT nextval('parent_id_seq')").fetchone())
    try:
        with con.transaction():
            con.execute("UPDATE parent SET other = 12345")
            print("deferred", con.execute("SELECT count(*) FROM parent WHERE other = 12345").fetchone())
    except errors.ForeignKeyViolation as error:
        print("at commit", error.sqlstate)
    con.execute("BEGIN READ ONLY")
    print("read only", con.execute("SELECT count(*) FROM parent").fetchone())
    try:
        con.execute("DELETE FROM parent")
    except errors.ReadOnlySqlTransaction as error:
        print("refused", error.sqlstate)
    con.execute("ROLLBACK")
    con.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    before = con.execute("SELECT count(*) FROM parent").fetchone()
    admin.execute("INSERT INTO parent DEFAULT VALUES")
    print("repeatable", con.execute("SELECT count(*) FROM parent").fetchone() == before)
    con.execute("COMMIT")
    print("after", con.execute("SELECT count(*) FROM parent").fetchone()[0] - before[0])
admin.execute("DROP OWNED BY tenant_user; DROP ROLE tenant_user")
