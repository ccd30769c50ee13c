package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"lunshift/conf"
	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) adoptCommand() *cobra.Command {
	var o proxy.AdoptOptions
	var rate, zeroes, different string
	command := &cobra.Command{
		Use:   "adopt VOLUME (--new | --rebuild | --accept-unreadable-writes)",
		Short: "Say what a volume is that the state does not know",
		Long: `Say what a volume is that is not served because the state knows nothing of it while its
destination holds data. Either no migration of it was ever begun, or the last one was rolled
back to its end (--new): the source is served. Or one was begun, and its state is lost: the source is stale, and --rebuild compares every
block of both LUNs to make the flags anew. Prefer to put the state directory back.

--rebuild takes equal blocks for copied. Blocks that differ and hold data on the
destination were written by initiators if it was blank when the migration began
(--different=destination); if it was not (overwrite, seeded, start --reuse), they may be
older than the migration, and only you can tell (--different=source takes the source).
Blocks that are zero on the destination alone were never copied, or initiators zeroed them:
nobody can tell, so --zeroes=source or --zeroes=destination must say. Without an answer that is needed the
places are listed, nothing changes, and the exit code is 1. Where the migration had been synced,
--was-synced takes everything from the destination without comparing. All of this is untrue
once a rollback was begun, as the source takes the writes from then on: after one that was
under way no answer is right for every block.

The volume is served once all is done; it is then migrating. Interrupted, the rebuild ends
and leaves nothing. It changes neither LUN.

--accept-unreadable-writes is for a volume that the state knows and that is not served because
the destination cannot read blocks which were being written when the service ended. These
writes are let go: the source's blocks are in their place, and what of them was acknowledged is
lost. Each is listed, and logged. Mend the destination instead where you can.`,
		Args: oneVolume,
		RunE: func(c *cobra.Command, args []string) error {
			size, err := conf.ParseSize(rate)
			if err != nil {
				return control.Usagef("--rate: %v", err)
			}
			o.Rate, o.Zeroes, o.Different = uint64(size), proxy.Side(zeroes), proxy.Side(different)
			if err := o.Check(); err != nil {
				return control.Usagef("%v", err)
			}
			client, err := a.client()
			if err != nil {
				return err
			}
			report, err := client.Adopt(c.Context(), args[0], o)
			if err != nil {
				return err
			}
			if a.json {
				err, a.reported = a.print(report), true
			} else {
				err = control.WriteAdopt(a.stdout, report)
			}
			if err == nil && report.Rebuild != nil && report.Rebuild.Undecided != "" {
				err = &control.Error{Kind: control.Failed, Message: fmt.Sprintf("volume %s is not served: %s", args[0], report.Rebuild.Undecided)}
			}
			return err
		},
	}
	flags := command.Flags()
	flags.BoolVar(&o.New, "new", false, "no migration of it was begun")
	flags.BoolVar(&o.Rebuild, "rebuild", false, "a migration was begun and its state is lost: make its flags anew by comparing both LUNs")
	flags.BoolVar(&o.AcceptUnreadableWrites, "accept-unreadable-writes", false, "let the writes go that were under way at the last end and that the destination cannot read for good; they may have been acknowledged")
	flags.BoolVar(&o.WasSynced, "was-synced", false, "with --rebuild: the migration was synced, so everything is on the destination")
	flags.StringVar(&zeroes, "zeroes", "", "with --rebuild: `SIDE`, source or destination, of blocks that are zero on the destination alone")
	flags.StringVar(&different, "different", "", "with --rebuild: `SIDE`, source or destination, of blocks that differ otherwise")
	flags.StringVar(&rate, "rate", "0", "with --rebuild: bytes per second read of each side at most, such as 200MiB; 0 is no limit")
	return command
}
