//! What PostgreSQL itself brings along: the words of its grammar that matter here, the built-in
//! functions that are safe on a replica, and the system relations that answer there as on the
//! primary. Pure data and one lookup table.
//!
//! An allow-list: what is not named here is not safe. It was made from `pg_proc` of PostgreSQL 15, and is called
//! function by function on a primary and its standby (`tests/end_to_end/allow_lists.rs`). A
//! name is listed only if every overload in `pg_catalog` is safe. Volatility alone decides nothing:
//! `txid_current` and `pg_stat_get_activity` are STABLE and still belong to the primary, while
//! `random` and `clock_timestamp` are VOLATILE and safe. Functions of a later major that are not
//! listed go to the primary until they are.
//!
//! Deliberately absent: whatever reads a server's own state (activity, locks, sizes, replication,
//! files, settings), takes locks, assigns transaction ids, runs a text as SQL (`query_to_xml`,
//! `ts_stat`, `ts_rewrite`), runs the code of an object that a text names (`satisfies_hash_partition` hashes as a
//! table's operator class does), or is of no use outside the server (selectivity, input and receive
//! functions).

use hashbrown::HashMap;

use super::PinReason;

/// Words of the grammar that decide something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keyword {
    /// `ABORT`
    Abort,
    /// `ALL`
    All,
    /// `ALTER`
    Alter,
    /// `ANALYZE`
    Analyze,
    /// `AND`
    And,
    /// `AS`
    As,
    /// `AUTHORIZATION`
    Authorization,
    /// `BEGIN`
    Begin,
    /// `BETWEEN`
    Between,
    /// `CALL`
    Call,
    /// `CASE`
    Case,
    /// `CHARACTERISTICS`
    Characteristics,
    /// `CHECKPOINT`
    Checkpoint,
    /// `CLOSE`
    Close,
    /// `CLUSTER`
    Cluster,
    /// `COMMENT`
    Comment,
    /// `COMMIT`
    Commit,
    /// `CONSTRAINTS`
    Constraints,
    /// `COPY`
    Copy,
    /// `CREATE`
    Create,
    /// `CURRENT`
    Current,
    /// `CURSOR`
    Cursor,
    /// `DEALLOCATE`
    Deallocate,
    /// `DECLARE`
    Declare,
    /// `DELETE`
    Delete,
    /// `DISCARD`
    Discard,
    /// `DISTINCT`
    Distinct,
    /// `DO`
    Do,
    /// `DROP`
    Drop,
    /// `END`
    End,
    /// `EXECUTE`
    Execute,
    /// `EXISTS`
    Exists,
    /// `EXPLAIN`
    Explain,
    /// `FETCH`
    Fetch,
    /// `FOR`
    For,
    /// `FROM`
    From,
    /// `GLOBAL`
    Global,
    /// `GRANT`
    Grant,
    /// `HOLD`
    Hold,
    /// `ILIKE`
    Ilike,
    /// `IMPORT`
    Import,
    /// `IN`
    In,
    /// `INSERT`
    Insert,
    /// `INTO`
    Into,
    /// `JOIN`
    Join,
    /// `KEY`
    Key,
    /// `LIKE`
    Like,
    /// `LISTEN`
    Listen,
    /// `LOAD`
    Load,
    /// `LOCAL`
    Local,
    /// `LOCK`
    Lock,
    /// `MATERIALIZED`
    Materialized,
    /// `MERGE`
    Merge,
    /// `MOVE`
    Move,
    /// `NATURAL`
    Natural,
    /// `NO`
    No,
    /// `NOT`
    Not,
    /// `NOTIFY`
    Notify,
    /// `NULLIF`
    Nullif,
    /// `ON`
    On,
    /// `OR`
    Or,
    /// `PLANS`
    Plans,
    /// `PREPARE`
    Prepare,
    /// `PREPARED`
    Prepared,
    /// `PROGRAM`
    Program,
    /// `REASSIGN`
    Reassign,
    /// `RECURSIVE`
    Recursive,
    /// `REFRESH`
    Refresh,
    /// `REINDEX`
    Reindex,
    /// `RELEASE`
    Release,
    /// `REPLACE`
    Replace,
    /// `RESET`
    Reset,
    /// `REVOKE`
    Revoke,
    /// `ROLE`
    Role,
    /// `ROLLBACK`
    Rollback,
    /// `ROW`
    Row,
    /// `SAVEPOINT`
    Savepoint,
    /// `SECURITY`
    Security,
    /// `SELECT`
    Select,
    /// `SEQUENCES`
    Sequences,
    /// `SESSION`
    Session,
    /// `SET`
    Set,
    /// `SHARE`
    Share,
    /// `SHOW`
    Show,
    /// `SIMILAR`
    Similar,
    /// `START`
    Start,
    /// `STDOUT`
    Stdout,
    /// `TABLE`
    Table,
    /// `TEMP`
    Temp,
    /// `TEMPORARY`
    Temporary,
    /// `THEN`
    Then,
    /// `TIME`
    Time,
    /// `TO`
    To,
    /// `TRANSACTION`
    Transaction,
    /// `TRUE`
    True,
    /// `TRUNCATE`
    Truncate,
    /// `UESCAPE`
    Uescape,
    /// `UNION`
    Union,
    /// `UNLISTEN`
    Unlisten,
    /// `UPDATE`
    Update,
    /// `USING`
    Using,
    /// `VACUUM`
    Vacuum,
    /// `VALUES`
    Values,
    /// `VERBOSE`
    Verbose,
    /// `WHEN`
    When,
    /// `WITH`
    With,
    /// `WITHOUT`
    Without,
}

