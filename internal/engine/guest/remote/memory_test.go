package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// scripted is a guest that does what a test says, and keeps what it was given.
type scripted struct {
	do func(ctx context.Context, call string, given any) (any, error)
}

func did[T any](g scripted, ctx context.Context, call string, given any) (T, error) {
	v, err := g.do(ctx, call, given)
	out, _ := v.(T)
	return out, err
}

func (g scripted) Machine(ctx context.Context) (guest.Machine, error) {
	return did[guest.Machine](g, ctx, callMachine, nil)
}
func (g scripted) Discover(ctx context.Context) ([]guest.Instance, error) {
	return did[[]guest.Instance](g, ctx, callDiscover, nil)
}
func (g scripted) Check(ctx context.Context, r guest.CheckRequest) ([]guest.Check, error) {
	return did[[]guest.Check](g, ctx, callCheck, r)
}
func (g scripted) Apply(ctx context.Context, d guest.Deployment) (*guest.State, error) {
	return did[*guest.State](g, ctx, callApply, d)
}
func (g scripted) State(ctx context.Context, name string) (*guest.State, error) {
	return did[*guest.State](g, ctx, callState, named{name})
}
func (g scripted) SetWALRetention(ctx context.Context, name string, r *job.WALRetention) error {
	_, err := did[any](g, ctx, callSetWALRetention, retentionParams{name, r})
	return err
}
func (g scripted) Remove(ctx context.Context, name string) error {
	_, err := did[any](g, ctx, callRemove, named{name})
	return err
}

// line is a connection within this process: what a session of a link is otherwise.
type line struct {
	cut   func() // as a network does
	ended chan struct{}
	err   error // of Serve; after ended
}

// memory is a Guest that talks to g in this process. Every conversation adds a line.
type memory struct {
	*Guest
	mu    sync.Mutex // guards lines
	lines []*line
}

func (m *memory) last() *line {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lines[len(m.lines)-1]
}

func (m *memory) opened() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.lines)
}

func connect(t *testing.T, g guest.Guest, o Options) *memory {
	t.Helper()
	link, err := sshlink.New(sshlink.Config{Host: "memory.example", User: "deploy", Password: "unused"})
	if err != nil {
		t.Fatal(err)
	}
	o.Link = link
	m := &memory{Guest: New(o)}
	m.dial = func(ctx context.Context) (*conversation, error) {
		inR, inW := io.Pipe()
		outR, outW := io.Pipe()
		l := &line{ended: make(chan struct{})}
		l.cut = func() {
			_ = inR.CloseWithError(io.EOF) // whoever writes sees it closed
			_ = inW.Close()
			_ = outR.CloseWithError(io.EOF)
			_ = outW.Close()
		}
		go func() {
			l.err = Serve(context.Background(), g, inR, outW)
			_ = outW.Close()
			_ = inR.Close()
			close(l.ended)
		}()
		m.mu.Lock()
		m.lines = append(m.lines, l)
		m.mu.Unlock()
		return greet(ctx, transport{
			in: inW, out: outR,
			wait: func() error { return nil },
			stop: func(grace time.Duration) {
				_ = inW.Close()
				select {
				case <-l.ended:
				case <-time.After(grace):
					l.cut()
				}
			},
		}, m.options)
	}
	t.Cleanup(func() {
		_ = m.Close()
		for _, l := range m.lines {
			<-l.ended
		}
	})
	return m
}

