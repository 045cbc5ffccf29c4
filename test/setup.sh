#!/usr/bin/env bash
# Installs what a target of the GNUmakefile needs and is missing, from apt, npm and Go modules only, and says so.
#
#   test/setup.sh build     gcc for amd64 and arm64
#   test/setup.sh demo      PostgreSQL, a Terraform or OpenTofu CLI, an S3 server
#   test/setup.sh test      the same, every PostgreSQL major, the guests, and the tools of the tests
#   test/setup.sh guests    what boots whole Debian systems, and the systems
#   test/setup.sh lint      golangci-lint
#   test/setup.sh generate  tfplugindocs and a CLI
#   test/setup.sh bench     as demo; the peer is fetched by bench/run.sh
#
# What can live in the project lives in .tools/; apt packages go to the system (as root or with sudo).
set -euo pipefail
cd "$(dirname "$0")/.."
tools="$PWD/.tools"
mkdir -p "$tools/bin"
what="${1:?usage: test/setup.sh build|demo|test|guests|lint|generate|bench}"

say() { printf 'setup: %s\n' "$*" >&2; }
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else say "need root or sudo for: $*"; exit 1; fi
}

apt_updated=
apt_install() {
  command -v apt-get >/dev/null || { say "this is not Debian or Ubuntu: install $* yourself"; exit 1; }
  say "installing $* with apt"
  if [ -z "$apt_updated" ]; then as_root apt-get -qq update >&2; apt_updated=yes; fi
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@" >/dev/null
}

# Debian makes and starts a cluster when a server is installed; nothing here needs it, so it is told not to.
need_postgresql() {
  compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null && [ "${1:-}" != contrib ] && return
  compgen -G '/usr/lib/postgresql/*/bin/pg_amcheck' >/dev/null && return
  local conf=/etc/postgresql-common/createcluster.d/pgark.conf
  as_root mkdir -p "$(dirname "$conf")"
  echo 'create_main_cluster = false' | as_root tee "$conf" >/dev/null
  trap 'as_root rm -f '"$conf" EXIT
  apt_install postgresql postgresql-contrib
  as_root rm -f "$conf"
  trap - EXIT
}

need_command() { # command package
  command -v "$1" >/dev/null || apt_install "$2"
}

# The runner is linked with libzstd and its small client, statically, for both architectures (runner/build.sh). Debian
# calls the compiler of a foreign architecture by the same name as the machine's own.
need_compilers() {
  need_command gcc gcc
  [ -e /usr/include/stdlib.h ] || apt_install libc6-dev
  [ "$(uname -m)" = x86_64 ] || need_compiler x86_64-linux-gnu gcc-x86-64-linux-gnu libc6-dev-amd64-cross
  [ "$(uname -m)" = aarch64 ] || need_compiler aarch64-linux-gnu gcc-aarch64-linux-gnu libc6-dev-arm64-cross
}

need_compiler() { # triplet package libc
  command -v "$1-gcc" >/dev/null && [ -e "/usr/$1/lib/libc.a" ] || apt_install "$2" "$3"
}

# The tests start SSH servers of their own; the system's is not to run because of them.
need_sshd() {
  [ -x /usr/sbin/sshd ] && return
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e "$policy" ]; then
    made=yes
    trap 'as_root rm -f '"$policy" EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
  fi
  apt_install openssh-server
  if [ -d /run/systemd/system ]; then as_root systemctl --quiet disable ssh.service; fi
  if [ -n "$made" ]; then
    as_root rm -f "$policy"
    trap - EXIT
  fi
}

# Go tools are pinned in tools/go.mod, out of the provider's own module graph.
need_go_tool() { # name package
  local stamp="$tools/bin/.$1.$(sha256sum tools/go.mod | cut -c1-16)"
  [ -x "$tools/bin/$1" ] && [ -e "$stamp" ] && return
  say "building $1 (once)"
  (cd tools && go build -o "$tools/bin/$1" "$2")
  rm -f "$tools/bin/.$1."*
  touch "$stamp"
}

need_cli() {
  command -v terraform >/dev/null && return
  command -v tofu >/dev/null && return
  [ -x "$tools/bin/tofu" ] && return
  say "neither terraform nor tofu is on PATH: building OpenTofu from its Go module (once, about 10 minutes)"
  (cd tools/opentofu && CGO_ENABLED=0 go build -o "$tools/bin/tofu" github.com/opentofu/opentofu/cmd/tofu)
}

need_s3() { need_go_tool versitygw github.com/versity/versitygw/cmd/versitygw; }

need_guests() {
  need_command systemd-nspawn systemd-container
  need_command mmdebstrap mmdebstrap
  need_command ip iproute2
  need_command nsenter util-linux
  [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || apt_install debian-archive-keyring
  as_root bash test/guests/install.sh "$tools/guests" bookworm trixie
}

command -v go >/dev/null || { say "Go is missing: install it (https://go.dev/dl) and run this again"; exit 1; }

case "$what" in
build) need_compilers ;;
demo | bench)
  need_postgresql
  need_command setpriv util-linux
  need_s3
  need_cli
  ;;
test)
  need_postgresql contrib
  need_compilers # the race detector needs the machine's, too
  need_command npm npm
  need_s3
  need_cli
  bash test/pgtest/install.sh "$tools/pg"
  need_sshd
  need_command sudo sudo
  need_command unshare util-linux
  need_guests
  ;;
guests)
  need_command npm npm
  need_s3
  bash test/pgtest/install.sh "$tools/pg"
  need_guests
  ;;
lint)
  need_compilers # what is linked with C is looked at as well
  need_go_tool golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
  ;;
generate)
  need_go_tool tfplugindocs github.com/hashicorp/terraform-plugin-docs/cmd/tfplugindocs
  need_cli
  ;;
*) say "unknown: $what"; exit 2 ;;
esac
