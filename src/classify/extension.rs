//! Which compiled functions of which extensions are harmless on a replica. Pure data and one question.
//!
//! An allow-list: extensions of PostgreSQL's own contrib, PostGIS and pgvector. What it rests on: their documentation, and tests
//! (`tests/end_to_end/allow_lists.rs`) that call each function which this list lets pass on a primary and on its
//! standby: the same answers or errors, no lock, no transaction id, no setting changed. Functions that SQL cannot call
//! (they take `internal`: index support, estimators, an aggregate's steps) are reached through operators, indexes and
//! aggregates only; for those nothing stands but the extension's being what it is, and whether they are declared volatile
//! says nothing: most who write one declare nothing. Nobody has read all of the code. Functions that an extension has written in
//! SQL or PL/pgSQL are judged by their bodies like any other.
//!
//! Of contrib, which comes with the server, what is not volatile passes; named beside an extension are the exceptions: those
//! that are volatile and harmless all the same (random numbers), and those that run a text as SQL, keep state or write.
//! PostGIS and pgvector have versions of their own, so theirs pass by name: what a version brings that was not tried
//! is not harmless until it is named here, and nor is another major version of PostGIS (another library). A
//! declaration is no guide there: `ST_FromFlatGeobufToTable` makes a table, and is declared IMMUTABLE.
//!
//! Deliberately absent: of PostGIS what tells the versions of libraries (they are a server's own), what draws a transaction id
//! or looks at statistics for tests, and `ST_FromFlatGeobuf`, which ended the server when it was tried; bands of postgis_raster
//! (they may be files of the server; map algebra runs texts and callbacks); postgis_topology and pgrouting (they build and run
//! SQL), address_standardizer (reads tables that texts name); dblink, postgres_fdw, file_fdw (another server, another machine's files), and whatever looks
//! at the server itself (pg_stat_statements, pageinspect, pg_buffercache, sslinfo, adminpack). The operator may vouch for
//! others: `routing.functions.extensions`.

/// A compiled function, as the catalog has it.
pub struct Compiled<'a> {
    /// The extension that it belongs to, or nothing.
    pub extension: &'a str,
    /// `pg_proc.probin`
    pub library: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Declared (or by default) VOLATILE.
    pub volatile: bool,
    /// It takes what SQL has no value of.
    pub takes_internal: bool,
}

/// An extension that is known.
struct Known {
    name: &'static str,
    /// What the name of its library begins with, behind `$libdir/`.
    library: &'static str,
    /// Harmless, volatile or not.
    named: &'static str,
    /// Not harmless whatever is declared.
    except: &'static str,
    /// Of what SQL can call, harmless are only those under `named`.
    only_named: bool,
}

const fn computes(name: &'static str, library: &'static str) -> Known {
    Known { name, library, named: "", except: "", only_named: false }
}

const KNOWN: &[Known] = &[
    computes("btree_gin", "btree_gin"),
    computes("btree_gist", "btree_gist"),
    computes("citext", "citext"),
    computes("cube", "cube"),
    computes("dict_int", "dict_int"),
    computes("dict_xsyn", "dict_xsyn"),
    computes("earthdistance", "earthdistance"),
    computes("fuzzystrmatch", "fuzzystrmatch"),
    computes("hstore", "hstore"),
    computes("intarray", "_int"),
    Known { except: "isn_weak", ..computes("isn", "isn") },
    computes("ltree", "ltree"),
    // set_limit changes a setting of the session; show_limit reads it.
    Known { except: "set_limit show_limit", ..computes("pg_trgm", "pg_trgm") },
    Known {
        named: "gen_salt gen_random_bytes gen_random_uuid armor pgp_sym_encrypt pgp_sym_encrypt_bytea pgp_pub_encrypt \
                   pgp_pub_encrypt_bytea",
        ..computes("pgcrypto", "pgcrypto")
    },
    computes("seg", "seg"),
    // crosstab and connectby run their argument.
    Known { named: "normal_rand", only_named: true, ..computes("tablefunc", "tablefunc") },
    Known { named: "tsm_system_rows_handler system_rows", ..computes("tsm_system_rows", "tsm_system_rows") },
    Known { named: "tsm_system_time_handler system_time", ..computes("tsm_system_time", "tsm_system_time") },
    computes("unaccent", "unaccent"),
    Known {
        named: POSTGIS,
        // Makes a table; ends the server.
        except: "st_fromflatgeobuftotable st_fromflatgeobuf",
        only_named: true,
        ..computes("postgis", "postgis-3")
    },
    Known { named: RASTER, only_named: true, ..computes("postgis_raster", "postgis_raster-3") },
    Known { named: SFCGAL, only_named: true, ..computes("postgis_sfcgal", "postgis_sfcgal-3") },
    Known { named: PGVECTOR, only_named: true, ..computes("vector", "vector") },
    Known {
        named: "uuid_generate_v1 uuid_generate_v1mc uuid_generate_v4",
        ..computes("uuid-ossp", "uuid-ossp")
    },
];

