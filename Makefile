# Everything one does with Highwater, in two commands and a few more; `make help` lists them.
# Each target does its own set-up. Needs: Rust (cargo), and PostgreSQL's server programs, which are
# installed from the distribution when they are missing and that is allowed.

SHELL := /bin/sh
CARGO ?= cargo
# How long `make demo` runs: for ever, or for example DEMO_ARGS='--exit-after 30s'.
DEMO_ARGS ?=
# Of `make bench`: --long, --rounds N, --seconds N, --only NAME.
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint fmt clippy doc bench audit

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: # what demo and test need: cargo, and PostgreSQL's programs
	@.ci/setup

demo: setup ## a private primary and two replicas, the proxy over them, live traffic; Ctrl-C ends it
	@$(CARGO) build --locked --quiet
	@target/debug/highwater demo $(DEMO_ARGS)

test: setup ## all tests, on real servers of their own
	$(CARGO) test --locked --no-fail-fast

lint: fmt clippy doc ## format, lints as errors, documentation

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --document-private-items

bench: setup ## Highwater beside a direct connection, a bare relay and PgBouncer (4 minutes; BENCH_ARGS=--long: an hour)
	$(CARGO) bench --locked --bench side_by_side -- --out $(CURDIR)/target/bench $(BENCH_ARGS)

audit: ## licences, sources and bans of all packages (installs cargo-deny: minutes)
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --all-features check bans licenses sources
