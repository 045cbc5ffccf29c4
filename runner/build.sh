#!/usr/bin/env bash
# Builds the runner as it is deployed: static, with libzstd and the small client (client.c) in it.
#
#   runner/build.sh amd64|arm64 FILE [more flags for go build]
#
# Needs gcc for the architecture (test/setup.sh build). The same source, Go and gcc give the same bytes, wherever they lie:
# no paths, no VCS stamp, no build ids. Names and users are looked up by Go, not by C, which cannot do that statically.
set -euo pipefail
arch="${1:?usage: runner/build.sh amd64|arm64 FILE [more flags for go build]}"
file="$(realpath -m "${2:?usage: runner/build.sh amd64|arm64 FILE [more flags for go build]}")"
shift 2
cd "$(dirname "$0")/.."
case "$arch" in
amd64) cc=x86_64-linux-gnu-gcc machine=x86_64 ;;
arm64) cc=aarch64-linux-gnu-gcc machine=aarch64 ;;
*) echo "runner/build.sh: architecture $arch: expected amd64 or arm64" >&2; exit 2 ;;
esac
# On a machine of the architecture itself, the compiler goes by the shorter name as well.
if ! command -v "$cc" >/dev/null && [ "$(uname -m)" = "$machine" ]; then cc=gcc; fi
command -v "$cc" >/dev/null || { echo "runner/build.sh: $cc is missing: run test/setup.sh build" >&2; exit 1; }
export CC="$cc" CGO_ENABLED=1 GOOS=linux GOARCH="$arch"
unset CGO_CFLAGS CGO_LDFLAGS CGO_CPPFLAGS
exec "${GO:-go}" build -trimpath -buildvcs=false -tags netgo,osusergo \
  -ldflags '-s -w -buildid= -linkmode external -extldflags "-static -Wl,--build-id=none"' -o "$file" "$@" ./runner
