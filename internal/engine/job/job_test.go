package job

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

func valid() *Job {
	j := &Job{
		Name: "orders", Host: "db1", Enabled: true,
		Repository: Repository{URL: "s3://backups/pg"},
		Protected: []Instance{{
			Name: "15-main", DataDirectory: "/var/lib/postgresql/15/main", SocketDirectory: "/var/run/postgresql",
			Port: 5432, Owner: "postgres", Version: 15, SystemID: 7412345678901234567,
		}},
		Image: Image{Schedule: "0 22 * * *"},
	}
	j.ApplyDefaults()
	return j
}

func TestApplyDefaults(t *testing.T) {
	j := valid()
	if err := j.Validate(); err != nil {
		t.Fatal(err)
	}
	if i := j.Image; i.Compression != "zstd" || i.Timezone != "UTC" || i.Capture != "auto" || i.Retry != (Retry{3, Duration(10 * time.Minute)}) {
		t.Errorf("image: found %+v", i)
	}
	if w := j.WAL; w.Mode != "continuous" || w.Interval != Duration(15*time.Minute) || w.MaxLag != Duration(time.Second) || w.Transport != "automatic" {
		t.Errorf("wal: found %+v", w)
	}
	if j.Protected[0].DatabaseUser != "postgres" || len(j.Instances.Include) != 1 || j.Instances.Include[0] != "*" {
		t.Errorf("found %+v", j)
	}
	before := string(j.Encode())
	j.ApplyDefaults()
	if string(j.Encode()) != before {
		t.Error("a second ApplyDefaults changed the job")
	}
}

func TestParse_roundTrip(t *testing.T) {
	j := valid()
	j.WALRetention = &WALRetention{KeepDays: 15, EnforcedBy: "guest"}
	back, err := Parse(j.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if string(back.Encode()) != string(j.Encode()) {
		t.Errorf("found\n%s\nexpected\n%s", back.Encode(), j.Encode())
	}
	if !strings.Contains(string(j.Encode()), `"7412345678901234567"`) {
		t.Error("the system identifier stands as a number, whose digits other languages lose")
	}
}

func TestDigest(t *testing.T) {
	a, b := valid(), valid()
	b.WALRetention = &WALRetention{UntilImageDeleted: true, EnforcedBy: "guest"}
	if a.Digest() != b.Digest() {
		t.Error("the digest depends on the WAL retention")
	}
	if b.WALRetention == nil {
		t.Error("Digest took the WAL retention away")
	}
	b.Image.Schedule = "0 23 * * *"
	if a.Digest() == b.Digest() {
		t.Error("the digest does not depend on the schedule")
	}
}

func TestParse_refuses(t *testing.T) {
	good := string(valid().Encode())
	for name, c := range map[string]struct{ text, message string }{
		"a newer format":    {strings.Replace(good, `"format": 1`, `"format": 2`, 1), "job orders: the job file has format 2, this pgark reads up to format 1"},
		"an unknown field":  {strings.Replace(good, `"host"`, `"hots"`, 1), `unknown field "hots"`},
		"half a file":       {good[:len(good)/2], "read job file: unexpected"},
		"two documents":     {good + good, "after top-level value"},
		"an empty file":     {"", "read job file"},
		"an invalid job":    {strings.Replace(good, "0 22 * * *", "0 25 * * *", 1), `job orders: image.schedule "0 25 * * *": hour 25 is not in 0–23`},
		"a wrong duration":  {strings.Replace(good, `"10m0s"`, `"ten"`, 1), `time: invalid duration "ten"`},
		"a negative format": {strings.Replace(good, `"format": 1`, `"format": -1`, 1), "job orders: format -1: expected 1"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.message) {
				t.Errorf("found %v, expected %q", err, c.message)
			}
		})
	}
	var newer *FormatError
	if _, err := Parse([]byte(strings.Replace(good, `"format": 1`, `"format": 7`, 1))); !errors.As(err, &newer) || newer.Found != 7 {
		t.Errorf("found %v, expected a *FormatError", err)
	}
}

