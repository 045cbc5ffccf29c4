#!/usr/bin/env bash
# Make the Debian systems that the tests boot.
#
#   test/guests/install.sh DIR SUITE...
#
# Leaves DIR/<suite>-<hash of this file>, a root file system with systemd, sshd, sudo, cron and PostgreSQL of that suite
# (bookworm: 15, trixie: 17), and removes those of the suite that earlier versions of this file made, unless a test uses
# them. It needs root, and takes packages from where apt of this machine takes Debian's; on other systems from
# mmdebstrap's default. Running it again does nothing for what is there.
set -euo pipefail

if [[ $# -lt 2 || $1 == -* ]]; then
	sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
	exit 2
fi
mkdir -p "$1"
dir=$(cd "$1" && pwd)
recipe=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-12)
shift

packages=(systemd systemd-sysv libpam-systemd dbus openssh-server sudo cron postgresql
	gzip iproute2 procps e2fsprogs)

# What slows a boot and is of no use here: terminals, clocks, networks that are already up, chores of an idle hour.
masked=(console-getty.service getty@.service container-getty@.service getty.target getty-static.service
	systemd-networkd.service systemd-networkd.socket systemd-networkd-wait-online.service systemd-resolved.service
	systemd-timesyncd.service systemd-udevd.service systemd-udev-trigger.service systemd-random-seed.service
	systemd-firstboot.service systemd-hwdb-update.service systemd-update-done.service systemd-update-utmp.service
	systemd-update-utmp-runlevel.service systemd-pcrphase.service systemd-journal-catalog-update.service ldconfig.service
	systemd-tpm2-setup.service systemd-tpm2-setup-early.service
	modprobe@.service dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount
	sys-fs-fuse-connections.mount sys-kernel-config.mount kmod-static-nodes.service systemd-modules-load.service
	systemd-binfmt.service systemd-sysctl.service proc-sys-fs-binfmt_misc.automount
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
	logrotate.timer man-db.timer systemd-tmpfiles-clean.timer networking.service)

# mirror prints "uri components" of Debian's main archive, or of its security archive, as apt of this machine knows it.
mirror() { # Debian|Debian-Security
	apt-get indextargets --format '$(REPO_URI) $(LABEL)|$(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
		awk -v label="$1" '{ uri = $1; sub(/^[^ ]+ /, ""); split($0, a, "|"); if (a[1] == label && a[2] == "main") { print uri; exit } }'
}

make_root() { # SUITE TARGET
	local suite=$1 target=$2 main security option line
	local -a options=() sources=()
	main=$(mirror Debian)
	if [[ -z $main ]] && command -v apt-get >/dev/null; then # apt knows labels once it has lists
		apt-get -qq update >&2 || true
		main=$(mirror Debian)
	fi
	security=$(mirror Debian-Security)
	if [[ -n $main ]]; then
		sources+=("deb $main $suite main")
		[[ -z $security ]] || sources+=("deb $security $suite-security main")
	fi
	# apt inside knows nothing of this machine's proxy and of mirrors that stand still.
	for option in Acquire::http::Proxy Acquire::https::Proxy Acquire::Check-Valid-Until; do
		line=$(apt-config dump --no-empty "$option" | grep "^$option " || true)
		[[ -z $line ]] || options+=("--aptopt=$line")
	done
	{ ((${#sources[@]} == 0)) || printf '%s\n' "${sources[@]}"; } >"$target.list"
	LANG=C.UTF-8 mmdebstrap --mode=root --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
		"${options[@]}" --aptopt='Acquire::Languages "none"' \
		--dpkgopt='force-unsafe-io' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--essential-hook='echo "LANG=C.UTF-8" >"$1/etc/default/locale"' \
		"$suite" "$target" $( ((${#sources[@]} == 0)) || echo "$target.list") \
		>"$target.log" 2>&1 || { cat "$target.log" >&2; exit 1; }
	rm -f "$target.list" "$target.log"

	rm -f "$target"/etc/apt/apt.conf.d/99mmdebstrap "$target"/etc/dpkg/dpkg.cfg.d/99mmdebstrap
	rm -f "$target"/etc/apt/sources.list.d/*
	: >"$target/etc/apt/sources.list"
	rm -f "$target"/etc/ssh/ssh_host_* "$target"/etc/machine-id "$target"/var/lib/dbus/machine-id "$target"/etc/hostname
	local unit
	for unit in "${masked[@]}"; do
		ln -sf /dev/null "$target/etc/systemd/system/$unit"
	done
	ln -sf /lib/systemd/system/multi-user.target "$target/etc/systemd/system/default.target"
	# Logins of the tests come thick and fast, and no name server is there to be asked.
	cat >"$target/etc/ssh/sshd_config.d/10-test.conf" <<-'CONF'
		UseDNS no
		MaxStartups 100:30:200
		PrintMotd no
	CONF
	install -d -m 755 "$target/opt/postgresql"

	# The first process of a guest without systemd.
	cat >"$target/usr/sbin/guest-init" <<-'INIT'
		#!/bin/bash
		# Starts what a server has, waits for SIGTERM, and ends everything.
		export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
		down() {
			rm -f /run/guest-init.ready
			pg_lsclusters -h | while read -r version name _ status _; do
				[[ $status != online* ]] || pg_ctlcluster "$version" "$name" stop -m fast
			done
			kill -TERM -1
			for ((i = 0; i < 100; i++)); do
				kill -0 -1 2>/dev/null || break
				read -rt 0.1 <> <(:) || true
			done
			exit 0
		}
		trap down TERM
		install -d -m 755 /run/sshd
		install -d -m 2775 -o postgres -g postgres /run/postgresql
		pg_lsclusters -h | while read -r version name _; do
			[[ $(</etc/postgresql/$version/$name/start.conf) != *auto* ]] || pg_ctlcluster "$version" "$name" start
		done
		/usr/sbin/cron
		[[ ! -e /etc/rc.local ]] || /bin/bash /etc/rc.local
		/usr/sbin/sshd
		touch /run/guest-init.ready
		while :; do
			sleep infinity &
			wait $!
		done
	INIT
	chmod 755 "$target/usr/sbin/guest-init"
	chmod 755 "$target"
}

ensure() { # SUITE
	local suite=$1 target="$dir/$1-$recipe" making="$dir/.making-$1" old
	[[ ! -e $target ]] || return 0
	if [[ $(id -u) != 0 ]]; then
		echo "$0: making $target needs root" >&2
		exit 1
	fi
	exec 9>"$dir/.lock-$suite"
	flock 9 # others may be making it
	[[ ! -e $target ]] || return 0
	echo "guests: making a Debian $suite system in $target" >&2
	rm -rf "$making"
	make_root "$suite" "$making"
	mv "$making" "$target"
	for old in "$dir/$suite"-*; do
		[[ $old == "$target" ]] || flock -n "$old" rm -rf "$old" || true
	done
}

pids=()
for suite in "$@"; do
	(ensure "$suite") &
	pids+=($!)
done
for pid in "${pids[@]}"; do
	wait "$pid"
done
