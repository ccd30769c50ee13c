package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) waitCommand() *cobra.Command {
	var text string
	var timeout time.Duration
	var phase proxy.Phase
	check := func() (err error) {
		switch {
		case text == "":
			return control.Usagef("wait needs --for, a phase: ready, migrating, synced, cutover, rolling-back or rolled-back")
		case timeout < 0:
			return control.Usagef("--timeout: %s is no time to wait", timeout)
		}
		phase, err = control.ParsePhase(text)
		return err
	}
	command := a.both(a.step("wait", "Wait until a volume is in a phase",
		`Wait until a volume is in a phase or past it: ready, migrating, synced, cutover,
rolling-back or rolled-back. The exit code is 1 when the time is over first, and 3 where the
volume does not come there any more by itself.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			a.tellStuck(ctx, c, volume, phase)
			return c.Wait(ctx, volume, phase, timeout)
		}), check, func(ctx context.Context, c *control.Client, group string) (control.GroupStatus, error) {
		a.tellStuckGroup(ctx, c, group, phase)
		return c.WaitGroup(ctx, group, phase, timeout, false)
	})
	command.Flags().StringVar(&text, "for", "", "`PHASE` to wait for")
	command.Flags().DurationVar(&timeout, "timeout", 0, "how long at most, such as 1h; 0 is without end")
	return command
}

// tellStuck says why a wait that begins now does not end by itself, if so.
func (a *app) tellStuck(ctx context.Context, c *control.Client, volume string, phase proxy.Phase) {
	if status, err := c.Status(ctx, volume); err == nil { // else the wait says it
		a.sayStuck(phase, status)
	}
}

// tellStuckGroup is tellStuck for each volume of a group.
func (a *app) tellStuckGroup(ctx context.Context, c *control.Client, group string, phase proxy.Phase) {
	if g, err := c.Group(ctx, group); err == nil {
		a.sayStuck(phase, g.Volumes...)
	}
}

func (a *app) sayStuck(phase proxy.Phase, volumes ...proxy.Status) {
	for _, status := range volumes {
		if text := control.Stuck(status, phase); text != "" {
			fmt.Fprintf(a.stderr, "lunshift: %s\n", text)
		}
	}
}
