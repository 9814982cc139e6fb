//! What users of PostgreSQL's best known extensions write: their reads are seen to be reads and answer alike on a primary
//! and its standby; what writes, locks or keeps state is never taken for one.

use std::time::Duration;

use highwater::classify::{Catalog, Classifier, Kind, Lexing, Lookup, Statement};
use highwater::config::{FunctionOverrides, LimitsConfig};

use crate::allow_lists::{Servers, are_installed, facts};
use crate::fixture::*;

fn classifier() -> Classifier {
    Classifier::new(&LimitsConfig {
        nodes: 16,
        unit_hold: 65_536,
        statement_text: 65_536,
        databases: 1,
        statements_per_session: 100,
        session_settings: 1024,
        class_cache: 1_000,
        parser_text: 16 * 1024,
        parser_deadline: Duration::from_secs(20),
        admin_connections: 0,
        statement_stats: 0,
    })
}

async fn is_read(classifier: &Classifier, catalog: &Catalog, text: &str) -> bool {
    let statement = Statement { text: text.as_bytes(), parameter_types: &[], catalog, lexing: Lexing::Utf8 };
    let class = match classifier.lookup(&statement) {
        Lookup::Known(class, _) => class,
        Lookup::Ask(question) => classifier.ask(question).await,
    };
    class.kind == Kind::Read
}

/// The texts that are not what they should be.
async fn misjudged<'a>(catalog: &Catalog, texts: &[&'a str], reads: bool) -> Vec<&'a str> {
    let (classifier, mut found) = (classifier(), Vec::new());
    for text in texts {
        if is_read(&classifier, catalog, text).await != reads {
            found.push(*text);
        }
    }
    found
}

const PLACES: &str = "CREATE TABLE cities (id serial PRIMARY KEY, name text, geom geometry(Point, 4326), geog geography(Point, 4326));
    INSERT INTO cities (name, geom, geog) SELECT 'c' || i, ST_SetSRID(ST_MakePoint(i % 90, i % 45), 4326),
        ST_SetSRID(ST_MakePoint(i % 90, i % 45), 4326)::geography FROM generate_series(1, 300) i;
    CREATE TABLE areas (id int PRIMARY KEY, name text, geom geometry(Polygon, 4326));
    INSERT INTO areas SELECT i, 'a' || i, ST_MakeEnvelope(i, i, i + 5, i + 5, 4326) FROM generate_series(1, 40) i;
    CREATE INDEX ON cities USING gist (geom); CREATE INDEX ON cities USING gist (geog); CREATE INDEX ON areas USING gist (geom);
    CREATE VIEW in_areas AS SELECT a.name AS area, c.* FROM areas a JOIN cities c ON ST_Contains(a.geom, c.geom);
    CREATE FUNCTION near(lon float8, lat float8) RETURNS SETOF cities LANGUAGE sql STABLE AS
        $$ SELECT * FROM cities WHERE ST_DWithin(geom, ST_SetSRID(ST_MakePoint(lon, lat), 4326), 1) ORDER BY id $$;
    ANALYZE cities";

