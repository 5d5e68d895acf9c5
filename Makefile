# make demo    the main job: three clusters and a machine joined into one mesh, checked step by step
# make test    everything: unit, golden, fuzz seeds, real Envoy, the demo's steps end to end
# make help    all targets

SHELL       := /bin/bash
ENVOY_VERSION := 1.40.0
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
BIN         := build/bin
PROGRAMS    := isthmusd isthmus isthmus-agent isthmus-cni coredns
TEST_PROGRAMS := e2e/apps/bookstore e2e/apps/caller e2e/apps/knock e2e/apps/samples e2e/apps/hello e2e/kubelab/cmd/labcni e2e/lab/cmd/lab e2e/demo
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
BUILD_FLAGS := -trimpath -buildvcs=false
LINK_FLAGS  := -s -w -X github.com/isthmus-mesh/isthmus/internal/version.Version=$(VERSION)
FETCHED     := $(CURDIR)/build/envoy/envoy
export ENVOY ?= $(FETCHED)
export GOFLAGS ?= -mod=readonly

.PHONY: spare help tools build kube lab envoy demo test check unit e2e bench bench-dns bench-kube bench-sync bench-xds lint vuln fuzz simulate attack clean proto

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

tools:
	@hack/check-tools.sh

build: tools ## build every program into build/bin
	@mkdir -p $(BIN)
	@set -e; for p in $(PROGRAMS); do hack/build.sh $(BIN) ./cmd/$$p $(BUILD_FLAGS) -ldflags '$(LINK_FLAGS)'; done
	@set -e; for p in $(TEST_PROGRAMS); do hack/build.sh $(BIN) ./$$p $(BUILD_FLAGS) -ldflags '-s -w'; done