/// PostGIS 3.3 and 3.5.
const POSTGIS: &str = "\
    _st_3ddfullywithin _st_3ddwithin _st_3dintersects _st_asgml _st_asx3d _st_bestsrid _st_contains \
    _st_containsproperly _st_coveredby _st_covers _st_crosses _st_dfullywithin _st_distancetree \
    _st_distanceuncached _st_dwithin _st_dwithinuncached _st_equals _st_expand _st_geomfromgml _st_intersects \
    _st_linecrossingdirection _st_longestline _st_maxdistance _st_orderingequals _st_overlaps _st_pointoutside \
    _st_sortablehash _st_touches _st_voronoi box box2d box2d_in box2d_out box2df_in box2df_out box3d box3d_in \
    box3d_out box3dtobox bytea contains_2d equals geography geography_cmp geography_distance_knn geography_eq \
    geography_ge geography_gt geography_in geography_le geography_lt geography_out geography_overlaps \
    geography_send geography_typmod_in geography_typmod_out geometry geometry_above geometry_below geometry_cmp \
    geometry_contained_3d geometry_contains geometry_contains_3d geometry_contains_nd geometry_distance_box \
    geometry_distance_centroid geometry_distance_centroid_nd geometry_distance_cpa geometry_eq geometry_ge \
    geometry_gt geometry_hash geometry_in geometry_le geometry_left geometry_lt geometry_neq geometry_out \
    geometry_overabove geometry_overbelow geometry_overlaps geometry_overlaps_3d geometry_overlaps_nd \
    geometry_overleft geometry_overright geometry_right geometry_same geometry_same_3d geometry_same_nd \
    geometry_send geometry_typmod_in geometry_typmod_out geometry_within geometry_within_nd geometrytype \
    geomfromewkb geomfromewkt gidx_in gidx_out is_contained_2d json jsonb overlaps_2d overlaps_geog overlaps_nd \
    path point polygon postgis_addbbox postgis_dropbbox postgis_getbbox postgis_hasbbox \
    postgis_transform_geometry postgis_transform_pipeline_geometry postgis_typmod_dims postgis_typmod_srid \
    postgis_typmod_type spheroid_in spheroid_out st_3dclosestpoint st_3ddfullywithin st_3ddistance st_3ddwithin \
    st_3dintersects st_3dlength st_3dlineinterpolatepoint st_3dlongestline st_3dmakebox st_3dmaxdistance \
    st_3dperimeter st_3dshortestline st_addmeasure st_addpoint st_affine st_angle st_area st_area2d st_asbinary \
    st_asencodedpolyline st_asewkb st_asewkt st_asgeojson st_asgml st_ashexewkb st_askml st_aslatlontext \
    st_asmarc21 st_asmvtgeom st_assvg st_astext st_astwkb st_azimuth st_boundary st_boundingdiagonal \
    st_box2dfromgeohash st_buffer st_buildarea st_centroid st_chaikinsmoothing st_cleangeometry st_clipbybox2d \
    st_closestpoint st_closestpointofapproach st_clusterdbscan st_clusterintersecting st_clusterintersectingwin \
    st_clusterkmeans st_clusterwithin st_clusterwithinwin st_collect st_collectionextract \
    st_collectionhomogenize st_combinebbox st_concavehull st_contains st_containsproperly st_convexhull \
    st_coorddim st_coverageinvalidedges st_coveragesimplify st_coverageunion st_coveredby st_covers st_cpawithin \
    st_crosses st_curven st_curvetoline st_delaunaytriangles st_dfullywithin st_difference st_dimension \
    st_disjoint st_distance st_distancecpa st_distancesphere st_distancespheroid st_dump st_dumppoints \
    st_dumprings st_dumpsegments st_dwithin st_endpoint st_envelope st_equals st_estimatedextent st_expand \
    st_exteriorring st_filterbym st_flipcoordinates st_force2d st_force3dm st_force3dz st_force4d \
    st_forcecollection st_forcecurve st_forcepolygoncw st_forcerhr st_forcesfs st_frechetdistance \
    st_generatepoints st_geogfromtext st_geogfromwkb st_geographyfromtext st_geohash st_geometricmedian \
    st_geometryfromtext st_geometryn st_geometrytype st_geomfromewkb st_geomfromewkt st_geomfromgeojson \
    st_geomfromgml st_geomfromkml st_geomfrommarc21 st_geomfromtext st_geomfromtwkb st_geomfromwkb st_gmltosql \
    st_hasarc st_hasm st_hasz st_hausdorffdistance st_hexagon st_hexagongrid st_interiorringn \
    st_interpolatepoint st_intersection st_intersects st_isclosed st_iscollection st_isempty st_ispolygonccw \
    st_ispolygoncw st_isring st_issimple st_isvalid st_isvaliddetail st_isvalidreason st_isvalidtrajectory \
    st_largestemptycircle st_length st_length2d st_length2dspheroid st_lengthspheroid st_linecrossingdirection \
    st_lineextend st_linefromencodedpolyline st_linefrommultipoint st_lineinterpolatepoint \
    st_lineinterpolatepoints st_linelocatepoint st_linemerge st_linesubstring st_linetocurve st_locatealong \
    st_locatebetween st_locatebetweenelevations st_m st_makebox2d st_makeenvelope st_makeline st_makepoint \
    st_makepointm st_makepolygon st_makevalid st_maximuminscribedcircle st_memsize st_minimumboundingcircle \
    st_minimumboundingradius st_minimumclearance st_minimumclearanceline st_multi st_ndims st_node st_normalize \
    st_npoints st_nrings st_numcurves st_numgeometries st_numinteriorring st_numinteriorrings st_numpoints \
    st_offsetcurve st_orderingequals st_orientedenvelope st_overlaps st_perimeter st_perimeter2d st_point \
    st_pointfromgeohash st_pointinsidecircle st_pointm st_pointn st_pointonsurface st_points st_pointz \
    st_pointzm st_polygonize st_project st_quantizecoordinates st_reduceprecision st_relate st_relatematch \
    st_removeirrelevantpointsforview st_removepoint st_removerepeatedpoints st_removesmallparts st_reverse \
    st_scale st_scroll st_segmentize st_seteffectivearea st_setpoint st_setsrid st_sharedpaths st_shiftlongitude \
    st_shortestline st_simplify st_simplifypolygonhull st_simplifypreservetopology st_simplifyvw st_snap \
    st_snaptogrid st_split st_square st_squaregrid st_srid st_startpoint st_subdivide st_summary \
    st_swapordinates st_symdifference st_tileenvelope st_touches st_transform st_triangulatepolygon \
    st_unaryunion st_union st_within st_wkbtosql st_wkttosql st_wrapx st_x st_xmax st_xmin st_y st_ymax st_ymin \
    st_z st_zmax st_zmflag st_zmin text";