const READS_OF_PLACES: &[&str] = &[
    "SELECT id, name FROM cities WHERE name = 'c7' AND id IN (1, 7) AND name LIKE 'c%' ORDER BY id",
    "SELECT name, ST_AsText(geom) FROM cities WHERE id = 3",
    "SELECT name, ST_X(geom), ST_Y(geom), ST_SRID(geom), ST_GeometryType(geom), GeometryType(geom) FROM cities ORDER BY id",
    "SELECT name FROM cities WHERE ST_DWithin(geom, ST_SetSRID(ST_MakePoint(3, 4), 4326), 2.5) ORDER BY id",
    "SELECT name FROM cities WHERE ST_DWithin(geog, ST_MakePoint(3, 4)::geography, 100000) ORDER BY id",
    "SELECT name, ST_Distance(geog, 'SRID=4326;POINT(3 4)'::geography) AS d FROM cities ORDER BY d, id LIMIT 5",
    "SELECT id, name FROM cities ORDER BY geom <-> ST_SetSRID(ST_Point(3, 4), 4326), id LIMIT 10",
    "SELECT id FROM cities ORDER BY geom <#> 'SRID=4326;POINT(3 4)', id LIMIT 10",
    "SELECT id FROM cities WHERE geom && ST_MakeEnvelope(0, 0, 10, 10, 4326) ORDER BY id",
    "SELECT id FROM cities WHERE geom @ ST_MakeEnvelope(0, 0, 10, 10, 4326) ORDER BY id",
    "SELECT id FROM areas WHERE geom ~ 'SRID=4326;POINT(3 4)'::geometry AND geom = geom AND geom ~= geom ORDER BY id",
    "SELECT a.name, count(*) FROM areas a JOIN cities c ON ST_Contains(a.geom, c.geom) GROUP BY a.name ORDER BY a.name",
    "SELECT a.id, b.id FROM areas a, areas b WHERE ST_Intersects(a.geom, b.geom) AND a.id < b.id ORDER BY 1, 2 LIMIT 9",
    "SELECT a.id FROM areas a WHERE EXISTS (SELECT 1 FROM cities c WHERE ST_Within(c.geom, a.geom)) ORDER BY a.id",
    "SELECT DISTINCT ON (a.id) a.id, c.id FROM areas a, cities c ORDER BY a.id, c.geom <-> ST_Centroid(a.geom), c.id",
    "SELECT c.id FROM areas a CROSS JOIN LATERAL (SELECT id FROM cities c ORDER BY c.geom <-> a.geom, id LIMIT 1) c WHERE a.id = 3",
    "SELECT ST_AsGeoJSON(geom)::json FROM cities WHERE id = 1",
    "SELECT jsonb_build_object('type', 'FeatureCollection', 'features', jsonb_agg(ST_AsGeoJSON(t.*)::json)) FROM
        (SELECT id, geom, name FROM cities ORDER BY id LIMIT 9) AS t",
    "WITH mvt AS (SELECT id, name, ST_AsMVTGeom(ST_Transform(geom, 3857), ST_TileEnvelope(3, 4, 3)) AS geom FROM cities
        WHERE geom && ST_Transform(ST_TileEnvelope(3, 4, 3, margin => (64.0 / 4096)), 4326) ORDER BY id)
        SELECT ST_AsMVT(mvt.*, 'cities') FROM mvt",
    "SELECT ST_AsBinary(geom), ST_AsEWKB(geom), ST_AsHEXEWKB(geom), ST_AsEWKT(geom), ST_AsKML(geom), ST_AsSVG(geom) FROM cities",
    "SELECT encode(ST_AsEWKB(geom), 'hex'), geom::bytea, geom::text FROM cities ORDER BY id LIMIT 5",
    "SELECT ST_Transform(geom, 3857) FROM cities WHERE id < 9 ORDER BY id",
    "SELECT ST_Area(ST_Transform(geom, 3857)), ST_Area(geom::geography), ST_Perimeter(geom) FROM areas ORDER BY id",
    "SELECT ST_Length('LINESTRING(0 0, 1 1)'::geometry), ST_Length('LINESTRING(0 0, 1 1)'::geography)",
    "SELECT ST_AsText(ST_Buffer(geom, 0.5)), ST_AsText(ST_Buffer(geom, 1, 'quad_segs=2')) FROM cities WHERE id < 3 ORDER BY id",
    "SELECT ST_AsText(ST_Union(geom)), ST_Extent(geom), ST_AsText(ST_Collect(geom)) FROM areas",
    "SELECT ST_AsText(ST_ConvexHull(ST_Collect(geom))) FROM cities",
    "SELECT ST_AsText((ST_Dump(ST_Union(geom))).geom) FROM areas",
    "SELECT ST_XMin(e), ST_YMax(e) FROM (SELECT ST_Extent(geom) AS e FROM cities) t",
    "SELECT ST_AsText(ST_Intersection(a.geom, b.geom)) FROM areas a, areas b WHERE a.id = 1 AND b.id = 3",
    "SELECT ST_AsText(ST_Difference(a.geom, b.geom)), ST_AsText(ST_SymDifference(a.geom, b.geom)) FROM areas a, areas b WHERE a.id = 1 AND b.id = 3",
    "SELECT ST_IsValid(geom), ST_IsValidReason(geom), ST_AsText(ST_MakeValid(geom)), ST_IsEmpty(geom) FROM areas ORDER BY id",
    "SELECT ST_AsText(ST_Simplify(geom, 0.1)), ST_NPoints(ST_SimplifyPreserveTopology(geom, 0.1)) FROM areas ORDER BY id",
    "SELECT ST_GeoHash(geom), ST_AsLatLonText(geom), ST_Azimuth(geom, 'SRID=4326;POINT(0 0)'::geometry) FROM cities ORDER BY id",
    "SELECT cid, count(*) FROM (SELECT ST_ClusterDBSCAN(geom, 2, 3) OVER (ORDER BY id) AS cid FROM cities) t GROUP BY cid ORDER BY 1",
    "SELECT ST_GeomFromText('POINT(1 2)', 4326), ST_GeomFromGeoJSON('{\"type\":\"Point\",\"coordinates\":[1,2]}')",
    "SELECT CAST('POINT(1 2)' AS geometry(Point, 4326)) IS NULL WHERE false",
    "SELECT ST_LineInterpolatePoint('LINESTRING(0 0, 1 1)', 0.5), ST_LineLocatePoint('LINESTRING(0 0, 1 1)', 'POINT(0.2 0.3)')",
    "SELECT area, name FROM in_areas ORDER BY area, id LIMIT 9",
    "SELECT name FROM near(3, 4)",
    "SELECT ST_HausdorffDistance(a.geom, b.geom), ST_Relate(a.geom, b.geom) FROM areas a, areas b WHERE a.id = 1 AND b.id = 3",
    "SELECT ST_Touches(a.geom, b.geom), ST_Crosses(a.geom, b.geom), ST_Overlaps(a.geom, b.geom), ST_Disjoint(a.geom, b.geom),
        ST_Covers(a.geom, b.geom), ST_CoveredBy(a.geom, b.geom), ST_Equals(a.geom, b.geom) FROM areas a, areas b WHERE a.id = 1 AND b.id = 3",
    "SELECT ST_EstimatedExtent('cities', 'geom')",
    "SELECT f_table_name, f_geometry_column, srid, type FROM geometry_columns ORDER BY 1, 2",
    "SELECT srtext FROM spatial_ref_sys WHERE srid = 4326",
    "SELECT ST_Distance_Sphere FROM (SELECT ST_DistanceSphere(geom, 'SRID=4326;POINT(0 0)') AS ST_Distance_Sphere FROM cities) t ORDER BY 1",
    "SELECT ST_AsText(ST_GeneratePoints(geom, 3, 7)) FROM areas WHERE id = 1",
    "SELECT ST_AsGML(geom), ST_AsX3D(geom), ST_AsTWKB(geom) FROM cities WHERE id = 1",
    // GeoDjango's.
    "SELECT \"cities\".\"id\", \"cities\".\"geom\"::bytea FROM \"cities\" WHERE ST_Intersects(\"cities\".\"geom\",
        ST_GeomFromEWKB('\\x0101000020E610000000000000000008400000000000001040'::bytea)) ORDER BY \"cities\".\"id\"",
];

