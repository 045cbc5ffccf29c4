package sshlink

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	maxOutput = 1 << 20 // bytes of standard output that Run returns
	maxStderr = 8 << 10 // bytes of standard error that are kept, the last ones

	// How long a command is given to heed its input's end and a signal, and then SIGTERM; a program that holds nothing
	// ends in milliseconds.
	termAfter = 300 * time.Millisecond
	killAfter = 2 * time.Second
	// How long a command that kills may take, and the server to agree that a channel is closed. One that does not answer
	// by then is taken for gone.
	answerWithin = 3 * time.Second
)

// Command is a program on the host. Nothing secret may stand in it: arguments are visible there.
//
// A Shell with Root runs as the account itself: it finds a shell function `asroot PROGRAM [ARGUMENT]…` that runs one
// program as root with the script's standard input and output (by sudo -n; by sudo -S where a password is needed, which the
// script never sees; as it is for root), so that sudo is asked for that program and not for sh. It may be called more than
// once, in a pipeline, with its input redirected, and at the end of a script. Where a sudo password is given, its standard
// error comes when it has ended; where one is needed, its input goes through a pipe that reads ahead: of several that share
// the script's input, the first gets all of it, so those that need none are given </dev/null.
type Command struct {
	Args  []string // quoted for the remote shell; or
	Shell string   // a script for sh, as it stands
	Root  bool     // run it as root: by sudo if the policy says so
	Name  string   // what messages call it; "": as it stands
	Stdin io.Reader
}

// Quote quotes a word for a POSIX shell.
func Quote(word string) string {
	special := func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("@%_-+:,./", r)
	}
	if word != "" && !strings.ContainsFunc(word, special) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// String is the command for messages, bounded.
func (c Command) String() string {
	s := c.Shell
	if c.Name != "" {
		s = c.Name
	} else if len(c.Args) > 0 {
		s = quoteAll(c.Args)
	}
	return printable(s, 200)
}

func quoteAll(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = Quote(w)
	}
	return strings.Join(quoted, " ")
}

// Process is a running command.
type Process struct {
	Stdin  io.WriteCloser
	Stdout io.Reader

	link       *Link
	command    Command
	connection *connection
	session    *ssh.Session
	stderr     *stderr
	terminated sync.Once
	asked      atomic.Bool   // the server was asked to run it
	stopped    atomic.Bool   // ended on purpose
	end        chan struct{} // closed when it has ended
	err        error         // valid once end is closed
}

// Run runs a command to its end and returns what it printed on standard output. At most four run at a time, the others
// wait. When ctx ends, the command is ended too. Output is bounded to 1 MiB; a command that prints more is ended.
// What is left unread of Stdin when the command has ended stays unread; a Read that blocks then is not waited for.
//
// Errors: *CommandError when it ended with another code than 0, *SudoError, those of Connect, that of reading Stdin.
func (l *Link) Run(ctx context.Context, c Command) ([]byte, error) {
	// What fails on this side ends the command, and is the error also if that happened to end well by itself.
	var mine atomic.Pointer[error]
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	fail := func(err error) {
		mine.CompareAndSwap(nil, &err)
		cancel(err)
	}
	p, err := l.start(ctx, c, l.sessions)
	if err != nil {
		return nil, err
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		if c.Stdin != nil {
			in := &input{Reader: c.Stdin}
			_, _ = io.Copy(p.Stdin, in) // a command may end before its input does
			if in.err != nil {
				// Half of an input must not look like a whole one.
				fail(fmt.Errorf("%s: %s: read its input: %w", l, c, in.err))
				return
			}
		}
		_ = p.Stdin.Close()
	}()
	var out bytes.Buffer
	if _, err := io.Copy(&out, io.LimitReader(p.Stdout, maxOutput+1)); err == nil && out.Len() > maxOutput {
		fail(fmt.Errorf("%s: %s: it printed more than %d bytes", l, c, maxOutput))
	}
	err = p.Wait()
	select {
	case <-copied:
	case <-time.After(time.Second):
	}
	if failed := mine.Load(); failed != nil {
		return nil, *failed
	}
	if err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// input keeps the error of a reader apart from those of what it is copied to.
type input struct {
	io.Reader
	err error
}

func (i *input) Read(p []byte) (int, error) {
	n, err := i.Reader.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // a reader's end is io.EOF itself
		i.err = err
	}
	return n, err
}

// Start starts a command that is talked to. Stdin of the Command is not used. When ctx ends, the command is ended too. The
// process holds one of the link's sessions until it has ended.
func (l *Link) Start(ctx context.Context, c Command) (*Process, error) {
	return l.start(ctx, c, l.sessions)
}

