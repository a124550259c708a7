# Everything one does with this repository. `make` alone lists it.

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOFLAGS_BUILD := -trimpath -ldflags "-X main.version=$(VERSION)"
MODULES = $(shell go list -m -f '{{.Dir}}')
PACKAGES = $(shell go list -m -f '{{.Path}}/...')
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
# How many packages are tested at a time: they start containers, so not too many.
P ?= 2
# Where `make up` keeps its data; dayfly's own default if it is not set.
DATA ?=

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

.PHONY: build
build: ## build bin/dayfly and bin/dayfly-init, both static
	CGO_ENABLED=0 go build $(GOFLAGS_BUILD) -o bin/dayfly ./cmd/dayfly
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o bin/dayfly-init ./services/agent/cmd/dayfly-init

# The name of the image.
IMAGE ?= dayfly

.PHONY: image
image: build ## build the Docker image, from scratch and without any network
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && cp bin/dayfly bin/dayfly-init deploy/image/Dockerfile /etc/ssl/certs/ca-certificates.crt "$$dir" && \
	docker build -q -t $(IMAGE) "$$dir"

.PHONY: demo
demo: build ## show dayfly at work on this machine's Docker, in under a minute; leaves nothing behind
	CGO_ENABLED=0 go build -trimpath -o bin/demo ./test/demo
	bin/demo

.PHONY: up
up: build ## run dayfly in the foreground: API 8080, ingress 8081, admin 8082
	@echo 'Once it is up, in another terminal:'
	@echo "  curl -s 'http://127.0.0.1:8080/v1/tasks?wait=done' -H 'Content-Type: application/json' -d '{\"image\": \"busybox\", \"command\": [\"echo\", \"hi\"]}'"
	@echo '  bin/dayfly run busybox echo hi'
	bin/dayfly up $(if $(DATA),--data $(DATA))

.PHONY: test
test: setup build ## run the tests: real NATS, real Docker; `make cluster` and `make faults` run the longest
	go test -count=1 -p $(P) -timeout 15m work # never from the cache: the tests build and start binaries that it knows nothing of

.PHONY: race
race: setup build ## run all tests with the race detector (needs a C compiler)
	go test -count=1 -race -p $(P) -timeout 30m work

.PHONY: setup
setup: ## install what the tests need beside Go, make and Docker
	@scripts/setup

.PHONY: check
check: check-format check-vet check-modules check-fence check-static ## all that must hold before a commit, save the tests

.PHONY: check-format
check-format:
	@bad=$$(gofmt -l .); if [ -n "$$bad" ]; then echo "not gofmt'ed:"; echo "$$bad"; exit 1; fi

.PHONY: check-vet
check-vet:
	go vet -tags cluster,docs,faults,mutants,page work

.PHONY: check-static
check-static:
	go run $(STATICCHECK) -tags cluster,docs,faults,mutants,page $(PACKAGES)

.PHONY: check-modules
check-modules: # each module is tidy, and whole without the workspace
	@bad=; for m in $(MODULES); do \
		name=$${m#$(CURDIR)/}; \
		(cd $$m && go mod tidy -diff && GOWORK=off go vet ./... && GOWORK=off CGO_ENABLED=0 go build -o /dev/null ./...) || bad="$$bad $$name"; \
	done; if [ -n "$$bad" ]; then echo "not tidy, or not whole without the workspace:$$bad"; exit 1; fi

.PHONY: check-fence
check-fence: # who may require whom
	@scripts/fence

.PHONY: bench
bench: build ## measure: cold starts beside raw Docker, and the control plane alone
	CGO_ENABLED=0 go build -trimpath -o bin/bench ./test/bench
	bin/bench

.PHONY: metrics-check
metrics-check: setup ## ask a real Prometheus every query of the dashboards and rules, under load; `make test` does too
	cd test && go test ./metrics -count=1 -v -timeout 10m

.PHONY: cluster
cluster: build ## test services as processes of their own on three NATS servers that are killed; minutes
	cd test && go test -tags cluster ./cluster ./instances -count=1 -p 1 -timeout 20m

.PHONY: blobs
blobs: setup ## carry a blob of 500 MB to four workers in network namespaces, and count the bytes; `make test` does it with 48 MB
	cd test && BLOB_MB=500 BLOB_TASKS=40 go test ./reach -run ABlobComesOnce -count=1 -v -timeout 20m

.PHONY: docs-check
docs-check: setup ## run what the guides and the README tell their readers to type, on real Docker
	cd test && go test -tags docs ./docs -count=1 -timeout 10m

.PHONY: page
page: setup ## look at the pages in a real Chromium, with 2,000 tasks; SCREENSHOTS=1 takes the pictures in docs anew
	cd test && go test -tags page ./page -count=1 -timeout 10m

.PHONY: faults
faults: ## break things by SEED=… (SEEDS=… of them) for MINUTES=…, and check that nothing is lost or doubled; HISTORY=folder keeps what happened
	cd test && SEED=$(SEED) SEEDS=$(SEEDS) MINUTES=$(MINUTES) HISTORY=$(HISTORY) go test -tags faults ./faults -run 'Faults$$' -count=1 -v -timeout 24h

.PHONY: faults-short
faults-short: ## the same by two fixed seeds, in under four minutes
	cd test && SEED=7 SEEDS=2 MINUTES=0.6 go test -tags faults ./faults -count=1 -timeout 10m

.PHONY: faults-mutants
faults-mutants: ## run the fault test on builds with one rule broken each, MUTANT=… for some of them, until it notices; hours
	cd test && MUTANT="$(MUTANT)" MUTANT_SEEDS=20 go test -tags faults ./faults -run Mutants -count=1 -v -timeout 24h

.PHONY: simulate
simulate: ## run agents, placers and reapers in virtual time under faults: SEEDS=… seeds from SEED=… on, HARD=1 for hard ones; else 1,000 and 20 hard ones
	cd test && HARD=$(HARD) SEED=$(SEED) SEEDS=$(or $(SEEDS),1000) go test ./simulation -run TestSimulation -count=1 -v -timeout 24h
ifeq ($(HARD)$(SEED)$(SEEDS),)
	cd test && HARD=1 SEEDS=20 go test ./simulation -run TestSimulation -count=1 -v -timeout 24h
endif

.PHONY: mutants
mutants: ## break one rule of the services at a time, MUTANT=… for some, and check that the simulation notices within 20 hard seeds
	cd test && MUTANT="$(MUTANT)" go test -tags mutants ./simulation/mutants -count=1 -v -timeout 24h

.PHONY: clean
clean: ## remove what was built
	rm -rf bin
