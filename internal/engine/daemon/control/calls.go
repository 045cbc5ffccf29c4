package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
