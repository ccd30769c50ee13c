package main

import (
	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) statusCommand() *cobra.Command {
	var watch bool
	command := &cobra.Command{
		Use:   "status [VOLUME|GROUP]",
		Short: "Show all volumes, those of a group, or one in detail",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			view := control.View{JSON: a.json, Redraw: control.IsTerminal(a.stdout)}
			if len(args) == 1 {
				view.Volume = args[0]
			}
			if watch {
				return control.Watch(c.Context(), client, a.stdout, view)
			}
			return control.ShowStatus(c.Context(), client, a.stdout, view)
		},
	}
	command.Flags().BoolVar(&watch, "watch", false, "show it every second until Ctrl-C, cutover or the end of a rollback")
	return command
}
