//! What is allowed on replicas by its name alone, called: each function on the list of built-in ones, and each
//! compiled function of the known extensions, gives the same rows or the same error on a primary and on its standby, with
//! arguments made from its declaration; takes no lock, draws no transaction id, changes no setting. What cannot be
//! called so is listed with the reason.

use std::collections::{BTreeMap, BTreeSet};

use highwater::classify::Catalog;
use highwater::config::FunctionOverrides;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::fixture::*;

/// Two values of each type.
const VALUES: &[(&str, &str, &str)] = &[
    ("\"any\"", "1::int4", "2::int4"),
    ("\"char\"", "'a'::\"char\"", "'b'::\"char\""),
    ("aclitem", "'=r/app'::aclitem", "'app=rw/app'::aclitem"),
    ("anycompatible", "1::int4", "2::int4"),
    ("anycompatiblearray", "'{1,2}'::int4[]", "'{3}'::int4[]"),
    ("anycompatiblemultirange", "'{[1,5)}'::int4multirange", "'{[4,9)}'::int4multirange"),
    ("anycompatiblenonarray", "1::int4", "2::int4"),
    ("anycompatiblerange", "'[1,5)'::int4range", "'[4,9)'::int4range"),
    ("anyelement", "1::int4", "2::int4"),
    ("anyarray", "'{1,2}'::int4[]", "'{3}'::int4[]"),
    ("anyenum", "'sad'::mood", "'happy'::mood"),
    ("anymultirange", "'{[1,5)}'::int4multirange", "'{[4,9)}'::int4multirange"),
    ("anynonarray", "1::int4", "2::int4"),
    ("anyrange", "'[1,5)'::int4range", "'[4,9)'::int4range"),
    ("bigint", "1::int8", "3::int8"),
    ("bit", "B'10101'", "B'01100'"),
    ("bit varying", "B'10101'::varbit", "B'011'::varbit"),
    ("boolean", "true", "false"),
    ("box", "'((0,0),(1,1))'::box", "'((1,1),(3,3))'::box"),
    ("bytea", "'\\x6162'::bytea", "'\\x63646566'::bytea"),
    ("character", "'ab'::bpchar", "'b '::bpchar"),
    ("character varying", "'ab'::varchar", "'b'::varchar"),
    ("cid", "'1'::cid", "'2'::cid"),
    ("cidr", "'10.0.0.0/8'::cidr", "'10.1.0.0/16'::cidr"),
    ("circle", "'<(0,0),1>'::circle", "'<(1,1),2>'::circle"),
    ("cstring", "'1'::cstring", "'a'::cstring"),
    ("date", "'2024-02-29'::date", "'2020-01-31'::date"),
    ("daterange", "'[2020-01-01,2020-02-01)'::daterange", "'[2020-01-15,)'::daterange"),
    ("double precision", "0.5::float8", "2::float8"),
    ("inet", "'10.1.2.3/8'::inet", "'10.1.2.4'::inet"),
    ("int2vector", "'1 2'::int2vector", "'3'::int2vector"),
    ("integer", "1::int4", "2::int4"),
    ("interval", "'1 day 2 hours'::interval", "'40 days'::interval"),
    ("json", "'{\"a\": [1, null], \"b\": \"x\"}'::json", "'[{\"a\": 1}, 2]'::json"),
    ("jsonb", "'{\"a\": [1, null], \"b\": \"x\"}'::jsonb", "'[{\"a\": 1}, 2]'::jsonb"),
    ("jsonpath", "'$.a[*]'::jsonpath", "'$.a[0] == 1'::jsonpath"),
    ("int4range", "'[1,5)'::int4range", "'[4,9)'::int4range"),
    ("int8range", "'[1,5)'::int8range", "'[4,9)'::int8range"),
    ("line", "'{1,2,3}'::line", "'{0,-1,1}'::line"),
    ("lseg", "'[(0,0),(1,1)]'::lseg", "'[(0,1),(1,0)]'::lseg"),
    ("macaddr", "'08:00:2b:01:02:03'::macaddr", "'08:00:2b:01:02:04'::macaddr"),
    ("macaddr8", "'08:00:2b:01:02:03:04:05'::macaddr8", "'08:00:2b:01:02:03:04:06'::macaddr8"),
    ("money", "'12.34'::money", "'1'::money"),
    ("name", "'plain'::name", "'utf8'::name"),
    ("numeric", "1.50::numeric", "3::numeric"),
    ("numrange", "'[1,5)'::numrange", "'[4,9)'::numrange"),
    ("oid", "'plain'::regclass::oid", "'23'::oid"),
    ("oidvector", "'23 25'::oidvector", "'20'::oidvector"),
    ("path", "'[(0,0),(1,1),(2,0)]'::path", "'((0,0),(1,1),(2,0))'::path"),
    ("pg_lsn", "'0/16B3748'::pg_lsn", "'1/0'::pg_lsn"),
    ("pg_snapshot", "'10:20:10,14'::pg_snapshot", "'11:12:'::pg_snapshot"),
    ("point", "'(0,1)'::point", "'(2,3)'::point"),
    ("polygon", "'((0,0),(1,1),(2,0))'::polygon", "'((1,0),(2,2),(3,0))'::polygon"),
    ("real", "0.5::float4", "2::float4"),
    ("record", "ROW(1, 'a'::text)", "ROW(2, 'b'::text)"),
    ("refcursor", "'c'::refcursor", "'d'::refcursor"),
    ("regclass", "'plain'::regclass", "'pg_class'::regclass"),
    ("regcollation", "'\"C\"'::regcollation", "'\"POSIX\"'::regcollation"),
    ("regconfig", "'simple'::regconfig", "'english'::regconfig"),
    ("regdictionary", "'simple'::regdictionary", "'english_stem'::regdictionary"),
    ("regnamespace", "'public'::regnamespace", "'pg_catalog'::regnamespace"),
    ("regoper", "'||/'::regoper", "'|/'::regoper"),
    ("regoperator", "'+(int4,int4)'::regoperator", "'=(text,text)'::regoperator"),
    ("regproc", "'now'::regproc", "'array_fill'::regproc"),
    ("regprocedure", "'now()'::regprocedure", "'abs(int4)'::regprocedure"),
    ("regrole", "'app'::regrole", "'pg_monitor'::regrole"),
    ("regtype", "'int4'::regtype", "'mood'::regtype"),
    ("smallint", "1::int2", "2::int2"),
    ("text", "'1'::text", "'plain'::text"),
    ("tid", "'(0,1)'::tid", "'(0,2)'::tid"),
    ("time with time zone", "'12:34:56+02'::timetz", "'01:00+00'::timetz"),
    ("time without time zone", "'12:34:56'::time", "'01:00'::time"),
    (
        "timestamp with time zone",
        "'2024-02-29 12:00+00'::timestamptz",
        "'2020-01-31 01:02:03+00'::timestamptz",
    ),
    ("timestamp without time zone", "'2024-02-29 12:00'::timestamp", "'2020-01-31 01:02:03'::timestamp"),
    ("tsquery", "'a & b'::tsquery", "'b | !c'::tsquery"),
    ("tsrange", "'[2020-01-01,2020-02-01)'::tsrange", "'[2020-01-15,)'::tsrange"),
    (
        "tstzrange",
        "'[2020-01-01 00:00+00,2020-02-01 00:00+00)'::tstzrange",
        "'[2020-01-15 00:00+00,)'::tstzrange",
    ),
    ("tsvector", "'a:1A b:2'::tsvector", "'b:1 c'::tsvector"),
    ("txid_snapshot", "'10:20:10,14'::txid_snapshot", "'11:12:'::txid_snapshot"),
    ("unknown", "'x'", "'y'"),
    ("uuid", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid", "'00000000-0000-4000-8000-000000000001'::uuid"),
    ("xid", "'3'::xid", "'4'::xid"),
    ("xid8", "'3'::xid8", "'4'::xid8"),
    ("xml", "'<a>1</a>'::xml", "'<b x=\"2\"/>'::xml"),
    // Of extensions.
    ("citext", "'Ab'::citext", "'b'::citext"),
    ("cube", "'(0,0),(1,1)'::cube", "'(1,2)'::cube"),
    ("earth", "ll_to_earth(1, 2)", "ll_to_earth(3, 4)"),
    ("hstore", "'a=>1,b=>NULL'::hstore", "'b=>2'::hstore"),
    ("ltree", "'a.b.c'::ltree", "'a.b'::ltree"),
    ("lquery", "'a.*'::lquery", "'*.b'::lquery"),
    ("ltxtquery", "'a & b'::ltxtquery", "'c'::ltxtquery"),
    ("query_int", "'1 & 2'::query_int", "'!3'::query_int"),
    ("seg", "'1.0 .. 2.0'::seg", "'1.5'::seg"),
    ("ean13", "'978-0-393-04002-9'::ean13", "'978-0-11-000533-4'::ean13"),
    ("isbn", "'0-393-04002-X'::isbn", "'0-11-000533-3'::isbn"),
    ("isbn13", "'978-0-393-04002-9'::isbn13", "'978-0-11-000533-4'::isbn13"),
    ("ismn", "'M-060-11561-5'::ismn", "'M-060-11561-5'::ismn"),
    ("ismn13", "'979-0-060-11561-5'::ismn13", "'979-0-060-11561-5'::ismn13"),
    ("issn", "'1436-4522'::issn", "'0317-8471'::issn"),
    ("issn13", "'977-1436-452-00-8'::issn13", "'977-0317-847-00-1'::issn13"),
    ("upc", "'220356483481'::upc", "'220356483481'::upc"),
    ("geometry", "'LINESTRING(0 0, 3 1, 2 2)'::geometry", "'POLYGON((1 0, 3 0, 3 3, 1 0))'::geometry"),
    ("geography", "'LINESTRING(0 0, 3 1, 2 2)'::geography", "'POINT(1 2)'::geography"),
    ("box2d", "'BOX(0 0,2 2)'::box2d", "'BOX(1 1,3 3)'::box2d"),
    ("box3d", "'BOX3D(0 0 0,2 2 2)'::box3d", "'BOX3D(1 1 1,3 3 3)'::box3d"),
    (
        "spheroid",
        "'SPHEROID[\"WGS84\",6378137,298.25]'::spheroid",
        "'SPHEROID[\"X\",6377397,299.15]'::spheroid",
    ),
    ("raster", "ST_MakeEmptyRaster(2, 3, 0, 0, 1)", "ST_MakeEmptyRaster(4, 4, 1, 1, 0.5, 0.5, 0, 0, 4326)"),
    ("vector", "'[1,2,3]'::vector", "'[4,5,6.5]'::vector"),
    ("halfvec", "'[1,2,3]'::halfvec", "'[4,5,6.5]'::halfvec"),
    ("sparsevec", "'{1:1,3:2}/3'::sparsevec", "'{2:1.5}/3'::sparsevec"),
];

/// Arguments for those that make sense of few: by name.
const ARGUMENTS: &[(&str, &str)] = &[
    ("acldefault", "'r', 'app'::regrole"),
    ("bittypmodin", "'{5}'::cstring[]"),
    ("bpchartypmodin", "'{5}'::cstring[]"),
    ("varbittypmodin", "'{5}'::cstring[]"),
    ("varchartypmodin", "'{5}'::cstring[]"),
    ("intervaltypmodin", "'{32767,3}'::cstring[]"),
    ("timestamptypmodin", "'{3}'::cstring[]"),
    ("timestamptztypmodin", "'{3}'::cstring[]"),
    ("timetypmodin", "'{3}'::cstring[]"),
    ("timetztypmodin", "'{3}'::cstring[]"),
    ("float8_avg", "'{1,2,3}'::float8[]"),
    ("float8_stddev_pop", "'{4,2,3}'::float8[]"),
    ("float8_stddev_samp", "'{4,2,3}'::float8[]"),
    ("float8_var_pop", "'{4,2,3}'::float8[]"),
    ("float8_var_samp", "'{4,2,3}'::float8[]"),
    ("float8_corr", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_covar_pop", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_covar_samp", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_avgx", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_avgy", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_intercept", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_r2", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_slope", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_sxx", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_sxy", "'{4,1,2,3,4,5}'::float8[]"),
    ("float8_regr_syy", "'{4,1,2,3,4,5}'::float8[]"),
    ("has_any_column_privilege", "'plain', 'select'"),
    ("has_column_privilege", "'plain', 'id', 'select'"),
    ("has_database_privilege", "current_database(), 'connect'"),
    ("has_foreign_data_wrapper_privilege", "(SELECT max(oid) FROM pg_foreign_data_wrapper), 'usage'"),
    ("has_function_privilege", "'now()', 'execute'"),
    ("has_language_privilege", "'sql', 'usage'"),
    ("has_parameter_privilege", "'work_mem', 'set'"),
    ("has_schema_privilege", "'public', 'usage'"),
    ("has_sequence_privilege", "'serials_id_seq', 'usage'"),
    ("has_server_privilege", "(SELECT max(oid) FROM pg_foreign_server), 'usage'"),
    ("has_table_privilege", "'plain', 'select'"),
    ("has_tablespace_privilege", "'pg_default', 'create'"),
    ("has_type_privilege", "'mood', 'usage'"),
    ("is_normalized", "'a', 'NFC'"),
    ("normalize", "'a', 'NFC'"),
    ("json_to_tsvector", "'{\"a\": \"b\"}'::json, '\"all\"'::jsonb"),
    ("jsonb_to_tsvector", "'{\"a\": \"b\"}'::jsonb, '\"all\"'::jsonb"),
    ("macaddr", "'08:00:2b:ff:fe:02:03:04'::macaddr8"),
    ("makeaclitem", "'app'::regrole, 'app'::regrole, 'SELECT', false"),
    ("pg_collation_for", "'a'::text"),
    ("pg_describe_object", "'pg_class'::regclass, 'plain'::regclass, 0"),
    ("pg_has_role", "'app', 'usage'"),
    ("pg_identify_object", "'pg_class'::regclass, 'plain'::regclass, 0"),
    ("pg_identify_object_as_address", "'pg_class'::regclass, 'plain'::regclass, 0"),
    ("postgresql_fdw_validator", "'{host=x}'::text[], 'pg_foreign_server'::regclass"),
    ("satisfies_hash_partition", "'hashed'::regclass, 2, 0, 1"),
    ("to_ascii", "'abc', 'latin1'"),
    ("to_regoperator", "'+(int4,int4)'"),
    ("to_regprocedure", "'now()'"),
    ("ts_parse", "'default', 'a b'"),
    ("ts_token_type", "'default'"),
    ("array_fill", "7, ARRAY[2]"),
    ("convert", "'\\x6162'::bytea, 'utf8', 'latin1'"),
    ("convert_from", "'\\x6162'::bytea, 'utf8'"),
    ("convert_to", "'ab', 'utf8'"),
    ("date_bin", "'1 hour', timestamptz '2024-02-29 12:34+00', timestamptz '2020-01-01 00:00+00'"),
    ("date_part", "'year', timestamp '2024-02-29'"),
    ("date_trunc", "'day', timestamptz '2024-02-29 12:34+00', 'Europe/Berlin'"),
    ("decode", "'6162', 'hex'"),
    ("encode", "'\\x6162'::bytea, 'hex'"),
    ("extract", "'year', timestamp '2024-02-29'"),
    ("float8_accum", "'{1,2,3}'::float8[], 2"),
    ("float8_combine", "'{1,2,3}'::float8[], '{2,3,4}'::float8[]"),
    ("float8_regr_accum", "'{1,2,3,4,5,6}'::float8[], 1, 2"),
    ("float8_regr_combine", "'{1,2,3,4,5,6}'::float8[], '{2,3,4,5,6,7}'::float8[]"),
    (
        "generate_series",
        "timestamptz '2024-01-01 00:00+00', timestamptz '2024-01-03 00:00+00', interval '1 day'",
    ),
    ("json_populate_record", "NULL::plain, '{\"id\": 1}'::json"),
    ("json_populate_recordset", "NULL::plain, '[{\"id\": 1}]'::json"),
    ("jsonb_populate_record", "NULL::plain, '{\"id\": 1}'::jsonb"),
    ("jsonb_populate_recordset", "NULL::plain, '[{\"id\": 1}]'::jsonb"),
    ("make_date", "2024, 2, 29"),
    ("make_timestamp", "2024, 2, 29, 1, 2, 3.5"),
    ("make_timestamptz", "2024, 2, 29, 1, 2, 3.5, 'UTC'"),
    ("pg_get_object_address", "'table', '{plain}', '{}'"),
    ("pg_get_serial_sequence", "'serials', 'id'"),
    ("pg_size_bytes", "'1 MB'"),
    ("timezone", "'Europe/Berlin', timestamptz '2024-02-29 12:34+00'"),
    ("to_date", "'2024-02-29', 'YYYY-MM-DD'"),
    ("to_number", "'12.5', '99D9'"),
    ("xpath", "'/a', '<a>1</a>'::xml"),
];

/// The same for functions of extensions: names, arguments.
const OF_EXTENSIONS: &[(&str, &str)] = &[
    ("hstore_in", "'a=>1'::cstring"),
    ("populate_record", "NULL::plain, 'id=>1'::hstore"),
    ("ean13_in", "'978-0-393-04002-9'::cstring"),
    ("isbn13_in", "'978-0-393-04002-9'::cstring"),
    ("isbn_in", "'0-393-04002-X'::cstring"),
    ("ismn_in", "'M-060-11561-5'::cstring"),
    ("ismn13_in", "'979-0-060-11561-5'::cstring"),
    ("issn_in", "'1436-4522'::cstring"),
    ("issn13_in", "'977-1436-452-00-8'::cstring"),
    ("upc_in", "'220356483481'::cstring"),
    ("ismn", "'979-0-060-11561-5'::ean13"),
    ("ismn13", "'979-0-060-11561-5'::ean13"),
    ("issn", "'977-1436-452-00-8'::ean13"),
    ("issn13", "'977-1436-452-00-8'::ean13"),
    ("upc", "'0220356483481'::ean13"),
    ("digest", "'a'::text, 'sha256'"),
    ("hmac", "'a'::text, 'k', 'md5'"),
    ("encrypt", "'a'::bytea, 'k'::bytea, 'aes'"),
    ("encrypt_iv", "'a'::bytea, 'k'::bytea, 'i'::bytea, 'aes'"),
    ("decrypt", "encrypt('a'::bytea, 'k'::bytea, 'aes'), 'k'::bytea, 'aes'"),
    ("decrypt_iv", "encrypt_iv('a'::bytea, 'k'::bytea, 'i'::bytea, 'aes'), 'k'::bytea, 'i'::bytea, 'aes'"),
    ("dearmor", "armor('a'::bytea)"),
    ("pgp_armor_headers", "armor('a'::bytea)"),
    ("pgp_key_id", "pgp_sym_encrypt('a', 'k')"),
    ("pgp_sym_decrypt", "pgp_sym_encrypt('a', 'k'), 'k'"),
    ("pgp_sym_decrypt_bytea", "pgp_sym_encrypt_bytea('a'::bytea, 'k'), 'k'"),
    ("vector vector_to_halfvec vector_to_sparsevec", "'[1,2,3]'::vector, 3, false"),
    ("halfvec halfvec_to_vector halfvec_to_sparsevec", "'[1,2,3]'::halfvec, 3, false"),
    ("sparsevec sparsevec_to_vector sparsevec_to_halfvec", "'{1:1}/3'::sparsevec, 3, false"),
    ("vector_accum", "'{1,1,2,3}'::float8[], '[1,2,3]'::vector"),
    ("halfvec_accum", "'{1,1,2,3}'::float8[], '[1,2,3]'::halfvec"),
    ("vector_in halfvec_in", "'[1,2,3]'::cstring, 0, 3"),
    ("sparsevec_in", "'{1:1}/3'::cstring, 0, 3"),
    ("vector_typmod_in halfvec_typmod_in sparsevec_typmod_in", "'{3}'::cstring[]"),
    ("st_transformpipeline st_inversetransformpipeline", "'POINT(1 2)'::geometry, '+proj=merc'"),
    ("postgis_transform_pipeline_geometry", "'POINT(1 2)'::geometry, '+proj=merc', true, 3857"),
    ("cg_visibility", "'POLYGON((0 0, 4 0, 4 4, 0 4, 0 0))'::geometry, 'POINT(2 2)'::geometry"),
    ("find_srid", "'public', 'places', 'p'"),
    ("_st_asx3d", "3, 'POINT(1 2 3)'::geometry, 5, 0, ''"),
    ("_st_geomfromgml", "'<gml:Point><gml:coordinates>1,2</gml:coordinates></gml:Point>', 0"),
    ("st_geomfromgml st_gmltosql", "'<gml:Point><gml:coordinates>1,2</gml:coordinates></gml:Point>'"),
    ("box2d_in", "'BOX(0 0,1 1)'::cstring"),
    ("box3d_in", "'BOX3D(0 0 0,1 1 1)'::cstring"),
    ("spheroid_in", "'SPHEROID[\"WGS84\",6378137,298.25]'::cstring"),
    ("geometry_in", "'POINT(1 2)'::cstring"),
    ("raster_in", "ST_MakeEmptyRaster(2, 3, 0, 0, 1)::text::cstring"),
    ("geography_in", "'POINT(1 2)'::cstring, 0, -1"),
    ("geometry_typmod_in geography_typmod_in", "'{Point,4326}'::cstring[]"),
    (
        "geometry_distance_cpa st_closestpointofapproach st_distancecpa",
        "'LINESTRING M(0 0 1, 3 3 2)'::geometry, 'LINESTRING M(3 0 1, 0 3 2)'::geometry",
    ),
    ("st_cpawithin", "'LINESTRING M(0 0 1, 3 3 2)'::geometry, 'LINESTRING M(3 0 1, 0 3 2)'::geometry, 2"),
    (
        "geomfromewkb st_geomfromewkb st_geomfromwkb st_geogfromwkb st_wkbtosql st_pointfromwkb",
        "ST_AsEWKB('POINT(1 2)'::geometry)",
    ),
    (
        "geomfromewkt st_geomfromewkt st_geogfromtext st_geographyfromtext st_geometryfromtext st_geomfromtext st_wkttosql \
         st_pointfromtext",
        "'POINT(1 2)'",
    ),
    ("point st_x st_y", "'POINT(1 2)'::geometry"),
    ("st_z st_m", "'POINT(1 2 3 4)'::geometry"),
    ("postgis_transform_geometry", "'POINT(1 2)'::geometry, '+proj=longlat', '+proj=merc', 0"),
    ("st_transform", "'SRID=4326;POINT(1 2)'::geometry, 3857"),
    ("st_3dmakebox", "'POINT(1 2 3)'::geometry, 'POINT(3 4 5)'::geometry"),
    ("st_makebox2d", "'POINT(1 2)'::geometry, 'POINT(3 4)'::geometry"),
    ("st_addpoint", "'LINESTRING(0 0, 1 1)'::geometry, 'POINT(1 2)'::geometry"),
    ("st_setpoint", "'LINESTRING(0 0, 1 1)'::geometry, 1, 'POINT(1 2)'::geometry"),
    ("st_asencodedpolyline", "'SRID=4326;LINESTRING(0 0, 1 1)'::geometry"),
    ("st_aslatlontext st_geometricmedian", "'POINT(1 2)'::geometry"),
    ("st_asmarc21", "'SRID=4326;POINT(1 2)'::geometry"),
    ("st_geomfrommarc21", "ST_AsMARC21('SRID=4326;POINT(1 2)'::geometry)"),
    ("st_bdpolyfromtext st_bdmpolyfromtext", "'MULTILINESTRING((0 0, 1 0, 1 1, 0 0))', 4326"),
    ("st_estimatedextent", "'places', 'p'"),
    ("st_geomcollfromtext", "'GEOMETRYCOLLECTION(POINT(1 2))'"),
    ("st_geomcollfromwkb", "ST_AsBinary('GEOMETRYCOLLECTION(POINT(1 2))'::geometry)"),
    ("st_geomfromgeojson", "'{\"type\": \"Point\", \"coordinates\": [1, 2]}'"),
    ("st_geomfromkml", "'<Point><coordinates>1,2</coordinates></Point>'"),
    ("st_geomfromtwkb", "ST_AsTWKB('POINT(1 2)'::geometry)"),
    ("st_hexagon st_square", "1.5, 0, 0"),
    ("st_interpolatepoint", "'LINESTRING M(0 0 0, 4 4 4)'::geometry, 'POINT(1 2)'::geometry"),
    ("st_linelocatepoint", "'LINESTRING(0 0, 4 4)'::geometry, 'POINT(1 2)'::geometry"),
    ("st_locatealong", "'LINESTRING M(0 0 0, 4 4 4)'::geometry, 2"),
    ("st_locatebetween", "'LINESTRING M(0 0 0, 4 4 4)'::geometry, 1, 2"),
    ("st_locatebetweenelevations", "'LINESTRING(0 0 0, 4 4 4)'::geometry, 1, 2"),
    ("st_linefrommultipoint", "'MULTIPOINT(0 0, 1 1)'::geometry"),
    ("st_linefromtext", "'LINESTRING(0 0, 1 1)'"),
    ("st_linefromwkb st_linestringfromwkb", "ST_AsBinary('LINESTRING(0 0, 1 1)'::geometry)"),
    ("st_makepolygon", "'LINESTRING(0 0, 1 1, 1 0, 0 0)'::geometry"),
    ("st_polygon", "'LINESTRING(0 0, 1 1, 1 0, 0 0)'::geometry, 4326"),
    ("st_mlinefromtext st_multilinestringfromtext", "'MULTILINESTRING((0 0, 1 1))'"),
    ("st_mlinefromwkb st_multilinefromwkb", "ST_AsBinary('MULTILINESTRING((0 0, 1 1))'::geometry)"),
    ("st_mpointfromtext st_multipointfromtext", "'MULTIPOINT(0 0, 1 1)'"),
    ("st_mpointfromwkb st_multipointfromwkb", "ST_AsBinary('MULTIPOINT(0 0, 1 1)'::geometry)"),
    ("st_mpolyfromtext st_multipolygonfromtext", "'MULTIPOLYGON(((0 0, 1 1, 1 0, 0 0)))'"),
    ("st_mpolyfromwkb st_multipolyfromwkb", "ST_AsBinary('MULTIPOLYGON(((0 0, 1 1, 1 0, 0 0)))'::geometry)"),
    ("st_polyfromtext st_polygonfromtext", "'POLYGON((0 0, 1 1, 1 0, 0 0))'"),
    ("st_polyfromwkb st_polygonfromwkb", "ST_AsBinary('POLYGON((0 0, 1 1, 1 0, 0 0))'::geometry)"),
    ("st_offsetcurve", "'LINESTRING(0 0, 4 4)'::geometry, 1"),
    ("st_relatematch", "'101202FFF', 'TTTTTTFFF'"),
    ("st_scroll", "'LINESTRING(0 0, 1 1, 1 0, 0 0)'::geometry, 'POINT(1 1)'::geometry"),
    ("st_subdivide", "'POLYGON((0 0, 9 9, 9 0, 0 0))'::geometry, 8"),
    ("st_swapordinates", "'POINT(1 2)'::geometry, 'xy'"),
];

/// Whose answer is not the same twice, on one server either.
const OF_THE_MOMENT: &str = "clock_timestamp now statement_timestamp timeofday transaction_timestamp random random_normal \
    gen_random_uuid uuidv4 uuidv7 array_sample array_shuffle pg_sleep pg_sleep_for pg_sleep_until \
    uuid_generate_v1 uuid_generate_v1mc uuid_generate_v4 gen_random_bytes gen_salt normal_rand pgp_sym_encrypt \
    pgp_sym_encrypt_bytea pgp_pub_encrypt pgp_pub_encrypt_bytea st_generatepoints";

/// On the list and reached only as part of something else: sampling methods behind TABLESAMPLE, which is tried below;
/// those that want a stored expression, which are called over the catalogs that hold them.
const ELSEWHERE: &[(&str, &str)] = &[
    ("bernoulli", "SELECT id FROM plain TABLESAMPLE bernoulli (50) REPEATABLE (7)"),
    ("system", "SELECT id FROM plain TABLESAMPLE system (100) REPEATABLE (7)"),
    ("system_rows", "SELECT count(*) FROM plain TABLESAMPLE system_rows (1)"),
    ("tsm_system_rows_handler", "SELECT count(*) FROM plain TABLESAMPLE system_rows (1)"),
    ("system_time", "SELECT count(*) FROM plain TABLESAMPLE system_time (1000)"),
    ("tsm_system_time_handler", "SELECT count(*) FROM plain TABLESAMPLE system_time (1000)"),
    ("pg_get_expr", "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef ORDER BY oid"),
    ("json_to_record", "SELECT * FROM json_to_record('{\"a\": 1}') AS t (a int)"),
    ("json_to_recordset", "SELECT * FROM json_to_recordset('[{\"a\": 1}]') AS t (a int)"),
    ("jsonb_to_record", "SELECT * FROM jsonb_to_record('{\"a\": 1}') AS t (a int)"),
    ("jsonb_to_recordset", "SELECT * FROM jsonb_to_recordset('[{\"a\": 1}]') AS t (a int)"),
    ("_pg_expandarray", "SELECT information_schema._pg_expandarray('{3,4}'::int[])"),
    ("unnest", "SELECT * FROM unnest('{1,2}'::int[], '{a}'::text[])"),
    // Reads on behind a text that is no such line.
    ("st_linefromencodedpolyline", "SELECT ST_LineFromEncodedPolyline('_p~iF~ps|U_ulLnnqC')"),
    ("st_asmvt", "SELECT ST_AsMVT(t, 'x', 4096, 'p') FROM (SELECT id, p FROM places ORDER BY id) t"),
    ("st_asgeobuf", "SELECT ST_AsGeobuf(t, 'p') FROM (SELECT id, p FROM places ORDER BY id) t"),
    ("st_asflatgeobuf", "SELECT ST_AsFlatGeobuf(t, true, 'p') FROM (SELECT id, p FROM places ORDER BY id) t"),
];

/// On the list as names of types: a cast that is written as a call.
const CASTS: &[(&str, &str)] = &[
    ("inet", "'10.0.0.1'"),
    ("regcollation", "'\"C\"'"),
    ("regnamespace", "'public'"),
    ("regoper", "'||/'"),
    ("regoperator", "'+(int4,int4)'"),
    ("regproc", "'now'"),
    ("regprocedure", "'now()'"),
    ("regrole", "'app'"),
    ("regtype", "'int4'"),
];

/// On the list, and an error on both servers whatever they are given here: names, why.
const REFUSED: &[(&str, &str)] = &[
    (
        "gbtreekey16_in gbtreekey2_in gbtreekey32_in gbtreekey4_in gbtreekey8_in gbtreekey_var_in ghstore_in _intbig_in \
      ltree_gist_in gtrgm_in",
        "types of index entries take no input",
    ),
    ("box2df_in gidx_in", "the same of PostGIS"),
    (
        "_st_aspect4ma _st_convertarray4ma _st_grayscale4ma _st_hillshade4ma _st_roughness4ma _st_slope4ma _st_tpi4ma _st_tri4ma \
         st_invdistweight4ma st_max4ma st_mean4ma st_min4ma st_mindist4ma st_range4ma st_sum4ma",
        "for map algebra, with a pixel's neighbours; in PL/pgSQL, and judged by their bodies",
    ),
    ("st_snaptogrid", "that of rasters, without a band; that of geometries is tried"),
    (
        "multirange_intersect_agg_transfn range_intersect_agg_transfn",
        "called by their aggregates only, which are tried",
    ),
    ("aclinsert aclremove", "gone since PostgreSQL 7"),
    ("btvarstrequalimage", "wants the collation that an index brings along"),
    ("querytree", "wants a query_int that is in an index"),
    ("pgp_pub_decrypt pgp_pub_decrypt_bytea", "want a pair of keys, which no function here makes"),
    ("lo_get", "there is no large object; a read of one would be under MVCC as that of a row"),
];

/// No value of these can be written, so what takes one cannot be called in SQL.
const INTERNAL: &[&str] = &["internal", "pg_node_tree", "void"];

/// On the list, and not in every major that is served: those that came after 15.
const LATER: &str = "any_value array_reverse array_sample array_shuffle array_sort casefold crc32 crc32c date_add \
    date_subtract erf erfc gamma lgamma random_normal to_bin to_oct unicode_assigned uuid_extract_timestamp \
    uuid_extract_version uuidv4 uuidv7 xmltext";

/// What a call leaves, as one value; nothing but AccessShare locks may be left.
const LEFT: &str = "SELECT 'left', coalesce(pg_current_xact_id_if_assigned()::text, ''), \
    (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND (locktype = 'advisory' OR locktype = 'relation' \
     AND mode <> 'AccessShareLock' OR locktype IN ('tuple', 'transactionid'))), \
    (SELECT count(*) FROM pg_settings WHERE source = 'session' AND name NOT IN ('statement_timeout', 'enable_seqscan'))";

/// The rows as text, or the SQLSTATE.
async fn rows(client: &Client, text: &str) -> Result<Vec<String>, String> {
    match client.simple_query(text).await {
        Err(error) => Err(error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned())),
        Ok(messages) => Ok(messages
            .iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => {
                    Some((0..row.len()).map(|i| row.get(i).unwrap_or("~")).collect::<Vec<_>>().join("|"))
                }
                _ => None,
            })
            .collect()),
    }
}

