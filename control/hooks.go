package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"lunshift/conf"
)

// The hooks, as the configuration calls them.
const (
	beforeStart    = "before_start"
	afterSynced    = "after_synced"
	beforeCutover  = "before_cutover"
	afterCutover   = "after_cutover"
	beforeRollback = "before_rollback"
	afterRollback  = "after_rollback"
)

var allHooks = []string{beforeStart, afterSynced, beforeCutover, afterCutover, beforeRollback, afterRollback}

const (
	// mostOutput bounds what is kept of a hook's output, in bytes: half of it from its beginning.
	mostOutput = 4 << 10
	// pipeLimit is how long the output of a hook is waited for once it has ended, where
	// something that it left behind holds on to it.
	pipeLimit = time.Second
	// hookPath is where a hook finds programs.
	hookPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// hookOptions is what the audit trail has of a hook.
type hookOptions struct {
	Hook    string   `json:"hook"`
	Command []string `json:"command"`
}

// hookOf is the command of a hook; none where it has none.
func hookOf(h conf.Hooks, name string) []string {
	return map[string][]string{
		beforeStart: h.BeforeStart, afterSynced: h.AfterSynced, beforeCutover: h.BeforeCutover,
		afterCutover: h.AfterCutover, beforeRollback: h.BeforeRollback, afterRollback: h.AfterRollback,
	}[name]
}

// checkHooks refuses hooks that could not be run.
func (r *VolumeReport) checkHooks(h conf.Hooks) {
	for _, name := range allHooks {
		command := hookOf(h, name)
		if len(command) == 0 {
			continue
		}
		if err := hookFault(command); err != nil {
			*r = r.refuse("volume %s: hook %s: %s: %v", r.Name, name, command[0], err)
		}
	}
}

// hookFault says why a command could not be run.
func hookFault(command []string) error {
	info, err := os.Stat(command[0])
	switch {
	case err != nil:
		return pathless(err)
	case !info.Mode().IsRegular():
		return errors.New("it is not a regular file")
	}
	if err := unix.Access(command[0], unix.X_OK); err != nil {
		return fmt.Errorf("it cannot be executed: %w", err)
	}
	return nil
}

// runHook runs a hook of a volume, where it has one, with the volume's status on standard
// input, and writes it down. A failure is shown as a fault of the volume until this hook
// succeeds or a step of its hooks begins, which somebody who is not ready or a step that is done already
// is not. ran is true once it has come to an end that is not ctx's; or there is none.
func (s *Service) runHook(ctx context.Context, e *entry, group, what, name string) (ran bool, err error) {
	hooks := e.settings().Hooks
	command := hookOf(hooks, name)
	if len(command) == 0 {
		e.fail(name, nil)
		return true, nil
	}
	a, err := s.asks(ctx, itself, group, "hook", hookOptions{name, command}, e.name)
	if err != nil {
		err = fmt.Errorf("hook %s did not run: %w", name, err)
		e.fail(name, err)
		return false, err
	}
	input, err := json.Marshal(e.status())
	output := ""
	if err == nil {
		environment := []string{"PATH=" + hookPath, "LUNSHIFT_VOLUME=" + e.name, "LUNSHIFT_STEP=" + what, "LUNSHIFT_HOOK=" + name}
		if group != "" {
			environment = append(environment, "LUNSHIFT_GROUP="+group)
		}
		output, err = runCommand(ctx, command, environment, append(input, '\n'), hooks.Timeout)
	}
	failed := &hookFailure{output: output}
	if err != nil {
		err = fmt.Errorf("hook %s (%s) %w", name, command[0], err)
		failed.cause = err
		if last := lastLine(output); last != "" {
			err = fmt.Errorf("%w: %s", err, last)
		}
	}
	log := s.log.WithField("volume", e.name).WithField("hook", name)
	if output != "" {
		log = log.WithField("output", output)
	}
	if err != nil {
		log.Warnf("%v", err)
		// The trail has the reason first, and then all that is known.
		a.ends("", failed)
	} else {
		log.Infof("hook %s (%s) ended well", name, command[0])
		a.ends(output, nil)
	}
	e.fail(name, err)
	return err == nil || ctx.Err() == nil, err
}

// hookFailure has all of the output of a hook in its text.
type hookFailure struct {
	cause  error
	output string
}

func (f *hookFailure) Error() string {
	return strings.TrimSuffix(f.cause.Error()+"\n"+f.output, "\n")
}
func (f *hookFailure) Unwrap() error { return f.cause }

// notBegun is of a step that a hook stopped.
func notBegun(e *entry, step string, err error) error {
	return fmt.Errorf("volume %s: %s not begun: %w", e.name, step, err)
}

// runCommand runs a command with nothing but that environment and input, and gives what it wrote.
// Past limit, or with ctx, it is killed with all of its process group.
func runCommand(ctx context.Context, command, environment []string, input []byte, limit time.Duration) (string, error) {
	within, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c := exec.CommandContext(within, command[0], command[1:]...)
	var output bounded
	c.Env, c.Dir, c.Stdin, c.Stdout, c.Stderr = environment, "/", bytes.NewReader(input), &output, &output
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error {
		err := syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			err = os.ErrProcessDone
		}
		return err
	}
	c.WaitDelay = pipeLimit
	err := c.Run()
	text := output.String()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil && err != nil:
		return text, &Error{Interrupted, "was ended, as the service stops"}
	case within.Err() != nil && err != nil:
		return text, fmt.Errorf("did not end within %s and was killed (hooks.timeout)", limit)
	case err == nil || errors.Is(err, exec.ErrWaitDelay): // that it left something behind is its affair
		return text, nil
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return text, fmt.Errorf("ended with exit code %d", exit.ExitCode())
	case errors.As(err, &exit):
		return text, fmt.Errorf("was ended by a signal (%s)", exit)
	}
	return text, fmt.Errorf("could not be run: %w", pathless(err))
}

// bounded keeps the beginning and the end of what is written to it.
type bounded struct {
	mu      sync.Mutex // what a hook left behind may write on
	head    []byte
	tail    []byte
	dropped int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(p)
	if room := mostOutput/2 - len(b.head); room > 0 {
		b.head = append(b.head, p[:min(room, n)]...)
		p = p[min(room, n):]
	}
	b.tail = append(b.tail, p...)
	if over := len(b.tail) - mostOutput/2; over > 0 {
		b.dropped += over
		b.tail = append(b.tail[:0:0], b.tail[over:]...)
	}
	return n, nil
}

func (b *bounded) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	text := string(b.head)
	if b.dropped > 0 {
		text += fmt.Sprintf("\n[%d bytes left out]\n", b.dropped)
	}
	return printable(text + string(b.tail))
}

// printable is a text without what a terminal would take for a command.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(text, "�"))
	return strings.TrimSpace(text)
}

func lastLine(text string) string {
	return text[strings.LastIndexByte(text, '\n')+1:]
}
