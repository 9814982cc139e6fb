"""asyncpg. Traps: Parse, Describe and Flush without Sync, then BEGIN as a Query; its statement cache over
pool.max_prepared; its reset batch on release; introspection of types; cursors; executemany."""
import asyncio

import asyncpg


async def main():
    con = await asyncpg.connect()
    await con.execute("CREATE TABLE t (id int PRIMARY KEY, x text, tags text[])")
    await con.executemany("INSERT INTO t VALUES ($1, $2, $3)", [(i, f"row {i}", ["a", "b"]) for i in range(500)])
    for i in range(450):
        assert await con.fetchval(f"SELECT {i} + count(*) FROM t WHERE id < $1", i) == 2 * i
    print("statements", await con.fetchval("SELECT count(*) FROM t"))
    described = await con.prepare("SELECT x, tags FROM t WHERE id = $1")
    async with con.transaction():
        await con.execute("UPDATE t SET x = 'changed' WHERE id = 7")
        print("in transaction", tuple(await described.fetchrow(7)))
        cursor = await con.cursor("SELECT id FROM t ORDER BY id")
        print("cursor", [r["id"] for r in await cursor.fetch(3)], await cursor.forward(10), (await cursor.fetchrow())["id"])
    print("explained", (await described.explain(7, analyze=True))[0]["Plan"]["Node Type"])
    try:
        async with con.transaction(isolation="repeatable_read", readonly=True):
            await con.execute("DELETE FROM t")
    except asyncpg.ReadOnlySQLTransactionError as error:
        print("read only", error.sqlstate)
    print("copied", await con.copy_records_to_table("t", records=[(i, "copied", []) for i in range(1000, 2000)]))
    await con.execute("CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TYPE pair AS (a int, m mood)")
    print("types", tuple(await con.fetchval("SELECT ROW(1, 'ok')::pair")))
    heard = asyncio.get_running_loop().create_future()
    await con.add_listener("channel", lambda _, pid, channel, payload: heard.done() or heard.set_result((channel, payload)))
    await con.execute("NOTIFY channel, 'hello'")
    print("notified", await asyncio.wait_for(heard, 10))
    try:
        await con.fetch("SELECT pg_sleep(60)", timeout=0.5)
    except asyncio.TimeoutError:
        print("cancelled", await con.fetchval("SELECT 1"))
    await con.close()
    async with asyncpg.create_pool(min_size=2, max_size=5) as pool:
        async def one(i):
            await pool.execute("INSERT INTO t VALUES ($1)", 5000 + i)
            return await pool.fetchval("SELECT count(*) FROM t WHERE id = $1", 5000 + i)
        print("pool", sum(await asyncio.gather(*(one(i) for i in range(50)))) > 0)


asyncio.run(main())
