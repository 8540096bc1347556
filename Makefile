# make demo    show it working on this machine, without Qubes
# make check   whether it works on this machine; six minutes
# make check-all  everything that must be right before a change is published, recipes and packages included
# make clean   remove what these made
#
# make bench   measure it next to what one would use otherwise: bench/results.md; ten minutes on a quiet machine
# make bench-quick  the same, small, in two minutes; its figures are kept nowhere
# make compare  play the same scenes on it and on what one would use otherwise: docs/compare.md; COMPARE="--help"
# make fuzz    10 million random inputs for all that takes input from elsewhere, and the RPC services: hours
# make simulate  the core in pretend worlds, from ever new seeds; SIMULATE="--minutes 60"
# make mutants  what the tests of the core and of routing leave uncaught, of one small change each; half an hour
# make soak    a load with faults, in which every client knows each byte that it must get; SOAK="--minutes 5"
#
# make deb, make rpm                    the packages, in dist/
# make check-installed                  install the debs in Debian 12 and 13, boot these, and try everything
# make check-trixie, make check-sid     the same in one Debian, and what make check runs; half an hour each
# make install-client, install-services without a package manager; with DESTDIR= for one
# make uninstall                        what these two have installed

.PHONY: demo check check-all clean bench bench-quick compare fuzz simulate mutants soak deb rpm check-installed check-trixie check-sid

demo:
	@tools/setup demo
	@/usr/bin/python3 -B -m qrexec_activate demo

# With CHECK_ALL=yes the same as check-all.
check:
	@tools/setup check
	@tools/check

check-all:
	@CHECK_ALL=yes $(MAKE) --no-print-directory check

bench:
	@tools/setup check
	@.venv-debian/bin/python -m bench

bench-quick:
	@tools/setup check
	@.venv-debian/bin/python -m bench --quick

compare:
	@tools/setup check
	@.venv-debian/bin/python -m compare --output docs/compare.md $(COMPARE)

# Guided by what the input covers where atheris is installed: .venv/bin/pip install atheris
fuzz:
	@tools/setup check
	@.venv/bin/python fuzz/run

simulate:
	@tools/setup check
	@.venv/bin/python -m tests.simulation --from $$(date +%s) $(SIMULATE)

mutants:
	@tools/setup check
	@.venv/bin/pip install --quiet 'mutmut>=3.8'
	@.venv/bin/mutmut run --max-children 1
	@.venv/bin/mutmut results

soak:
	@tools/setup check
	@.venv/bin/python soak/run $(SOAK)

clean:
	rm -rf .venv .venv-debian .coverage .coverage.* htmlcov mutants build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What has the libraries of the command, and will run it.
PYTHON ?= /usr/bin/python3
INSTALL_DATA = install -m 644

unit_dir = $(DESTDIR)/usr/lib/systemd
doc_dir = $(DESTDIR)/usr/share/doc/qrexec-activate
man_dir = $(DESTDIR)/usr/share/man

deb:
	@tools/build-deb dist

rpm:
	@tools/build-rpm dist

check-installed:
	@tools/setup check
	@tools/packages-setup
	@CHECK_INSTALLED=yes .venv/bin/python -m pytest tests/installed tests/test_packaging.py tests/test_man.py

# By the ids of the tests: all that is done in one Debian, and only that.
check-trixie check-sid: check-%:
	@tools/setup check
	@tools/packages-setup
	@CHECK_INSTALLED=yes CHECK_INSIDE=$* CHECK_SUITES=$* .venv/bin/python -m pytest tests/installed -k '[$*]'

# What decides where a byte goes is pure, and tested where a package is built. All else needs a systemd user manager.
.PHONY: check-pure
check-pure:
	PYTHONPATH=tests $(PYTHON) -B -m pytest -c /dev/null --rootdir=. --noconftest -p no:cacheprovider -p profiles -q tests/routing/test_names.py tests/routing/test_routes.py tests/routing/test_unitfile.py

.PHONY: man completions install-client install-client-python install-client-data install-services uninstall

man:
	$(PYTHON) -B tools/man build/man

completions:
	tools/completions $(PYTHON) build/completions

# By make and Python alone, and what the command itself needs. On this machine, what a package's scripts do is done, too.
install-client: install-client-python install-client-data
ifeq (,$(DESTDIR))
	systemd-sysusers /usr/lib/sysusers.d/qrexec-activate.conf
	/usr/libexec/qrexec-activate/managers renew
endif

install-client-python:
	$(PYTHON) -B tools/install-python "$(DESTDIR)"

