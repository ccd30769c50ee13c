package main

import (
	"github.com/spf13/cobra"

	"lunshift/conf"
	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) verifyCommand() *cobra.Command {
	var sample, rate string
	command := &cobra.Command{
		Use:   "verify VOLUME",
		Short: "Compare source and destination of a synced volume",
		Long: `Compare source and destination block by block while initiators go on, leaving out what
they wrote since the start. It changes nothing. What differs was copied wrongly, or
was changed behind lunshift's back: the extents are listed, and the exit code is 5,
which no other outcome has. Interrupted, it ends.`,
		Args: oneVolume,
		RunE: func(c *cobra.Command, args []string) error {
			var o proxy.VerifyOptions
			for _, flag := range []struct {
				name, text string
				to         *uint64
			}{{"sample", sample, &o.Sample}, {"rate", rate, &o.Rate}} {
				size, err := conf.ParseSize(flag.text)
				if err != nil {
					return control.Usagef("--%s: %v", flag.name, err)
				}
				*flag.to = uint64(size)
			}
			client, err := a.client()
			if err != nil {
				return err
			}
			report, err := client.Verify(c.Context(), args[0], o)
			if err != nil {
				return err
			}
			if a.json {
				err, a.reported = a.print(report), true
			} else {
				err = control.WriteVerify(a.stdout, args[0], report)
			}
			if err == nil && report.Different > 0 {
				err = &control.Error{Kind: control.Differs, Message: "volume " + args[0] + ": source and destination differ"}
			}
			return err
		},
	}
	command.Flags().StringVar(&sample, "sample", "0", "compare so much, at places chosen at random, such as 10GiB; 0 is all")
	command.Flags().StringVar(&rate, "rate", "0", "bytes per second read of each side at most, such as 200MiB; 0 is no limit")
	return command
}
