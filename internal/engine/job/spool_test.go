package job

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSpoolPlaces(t *testing.T) {
	l := Layout{Root: t.TempDir()}
	if all, err := l.SpoolPlaces("orders", "15-main"); err != nil || len(all) > 0 {
		t.Errorf("without a file found %v, %v", all, err)
	}
	file := l.SpoolPlacesFile("orders", "15-main")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	for content, count := range map[string]int{
		`[{"directory": "/srv/pgark/1", "repository": "a", "url": "s3://b", "system_identifier": "7"}]`: 1,
		`[{"directory": "/srv`: -1,
		``:                     -1, // torn by a crash before it was durable, by whoever
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		all, err := l.SpoolPlaces("orders", "15-main")
		switch {
		case count < 0 && (err == nil || !strings.Contains(err.Error(), file)):
			t.Errorf("%q: found %v, %v, expected an error that names the file", content, all, err)
		case count >= 0 && (err != nil || len(all) != count || all[0].SystemID != 7):
			t.Errorf("%q: found %v, %v", content, all, err)
		}
	}
}