/// A built-in function that is not a read, and what it leaves on its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// `current_setting`: safe for a constant name of an application's own setting.
    CurrentSetting,
    /// `set_config`: its third argument decides.
    SetConfig,
    /// Leaves state behind.
    Pins(PinReason),
    /// Not safe on a replica, but leaves nothing.
    LeavesNothing,
}

/// What is known of a word.
#[derive(Clone, Copy, Debug, Default)]
pub struct Word {
    /// Its meaning in the grammar, when it is not quoted.
    pub keyword: Option<Keyword>,
    /// As an unquoted word it may stand before `(` without being a function's name.
    pub before_paren: bool,
    /// A built-in function of this name is safe in all its overloads.
    pub safe_function: bool,
    /// A system relation or another `pg_` name that is safe to mention.
    pub safe_name: bool,
    /// A built-in function with an effect that is known.
    pub special: Option<Special>,
}

/// All words, built once per [`Classifier`](super::Classifier).
#[derive(Debug)]
pub struct Vocabulary {
    words: HashMap<&'static [u8], Word>,
}

impl Vocabulary {
    /// Builds the table.
    pub fn new() -> Vocabulary {
        let mut words: HashMap<&'static [u8], Word> = HashMap::new();
        for (text, keyword) in KEYWORDS {
            words.entry(text.as_bytes()).or_default().keyword = Some(*keyword);
        }
        for text in BEFORE_PAREN.split_ascii_whitespace() {
            words.entry(text.as_bytes()).or_default().before_paren = true;
        }
        for text in safe_functions() {
            words.entry(text.as_bytes()).or_default().safe_function = true;
        }
        for text in SAFE_PG_NAMES.split_ascii_whitespace() {
            words.entry(text.as_bytes()).or_default().safe_name = true;
        }
        for (texts, special) in SPECIALS {
            for text in texts.split_ascii_whitespace() {
                words.entry(text.as_bytes()).or_default().special = Some(*special);
            }
        }
        Vocabulary { words }
    }

    /// What is known of a word (decoded and folded).
    #[inline]
    pub fn get(&self, word: &[u8]) -> Option<&Word> {
        self.words.get(word)
    }
}

impl Default for Vocabulary {
    fn default() -> Self {
        Vocabulary::new()
    }
}

/// The names of the built-in functions that are safe on a replica.
pub fn safe_functions() -> impl Iterator<Item = &'static str> {
    IMMUTABLE_FUNCTIONS.split_ascii_whitespace().chain(OTHER_FUNCTIONS.split_ascii_whitespace())
}

/// The `pg_` names that are safe to mention.
pub fn safe_system_names() -> impl Iterator<Item = &'static str> {
    SAFE_PG_NAMES.split_ascii_whitespace()
}

const KEYWORDS: &[(&str, Keyword)] = &[
    ("abort", Keyword::Abort),
    ("all", Keyword::All),
    ("alter", Keyword::Alter),
    ("analyze", Keyword::Analyze),
    ("and", Keyword::And),
    ("as", Keyword::As),
    ("authorization", Keyword::Authorization),
    ("begin", Keyword::Begin),
    ("between", Keyword::Between),
    ("call", Keyword::Call),
    ("case", Keyword::Case),
    ("characteristics", Keyword::Characteristics),
    ("checkpoint", Keyword::Checkpoint),
    ("close", Keyword::Close),
    ("cluster", Keyword::Cluster),
    ("comment", Keyword::Comment),
    ("commit", Keyword::Commit),
    ("constraints", Keyword::Constraints),
    ("copy", Keyword::Copy),
    ("create", Keyword::Create),
    ("current", Keyword::Current),
    ("cursor", Keyword::Cursor),
    ("deallocate", Keyword::Deallocate),
    ("declare", Keyword::Declare),
    ("delete", Keyword::Delete),
    ("discard", Keyword::Discard),
    ("distinct", Keyword::Distinct),
    ("do", Keyword::Do),
    ("drop", Keyword::Drop),
    ("end", Keyword::End),
    ("execute", Keyword::Execute),
    ("exists", Keyword::Exists),
    ("explain", Keyword::Explain),
    ("fetch", Keyword::Fetch),
    ("for", Keyword::For),
    ("from", Keyword::From),
    ("global", Keyword::Global),
    ("grant", Keyword::Grant),
    ("hold", Keyword::Hold),
    ("ilike", Keyword::Ilike),
    ("import", Keyword::Import),
    ("in", Keyword::In),
    ("insert", Keyword::Insert),
    ("into", Keyword::Into),
    ("join", Keyword::Join),
    ("key", Keyword::Key),
    ("like", Keyword::Like),
    ("listen", Keyword::Listen),
    ("load", Keyword::Load),
    ("local", Keyword::Local),
    ("lock", Keyword::Lock),
    ("materialized", Keyword::Materialized),
    ("merge", Keyword::Merge),
    ("move", Keyword::Move),
    ("natural", Keyword::Natural),
    ("no", Keyword::No),
    ("not", Keyword::Not),
    ("notify", Keyword::Notify),
    ("nullif", Keyword::Nullif),
    ("on", Keyword::On),
    ("or", Keyword::Or),
    ("plans", Keyword::Plans),
    ("prepare", Keyword::Prepare),
    ("prepared", Keyword::Prepared),
    ("program", Keyword::Program),
    ("reassign", Keyword::Reassign),
    ("recursive", Keyword::Recursive),
    ("refresh", Keyword::Refresh),
    ("reindex", Keyword::Reindex),
    ("release", Keyword::Release),
    ("replace", Keyword::Replace),
    ("reset", Keyword::Reset),
    ("revoke", Keyword::Revoke),
    ("role", Keyword::Role),
    ("rollback", Keyword::Rollback),
    ("row", Keyword::Row),
    ("savepoint", Keyword::Savepoint),
    ("security", Keyword::Security),
    ("select", Keyword::Select),
    ("sequences", Keyword::Sequences),
    ("session", Keyword::Session),
    ("set", Keyword::Set),
    ("share", Keyword::Share),
    ("show", Keyword::Show),
    ("similar", Keyword::Similar),
    ("start", Keyword::Start),
    ("stdout", Keyword::Stdout),
    ("table", Keyword::Table),
    ("temp", Keyword::Temp),
    ("temporary", Keyword::Temporary),
    ("then", Keyword::Then),
    ("time", Keyword::Time),
    ("to", Keyword::To),
    ("transaction", Keyword::Transaction),
    ("true", Keyword::True),
    ("truncate", Keyword::Truncate),
    ("uescape", Keyword::Uescape),
    ("union", Keyword::Union),
    ("unlisten", Keyword::Unlisten),
    ("update", Keyword::Update),
    ("using", Keyword::Using),
    ("vacuum", Keyword::Vacuum),
    ("values", Keyword::Values),
    ("verbose", Keyword::Verbose),
    ("when", Keyword::When),
    ("with", Keyword::With),
    ("without", Keyword::Without),
    ("analyse", Keyword::Analyze),
];

