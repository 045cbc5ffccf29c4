package repository

import "context"

type refsDocument struct{ Objects []refObject }
type refObject struct{ Object ObjectRef }

func (s *Series) readRefs(ctx context.Context, sid SID) (*refsDocument, error) {
	panic("unimplemented")
}