const OTHERS_OF_PLACES: &[&str] = &[
    "SELECT AddGeometryColumn('cities', 'shape', 4326, 'POINT', 2)",
    "SELECT AddGeometryColumn('public', 'cities', 'shape', 4326, 'POINT', 2)",
    "SELECT DropGeometryColumn('cities', 'geom')",
    "SELECT DropGeometryTable('cities')",
    "SELECT UpdateGeometrySRID('cities', 'geom', 4326)",
    "SELECT Populate_Geometry_Columns()",
    "SELECT Populate_Geometry_Columns('cities'::regclass)",
    "SELECT postgis_extensions_upgrade()",
    "SELECT ST_FromFlatGeobufToTable('public', 'made', '\\x'::bytea)",
    "SELECT EnableLongTransactions()",
    "SELECT DisableLongTransactions()",
    "SELECT LockRow('cities', '1', 'me')",
    "SELECT LockRow('public', 'cities', '1', 'me', now()::timestamp + '1 h')",
    "SELECT UnlockRows('me')",
    "SELECT AddAuth('me')",
    "SELECT CheckAuth('cities', 'id')",
    "SELECT gettransactionid()",
    "SELECT ST_FindExtent('cities', 'geom')",
    "SELECT postgis_full_version()",
    "SELECT PostGIS_Version(), postgis_lib_version(), postgis_geos_version(), postgis_proj_version()",
    "SELECT _postgis_stats('cities', 'geom')",
    "SELECT ST_AsText(geom) FROM cities FOR UPDATE",
    "WITH moved AS (UPDATE cities SET geom = ST_Translate(geom, 1, 1) RETURNING id) SELECT count(*) FROM moved",
    "SELECT ST_Area(geom) INTO made FROM areas",
    "SELECT ST_Point(nextval('cities_id_seq'), 1)",
];