install-client-data: man completions
	install -d $(unit_dir)/user $(unit_dir)/system
	$(INSTALL_DATA) units/* units-user/*.service $(unit_dir)/user
	$(INSTALL_DATA) units/* units-user/qrexec-activate-dom0.service $(unit_dir)/system
	set -e; for folder in units-system/*.d; do \
	    install -d $(unit_dir)/system/$${folder##*/}; \
	    $(INSTALL_DATA) $$folder/*.conf $(unit_dir)/system/$${folder##*/}; \
	done
	install -D -m 644 packaging/sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/qrexec-activate.conf
	install -D -m 755 -t $(DESTDIR)/usr/libexec/qrexec-activate packaging/managers packaging/from-dom0
	set -e; for whose in user system; do \
	    install -d $(unit_dir)/$$whose-generators; \
	    ln -sf ../../../libexec/qrexec-activate/from-dom0 $(unit_dir)/$$whose-generators/qrexec-activate; \
	done
	install -D -m 644 build/completions/bash $(DESTDIR)/usr/share/bash-completion/completions/qrexec-activate
	install -D -m 644 build/completions/zsh $(DESTDIR)/usr/share/zsh/$(ZSH_FOLDER)/_qrexec-activate
	install -D -m 644 build/completions/fish $(DESTDIR)/usr/share/fish/vendor_completions.d/qrexec-activate.fish
	install -D -m 644 -t $(man_dir)/man1 build/man/*.1
	install -D -m 644 -t $(man_dir)/man5 build/man/*.5
	install -D -m 644 -t $(man_dir)/man8 build/man/qrexec-activate-serve.8
	install -D -m 644 -t $(doc_dir) README.md CHANGELOG.md SECURITY.md
	install -D -m 644 -t $(doc_dir)/docs docs/*
	install -d $(doc_dir)/examples
	cp -R examples/. salt $(doc_dir)/examples
	chmod -R u=rwX,go=rX $(doc_dir)/examples

# Debian's zsh looks in vendor-completions, Fedora's in site-functions.
ZSH_FOLDER ?= $(if $(wildcard /etc/debian_version),vendor-completions,site-functions)

# No Python: a qube that only serves needs none.
install-services:
	install -D -m 755 -t $(DESTDIR)/etc/qubes-rpc rpc/qubes.*
	install -D -m 644 -t $(DESTDIR)/etc/qubes/rpc-config rpc/rpc-config/qubes.*
	set -e; for page in man/qubes.*.8; do \
	    install -D -m 644 $$page $(man_dir)/man8/$${page##*/}; \
	    sed -i "s/@VERSION@/$$(cat version)/" $(man_dir)/man8/$${page##*/}; \
	done

# What dom0 gets but for Python, whose package is made of dom0/ itself.
.PHONY: install-dom0 install-dom0-salt
install-dom0:
	install -D -m 664 -t $(DESTDIR)/etc/qubes/policy.d dom0/90-qrexec-activate.policy
	install -D -m 644 -t $(man_dir)/man1 dom0/qvm-connect-route.1
	sed -i "s/@VERSION@/$$(cat version)/" $(man_dir)/man1/qvm-connect-route.1

formula_dir = $(DESTDIR)/srv/formulas/base/qrexec-activate-formula
install-dom0-salt:
	install -D -m 644 -t $(formula_dir)/qrexec-activate salt/qrexec-activate/*
	sed 's/@VERSION@/$(shell cat version)/; s/@REL@/$(shell cat rel)/' salt/FORMULA >$(formula_dir)/FORMULA
	chmod 644 $(formula_dir)/FORMULA
	install -D -m 644 -t $(DESTDIR)/srv/pillar/base/qrexec-activate salt/pillar/init.sls salt/pillar/init.top
	install -D -m 644 -t $(DESTDIR)/etc/salt/minion.d salt/minion.d/formula-qrexec-activate.conf

# What install-client and install-services have put there, and nothing else: what a person wrote stays, also in /etc.
uninstall:
ifeq (,$(DESTDIR))
	if [ -x /usr/libexec/qrexec-activate/managers ]; then /usr/libexec/qrexec-activate/managers stop; fi
endif
	rm -f $(DESTDIR)/usr/bin/qrexec-activate
	rm -rf $(DESTDIR)/usr/lib/python3*/*-packages/qrexec_activate $(DESTDIR)/usr/lib/python3*/*-packages/qrexec_activate-*.dist-info
	rm -rf $(DESTDIR)/usr/libexec/qrexec-activate $(doc_dir)
	rm -f $(unit_dir)/user-generators/qrexec-activate $(unit_dir)/system-generators/qrexec-activate
	rm -f $(DESTDIR)/usr/lib/sysusers.d/qrexec-activate.conf
	rm -f $(DESTDIR)/usr/share/bash-completion/completions/qrexec-activate
	rm -f $(DESTDIR)/usr/share/zsh/*/_qrexec-activate
	rm -f $(DESTDIR)/usr/share/fish/vendor_completions.d/qrexec-activate.fish
	set -e; for name in units/* units-user/*; do rm -f $(unit_dir)/user/$${name##*/} $(unit_dir)/system/$${name##*/}; done
	set -e; for name in units-system/*/*.conf; do rm -f $(unit_dir)/system/$${name#units-system/}; done
	rmdir --ignore-fail-on-non-empty $(unit_dir)/system/qrexec-connect-.service.d 2>/dev/null || true
	set -e; for name in man/*; do rm -f $(man_dir)/man*/$${name##*/}; done
	rm -f $(man_dir)/man1/qrexec-activate-*.1
	set -e; for name in rpc/qubes.*; do rm -f $(DESTDIR)/etc/qubes-rpc/$${name##*/} $(DESTDIR)/etc/qubes/rpc-config/$${name##*/}; done
ifeq (,$(DESTDIR))
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
endif