func TestValidate(t *testing.T) {
	for message, change := range map[string]func(*Job){
		`job : name is missing`: func(j *Job) { j.Name = "" },
		`job a b: name "a b": may hold letters, digits, dot, underscore and hyphen, and begins with a letter or digit`: func(j *Job) { j.Name = "a b" },
		`job orders: repository.url is missing: expected s3://bucket/prefix or file:///path`:                           func(j *Job) { j.Repository.URL = "" },
		`job orders: repository.url "s3:///x": names no bucket`:                                                        func(j *Job) { j.Repository.URL = "s3:///x" },
		`job orders: repository.url: found a user or password in it; keys belong into credentials`:                     func(j *Job) { j.Repository.URL = "s3://key:secret@b/x" },
		`job orders: repository.url "file://srv/x": expected an absolute path, as in file:///srv/backup`:               func(j *Job) { j.Repository.URL = "file://srv/x" },
		`job orders: repository.url "ftp://x/y": expected s3://bucket/prefix or file:///path`:                          func(j *Job) { j.Repository.URL = "ftp://x/y" },
		`job orders: instances.include "[": is no pattern; * and ? and [a-z] are possible`:                             func(j *Job) { j.Instances.Include = []string{"["} },
		`job orders: instance 15-main: stands twice`:                                                                   func(j *Job) { j.Protected = append(j.Protected, j.Protected[0]) },
		`job orders: instance 15-main: port 0: not in 1–65535`:                                                         func(j *Job) { j.Protected[0].Port = 0 },
		`job orders: instance 15-main: data_directory "x": expected an absolute path`:                                  func(j *Job) { j.Protected[0].DataDirectory = "x" },
		`job orders: image.timezone "Mars/Olympus": no such time zone; expected an IANA name, as in "Europe/Berlin"`:   func(j *Job) { j.Image.Timezone = "Mars/Olympus" },
		`job orders: image.compression "lz4": expected "zstd" or "none"`:                                               func(j *Job) { j.Image.Compression = "lz4" },
		`job orders: image.retry.wait 48h0m0s: not in 1s–24h0m0s`:                                                      func(j *Job) { j.Image.Retry.Wait = Duration(48 * time.Hour) },
		`job orders: image.retention.weekly -1: may not be negative`:                                                   func(j *Job) { j.Image.Retention.Weekly = -1 },
		`job orders: wal.mode "often": expected "continuous" or "interval"`:                                            func(j *Job) { j.WAL.Mode = "often" },
		`job orders: wal.temp_folder "spool": expected an absolute path`:                                               func(j *Job) { j.WAL.TempFolder = "spool" },
		`job orders: wal.temp_folder_limit -1: expected bytes, or 0 for no limit`:                                      func(j *Job) { j.WAL.TempFolderLimit = -1 },
		`job orders: wal.interval 500ms: not in 1s–24h0m0s`:                                                            func(j *Job) { j.WAL.Interval = Duration(500 * time.Millisecond) },
		`job orders: wal.max_lag 99ms: not in 100ms–1h0m0s`:                                                            func(j *Job) { j.WAL.MaxLag = Duration(99 * time.Millisecond) },
		`job orders: wal.max_requests_per_hour -1: expected a number of requests, or 0 for as many as wal.max_lag takes`: func(j *Job) {
			j.WAL.MaxRequestsPerHour = -1
		},
		`job orders: wal.synchronous needs wal.mode "continuous": nothing is streamed otherwise that a commit could wait for`: func(j *Job) {
			j.WAL.Mode, j.WAL.Synchronous = WALInterval, true
		},
		`job orders: wal.synchronous takes a request for every commit: leave out wal.max_requests_per_hour, or commits would wait for the budget`: func(j *Job) {
			j.WAL.Synchronous, j.WAL.MaxRequestsPerHour = true, 3600
		},
		`job orders: wal.slot needs wal.mode "continuous": only a stream moves a replication slot`: func(j *Job) {
			j.WAL.Mode, j.WAL.Slot = WALInterval, true
		},
		`job orders: wal.transport "log_shipping_servers": names no server in wal.log_shipping_servers`: func(j *Job) { j.WAL.Transport = "log_shipping_servers" },
		`job orders: wal_retention: expected exactly one of until_image_deleted and keep_days`:          func(j *Job) { j.WALRetention = &WALRetention{EnforcedBy: "guest"} },
		`job orders: image.schedule "@daily": found 1 fields, expected five: minute, hour, day of month, month, day of week`: func(j *Job) {
			j.Image.Schedule = "@daily"
		},
	} {
		t.Run(message, func(t *testing.T) {
			j := valid()
			change(j)
			if err := j.Validate(); err == nil || err.Error() != message {
				t.Errorf("found %v", err)
			}
		})
	}
}

func TestValidate_reportsEverything(t *testing.T) {
	j := valid()
	j.Image.Schedule, j.WAL.Mode, j.Repository.URL = "61 * * * *", "x", ""
	err := j.Validate()
	if err == nil || len(strings.Split(err.Error(), "\n")) != 3 {
		t.Errorf("found %v, expected three lines", err)
	}
}

