# `make help` lists the targets. V=1 shows the commands.
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

GO         ?= go
CLANG      ?= clang-19
LLVM_STRIP ?= llvm-strip-19
# Debian keeps asm/types.h, which linux/bpf.h includes, apart from the other headers.
BPF_CFLAGS ?= $(addprefix -I,$(wildcard /usr/include/$(shell uname -m)-linux-gnu))
TESTFLAGS  ?=
UNITFLAGS  ?=
# CI's command summary sets TEST_REPORT, and reads what go test prints (see test/report).
# A package may take an hour: the limit is for tests that hang, not for slow machines.
GOTEST     := $(GO) test -timeout 1h $(if $(TEST_REPORT),-json -count=1)
REPORTFLAGS := $(if $(TEST_REPORT),-json '$(TEST_REPORT)')

Q := $(if $(V),,@)
say = @printf '  %-8s %s\n' $(1) $(2)

# The version is what the go command records about the checkout (a tag or the
# commit), which git refuses to tell where the checkout belongs to somebody else.
VCS := $(if $(shell git rev-parse --git-dir 2>&1 >/dev/null),-buildvcs=false,-buildvcs=auto)
BUILD := CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' $(VCS)
# Runs a program of test/ as the recipe's own process: a signal that ends `go run`
# would leave it running.
tool = $(GO) build $(VCS) -o .cache/bin/$(1) ./test/$(1) && exec .cache/bin/$(1)
# Ends a line of a recipe: each has a shell of its own, which exec may end.
define newline


endef

CNI_PLUGINS := plugins/main/bridge plugins/main/ptp plugins/main/loopback plugins/ipam/host-local plugins/meta/portmap

# Packages whose tests make private nodes, load BPF programs and measure: as root, one
# after the other. Those of the runtimes fetch them first and run by themselves, and
# those of the kubelet run in a virtual machine.
ELSEWHERE = %/test/runtimes %/test/kubelet/inside
INTEGRATION = $(filter-out $(ELSEWHERE),$(shell $(GO) list ./test/... ./plugin/datapath/... ./plugin/verdict/... ./cmd/internal/bench/...))
UNIT = $(filter-out $(ELSEWHERE) $(INTEGRATION),$(shell $(GO) list ./...))

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/skipstack, static
	$(call say,BUILD,bin/skipstack)
	$(Q)$(BUILD) -o bin/skipstack ./cmd/skipstack

.PHONY: man
man: build ## Write the man pages to bin/man8
	$(call say,MAN,bin/man8)
	$(Q)bin/skipstack man bin/man8

.PHONY: plugins
plugins: bin/cni/.built ## Build the upstream CNI plugins in bin/cni, for the demo and the tests

bin/cni/.built: go.mod go.sum
	$(call say,BUILD,'bin/cni (half a minute the first time)')
	$(Q)mkdir -p bin/cni
	$(Q)$(BUILD) -o bin/cni/ $(addprefix github.com/containernetworking/plugins/,$(CNI_PLUGINS))
	$(Q)touch $@

.PHONY: demo
demo: build plugins ## As root: two pods in a private node, plain against accelerated, with proof
	$(Q)bin/skipstack bench --quick --cni-path bin/cni

.PHONY: test
test: test-unit test-integration ## Run all tests; as root nothing is skipped for want of privileges

.PHONY: test-unit
test-unit: ## Run the tests that need no root
	$(call say,TEST,unit)
	$(Q)$(GOTEST) $(TESTFLAGS) $(UNITFLAGS) $(UNIT)

.PHONY: test-integration
test-integration: ## Run the tests that need root, each package in a private node of its own
	$(call say,TEST,integration)
	$(Q)$(GOTEST) -p 1 $(TESTFLAGS) $(INTEGRATION)

.PHONY: test-software
test-software: ## As root: run real software between pods, plain and accelerated; needs apt
	$(call say,SOFTWARE,.)
	$(Q)$(call tool,software) $(REPORTFLAGS) $(SOFTWAREFLAGS)

# What docs/benchmarks.md and the README show. On an idle machine; up to an hour and a
# half, as the full set takes all the pairs that it needs. The kernel's default congestion
# control, which most nodes have, and what another one makes of bulk streams.
BENCHCONGESTION ?= cubic
BENCHFLAGS ?= --full --reference unix
# The same again, to see how far two runs agree.
AGAINFLAGS ?= --full --placements same-cpu
BENCHOTHER ?= $(filter bbr,$(shell cat /proc/sys/net/ipv4/tcp_available_congestion_control))
.PHONY: bench-docs
bench-docs: build plugins ## As root: measure, and write docs/benchmarks.md and the README's demo; needs apt
	$(Q)mkdir -p .cache/bench
	$(Q)bin/skipstack bench --quick --congestion-control $(BENCHCONGESTION) --cni-path bin/cni >.cache/bench/demo.txt
	$(Q)bin/skipstack bench $(BENCHFLAGS) --congestion-control $(BENCHCONGESTION) --cni-path bin/cni --json .cache/bench/first.json >.cache/bench/first.txt
	$(Q)bin/skipstack bench $(AGAINFLAGS) --congestion-control $(BENCHCONGESTION) --cni-path bin/cni --json .cache/bench/second.json >.cache/bench/second.txt
	$(Q)$(if $(BENCHOTHER),bin/skipstack bench --tests stream --paths pod --congestion-control $(BENCHOTHER) --cni-path bin/cni --json .cache/bench/other.json >.cache/bench/other.txt)
	$(Q)$(GO) run ./test/loadtools -congestion $(BENCHCONGESTION) -cache .cache/loadtools -json .cache/bench/loadtools.json
	$(Q)$(GO) run ./cmd/internal/benchdoc -bench .cache/bench/first.json -again .cache/bench/second.json \
		$(if $(BENCHOTHER),-congestion .cache/bench/other.json) -tools .cache/bench/loadtools.json -demo .cache/bench/demo.txt

