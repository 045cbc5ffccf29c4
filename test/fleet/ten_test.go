//go:build linux

package fleet

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

const (
	// What is promised, on a machine that does nothing else.
	applyEach  = 15 * time.Second
	refreshAll = 10 * time.Second

	// noise is by how much a machine that does something else may be slower.
	noise = 3
)

var completed = regexp.MustCompile(`each\["[^"]+"\]: Creation complete after (?:([0-9]+)m)?([0-9]+)s`)

// TestTen protects ten guests that one resource declares: in time, and as far as it goes while one cannot be reached.
func TestTen(t *testing.T) {
	w := newWorld(t)
	took := startClock()
	machines := w.net.BootAll(make([]guests.Options, 10)...)
	took.lap(t, "ten guests")
	hosts := map[string]string{}
	for n, g := range machines {
		hosts[fmt.Sprintf("db%d", n)] = g.Address
	}
	const last = "db9" // the one that will be cut off
	lost := machines[9]
	each := func(schedule string) string {
		var list strings.Builder
		for name, address := range hosts {
			fmt.Fprintf(&list, "    %s = %q\n", name, address)
		}
		return fmt.Sprintf(`
resource "pgark_postgresql_backup_job" "each" {
  for_each = {
%s  }
  name           = each.key
  host           = each.value
  repository     = pgark_repository.main.url
  image          = { schedule = %q, on_create = false }
  guest_settings = { restart = "allow" }
}
`, list.String(), schedule)
	}

	w.configure("", each("0 3 * * *"))
	took = startClock()
	out := w.apply()
	whole := took.lap(t, "apply of ten")
	var sum time.Duration
	found := completed.FindAllStringSubmatch(out, -1)
	for _, m := range found {
		d, err := time.ParseDuration("0" + m[1] + "m" + m[2] + "s")
		if err != nil {
			t.Fatal(err)
		}
		sum += d
	}
	if len(found) != len(machines) {
		t.Fatalf("%d jobs were created, expected %d:\n%s", len(found), len(machines), out)
	}
	mean := sum / time.Duration(len(found))
	t.Logf("apply: %.1f s for ten, %.1f s a guest; each took %.1f s in the mean, next to the others", whole.Seconds(), whole.Seconds()/10, mean.Seconds())
	if mean > noise*applyEach {
		t.Errorf("applying took %v each in the mean, expected less than %v", mean, applyEach)
	}
	for n, g := range machines {
		if w.segments(fmt.Sprintf("db%d", n), main15) == 0 {
			t.Errorf("%s: no segment is in the repository", g.Name)
		}
	}

	took = startClock()
	w.must("plan", "-no-color", "-input=false", "-refresh-only")
	if d := took.lap(t, "refresh of ten"); d > noise*refreshAll {
		t.Errorf("refresh took %v, expected less than %v", d, refreshAll)
	}
	w.nothingToDo()

	// One is cut off, and all are to change. Everybody is told at once; nothing is concluded about the one.
	lost.Cut()
	_, before := w.jobs()
	w.configure("timeout = \"5s\"\n    wait_for_host = \"0s\"", each("30 4 * * *"))
	who := "root@" + lost.Address + ":22"
	w.says(w.planFails(), who, "on_unreachable", "-refresh=false", "firewall")

	// As that said. The nine are done; the tenth fails, and its state is as it was.
	w.provider = `on_unreachable = "warn"`
	hosts["db10"] = unused(machines) // and an eleventh, that nobody has seen yet
	w.configure("timeout = \"5s\"\n    wait_for_host = \"0s\"", each("30 4 * * *"))
	out = w.applyFails()
	_, errors, _ := strings.Cut(out, "Error: ") // behind the warnings
	w.says(errors, who, "firewall", "root@"+hosts["db10"]+":22")
	schedules, after := w.jobs()
	if after[last] != before[last] {
		t.Errorf("the state of the one that was cut off was\n%s\nand is\n%s", before[last], after[last])
	}
	for name := range hosts {
		expected := "30 4 * * *"
		switch name {
		case last:
			expected = "0 3 * * *"
		case "db10":
			expected = "" // nothing was done, and nothing is known
		}
		if schedules[name] != expected {
			t.Errorf("%s: the state has the schedule %q, expected %q", name, schedules[name], expected)
		}
	}
	for n, g := range machines[:9] {
		if file := g.Run(fmt.Sprintf("cat /etc/pgark/jobs/db%d.json", n)); !strings.Contains(file, "30 4 * * *") {
			t.Errorf("%s: its job is not the new one:\n%s", g.Name, file)
		}
	}

	lost.Mend()
	delete(hosts, "db10")
	w.provider = ""
	w.configure("", each("30 4 * * *"))
	w.says(w.apply(), "0 added, 1 changed, 0 destroyed")
	w.nothingToDo()
	w.destroy()
}

// jobs reads the jobs in the state, by name: their schedules, and all that is known of them.
func (w *world) jobs() (schedules, all map[string]string) {
	w.Helper()
	var s struct {
		Resources []struct {
			Type      string `json:"type"`
			Instances []struct {
				Status     string          `json:"status"`
				Attributes json.RawMessage `json:"attributes"`
			} `json:"instances"`
		} `json:"resources"`
	}
	if err := json.Unmarshal([]byte(w.stateFile()), &s); err != nil {
		w.Fatal(err)
	}
	schedules, all = map[string]string{}, map[string]string{}
	for _, r := range s.Resources {
		if r.Type != "pgark_postgresql_backup_job" {
			continue
		}
		for _, i := range r.Instances {
			var job struct {
				Name  string `json:"name"`
				Image struct {
					Schedule string `json:"schedule"`
				} `json:"image"`
			}
			if err := json.Unmarshal(i.Attributes, &job); err != nil {
				w.Fatal(err)
			}
			if i.Status != "" {
				w.Errorf("%s is %s in the state", job.Name, i.Status)
			}
			schedules[job.Name], all[job.Name] = job.Image.Schedule, string(i.Attributes)
		}
	}
	return schedules, all
}

// unused is an address of the network that no machine has.
func unused(machines []*guests.Guest) string {
	subnet := machines[0].Address[:strings.LastIndexByte(machines[0].Address, '.')]
	return subnet + ".250"
}