/// The same, with SFCGAL.
const SFCGAL: &str = "\
    cg_3darea cg_3dconvexhull cg_3ddifference cg_3ddistance cg_3dintersection cg_3dintersects cg_3dunion \
    cg_alphashape cg_approxconvexpartition cg_approximatemedialaxis cg_area cg_constraineddelaunaytriangles \
    cg_difference cg_distance cg_extrude cg_extrudestraightskeleton cg_forcelhr cg_greeneapproxconvexpartition \
    cg_intersection cg_intersects cg_isplanar cg_issolid cg_makesolid cg_minkowskisum cg_optimalalphashape \
    cg_optimalconvexpartition cg_orientation cg_straightskeleton cg_tesselate cg_triangulate cg_union \
    cg_visibility cg_volume cg_ymonotonepartition st_3darea st_3dconvexhull st_3ddifference st_3dintersection \
    st_3dunion st_alphashape st_approximatemedialaxis st_constraineddelaunaytriangles st_extrude st_forcelhr \
    st_isplanar st_issolid st_makesolid st_minkowskisum st_optimalalphashape st_orientation st_straightskeleton \
    st_tesselate st_volume";

/// What of postgis_raster looks at no band: without it geometries, which rasters share operators with, would not be read
/// anywhere beside it.
const RASTER: &str = "\
    box3d bytea raster_in raster_out st_convexhull st_envelope st_geotransform st_height st_makeemptyraster st_numbands \
    st_pixelheight st_pixelwidth st_scalex st_scaley st_skewx st_skewy st_srid st_upperleftx st_upperlefty st_width";

