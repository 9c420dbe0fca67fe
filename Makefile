# qcow2repair: plain GNU make over pkg-config.  `make help' lists the targets.
#
# Layers (docs/DESIGN.md): each directory of core/ is a static library that may
# use only those before it, and each unit test links its own layer and below.

VERSION := 0.1.0
DATED   := 2026-11-22

PREFIX  ?= /usr/local
DESTDIR ?=
BUILD   ?= build
CC      ?= cc
CFLAGS  ?= -O2 -g
WERROR  ?= $(if $(CI),-Werror)
JOBS    ?= $(shell nproc 2>/dev/null || echo 1)
PKG_CONFIG ?= pkg-config

LAYERS := base dev fmt img check heal stack
deps_base  := base
deps_dev   := dev base
deps_fmt   := fmt base
deps_img   := img dev fmt base
deps_check := check dev fmt base
deps_heal  := heal check img dev fmt base
deps_stack := stack heal check img dev fmt base

# One line a step; V=1 shows the commands.
Q   := $(if $(V),,@)
say  = $(if $(V),,@printf '  %-5s %s\n' '$(1)' '$(2)')

pkg = $(shell $(PKG_CONFIG) $(1) $(2) 2>/dev/null)

# Quicker than zlib: ISA-L, else libdeflate, else neither.  ISAL=no and LIBDEFLATE=no do
# without although they are there.
ISAL       ?=
LIBDEFLATE ?=
deflate_pkgs := $(firstword $(foreach l,$(if $(filter no,$(ISAL)),,libisal) \
                                        $(if $(filter no,$(LIBDEFLATE)),,libdeflate), \
                              $(if $(call pkg,--modversion,$(l)),$(l))))
deflate_cflags := $(if $(deflate_pkgs),-DHAVE_$(if $(filter libisal,$(deflate_pkgs)),ISAL,LIBDEFLATE) \
                                       $(call pkg,--cflags,$(deflate_pkgs)))
CORE_LIBS = $(call pkg,--libs,zlib libzstd libnbd $(deflate_pkgs)) -pthread
# Asserts stay on, everywhere: a wrong assumption must stop before it writes.
ALL_CFLAGS = -std=gnu11 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -fPIC -fvisibility=hidden \
             -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers \
             -Wshadow -Wstrict-prototypes -Wmissing-prototypes \
             -Wvla $(WERROR) -pthread -Icore -MMD -MP $(deflate_cflags) $(CFLAGS) $(SANITIZE)

