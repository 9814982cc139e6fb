// knex (its pool, streams, cancelled statements) and postgres.js (pipelines everything, portals with a limit, COPY, LISTEN),
// and what node_pg.js leaves out. Prints what it finds; nothing that depends on time.
const { Pool, Client } = require('pg');
const knexf = require('knex');
const postgres = require('postgres');
const QS = require('pg-query-stream');
const Cursor = require('pg-cursor');
const o = {
    host: process.env.PGHOST,
    port: +process.env.PGPORT,
    user: process.env.PGUSER,
    password: process.env.PGPASSWORD,
    database: process.env.PGDATABASE,
};
const log = (...a) => console.log(...a.map((x) => (typeof x === 'string' ? x : JSON.stringify(x))));
async function t(n, f) {
    try {
        const r = await f();
        log(n, 'ok', r === undefined ? '' : r);
    } catch (e) {
        log(n, 'ERR', e.code || '', String(e.message).split('\n')[0]);
    }
}
(async () => {
    const k = knexf({ client: 'pg', connection: o, pool: { min: 0, max: 6 } });
    await t('knex ddl', async () => {
        await k.schema.dropTableIfExists('kx');
        await k.schema.createTable('kx', (t) => {
            t.increments();
            t.string('n');
            t.integer('v');
            t.jsonb('j');
        });
    });
    await t(
        'knex ins',
        async () =>
            (
                await k('kx')
                    .insert([1, 2, 3, 4].map((i) => ({ n: 'n' + i, v: i, j: { i } })))
                    .returning('id')
            ).length,
    );
    await t('knex sel', async () => (await k('kx').where('v', '>', 1).orderBy('id').select('n')).map((r) => r.n));
    await t('knex ryw', async () => {
        let bad = 0;
        await Promise.all(
            [...Array(6)].map(async (_, w) => {
                for (let i = 0; i < 15; i++) {
                    const [r] = await k('kx')
                        .insert({ n: 'w' + w, v: i })
                        .returning('id');
                }
            }),
        );
        return bad;
    });
    await t('knex tx', async () => {
        try {
            await k.transaction(async (tx) => {
                await tx('kx').insert({ n: 'tx' });
                await tx
                    .transaction(async (t2) => {
                        await t2('kx').insert({ n: 't2' });
                        throw new Error('in');
                    })
                    .catch(() => {});
                throw new Error('out');
            });
        } catch (e) {}
        return (await k('kx').whereIn('n', ['tx', 't2'])).length;
    });
    await t('knex sp', async () => {
        await k.transaction(async (tx) => {
            await tx('kx').insert({ n: 'keep' });
            await tx
                .transaction(async (t2) => {
                    await t2('kx').insert({ n: 'drop' });
                    throw new Error('in');
                })
                .catch(() => {});
        });
        return (await k('kx').whereIn('n', ['keep', 'drop'])).map((r) => r.n);
    });
    await t('knex stream', async () => {
        let n = 0;
        for await (const r of k('kx').select().stream()) n++;
        return n;
    });
    await t('knex iso', async () => {
        const tx = await k.transaction({ isolationLevel: 'serializable' });
        const r = await tx.raw('show transaction_isolation');
        await tx.commit();
        return r.rows[0];
    });
    await t('knex readonly', async () => {
        const tx = await k.transaction({ readOnly: true });
        try {
            await tx('kx').insert({ n: 'ro' });
        } catch (e) {
            await tx.rollback();
            return e.code;
        }
    });
    await t('knex timeout cancel', async () => {
        try {
            await k.raw('select pg_sleep(10)').timeout(500, { cancel: true });
        } catch (e) {
            return e.name;
        }
    });
    await t('knex info', async () => Object.keys(await k('kx').columnInfo()));
    await t(
        'knex batch',
        async () =>
            (
                await k.batchInsert(
                    'kx',
                    [...Array(500)].map((_, i) => ({ n: 'b', v: i })),
                    50,
                )
            ).length,
    );
    await t('knex hasTable', async () => await k.schema.hasTable('kx'));
    await k.destroy();
    for (const prepare of [true, false])
        for (const max of [1, 5]) {
            const s = postgres({ ...o, prepare, max, onnotice: () => {}, idle_timeout: 5 });
            log('postgres.js', prepare, max);
            await t('ddl', async () => {
                await s`drop table if exists pj`;
                await s`create table pj(i int primary key,v text,a int[],j jsonb)`;
            });
            await t(
                'ins',
                async () =>
                    (
                        await s`insert into pj ${s([...Array(20)].map((_, i) => ({ i, v: 'v' + i, a: [i], j: { i } })))} returning i`
                    ).length,
            );
            await t('rw', async () => {
                let bad = 0;
                for (let i = 0; i < 20; i++) {
                    if (max === 1) {
                        await s`update pj set v=${'n' + i} where i=${i}`;
                        const [r] = await s`select v from pj where i=${i}`;
                        if (r.v !== 'n' + i) bad++;
                    }
                }
                return bad;
            });
            await t('pipelined', async () =>
                (await Promise.all([...Array(100)].map((_, i) => s`select ${i}::int as x`))).reduce(
                    (a, r) => a + r[0].x,
                    0,
                ),
            );
            await t('begin', async () => {
                try {
                    await s.begin(async (q) => {
                        await q`insert into pj(i) values(100)`;
                        await q
                            .savepoint(async (z) => {
                                await z`insert into pj(i) values(101)`;
                                throw new Error('x');
                            })
                            .catch(() => {});
                        return (await q`select count(*)::int c from pj`)[0].c;
                    });
                } catch (e) {
                    return e.message;
                }
                return (await s`select i from pj where i>=100`).map((r) => r.i);
            });
            await t('begin pipe', async () =>
                (
                    await s.begin((q) => [
                        q`select 1 as a`,
                        q`insert into pj(i) values(200) returning i`,
                        q`select 3 as a`,
                    ])
                ).map((r) => r[0]),
            );
            await t('begin err', async () => {
                try {
                    await s.begin((q) => [q`insert into pj(i) values(201)`, q`select 1/0`]);
                } catch (e) {
                    return [e.code, (await s`select count(*)::int c from pj where i=201`)[0].c];
                }
            });
            await t('cursor', async () => {
                let n = [];
                await s`select generate_series(1,25) x`.cursor(10, (r) => {
                    n.push(r.length);
                });
                return n;
            });
            await t('cursor early', async () => {
                let n = 0;
                await s`select generate_series(1,25) x`.cursor(10, (r) => {
                    n++;
                    return s.CLOSE;
                });
                return n;
            });
            await t('foreach', async () => {
                let n = 0;
                await s`select generate_series(1,25) x`.forEach((r) => {
                    n += r.x;
                });
                return n;
            });
            await t('listen', async () => {
                let got;
                const p = new Promise((r) => (got = r));
                const l = await s.listen('pjc', (x) => got(x));
                await s.notify('pjc', 'hello');
                const r = await p;
                await l.unlisten();
                return r;
            });
            await t('copy in', async () => {
                const w = await s`copy pj(i,v) from stdin`.writable();
                await new Promise((r, j) => {
                    w.on('finish', r);
                    w.on('error', j);
                    w.write('300\ta\n');
                    w.end('301\tb\n');
                });
                return (await s`select count(*)::int c from pj where i>=300`)[0].c;
            });
            await t('copy out', async () => {
                const r = await s`copy (select generate_series(1,1000)) to stdout`.readable();
                let n = 0;
                for await (const c of r) n += c.length;
                return n;
            });
            await t('simple multi', async () => (await s`select 1 as a; select 2 as b`.simple()).map((r) => r[0]));
            await t('describe', async () =>
                (await s`select i,v from pj where i=${1}`.describe()).columns.map((c) => c.name),
            );
            await t('error', async () => {
                try {
                    await s`select nope`;
                } catch (e) {
                    return [e.code, e.position];
                }
            });
            await t('cancel', async () => {
                const q = s`select pg_sleep(10)`;
                setTimeout(() => q.cancel(), 400);
                try {
                    await q;
                } catch (e) {
                    return e.code;
                }
            });
            await t('reserve', async () => {
                if (!s.reserve || max === 1) return;
                const r = await s.reserve();
                await r`set my.x='5'`;
                const v = (await r`select current_setting('my.x') v`)[0].v;
                r.release();
                return v;
            });
            await t('unsafe', async () => (await s.unsafe('select $1::int+1 x', [4]))[0]);
            await t('alter', async () => {
                await s`select * from pj limit 1`;
                await s`alter table pj add z int`;
                return (await s`select * from pj limit 1`).columns.length;
            });
            await s.end({ timeout: 3 });
        }
    const pool = new Pool({ ...o, max: 5 });
    await t('pg ryw', async () => {
        let bad = 0;
        await pool.query('drop table if exists pgx1');
        await pool.query('create table pgx1(w int,i int)');
        await Promise.all(
            [...Array(5)].map(async (_, w) => {
                const c = await pool.connect();
                for (let i = 0; i < 20; i++) {
                    await c.query({ name: 'i', text: 'insert into pgx1 values($1,$2)', values: [w, i] });
                    const r = await c.query({ name: 's', text: 'select max(i) m from pgx1 where w=$1', values: [w] });
                    if (r.rows[0].m !== i) bad++;
                }
                c.release();
            }),
        );
        return bad;
    });
    await t('pg cursor', async () => {
        const c = await pool.connect();
        const cu = c.query(new Cursor('select generate_series(1,100) x'));
        let n = 0,
            r;
        while ((r = await cu.read(30)).length) n += r.length;
        await cu.close();
        c.release();
        return n;
    });
    await t('pg cursor write between', async () => {
        const c = await pool.connect();
        await c.query('begin');
        const cu = c.query(new Cursor('select i from pgx1'));
        await cu.read(3);
        await cu.close();
        await c.query('insert into pgx1 values(9,9)');
        await c.query('commit');
        c.release();
        return (await pool.query('select count(*)::int c from pgx1 where w=9')).rows[0].c;
    });
    await t('pg stream destroy', async () => {
        const c = await pool.connect();
        const q = c.query(new QS('select generate_series(1,100000) x'));
        let n = 0;
        for await (const r of q) {
            if (++n > 10) break;
        }
        const r = await c.query('select 5 x');
        c.release();
        return [n, r.rows[0].x];
    });
    await t('pg query_timeout', async () => {
        const c = new Client({ ...o, query_timeout: 300 });
        await c.connect();
        try {
            await c.query('select pg_sleep(3)');
        } catch (e) {
            return e.message;
        } finally {
            c.end();
        }
    });
    await t('pg statement_timeout', async () => {
        const c = new Client({
            ...o,
            statement_timeout: 300,
            application_name: 'nn',
            idle_in_transaction_session_timeout: 1000,
        });
        await c.connect();
        try {
            await c.query('select pg_sleep(3)');
        } catch (e) {
            return [e.code, (await c.query('show statement_timeout')).rows[0]];
        } finally {
            await c.end();
        }
    });
    await pool.end();
})();