/// pgvector 0.8.
const PGVECTOR: &str = "\
    array_to_halfvec array_to_sparsevec array_to_vector binary_quantize cosine_distance halfvec halfvec_accum \
    halfvec_add halfvec_avg halfvec_cmp halfvec_combine halfvec_concat halfvec_eq halfvec_ge halfvec_gt \
    halfvec_in halfvec_l2_squared_distance halfvec_le halfvec_lt halfvec_mul halfvec_ne \
    halfvec_negative_inner_product halfvec_out halfvec_send halfvec_spherical_distance halfvec_sub \
    halfvec_to_float4 halfvec_to_sparsevec halfvec_to_vector halfvec_typmod_in hamming_distance inner_product \
    jaccard_distance l1_distance l2_distance l2_norm l2_normalize sparsevec sparsevec_cmp sparsevec_eq \
    sparsevec_ge sparsevec_gt sparsevec_in sparsevec_l2_squared_distance sparsevec_le sparsevec_lt sparsevec_ne \
    sparsevec_negative_inner_product sparsevec_out sparsevec_send sparsevec_to_halfvec sparsevec_to_vector \
    sparsevec_typmod_in subvector vector vector_accum vector_add vector_avg vector_cmp vector_combine \
    vector_concat vector_dims vector_eq vector_ge vector_gt vector_in vector_l2_squared_distance vector_le \
    vector_lt vector_mul vector_ne vector_negative_inner_product vector_norm vector_out vector_send \
    vector_spherical_distance vector_sub vector_to_float4 vector_to_halfvec vector_to_sparsevec vector_typmod_in";

/// Whether a compiled function computes and does nothing else. A function that was put into a known extension by
/// hand has another library, and is not known. Of the extensions that the operator vouches for (`trusted`), what is declared
/// to do nothing but read does so, but for what is known to write all the same.
pub fn is_harmless(function: &Compiled<'_>, trusted: &[String]) -> bool {
    let listed = |names: &str| names.split_ascii_whitespace().any(|name| name == function.name);
    let of_it = || KNOWN.iter().filter(|known| known.name == function.extension);
    if of_it().any(|known| listed(known.except)) {
        return false;
    }
    let only_reads = function.takes_internal || !function.volatile;
    if only_reads && trusted.iter().any(|name| name == function.extension) {
        return true;
    }
    of_it().any(|known| {
        let file =
            function.library.strip_prefix("$libdir/").and_then(|file| file.strip_prefix(known.library));
        // `$libdir/hstore`, or with a suffix such as `.so`; not `$libdir/hstore_plperl`.
        let its_library = file.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        let by_declaration = only_reads && (function.takes_internal || !known.only_named);
        its_library && (by_declaration || listed(known.named))
    })
}

