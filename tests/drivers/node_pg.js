// node-postgres. Traps: pg-cursor (Execute with a limit and Flush, no Sync until the end), streams,
// named statements on a pool, NOTIFY, errors in the middle.
const { Client, Pool } = require('pg');
const Cursor = require('pg-cursor');
const QueryStream = require('pg-query-stream');

async function main() {
    const client = new Client();
    await client.connect();
    await client.query('CREATE TABLE t (id int PRIMARY KEY, x text)');
    await client.query("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 1000) i");
    const cursor = client.query(new Cursor('SELECT id FROM t ORDER BY id'));
    console.log('cursor', (await cursor.read(3)).map((r) => r.id), (await cursor.read(2)).map((r) => r.id));
    await cursor.close();
    let streamed = 0;
    for await (const row of client.query(new QueryStream('SELECT * FROM t', [], { batchSize: 100 }))) streamed += row.id;
    console.log('streamed', streamed);
    for (let i = 0; i < 5; i++) {
        const { rows } = await client.query({ name: 'by-id', text: 'SELECT x FROM t WHERE id = $1', values: [i + 1] });
        console.log('named', rows[0].x);
    }
    await client.query('SELECT 1 / $1::int', [0]).catch((error) => console.log('failed', error.code));
    await client.query('BEGIN');
    await client.query('UPDATE t SET x = $1 WHERE id = 1', ['changed']);
    console.log('own write', (await client.query('SELECT x FROM t WHERE id = 1')).rows[0].x);
    await client.query('ROLLBACK');
    const heard = new Promise((resolve) => client.once('notification', resolve));
    await client.query('LISTEN channel');
    await client.query("NOTIFY channel, 'hello'");
    console.log('notified', (await heard).payload);
    await client.end();

    const pool = new Pool({ max: 5 });
    const totals = await Promise.all([...Array(50).keys()].map((i) => pool.query({ name: 'sum', text: 'SELECT $1::int + count(*)::int AS n FROM t', values: [i] })));
    console.log('pool', totals.reduce((sum, { rows }) => sum + rows[0].n, 0));
    await pool.end();
}

main().catch((error) => { console.log(String(error)); process.exit(1); });
