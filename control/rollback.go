package control

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"lunshift/proxy"
)

// mirrorRequest is the body of a request to switch the mirror.
type mirrorRequest struct {
	On *bool `json:"on"`
}

func (s *Service) rollback(r *http.Request, e *entry) error {
	var o proxy.RollbackOptions
	if err := decode(r, "rollback", &o); err != nil {
		return err
	}
	return s.ask(r, step{name: "rollback", options: o, question: proxy.RollbackStep(o),
		refuse: func() error { return s.alone(r, e, "rollback", proxy.RollingBack) },
		do:     onVolume(e, func(ctx context.Context, v Volume) error { return v.Rollback(ctx, o) }),
	}, e)
}

func (s *Service) mirror(r *http.Request, e *entry) error {
	var body mirrorRequest
	if err := decode(r, "mirror", &body); err != nil {
		return err
	}
	if body.On == nil {
		return Usagef("mirror: the request does not say whether it is to be on")
	}
	return s.ask(r, step{name: "mirror", options: body, question: proxy.MirrorStep(*body.On), do: onVolume(e, func(ctx context.Context, v Volume) error { return v.SetMirror(ctx, *body.On) })}, e)
}

// Rollback has the source take the writes again; what is to be copied back is so in the
// background.
func (c *Client) Rollback(ctx context.Context, volume string, o proxy.RollbackOptions) (proxy.Status, error) {
	return c.volume(ctx, http.MethodPost, volume, "/rollback"+c.alone(), o)
}

// Mirror switches the mirror of a volume.
func (c *Client) Mirror(ctx context.Context, volume string, on bool) (proxy.Status, error) {
	return c.volume(ctx, http.MethodPost, volume, "/mirror", mirrorRequest{&on})
}

// idle tells whether nothing of a volume is on the destination alone, nor was moved for good:
// a start is what follows.
func idle(p proxy.Phase) bool { return p == proxy.Ready || p == proxy.RolledBack }

// copies tells whether the copier has something to do in this phase.
func copies(p proxy.Phase) bool { return p == proxy.Migrating || p == proxy.RollingBack }

// reached is how a wait for a phase stands of a volume in phase at: over, or without an end.
func reached(volume string, at, p proxy.Phase) (bool, error) {
	over, possible := proxy.Reached(at, p)
	if !possible {
		return false, &proxy.PhaseError{Volume: volume, Step: fmt.Sprintf("to wait for phase %s", p), Phase: at, Hint: "it does not come there any more by itself"}
	}
	return over, nil
}

// RollbackAndWait is Rollback, and returns when the source has everything, or fails after
// timeout where that is not 0.
func (c *Client) RollbackAndWait(ctx context.Context, volume string, timeout time.Duration, o proxy.RollbackOptions) (proxy.Status, error) {
	if status, err := c.Rollback(ctx, volume, o); err != nil || status.Phase == proxy.RolledBack {
		return status, err
	}
	return c.Wait(ctx, volume, proxy.RolledBack, timeout)
}
