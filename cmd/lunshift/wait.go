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
	command := a.step("wait", "Wait until a volume is in a phase",
		`Wait until a volume is in a phase or past it: ready, migrating, synced, cutover,
rolling-back or rolled-back. The exit code is 1 when the time is over first, and 3 where the
volume does not come there any more by itself.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			if text == "" {
				return control.Status{}, control.Usagef("wait needs --for, a phase: ready, migrating, synced, cutover, rolling-back or rolled-back")
			}
			phase, err := control.ParsePhase(text)
			if err != nil {
				return control.Status{}, err
			}
			if timeout < 0 {
				return control.Status{}, control.Usagef("--timeout: %s is no time to wait", timeout)
			}
			a.tellStuck(ctx, c, volume, phase)
			return c.Wait(ctx, volume, phase, timeout)
		})
	command.Flags().StringVar(&text, "for", "", "`PHASE` to wait for")
	command.Flags().DurationVar(&timeout, "timeout", 0, "how long at most, such as 1h; 0 is without end")
	return command
}

// tellStuck says why a wait that begins now does not end by itself, if so.
func (a *app) tellStuck(ctx context.Context, c *control.Client, volume string, phase proxy.Phase) {
	if text := c.Stuck(ctx, volume, phase); text != "" {
		fmt.Fprintf(a.stderr, "lunshift: %s\n", text)
	}
}