pub struct Servers {
    primary: Client,
    standby: Client,
    calls: usize,
    answered: usize,
    pub wrong: Vec<String>,
}

impl Servers {
    pub async fn of(cluster: &Cluster) -> Servers {
        let app = &cluster.roles().app;
        let primary = cluster.primary().connect("app", app).await.unwrap();
        let standby = cluster.node(1).connect("app", app).await.unwrap();
        for client in [&primary, &standby] {
            client.batch_execute("SET statement_timeout = '10s'; SET enable_seqscan = off").await.unwrap();
        }
        Servers { primary, standby, calls: 0, answered: 0, wrong: Vec::new() }
    }

    /// Runs a call on both. Whether it was answered.
    pub async fn compare(&mut self, call: &str) -> bool {
        self.calls += 1;
        let here = rows(&self.primary, &format!("BEGIN; {call}; {LEFT}; ROLLBACK")).await;
        let here = match here {
            Ok(mut found) => {
                let left = found.pop().unwrap_or_default();
                if left != "left||0|0" {
                    self.wrong.push(format!("{call} leaves {left}"));
                }
                Ok(found)
            }
            Err(code) => {
                rows(&self.primary, "ROLLBACK").await.unwrap_or_else(|error| panic!("{call}: {error}"));
                Err(code)
            }
        };
        let there = rows(&self.standby, &format!("BEGIN; {call}; ROLLBACK")).await;
        if there.is_err() {
            rows(&self.standby, "ROLLBACK").await.unwrap();
        }
        if here != there {
            self.wrong.push(format!("{call}: {here:?} on the primary, {there:?} on the standby"));
        }
        self.answered += usize::from(here.is_ok());
        here.is_ok()
    }
}