// start starts a command once it gets one of the sessions.
func (l *Link) start(ctx context.Context, c Command, sessions chan struct{}) (_ *Process, err error) {
	if len(c.Args) == 0 && c.Shell == "" {
		return nil, errors.New("sshlink: internal error: an empty command")
	}
	for _, word := range append([]string{c.Shell}, c.Args...) {
		if strings.ContainsRune(word, 0) {
			return nil, fmt.Errorf("%s: %s: an argument has a NUL byte, which none can", l, c)
		}
	}
	select {
	case sessions <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() {
		if err != nil {
			<-sessions
		}
	}()
	var mark [12]byte
	_, _ = rand.Read(mark[:]) // never fails
	sudo := c.Root && l.sudo
	p := &Process{
		link: l, command: c, end: make(chan struct{}),
		stderr: &stderr{mark: "sshlink-" + hex.EncodeToString(mark[:]), inputEnds: make(chan struct{})},
	}
	script := l.script(c, p.stderr.mark, sudo)
	var password []byte
	if sudo && l.sudoPassword != "" {
		password = []byte(l.sudoPassword + "\n")
	}
	for try := 1; ; try++ {
		if p.connection, err = l.connect(ctx); err != nil {
			return nil, err
		}
		if err = p.open(ctx, script, password); err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var refused *ssh.OpenChannelError
		if errors.As(err, &refused) {
			return nil, fmt.Errorf("%s: open a session for %s: %w (sshd_config's MaxSessions has to be %d or more)", l, c, err, maxSessions+1)
		}
		// Of a connection that broke just now there are many errors, and one of a server that refuses to run anything.
		if p.asked.Load() && !broke(err) {
			select {
			case <-p.connection.over:
			case <-time.After(time.Second):
				return nil, fmt.Errorf("%s: the server runs no commands for this account", l) // err has the whole script
			}
		}
		if try == 2 || p.asked.Load() { // what may have run is not run again
			return nil, l.lost(fmt.Errorf("start %s: %w", c, err))
		}
		_ = p.connection.client.Close()
		<-p.connection.over
	}
	p.watch(ctx, sessions)
	return p, nil
}

// opened is a session in which the script was started, or why not.
type opened struct {
	session *ssh.Session
	stdin   io.WriteCloser
	stdout  io.Reader
	err     error
}

// open opens a session and starts the script there.
func (p *Process) open(ctx context.Context, script string, password []byte) error {
	// Neither opening nor starting knows a context.
	result := make(chan opened, 1)
	client := p.connection.client
	go func() { result <- p.openSession(client, script, password) }()
	take := func(o opened) error {
		p.session, p.Stdin, p.Stdout = o.session, &stdin{to: o.stdin}, o.stdout
		return o.err
	}
	select {
	case o := <-result:
		return take(o)
	case <-p.connection.over:
		// A channel that is opened while the connection breaks can be waited for in vain: package ssh does not answer for
		// one that it learns of after it has closed the others.
		select {
		case o := <-result:
			return take(o)
		case <-time.After(100 * time.Millisecond):
			return io.ErrUnexpectedEOF
		}
	case <-ctx.Done():
	}
	// The command may be running already, and is ended then. If the server does not answer, that is left behind.
	left := make(chan struct{})
	go func() {
		defer close(left)
		if take(<-result) == nil {
			p.watch(ctx, nil)
			p.terminate()
		}
	}()
	select {
	case <-left:
	case <-time.After(answerWithin):
	}
	return context.Cause(ctx)
}

func (p *Process) openSession(client *ssh.Client, script string, password []byte) (o opened) {
	if o.session, o.err = client.NewSession(); o.err != nil {
		return o
	}
	defer func() {
		if o.err != nil {
			_ = o.session.Close()
		}
	}()
	if o.stdin, o.err = o.session.StdinPipe(); o.err != nil {
		return o
	}
	if o.stdout, o.err = o.session.StdoutPipe(); o.err != nil {
		return o
	}
	o.session.Stderr = p.stderr
	p.asked.Store(true)
	if o.err = o.session.Start("exec /bin/sh -c " + Quote(script)); o.err != nil {
		return o
	}
	_, o.err = o.stdin.Write(password)
	return o
}

// watch follows the process to its end, gives its session back then, and ends it with ctx.
func (p *Process) watch(ctx context.Context, sessions chan struct{}) {
	stop := context.AfterFunc(ctx, p.terminate)
	go func() {
		select {
		case <-p.stderr.inputEnds:
			_ = p.Stdin.Close()
		case <-p.end:
		}
	}()
	go func() {
		err := p.session.Wait()
		stop()
		p.err = p.outcome(ctx, err)
		if sessions != nil {
			<-sessions
		}
		close(p.end)
	}()
}

// Wait waits until the process has ended; errors as Run's.
func (p *Process) Wait() error {
	<-p.end
	return p.err
}

// Stop closes the process's input, waits for grace, and then ends it. Wait tells how it ended.
func (p *Process) Stop(grace time.Duration) {
	_ = p.Stdin.Close()
	select {
	case <-p.end:
	case <-time.After(grace):
		p.terminate()
	}
}

// terminate ends the process, and returns when it has ended.
func (p *Process) terminate() {
	p.terminated.Do(func() {
		p.stopped.Store(true)
		_ = p.Stdin.Close()
		_ = p.session.Signal(ssh.SIGTERM) // sshd does nothing on this for root, and before OpenSSH 7.9
		if p.endsWithin(termAfter) || p.kill("TERM") && p.endsWithin(killAfter) || p.kill("KILL") && p.endsWithin(termAfter) {
			return
		}
		_ = p.session.Close()
		if !p.endsWithin(answerWithin) {
			_ = p.connection.client.Close()
		}
	})
	<-p.end
}

func (p *Process) endsWithin(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-p.end:
		return true
	case <-timer.C:
		return false
	}
}