// fill sets every exported field to something that is not its zero value, and nowhere the same.
func fill(t *testing.T, v reflect.Value, n *int) {
	t.Helper()
	*n++
	if v.Type() == reflect.TypeFor[time.Time]() {
		v.Set(reflect.ValueOf(time.Date(2026, 11, 22, 14, 3, *n%60, 123456000, time.UTC)))
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true)
	case reflect.String:
		v.SetString(fmt.Sprintf("ü<text>\n%d", *n))
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n))
		if v.Kind() == reflect.Uint64 {
			v.SetUint(1<<63 + uint64(*n)) // more than a float64 holds
		}
	case reflect.Float32, reflect.Float64:
		v.SetFloat(float64(*n) + 0.5)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(t, v.Index(0), n)
		fill(t, v.Index(1), n)
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 2 {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(t, key, n)
			fill(t, value, n)
			v.SetMapIndex(key, value)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(t, v.Field(i), n)
			}
		}
	case reflect.Interface:
		if v.Type() != reflect.TypeFor[error]() {
			t.Fatalf("a field of type %s: say here what to put there", v.Type())
		}
		cause := new(repository.OwnedError)
		fill(t, reflect.ValueOf(cause).Elem(), n)
		v.Set(reflect.ValueOf(cause))
	default:
		t.Fatalf("a field of type %s: say here what to put there", v.Type())
	}
}

func filled[T any](t *testing.T) T {
	t.Helper()
	var v T
	n := 0
	fill(t, reflect.ValueOf(&v).Elem(), &n)
	return v
}

// equal compares what has crossed the wire with what was sent.
func equal(t *testing.T, what string, found, expected any) {
	t.Helper()
	if diff := cmp.Diff(expected, found, cmp.AllowUnexported(named{}, retentionParams{})); diff != "" {
		t.Errorf("%s: not all of it was carried (-sent +received):\n%s", what, diff)
	}
}

// A field that is added to one of these types later, and does not cross the wire, fails here.
func TestWire_carriesEveryField(t *testing.T) {
	var given any
	var answer any
	m := connect(t, scripted{func(_ context.Context, _ string, v any) (any, error) {
		given = v
		return answer, nil
	}}, Options{})
	ctx := t.Context()

	machine := filled[guest.Machine](t)
	answer = machine
	found, err := m.Machine(ctx)
	must(t, err)
	equal(t, "machine", found, machine)

	instances := filled[[]guest.Instance](t)
	answer = instances
	discovered, err := m.Discover(ctx)
	must(t, err)
	equal(t, "instances", discovered, instances)

	r, checks := filled[guest.CheckRequest](t), filled[[]guest.Check](t)
	answer = checks
	checked, err := m.Check(ctx, r)
	must(t, err)
	equal(t, "checks", checked, checks)
	equal(t, "check request", given, r)

	d, state := filled[guest.Deployment](t), filled[*guest.State](t)
	answer = state
	applied, err := m.Apply(ctx, d)
	must(t, err)
	d.Runner = nil // the one thing that stays: the program that runs there is deployed
	equal(t, "deployment", given, d)
	equal(t, "state after apply", applied, state)

	read, err := m.State(ctx, "orders")
	must(t, err)
	equal(t, "state", read, state)
	equal(t, "name", given, named{"orders"})

	answer = nil
	retention := filled[job.WALRetention](t)
	must(t, m.SetWALRetention(ctx, "orders", &retention))
	equal(t, "retention", given, retentionParams{"orders", &retention})
	must(t, m.SetWALRetention(ctx, "orders", nil))
	equal(t, "no retention", given, retentionParams{"orders", nil})
	must(t, m.Remove(ctx, "orders"))
	equal(t, "name", given, named{"orders"})
}

// Nothing, as opposed to something empty, stays nothing: callers tell them apart.
func TestWire_carriesNothing(t *testing.T) {
	var given any
	m := connect(t, scripted{func(_ context.Context, call string, v any) (any, error) {
		given = v
		if call == callApply || call == callState {
			return &guest.State{}, nil
		}
		return nil, nil
	}}, Options{})
	instances, err := m.Discover(t.Context())
	must(t, err)
	equal(t, "instances", instances, []guest.Instance(nil))
	_, err = m.Check(t.Context(), guest.CheckRequest{Job: &job.Job{}})
	must(t, err)
	equal(t, "check request", given, guest.CheckRequest{Job: &job.Job{}})
	state, err := m.Apply(t.Context(), guest.Deployment{Job: &job.Job{}})
	must(t, err)
	equal(t, "state", state, &guest.State{})
	equal(t, "deployment", given, guest.Deployment{Job: &job.Job{}})
}

type hinted struct{ error }

func (hinted) Hint() string { return "turn it off and on again" }

