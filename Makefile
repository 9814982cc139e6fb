# Everything one does with Highwater, in two commands and a few more; `make help` lists them.
# Each target does its own set-up. Needs: Rust (cargo), and PostgreSQL's server programs, which are
# installed from the distribution when they are missing and that is allowed.

SHELL := /bin/sh
CARGO ?= cargo
# How long `make demo` runs: for ever, or for example DEMO_ARGS='--exit-after 30s'.
DEMO_ARGS ?=
# How much `make soak-consistency` does: reads per fault, and runs of the model.
SOAK_READS ?= 20000
SOAK_MODEL_RUNS ?= 5000
# The same for `make soak-failover`: random schedules.
SOAK_FAILOVER_RUNS ?= 200000
# Random orders of faults that `make schedules` plays on real servers.
SCHEDULES ?= 60
# Operations per fault of `make consistency`.
HISTORY_OPERATIONS ?= 50000
# How much `make leaks` does: clients, backends, seconds.
LEAKS_CLIENTS ?= 200
LEAKS_BACKENDS ?= 10
LEAKS_SECONDS ?= 60
# How long `make fuzz` runs.
FUZZ_SECONDS ?= 60
# How often `make failover` kills, freezes and exchanges the primary.
FAILOVER_RUNS ?= 20
# Of `make bench`: --minutes N, --long, --rounds N, --seconds N, --only NAME.
BENCH_ARGS ?=
# Of `make bench-levels`: --seconds N, --clients N, --writes 1,10, --idle N, --only NAME.
LEVELS_ARGS ?=

# How long the traffic of `make page` runs before the pictures are taken, in seconds.
PAGE_SECONDS ?= 90

.DEFAULT_GOAL := help
.PHONY: help setup demo test matrix sizes consistency soak-consistency failover soak-failover schedules leaks drivers suites regress corpus fuzz
.PHONY: page metrics-check man deb systemd images lint fmt clippy doc bench bench-levels audit

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

setup: # what demo and test need: cargo, and PostgreSQL's programs
	@.ci/setup

demo: setup ## a private primary and two replicas, the proxy over them, live traffic; Ctrl-C ends it
	@$(CARGO) build --locked --quiet
	@target/debug/highwater demo $(DEMO_ARGS)

test: setup ## all tests, on real servers of their own
	$(CARGO) test --locked --no-fail-fast

matrix: setup ## all tests on PostgreSQL 15, 16 and 18 (fetches the latter two; MAJORS='16 18': only these)
	@CARGO=$(CARGO) tests/matrix $(MAJORS)

sizes: setup ## COPY of 1 GiB, values of 100 MiB and their like, with a release build; its memory stays small
	$(CARGO) build --locked --release
	HIGHWATER_SIZES=full HIGHWATER_BINARY=$(CURDIR)/target/release/highwater \
		$(CARGO) test --locked --test end_to_end sizes:: -- --nocapture --test-threads=1

soak-consistency: setup ## SOAK_READS reads per fault, by a debug and a release build; no stale one, none backward
	$(CARGO) build --locked --release
	HIGHWATER_MODEL_RUNS=$(SOAK_MODEL_RUNS) $(CARGO) test --locked --test mark -- --nocapture
	HIGHWATER_SOAK_READS=$(SOAK_READS) $(CARGO) test --locked --test end_to_end consistency:: -- \
		--nocapture --test-threads=1
	HIGHWATER_SOAK_READS=$(SOAK_READS) HIGHWATER_BINARY=$(CURDIR)/target/release/highwater \
		$(CARGO) test --locked --test end_to_end consistency:: -- --nocapture --test-threads=1

soak-failover: setup ## SOAK_FAILOVER_RUNS random schedules of faults against the failover machine, in a model, by a release build
	HIGHWATER_MODEL_RUNS=$(SOAK_FAILOVER_RUNS) $(CARGO) test --locked --release --test failover -- --nocapture

schedules: setup ## SCHEDULES random orders of faults on real servers, under writers; HIGHWATER_SCHEDULE_SEED plays one again
	HIGHWATER_SCHEDULES=$(if $(HIGHWATER_SCHEDULE_SEED),1,$(SCHEDULES)) $(CARGO) test --locked --test end_to_end schedules:: -- --nocapture

consistency: setup ## histories of sessions of all levels under faults, checked against each level's promises
	$(CARGO) build --locked --release
	HIGHWATER_HISTORY_OPERATIONS=$(HISTORY_OPERATIONS) HIGHWATER_BINARY=$(CURDIR)/target/release/highwater \
		$(CARGO) test --locked --test end_to_end histories:: -- --nocapture --test-threads=1