// kill signals the command's process group, from a session of its own beside the four. It tells whether it could.
func (p *Process) kill(signal string) bool {
	group := p.stderr.group.Load()
	if group <= 1 {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	killer := Command{Shell: fmt.Sprintf("kill -%s -%d", signal, group)}
	if signal == "KILL" && p.command.Root {
		// What runs by sudo is root's, which the account cannot signal. TERM is not tried so: most of what runs as root
		// ends with its input, and where sudo allows little, asking for more is an incident in the host's log.
		killer = Command{Shell: killer.Shell + "; asroot sh -c " + Quote(killer.Shell) + " </dev/null", Root: true}
	}
	k, err := p.link.start(ctx, killer, make(chan struct{}, 1))
	if err != nil {
		return false // the connection is gone, or sshd allows no more sessions
	}
	_ = k.Stdin.Close()
	select {
	case <-k.end:
		return true
	case <-ctx.Done():
		_ = k.session.Close()
		return false
	}
}

// outcome translates how a session ended.
func (p *Process) outcome(ctx context.Context, err error) error {
	said := p.stderr.text()
	p.link.learn(p.stderr)
	var exit *ssh.ExitError
	switch {
	case err == nil:
		return nil // also if ctx ended meanwhile: it did what it was to do
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !errors.As(err, &exit) && p.stopped.Load():
		return &CommandError{Host: p.link.String(), Command: p.command.String(), Code: 137, Signal: string(ssh.SIGKILL), Stderr: said}
	case !errors.As(err, &exit):
		return p.link.lost(fmt.Errorf("while %s ran: %w", p.command, err))
	}
	if p.command.Root && p.link.sudo {
		problem := sudoProblem(said)
		if p.stderr.missing.Load() {
			problem = SudoMissing
		}
		if problem != "" {
			return &SudoError{Host: p.link.String(), User: p.link.host.user, Command: p.command.String(), Problem: problem, Said: printable(said, 1000)}
		}
	}
	if said == "" && p.stderr.group.Load() == 0 {
		said = "the account's login shell ran nothing of it" // as nologin does
	}
	return &CommandError{Host: p.link.String(), Command: p.command.String(), Code: exit.ExitStatus(), Signal: exit.Signal(), Stderr: said}
}

// lost is the error of a connection that broke off.
func (l *Link) lost(err error) error {
	e := &UnreachableError{User: l.host.user, Host: l.host.host, Port: l.host.port, Lost: true, Err: err}
	if l.bastion != nil {
		e.Bastion = l.bastion.String()
	}
	return e
}

// stderr keeps the end of what a command prints on standard error, and takes out what the script around it says there: lines
// that begin with mark, which is random. Safe for use by one writer and several readers.
type stderr struct {
	mark      string
	inputEnds chan struct{} // closed when nobody reads the command's input any more

	group    atomic.Int64 // the command's process group; 0: not known yet
	missing  atomic.Bool  // there is no sudo
	verified atomic.Bool  // sudo accepted the password
	ends     sync.Once

	mu   sync.Mutex
	line []byte // what has come of the last line
	tail []byte
}

func (s *stderr) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(p)
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			s.line = append(s.line, p...)
			if len(s.line) > maxStderr { // no line of the script's is so long
				s.keep(s.line)
				s.line = s.line[:0]
			}
			break
		}
		s.line = append(s.line, p[:i+1]...)
		p = p[i+1:]
		// Another program may have left a line open before it.
		if at := bytes.Index(s.line, []byte(s.mark)); at >= 0 {
			s.keep(s.line[:at])
			s.heed(strings.Fields(string(s.line[at+len(s.mark):])))
		} else {
			s.keep(s.line)
		}
		s.line = s.line[:0]
	}
	return n, nil
}

func (s *stderr) keep(p []byte) {
	s.tail = append(s.tail, p...)
	if over := len(s.tail) - maxStderr; over > 0 {
		s.tail = append(s.tail[:0], s.tail[over:]...)
	}
}

// heed takes note of what the script says.
func (s *stderr) heed(words []string) {
	switch {
	case len(words) == 2 && words[0] == "group":
		var group int64
		if _, err := fmt.Sscan(words[1], &group); err == nil {
			s.group.Store(group)
		}
	case len(words) == 1 && words[0] == "missing":
		s.missing.Store(true)
	case len(words) == 1 && words[0] == "verified":
		s.verified.Store(true)
	case len(words) == 1 && words[0] == "end":
		s.ends.Do(func() { close(s.inputEnds) })
	}
}

// text is what the command itself printed, its end.
func (s *stderr) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.TrimSpace(strings.ToValidUTF8(string(s.tail)+string(s.line), "?"))
}
