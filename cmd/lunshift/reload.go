package main

import (
	"errors"

	"github.com/spf13/cobra"

	"lunshift/conf"
	"lunshift/control"
)

func (a *app) reloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the service read its configuration again",
		Long: `Have the service read its configuration again, as SIGHUP does: new volumes are served,
changed settings count, and volumes that the file has no more are dropped where they are
ready or cut over. Volumes that did not change go on and notice nothing. With any fault in
the file nothing changes. What changed is listed. The exit code is 0 when all of the file
counts, 1 when something could not be taken up, 2 when the file has faults, 3 when a volume
is still served that the file has no more, 4 when settings count only after a restart.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := a.client()
			var faults conf.Faults
			if errors.As(err, &faults) {
				return &control.Error{Kind: control.Configuration, Message: err.Error()}
			}
			if err != nil {
				return err
			}
			report, err := client.Reload(c.Context())
			if err != nil {
				return err
			}
			if a.json {
				err, a.reported = a.print(report), true
			} else {
				err = control.WriteReload(a.stdout, report)
			}
			if err != nil {
				return err
			}
			return report.Err()
		},
	}
}