KUBE_PROGRAM := $(BIN)/kube
kube: tools $(KUBE_PROGRAM) ## build Kubernetes for the lab into build/bin, once: ten minutes of two cores when nothing is cached
$(KUBE_PROGRAM): $(wildcard e2e/kube/*.go) e2e/kube/go.mod e2e/kube/go.sum
	@version=$$(awk '$$1 == "k8s.io/kubernetes" { print $$2 }' e2e/kube/go.mod); \
	hack/build.sh $(BIN) ./e2e/kube $(BUILD_FLAGS) -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$$version"
	@touch $@ && ln -sf kube $(BIN)/kubectl

TOPOLOGY ?= gateway
lab: envoy kube build ## leave the Kubernetes clusters of TOPOLOGY up: single-vpn, gateway, multi-control-plane, three-networks, mixed or a file
	@$(BIN)/lab kube --keep $(TOPOLOGY)

envoy: ## fetch Envoy into build/envoy, unless ENVOY names another
	@if [ "$$ENVOY" = "$(FETCHED)" ]; then hack/fetch-envoy.sh $(ENVOY_VERSION) build/envoy; \
	elif [ ! -x "$$ENVOY" ]; then echo "envoy: ENVOY=$$ENVOY is no program: correct it, or unset it and Envoy is fetched" >&2; exit 1; fi

# What the demo needs is checked before the minutes of building that follow.
demo: tools envoy ## run the main job; KEEP=1 leaves it running
	@mkdir -p $(BIN) && hack/build.sh $(BIN) ./e2e/demo $(BUILD_FLAGS) -ldflags '-s -w' && $(BIN)/demo --check
	@$(MAKE) --no-print-directory build
	@$(BIN)/demo $(if $(filter-out 0 no false,$(KEEP)),--keep)

test: check unit ## run everything
	@$(MAKE) --no-print-directory -j2 e2e spare
	@echo "test: all passed"

# What only computes runs beside what mostly waits, and takes the processors that are idle.
spare:
	@nice -n 19 $(MAKE) --no-print-directory simulate SEEDS=20000
	@nice -n 19 $(MAKE) --no-print-directory attack JOINS=200000

check: tools ## formatting and vet
	@files="$$(gofmt -l api bench cmd discovery dns e2e eastwest federation internal topologies 2>/dev/null)"; \
	test -z "$$files" || { echo "check: run gofmt -w on these:"; echo "$$files"; exit 1; }
	go vet ./...

# Tests wait more than they compute: four packages at a time take what two cores have.
# What go test -json prints becomes a line a package, the output of what failed, and a table of what took the longest.
TESTLOG = go run ./hack/testlog

unit: tools envoy kube ## unit, golden, property and real-Envoy tests and the import rules, with the race detector
	@set -o pipefail; REQUIRE_TOOLS=1 go test -json -race -p 4 -timeout 30m $$(go list ./... | grep -v /e2e/) | $(TESTLOG)

# Stories are last and alone: two at a time take what two cores have. They only drive programs, and go without the race
# detector; what they are made of has it.
e2e: envoy kube build ## the lab, the demo's seven steps and the stories on Kubernetes clusters as tests
	@set -o pipefail; REQUIRE_TOOLS=1 go test -json -race -count=1 -p 3 -timeout 30m $$(go list ./e2e/... | grep -v '/e2e/scripts$$') | $(TESTLOG)
	@set -o pipefail; REQUIRE_TOOLS=1 go test -json -count=1 -timeout 30m ./e2e/scripts | $(TESTLOG)

conformance: tools ## build the conformance suite of the Kubernetes Gateway API, which a story of "make soak" runs
	@mkdir -p $(BIN); cd e2e/conformance/gatewayapi && go build -trimpath -o $(CURDIR)/$(BIN)/echo-basic sigs.k8s.io/gateway-api/conformance/echo-basic && go test -c -trimpath -o $(CURDIR)/$(BIN)/gatewayapi-conformance .

soak: envoy kube build conformance ## the longer stories on Kubernetes clusters, which repeat under load, loss and time what "make e2e" checks
	@set -o pipefail; SOAK=1 REQUIRE_TOOLS=1 go test -json -count=1 -p 1 -timeout 60m -run 'TestSoak|TestManyPods|TestAgainEqualsTranslate' ./e2e/scripts ./discovery/source/kube ./discovery/translate | $(TESTLOG)

bench: tools envoy build ## times of changes and memory on the demo's world, and Go benchmarks; results in bench/results
	@mkdir -p bench/results
	go run ./bench/spine | tee bench/results/spine.txt
	go test -run '^$$' -bench OneEndpoint -benchtime 30x ./discovery/store ./cmd/isthmusd/internal/views ./discovery/xds | grep -E '^(Benchmark|pkg)' | tee bench/results/one-endpoint.txt

bench-xds: build ## isthmusd under 1 to 1,000 xDS clients, with go-control-plane's LinearCache as the floor; results in bench/results
	@mkdir -p bench/results
	go run ./bench/xds | tee bench/results/xds.txt

bench-dns: build ## the CoreDNS plugin against CoreDNS's hosts and file, with dnsperf; results in bench/results
	@mkdir -p bench/results
	go run ./bench/dns | tee bench/results/dns.txt

bench-sync: tools ## record stream of two clusters with 100,000 endpoints: join, idle, one change, reconnection; results in bench/results
	@mkdir -p bench/results
	BENCH_SYNC=$(CURDIR)/bench/results/sync.txt go test -count=1 -timeout 10m -run '^TestSync$$' ./federation/peering

bench-kube: envoy kube build ## from kubectl apply of one replica more to its first request from another cluster, on two clusters of the lab (root)
	@mkdir -p bench/results
	go run ./bench/scaleup | tee bench/results/scaleup.txt

lint: check ## check, the import rules and staticcheck (fetched as a Go module)
	go test ./internal/arch
	go run $(STATICCHECK) ./...

vuln: tools ## known vulnerabilities in what is linked; needs a network that reaches the vulnerability database
	go run $(GOVULNCHECK) ./...

SEEDS ?= 1000000
simulate: tools ## the federation's core over a faulty network, SEEDS times (a million), without the race detector; SEED=n tells the story of one
	SIM_SEED=$(SEED) SIM_SEEDS=$(SEEDS) go test -count=1 -timeout 24h -v -run '^TestSimulation$$' ./federation/protocol

JOINS ?= 10000000
attack: tools ## JOINS mutated joins (ten million), and a thousand tokens that 64 race for, with the store killed in between
	ATTACK_JOINS=$(JOINS) ATTACK_TOKENS=1000 go test -count=1 -timeout 24h -v -run '^Test(MutatedJoins|Race|RaceStoreKilled)$$' ./federation/token

FUZZTIME ?= 10s
fuzz: tools ## run each fuzz target for FUZZTIME
	@go list ./... | while read -r p; do for f in $$(go test -list '^Fuzz' $$p 2>/dev/null | grep ^Fuzz); do echo "fuzz: $$p $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p || exit 1; done; done

proto: ## regenerate the wire types (needs protoc and protoc-gen-go)
	protoc -I . --go_out=. --go_opt=paths=source_relative api/federation/v1/federation.proto api/dns/v1/dns.proto

clean: ## remove what was built, Envoy and logs included
	rm -rf build
