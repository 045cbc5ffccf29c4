package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// GetStatus asks a runner for its status.
func GetStatus(ctx context.Context, socket string) (*Status, error) {
	a, err := Ask(ctx, socket, Request{Op: OpStatus}, nil)
	if err != nil {
		return nil, err
	}
	if a.Status == nil {
		return nil, fmt.Errorf("answer of the runner on %s to %q: no status in it", socket, OpStatus)
	}
	return a.Status, nil
}

// TakeImage has a runner take an image, or waits for the one that it is taking. It returns the image's
// repository.ImageInfo in JSON.
func TakeImage(ctx context.Context, socket string, kind Kind, progress func(line string)) (json.RawMessage, error) {
	a, err := Ask(ctx, socket, Request{Op: OpImage, Kind: kind}, progress)
	if err != nil {
		return nil, err
	}
	return a.Image, nil
}

// Reload has a runner read its job file again. A file that it cannot use leaves it as it was, and is an error.
func Reload(ctx context.Context, socket string) error {
	_, err := Ask(ctx, socket, Request{Op: OpReload}, nil)
	return err
}

// Fail makes the answer that says no. The hint of an error that has one (method Hint) goes along.
func Fail(err error) Answer {
	a := Answer{Error: err.Error()}
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		a.Hint = h.Hint()
	}
	return a
}

// line is the answer to a plain request.
func (a Answer) line(op Op) string {
	switch {
	case a.OK && op == OpFetch && !a.Found:
		return "absent\n"
	case a.OK && op == OpFetch && strings.ContainsAny(a.File, "\x00\n"):
		return "no the name of the file does not fit on a line\n"
	case a.OK && op == OpFetch:
		return "ok " + a.File + "\n"
	case a.OK:
		return "ok\n"
	case a.Again:
		return "again\n"
	}
	text := "no " + a.Error
	if a.Hint != "" {
		text = strings.TrimSpace(text) + " (hint: " + a.Hint + ")"
	}
	return strings.Join(strings.Fields(text), " ") + "\n"
}
