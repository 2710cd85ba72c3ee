# `make` lists the targets. Each target installs what it needs first; a second time that costs nothing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build demo test lint bench bench-cluster cluster-up cluster-down test-cluster clean

TARGET := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
AGENT := target/agent/$(TARGET)/agent/carrel-agent
CARREL := target/release/carrel

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## Install what building and running need (apt, npm)
	@.ci/setup build

build: setup ## Build target/release/carrel, with the static agent and the web page inside
	@echo "==> agent (static)"
	@CARGO_TARGET_DIR=target/agent RUSTFLAGS="-C target-feature=+crt-static" \
	    cargo build --locked --profile agent -p carrel-agent --target $(TARGET)
	@echo "==> web page"
	@npm --prefix gateway/page run --silent build
	@echo "==> carrel (the first time its libraries too: some minutes)"
	@cargo build --locked --release -p carrel-gateway
	@ls -lh $(CARREL) | awk '{print "==> built " $$NF ", " $$5}'

demo: build ## Build, then run a server with one exam and one session; Ctrl-C ends it and leaves nothing
	@$(CARREL) demo

test: build ## Run all tests: Rust, web page, real clients from the outside, a real Kubernetes
	@.ci/setup test
	@tests/run

lint: setup ## Formatting, clippy, documentation, types of the page, licences
	@.ci/setup lint
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet
	npm --prefix gateway/page run --silent check
	cargo deny --log-level error check bans licenses sources

bench: build ## Compare with a plain sshd in one run and print a table
	@.ci/setup test
	@tests/bench/run

bench-cluster: build ## Compare with an sshd that runs `kubectl exec`, on a real Kubernetes, in one run
	@.ci/setup test
	@tests/bench/run-cluster

cluster-up: ## Bring a real single-node Kubernetes up on this machine
	@tests/cluster/up

cluster-down: ## End it and leave nothing
	@tests/cluster/down

test-cluster: build ## Run the tests on that Kubernetes (brings it up, and down if it was not up)
	@.ci/setup test
	@tests/run cluster

clean: ## Remove what was built
	rm -rf target gateway/page/dist gateway/page/node_modules
