package main

import (
	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) breakFenceCommand() *cobra.Command {
	var yes bool
	command := &cobra.Command{
		Use:   "break-fence VOLUME --yes",
		Short: "Take the reservations of others away from a volume's LUNs",
		Long: `Take every persistent reservation and registration of others away from the source and
the destination of a volume, for emergencies: the host that held them, another lunshift
among them, can write there no more, or gets RESERVATION CONFLICT, and its commands under
way are aborted where the array can. Make sure first that it is gone for good. A volume
that is migrating or synced holds the reservations itself afterwards, served or not; else
they are free. Where one array cannot be reached the other's reservations are broken all the
same, both are reported, and the exit code is 1.

Where no lunshift runs, the same is done with sg_persist on a host that has the LUN:

  sg_persist --out --register-ignore --param-sark=0x1 /dev/sdX
  sg_persist --out --clear --param-rk=0x1 /dev/sdX`,
		Args: oneVolume,
		RunE: func(c *cobra.Command, args []string) error {
			if !yes {
				return control.Usagef("break-fence takes the LUNs of volume %s away from whoever holds them: say --yes if that host or service is gone for good", args[0])
			}
			client, err := a.client()
			if err != nil {
				return err
			}
			report, err := client.BreakFence(c.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				err, a.reported = a.print(report), true
			} else {
				err = control.WriteBreak(a.stdout, report)
			}
			if err != nil {
				return err
			}
			return report.Err()
		},
	}
	command.Flags().BoolVar(&yes, "yes", false, "the others are gone for good")
	return command
}
