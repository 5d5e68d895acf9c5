#!/usr/bin/env bash
# Builds one program and shows that it gets on: hack/build.sh OUTPUT-FOLDER PACKAGE [GO-BUILD-FLAG...]
# A cold build compiles over a thousand packages; go itself prints nothing then.
set -euo pipefail
out=$1 pkg=$2
shift 2
name=$(basename "$pkg")
if [ -f "$pkg/go.mod" ]; then # a module of its own
	mkdir -p "$out"
	out=$(cd "$out" && pwd)
	cd "$pkg"
	pkg=.
fi
tty=0
[ -t 1 ] && tty=1
go build -v -o "$out/" "$@" "$pkg" 2>&1 | awk -v name="$name" -v tty="$tty" '
	/^[A-Za-z0-9._~\/-]+$/ { # go names each package that it compiles
		n++
		if (tty) { printf "\rbuild: %s: %d packages compiled", name, n; fflush() }
		else if (n % 200 == 0) { print "build: " name ": " n " packages compiled"; fflush() }
		next
	}
	{ if (tty && n) printf "\r"; print > "/dev/stderr" } # errors, and modules being downloaded
	END { if (tty && n) printf "\r%60s\r", ""; print "build: " name (n ? "" : ": nothing to compile") }'
