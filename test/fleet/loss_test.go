//go:build linux

package fleet

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// promisedLoss is the default of wal.max_lag: what may be lost with a machine, at most.
const promisedLoss = time.Second

// runs is how often a machine is lost: a few times, or as often as PGARK_RUNS says.
func runs(t *testing.T, few int) int {
	t.Helper()
	text := os.Getenv("PGARK_RUNS")
	if text == "" {
		return few
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("PGARK_RUNS=%q: expected a number of runs", text)
	}
	return n
}

// TestLoss takes a machine's power and network away at random moments, under 500 commits a second and after a single one
// in an idle hour, restores from what is in the repository, and demands that the newest commit there is at most a second
// older than the newest one that the server had acknowledged.
func TestLoss(t *testing.T) {
	l := newLosing(t, "")
	for n := range runs(t, 3) {
		l.underLoad(n, promisedLoss)
	}
	for n := range runs(t, 2) {
		l.afterOne(n)
	}
	l.report()
}

// TestLoss_synchronous demands that nothing is lost where commits wait for the repository.
func TestLoss_synchronous(t *testing.T) {
	l := newLosing(t, "wal = { synchronous = true }")
	for n := range runs(t, 3) {
		l.underLoad(n, 0)
	}
	l.report()
}

// losing is a machine that gets lost, and another where what is left of it is restored.
type losing struct {
	*world
	machine, rescue *guests.Guest
	next            int // number of the next commit
	all             map[int]bool
	acknowledged    int
	lost            []time.Duration // by which the newest recovered commit was older than the newest acknowledged, of each run
}

// commit is one that was acknowledged.
type commit struct {
	number     int
	sent, done time.Time
}

const losingJob = "losing"

func newLosing(t *testing.T, lines string) *losing {
	l := &losing{world: newWorld(t), all: map[int]bool{}}
	machines := l.net.BootAll(guests.Options{}, guests.Options{WithoutPostgreSQL: true})
	l.machine, l.rescue = machines[0], machines[1]
	l.machine.Run(fmt.Sprintf(`
		conf=/etc/postgresql/15/main
		printf "listen_addresses = '*'\narchive_mode = on\nmax_wal_size = 1GB\n" >>$conf/postgresql.conf
		echo "host all postgres %s trust" >>$conf/pg_hba.conf
		systemctl restart postgresql@15-main`, "0.0.0.0/0"))
	l.configure("", job(losingJob, l.machine, lines))
	l.apply()
	l.machine.SQL(socketDir, 5432, `
		create table account (id int primary key, balance int not null, filler char(84) not null default '');
		insert into account select i, 0 from generate_series(1, 100000) i;
		create table entry (number int primary key, word text not null);`)
	image(l.machine, losingJob)
	// Whoever restores has the program and knows the repository, nothing else.
	program := l.machine.Run("base64 -w0 $(readlink -f /usr/local/bin/pgark)")
	l.rescue.Put("/root/pgark.base64", []byte(program), 0o600)
	l.rescue.Run("base64 -d /root/pgark.base64 >/usr/local/bin/pgark; chmod 755 /usr/local/bin/pgark; rm /root/pgark.base64")
	return l
}

// streams waits until the runner is at it again.
func (l *losing) streams() {
	l.Helper()
	l.eventually(30*time.Second, "the runner streams", func() bool {
		out, err := l.machine.Try("/usr/local/bin/pgark status --json --job " + losingJob)
		if err != nil {
			return false
		}
		var s struct {
			Runners []struct {
				Status struct {
					WAL struct {
						State string `json:"state"`
					} `json:"wal"`
				} `json:"status"`
			} `json:"runners"`
		}
		return json.Unmarshal([]byte(out), &s) == nil && len(s.Runners) == 1 && s.Runners[0].Status.WAL.State == "streaming"
	})
}

func (l *losing) connect(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, fmt.Sprintf("host=%s user=postgres dbname=postgres sslmode=disable connect_timeout=5", l.machine.Address))
}

func word(number int) string {
	sum := md5.Sum([]byte(strconv.Itoa(number)))
	return hex.EncodeToString(sum[:])
}

const change = `with moved as (update account set balance = balance + 1 where id = 1 + $1 * 7919 % 100000) insert into entry values ($1, $2)`

