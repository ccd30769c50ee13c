# lunshift: one target per tier. Go comes from PATH; `make demo` needs nothing else.

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 30s
# What an input covers depends on how goroutines are scheduled where a whole connection is
# fuzzed, so that making it smaller would go on for its full minute each time.
FUZZMINIMIZE ?= 10x
# What make torture does: the same SEED gives the same choices; at least so long.
SEED ?=
DURATION ?= 10m

.PHONY: all build torture demo tools test race vm bench conformance fuzz fmt lint clean

all: build

build:            ## bin/lunshift, one static binary
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/lunshift ./cmd/lunshift

demo: build       ## a whole migration on this machine: no root, no array, under a minute
	bin/lunshift demo

tools:            ## what the tests talk to: tgt, libiscsi, qemu and a C compiler for the race detector (apt)
	sh tests/install.sh

test: tools lint build ## every test with the race detector, then what it makes untrue without
	CGO_ENABLED=1 LUNSHIFT_REQUIRE_TOOLS=1 go test -race -timeout 20m ./...
	LUNSHIFT_REQUIRE_TOOLS=1 go test -timeout 5m -run 'NotAllocate|SixtyFourTebibytes|DeepQueues' ./lun ./target ./state

race: tools       ## the end-to-end tests with the race detector in the service as well (7 minutes)
	CGO_ENABLED=1 LUNSHIFT_E2E_RACE=1 go test -timeout 30m ./tests/e2e

vm: build         ## a Linux in a virtual machine as the initiator (needs qemu-system-x86; no root where /dev/net/tun is open to all)
	LUNSHIFT_VM=1 go test -count=1 -v -timeout 20m ./tests/vm

bench: build      ## lunshift against tgtd, istgt, gotgt and qemu-img, as ratios; writes docs/performance.md
	sh tests/install.sh bench
	go run ./tests/bench -o docs/performance.md

torture: tools    ## arrays that misbehave for long; crashes in every phase, at least 200 and for DURATION, every block checked (SEED, DURATION=10m)
	@LUNSHIFT_TORTURE=$(DURATION) go test -C tests/e2e -run '^TestBackEndFaults' -count 1 -timeout 1h
	@LUNSHIFT_TORTURE=$(DURATION) LUNSHIFT_TORTURE_SEED=$(SEED) go test -C tests/torture -count 1 -timeout 24h
	LUNSHIFT_ENGINE=$(DURATION) go test -count 1 -v -timeout 24h -run '^TestVolumeIsOneArrayInEvery' ./proxy

conformance: tools build ## libiscsi's suite against lunshift in every phase and against tgtd
	go run ./tests/conformance

# Go's fuzzer at times fails with "context deadline exceeded" when its time is over, and has
# found nothing. What it found is in testdata and fails the second time as well.
fuzz:             ## every fuzz target for 30 seconds each (FUZZTIME=5m for longer)
	@for dir in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
		for target in $$(grep -hoE '^func Fuzz[A-Za-z0-9_]+' $$dir/*_test.go | cut -c6-); do \
			echo "$$dir $$target"; \
			fuzz="go test $$dir -run ^$$target\$$ -fuzz ^$$target\$$ -fuzztime $(FUZZTIME) -fuzzminimizetime $(FUZZMINIMIZE)"; \
			$$fuzz || { echo "$$target: once more"; $$fuzz; } || exit 1; \
		done; \
	done

fmt:              ## format the code
	gofmt -w .

lint:             ## what gofmt and go vet have to say
	@files=$$(gofmt -l .); test -z "$$files" || { echo "not formatted, run make fmt: $$files"; exit 1; }
	go vet ./...

clean:            ## remove what build made
	rm -rf bin
