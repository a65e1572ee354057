# Thin: every target is a script in scripts/, which says what it does.
.PHONY: help setup dev test fix bench
help:
	@echo "make dev     build everything and run it here with an example deployed"
	@echo "make test    run all checks (scripts/test PART runs one part)"
	@echo "make fix     format, and rewrite generated files"
	@echo "make bench   measure, beside the peers (scripts/bench NAME)"
	@echo "make setup   install what the above need"
setup: ; @scripts/setup all
dev: ; @scripts/dev
test: ; @scripts/test
fix: ; @scripts/fix
bench: ; @scripts/bench
