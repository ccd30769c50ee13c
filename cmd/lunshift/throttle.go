package main

import (
	"context"

	"github.com/spf13/cobra"

	"lunshift/conf"
	"lunshift/control"
)

func (a *app) throttleCommand() *cobra.Command {
	var text string
	command := a.step("throttle", "Limit the background copy of a volume",
		`Limit the background copy of a volume to so many bytes per second. The limit wins
over copy.rate of the configuration and outlives a restart of the service.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			if text == "" {
				return control.Status{}, control.Usagef("throttle needs --rate, in bytes per second, such as --rate 200MiB; 0 is no limit")
			}
			rate, err := conf.ParseSize(text)
			if err != nil {
				return control.Status{}, control.Usagef("--rate: %v", err)
			}
			return c.Throttle(ctx, volume, uint64(rate))
		})
	command.Flags().StringVar(&text, "rate", "", "bytes per second, such as 200MiB; 0 is no limit")
	return command
}
