# make demo    show it working on this machine, without Qubes
# make check   everything that must be right before a change is published
# make clean   remove what these made

.PHONY: demo check clean

demo:
	@tools/setup demo
	@/usr/bin/python3 -B -m qrexec_activate demo

check:
	@tools/setup check
	@tools/check

clean:
	rm -rf .venv .venv-debian .coverage .coverage.* htmlcov build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