/// Unquoted, these may stand before `(` without calling a function that the lists below do not cover:
/// clauses, constructs of the grammar, and types with modifiers.
const BEFORE_PAREN: &str = "\
    add all analyze and any array as asc between bit bpchar by case cast char character check coalesce \
    collation column columns conflict constraint copy cross cube current_time current_timestamp dec \
    decimal default desc distinct do double else end escape except exclude exists explain extract false \
    fetch filter first float for foreign from full greatest group grouping groups having ilike in \
    include index inner insert intersect interval into is isnull join json json_array json_arrayagg \
    json_exists json_object json_objectagg json_query json_scalar json_serialize json_table json_value \
    key lateral least left like limit localtime localtimestamp materialized national natural nchar \
    normalize not notnull null nullif numeric offset on only or order ordinality outer over overlay \
    partition passing path position precision prepare primary range references repeatable returning \
    right rollup row rows select separator set sets similar some substring symmetric table then time \
    timestamp timestamptz timetz to treat trim true union unique update using values varbit varchar \
    varying verbose when where window with within without xmlattributes xmlconcat xmlelement xmlexists xmlforest \
    xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable";

/// IMMUTABLE in all overloads, and the bodies do what they promise.
const IMMUTABLE_FUNCTIONS: &str = "\
    abbrev abs aclcontains acldefault aclinsert aclitemeq aclremove acos acosd acosh area array_agg \
    array_append array_cat array_dims array_eq array_fill array_ge array_gt array_larger array_le \
    array_length array_lower array_lt array_ndims array_ne array_position array_positions array_prepend \
    array_remove array_replace array_smaller array_to_tsvector array_upper arraycontained arraycontains \
    arrayoverlap ascii asin asind asinh atan atan2 atan2d atand atanh avg bit bit_and bit_count \
    bit_length bit_or bit_send bit_xor bitand bitcat bitcmp biteq bitge bitgt bitle bitlt bitne bitnot \
    bitor bitshiftleft bitshiftright bittypmodin bitxor bool bool_and bool_or booland_statefunc booleq \
    boolge boolgt boolle boollt boolne boolor_statefunc boolsend bound_box box box_above box_above_eq \
    box_add box_below box_below_eq box_center box_contain box_contain_pt box_contained box_distance \
    box_div box_eq box_ge box_gt box_intersect box_le box_left box_lt box_mul box_overabove \
    box_overbelow box_overlap box_overleft box_overright box_right box_same box_send box_sub bpchar \
    bpchar_larger bpchar_pattern_ge bpchar_pattern_gt bpchar_pattern_le bpchar_pattern_lt bpchar_smaller \
    bpcharcmp bpchareq bpcharge bpchargt bpchariclike bpcharicnlike bpcharicregexeq bpcharicregexne \
    bpcharle bpcharlike bpcharlt bpcharne bpcharnlike bpcharregexeq bpcharregexne bpchartypmodin \
    broadcast btequalimage btrim btvarstrequalimage byteacat byteacmp byteaeq byteage byteagt byteale \
    bytealike bytealt byteane byteanlike byteasend cardinality cash_cmp cash_div_cash cash_div_flt4 \
    cash_div_flt8 cash_div_int2 cash_div_int4 cash_div_int8 cash_eq cash_ge cash_gt cash_le cash_lt \
    cash_mi cash_mul_flt4 cash_mul_flt8 cash_mul_int2 cash_mul_int4 cash_mul_int8 cash_ne cash_pl \
    cash_send cash_words cashlarger cashsmaller cbrt ceil ceiling center char char_length \
    character_length chareq charge chargt charle charlt charne charsend chr cideq cidr cidr_send cidsend \
    circle circle_above circle_add_pt circle_below circle_center circle_contain circle_contain_pt \
    circle_contained circle_distance circle_div_pt circle_eq circle_ge circle_gt circle_le circle_left \
    circle_lt circle_mul_pt circle_ne circle_overabove circle_overbelow circle_overlap circle_overleft \
    circle_overright circle_right circle_same circle_send circle_sub_pt close_ls close_lseg close_pb \
    close_pl close_ps close_sb corr cos cosd cosh cot cotd count covar_pop covar_samp cume_dist date_bin \
    date_cmp date_cmp_timestamp date_eq date_eq_timestamp date_ge date_ge_timestamp date_gt \
    date_gt_timestamp date_larger date_le date_le_timestamp date_lt date_lt_timestamp date_mi \
    date_mi_interval date_mii date_ne date_ne_timestamp date_pl_interval date_pli date_send date_smaller \
    datemultirange daterange daterange_canonical daterange_subdiff datetime_pl datetimetz_pl dcbrt \
    decode degrees dense_rank dexp diagonal diameter dist_bp dist_bs dist_cpoint dist_cpoly dist_lp \
    dist_ls dist_pathp dist_pb dist_pc dist_pl dist_polyc dist_polyp dist_ppath dist_ppoly dist_ps \
    dist_sb dist_sl dist_sp div dlog1 dlog10 dpow dround dsqrt dtrunc elem_contained_by_multirange \
    elem_contained_by_range encode enum_cmp enum_eq enum_ge enum_gt enum_larger enum_le enum_lt enum_ne \
    enum_smaller every exp factorial family first_value float4 float48div float48eq float48ge float48gt \
    float48le float48lt float48mi float48mul float48ne float48pl float4abs float4div float4eq float4ge \
    float4gt float4larger float4le float4lt float4mi float4mul float4ne float4pl float4send \
    float4smaller float4um float4up float8 float84div float84eq float84ge float84gt float84le float84lt \
    float84mi float84mul float84ne float84pl float8_avg float8_corr float8_covar_pop float8_covar_samp \
    float8_regr_avgx float8_regr_avgy float8_regr_intercept float8_regr_r2 float8_regr_slope \
    float8_regr_sxx float8_regr_sxy float8_regr_syy float8_stddev_pop float8_stddev_samp float8_var_pop \
    float8_var_samp float8abs float8div float8eq float8ge float8gt float8larger float8le float8lt \
    float8mi float8mul float8ne float8pl float8send float8smaller float8um float8up floor flt4_mul_cash \
    flt8_mul_cash gcd generate_subscripts get_bit get_byte hash_aclitem hash_array hash_multirange \
    hash_numeric hash_range hash_record hashbpchar hashchar hashenum hashfloat4 hashfloat8 hashinet \
    hashint2 hashint4 hashint8 hashmacaddr hashmacaddr8 hashname hashoid hashoidvector hashtext hashtid \
    height host hostmask inet_merge inet_same_family inet_send inetand inetmi inetmi_int8 inetnot inetor \
    inetpl initcap int2 int24div int24eq int24ge int24gt int24le int24lt int24mi int24mul int24ne \
    int24pl int28div int28eq int28ge int28gt int28le int28lt int28mi int28mul int28ne int28pl \
    int2_mul_cash int2_sum int2abs int2and int2div int2eq int2ge int2gt int2int4_sum int2larger int2le \
    int2lt int2mi int2mod int2mul int2ne int2not int2or int2pl int2send int2shl int2shr int2smaller \
    int2um int2up int2vectorsend int2xor int4 int42div int42eq int42ge int42gt int42le int42lt int42mi \
    int42mul int42ne int42pl int48div int48eq int48ge int48gt int48le int48lt int48mi int48mul int48ne \
    int48pl int4_mul_cash int4_sum int4abs int4and int4div int4eq int4ge int4gt int4inc int4larger \
    int4le int4lt int4mi int4mod int4mul int4multirange int4ne int4not int4or int4pl int4range \
    int4range_canonical int4range_subdiff int4send int4shl int4shr int4smaller int4um int4up int4xor \
    int8 int82div int82eq int82ge int82gt int82le int82lt int82mi int82mul int82ne int82pl int84div \
    int84eq int84ge int84gt int84le int84lt int84mi int84mul int84ne int84pl int8_avg int8_mul_cash \
    int8_sum int8abs int8and int8dec int8dec_any int8div int8eq int8ge int8gt int8inc int8inc_any \
    int8inc_float8_float8 int8larger int8le int8lt int8mi int8mod int8mul int8multirange int8ne int8not \
    int8or int8pl int8pl_inet int8range int8range_canonical int8range_subdiff int8send int8shl int8shr \
    int8smaller int8um int8up int8xor integer_pl_date inter_lb inter_sb inter_sl interval interval_avg \
    interval_cmp interval_div interval_eq interval_ge interval_gt interval_hash interval_hash_extended \
    interval_larger interval_le interval_lt interval_mi interval_mul interval_ne interval_pl \
    interval_pl_date interval_pl_time interval_pl_timestamp interval_pl_timetz interval_send \
    interval_smaller interval_um intervaltypmodin is_normalized isclosed isempty isfinite ishorizontal \
    isopen isparallel isperp isvertical json_array_element json_array_element_text json_array_elements \
    json_array_elements_text json_array_length json_each json_each_text json_extract_path \
    json_extract_path_text json_object json_object_field json_object_field_text json_object_keys \
    json_send json_strip_nulls json_typeof jsonb_array_element jsonb_array_element_text \
    jsonb_array_elements jsonb_array_elements_text jsonb_array_length jsonb_cmp jsonb_concat \
    jsonb_contained jsonb_contains jsonb_delete jsonb_delete_path jsonb_each jsonb_each_text jsonb_eq \
    jsonb_exists jsonb_exists_all jsonb_exists_any jsonb_extract_path jsonb_extract_path_text jsonb_ge \
    jsonb_gt jsonb_hash jsonb_hash_extended jsonb_insert jsonb_le jsonb_lt jsonb_ne jsonb_object \
    jsonb_object_field jsonb_object_field_text jsonb_object_keys jsonb_path_exists jsonb_path_exists_opr \
    jsonb_path_match jsonb_path_match_opr jsonb_path_query jsonb_path_query_array jsonb_path_query_first \
    jsonb_pretty jsonb_send jsonb_set jsonb_set_lax jsonb_strip_nulls jsonb_typeof jsonpath_send \
    justify_days justify_hours justify_interval lag last_value lcm lead left like like_escape line \
    line_distance line_eq line_horizontal line_interpt line_intersect line_parallel line_perp line_send \
    line_vertical ln log log10 lower lower_inc lower_inf lpad lseg lseg_center lseg_distance lseg_eq \
    lseg_ge lseg_gt lseg_horizontal lseg_interpt lseg_intersect lseg_le lseg_length lseg_lt lseg_ne \
    lseg_parallel lseg_perp lseg_send lseg_vertical ltrim macaddr macaddr8 macaddr8_and macaddr8_cmp \
    macaddr8_eq macaddr8_ge macaddr8_gt macaddr8_le macaddr8_lt macaddr8_ne macaddr8_not macaddr8_or \
    macaddr8_send macaddr8_set7bit macaddr_and macaddr_cmp macaddr_eq macaddr_ge macaddr_gt macaddr_le \
    macaddr_lt macaddr_ne macaddr_not macaddr_or macaddr_send make_date make_interval make_time \
    make_timestamp makeaclitem masklen max md5 min min_scale mod mode mul_d_interval multirange \
    multirange_adjacent_multirange multirange_adjacent_range multirange_after_multirange \
    multirange_after_range multirange_before_multirange multirange_before_range multirange_cmp \
    multirange_contained_by_multirange multirange_contained_by_range multirange_contains_elem \
    multirange_contains_multirange multirange_contains_range multirange_eq multirange_ge multirange_gt \
    multirange_intersect multirange_intersect_agg_transfn multirange_le multirange_lt multirange_minus \
    multirange_ne multirange_overlaps_multirange multirange_overlaps_range \
    multirange_overleft_multirange multirange_overleft_range multirange_overright_multirange \
    multirange_overright_range multirange_union name nameconcatoid nameeq nameeqtext namege namegetext \
    namegt namegttext nameiclike nameicnlike nameicregexeq nameicregexne namele nameletext namelike \
    namelt namelttext namene namenetext namenlike nameregexeq nameregexne netmask network network_cmp \
    network_eq network_ge network_gt network_larger network_le network_lt network_ne network_overlap \
    network_smaller network_sub network_subeq network_sup network_supeq normalize notlike npoints \
    nth_value ntile num_nonnulls num_nulls numeric_abs numeric_add numeric_cmp numeric_div \
    numeric_div_trunc numeric_eq numeric_exp numeric_ge numeric_gt numeric_inc numeric_larger numeric_le \
    numeric_ln numeric_log numeric_lt numeric_mod numeric_mul numeric_ne numeric_pl_pg_lsn numeric_power \
    numeric_send numeric_smaller numeric_sqrt numeric_sub numeric_uminus numeric_uplus numerictypmodin \
    nummultirange numnode numrange numrange_subdiff octet_length oid oideq oidge oidgt oidlarger oidle \
    oidlt oidne oidsend oidsmaller oidvectoreq oidvectorge oidvectorgt oidvectorle oidvectorlt \
    oidvectorne oidvectorsend on_pb on_pl on_ppath on_ps on_sb on_sl overlay parse_ident path path_add \
    path_add_pt path_contain_pt path_distance path_div_pt path_inter path_length path_mul_pt path_n_eq \
    path_n_ge path_n_gt path_n_le path_n_lt path_npoints path_send path_sub_pt pclose percent_rank \
    percentile_cont percentile_disc pg_indexam_progress_phasename pg_lsn pg_lsn_cmp pg_lsn_eq pg_lsn_ge \
    pg_lsn_gt pg_lsn_hash pg_lsn_hash_extended pg_lsn_larger pg_lsn_le pg_lsn_lt pg_lsn_mi pg_lsn_mii \
    pg_lsn_ne pg_lsn_pli pg_lsn_send pg_lsn_smaller pg_partition_root pg_size_bytes pg_size_pretty \
    pg_snapshot_send pg_snapshot_xip pg_snapshot_xmax pg_snapshot_xmin pg_visible_in_snapshot \
    pg_wal_lsn_diff pi point point_above point_add point_below point_distance point_div point_eq \
    point_horiz point_left point_mul point_ne point_right point_send point_sub point_vert poly_above \
    poly_below poly_center poly_contain poly_contain_pt poly_contained poly_distance poly_left \
    poly_npoints poly_overabove poly_overbelow poly_overlap poly_overleft poly_overright poly_right \
    poly_same poly_send polygon popen position postgresql_fdw_validator pow power pt_contained_circle \
    pt_contained_poly querytree quote_ident radians radius range_adjacent range_adjacent_multirange \
    range_after range_after_multirange range_agg range_before range_before_multirange range_cmp \
    range_contained_by range_contained_by_multirange range_contains range_contains_elem \
    range_contains_multirange range_eq range_ge range_gt range_intersect range_intersect_agg \
    range_intersect_agg_transfn range_le range_lt range_merge range_minus range_ne range_overlaps \
    range_overlaps_multirange range_overleft range_overleft_multirange range_overright \
    range_overright_multirange range_union rank record_eq record_ge record_gt record_image_eq \
    record_image_ge record_image_gt record_image_le record_image_lt record_image_ne record_le record_lt \
    record_ne regclasssend regcollationsend regconfigsend regdictionarysend regexp_count regexp_instr \
    regexp_like regexp_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table \
    regexp_substr regnamespacesend regoperatorsend regopersend regproceduresend regprocsend regr_avgx \
    regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy regrolesend \
    regtypesend repeat replace reverse right round row_number rpad rtrim scale \
    set_bit set_byte set_masklen setweight sha224 sha256 sha384 sha512 sign similar_escape \
    similar_to_escape sin sind sinh slope split_part sqrt starts_with stddev stddev_pop stddev_samp \
    string_agg string_to_array string_to_table strip strpos substr substring sum tan tand tanh text \
    text_ge text_gt text_larger text_le text_lt text_pattern_ge text_pattern_gt text_pattern_le \
    text_pattern_lt text_smaller textcat texteq texteqname textgename textgtname texticlike texticnlike \
    texticregexeq texticregexne textlen textlename textlike textltname textne textnename textnlike \
    textregexeq textregexne tideq tidge tidgt tidlarger tidle tidlt tidne tidsend tidsmaller time_cmp \
    time_eq time_ge time_gt time_hash time_hash_extended time_larger time_le time_lt time_mi_interval \
    time_mi_time time_ne time_pl_interval time_send time_smaller timedate_pl timestamp_cmp \
    timestamp_cmp_date timestamp_eq timestamp_eq_date timestamp_ge timestamp_ge_date timestamp_gt \
    timestamp_gt_date timestamp_hash timestamp_hash_extended timestamp_larger timestamp_le \
    timestamp_le_date timestamp_lt timestamp_lt_date timestamp_mi timestamp_mi_interval timestamp_ne \
    timestamp_ne_date timestamp_pl_interval timestamp_send timestamp_smaller timestamptypmodin \
    timestamptz_cmp timestamptz_eq timestamptz_ge timestamptz_gt timestamptz_larger timestamptz_le \
    timestamptz_lt timestamptz_mi timestamptz_ne timestamptz_send timestamptz_smaller \
    timestamptztypmodin timetypmodin timetz_cmp timetz_eq timetz_ge timetz_gt timetz_hash \
    timetz_hash_extended timetz_larger timetz_le timetz_lt timetz_mi_interval timetz_ne \
    timetz_pl_interval timetz_send timetz_smaller timetzdate_pl timetztypmodin to_ascii to_hex translate \
    trim_array trim_scale trunc ts_delete ts_filter ts_lexize ts_match_qv ts_match_vq ts_rank ts_rank_cd \
    tsmultirange tsq_mcontained tsq_mcontains tsquery_and tsquery_cmp tsquery_eq tsquery_ge tsquery_gt \
    tsquery_le tsquery_lt tsquery_ne tsquery_not tsquery_or tsquery_phrase tsquerysend tsrange \
    tsrange_subdiff tstzmultirange tstzrange tstzrange_subdiff tsvector_cmp tsvector_concat tsvector_eq \
    tsvector_ge tsvector_gt tsvector_le tsvector_lt tsvector_ne tsvector_to_array tsvectorsend unistr \
    unknownsend unnest upper upper_inc upper_inf uuid_cmp uuid_eq uuid_ge uuid_gt uuid_hash \
    uuid_hash_extended uuid_le uuid_lt uuid_ne uuid_send var_pop var_samp varbit varbit_send varbitcmp \
    varbiteq varbitge varbitgt varbitle varbitlt varbitne varbittypmodin varchar varchartypmodin \
    variance void_send width width_bucket xid xid8_larger xid8_smaller xid8cmp xid8eq xid8ge xid8gt \
    xid8le xid8lt xid8ne xid8send xideq xideqint4 xidneq xidneqint4 xidsend xml_is_well_formed_content \
    xml_is_well_formed_document xmlagg xmlcomment xmlconcat2 xpath xpath_exists";