impl Servers {
    /// The same for a call that makes sense.
    async fn must_answer(&mut self, call: &str) {
        if !self.compare(call).await {
            self.wrong.push(format!("{call} fails"));
        }
    }
}

/// A function as it is declared.
struct Declared {
    name: String,
    schema: String,
    kind: String,
    direct: usize,
    variadic: String,
    arguments: Vec<String>,
}

const DECLARED: &str = "SELECT p.proname::text, n.nspname::text, \
       CASE WHEN p.prokind = 'a' THEN 'a' || a.aggkind::text ELSE p.prokind::text END, \
       coalesce(a.aggnumdirectargs, 0)::int4, CASE p.provariadic WHEN 0 THEN '' ELSE format_type(p.provariadic, NULL) END, \
       (SELECT coalesce(array_agg(format_type(t, NULL) ORDER BY i), '{}') FROM unnest(p.proargtypes) WITH ORDINALITY u (t, i)) \
  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace LEFT JOIN pg_aggregate a ON a.aggfnoid = p.oid";

async fn declared(client: &Client, which: &str, names: &[&str]) -> Vec<Declared> {
    let found = client.query(&format!("{DECLARED} WHERE {which} ORDER BY p.oid"), &[&names]).await.unwrap();
    found
        .iter()
        .map(|row| Declared {
            name: row.get(0),
            schema: row.get(1),
            kind: row.get(2),
            direct: usize::try_from(row.get::<_, i32>(3)).unwrap(),
            variadic: row.get(4),
            arguments: row.get(5),
        })
        .collect()
}

