"""psycopg 3. Traps: pipeline mode (an error before the rest of the unit is sent), prepared statements
under the driver's names (DEALLOCATE by SQL), server-side cursors, COPY both ways, two-phase commit,
notifications, several statements in one Query, adapters that ask pg_type, async."""
import asyncio
import logging

import psycopg
from psycopg import errors, sql
from psycopg.types.composite import CompositeInfo, register_composite

# Of a pipeline that fails it warns, or not: whether the error is there before the rest is sent is a matter of time.
logging.getLogger("psycopg").setLevel(logging.ERROR)

with psycopg.connect("", autocommit=True) as con:
    con.execute("CREATE TABLE t (id int PRIMARY KEY, x text)")
    for threshold in (0, 5, None):
        con.prepare_threshold = threshold
        con.prepared_max = 3
        for i in range(30):
            assert con.execute(f"SELECT %s + {i % 7}", (i,)).fetchone() == (i + i % 7,)
        print("prepared", threshold)
    with con.pipeline() as pipe:
        first = con.execute("INSERT INTO t VALUES (%s, %s)", (1, "one"))
        second = con.execute("SELECT x FROM t WHERE id = %s", (1,))
        pipe.sync()
        print("pipeline", first.rowcount, second.fetchall())
    try:
        with con.pipeline() as pipe:
            con.execute("INSERT INTO t VALUES (2, 'two')")
            con.execute("SELECT 1 / %s", (0,))
            con.execute("INSERT INTO t VALUES (3, 'three')")
            pipe.sync()
    except errors.DivisionByZero as error:
        print("pipeline failed", error.sqlstate, con.execute("SELECT count(*) FROM t").fetchone())
    with con.transaction():
        with con.cursor("named", scrollable=True) as cursor:
            cursor.execute("SELECT generate_series(1, 1000)")
            print("cursor", cursor.fetchmany(3), cursor.fetchone())
            cursor.scroll(-2)
            print("scrolled", cursor.fetchone(), len(cursor.fetchall()))
    with con.cursor("held", withhold=True) as cursor:
        cursor.execute("SELECT generate_series(1, 10)")
        print("held", cursor.fetchall()[-1])
    with con.cursor().copy("COPY t FROM STDIN") as copy:
        for i in range(100, 20100):
            copy.write_row((i, f"row {i}"))
    with con.cursor().copy("COPY (SELECT * FROM t ORDER BY id) TO STDOUT (FORMAT binary)") as copy:
        print("copied", sum(len(data) for data in copy))
    try:
        with con.cursor().copy("COPY t FROM STDIN") as copy:
            copy.write("not a number\tx\n")
    except errors.InvalidTextRepresentation as error:
        print("copy failed", error.sqlstate)
    con.execute("LISTEN channel")
    con.execute("NOTIFY channel, 'hello'")
    note = next(con.notifies(timeout=10, stop_after=1))
    print("notified", note.channel, note.payload)
    con.execute("UNLISTEN *")
    con.execute("CREATE TYPE pair AS (a int, b text)")
    register_composite(CompositeInfo.fetch(con, "pair"), con)
    print("composite", tuple(con.execute("SELECT (1, 'b')::pair").fetchone()[0]))
    for result in (cursor := con.execute("SELECT 1; SELECT 2")).results():
        print("result", result.fetchall())
    print("info", con.info.transaction_status, con.info.parameter_status("TimeZone"), con.pgconn.backend_pid > 0)

with psycopg.connect("") as con:
    try:
        con.execute("INSERT INTO t VALUES (1, 'again')")
    except errors.UniqueViolation as error:
        print("failed", error.diag.constraint_name, con.info.transaction_status)
    try:
        con.execute("SELECT 1")
    except errors.InFailedSqlTransaction as error:
        print("in failed transaction", error.sqlstate)
    con.rollback()
    with con.transaction():
        try:
            with con.transaction():
                con.execute("INSERT INTO t VALUES (4, 'four')")
                raise psycopg.Rollback
        except psycopg.Rollback:
            pass
        print("savepoint", con.execute("SELECT count(*) FROM t WHERE id = 4").fetchone())
    con.commit()
    con.tpc_begin("first")
    con.execute(sql.SQL("UPDATE {} SET x = 'prepared' WHERE id = 1").format(sql.Identifier("t")))
    con.tpc_prepare()
    con.tpc_commit()
    print("two phases", con.execute("SELECT x FROM t WHERE id = 1").fetchone())


async def asynchronous():
    async with await psycopg.AsyncConnection.connect("", autocommit=True) as con:
        async with con.pipeline():
            cursors = [await con.execute("SELECT %s::int", (i,)) for i in range(20)]
        print("async", [(await cursor.fetchone())[0] for cursor in cursors])


asyncio.run(asynchronous())