.PHONY: conformance
conformance: ## Run the conformance suite and write docs/conformance.md (root)
	$(call say,GENERATE,docs/conformance.md)
	$(Q)$(GO) test -count=1 $(TESTFLAGS) ./test/conformance -update

.PHONY: test-runtimes
test-runtimes: ## As root: run pods on containerd 1.6 and 2.x, over CRI; needs apt
	$(call say,TEST,runtimes)
	$(Q)SKIPSTACK_RUNTIMES_CACHE='$(CURDIR)/.cache/runtimes' $(GOTEST) -count=1 $(TESTFLAGS) ./test/runtimes

.PHONY: test-vm
test-vm: ## Run tests on other kernels under QEMU: KERNEL=6.1, or all; VMFLAGS='-set full' for every test there, VMFLAGS='-arch arm64'; needs apt, no root
	$(call say,VM,$(or $(KERNEL),'all kernels'))
	$(Q)$(call tool,vm) $(if $(KERNEL),-kernel $(KERNEL)) $(REPORTFLAGS) $(VMFLAGS)

# The tiers that docs/support.md is made of: what is not run again stays as it is there,
# each kernel by itself (TIERS=vm KERNEL=6.12).
TIERS ?= integration runtimes vm
.PHONY: support
support: ## As root: run the tests on runtimes and kernels, and write docs/support.md; needs apt
	$(Q)rm -rf .cache/support && mkdir -p .cache/support
	$(foreach t,$(TIERS),$(Q)$(call tool,summary) -dir .cache/support -allow .ci/allowed-skips step $(t) $(MAKE) test-$(t)$(newline))
	$(call say,GENERATE,docs/support.md)
	$(Q)$(call tool,summary) -dir .cache/support support docs

.PHONY: test-kubelet
test-kubelet: ## Run pods by a kubelet and kube-proxy under QEMU; needs apt, no root (half an hour, then 15 minutes)
	$(call say,KUBELET,.)
	$(Q)$(call tool,kubelet) $(REPORTFLAGS) $(KUBELETFLAGS)

.PHONY: test-mutation
test-mutation: clang ## Take the datapath's rules out one by one; a test must fail for each (long)
	$(call say,MUTATE,bpf)
	$(Q)CLANG=$(CLANG) LLVM_STRIP=$(LLVM_STRIP) BPF_CFLAGS='$(BPF_CFLAGS)' $(GO) run ./test/mutate $(MUTATEFLAGS)

.PHONY: generate
generate: clang ## Rebuild the BPF object and its Go types (CLANG=clang-19)
	$(call say,GENERATE,bpf)
	$(Q)CLANG=$(CLANG) LLVM_STRIP=$(LLVM_STRIP) BPF_CFLAGS='$(BPF_CFLAGS)' $(GO) generate ./bpf

.PHONY: check-generated
check-generated: clang ## Fail if the committed BPF object is not what its source gives
	$(call say,CHECK,bpf)
	$(Q)rm -rf .cache/generated && mkdir -p .cache/generated
	$(Q)cp bpf/*.c bpf/*.h bpf/generate.go .cache/generated/
	$(Q)CLANG=$(CLANG) LLVM_STRIP=$(LLVM_STRIP) BPF_CFLAGS='$(BPF_CFLAGS)' $(GO) generate ./.cache/generated
	$(Q)for f in bpf/*_bpfel.*; do \
		cmp "$$f" ".cache/generated/$${f#bpf/}" || { echo "$$f is out of date: run make generate"; exit 1; }; \
	done

# The compiler's packages, where apt has them. Elsewhere: clang and llvm-strip of
# LLVM 19, and libbpf's headers.
.PHONY: clang
clang:
	$(Q)command -v $(CLANG) >/dev/null && command -v $(LLVM_STRIP) >/dev/null && [ -e /usr/include/bpf/bpf_helpers.h ] || \
		{ apt-get -qq update && apt-get -qq install -y --no-install-recommends clang-19 llvm-19 libbpf-dev >/dev/null; }

.PHONY: lint
lint: ## Run gofmt and go vet
	$(call say,LINT,.)
	$(Q)unformatted=$$(gofmt -l $$(find . -name '*.go' -not -path './.cache/*')); \
		[ -z "$$unformatted" ] || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	$(Q)$(GO) vet ./...

.PHONY: clean
clean: ## Remove what was built
	$(call say,CLEAN,'bin .cache')
	$(Q)rm -rf bin .cache