/// STABLE or VOLATILE in an overload, and still the same on a replica that has reached the mark, or
/// random anyway. `now` and kin depend on the node's clock, `has_*` and `to_reg*` on the catalog at the mark. A session with a
/// temporary schema of its own is on the primary, so `pg_is_other_temp_schema` sees those of others alike.
/// The last few came after 15; `_pg_expandarray` is information_schema's, and pgjdbc asks for keys with it.
const OTHER_FUNCTIONS: &str = "\
    aclexplode age array_to_json array_to_string bernoulli clock_timestamp col_description concat \
    concat_ws convert convert_from convert_to current_database current_schema current_schemas date \
    date_cmp_timestamptz date_part date_trunc enum_first enum_last enum_range extract format format_type \
    gen_random_uuid generate_series get_current_ts_config getdatabaseencoding has_any_column_privilege \
    has_column_privilege has_database_privilege has_foreign_data_wrapper_privilege \
    has_function_privilege has_language_privilege has_parameter_privilege has_schema_privilege \
    has_sequence_privilege has_server_privilege has_table_privilege has_tablespace_privilege \
    has_type_privilege json_agg json_build_array json_build_object json_object json_object_agg \
    json_populate_record json_populate_recordset json_to_record json_to_recordset json_to_tsvector \
    jsonb_agg jsonb_build_array jsonb_build_object jsonb_object jsonb_object_agg jsonb_path_exists_tz \
    jsonb_path_match_tz jsonb_path_query_array_tz jsonb_path_query_first_tz jsonb_path_query_tz \
    jsonb_populate_record jsonb_populate_recordset jsonb_to_record jsonb_to_recordset jsonb_to_tsvector \
    length lo_get make_timestamptz money now numeric obj_description oidvectortypes overlaps \
    pg_char_to_encoding pg_collation_for pg_collation_is_visible pg_column_is_updatable pg_column_size \
    pg_conversion_is_visible pg_describe_object pg_encoding_to_char pg_function_is_visible \
    pg_get_constraintdef pg_get_expr pg_get_function_arg_default pg_get_function_arguments \
    pg_get_function_identity_arguments pg_get_function_result pg_get_function_sqlbody pg_get_functiondef \
    pg_get_indexdef pg_get_keywords pg_get_object_address pg_get_partition_constraintdef \
    pg_get_partkeydef pg_get_replica_identity_index pg_get_ruledef pg_get_serial_sequence \
    pg_get_statisticsobjdef pg_get_statisticsobjdef_columns pg_get_statisticsobjdef_expressions \
    pg_get_triggerdef pg_get_userbyid pg_get_viewdef pg_has_role pg_identify_object \
    pg_identify_object_as_address pg_index_column_has_property pg_index_has_property \
    pg_indexam_has_property pg_is_other_temp_schema pg_opclass_is_visible pg_operator_is_visible pg_opfamily_is_visible \
    pg_options_to_table pg_partition_ancestors pg_partition_tree pg_relation_is_publishable \
    pg_relation_is_updatable pg_sleep pg_sleep_for pg_sleep_until pg_statistics_obj_is_visible \
    pg_table_is_visible pg_ts_config_is_visible pg_ts_dict_is_visible pg_ts_parser_is_visible \
    pg_ts_template_is_visible pg_type_is_visible pg_typeof phraseto_tsquery plainto_tsquery \
    quote_literal quote_nullable random row_security_active row_to_json shobj_description \
    statement_timestamp system time timeofday timestamp timestamptz timetz timezone to_char to_date \
    to_json to_jsonb to_number to_regclass to_regcollation to_regnamespace to_regoper to_regoperator \
    to_regproc to_regprocedure to_regrole to_regtype to_timestamp to_tsquery to_tsvector \
    transaction_timestamp ts_headline ts_parse ts_token_type websearch_to_tsquery xml xml_is_well_formed \
    _pg_expandarray array_reverse array_sort casefold crc32 crc32c gamma lgamma to_bin to_oct xmltext \
    unicode_assigned uuid_extract_timestamp uuid_extract_version uuidv4 uuidv7 any_value array_sample array_shuffle date_add date_subtract erf erfc random_normal bit_count \
    hash_aclitem_extended hash_array_extended hash_multirange_extended hash_numeric_extended hash_range_extended \
    hash_record_extended hashbpcharextended hashcharextended hashenumextended hashfloat4extended hashfloat8extended \
    hashinetextended hashint2extended hashint4extended hashint8extended hashmacaddr8extended hashmacaddrextended \
    hashnameextended hashoidextended hashoidvectorextended hashtextextended hashtidextended jsonb_hash_extended \
    float8_accum float8_combine float8_regr_accum float8_regr_combine pg_column_compression \
    regclass regcollation regnamespace regoper regoperator regproc regprocedure regrole regtype inet";