fn value(of: &str, which: usize) -> Option<String> {
    if let Some((_, one, other)) = VALUES.iter().find(|(name, ..)| *name == of) {
        return Some(if which == 0 { *one } else { *other }.to_owned());
    }
    let element = of.strip_suffix("[]")?;
    Some(format!("ARRAY[{}, {}]::{of}", value(element, 0)?, value(element, which)?))
}

impl Declared {
    /// Some calls; `Err`: the type of which no value can be written.
    fn calls(&self) -> Result<BTreeSet<String>, String> {
        let mut calls = BTreeSet::new();
        for round in 0..3 {
            let mut arguments = Vec::new();
            for (at, of) in self.arguments.iter().enumerate() {
                let which = if round == 2 { at % 2 } else { round };
                let value = value(of, which).ok_or_else(|| of.clone())?;
                let spread = at + 1 == self.arguments.len() && !matches!(&*self.variadic, "" | "\"any\"");
                arguments.push(if spread { format!("VARIADIC {value}") } else { value });
            }
            calls.insert(self.call(&arguments));
        }
        Ok(calls)
    }

    fn call(&self, arguments: &[String]) -> String {
        let name = format!("{}.\"{}\"", self.schema, self.name);
        match &*self.kind {
            "ao" => {
                let (direct, ordered) = arguments.split_at(self.direct.min(arguments.len()));
                format!("SELECT {name}({}) WITHIN GROUP (ORDER BY {})", direct.join(", "), ordered.join(", "))
            }
            "ah" => format!("SELECT {name}({0}) WITHIN GROUP (ORDER BY {0})", arguments.join(", ")),
            "w" => format!("SELECT {name}({}) OVER () FROM (VALUES (1), (2)) v", arguments.join(", ")),
            _ => format!("SELECT {name}({})", arguments.join(", ")),
        }
    }
}

