package remote

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

func newOpener(t *testing.T) *opener {
	t.Helper()
	link, err := sshlink.New(sshlink.Config{Host: "db1", User: "deploy", Password: "unused"})
	must(t, err)
	return &opener{o: Options{Link: link}}
}

func TestParseProbe(t *testing.T) {
	const digest = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
	p := newOpener(t)
	found, err := p.parseProbe([]byte("Welcome!\r\npgark:system Linux x86_64\npgark:uid 1000\npgark:gzip\n" +
		"pgark:deployed -rwxr-xr-x 0 drwxr-xr-x 0 " + digest + "\n" +
		"pgark:deployed -rwxrwxr-x 0 drwxr-xr-x 0 group-writes\n" +
		"pgark:deployed -rwxr-xr-x 0 drwxr-xrwx 0 others-write-beside\n" +
		"pgark:deployed -rwxr-xr-x 1000 drwxr-xr-x 0 anothers\n" +
		"pgark:deployed -rwxr-xr-x. 0 drwxr-xr-x+ 0 labelled\n" +
		"pgark:library ro 2048 /usr\n" +
		"pgark:place exec 4096 /home/some body\npgark:place noexec 1 /tmp\npgark:place exec ? /\npgark:nonsense\nlast words"))
	must(t, err)
	expected := &probe{
		system: "Linux", machine: "x86_64", uid: 1000, gzip: true,
		deployed: map[string]bool{digest: true, "labelled": true},
		library:  place{path: "/usr", exec: true, ro: true, free: 2 << 20},
		places:   []place{{path: "/home/some body", exec: true, free: 4 << 20}, {path: "/tmp", free: 1 << 10}, {path: "", exec: true}},
	}
	if diff := cmp.Diff(expected, found, cmp.AllowUnexported(probe{}, place{})); diff != "" {
		t.Errorf("-expected +found:\n%s", diff)
	}
	for name, out := range map[string]string{
		"nothing": "", "no shell": "This account is currently not available.\n", "no uid": "pgark:system Linux x86_64\n",
		"uid is no number": "pgark:system Linux x86_64\npgark:uid root\n",
	} {
		if _, err := p.parseProbe([]byte(out)); err == nil {
			t.Errorf("%s: found no error", name)
		}
	}
}

func TestChoose(t *testing.T) {
	p := newOpener(t)
	runner := Runner{Compressed: []byte{0, 0, 0x40, 2}} // unpacked, 36 MiB
	good := place{path: "/usr", exec: true, free: 1 << 30}
	for name, c := range map[string]struct {
		probe    probe
		root     bool
		expected string // a place, or the error and its remedy
	}{
		"the first with room":          {probe{library: good, places: []place{{path: "/home/deploy", exec: true, free: 1 << 20}, {path: "/var/tmp", exec: true, free: 1 << 30}}}, true, "/var/tmp"},
		"root can unpack where noexec": {probe{library: good, places: []place{{path: "/home/deploy", free: 1 << 30}}}, true, "/home/deploy"},
		"others cannot":                {probe{library: good, places: []place{{path: "/home/deploy", free: 1 << 30}, {path: "/dev/shm", exec: true, free: 1 << 30}}}, false, "/dev/shm"},
		"nowhere to run": {probe{places: []place{{path: "/home/deploy", free: 1 << 30}, {path: "/dev/shm", exec: true, free: 5 << 20}}}, false,
			"deploy@db1:22: find a place for the runner: found /home/deploy (programs cannot run there), /dev/shm (5 MiB free); expected a directory with 38 MiB free on a file system that programs can run from: make room in one of them, or set TMPDIR for the account to a directory that has it"},
		"nowhere to write": {probe{library: good}, true,
			"deploy@db1:22: find a place for the runner: found no directory that can be written; expected a directory with 38 MiB free: make room in one of them, or set TMPDIR for the account to a directory that has it"},
		"the library's file system is noexec": {probe{library: place{path: "/usr/local", free: 1 << 30}}, true,
			"deploy@db1:22: find a place for the runner: found /usr/local, which /usr/local/lib/pgark is on, mounted noexec; expected a file system that programs can run from: sudo mount -o remount,exec /usr/local"},
		"the library's file system is read-only": {probe{library: place{path: "/usr", exec: true, ro: true, free: 1 << 30}}, true,
			"deploy@db1:22: find a place for the runner: found /usr, which /usr/local/lib/pgark is on, mounted read-only; expected a file system that can be written: sudo mount -o remount,rw /usr"},
		"the library's file system is full": {probe{library: place{path: "/", exec: true, free: 7 << 20}}, true,
			"deploy@db1:22: find a place for the runner: found 7 MiB free for /usr/local/lib/pgark on /, expected 38: make room on /"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := p.choose(&c.probe, runner, c.root)
			found := got.path
			if err != nil {
				found = err.Error() + ": " + err.(*StageError).Hint() //nolint:errorlint,forcetypeassert // it is one, or the test fails
			}
			if found != c.expected {
				t.Errorf("found    %s\nexpected %s", found, c.expected)
			}
		})
	}
}
