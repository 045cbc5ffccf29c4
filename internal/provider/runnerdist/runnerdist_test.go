package runnerdist

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"testing/fstest"
)

func pack(t *testing.T, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUnpack(t *testing.T) {
	whole := pack(t, "\x7fELF and the rest")
	files := fstest.MapFS{
		"dist/pgark_linux_amd64.gz":   {Data: whole},
		"dist/pgark_linux_cut.gz":     {Data: whole[:len(whole)-6]},
		"dist/pgark_linux_plain.gz":   {Data: []byte("\x7fELF")},
		"dist/pgark_linux_foreign.gz": {Data: pack(t, "#!/bin/sh")},
	}
	u := unpack(files, "amd64")
	sum := sha256.Sum256([]byte("\x7fELF and the rest"))
	if u.err != nil || string(u.binary) != "\x7fELF and the rest" || u.sha256 != hex.EncodeToString(sum[:]) || !bytes.Equal(u.packed, whole) {
		t.Errorf("found %+v", u)
	}
	for arch, message := range map[string]string{
		"cut": "unpack the runner for linux/cut: unexpected EOF", "plain": "unpack the runner for linux/plain: ",
		"foreign": "found no ELF binary",
	} {
		if u := unpack(files, arch); u.err == nil || !strings.Contains(u.err.Error(), message) || u.binary != nil || u.packed != nil {
			t.Errorf("%s: found %v", arch, u.err)
		}
	}
}

func TestBinary_missing(t *testing.T) {
	_, _, err := Binary("s390x")
	if missing, ok := errors.AsType[*MissingError](err); !ok || missing.Arch != "s390x" {
		t.Fatalf("found %v, expected a *MissingError", err)
	}
	if _, _, err := Compressed("s390x"); !errors.As(err, new(*MissingError)) {
		t.Errorf("found %v, expected a *MissingError", err)
	}
	if expected := "this build contains no runner for linux/s390x; run make build"; err.Error() != expected {
		t.Errorf("found %q, expected %q", err, expected)
	}
}