/// Calls all of them. Returns, by name, the types for want of a value of which some could not be called.
async fn call_all(servers: &mut Servers, functions: &[Declared]) -> BTreeMap<String, String> {
    let (mut not_called, mut called) = (BTreeMap::new(), BTreeSet::new());
    let (mut refused, mut answered) = (BTreeSet::new(), BTreeSet::new());
    for function in functions {
        if OF_THE_MOMENT.split_ascii_whitespace().any(|name| name == function.name) {
            continue;
        }
        let listed = |names: &str| names.split_ascii_whitespace().any(|name| name == function.name);
        let arguments = if function.schema == "pg_catalog" { ARGUMENTS } else { OF_EXTENSIONS };
        if let Some((_, arguments)) = arguments.iter().find(|(names, _)| listed(names))
            && called.insert(function.name.clone())
        {
            let call = format!("SELECT {}.\"{}\"({arguments})", function.schema, function.name);
            servers.must_answer(&call).await;
        }
        if let Some((_, statement)) = ELSEWHERE.iter().find(|(name, _)| *name == function.name) {
            if called.insert(function.name.clone()) {
                servers.must_answer(statement).await;
            }
            continue;
        }
        match function.calls() {
            Ok(calls) => {
                for call in calls {
                    if servers.compare(&call).await {
                        answered.insert(function.name.clone());
                    } else {
                        refused.insert(function.name.clone());
                    }
                }
            }
            Err(of) => _ = not_called.insert(function.name.clone(), of),
        }
    }
    refused.retain(|name| !answered.contains(name) && !called.contains(name));
    refused
        .retain(|name| !REFUSED.iter().any(|(names, _)| names.split_ascii_whitespace().any(|of| of == name)));
    assert!(refused.is_empty(), "never called with arguments that make sense: {refused:?}");
    not_called
}