func TestWire_carriesErrors(t *testing.T) {
	owned := filled[*repository.OwnedError](t)
	prerequisites := filled[*guest.PrerequisiteError](t)
	sent := map[string]error{
		"plain":                 errors.New("disk full"),
		"with a hint":           fmt.Errorf("restart: %w", hinted{errors.New("it does not answer")}),
		"no job":                guest.ErrNoJob,
		"no job, wrapped":       fmt.Errorf("read: %w", guest.ErrNoJob),
		"owned":                 owned,
		"owned, wrapped":        &guest.ApplyError{Job: "orders", Step: "claim", Done: []string{"this", "that"}, Err: owned},
		"prerequisites":         prerequisites,
		"prerequisites, others": &guest.PrerequisiteError{Job: "orders", Checks: filled[[]guest.Check](t), Causes: []error{hinted{errors.New("no route")}, owned}},
		"prerequisites, few":    &guest.PrerequisiteError{Job: "orders"},
		"wrapped prerequisites": fmt.Errorf("again: %w", prerequisites),
		"apply":                 filled[*guest.ApplyError](t),
		"proof":                 filled[*guest.ProofError](t),
		"runner":                filled[*guest.RunnerError](t),
		"settings":              filled[*guest.SettingsError](t),
		"canceled":              context.Canceled,
		"expired, wrapped":      fmt.Errorf("prove: %w", context.DeadlineExceeded),
	}
	var answer error
	m := connect(t, scripted{func(context.Context, string, any) (any, error) { return nil, answer }}, Options{})
	hint := func(err error) string {
		var h interface{ Hint() string }
		if errors.As(err, &h) {
			return h.Hint()
		}
		return ""
	}
	for name, err := range sent {
		t.Run(name, func(t *testing.T) {
			answer = err
			_, got := m.State(t.Context(), "orders")
			if got == nil || got.Error() != err.Error() {
				t.Fatalf("found %v, expected %v", got, err)
			}
			equal(t, "hint", hint(got), hint(err))
			for _, sentinel := range []error{guest.ErrNoJob, context.Canceled, context.DeadlineExceeded} {
				equal(t, sentinel.Error(), errors.Is(got, sentinel), errors.Is(err, sentinel))
			}
			sentOwned, _ := errors.AsType[*repository.OwnedError](err)
			gotOwned, _ := errors.AsType[*repository.OwnedError](got)
			equal(t, "owned", gotOwned, sentOwned)
			sentChecks, is := errors.AsType[*guest.PrerequisiteError](err)
			gotChecks, _ := errors.AsType[*guest.PrerequisiteError](got)
			if !is {
				equal(t, "prerequisites", gotChecks, sentChecks)
				return
			}
			equal(t, "causes", len(gotChecks.Causes), len(sentChecks.Causes))
			for i, cause := range sentChecks.Causes {
				equal(t, "cause", gotChecks.Causes[i].Error(), cause.Error())
			}
			shallow := func(e *guest.PrerequisiteError) guest.PrerequisiteError {
				c := *e
				c.Causes = nil
				return c
			}
			equal(t, "prerequisites", shallow(gotChecks), shallow(sentChecks))
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// blocking is a guest that says when it began, and works until it is told to stop.
func blocking(began chan<- string, answer error) scripted {
	return scripted{func(ctx context.Context, call string, _ any) (any, error) {
		began <- call
		<-ctx.Done()
		if answer != nil {
			return nil, answer
		}
		return nil, fmt.Errorf("%s: %w", call, context.Cause(ctx))
	}}
}

func TestConversation_requestsOverlap(t *testing.T) {
	began := make(chan string)
	release := make(chan struct{})
	m := connect(t, scripted{func(context.Context, string, any) (any, error) {
		began <- ""
		<-release
		return &guest.State{}, nil
	}}, Options{})
	var group sync.WaitGroup
	const calls = 20
	for range calls {
		group.Go(func() {
			if _, err := m.State(t.Context(), "orders"); err != nil {
				t.Error(err)
			}
		})
	}
	for range calls {
		<-began // all are under way before one is answered
	}
	close(release)
	group.Wait()
	if n := m.opened(); n != 1 {
		t.Errorf("found %d conversations, expected 1", n)
	}
}

func TestConversation_changesOneAtATime(t *testing.T) {
	began := make(chan string, 1)
	m := connect(t, blocking(began, nil), Options{})
	first, stopFirst := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Remove(first, "one") }()
	<-began
	why := errors.New("tired of waiting")
	second, stop := context.WithCancelCause(t.Context())
	stop(why)
	if err := m.SetWALRetention(second, "two", nil); !errors.Is(err, why) {
		t.Errorf("found %v, expected %v", err, why)
	}
	select {
	case call := <-began:
		t.Errorf("%s began while another change was under way", call)
	default:
	}
	stopFirst()
	if err := <-done; !errors.Is(err, context.Canceled) || err.Error() != "remove: context canceled" {
		t.Errorf("found %v", err)
	}
}

// A canceled Apply is heard to its end: what it says of the rollback matters more than the time it takes.
func TestConversation_canceledChangeIsHeardToItsEnd(t *testing.T) {
	began := make(chan string, 1)
	m := connect(t, blocking(began, &guest.ApplyError{Job: "orders", Step: "prove", Err: context.Canceled, RolledBack: true}), Options{})
	why := errors.New("the user pressed Ctrl-C")
	ctx, stop := context.WithCancelCause(t.Context())
	go func() {
		<-began
		stop(why)
	}()
	_, err := m.Apply(ctx, guest.Deployment{Job: &job.Job{Name: "orders"}})
	if err == nil || !strings.HasSuffix(err.Error(), "everything was put back as it was") || !errors.Is(err, context.Canceled) || !errors.Is(err, why) {
		t.Errorf("found %v", err)
	}
}

func TestConversation_canceledReadIsNotWaitedFor(t *testing.T) {
	began, release := make(chan string, 1), make(chan struct{})
	m := connect(t, scripted{func(context.Context, string, any) (any, error) {
		began <- ""
		<-release
		return nil, nil
	}}, Options{})
	ctx, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	_, err := m.Discover(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("found %v", err)
	}
	close(release)
}

func TestConversation_lostDuringRead(t *testing.T) {
	began := make(chan string, 2)
	times := 0
	var m *memory
	m = connect(t, scripted{func(ctx context.Context, call string, _ any) (any, error) {
		began <- call
		if times++; times == 1 {
			go m.last().cut()
			<-ctx.Done()
		}
		return guest.Machine{ID: "m1"}, nil
	}}, Options{})
	machine, err := m.Machine(t.Context())
	must(t, err)
	equal(t, "machine", machine.ID, "m1")
	equal(t, "conversations", m.opened(), 2)
}

func TestConversation_lostDuringChange(t *testing.T) {
	began := make(chan string, 1)
	m := connect(t, blocking(began, nil), Options{})
	go func() {
		<-began
		m.last().cut()
	}()
	_, err := m.Apply(t.Context(), guest.Deployment{Job: &job.Job{Name: "orders"}})
	lost, ok := errors.AsType[*LostError](err)
	if !ok || lost.Call != "apply job orders" || lost.Hint() == "" {
		t.Fatalf("found %v, expected a *LostError", err)
	}
	<-m.last().ended // the server had to cancel what ran
	equal(t, "conversations", m.opened(), 1)
}

func TestConversation_endsWhenIdleAndBeginsAgain(t *testing.T) {
	m := connect(t, scripted{func(context.Context, string, any) (any, error) { return guest.Machine{}, nil }}, Options{Idle: 20 * time.Millisecond})
	for i := range 3 {
		_, err := m.Machine(t.Context())
		must(t, err)
		equal(t, "conversations", m.opened(), i+1)
		<-m.last().ended
		must(t, m.last().err)
	}
}

func TestConversation_pingsKeepItAlive(t *testing.T) {
	release := make(chan struct{})
	m := connect(t, scripted{func(context.Context, string, any) (any, error) {
		<-release
		return guest.Machine{}, nil
	}}, Options{ping: 5 * time.Millisecond, silence: 100 * time.Millisecond})
	time.AfterFunc(300*time.Millisecond, func() { close(release) }) // three times what silence would end
	_, err := m.Machine(t.Context())
	must(t, err)
	equal(t, "conversations", m.opened(), 1)
}

func TestConversation_silentGuestIsGivenUp(t *testing.T) {
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	go func() { // greets, reads, and never answers
		_, _ = fmt.Fprintln(outW, "Welcome to the machine!")
		_, _ = fmt.Fprintf(outW, `{"hello":{"protocol":%d,"sha256":"00","pid":1,"euid":0}}`+"\n", protocol)
		_, _ = io.Copy(io.Discard, inR)
		_ = outW.Close()
	}()
	o := Options{ping: 5 * time.Millisecond, silence: 40 * time.Millisecond}
	o.applyDefaults()
	c, err := greet(t.Context(), transport{
		in: inW, out: outR, wait: func() error { return nil }, stop: func(time.Duration) { _ = inW.Close() },
	}, o)
	must(t, err)
	_, died, err := c.call(t.Context(), request{Call: callMachine}, changesNothing)
	if !died || !strings.HasPrefix(err.Error(), "the guest has not answered for ") {
		t.Errorf("found %v", err)
	}
	<-c.stopped
}

func TestServe_endsWhenItHearsNothing(t *testing.T) {
	inR, inW := io.Pipe()
	defer inW.Close()
	outR, outW := io.Pipe()
	go func() { _, _ = io.Copy(io.Discard, outR) }()
	began := make(chan string, 1)
	s := &server{guest: blocking(began, nil), silence: 50 * time.Millisecond}
	ended := make(chan error)
	go func() { ended <- s.run(context.Background(), hello{}, inR, outW) }()
	_, err := inW.Write([]byte(`{"id":1,"call":"remove","params":{"name":"orders"}}` + "\n"))
	must(t, err)
	<-began
	if err := <-ended; !errors.Is(err, errSilent) {
		t.Errorf("found %v, expected %v", err, errSilent)
	}
}

// Nobody reads the answers any more, and the pipe does not break: what runs ends all the same.
func TestServe_endsWhenNobodyReads(t *testing.T) {
	inR, inW := io.Pipe()
	_, outW := io.Pipe()
	began := make(chan string, 1)
	s := &server{guest: blocking(began, nil), silence: time.Minute}
	ended := make(chan error)
	go func() { ended <- s.run(context.Background(), hello{}, inR, outW) }()
	_, err := inW.Write([]byte(`{"id":1,"call":"machine"}` + "\n"))
	must(t, err)
	<-began
	must(t, inW.Close())
	if err := <-ended; err != nil {
		t.Errorf("found %v", err)
	}
}

func TestServe_refusals(t *testing.T) {
	const secret = "hunter2"
	for name, c := range map[string]struct{ in, ends, answers string }{
		"no JSON":           {in: secret, ends: "read request 1: found no JSON document: wrong at byte 1"},
		"half a document":   {in: `{"id":1,"call":"hun`, ends: "read request 1: found no whole JSON document"},
		"two in a line":     {in: `{"ping":true} {"ping":true}`, ends: "read request 1: found more than one JSON document in a line"},
		"nothing asked":     {in: `{}`, ends: "read request 1: found neither a call nor a cancellation nor a ping"},
		"wrong type":        {in: `{"id":"` + secret + `"}`, ends: `read request 1: found a JSON string in field "id", expected a uint64`},
		"unknown field":     {in: `{"id":1,"colour":"` + secret + `"}`, ends: `read request 1: found the field "colour", which this runner does not know`},
		"unknown call":      {in: `{"id":1,"call":"dance"}`, answers: `found the call \"dance\", which this runner does not know`},
		"no params":         {in: `{"id":1,"call":"state"}`, answers: `params of state: found no whole JSON document`},
		"no job":            {in: `{"id":1,"call":"apply","params":{}}`, answers: `params of apply: found no job in it`},
		"check without job": {in: `{"id":1,"call":"check","params":{}}`, answers: `params of check: found no job in it`},
		"params of a newer": {in: `{"id":1,"call":"apply","params":{"Credentials":{"SecretAccessKey":"` + secret + `","Moon":1}}}`, answers: `params of apply: found the field \"Moon\", which this runner does not know`},
		"bad duration":      {in: `{"id":1,"call":"check","params":{"Job":{"wal":{"interval":"` + secret + `"}}}}`, answers: "params of check: found a document that does not fit *guest.CheckRequest"},
	} {
		t.Run(name, func(t *testing.T) {
			inR, inW := io.Pipe()
			outR, outW := io.Pipe()
			said := make(chan string)
			go func() {
				l := newLines(outR)
				_, _ = l.next() // hello
				b, _ := l.next()
				said <- string(b)
			}()
			ended := make(chan error, 1)
			go func() {
				ended <- Serve(context.Background(), scripted{func(context.Context, string, any) (any, error) { return nil, nil }}, inR, outW)
				_ = outW.Close()
			}()
			_, err := inW.Write([]byte(c.in + "\n"))
			must(t, err)
			if c.answers != "" {
				if got := <-said; !strings.Contains(got, c.answers) || strings.Contains(got, secret) {
					t.Errorf("found %s, expected %s", got, c.answers)
				}
				must(t, inW.Close())
				must(t, <-ended)
				return
			}
			<-said
			if err := <-ended; err == nil || err.Error() != c.ends {
				t.Errorf("found %v, expected %s", err, c.ends)
			}
		})
	}
}

// FuzzServe sends what nobody would: the server must end in order, whatever it was.
func FuzzServe(f *testing.F) {
	for _, seed := range []string{
		"", "\n", "{}\n", `{"ping":true}` + "\n", `{"id":1,"call":"machine"}` + "\n" + `{"cancel":1}` + "\n",
		`{"id":1,"call":"check","params":{"Job":{"name":"orders"},"Credentials":{"AccessKeyID":"a"}}}` + "\n",
		`{"id":1,"call":"apply","params":{"Job":null}}` + "\n", `{"id":1,"call":"state","params":[]}` + "\n" + `{"id":1,"call":"state"}` + "\n",
		`{"id":18446744073709551615,"call":"remove","params":{"name":"../../etc"}}` + "\nrest",
		`{"id":3,"call":"set_wal_retention","params":{"name":"x","retention":{"keep_days":-1}}}` + "\n", "\x00\xff\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		s := &server{silence: time.Minute, guest: scripted{func(_ context.Context, call string, given any) (any, error) {
			switch v := given.(type) {
			case guest.CheckRequest:
				return nil, errors.New(v.Job.Name)
			case guest.Deployment:
				return nil, fmt.Errorf("%s: %w", v.Job.Name, guest.ErrNoJob)
			}
			return nil, errors.New(call)
		}}}
		_ = s.run(t.Context(), hello{}, strings.NewReader(string(in)), io.Discard) // only that it ends
	})
}

// What is secret in a request is in it, and nowhere else.
func TestSecrets_onlyInTheRequest(t *testing.T) {
	keys := &objectstore.Credentials{AccessKeyID: "AKIA", SecretAccessKey: "hunter2", SessionToken: "token3"}
	var given any
	m := connect(t, scripted{func(_ context.Context, _ string, v any) (any, error) {
		given = v
		return nil, errors.New("no route to the repository")
	}}, Options{})
	_, err := m.Check(t.Context(), guest.CheckRequest{Job: &job.Job{Name: "orders"}, Credentials: keys})
	r, _ := given.(guest.CheckRequest)
	equal(t, "credentials", r.Credentials, keys)
	_, err2 := m.Apply(t.Context(), guest.Deployment{Job: &job.Job{Name: "orders"}, Credentials: keys})
	d, _ := given.(guest.Deployment)
	equal(t, "credentials", d.Credentials, keys)
	for _, err := range []error{err, err2} {
		if s := fmt.Sprintf("%v %+v %#v", err, err, err); strings.Contains(s, "hunter2") || strings.Contains(s, "token3") {
			t.Errorf("found a secret in %s", s)
		}
	}
}