#[tokio::test]
async fn what_users_of_postgis_write_is_told_apart() {
    let cluster = Cluster::start(1).await;
    if !are_installed(&cluster, &["postgis"]).await {
        return;
    }
    cluster.set_up_as_superuser("CREATE EXTENSION postgis").await;
    cluster.set_up(PLACES).await;
    let catalog = facts(&cluster, FunctionOverrides::default()).await;
    assert_eq!(misjudged(&catalog, READS_OF_PLACES, true).await, [""; 0], "reads");
    assert_eq!(misjudged(&catalog, OTHERS_OF_PLACES, false).await, [""; 0], "not reads");
    let mut servers = Servers::of(&cluster).await;
    for text in READS_OF_PLACES {
        assert!(servers.compare(text).await, "{text} fails");
    }
    assert!(servers.wrong.is_empty(), "{}", servers.wrong.join("\n"));
}

const WITH_TOPOLOGY: &[&str] = &[
    "SELECT topology.CreateTopology('made', 4326)",
    "SELECT topology.DropTopology('made')",
    "SELECT topology.AddTopoGeometryColumn('made', 'public', 'cities', 'topo', 'POINT')",
    "SELECT topology.TopoGeo_AddPoint('made', 'POINT(1 2)'::geometry)",
    "SELECT topology.ST_AddIsoNode('made', 0, 'POINT(1 2)')",
    "SELECT topology.toTopoGeom('POINT(1 2)'::geometry, 'made', 1)",
    "SELECT topology.ValidateTopology('made')",
    "SELECT topology.GetNodeByPoint('made', 'POINT(1 2)'::geometry, 0)",
    "SELECT topology.CopyTopology('made', 'other')",
    "SELECT AddRasterConstraints('public', 'cities', 'rast')",
    "SELECT ST_MapAlgebra(ST_MakeEmptyRaster(1, 1, 0, 0, 1), '8BUI', 'random()')",
    "SELECT ST_CreateOverview('cities'::regclass, 'rast', 2)",
    "SELECT * FROM pgr_dijkstra('SELECT nextval(''cities_id_seq'') AS id, 1 AS source, 2 AS target, 1 AS cost', 1, 2)",
    "SELECT pgr_createTopology('cities', 0.1, 'geom')",
    "SELECT * FROM standardize_address('us_lex', 'us_gaz', 'us_rules', '1 Main St')",
];

/// What the topology functions that share a name with others are, for an operator who knows that they only read.
const VOUCHED: &[&str] = &[
    "topology.geometry",
    "topology.geometrytype",
    "topology.st_geometrytype",
    "topology.st_simplify",
    "topology.st_srid",
    "topology.equals",
];