/// Names that begin with `pg_` and are safe to mention: relations that hold the same on every node,
/// and a few types, schemas and roles. Absent: views over a server's own state (pg_settings, pg_locks,
/// pg_stat_*), and pg_sequences, whose last values run ahead on a replica.
const SAFE_PG_NAMES: &str = "\
    pg_aggregate pg_am pg_amop pg_amproc pg_attrdef pg_attribute pg_auth_members pg_authid pg_cast \
    pg_catalog pg_class pg_collation pg_constraint pg_conversion pg_database pg_database_owner \
    pg_db_role_setting pg_ddl_command pg_default pg_default_acl pg_depend pg_dependencies pg_description \
    pg_enum pg_event_trigger pg_extension pg_foreign_data_wrapper pg_foreign_server pg_foreign_table \
    pg_global pg_group pg_index pg_indexes pg_inherits pg_init_privs pg_language pg_largeobject_metadata \
    pg_lsn pg_matviews pg_mcv_list pg_monitor pg_namespace pg_ndistinct pg_node_tree pg_opclass \
    pg_operator pg_opfamily pg_parameter_acl pg_partitioned_table pg_policies pg_policy pg_proc \
    pg_publication pg_publication_namespace pg_publication_rel pg_range pg_read_all_data pg_rewrite \
    pg_roles pg_rules pg_seclabel pg_seclabels pg_sequence pg_shadow pg_shdepend pg_shdescription pg_shseclabel \
    pg_snapshot pg_statistic pg_statistic_ext pg_statistic_ext_data pg_stats pg_stats_ext \
    pg_stats_ext_exprs pg_subscription pg_subscription_rel pg_tables pg_tablespace pg_toast pg_transform \
    pg_trigger pg_ts_config pg_ts_config_map pg_ts_dict pg_ts_parser pg_ts_template pg_type pg_user \
    pg_user_mapping pg_user_mappings pg_views pg_write_all_data";

