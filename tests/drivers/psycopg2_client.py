"""psycopg2. Traps: BEGIN before everything, named cursors, COPY, large objects by the protocol's
FunctionCall, notifications, asynchronous connections, reset, cancel, set_session, execute_values."""
import io
import select
import threading
import uuid

import psycopg2
import psycopg2.extensions
import psycopg2.extras

con = psycopg2.connect("")
cur = con.cursor()
cur.execute("CREATE TABLE t (id int PRIMARY KEY, x text, u uuid, at timestamptz, j jsonb)")
psycopg2.extras.register_uuid()
psycopg2.extras.execute_values(cur, "INSERT INTO t (id, x) VALUES %s", [(i, f"row {i}") for i in range(1000)])
con.commit()
cur.execute("SELECT count(*) FROM t")
print("inserted", cur.fetchone())
con.commit()

for i in range(50):
    cur.execute("UPDATE t SET x = %s, u = %s, at = now(), j = %s WHERE id = %s",
                (f"changed {i}", uuid.UUID(int=i), psycopg2.extras.Json({"i": i}), i))
    con.commit()
    cur.execute("SELECT x, u, j FROM t WHERE id = %s", (i,))
    assert cur.fetchone() == (f"changed {i}", uuid.UUID(int=i), {"i": i})
    con.rollback()

with con.cursor("named") as named:
    named.itersize = 100
    named.execute("SELECT id FROM t ORDER BY id")
    print("named cursor", sum(row[0] for row in named))
con.commit()

out = io.StringIO()
cur.copy_expert("COPY (SELECT id, x FROM t ORDER BY id) TO STDOUT", out)
print("copied out", len(out.getvalue()))
cur.copy_expert("COPY t (id, x) FROM STDIN", io.StringIO("".join(f"{i}\tcopied\n" for i in range(2000, 7000))))
con.commit()
cur.execute("SELECT count(*) FROM t WHERE x = 'copied'")
print("copied in", cur.fetchone())
try:
    cur.copy_expert("COPY t (id) FROM STDIN", io.StringIO("1\n"))
except psycopg2.errors.UniqueViolation as error:
    print("copy failed", error.pgcode, con.get_transaction_status())
con.rollback()

# Large objects: libpq calls functions by the protocol, not by SQL.
large = con.lobject(0, "wb")
large.write(b"0123456789" * 50000)
large.seek(-5, 2)
oid = large.oid
print("large object", large.tell())
large.close()
con.commit()
large = con.lobject(oid, "rb")
large.seek(7)
print("read", large.read(5), len(large.read()))
large.close()
con.lobject(oid).unlink()
con.commit()

con.set_session(isolation_level="SERIALIZABLE", readonly=True)
try:
    cur.execute("INSERT INTO t (id) VALUES (-1)")
except psycopg2.errors.ReadOnlySqlTransaction as error:
    print("read only", error.pgcode)
con.rollback()
con.set_session(isolation_level="DEFAULT", readonly=False, autocommit=True)
cur.execute("SHOW transaction_isolation")
print("isolation", cur.fetchone())

con.set_client_encoding("LATIN1")
cur.execute("SELECT 'caf\u00e9', length('caf\u00e9')")
print("encoding", cur.fetchone(), con.encoding)
con.reset()
cur.execute("SHOW client_encoding")
print("reset", cur.fetchone(), con.encoding)
con.commit()

con.autocommit = True
cur.execute("LISTEN channel")
other = psycopg2.connect("")
other.autocommit = True
other.cursor().execute("NOTIFY channel, 'from another'")
while not con.notifies:
    select.select([con], [], [], 10)
    con.poll()
print("notified", con.notifies.pop().payload)
cur.execute("UNLISTEN *")

timer = threading.Timer(0.3, con.cancel)
timer.start()
try:
    cur.execute("SELECT pg_sleep(60)")
except psycopg2.errors.QueryCanceled as error:
    timer.join()
    cur.execute("SELECT 1")
    print("cancelled", error.pgcode, cur.fetchone())


def wait(connection):
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        if state == psycopg2.extensions.POLL_READ:
            select.select([connection], [], [], 10)
        else:
            select.select([], [connection], [], 10)


asynchronous = psycopg2.connect("", async_=1)
wait(asynchronous)
cursor = asynchronous.cursor()
cursor.execute("SELECT generate_series(1, 3)")
wait(asynchronous)
print("asynchronous", cursor.fetchall())
asynchronous.close()

xid = con.xid(42, "global", "branch")
con.autocommit = False
con.tpc_begin(xid)
cur.execute("UPDATE t SET x = 'two phases' WHERE id = 1")
con.tpc_prepare()
con.reset()
with psycopg2.connect("") as third:
    print("recovered", [(x.gtrid, x.bqual) for x in third.tpc_recover() if x.database == con.info.dbname])
con.tpc_commit(xid)
cur.execute("SELECT x FROM t WHERE id = 1")
print("two phases", cur.fetchone())
con.commit()

cur.execute("SELECT 1 AS a; SELECT 2 AS b")
print("last of two", cur.fetchone(), cur.description[0].name)
con.rollback()
print("notices", [notice.strip() for notice in con.notices])
cur.execute("DO $$ BEGIN RAISE NOTICE 'said %', 1; END $$")
print("notices", [notice.strip() for notice in con.notices])
con.close()
try:
    psycopg2.connect("", dbname="no such database")
except psycopg2.OperationalError as error:
    print("no database", "does not exist" in str(error))
