# make check holds the architecture; make test holds the behaviour. Both are called by .ci/run.

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory

FUZZTIME ?= 10s

BIN    := .bin
TOOLS  := internal/tools
NESTED := $(patsubst %/go.mod,%,$(shell find . -mindepth 2 -name go.mod -not -path './$(TOOLS)/*' -not -path '*/testdata/*' -not -path '*/vendor/*'))
CROSS  := darwin/arm64 windows/amd64 freebsd/amd64 linux/arm64 linux/386

# Other systems' packages are compiled for their types only: without optimising that takes two thirds of the time.
# lint compiles the same, so that it and cross share what they find in the build cache.
LIGHT := GOFLAGS="$$GOFLAGS '-gcflags=all=-N -l'" CGO_ENABLED=0

# U1000 is reported only where something is unused on both; 386 finds 64-bit atomics that are not aligned.
define MATRIX
linux: GOOS=linux GOARCH=386
darwin: GOOS=darwin GOARCH=arm64
endef
export MATRIX
export GOFLAGS

# Beside the defaults: package comments, receiver names that agree, doc comments that begin with the name.
CHECKS := inherit,ST1000,ST1016,ST1020,ST1021,ST1022

.PHONY: help check format vet lint rooms cross tidy fmt test fuzz cover quickstart tools

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

check: format vet lint rooms cross tidy ## format, vet, staticcheck, import rules, lengths, cross-builds, go.mod: all but the tests

format: $(BIN)/gofumpt
	@out=$$($(BIN)/gofumpt -l .); test -z "$$out" || { printf 'gofumpt (make fmt repairs):\n%s\n' "$$out"; exit 1; }

vet:
	go vet ./...
	@for m in $(NESTED) $(TOOLS); do echo "go vet $$m"; (cd $$m && go vet ./...); done

lint: $(BIN)/staticcheck
	$(LIGHT) $(BIN)/staticcheck -matrix -checks $(CHECKS) ./... <<< "$$MATRIX"

rooms: $(BIN)/rooms
	@cd $(TOOLS) && go test ./...
	$(BIN)/rooms

cross:
	@for p in $(CROSS); do \
		echo "go build, go vet $$p"; \
		export GOOS=$${p%/*} GOARCH=$${p#*/}; \
		$(LIGHT) go build ./...; \
		$(LIGHT) go vet ./...; \
		case $$p in darwin/arm64|linux/386) for m in $(NESTED); do echo "  $$m"; $(LIGHT) go build -C $$m -o /dev/null ./...; $(LIGHT) go vet -C $$m ./...; done;; esac; \
	done

tidy:
	@for m in . $(NESTED) $(TOOLS); do echo "go mod tidy -diff $$m"; (cd $$m && go mod tidy -diff); done

fmt: $(BIN)/gofumpt ## format every file
	$(BIN)/gofumpt -l -w .

test: ## all tests with the race detector; more of them as root
	go test -race ./...

fuzz: ## every fuzz target in the tree for FUZZTIME each (10s)
	@targets=$$(for m in . $(NESTED); do \
		go test -C $$m -list '^Fuzz' ./... | awk -v m=$$m '/^Fuzz/ { name[n++] = $$1 } /^ok/ { for (i = 0; i < n; i++) print m, $$2, name[i]; n = 0 }'; \
	done); \
	test -n "$$targets" || { echo 'no fuzz target found'; exit 1; }; \
	while read -r module package name; do \
		echo "$$package $$name"; \
		once() { go test -C $$module -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x "$$package" < /dev/null 2>&1 | tee /dev/stderr; }; \
		out=$$(once) || { \
			grep -q 'context deadline exceeded' <<< "$$out" && ! grep -q 'Failing input' <<< "$$out" || exit 1; \
			echo 'the end of the time came in between two inputs, which go test takes for a failure (go.dev/issue/75804): again'; \
			once > /dev/null; \
		}; \
	done <<< "$$targets"

cover: ## test coverage by function, and cover.out for go tool cover -html
	go test -coverpkg=./... -coverprofile=cover.out ./...
	@go tool cover -func=cover.out

quickstart: ## three overlay hosts talk
	go run ./examples/quickstart

tools: $(BIN)/gofumpt $(BIN)/staticcheck $(BIN)/rooms ## build the pinned tools into .bin

PINS := $(TOOLS)/go.mod $(TOOLS)/go.sum

$(BIN)/gofumpt: $(PINS)
	go build -C $(TOOLS) -o $(CURDIR)/$@ mvdan.cc/gofumpt

$(BIN)/staticcheck: $(PINS)
	go build -C $(TOOLS) -o $(CURDIR)/$@ honnef.co/go/tools/cmd/staticcheck

$(BIN)/rooms: $(PINS) $(wildcard $(TOOLS)/rooms/*.go)
	go build -C $(TOOLS) -o $(CURDIR)/$@ ./rooms