/// Built-in functions that are not reads, and what each leaves behind.
const SPECIALS: &[(&str, Special)] = &[
    ("current_setting", Special::CurrentSetting),
    ("set_config", Special::SetConfig),
    (
        "pg_advisory_lock pg_advisory_lock_shared pg_try_advisory_lock pg_try_advisory_lock_shared \
         pg_advisory_unlock pg_advisory_unlock_shared",
        Special::Pins(PinReason::AdvisoryLock),
    ),
    ("pg_backend_pid", Special::Pins(PinReason::BackendPid)),
    // currval and lastval speak of what this session last drew. From their first use on the session keeps
    // its backend, so that later pairs of nextval and lastval meet there.
    ("currval lastval", Special::Pins(PinReason::Other)),
    // dblink and isn are extensions; who gives another function such a name has a backend kept for nothing. A temporary
    // replication slot is its process'.
    (
        "setseed pg_replication_origin_session_setup pg_replication_origin_session_reset \
         dblink_connect dblink_connect_u isn_weak \
         pg_create_physical_replication_slot pg_create_logical_replication_slot \
         pg_copy_physical_replication_slot pg_copy_logical_replication_slot",
        Special::Pins(PinReason::Process),
    ),
    // An exported snapshot ends with its transaction.
    (
        "pg_export_snapshot pg_advisory_unlock_all pg_advisory_xact_lock pg_advisory_xact_lock_shared \
         pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared nextval setval pg_notify \
         txid_current txid_current_if_assigned txid_current_snapshot txid_status pg_current_xact_id \
         pg_current_xact_id_if_assigned pg_current_snapshot pg_xact_status pg_last_committed_xact \
         pg_is_in_recovery pg_last_wal_receive_lsn pg_last_wal_replay_lsn pg_last_xact_replay_timestamp \
         pg_current_wal_lsn pg_current_wal_insert_lsn pg_current_wal_flush_lsn pg_walfile_name \
         inet_server_addr inet_server_port inet_client_addr inet_client_port version pg_postmaster_start_time \
         pg_conf_load_time pg_relation_size pg_table_size pg_indexes_size pg_total_relation_size \
         pg_database_size pg_tablespace_size pg_blocking_pids pg_cancel_backend pg_terminate_backend \
         pg_my_temp_schema pg_client_encoding pg_relation_filenode \
         pg_relation_filepath pg_prepared_statement pg_switch_wal pg_create_restore_point pg_reload_conf \
         lo_creat lo_create lo_unlink lo_from_bytea lo_put lo_open lo_close loread lowrite lo_lseek lo_tell",
        Special::LeavesNothing,
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traps_are_not_on_the_list() {
        let vocabulary = Vocabulary::new();
        for name in [
            "txid_current",
            "pg_backend_pid",
            "current_setting",
            "inet_server_addr",
            "pg_stat_get_activity",
            "set_config",
            "pg_relation_size",
            "query_to_xml",
            "table_to_xml",
            "schema_to_xml",
            "database_to_xml",
            "cursor_to_xml",
            "current_query",
            "ts_stat",
            "ts_rewrite",
            "nextval",
            "setval",
            "lastval",
            "currval",
            "pg_is_in_recovery",
            "pg_advisory_lock",
            "pg_try_advisory_xact_lock",
            "pg_export_snapshot",
            "setseed",
            "lo_export",
            "lo_open",
            "pg_cancel_backend",
            "pg_stat_reset",
            "version",
            "pg_reload_conf",
            "pg_walfile_name",
            "pg_notify",
            "pg_current_snapshot",
            "pg_xact_status",
            "pg_sequence_last_value",
            "satisfies_hash_partition",
            "pg_input_is_valid",
        ] {
            assert!(!vocabulary.get(name.as_bytes()).is_some_and(|word| word.safe_function), "{name}");
        }
        for name in
            ["random", "gen_random_uuid", "clock_timestamp", "pg_sleep", "count", "lower", "now", "sum"]
        {
            assert!(vocabulary.get(name.as_bytes()).is_some_and(|word| word.safe_function), "{name}");
        }
    }

    #[test]
    fn no_name_is_both_safe_and_special() {
        for word in Vocabulary::new().words.values() {
            assert!(!(word.safe_function && word.special.is_some()));
        }
    }
}
