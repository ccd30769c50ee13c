// Package control is how people and scripts steer lunshift: the service that
// conf describes, put together and run; an HTTP and JSON interface to it on a Unix
// socket, with its client; metrics; and the words in which all of it is shown.
//
// Whoever may open the socket may do everything, so it belongs to its owner alone
// (mode 0600). No secret passes it in either direction.
package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
)

// Volume is what the service needs of a volume; *proxy.Volume is one.
type Volume interface {
	Name() string
	Status() proxy.Status
	Ask(ctx context.Context, q proxy.Question) (answers []proxy.Answer, done bool)
	Start(ctx context.Context, o ...proxy.StartOptions) error
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	Throttle(ctx context.Context, rate uint64) error
	Cutover(ctx context.Context, o proxy.CutoverOptions) error
	Rollback(ctx context.Context, o proxy.RollbackOptions) error
	SetMirror(ctx context.Context, on bool) error
	Verify(ctx context.Context, o proxy.VerifyOptions) (proxy.VerifyReport, error)
	Wait(ctx context.Context, p proxy.Phase) error
	Remove(ctx context.Context, instead ...state.Record) error
	BreakFence(ctx context.Context, source, destination lun.Device) (proxy.Broken, error)
	Set(s proxy.Settings) error
	Withdraw(ctx context.Context) error
	Shutdown(ctx context.Context) error
}

// Status is a volume at one instant.
type Status = proxy.Status

// Kind sorts failures by what a script does about them.
type Kind string

// The kinds of failure.
const (
	// Failed: it was tried and did not work.
	Failed Kind = "failed"
	// Usage: the request itself is wrong.
	Usage Kind = "usage"
	// WrongPhase: the volume's phase does not allow the step.
	WrongPhase Kind = "phase"
	// Unknown: there is no such volume.
	Unknown Kind = "unknown_volume"
	// Timeout: what was waited for did not happen in time.
	Timeout Kind = "timeout"
	// Configuration: the service cannot start with its file as it is.
	Configuration Kind = "configuration"
	// RestartNeeded: it was done, but for settings that count from the next start on.
	RestartNeeded Kind = "restart_needed"
	// Differs: source and destination were compared and are not the same.
	Differs Kind = "differs"
	// Interrupted: the caller was told to end first.
	Interrupted Kind = "interrupted"
)

// Error is a failure as it travels over the socket. Its message is one line; that of
// kind Configuration has one for each fault.
type Error struct {
	Kind    Kind   `json:"kind"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Exit codes of the commands.
const (
	ExitDone        = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitPhase       = 3
	ExitRestart     = 4
	ExitDiffers     = 5
	ExitInterrupted = 130
)

// ExitCode is the exit code that says what err is.
func ExitCode(err error) int {
	if err == nil {
		return ExitDone
	}
	switch KindOf(err) {
	case Usage, Configuration:
		return ExitUsage
	case WrongPhase:
		return ExitPhase
	case RestartNeeded:
		return ExitRestart
	case Differs:
		return ExitDiffers
	case Interrupted:
		return ExitInterrupted
	}
	return ExitFailed
}

// KindOf is the kind of failure that err is.
func KindOf(err error) Kind {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Kind
	case errors.Is(err, proxy.ErrPhase):
		return WrongPhase
	case errors.Is(err, context.Canceled):
		return Interrupted
	}
	return Failed
}

// Usagef is an error for a request that is itself wrong.
func Usagef(format string, args ...any) error {
	return &Error{Usage, fmt.Sprintf(format, args...)}
}

// ServiceInfo is what the service says of itself.
type ServiceInfo struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Since   time.Time `json:"since"`
	Config  string    `json:"config"`
	// Portals are the addresses that are listened on, ports resolved.
	Portals []string `json:"portals"`
	// HTTP is the address of the metrics; empty without.
	HTTP string `json:"http,omitempty"`
}

// RemoveReport is the outcome of a removal.
type RemoveReport struct {
	Name string `json:"name"`
	// Removed is false where there was nothing left to forget.
	Removed bool `json:"removed"`
	// Known is false where neither the configuration nor the state has the name.
	Known bool `json:"known"`
	// Redirect is where logins are sent as long as the configuration has the volume, and
	// RedirectUntil when that ends by itself, nil for never; empty where they are refused.
	Redirect      string     `json:"redirect,omitempty"`
	RedirectUntil *time.Time `json:"redirect_until,omitempty"`
}

// throttleRequest is the body of a throttle request, in bytes per second.
type throttleRequest struct {
	Rate uint64 `json:"rate"`
}

// errorReply is the body of every answer that is not 200.
type errorReply struct {
	Error Error `json:"error"`
}

// ParsePhase reads the name of a phase.
func ParsePhase(text string) (proxy.Phase, error) {
	for _, p := range proxy.Phases {
		if text == string(p) {
			return p, nil
		}
	}
	return "", Usagef("there is no phase %q; the phases are %s", text, phaseNames())
}

func phaseNames() string {
	text := ""
	for i, p := range proxy.Phases {
		if i > 0 {
			text += ", "
		}
		text += string(p)
	}
	return text
}
