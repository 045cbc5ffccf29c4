#!/usr/bin/env bash
# Measures pgark beside pgBackRest, on the same PostgreSQL, the same data and the same S3 server, in one run, and writes
# bench/RESULTS.md. Rounds and sizes can be set, and a part chosen; 2,000 segments take 64 GB of disk:
#
#   ROUNDS=3 MIB=1024 SEGMENTS=200 bash bench/run.sh
#   ROUNDS=1 SEGMENTS=2000 bash bench/run.sh -only wal
#
# pgBackRest comes from Debian 13 (trixie), in a root directory of its own below .tools/: Debian 12's is too old to be a
# fair peer (no block incremental). Needs root: two programs run as the postgres user, one of them in that root.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then exec sudo -E env "PATH=$PATH" bash "$0" "$@"; fi
root="$PWD/.tools/roots/trixie"
if [ ! -x "$root/usr/bin/pgbackrest" ]; then
  echo "bench: making a Debian 13 root with pgBackRest in .tools/roots/trixie" >&2
  command -v mmdebstrap >/dev/null || { apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends mmdebstrap debian-archive-keyring >/dev/null; }
  mkdir -p "$(dirname "$root")"
  rm -rf "$root"
  mmdebstrap --quiet --variant=minbase --include=pgbackrest,ca-certificates trixie "$root"
fi
# One user, one number: the peer looks its own user up.
sed -i "s/^postgres:x:[0-9]*:[0-9]*:/postgres:x:$(id -u postgres):$(id -g postgres):/" "$root/etc/passwd"
go build -o bin/bench ./bench
exec bin/bench -segments "${SEGMENTS:-200}" -rounds "${ROUNDS:-3}" -mib "${MIB:-1024}" -peer-root "$root" -out bench/RESULTS.md "$@"
