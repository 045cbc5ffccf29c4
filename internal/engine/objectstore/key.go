package objectstore

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// hiddenPrefix begins the names of a directory store's temporary files. No key may have an element like it, in any
// store, so that a repository can be copied from one kind of store to another.
const hiddenPrefix = ".pgark-"

// maxElement is NAME_MAX of Linux file systems, in bytes; maxKey is what S3 allows for a whole key less 256 bytes for
// the store's own prefix.
const (
	maxElement = 255
	maxKey     = 1024 - 256
)

// checkKey refuses keys that some store could not hold, or would hold under another name.
func checkKey(key string) error {
	if key == "" {
		return fmt.Errorf("object key is empty")
	}
	if len(key) > maxKey {
		return fmt.Errorf("object key %q has %d bytes, expected at most %d", key, len(key), maxKey)
	}
	for e := range strings.SplitSeq(key, "/") {
		if why := checkElement(e); why != "" {
			return fmt.Errorf("object key %q: %s", key, why)
		}
	}
	return nil
}

func checkElement(e string) string {
	switch {
	case e == "":
		return "a path element is empty"
	case e == "." || e == "..":
		return "a path element is " + e
	case len(e) > maxElement:
		return fmt.Sprintf("a path element has %d bytes, expected at most %d", len(e), maxElement)
	case strings.HasPrefix(e, hiddenPrefix):
		return "a path element begins with " + hiddenPrefix + ", which is reserved for temporary files"
	case !utf8.ValidString(e):
		return "it is not valid UTF-8"
	case strings.ContainsFunc(e, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return "it contains a control character"
	}
	return ""
}
