-- What Highwater's own role needs on PostgreSQL 15 and later, without being a superuser. Run it once on the
-- primary, in the control database (control.database), as a superuser; replicas get it by replication.
-- The role is called highwater here; it exists already:
--   CREATE ROLE highwater LOGIN PASSWORD '...';
-- Leave out the parts of what is not used. `highwater check -c FILE` names what is missing.

-- Always: to see statistics, to read where timelines began.
GRANT pg_monitor TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_file(text, bigint, bigint, boolean) TO highwater;

-- auth.source: query (the verifiers of those who log in).
GRANT SELECT ON pg_catalog.pg_authid TO highwater;

-- failover.mode: manual or auto.
GRANT pg_signal_backend TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_promote(boolean, integer) TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_reload_conf() TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_wal_replay_resume() TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_wal_replay_pause() TO highwater;
GRANT ALTER SYSTEM ON PARAMETER primary_conninfo TO highwater;
GRANT ALTER SYSTEM ON PARAMETER wal_receiver_status_interval TO highwater;
GRANT ALTER SYSTEM ON PARAMETER recovery_min_apply_delay TO highwater;
GRANT ALTER SYSTEM ON PARAMETER default_transaction_read_only TO highwater;
GRANT ALTER SYSTEM ON PARAMETER synchronous_standby_names TO highwater;

-- The same, optional: a row for each promotion, in the database itself.
CREATE SCHEMA IF NOT EXISTS highwater;
CREATE TABLE highwater.epoch (epoch bigint PRIMARY KEY, promotion_uuid uuid NOT NULL, tli bigint NOT NULL, fork_lsn pg_lsn NOT NULL, written_at timestamptz NOT NULL DEFAULT now());
GRANT USAGE ON SCHEMA highwater TO highwater;
GRANT SELECT, INSERT ON highwater.epoch TO highwater;

-- failover.sync.manage: true (a checkpoint proves that a change of synchronous_standby_names is in effect), and
-- highwater rejoin (pg_rewind goes by the new primary's last checkpoint).
GRANT pg_checkpoint TO highwater;

-- failover.slots.manage: true, and replicas that use slots of yours (primary_slot_name): to create a missing one on the new primary.
ALTER ROLE highwater REPLICATION;
-- failover.slots.manage: true.
GRANT ALTER SYSTEM ON PARAMETER primary_slot_name TO highwater;

-- highwater rejoin: what pg_rewind reads of the new primary.
GRANT EXECUTE ON FUNCTION pg_catalog.pg_ls_dir(text, boolean, boolean) TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_stat_file(text, boolean) TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text) TO highwater;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) TO highwater;