const OBJECTS: &str = "CREATE TABLE plain (id int PRIMARY KEY, x text DEFAULT 'y'); INSERT INTO plain VALUES (1, 'one'), (2, 'two');
    CREATE TABLE serials (id serial); CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE TABLE hashed (id int) PARTITION BY HASH (id)";

#[tokio::test]
async fn allowed_built_in_functions_answer_alike_on_primary_and_standby_and_leave_nothing() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(OBJECTS).await;
    let mut servers = Servers::of(&cluster).await;
    let names = highwater::classify::safe_function_names();
    let functions =
        declared(&servers.primary, "p.oid < 16384 AND p.proname::text = ANY ($1::text[])", &names).await;
    let there: BTreeSet<&str> = functions.iter().map(|function| function.name.as_str()).collect();
    let unknown: Vec<_> = names
        .iter()
        .filter(|name| !CASTS.iter().any(|(of, _)| of == *name))
        .filter(|name| !there.contains(*name) && !LATER.split_ascii_whitespace().any(|later| later == **name))
        .collect();
    assert!(unknown.is_empty(), "listed, and no server has them: {unknown:?}");
    for (of, argument) in CASTS {
        let call = format!("SELECT {of}({argument})");
        assert!(names.contains(of) && servers.compare(&call).await, "{call} fails");
    }
    let not_called = call_all(&mut servers, &functions).await;
    println!("{} functions, {} calls, {} answered", functions.len(), servers.calls, servers.answered);
    assert!(servers.wrong.is_empty(), "{}", servers.wrong.join("\n"));
    // Those that take what SQL cannot give it are of no use to a statement, and do no harm on the list.
    let unexplained: Vec<_> = not_called.iter().filter(|(_, of)| !INTERNAL.contains(&of.as_str())).collect();
    assert!(unexplained.is_empty(), "{unexplained:?}");
    assert!(servers.answered * 10 > servers.calls * 7, "most calls make sense: {}", servers.answered);
}

/// What is known of compiled code (`classify::extension`), as Debian's postgresql-15 brings it.
const EXTENSIONS: &[&str] = &[
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "dict_int",
    "dict_xsyn",
    "earthdistance",
    "fuzzystrmatch",
    "hstore",
    "intarray",
    "isn",
    "ltree",
    "pg_trgm",
    "pgcrypto",
    "seg",
    "tablefunc",
    "tsm_system_rows",
    "tsm_system_time",
    "unaccent",
    "uuid-ossp",
];

