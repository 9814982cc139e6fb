# Everything one does with Highwater, in two commands and a few more; `make help` lists them.
# Each target does its own set-up. Needs: Rust (cargo), and PostgreSQL's server programs, which are
# installed from the distribution when they are missing and that is allowed.

SHELL := /bin/sh
CARGO ?= cargo
# How long `make demo` runs: for ever, or for example DEMO_ARGS='--exit-after 30s'.
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint fmt clippy doc bench audit drivers regress

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

bench: ## speed of the pure parts
	$(CARGO) bench --locked

audit: ## licences, sources and bans of all packages (installs cargo-deny: minutes)
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --all-features check bans licenses sources

drivers: setup ## real drivers (Python, Node) against PostgreSQL and through the proxy: same output
	@$(CARGO) build --locked --quiet
	@tests/drivers/run

# Needs PostgreSQL's source (`apt-get source postgresql-15`, ./configure) with src/test/regress/regress.so.
regress: setup ## PostgreSQL's regression suite through the proxy; SOURCE=its source tree
	@$(CARGO) build --locked --quiet
	@tests/drivers/run regress $(SOURCE)
