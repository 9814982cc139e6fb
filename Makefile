# Everything one does with Highwater, in two commands and a few more; `make help` lists them.
# Each target does its own set-up. Needs: Rust (cargo), and PostgreSQL's server programs, which are
# installed from the distribution when they are missing and that is allowed.

SHELL := /bin/sh
CARGO ?= cargo
# How long `make demo` runs: for ever, or for example DEMO_ARGS='--exit-after 30s'.
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint fmt clippy doc bench corpus audit

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

corpus: ## PostgreSQL 15's regression SQL against the classifier (root, Debian, network; minutes)
	@tests/corpus.sh

audit: ## licences, sources and bans of all packages (installs cargo-deny: minutes)
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --all-features check bans licenses sources