/// Indexes by operator classes of theirs, and a condition that each serves.
const INDEXED: &[(&str, &str)] = &[
    ("gin (id)", "id = 7"),
    ("gist (id, x)", "id < 9 AND x > '1'"),
    ("btree (c)", "c = '7'"),
    ("gist (q)", "q <@ cube(3, 9)"),
    ("gin (h)", "h @> 'k=>7'"),
    ("gist (h)", "h ? 'k' AND h @> 'k=>8'"),
    ("gist (a gist__int_ops)", "a @> '{7}'"),
    ("gin (a gin__int_ops)", "a @@ '7 & 5'"),
    ("btree (e)", "e = '978-0-393-04002-9'"),
    ("gist (l)", "l ~ '*.b7'"),
    ("gin (x gin_trgm_ops)", "x LIKE '%123%'"),
    ("gist (x gist_trgm_ops)", "x % '123'"),
    ("gist (s)", "s <@ '3 .. 9'"),
];

/// Extensions that are tried together, tables with their types and indexes, and queries that these serve.
struct Trial {
    extensions: &'static [&'static str],
    objects: String,
    queries: Vec<String>,
}

#[tokio::test]
async fn known_extensions_functions_answer_alike_on_primary_and_standby_and_leave_nothing() {
    let indexes = INDEXED.iter().map(|(index, _)| format!("CREATE INDEX ON indexed USING {index};"));
    let trial = Trial {
        extensions: EXTENSIONS,
        objects: format!(
            "CREATE TABLE indexed AS SELECT i AS id, i::text AS x, i::text::citext AS c, hstore('k', i::text) AS h,
                 ('a.b' || i)::ltree AS l, ARRAY[i, 5] AS a, cube(i) AS q, i::text::seg AS s,
                 '978-0-393-04002-9'::ean13 AS e FROM generate_series(1, 500) i; {}",
            indexes.collect::<String>()
        ),
        queries: INDEXED
            .iter()
            .map(|(_, query)| format!("SELECT id FROM indexed WHERE {query} ORDER BY id"))
            .collect(),
    };
    try_extensions(&trial).await;
}

/// PostGIS, where it is installed: Debian's postgresql-15-postgis-3 (3.3). Tried on 3.5 (PostgreSQL 17 of Debian 13), too.
#[tokio::test]
async fn postgis_functions_answer_alike_on_primary_and_standby_and_leave_nothing() {
    let trial = Trial {
        extensions: &["postgis", "postgis_sfcgal", "postgis_raster"],
        objects: "CREATE TABLE places AS SELECT i AS id, ST_SetSRID(ST_MakePoint(i % 90, i % 45), 4326) AS p,
                ST_SetSRID(ST_MakePoint(i % 90, i % 45), 4326)::geography AS g, ST_MakePoint(i, i, i, i) AS n,
                ST_Buffer(ST_MakePoint(i, i), 3) AS a FROM generate_series(1, 500) i;
            CREATE INDEX ON places USING gist (p); CREATE INDEX ON places USING gist (g);
            CREATE INDEX ON places USING gist (n gist_geometry_ops_nd); CREATE INDEX ON places USING spgist (a);
            CREATE INDEX ON places USING brin (p); CREATE INDEX ON places (p); CREATE INDEX ON places USING hash (p);
            ANALYZE places"
            .to_owned(),
        queries: POSTGIS_QUERIES.iter().map(|query| (*query).to_owned()).collect(),
    };
    try_extensions(&trial).await;
}

/// Each kind of thing that is asked of PostGIS, over indexes.
const POSTGIS_QUERIES: &[&str] = &[
    "SELECT id FROM places WHERE p && ST_MakeEnvelope(0, 0, 9, 9, 4326) ORDER BY id",
    "SELECT id FROM places ORDER BY p <-> ST_SetSRID(ST_MakePoint(3, 4), 4326), id LIMIT 5",
    "SELECT id FROM places WHERE ST_DWithin(g, 'POINT(3 4)', 200000) ORDER BY id",
    "SELECT id FROM places ORDER BY g <-> 'POINT(3 4)'::geography, id LIMIT 5",
    "SELECT id FROM places WHERE n &&& ST_MakePoint(7, 7, 7, 7) ORDER BY id",
    "SELECT id FROM places WHERE n ~~ ST_MakePoint(7, 7, 7, 7) ORDER BY id",
    "SELECT id FROM places WHERE ST_Contains(a, ST_MakePoint(7, 7)) ORDER BY id",
    "SELECT DISTINCT p FROM places ORDER BY p",
    "SELECT p, count(*) FROM places GROUP BY p ORDER BY 2, 1",
    "SELECT a.id, b.id FROM places a JOIN places b ON ST_Intersects(a.a, b.a) WHERE a.id < 9 ORDER BY 1, 2",
    "SELECT md5(ST_AsMVT(t, 'layer', 4096, 'geom', 'id')) FROM
         (SELECT id, ST_AsMVTGeom(ST_Transform(p, 3857), ST_TileEnvelope(0, 0, 0)) AS geom FROM places) t",
    "SELECT md5(ST_AsGeobuf(t, 'p')), md5(ST_AsFlatGeobuf(t)) FROM (SELECT id, p FROM places) t",
    "SELECT ST_AsGeoJSON(t.*) FROM (SELECT id, p FROM places ORDER BY id LIMIT 3) t",
    "SELECT ST_AsText(ST_Union(a)), ST_Extent(p), ST_3DExtent(n), ST_AsText(ST_Collect(p)) FROM places",
    "SELECT ST_AsText(ST_MakeLine(p ORDER BY id)), ST_AsText(ST_MemUnion(a)) FROM places WHERE id < 9",
    "SELECT ST_AsText(unnest(ST_ClusterIntersecting(a))), ST_AsText(unnest(ST_ClusterWithin(a, 2))) FROM places",
    "SELECT id, ST_ClusterDBSCAN(p, 2, 3) OVER (ORDER BY id) FROM places ORDER BY id",
    "SELECT id, ST_ClusterKMeans(p, 3) OVER (ORDER BY id) FROM places ORDER BY id",
    "SELECT ST_AsText(ST_Polygonize(ST_Boundary(a))) FROM places WHERE id < 5",
    "SELECT ST_AsEWKT(ST_Transform(p, 3857)), ST_AsEWKT(ST_Transform(p, '+proj=merc')), ST_AsGML(3, p) FROM places",
    "SELECT ST_EstimatedExtent('places', 'p'), ST_EstimatedExtent('public', 'places', 'g')",
    "SELECT * FROM geometry_columns ORDER BY f_table_name, f_geometry_column",
    "SELECT * FROM geography_columns ORDER BY f_table_name",
    "SELECT srid, auth_name, proj4text FROM spatial_ref_sys ORDER BY srid LIMIT 9",
    "SELECT (ST_Dump(a)).geom, (ST_DumpPoints(a)).path FROM places WHERE id < 4",
    "SELECT p::text, p::bytea, g::geometry, p::json, p::point, a::box, a::box2d, a::polygon FROM places WHERE id < 4",
    "SELECT ST_AsText(geom), i, j FROM ST_HexagonGrid(1, ST_MakeEnvelope(0, 0, 2, 2)) ORDER BY i, j",
    "SELECT ST_AsText(geom), i, j FROM ST_SquareGrid(1, ST_MakeEnvelope(0, 0, 2, 2)) ORDER BY i, j",
    "SELECT ST_AsText(ST_Subdivide(ST_Buffer('POINT(1 1)'::geometry, 9, 64), 20))",
    "SELECT ST_AsText(geom) FROM ST_GeneratePoints('POLYGON((0 0,1 0,1 1,0 0))'::geometry, 3, 42) geom",
    "SELECT ST_AsText(ST_3DIntersection('POLYGON((0 0 0,2 0 0,2 2 0,0 0 0))'::geometry,
         'POLYGON((1 0 0,2 0 0,2 2 0,1 0 0))'::geometry)), ST_Volume(ST_Extrude('POLYGON((0 0,1 0,1 1,0 0))', 0, 0, 1))",
];