func TestParseSchedule_refuses(t *testing.T) {
	for expr, message := range map[string]string{
		"60 * * * *":     "minute 60 is not in 0–59",
		"0 25 * * *":     "hour 25 is not in 0–23",
		"0 0 0 * *":      "day of month 0 is not in 1–31",
		"0 0 * 13 *":     "month 13 is not in 1–12",
		"0 0 * * 8":      "day of week 8 is not in 0–7",
		"x * * * *":      `minute "x" is no number`,
		"-1 * * * *":     `minute "" is no number`,
		"1, * * * *":     `minute "" is no number`,
		"*/0 * * * *":    `minute */0: step "0" is not in 1–59`,
		"5/10 * * * *":   "minute 5/10: a step needs a range or *",
		"0 20-4 * * *":   "hour 20-4: the range ends before it begins",
		"0 0 30 2 *":     "names a date that does not come",
		"* * * *":        "found 4 fields",
		"0 0 * * * 2026": "found 6 fields",
		"0 0 L * *":      `day of month "L" is no number`,
	} {
		if _, err := parseSchedule(expr); err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: found %v, expected %q", expr, err, message)
		}
	}
}

func TestNext(t *testing.T) {
	for name, c := range map[string]struct {
		schedule, zone, after string
		due                   []string // one after the other
	}{
		"every night":              {"0 22 * * *", "UTC", "2026-03-01T22:00:00Z", []string{"2026-03-02T22:00:00Z", "2026-03-03T22:00:00Z"}},
		"strictly later":           {"0 22 * * *", "UTC", "2026-03-01T21:59:59.999Z", []string{"2026-03-01T22:00:00Z"}},
		"a fraction later":         {"0 22 * * *", "UTC", "2026-03-01T22:00:00.001Z", []string{"2026-03-02T22:00:00Z"}},
		"names":                    {"30 4 * Feb Sun", "UTC", "2026-01-01T00:00:00Z", []string{"2026-02-01T04:30:00Z", "2026-02-08T04:30:00Z"}},
		"Sunday is 7 too":          {"0 0 * * 7", "UTC", "2026-11-22T00:00:00Z", []string{"2026-11-29T00:00:00Z"}},
		"day of month or of week":  {"0 0 13 * 5", "UTC", "2026-11-06T00:00:00Z", []string{"2026-11-13T00:00:00Z", "2026-11-20T00:00:00Z", "2026-11-27T00:00:00Z", "2026-12-04T00:00:00Z", "2026-12-11T00:00:00Z", "2026-12-13T00:00:00Z"}},
		"the 31st":                 {"0 0 31 * *", "UTC", "2026-08-31T00:00:00Z", []string{"2026-10-31T00:00:00Z"}},
		"29 February":              {"0 0 29 2 *", "UTC", "2096-03-01T00:00:00Z", []string{"2104-02-29T00:00:00Z"}},
		"29 February in Berlin":    {"0 0 29 2 *", "Europe/Berlin", "2096-03-01T00:00:00Z", []string{"2104-02-29T00:00:00+01:00"}},
		"a zone":                   {"0 22 * * *", "America/New_York", "2026-07-01T00:00:00Z", []string{"2026-06-30T22:00:00-04:00", "2026-07-01T22:00:00-04:00"}},
		"half an hour's zone":      {"0 22 * * *", "Asia/Kolkata", "2026-07-01T00:00:00Z", []string{"2026-07-01T22:00:00+05:30"}},
		"left out in spring":       {"30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", []string{"2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00"}},
		"left out twice, once":     {"15,45 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", []string{"2026-03-29T03:00:00+02:00", "2026-03-30T02:15:00+02:00"}},
		"at the jump itself":       {"0 3 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", []string{"2026-03-29T03:00:00+02:00", "2026-03-30T03:00:00+02:00"}},
		"midnight left out":        {"0 0 * * *", "America/Santiago", "2026-09-05T12:00:00Z", []string{"2026-09-06T01:00:00-03:00", "2026-09-07T00:00:00-03:00"}},
		"twice in autumn":          {"30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", []string{"2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"}},
		"asked between the two":    {"30 2 * * *", "Europe/Berlin", "2026-10-25T01:15:00Z", []string{"2026-10-26T02:30:00+01:00"}},
		"where the hour ends":      {"0 3 * * *", "Europe/Berlin", "2026-10-25T00:59:00Z", []string{"2026-10-25T03:00:00+01:00"}},
		"intervals in spring":      {"*/30 * * * *", "Europe/Berlin", "2026-03-29T00:20:00Z", []string{"2026-03-29T01:30:00+01:00", "2026-03-29T03:00:00+02:00", "2026-03-29T03:30:00+02:00"}},
		"intervals in autumn":      {"*/30 * * * *", "Europe/Berlin", "2026-10-25T00:20:00Z", []string{"2026-10-25T02:30:00+02:00", "2026-10-25T02:00:00+01:00", "2026-10-25T02:30:00+01:00", "2026-10-25T03:00:00+01:00"}},
		"a day that was left out":  {"0 12 * * *", "Pacific/Apia", "2011-12-29T23:00:00Z", []string{"2011-12-31T00:00:00+14:00", "2011-12-31T12:00:00+14:00"}},
		"every hour of some hours": {"0 1-3 * * *", "Europe/Berlin", "2026-10-24T22:30:00Z", []string{"2026-10-25T01:00:00+02:00", "2026-10-25T02:00:00+02:00", "2026-10-25T03:00:00+01:00"}},
	} {
		t.Run(name, func(t *testing.T) {
			at, err := time.Parse(time.RFC3339, c.after)
			if err != nil {
				t.Fatal(err)
			}
			for _, expected := range c.due {
				if at, err = (Image{Schedule: c.schedule, Timezone: c.zone}).Next(at); err != nil {
					t.Fatal(err)
				}
				if found := at.Format(time.RFC3339); found != expected {
					t.Fatalf("found %s, expected %s", found, expected)
				}
			}
		})
	}
	if at, err := (Image{}).Next(time.Now()); err != nil || !at.IsZero() {
		t.Errorf("no schedule: found %v, %v", at, err)
	}
}