/// Reads that need no name which an extension that is not known has, too.
const WITHOUT_SHARED_NAMES: &[&str] = &[
    "SELECT id, name FROM cities WHERE name = 'c7' AND id IN (1, 7) AND name LIKE 'c%' ORDER BY id",
    "SELECT id, geom FROM cities WHERE geom && ST_MakeEnvelope(0, 0, 10, 10, 4326) ORDER BY id",
    "SELECT id, geom FROM cities ORDER BY geom <-> 'SRID=4326;POINT(3 4)', id LIMIT 10",
];

#[tokio::test]
async fn extensions_that_nobody_vouches_for_leave_postgis_its_reads() {
    let cluster = Cluster::start(0).await;
    let all = ["postgis", "postgis_topology", "postgis_raster", "pgrouting", "address_standardizer"];
    if !are_installed(&cluster, &all).await {
        return;
    }
    for extension in &all[..2] {
        cluster.set_up_as_superuser(&format!("CREATE EXTENSION {extension}")).await;
    }
    cluster.set_up(PLACES).await;
    let catalog = facts(&cluster, FunctionOverrides::default()).await;
    assert_eq!(misjudged(&catalog, WITHOUT_SHARED_NAMES, true).await, [""; 0]);
    // PostGIS's own functions name those that they call with their schema.
    let kept_back = misjudged(&catalog, READS_OF_PLACES, true).await;
    let shared = ["ST_GeometryType(", "ST_Simplify("];
    assert!(
        kept_back.len() == 2 && kept_back.iter().zip(shared).all(|(text, name)| text.contains(name)),
        "{kept_back:#?}"
    );
    let safe = VOUCHED.iter().map(|name| (*name).to_owned()).collect();
    let vouched = facts(&cluster, FunctionOverrides { safe, ..FunctionOverrides::default() }).await;
    assert_eq!(misjudged(&vouched, READS_OF_PLACES, true).await, [""; 0]);
    for extension in &all[2..] {
        cluster.set_up_as_superuser(&format!("CREATE EXTENSION {extension}")).await;
    }
    let catalog = facts(&cluster, FunctionOverrides::default()).await;
    assert_eq!(misjudged(&catalog, WITHOUT_SHARED_NAMES, true).await, [""; 0]);
    assert_eq!(misjudged(&catalog, OTHERS_OF_PLACES, false).await, [""; 0]);
    assert_eq!(misjudged(&catalog, WITH_TOPOLOGY, false).await, [""; 0]);
}

#[tokio::test]
async fn what_extensions_show_of_the_server_or_change_in_it_runs_on_the_primary() {
    let cluster = Cluster::start(0).await;
    let all = [
        "pg_stat_statements",
        "pg_buffercache",
        "pg_prewarm",
        "pgstattuple",
        "pgrowlocks",
        "lo",
        "dblink",
        "xml2",
    ];
    if !are_installed(&cluster, &all).await {
        return;
    }
    for extension in all {
        cluster.set_up_as_superuser(&format!("CREATE EXTENSION {extension}")).await;
    }
    let catalog = facts(&cluster, FunctionOverrides::default()).await;
    let texts = [
        "SELECT pg_stat_statements_reset()",
        "SELECT query, calls FROM pg_stat_statements",
        "SELECT * FROM pg_stat_statements_info",
        "SELECT count(*) FROM pg_buffercache",
        "SELECT pg_prewarm('pg_class')",
        "SELECT autoprewarm_dump_now()",
        "SELECT * FROM pgstattuple('pg_class')",
        "SELECT * FROM pgrowlocks('pg_class')",
        "SELECT dblink_exec('dbname=nowhere', 'DELETE FROM t')",
        "SELECT lo_oid(lo_creat(-1))",
        "SELECT * FROM xpath_table('id', 'x', 't', '/a', 'true') AS t (a int, b text)",
    ];
    assert_eq!(misjudged(&catalog, &texts, false).await, [""; 0]);
}

