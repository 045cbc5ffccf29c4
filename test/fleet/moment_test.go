//go:build linux

package fleet

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// restored is an instance that is to be restored to a moment, beside itself.
type restored struct {
	instance  string // its name
	major     int
	directory string // its data directory; the copy's is beside it
	sockets   string
	port      int    // the copy's is higher by a thousand
	by        string // "time" or "lsn": how the moment is named
	location  string // of the tablespace "fast", where half of the content lies; "" for none
	checksums bool
	segment   int // MiB of a WAL segment
}

// momentScript lives through a moment: content, an image, more content of every kind that has to arrive and to vanish, and
// the moment; then what must not be there afterwards. It waits until PostgreSQL has been told that all of it is stored,
// restores the moment beside the original, and compares. Its arguments are JOB INSTANCE BIN DIRECTORY SOCKETS PORT BY
// LOCATION CHECKSUMS SEGMENT.
const momentScript = `
job=$1 instance=$2 bin=$3 directory=$4 sockets=$5 port=$6 by=$7 location=$8 checksums=$9 segment=${10}
copy=$directory.restored copyport=$((port + 1000))
dir=$(mktemp -d)
cd /

sql() { # PORT; the statements come on standard input
	runuser -u postgres -- psql -XAtq -v ON_ERROR_STOP=1 -h "$sockets" -p "$1" -d postgres -f -
}
content() { # PORT
	sql "$1" <<-'END'
		select 'ledger', count(*), sum(amount), md5(string_agg(l::text, ';' order by n)) from ledger l;
		select 'papers', count(*), md5(string_agg(p::text, ';' order by n)) from papers p;
		select 'by index', count(*) from ledger where amount between 100 and 200;
		select 'relations', string_agg(relname, ' ' order by relname) from pg_class where relnamespace = 'public'::regnamespace;
		select name, setting from pg_settings where name in ('data_checksums', 'wal_segment_size') order by name;
	END
}

[ "$(echo 'show data_checksums; show wal_segment_size' | sql $port | paste -sd' ')" = "$checksums $segment" ]
sql $port <<-END
	create table ledger (n int primary key, amount numeric, text text);
	create index on ledger (amount);
	insert into ledger select i, i % 1000, md5(i::text) from generate_series(1, 20000) i;
	create table papers (n int primary key, body text) ${location:+tablespace fast};
	alter table papers alter body set storage external;
	insert into papers select i, repeat(md5(i::text), 300) from generate_series(1, 400) i;
END
/usr/local/bin/pgark image --job "$job" --instance "$instance" >/dev/null

sql $port <<-'END'
	insert into ledger select i, i % 1000, md5(i::text) from generate_series(20001, 30000) i;
	select pg_switch_wal() \g /dev/null
	update ledger set amount = -amount where n % 7 = 0;
	delete from ledger where n % 11 = 0;
	insert into papers select i, repeat(md5(i::text), 300) from generate_series(401, 500) i;
	create table added as select 1 as n;
	begin;
	insert into ledger values (1000001, 1, 'rolled back');
	rollback;
END
content $port >"$dir/moment"
lsn=$(echo 'select pg_current_wal_lsn()' | sql $port)
time=$(date -u +%Y-%m-%dT%H:%M:%S.%6NZ)
sleep 0.01
sql $port <<-'END'
	insert into ledger values (2000001, 1, 'later');
	update ledger set amount = 0;
	delete from papers where n % 2 = 0;
	drop table added;
	create table late (n int);
END
last=$(echo 'select pg_walfile_name(pg_switch_wal())' | sql $port)
for _ in $(seq 600); do
	stored=$(echo 'select last_archived_wal from pg_stat_archiver' | sql $port)
	[[ $stored < $last ]] || break
	sleep 0.1
done
if [[ $stored < $last ]]; then
	echo "WAL $last is not stored after a minute, the newest that is: $stored" >&2
	exit 1
fi

target=$lsn
[ "$by" = lsn ] || target=$time
began=$(date +%s%N)
/usr/local/bin/pgark restore --job "$job" --instance "$instance" --target-$by "$target" --data-directory "$copy" --port $copyport --start \
	--bin-directory "$bin" ${location:+--tablespace-mapping "$location=$location.restored"} >"$dir/said"
echo "restored to $by $target in $((($(date +%s%N) - began) / 1000000)) ms"
content $copyport >"$dir/copy"
diff -u "$dir/moment" "$dir/copy" >&2
[ "$(echo 'select pg_is_in_recovery()' | sql $copyport)" = f ]
if [ -n "$location" ]; then
	[ "$(echo "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'fast'" | sql $copyport)" = "$location.restored" ]
fi
echo "insert into ledger values (3000001, 1, 'it goes on')" | sql $copyport
runuser -u postgres -- "$bin/pg_ctl" stop -s -m fast -D "$copy"
rm -r "$copy" ${location:+"$location.restored"} "$dir"
`

// restore takes each of the instances through a moment and back to it, all at the same time.
func (w *world) restore(g *guests.Guest, job string, instances ...restored) {
	w.Helper()
	const script = "/root/moment.sh"
	g.Put(script, []byte(momentScript), 0o755)
	errs := make([]error, len(instances))
	var wg sync.WaitGroup
	for n, i := range instances {
		wg.Go(func() {
			checksums := "off"
			if i.checksums {
				checksums = "on"
			}
			begin := time.Now()
			out, err := g.Try(fmt.Sprintf("bash -eu %s %s '%s' /opt/postgresql/%d/bin '%s' '%s' %d %s '%s' %s %dMB",
				script, job, i.instance, i.major, i.directory, i.sockets, i.port, i.by, i.location, checksums, i.segment))
			if err != nil {
				errs[n] = fmt.Errorf("instance %s: %w\n%s", i.instance, err, out)
				return
			}
			w.Logf("%s: %s; %.1f s in all", i.instance, out, time.Since(begin).Seconds())
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		w.Fatal(err)
	}
	g.Run("rm " + script)
}

// clock says how long the parts of a test took.
type clock struct{ begin time.Time }

func startClock() *clock { return &clock{begin: time.Now()} }

// lap logs how long it was since the last one, and returns it.
func (c *clock) lap(t *testing.T, what string) time.Duration {
	t.Helper()
	d := time.Since(c.begin)
	t.Logf("%s: %.1f s", what, d.Seconds())
	c.begin = time.Now()
	return d
}
