package main

import (
	"io"

	"github.com/spf13/cobra"

	"lunshift/conf"
	"lunshift/control"
	"lunshift/demo"
)

// demoUnit is what the demonstration makes its LUNs of, in bytes.
const demoUnit = 1 << 20

func (a *app) demoCommand() *cobra.Command {
	size := conf.Size(1 << 30)
	command := &cobra.Command{
		Use:   "demo",
		Short: "Show a whole migration on this machine, with every block checked",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			if size < demoUnit || size%demoUnit != 0 {
				return control.Usagef("--size: %s is no size of the LUNs; it is 1MiB or a multiple of that", size)
			}
			o := demo.Options{Size: uint64(size), Out: a.stdout, Progress: a.stderr}
			if a.json {
				o.Out, o.Progress = io.Discard, io.Discard
			}
			report, err := demo.Run(command.Context(), o)
			if err == nil && a.json {
				return a.print(report)
			}
			return err
		},
	}
	command.Flags().TextVar(&size, "size", size, "size of the old and the new LUN, a multiple of 1MiB")
	return command
}