func TestSelection_Match(t *testing.T) {
	s := Selection{Include: []string{"15-*", "16-main"}, Exclude: []string{"15-test*"}}
	for name, expected := range map[string]bool{"15-main": true, "15-test2": false, "16-main": true, "16-other": false} {
		if s.Match(name) != expected {
			t.Errorf("%s: found %t", name, !expected)
		}
	}
}

func TestLoad(t *testing.T) {
	l := Layout{Root: t.TempDir()}
	if _, err := Load(l, "orders"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("found %v, expected fs.ErrNotExist", err)
	}
	if err := os.MkdirAll(l.JobsDirectory(), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"orders", "copy"} {
		if err := os.WriteFile(l.JobFile(name), valid().Encode(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if j, err := Load(l, "orders"); err != nil || j.Name != "orders" {
		t.Errorf("found %v, %v", j, err)
	}
	if _, err := Load(l, "copy"); err == nil || !strings.Contains(err.Error(), `found the job "orders", expected "copy"`) {
		t.Errorf("found %v", err)
	}
}

func TestCredentials(t *testing.T) {
	l := Layout{Root: t.TempDir()}
	if c, err := LoadCredentials(l, "orders"); c != nil || err != nil {
		t.Fatalf("found %v, %v, expected neither", c, err)
	}
	keys := objectstore.Credentials{AccessKeyID: "AKIA", SecretAccessKey: "a=b/c+ d", SessionToken: "token"}
	file := l.CredentialsFile("orders")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append([]byte("# keys\n\n"), EncodeCredentials(keys)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadCredentials(l, "orders"); err != nil || *c != keys {
		t.Fatalf("found %v, %v", c, err)
	}

	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if c, err := LoadCredentials(l, "orders"); err != nil || *c != keys {
		t.Errorf("without a handed-over file: found %v, %v", c, err)
	}
	other := objectstore.Credentials{AccessKeyID: "AKIB", SecretAccessKey: "x"}
	if err := os.WriteFile(filepath.Join(dir, CredentialsName), EncodeCredentials(other), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadCredentials(l, "orders"); err != nil || *c != other {
		t.Errorf("with a handed-over file: found %v, %v", c, err)
	}
}

func TestParseCredentials_refusesWithoutSecrets(t *testing.T) {
	for text, message := range map[string]string{
		"AWS_ACCESS_KEY_ID=hush\n": "expected both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
		"hush\n":                   "line 1: expected NAME=value",
		"AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCES_KEY=hush\n":             "line 2: expected AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_SESSION_TOKEN",
		"AWS_ACCESS_KEY_ID=\nAWS_SECRET_ACCESS_KEY=hush\n":             "expected both",
		"export AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=\"hush\"\n": "line 1: expected AWS_ACCESS_KEY_ID",
	} {
		_, err := ParseCredentials([]byte(text))
		if err == nil || !strings.Contains(err.Error(), message) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%q: found %v", text, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(valid().Encode())
	f.Add([]byte(`{"format":1,"name":"x","image":{"schedule":"0 0 29 2 1"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := Parse(b)
		if err != nil {
			return
		}
		if _, err := j.Image.Next(time.Unix(1e9, 0)); err != nil {
			t.Errorf("a valid job's schedule: %v", err)
		}
		if again, err := Parse(j.Encode()); err != nil || again.Digest() != j.Digest() {
			t.Errorf("a parsed job does not survive Encode: %v", err)
		}
	})
}

func TestSlotName(t *testing.T) {
	for name, expected := range map[string]string{
		"orders":                "pgark_orders",
		"Orders-15.main":        "pgark__rders_15_main",
		strings.Repeat("a", 63): "pgark_" + strings.Repeat("a", 57),
		"db1_2":                 "pgark_db1_2",
	} {
		if found := SlotName(name); found != expected {
			t.Errorf("%s: found %s, expected %s", name, found, expected)
		}
	}
}