const ITEMS: &str = "CREATE TABLE items (id serial PRIMARY KEY, body text, embedding vector(3), half halfvec(3));
    INSERT INTO items (body, embedding, half) SELECT 'b' || i, ARRAY[i, i % 7, 1]::vector, ARRAY[i, i % 7, 1]::halfvec
        FROM generate_series(1, 300) i;
    CREATE INDEX ON items USING hnsw (embedding vector_l2_ops); CREATE INDEX ON items USING hnsw (embedding vector_cosine_ops)";

const READS_OF_ITEMS: &[&str] = &[
    "SELECT id, body FROM items WHERE id IN (1, 2) AND body = 'b1' ORDER BY id",
    "SELECT id, embedding FROM items ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id, embedding <=> '[3,1,2]' AS distance FROM items ORDER BY distance LIMIT 5",
    "SELECT id, (embedding <#> '[3,1,2]') * -1 AS inner_product FROM items ORDER BY id LIMIT 9",
    "SELECT id, 1 - (embedding <=> '[3,1,2]'::vector) AS similarity FROM items ORDER BY embedding <=> '[3,1,2]'::vector LIMIT 5",
    "SELECT id FROM items WHERE embedding <-> '[3,1,2]' < 5 ORDER BY id",
    "SELECT id FROM items WHERE id <> 1 ORDER BY embedding <-> (SELECT embedding FROM items WHERE id = 1) LIMIT 5",
    "SELECT avg(embedding), sum(embedding) FROM items",
    "SELECT id % 3, avg(embedding) FROM items GROUP BY 1 ORDER BY 1",
    "SELECT id FROM items ORDER BY embedding <+> '[3,1,2]', id LIMIT 5",
    "SELECT cosine_distance(embedding, '[1,2,3]'), l2_distance(embedding, '[1,2,3]'), inner_product(embedding, '[1,2,3]'),
        l1_distance(embedding, '[1,2,3]'), vector_dims(embedding), vector_norm(embedding) FROM items ORDER BY id LIMIT 9",
    "SELECT l2_normalize(embedding), subvector(embedding, 1, 2), binary_quantize(embedding) FROM items ORDER BY id LIMIT 9",
    "SELECT half, half::vector, embedding::real[] FROM items ORDER BY half <-> '[1,2,3]', id LIMIT 9",
    "SELECT embedding + '[1,1,1]', embedding * '[2,2,2]' FROM items ORDER BY id LIMIT 9",
    "WITH near AS MATERIALIZED (SELECT id, embedding <-> '[3,1,2]' AS d FROM items ORDER BY d LIMIT 20)
        SELECT * FROM near WHERE d < 9 ORDER BY d, id",
];

#[tokio::test]
async fn what_users_of_pgvector_write_is_told_apart() {
    let cluster = Cluster::start(1).await;
    if !are_installed(&cluster, &["vector"]).await {
        return;
    }
    cluster.set_up_as_superuser("CREATE EXTENSION vector").await;
    cluster.set_up(ITEMS).await;
    let catalog = facts(&cluster, FunctionOverrides::default()).await;
    assert_eq!(misjudged(&catalog, READS_OF_ITEMS, true).await, [""; 0], "reads");
    let others = [
        "SELECT id FROM items ORDER BY embedding <-> '[3,1,2]' LIMIT 5 FOR UPDATE",
        "WITH found AS (UPDATE items SET body = 'x' WHERE embedding <-> '[3,1,2]' < 5 RETURNING id) SELECT * FROM found",
        "SELECT avg(embedding) INTO averages FROM items",
        "SELECT setval('items_id_seq', 1), '[1,2,3]'::vector",
    ];
    assert_eq!(misjudged(&catalog, &others, false).await, [""; 0], "not reads");
    let mut servers = Servers::of(&cluster).await;
    for text in READS_OF_ITEMS {
        assert!(servers.compare(text).await, "{text} fails");
    }
    assert!(servers.wrong.is_empty(), "{}", servers.wrong.join("\n"));
}