/// pgvector, where it is installed: in the Python wheel of `make matrix`, for PostgreSQL 16 and 18.
#[tokio::test]
async fn pgvector_functions_answer_alike_on_primary_and_standby_and_leave_nothing() {
    let kinds = [
        ("hnsw", "e", "vector", "<->"),
        ("hnsw", "e", "vector", "<#>"),
        ("hnsw", "e", "vector", "<=>"),
        ("hnsw", "e", "vector", "<+>"),
        ("ivfflat", "e", "vector", "<->"),
        ("ivfflat", "h", "halfvec", "<=>"),
        ("hnsw", "h", "halfvec", "<->"),
        ("hnsw", "s", "sparsevec", "<#>"),
        ("hnsw", "b", "bit", "<~>"),
        ("ivfflat", "b", "bit", "<~>"),
        ("hnsw", "b", "bit", "<%>"),
    ];
    let class = |of: &str, operator: &str| {
        let measure = match operator {
            "<->" => "l2",
            "<#>" => "ip",
            "<=>" => "cosine",
            "<+>" => "l1",
            "<~>" => "hamming",
            _ => "jaccard",
        };
        format!("{of}_{measure}_ops")
    };
    let indexes: Vec<String> = kinds
        .iter()
        .map(|(method, column, of, operator)| {
            format!("CREATE INDEX ON items USING {method} ({column} {});", class(of, operator))
        })
        .collect();
    let mut queries: Vec<String> = kinds
        .iter()
        .map(|(_, column, ..)| *column)
        .zip(kinds.iter().map(|kind| kind.3))
        .map(|(column, operator)| {
            format!("SELECT id FROM items ORDER BY {column} {operator} (SELECT {column} FROM items WHERE id = 7), id LIMIT 5")
        })
        .collect();
    queries.extend(
        [
            "SELECT avg(e), sum(e), avg(h), sum(h) FROM items",
            "SELECT e::real[], e::halfvec, e::sparsevec, h::vector, s::vector, binary_quantize(e) FROM items",
            "SELECT DISTINCT e FROM items ORDER BY e",
            "SELECT count(*), e FROM items GROUP BY e ORDER BY e LIMIT 3",
            "SELECT e + e, e - e, e * e, e || e, subvector(e, 1, 2), '[1,2,3]' < e, ARRAY[1,2,3]::vector FROM items",
            "SELECT id FROM items WHERE e <-> '[1,2,3]' < 5 ORDER BY id",
        ]
        .map(str::to_owned),
    );
    let trial = Trial {
        extensions: &["vector"],
        objects: format!(
            "CREATE TABLE items AS SELECT i AS id, ARRAY[i, i % 7, 1]::vector(3) AS e, ARRAY[i, i % 7, 1]::halfvec(3) AS h,
                 ARRAY[i, i % 7, 1]::vector(3)::sparsevec(3) AS s, i::bit(8) AS b FROM generate_series(1, 300) i; {}",
            indexes.concat()
        ),
        queries,
    };
    try_extensions(&trial).await;
}

/// Whether the server on this machine has them; says so if not.
pub async fn are_installed(cluster: &Cluster, extensions: &[&str]) -> bool {
    let client = cluster.primary().connect("app", &cluster.roles().app).await.unwrap();
    let there = client.query("SELECT name::text FROM pg_available_extensions", &[]).await.unwrap();
    let there: BTreeSet<String> = there.iter().map(|row| row.get(0)).collect();
    let missing: Vec<_> = extensions.iter().filter(|name| !there.contains(**name)).collect();
    if !missing.is_empty() {
        eprintln!("SKIPPED: the server on this machine has no {missing:?}");
    }
    missing.is_empty()
}

/// What is known of the database, read as the proxy reads it.
pub async fn facts(cluster: &Cluster, overrides: FunctionOverrides) -> Catalog {
    let mut loader = cluster.primary().connect("app", &cluster.roles().app).await.unwrap();
    let version = "SELECT current_setting('server_version_num')::int4 / 10000";
    let major: i32 = loader.query_one(version, &[]).await.unwrap().get(0);
    let mut rows = highwater::catalogs::load(&mut loader, u16::try_from(major).unwrap()).await.unwrap();
    rows.overrides = overrides;
    Catalog::from_rows(1, rows)
}

async fn try_extensions(trial: &Trial) {
    let cluster = Cluster::start(1).await;
    if !are_installed(&cluster, trial.extensions).await {
        return;
    }
    cluster.set_up(OBJECTS).await;
    for extension in trial.extensions {
        cluster.set_up_as_superuser(&format!("CREATE EXTENSION \"{extension}\"")).await;
    }
    cluster.set_up(&trial.objects).await;
    let mut servers = Servers::of(&cluster).await;
    let catalog = facts(&cluster, FunctionOverrides::default()).await;
    let (mut allowed, mut not_called) = (0, BTreeMap::new());
    for extension in trial.extensions {
        let member = "EXISTS (SELECT FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid \
            WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e' AND e.extname = ANY ($1::text[]))";
        let mut functions = declared(&servers.primary, member, &[extension]).await;
        functions.retain(|function| catalog.name(function.name.as_bytes()).proven);
        allowed += functions.len();
        not_called.extend(call_all(&mut servers, &functions).await);
        assert!(servers.wrong.is_empty(), "{extension}: {}", servers.wrong.join("\n"));
    }
    // What SQL cannot call works inside of indexes and aggregates.
    for query in &trial.queries {
        assert!(servers.compare(query).await, "{query} fails");
    }
    assert!(servers.wrong.is_empty(), "{}", servers.wrong.join("\n"));
    println!("{allowed} functions, {} calls, {} answered", servers.calls, servers.answered);
    let unexplained: Vec<_> = not_called
        .iter()
        // Keys of indexes and states of aggregates, which only their functions take.
        .filter(|(_, of)| {
            !INTERNAL.contains(&of.as_str())
                && !of.starts_with("gbtreekey")
                && !of.contains("gtrgm")
                && !of.contains("gist")
                && !matches!(
                    of.as_str(),
                    "intbig_gkey"
                        | "ghstore"
                        | "box2df"
                        | "gidx"
                        | "agg_count"
                        | "agg_samealignment"
                        | "unionarg[]"
                )
        })
        .collect();
    assert!(unexplained.is_empty(), "{unexplained:?}");
    assert!(servers.answered * 10 > servers.calls * 7, "most calls make sense: {}", servers.answered);
}
