# Thin on purpose: what happens is in xtask/.
.PHONY: demo test check clean

# Builds, starts a local cluster, installs the chart and runs docs/examples/hello.yaml in it.
demo:
	@echo "==> building the tool that does it; a minute or two the first time"
	cargo xtask demo

# Unit, property, component and end-to-end tests.
test:
	cargo xtask test

# Format, lints, generated files, licences and advisories.
check:
	cargo xtask check

# Removes the local clusters of this clone and what it has built; what clones share stays in the cache.
clean:
	cargo xtask clean
	cargo clean
