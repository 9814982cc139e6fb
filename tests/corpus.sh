#!/bin/sh
# PostgreSQL's regression SQL, from Debian's source package, against the classifier: see tests/corpus.rs.
# Needs Debian with network, root, and PostgreSQL 15's programs. Leaves only target/corpus (the package).
set -eu
programs=/usr/lib/postgresql/15/bin
here=$(cd "$(dirname "$0")/.." && pwd)
keep=$here/target/corpus
port=${HIGHWATER_CORPUS_PORT:-7731}

if [ ! -d "$keep/regress" ]; then
	mkdir -p "$keep/lists/partial"
	key='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
	echo "deb-src $key http://deb.debian.org/debian bookworm main" >"$keep/sources.list"
	options="-o Dir::Etc::SourceList=$keep/sources.list -o Dir::Etc::SourceParts=/dev/null
		-o Dir::State::Lists=$keep/lists -o APT::Sandbox::User=root"
	# shellcheck disable=SC2086 # a list of options
	(cd "$keep" && apt-get $options -qq update && apt-get $options -qq --download-only source postgresql-15)
	tar -xjf "$keep"/postgresql-15_*.orig.tar.bz2 -C "$keep" --strip-components=3 --wildcards '*/src/test/regress/*'
fi

data=$(mktemp -d /tmp/highwater-corpus.XXXXXX)
as_postgres() { runuser -u postgres -- env PATH="$programs:$PATH" "$@"; }
stop() {
	for node in standby primary; do
		as_postgres pg_ctl -D "$data/$node" -m immediate stop >/dev/null 2>&1 || true
	done
	rm -rf "$data"
}
trap stop EXIT
cp -r "$keep/regress" "$data/regress"
chown -R postgres "$data"
as_postgres initdb -D "$data/primary" -U postgres -A trust --no-sync >/dev/null
as_postgres tee -a "$data/primary/postgresql.conf" >/dev/null <<EOF
listen_addresses = '127.0.0.1'
unix_socket_directories = '$data'
port = $port
fsync = off
autovacuum = off
max_prepared_transactions = 10
EOF
as_postgres pg_ctl -D "$data/primary" -l "$data/primary.log" -w start >/dev/null
as_postgres pg_basebackup -h 127.0.0.1 -p "$port" -U postgres -D "$data/standby" -R -c fast
echo "port = $((port + 1))" | as_postgres tee -a "$data/standby/postgresql.conf" >/dev/null
as_postgres pg_ctl -D "$data/standby" -l "$data/standby.log" -w start >/dev/null
sql() { as_postgres psql -h 127.0.0.1 -p "$port" -U postgres -q "$@"; }
sql -c 'CREATE DATABASE regression TEMPLATE template0'
# Its functions in C are not there; what needs them fails on both servers.
(cd "$data/regress" && PG_ABS_SRCDIR=$PWD PG_LIBDIR=/nowhere PG_DLSUFFIX=.so \
	sql -d regression -f sql/test_setup.sql >/dev/null 2>&1) || true

HIGHWATER_REGRESS=$data/regress \
	HIGHWATER_PRIMARY="host=127.0.0.1 port=$port user=postgres dbname=regression" \
	HIGHWATER_STANDBY="host=127.0.0.1 port=$((port + 1)) user=postgres dbname=regression" \
	"${CARGO:-cargo}" test --locked --test corpus regression_suite -- --ignored --nocapture