failover: setup ## FAILOVER_RUNS failovers and switchovers under load, by a release build; prints first writes, gaps, losses
	$(CARGO) build --locked --release
	@rm -f target/failover.table
	@export HIGHWATER_FAILOVER_TABLE=$(CURDIR)/target/failover.table; failed=0; \
	HIGHWATER_FAILOVER_RUNS=$(FAILOVER_RUNS) HIGHWATER_BINARY=$(CURDIR)/target/release/highwater \
		$(CARGO) test --locked --test end_to_end -- --nocapture --test-threads=1 \
		--skip a_proxy_killed_at_any_step proxied::failover:: a_primary_that_only_the_proxy_cannot_reach || failed=1; \
	$(CARGO) test --locked --test end_to_end a_proxy_killed_at_any_step -- --nocapture || failed=1; \
	printf '\n| what (times in ms) | runs | least | median | most | bar | lost |\n|---|---|---|---|---|---|---|\n'; \
	sort target/failover.table | cut -c3-; exit $$failed

leaks: setup ## LEAKS_CLIENTS over LEAKS_BACKENDS change all kinds of session state; each is compared with a twin
	$(CARGO) build --locked --release
	HIGHWATER_LEAKS_CLIENTS=$(LEAKS_CLIENTS) HIGHWATER_LEAKS_BACKENDS=$(LEAKS_BACKENDS) \
		HIGHWATER_LEAKS_SECONDS=$(LEAKS_SECONDS) HIGHWATER_BINARY=$(CURDIR)/target/release/highwater \
		$(CARGO) test --locked --test end_to_end leaks:: -- --nocapture

page: setup ## the status page in headless Chromium (installs Debian's): pictures in target/page/
	@command -v chromium >/dev/null || .ci/debian install chromium fonts-dejavu-core
	HIGHWATER_BROWSER=$$(command -v chromium) HIGHWATER_PAGE_SECONDS=$(PAGE_SECONDS) \
		$(CARGO) test --locked --test end_to_end page:: -- --nocapture --test-threads=1

metrics-check: setup ## metrics, alert rules and dashboard with Debian's Prometheus (unpacked in target/, not installed)
	@.ci/debian unpack prometheus target/prometheus
	HIGHWATER_PROMETHEUS=$(CURDIR)/target/prometheus/usr/bin \
		$(CARGO) test --locked --test end_to_end prometheus:: -- --nocapture --test-threads=1

man: ## the manual pages and the shells' completions, in target/package/
	$(CARGO) run --locked --quiet -- manual --to target/package

deb: ## a Debian package, with a release build (installs cargo-deb: minutes)
	@command -v cargo-deb >/dev/null || $(CARGO) install --locked cargo-deb
	$(CARGO) build --locked --release
	target/release/highwater manual --to target/package
	$(CARGO) deb --no-build --strip

systemd: deb ## the package under a systemd that runs: started, asked, reloaded, hung, stopped (root, Debian; minutes)
	@packaging/try-under-systemd target/debian/highwater_*.deb

images: ## the images of docker/, without an engine: Debian's buildah on a base made by debootstrap (root; long)
	@docker/build-without-engine

lint: fmt clippy doc ## format, lints as errors, documentation

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --document-private-items

bench: setup ## Highwater beside a direct connection, a bare relay and PgBouncer (5 minutes; BENCH_ARGS='--minutes 20': all of it)
	$(CARGO) bench --locked --bench side_by_side -- --out $(CURDIR)/target/bench $(BENCH_ARGS)

bench-levels: setup ## what each level of consistency costs, and the share of reads on replicas (3 minutes)
	$(CARGO) bench --locked --bench levels -- $(LEVELS_ARGS)

fuzz: ## random texts and mutations against the token scan, for FUZZ_SECONDS
	HIGHWATER_FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO) test --locked --lib classify::fuzz -- --nocapture --include-ignored

corpus: ## PostgreSQL 15's regression SQL against the classifier (root, Debian, network; minutes)
	@tests/corpus.sh

audit: ## licences, sources and bans of all packages (installs cargo-deny: minutes)
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --all-features check bans licenses sources

drivers: setup ## real drivers (Python, Node, Java) against PostgreSQL and through the proxy: same output
	@$(CARGO) build --locked --quiet
	@tests/drivers/run
	@tests/drivers/run console
	@tests/drivers/run split

suites: setup ## the drivers' and ORMs' own test suites, directly and through the proxy (an hour; SUITES='asyncpg django')
	@$(CARGO) build --locked --quiet
	@tests/drivers/run suites $(SUITES)

# The source package of the distribution is fetched and what is needed of it built (Debian, network, a
# C compiler), unless SOURCE names an unpacked source tree of the same version.
regress: setup ## PostgreSQL's own regression suite, directly and through the proxy (minutes)
	@$(CARGO) build --locked --quiet
	@SOURCE=$(SOURCE) tests/drivers/run regress
