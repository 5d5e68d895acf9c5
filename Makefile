# make demo    the main job: three clusters and a machine joined into one mesh, checked step by step
# make test    everything: unit, golden, fuzz seeds, real Envoy, the demo's steps end to end
# make help    all targets

SHELL       := /bin/bash
ENVOY_VERSION := 1.40.0
BIN         := build/bin
PROGRAMS    := isthmusd isthmus isthmus-agent coredns
APPS        := bookstore caller
GOFLAGS_BUILD := -trimpath -ldflags '-s -w'
export ENVOY ?= $(CURDIR)/build/envoy/envoy
export GOFLAGS ?= -mod=readonly

.PHONY: help build envoy demo test unit e2e lint fuzz clean proto

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

build: ## build every program into build/bin
	@mkdir -p $(BIN)
	@for p in $(PROGRAMS); do echo "build: $$p"; go build $(GOFLAGS_BUILD) -o $(BIN)/$$p ./cmd/$$p || exit 1; done
	@for a in $(APPS); do echo "build: $$a"; go build $(GOFLAGS_BUILD) -o $(BIN)/$$a ./e2e/apps/$$a || exit 1; done
	@echo "build: demo and lab"; go build $(GOFLAGS_BUILD) -o $(BIN)/ ./e2e/lab/cmd/lab ./e2e/demo

envoy: ## fetch Envoy into build/envoy
	@if [ "$(ENVOY)" = "$(CURDIR)/build/envoy/envoy" ]; then hack/fetch-envoy.sh $(ENVOY_VERSION) build/envoy; fi

demo: envoy build ## run the main job; KEEP=1 leaves it running
	@$(BIN)/demo $(if $(KEEP),--keep)

test: lint unit e2e ## run everything
	@echo "test: all passed"

unit: envoy ## unit, golden, property and real-Envoy tests, with the race detector
	REQUIRE_TOOLS=1 go test -race -timeout 15m $$(go list ./... | grep -v /e2e/)

e2e: envoy build ## the lab and the demo's seven steps as tests
	REQUIRE_TOOLS=1 go test -race -count=1 -p 1 -timeout 20m ./e2e/...

lint: ## formatting and vet; the import rules are a test in internal/arch
	@test -z "$$(gofmt -l .)" || { echo "lint: gofmt these:"; gofmt -l .; exit 1; }
	go vet ./...

FUZZTIME ?= 10s
fuzz: ## run each fuzz target for FUZZTIME
	@go list ./... | while read -r p; do for f in $$(go test -list '^Fuzz' $$p 2>/dev/null | grep ^Fuzz); do echo "fuzz: $$p $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p || exit 1; done; done

proto: ## regenerate the wire types (needs protoc and protoc-gen-go)
	protoc -I . --go_out=. --go_opt=paths=source_relative api/federation/v1/federation.proto api/dns/v1/dns.proto

clean: ## remove what was built
	rm -rf build