stack_src := $(wildcard core/*.c)
layer_src  = $(if $(filter stack,$(1)),$(stack_src),$(wildcard core/$(1)/*.c))
layer_obj  = $(patsubst %.c,$(BUILD)/%.o,$(call layer_src,$(1)))
layer_lib  = $(BUILD)/lib$(1).a
libs_for   = $(foreach l,$(deps_$(1)),$(call layer_lib,$(l)))

PLUGIN  := $(BUILD)/nbdkit-qcow2repair-plugin.so
MANPAGE := $(BUILD)/nbdkit-qcow2repair-plugin.1

all: $(PLUGIN) $(MANPAGE)
	@:

# --- what has to be there, and what forces a rebuild

# One clear message instead of a page of compiler errors.
$(BUILD)/have-%: tests/deps.sh
	@mkdir -p $(@D)
	@tests/deps.sh --have $*
	@touch $@

# Rewritten only when what it says has changed: other flags, other objects.
define state_rule
$(BUILD)/$(1): FORCE
	@mkdir -p $$(@D)
	$$(shell mkdir -p $(BUILD))$$(file >$$@.new,$$($(1)_state))
	@if cmp -s $$@.new $$@; then rm -f $$@.new; else mv -f $$@.new $$@; fi
endef
flags_state   = $(VERSION) $(CC) $(ALL_CFLAGS) $(LDFLAGS) $(CORE_LIBS)
sources_state = $(sort $(foreach l,$(LAYERS),$(call layer_src,$(l))) $(wildcard plugin/*.c))
$(eval $(call state_rule,flags))
$(eval $(call state_rule,sources))

$(BUILD)/%.o: %.c $(BUILD)/flags | $(BUILD)/have-build
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(ALL_CFLAGS) $(EXTRA_CFLAGS) -c -o $@ $<

define layer_rule
$(call layer_lib,$(1)): $(call layer_obj,$(1)) $(BUILD)/sources
	@rm -f $$@
	$$(call say,AR,$$@)
	$(Q)$(AR) rcs $$@ $$(filter %.o,$$^)
endef
$(foreach l,$(LAYERS),$(eval $(call layer_rule,$(l))))

# --- plugin
# What is undefined in it is nbdkit's own; nbdkit binds everything when it loads
# the plugin, so a test that starts it is the test that nothing is missing.
plugin_obj := $(patsubst %.c,$(BUILD)/%.o,$(wildcard plugin/*.c))
plugin_cflags = -I. $(call pkg,--cflags,nbdkit) -DPACKAGE_VERSION='"$(VERSION)"'
$(plugin_obj): EXTRA_CFLAGS = $(plugin_cflags)
$(PLUGIN): $(plugin_obj) $(call libs_for,stack) $(BUILD)/sources
	$(call say,LINK,$@)
	$(Q)$(CC) $(ALL_CFLAGS) $(LDFLAGS) -shared -Wl,--as-needed -o $@ $(filter %.o %.a,$^) $(CORE_LIBS)

# --- unit tests: tests/unit/<layer>/test-<what>.c
device_obj := $(addprefix $(BUILD)/tests/,fault.o journeys.o recorder.o nbdserver.o)
$(BUILD)/tests/%.o: EXTRA_CFLAGS = -Itests $(call pkg,--cflags,cmocka)
$(BUILD)/tests/unit/%.o: | $(BUILD)/have-unit
unit_tests :=
define unit_rule
unit_tests += $$(patsubst %.c,$(BUILD)/%,$$(wildcard tests/unit/$(1)/test-*.c))
$(BUILD)/tests/unit/$(1)/test-%: $(BUILD)/tests/unit/$(1)/test-%.o $(device_obj) $(call libs_for,$(1)) $(call libs_for,dev)
	$$(call say,LINK,$$@)
	$(Q)$$(CC) $$(ALL_CFLAGS) $$(LDFLAGS) -o $$@ $$^ $$(call pkg,--libs,cmocka) $$(CORE_LIBS)
endef
$(foreach l,$(LAYERS),$(eval $(call unit_rule,$(l))))
.SECONDARY:

unit: $(unit_tests)
	@set -e; for t in $(unit_tests); do echo "== $$t"; $$t; done

# --- fuzzing: tests/fuzz/fuzz-image.c tells what an input is
# A find is left as crash-* in $(FUZZ)/, for tests/fuzz/finds.
FUZZ_SECONDS ?= 600
FUZZ_ARGS    ?=
FUZZ         := $(BUILD)-fuzz
fuzz_obj     := $(addprefix $(BUILD)/tests/fuzz/,bases.o fuzz-image.o)
replay       := $(BUILD)/tests/fuzz/replay
fuzz_image   := $(BUILD)/tests/fuzz/fuzz-image

$(replay): $(BUILD)/tests/fuzz/replay.o $(fuzz_obj) $(call libs_for,stack)
	$(call say,LINK,$@)
	$(Q)$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ $(CORE_LIBS)

$(fuzz_image): $(fuzz_obj) $(call libs_for,stack)
	$(call say,LINK,$@)
	$(Q)$(CC) $(ALL_CFLAGS) $(LDFLAGS) -fsanitize=fuzzer -o $@ $^ $(CORE_LIBS)

fuzz-built: $(fuzz_image)

fuzz:
	@tests/deps.sh --install build fuzz
	@$(MAKE) --no-print-directory BUILD=$(FUZZ) CC=clang \
	   SANITIZE='$(SANITIZER_FLAGS) -fsanitize=fuzzer-no-link' fuzz-built
	@mkdir -p $(FUZZ)/corpus
	@cp tests/fuzz/finds/*.input $(FUZZ)/corpus/
	cd $(FUZZ) && tests/fuzz/fuzz-image -max_total_time=$(FUZZ_SECONDS) -max_len=290 -timeout=20 \
	   -rss_limit_mb=1024 -print_final_stats=1 $(FUZZ_ARGS) corpus

# --- benchmarks: see tests/bench/bench.py
bench_programs := $(BUILD)/tests/bench/synthetic $(BUILD)/tests/peak
$(BUILD)/tests/bench/synthetic: $(BUILD)/tests/bench/synthetic.o $(call libs_for,check)
	$(call say,LINK,$@)
	$(Q)$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ $(CORE_LIBS)

$(BUILD)/tests/peak: $(BUILD)/tests/peak.o
	$(call say,LINK,$@)
	$(Q)$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $<

# BENCH="randread* check" runs these rows only; BENCH_ARGS are passed on.
BENCH      ?=
BENCH_ARGS ?=
bench = PLUGIN=$(abspath $(PLUGIN)) BUILD=$(abspath $(BUILD)) \
        python3 tests/bench/bench.py --json $(BUILD)/bench.json $(BENCH_ARGS)

bench: bench-built
	@$(bench) $(BENCH)

bench-quick: bench-built
	@$(bench) --quick $(BENCH)

# By a make of its own, which finds what has just been installed.
bench-built: deps-bench
	@$(MAKE) --no-print-directory all $(bench_programs)

# --- documents made from the table of findings
gen_findings := $(BUILD)/tests/gen-findings
$(gen_findings): $(gen_findings).o
	$(call say,LINK,$@)
	$(Q)$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $<

$(BUILD)/findings.pod: $(gen_findings)
	$(Q)$(gen_findings) pod >$@

$(MANPAGE): nbdkit-qcow2repair.pod $(BUILD)/findings.pod $(BUILD)/flags
	$(call say,MAN,$@)
	$(Q)sed -e '/^=for comment FINDINGS/r $(BUILD)/findings.pod' $< >$(BUILD)/man.pod
	$(Q)pod2man --utf8 --errors=die --section=1 --name=nbdkit-qcow2repair-plugin \
	  --center=qcow2repair --release=qcow2repair-$(VERSION) --date=$(DATED) $(BUILD)/man.pod $@

docs: $(gen_findings)
	$(gen_findings) md >docs/FINDINGS.md

# All cases of recovery, QEMU's repair beside ours: see tests/recovery.py.
recovery: all
	@tests/deps.sh --install test
	PLUGIN=$(abspath $(PLUGIN)) python3 tests/recovery.py page >$(BUILD)/recovery.md
	@mv $(BUILD)/recovery.md docs/recovery.md

# --- tests
# TESTS="tests/t/a.t ..." runs these only.
TESTS ?= $(unit_tests) $(wildcard tests/t/*.t)
SANITIZER_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
prove = MAKEFLAGS= MAKELEVEL= PLUGIN=$(abspath $(PLUGIN)) BUILD=$(abspath $(BUILD)) \
        prove --exec tests/run-test -j$(JOBS) --failures --comments

check: deps-check
	@$(MAKE) --no-print-directory check-built

check-built: all $(unit_tests) $(bench_programs) $(replay)
	@$(prove) $(TESTS)

check-units: $(unit_tests)
	@$(prove) $(unit_tests)

sanitize:
	@tests/deps.sh --install build unit
	@ASAN_OPTIONS=$${ASAN_OPTIONS:-detect_leaks=1:abort_on_error=0} \
	 UBSAN_OPTIONS=$${UBSAN_OPTIONS:-print_stacktrace=1} \
	 $(MAKE) --no-print-directory BUILD=$(BUILD)-sanitize SANITIZE='$(SANITIZER_FLAGS)' check-units

# Long runs, and a machine made from nothing: hours and root, on demand.
soak: deps-check
	@tests/deps.sh --install soak
	@SOAK=1 $(MAKE) --no-print-directory check-built TESTS='$(wildcard tests/t/*.t tests/soak/*.t)'
	tests/clean-room.sh

check-layers:
	@tests/check-layers.sh . $(foreach l,$(LAYERS),'$(l):$(deps_$(l))')

headers := $(wildcard core/*.h core/*/*.h plugin/*.h tests/*.h tests/fuzz/*.h)
check-headers: | $(BUILD)/have-build
	@set -e; for h in $(headers); do \
	  $(CC) $(filter-out -MMD -MP,$(ALL_CFLAGS)) -Werror $(plugin_cflags) -fsyntax-only -x c $$h; \
	done
	@echo "$(words $(headers)) headers compile alone"

# --- the demonstration: see tests/serve-demo.sh
serve:
	@tests/deps.sh --install build serve
	@$(MAKE) --no-print-directory all
	@PLUGIN=$(abspath $(PLUGIN)) BUILD=$(abspath $(BUILD)) tests/serve-demo.sh

# --- packages
deps:
	@tests/deps.sh --install build unit test serve
	@tests/deps.sh --extras build

deps-bench:
	@tests/deps.sh --install build bench
	@tests/deps.sh --extras build

deps-check:
	@tests/deps.sh --install build unit test

# --- installation
# nbdkit looks for plugins in one place only, whatever our PREFIX is.
plugindir ?= $(call pkg,--variable=plugindir,nbdkit)
mandir    ?= $(PREFIX)/share/man

install: all
	install -d '$(DESTDIR)$(plugindir)' '$(DESTDIR)$(mandir)/man1'
	install -m 755 $(PLUGIN) '$(DESTDIR)$(plugindir)/'
	install -m 644 $(MANPAGE) '$(DESTDIR)$(mandir)/man1/'

uninstall: | $(BUILD)/have-build
	rm -f '$(DESTDIR)$(plugindir)/$(notdir $(PLUGIN))' '$(DESTDIR)$(mandir)/man1/$(notdir $(MANPAGE))'

clean:
	rm -rf $(BUILD) $(BUILD)-sanitize $(FUZZ)

define HELP
make                 build the plugin and its man page in $(BUILD)/
make serve           try it: make a small damaged image (or IMAGE=FILE), heal it, serve it
                     SERVE_ARGS="..." are passed on to nbdkit
make check           all tests; TESTS="tests/t/x.t" for some; installs what they need
make sanitize        the unit tests with the address and undefined behaviour sanitizers
make fuzz            damage images at random for FUZZ_SECONDS (600), with clang's libFuzzer; see docs/TESTING.md
make soak            long runs, and everything again in a clean room (needs root)
make bench           everything measured beside its peers, about 20 minutes: a table, and $(BUILD)/bench.json
                     BENCH="randread* copy" for some rows; docs/BENCHMARKING.md tells them
make bench-quick     the same in small, in under two minutes
make install         PREFIX=$(PREFIX) DESTDIR=$(DESTDIR)
                     plugin: $(plugindir)
                     manual: $(mandir)/man1
make uninstall
make deps            install what is missing, with the system's package manager
make docs            write docs/FINDINGS.md anew from core/check/findings.def
make recovery        write docs/recovery.md anew: damage of every kind, and what becomes of it
make check-layers    who includes whom; make check-headers: each header alone
make clean
Variables: V=1 (show the commands), BUILD, CC, CFLAGS, SANITIZE, WERROR=-Werror, JOBS, PKG_CONFIG, plugindir, mandir,
           ISAL=no, LIBDEFLATE=no (build without, though they are there)
endef
help:
	$(info $(HELP))
	@:

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

FORCE:
.PHONY: all unit bench bench-quick bench-built docs recovery check check-built check-units sanitize fuzz fuzz-built soak check-layers \
        check-headers serve deps deps-bench deps-check install uninstall clean help FORCE
