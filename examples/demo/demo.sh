#!/usr/bin/env bash
# A guided tour: protect a PostgreSQL with `terraform apply`, wreck it, and get back the exact moment before.
#
# Everything it needs is its own: an S3 server, a PostgreSQL cluster, a directory for pgark's files. All of it lives in
# one temporary directory, listens on loopback or sockets only, and is gone at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
project="$PWD"
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "the demo runs as root or with sudo (PostgreSQL gets a user of its own)" >&2; exit 1; }
  exec sudo -E env "PATH=$PATH" bash "$0" "$@"
fi
unset TF_CLI_CONFIG_FILE ${!AWS_@} ${!PG@} ${!TF_VAR_@}

# --- how it speaks ---------------------------------------------------------------------------------------------------
if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' off=$'\e[0m'; else bold='' dim='' green='' red='' off=''; fi
chapter_number=0 chapter_start=$SECONDS
chapter() {
  chapter_number=$((chapter_number + 1)) chapter_start=$(date +%s%N)
  printf '\n%s%d. %s%s\n' "$bold" "$chapter_number" "$1" "$off"
  [ -z "${2:-}" ] || printf '%s\n' "$2" | fold -s -w 110 | sed 's/^/   /'
}
took() { printf '   %s(%s s)%s\n' "$dim" "$(awk -v n=$(($(date +%s%N) - chapter_start)) 'BEGIN{printf "%.1f", n/1e9}')" "$off"; }
show() { printf '   %s$ %s%s\n' "$dim" "$*" "$off"; }
indent() { sed 's/^/   /'; }

# --- what it starts, it stops ----------------------------------------------------------------------------------------
work=$(mktemp -d /tmp/pgark-demo.XXXXXX)
chmod 755 "$work"
log="$work/demo.log"
: >"$log"
s3_pid='' writer_pid='' ok=''
pgbin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups env HOME="$work/pg" "$@"; }
clean() {
  set +e
  [ -z "$writer_pid" ] || { kill "$writer_pid" && wait "$writer_pid"; } 2>/dev/null
  for pid in "$work"/guest/run/pgark/*/*.pid; do [ -e "$pid" ] && kill "$(cat "$pid")" 2>/dev/null; done
  for data in "$work/pg/data" "$work/pg/restored"; do
    [ -e "$data/postmaster.pid" ] && as_postgres "$pgbin/pg_ctl" -D "$data" -m immediate -w stop >/dev/null 2>&1
  done
  [ -z "$s3_pid" ] || { kill "$s3_pid" && wait "$s3_pid"; } 2>/dev/null
  if [ -n "$ok" ]; then
    rm -rf "$work"
  else
    printf '\n%sThe demo did not finish.%s Its files are kept in %s; the last lines of its log:\n' "$red" "$off" "$work"
    tail -n 30 "$log" | indent
  fi
}
trap clean EXIT
trap 'exit 130' INT TERM
free_port() { # a port that nothing listens on
  local p
  while :; do
    p=$((20000 + RANDOM % 30000))
    (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null || { echo "$p"; return; }
  done
}
until_true() { # seconds command…
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $end ] || { echo "gave up waiting for: $*" >>"$log"; return 1; }; sleep 0.1; done
}

tf=$(command -v terraform || command -v tofu || echo "$project/.tools/bin/tofu")
pgark="$project/bin/pgark"
s3_port=$(free_port) pg_port=$(free_port) restored_port=$(free_port)
export PGARK_ROOT="$work/guest"
export AWS_ACCESS_KEY_ID=demo AWS_REGION=us-east-1 AWS_ENDPOINT_URL="http://127.0.0.1:$s3_port"
AWS_SECRET_ACCESS_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export AWS_SECRET_ACCESS_KEY
sql() { as_postgres "$pgbin/psql" -XqAt -v ON_ERROR_STOP=1 -h "$work/s" -p "${port:-$pg_port}" -d shop "$@"; }

printf '%spgark: every moment of every database, from one apply%s\n' "$bold" "$off"
printf '%sEverything below runs in %s and is removed at the end.%s\n' "$dim" "$work" "$off"

chapter "A PostgreSQL and an S3 server to play with" \
  "PostgreSQL $("$pgbin/postgres" --version | grep -oE '[0-9]+(\.[0-9]+)*' | head -1) on a socket of its own, and versitygw, an S3 server, on a free loopback port."
mkdir -p "$work/s3/backups" "$work/s" "$work/pg" "$work/guest" "$work/tf"
chown postgres: "$work/s" "$work/pg"
ROOT_ACCESS_KEY_ID="$AWS_ACCESS_KEY_ID" ROOT_SECRET_ACCESS_KEY="$AWS_SECRET_ACCESS_KEY" \
  "$project/.tools/bin/versitygw" --port "127.0.0.1:$s3_port" --keep-alive --quiet \
  posix --data-integrity-etag "$work/s3" >>"$log" 2>&1 &
s3_pid=$!
as_postgres "$pgbin/initdb" -D "$work/pg/data" --data-checksums -A trust >>"$log" 2>&1
cat >>"$work/pg/data/postgresql.conf" <<CONF
port = $pg_port
listen_addresses = ''
unix_socket_directories = '$work/s'
archive_mode = on
CONF
as_postgres "$pgbin/pg_ctl" -D "$work/pg/data" -l "$work/pg/server.log" -w start >>"$log" 2>&1
as_postgres "$pgbin/createdb" -h "$work/s" -p "$pg_port" shop
until_true 20 bash -c "exec 3<>/dev/tcp/127.0.0.1/$s3_port"
took

chapter "terraform apply" \
  "The declaration (examples/demo/main.tf) names a repository, a backup job and how long WAL is kept. Applying it checks the machine's prerequisites, writes the job file, starts the runner, points archive_command at it, streams WAL, and proves that a segment arrives."
cp "$project/examples/demo/main.tf" "$work/tf/"
for host in registry.terraform.io registry.opentofu.org; do
  plugins="$work/tf/terraform.d/plugins/$host/pgark/pgark/0.1.0/linux_$(go env GOARCH 2>/dev/null || echo amd64)"
  mkdir -p "$plugins"
  ln -f "$project/bin/terraform-provider-pgark" "$plugins/terraform-provider-pgark_v0.1.0" 2>/dev/null ||
    cp "$project/bin/terraform-provider-pgark" "$plugins/terraform-provider-pgark_v0.1.0"
done
export TF_VAR_repository="s3://backups/demo" TF_VAR_endpoint="$AWS_ENDPOINT_URL" TF_VAR_instance="*-$pg_port" CHECKPOINT_DISABLE=1
cd "$work/tf"
"$tf" init -no-color >>"$log" 2>&1
show "$(basename "$tf") apply"
"$tf" apply -no-color -auto-approve 2>&1 | tee -a "$log" | grep -E 'Creat|complete|Warning|Error|Apply' | indent
instance=$(ls "$work/guest/var/lib/pgark/demo" | head -1)
show "psql -c 'show archive_command'"
sql -c 'show archive_command' | indent
took

chapter "A shop at work" "Customers, orders, and a writer that commits numbered orders all the time."
sql >>"$log" <<'SQL'
CREATE TABLE customer (id int PRIMARY KEY, name text NOT NULL);
INSERT INTO customer SELECT i, 'customer ' || i || ' ' || md5(i::text) FROM generate_series(1, 100000) i;
CREATE TABLE orders (id bigserial PRIMARY KEY, customer int REFERENCES customer, item text, at timestamptz DEFAULT clock_timestamp());
SQL
writer() { while :; do sql -c "INSERT INTO orders (customer, item) SELECT 1 + (random() * 99999)::int, md5(random()::text) FROM generate_series(1, 50)" || break; sleep 0.02; done >>"$log" 2>&1; }
writer & writer_pid=$!
sleep 1
printf '%s orders so far, %s of data\n' "$(sql -c 'select count(*) from orders')" "$(sql -c "select pg_size_pretty(sum(pg_database_size(oid))) from pg_database")" | indent
took

chapter "An image while the writer goes on" \
  "The first image is full; the next ones upload changed pages only, and are complete by themselves all the same."
show "pgark image --job demo --instance $instance"
"$pgark" image --job demo --instance "$instance" 2>&1 | tee -a "$log" | tail -n 3 | indent
sleep 1
show "pgark image --job demo --instance $instance"
"$pgark" image --job demo --instance "$instance" 2>&1 | tee -a "$log" | tail -n 3 | indent
took

chapter "The moment before" "The writer pauses for an instant, so that we know exactly what the database holds. Then it goes on."
sleep 1
kill "$writer_pid" && wait "$writer_pid" 2>/dev/null || true
snapshot() { for t in customer orders; do sql -c "COPY (SELECT * FROM $t ORDER BY id) TO STDOUT"; done; }
snapshot >"$work/before.txt"
moment=$(sql -c "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
sleep 0.2
writer & writer_pid=$!
printf '%s rows noted at %s\n' "$(wc -l <"$work/before.txt")" "$bold$moment$off" | indent
sleep 1.5
took

chapter "The accident" "Somebody means another database."
show "psql -c 'DROP TABLE orders CASCADE; DELETE FROM customer WHERE id % 2 = 0'"
kill "$writer_pid" && wait "$writer_pid" 2>/dev/null || true
writer_pid=''
sql -c 'DROP TABLE orders CASCADE' -c 'DELETE FROM customer WHERE id % 2 = 0' >>"$log" 2>&1
sql -c "SELECT 'relations left: ' || string_agg(relname, ', ') FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace" | indent
took

chapter "Restore to the noted moment, beside the wrecked one" \
  "The WAL segment that holds the moment is not finished yet. Its beginning is in the repository all the same: WAL is streamed, and durable within a second. pgark picks the image, fetches it and the WAL after it, starts a server and waits until it has reached the moment."
all_safe() { "$pgark" status --job demo --instance "$instance" --json | grep -q '"lag_bytes": 0,'; }
until_true 30 all_safe
show "pgark status --job demo"
"$pgark" status --job demo | indent
show "pgark restore --job demo --instance $instance --target-time $moment --data-directory … --port $restored_port --start"
"$pgark" restore --job demo --instance "$instance" --target-time "$moment" \
  --data-directory "$work/pg/restored" --port "$restored_port" --start 2>&1 | tee -a "$log" | tail -n 8 | indent
took

chapter "Every row, compared"
port=$restored_port snapshot >"$work/after.txt"
if ! cmp "$work/before.txt" "$work/after.txt"; then
  printf '   %sDIFFERENT: the restored rows are not the noted ones.%s\n' "$red" "$off"
  exit 1
fi
printf '   %sequal: all %s rows are as they were at %s%s\n' "$green" "$(wc -l <"$work/after.txt")" "$moment" "$off"
as_postgres "$pgbin/pg_ctl" -D "$work/pg/restored" -m fast -w stop >>"$log" 2>&1
took

chapter "The machine is gone" \
  "One more order, one second, and PostgreSQL and the runner are killed. What is in the repository is all there is."
sql -c "CREATE TABLE last_order (id int)" -c "INSERT INTO last_order VALUES (42)" >>"$log"
sleep 1
kill -9 "$(head -1 "$work/pg/data/postmaster.pid")" "$("$pgark" status --job demo --instance "$instance" --json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')"
show "kill -9 postgres pgark; pgark restore --repository s3://backups/demo --latest --data-directory … --start"
rm -rf "$work/pg/restored"
"$pgark" restore --repository s3://backups/demo --path-style --latest \
  --data-directory "$work/pg/restored" --port "$restored_port" --start 2>&1 | tee -a "$log" | tail -n 2 | indent
found=$(port=$restored_port sql -c 'SELECT id FROM last_order' || true)
if [ "$found" != 42 ]; then
  printf '   %sLOST: the last order is not in the restored database.%s\n' "$red" "$off"
  exit 1
fi
printf '   %sthere: order %s, committed a second before the end%s\n' "$green" "$found" "$off"
as_postgres "$pgbin/pg_ctl" -D "$work/pg/restored" -m fast -w stop >>"$log" 2>&1
as_postgres "$pgbin/pg_ctl" -D "$work/pg/data" -l "$work/pg/server.log" -w start >>"$log" 2>&1
took

chapter "What can be restored, and what it costs"
show "pgark list --job demo"
"$pgark" list --job demo | indent
show "$(basename "$tf") output    # the same from the data sources"
"$tf" apply -refresh-only -no-color -auto-approve >>"$log" 2>&1
"$tf" output -no-color | indent
took

chapter "A second plan is empty"
show "$(basename "$tf") plan -detailed-exitcode"
"$tf" plan -no-color -detailed-exitcode >"$work/plan.txt" 2>&1 || { cat "$work/plan.txt" >>"$log"; cat "$work/plan.txt" | indent; exit 1; }
grep -E '^No changes' "$work/plan.txt" | indent
took

chapter "terraform destroy" "The runner goes, the settings come back, the backups stay."
show "$(basename "$tf") destroy"
"$tf" destroy -no-color -auto-approve 2>&1 | tee -a "$log" | grep -E 'Destroy|complete|Warning|Error' | indent
printf 'archive_command is %s again\n' "'$(sql -c 'show archive_command')'" | indent
show "pgark list --repository s3://backups/demo    # still there"
"$pgark" list --repository s3://backups/demo --path-style | sed -n '1,6p' | indent
# A machine without /etc/machine-id keeps the one that pgark made up: by it the repository knows who owns the job's name.
left=$(find "$work/guest" -type f | grep -v -e '/var/log/' -e '/machine-id$' || true)
[ -z "$left" ] || { printf 'left behind on the guest:\n%s\n' "$left" | indent; exit 1; }
took

ok=yes
printf '\n%sDone in %d s.%s Nothing is left running, and %s is removed.\n' "$bold" "$SECONDS" "$off" "$work"