// load commits 500 times a second over four connections until ctx ends, and returns what was acknowledged.
func (l *losing) load(ctx context.Context) []commit {
	l.Helper()
	const clients, rate = 4, 500
	var mu sync.Mutex
	var done []commit
	var wg sync.WaitGroup
	began := time.Now()
	first := l.next
	numbers := make(chan int)
	go func() {
		defer close(numbers)
		for n := 0; ; n++ {
			select {
			case <-time.After(time.Until(began.Add(time.Duration(n) * time.Second / rate))):
			case <-ctx.Done():
				return
			}
			select {
			case numbers <- first + n:
			case <-ctx.Done():
				return
			}
		}
	}()
	for range clients {
		conn, err := l.connect(l.Context())
		if err != nil {
			l.Fatal(err)
		}
		wg.Go(func() {
			defer func() {
				gone, cancel := context.WithTimeout(context.Background(), time.Millisecond)
				defer cancel()
				_ = conn.Close(gone) // there is nobody on the other side any more
			}()
			for number := range numbers {
				c := commit{number: number, sent: time.Now()}
				mu.Lock()
				l.all[number] = true
				l.next = max(l.next, number+1)
				mu.Unlock()
				if _, err := conn.Exec(ctx, change, number, word(number)); err != nil {
					return // lost with the machine: it may be there or not
				}
				c.done = time.Now()
				mu.Lock()
				done = append(done, c)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.SortFunc(done, func(a, b commit) int { return a.done.Compare(b.done) })
	return done
}

// underLoad loses the machine at a random moment while it is busy.
func (l *losing) underLoad(run int, allowed time.Duration) {
	l.Helper()
	l.streams()
	ctx, cancel := context.WithCancel(l.Context())
	defer cancel()
	var done []commit
	ended := make(chan struct{})
	go func() { defer close(ended); done = l.load(ctx) }()
	time.Sleep(time.Second + rand.N(3*time.Second))
	l.machine.Kill()
	cancel()
	<-ended
	if len(done) < 100 {
		l.Fatalf("run %d: only %d commits were acknowledged", run, len(done))
	}
	l.compare(fmt.Sprintf("under load %d", run), done, allowed)
	l.machine.Start()
}

// afterOne loses the machine a second after the only commit of a while.
func (l *losing) afterOne(run int) {
	l.Helper()
	l.streams()
	time.Sleep(2*time.Second + rand.N(2*time.Second))
	conn, err := l.connect(l.Context())
	if err != nil {
		l.Fatal(err)
	}
	c := commit{number: l.next, sent: time.Now()}
	l.next, l.all[c.number] = l.next+1, true
	if _, err := conn.Exec(l.Context(), change, c.number, word(c.number)); err != nil {
		l.Fatal(err)
	}
	c.done = time.Now()
	time.Sleep(time.Until(c.done.Add(promisedLoss)))
	l.machine.Kill()
	gone, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	_ = conn.Close(gone) // there is nobody on the other side any more
	l.compare(fmt.Sprintf("after one %d", run), []commit{c}, 0)
	l.machine.Start()
}

// compare restores to the end of what is in the repository. done, in the order of acknowledgement, was the last that
// happened.
func (l *losing) compare(what string, done []commit, allowed time.Duration) {
	l.Helper()
	began := time.Now()
	out := l.rescue.Run(fmt.Sprintf(`
		export AWS_ACCESS_KEY_ID=%s AWS_SECRET_ACCESS_KEY=%s AWS_REGION=us-east-1
		cd /; rm -rf /var/lib/postgresql/15/rescued
		/usr/local/bin/pgark restore --repository s3://%s/backups --endpoint %s --path-style --series %s/%s --latest --start --port 5555 \
			--data-directory /var/lib/postgresql/15/rescued --bin-directory /usr/lib/postgresql/15/bin --json >/root/said
		runuser -u postgres -- psql -XAtq -h %s -p 5555 -c "select number, word from entry order by number" postgres
		runuser -u postgres -- psql -XAtq -h %s -p 5555 -c "select 'balance', sum(balance) from account" postgres
		runuser -u postgres -- /usr/lib/postgresql/15/bin/pg_ctl stop -s -m immediate -D /var/lib/postgresql/15/rescued`,
		l.s3.AccessKeyID, l.s3.SecretAccessKey, bucket, l.s3.Endpoint(), losingJob, main15, socketDir, socketDir))
	there := map[int]bool{}
	balance := ""
	for line := range strings.Lines(out) {
		number, text, _ := strings.Cut(strings.TrimSpace(line), "|")
		if number == "balance" {
			balance = text
			continue
		}
		n, err := strconv.Atoi(number)
		if err != nil || !l.all[n] || text != word(n) {
			l.Fatalf("%s: found the row %q, which nobody wrote", what, line)
		}
		there[n] = true
	}
	if balance != strconv.Itoa(len(there)) {
		l.Errorf("%s: found a balance of %s, expected one for each of %d entries", what, balance, len(there))
	}
	var newest *commit
	for i := range done {
		if there[done[i].number] {
			newest = &done[i]
		}
	}
	last := done[len(done)-1]
	missing := 0
	for _, c := range done {
		if there[c.number] {
			continue
		}
		missing++
		if newest != nil && c.done.Before(newest.sent) {
			l.Errorf("%s: commit %d is lost, although %d came after it and is there", what, c.number, newest.number)
		}
	}
	loss := last.done.Sub(done[0].sent)
	if newest != nil {
		loss = last.done.Sub(newest.done)
	}
	l.lost = append(l.lost, loss)
	l.acknowledged += len(done)
	l.Logf("%s: %d commits acknowledged, the last %d of them lost, %.3f s; restored and compared in %.1f s",
		what, len(done), missing, loss.Seconds(), time.Since(began).Seconds())
	if newest == nil || loss > allowed || allowed == 0 && missing > 0 {
		l.Errorf("%s: %d commits lost, the newest recovered is %.3f s older than the newest acknowledged, expected at most %v", what, missing, loss.Seconds(), allowed)
	}
}

func (l *losing) report() {
	slices.Sort(l.lost)
	l.Logf("%d runs, %d commits acknowledged; lost: median %.3f s, most %.3f s", len(l.lost), l.acknowledged,
		l.lost[len(l.lost)/2].Seconds(), l.lost[len(l.lost)-1].Seconds())
}
