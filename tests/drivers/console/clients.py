"""The admin console from Python: psycopg 3 (text and binary results, parameters, pipeline), psycopg 2, asyncpg."""
import asyncio
import os

import asyncpg
import psycopg
import psycopg2

with psycopg.connect("", autocommit=True) as con:
    nodes = con.execute("SHOW NODES").fetchall()
    assert [row[0] for row in nodes] == ["a", "b", "c"], nodes
    binary = con.cursor(binary=True)
    rows = binary.execute("SELECT name, port, drained, lag_seconds FROM nodes").fetchall()
    assert all(isinstance(port, int) and drained is False for _, port, drained, _ in rows), rows
    sessions = binary.execute("SELECT pid, connected, user FROM sessions").fetchall()
    assert any(pid == con.info.backend_pid and at.tzinfo for pid, at, _ in sessions), sessions
    con.prepare_threshold = 0
    for wrong in (7, 2**40):
        try:
            con.execute("KILL %s", (wrong,))
        except psycopg.Error as error:
            assert error.sqlstate in ("42704", "22P02"), error.sqlstate
    con.execute("DRAIN %s", ("b",), binary=True)
    assert con.execute("SELECT name, drained FROM nodes").fetchall()[1] == ("b", True)
    con.execute("UNDRAIN %s", ["b"])
    with con.pipeline():
        version, lag = con.execute("SHOW VERSION"), con.execute("SHOW LAG")
        assert version.fetchone()[0].startswith("Highwater") and len(lag.fetchall()) == 3
print("psycopg 3")

# Not autocommit: each command is in a transaction, which a mistake fails.
with psycopg.connect("") as con:
    con.execute("SHOW STATS")
    try:
        con.execute("SHOW NOTHING")
    except psycopg.errors.SyntaxError as error:
        assert "HELP" in error.diag.message_hint
    con.rollback()
    con.execute("SHOW POOLS")
print("psycopg 3 in transactions")

con = psycopg2.connect("")
with con, con.cursor() as cursor:
    cursor.execute("SHOW CONFIG")
    assert len(cursor.fetchall()) > 50
    cursor.execute("EXPLAIN ROUTE SELECT 1")
    assert dict(cursor.fetchall())["class"] == "read"
con.close()
print("psycopg 2")


async def main():
    con = await asyncpg.connect(host=os.environ["PGHOST"], user=os.environ["PGUSER"])
    rows = await con.fetch("SELECT * FROM sessions")
    assert any(row["state"] == "active" for row in rows), rows
    assert await con.fetchval("SELECT version()")
    async with con.transaction():
        assert len(await con.fetch("SHOW HELP")) > 20
    await con.execute("RELOAD")
    await con.close()


asyncio.run(main())
print("asyncpg")