#[cfg(test)]
mod tests {
    use super::{Compiled, is_harmless};

    fn function(declared: [&'static str; 3], volatile: bool) -> Compiled<'static> {
        let [extension, library, name] = declared;
        Compiled { extension, library, name, volatile, takes_internal: false }
    }

    #[test]
    fn known_code_only() {
        for (declared, volatile, harmless) in [
            (["hstore", "$libdir/hstore", "hstore_in"], false, true),
            (["hstore", "$libdir/hstore", "made_volatile"], true, false),
            (["hstore", "$libdir/mine", "put_into_it"], false, false),
            (["hstore", "$libdir/hstore_plperl", "another"], false, false),
            (["hstore", "hstore", "by_path"], false, false),
            (["", "$libdir/hstore", "by_hand"], false, false),
            (["pg_trgm", "$libdir/pg_trgm", "similarity"], false, true),
            (["pg_trgm", "$libdir/pg_trgm", "set_limit"], true, false),
            (["tablefunc", "$libdir/tablefunc", "crosstab"], false, false),
            (["tablefunc", "$libdir/tablefunc", "connectby"], false, false),
            (["tablefunc", "$libdir/tablefunc", "normal_rand"], true, true),
            (["uuid-ossp", "$libdir/uuid-ossp", "uuid_generate_v4"], true, true),
            (["pgcrypto", "$libdir/pgcrypto", "digest"], false, true),
            (["postgis", "$libdir/postgis-3", "st_area"], false, true),
            (["postgis", "$libdir/postgis-3", "st_generatepoints"], true, true),
            (["postgis", "$libdir/postgis-3", "of_a_later_version"], false, false),
            (["postgis", "$libdir/postgis-3", "st_fromflatgeobuftotable"], false, false),
            (["postgis", "$libdir/postgis-3", "gettransactionid"], true, false),
            (["postgis", "$libdir/postgis-2.5", "st_area"], false, false),
            (["postgis_raster", "$libdir/postgis_raster-3", "st_value"], false, false),
            (["postgis_raster", "$libdir/postgis_raster-3", "st_width"], false, true),
            (["vector", "$libdir/vector", "l2_distance"], false, true),
            (["vector", "$libdir/vector", "of_a_later_version"], false, false),
            (["dblink", "$libdir/dblink", "dblink_exec"], true, false),
            (["dblink", "$libdir/dblink", "dblink_get_pkey"], false, false),
            (["postgres_fdw", "$libdir/postgres_fdw", "postgres_fdw_get_connections"], true, false),
            (["file_fdw", "$libdir/file_fdw", "file_fdw_handler"], false, false),
        ] {
            assert_eq!(is_harmless(&function(declared, volatile), &[]), harmless, "{declared:?}");
        }
    }

    #[test]
    fn what_sql_cannot_call_passes_with_its_extension() {
        for (declared, harmless) in [
            (["vector", "$libdir/vector", "hnswhandler"], true),
            (["postgis", "$libdir/postgis-3", "of_a_later_version"], true),
            (["postgis", "$libdir/postgis-2.5", "geometry_analyze"], false),
            (["bloom", "$libdir/bloom", "blhandler"], false),
        ] {
            let function = Compiled { takes_internal: true, ..function(declared, true) };
            assert_eq!(is_harmless(&function, &[]), harmless, "{declared:?}");
        }
    }

    #[test]
    fn an_extension_that_the_operator_vouches_for_is_taken_at_its_declarations() {
        let trusted = ["postgis".to_owned(), "h3".to_owned()];
        for (declared, volatile, harmless) in [
            (["h3", "$libdir/h3", "h3_cell_to_parent"], false, true),
            (["h3", "$libdir/h3", "volatile"], true, false),
            (["postgis", "$libdir/postgis-3", "of_a_later_version"], false, true),
            (["postgis", "$libdir/postgis-3", "st_fromflatgeobuftotable"], false, false),
            (["", "$libdir/h3", "by_hand"], false, false),
        ] {
            assert_eq!(is_harmless(&function(declared, volatile), &trusted), harmless, "{declared:?}");
        }
    }
}
