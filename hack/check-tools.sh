#!/usr/bin/env bash
# Says in one line what is missing, before minutes of building.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v go >/dev/null; then
	echo "make: Go is needed and is not in PATH: install it from https://go.dev/dl" >&2
	exit 1
fi
# Go 1.21 and newer fetch the version that go.mod names by themselves, unless they were told not to.
if ! said=$(go list -m 2>&1); then
	echo "make: $(go version 2>/dev/null || echo go) does not work here: $(head -1 <<<"$said"); install Go from https://go.dev/dl" >&2
	exit 1
fi
