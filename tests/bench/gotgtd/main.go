// Command gotgtd serves one file with gotgt's stock iSCSI port, for make bench to
// compare with. It listens on all addresses, as that port does.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/gostor/gotgt/pkg/config"
	_ "github.com/gostor/gotgt/pkg/port/iscsit"
	"github.com/gostor/gotgt/pkg/scsi"
	_ "github.com/gostor/gotgt/pkg/scsi/backingstore"
	"github.com/sirupsen/logrus"
)

func main() {
	file := flag.String("file", "", "backing file")
	iqn := flag.String("iqn", "", "target name")
	port := flag.Int("port", 0, "TCP port")
	flag.Parse()
	if err := serve(*file, *iqn, *port); err != nil {
		fmt.Fprintln(os.Stderr, "gotgtd:", err)
		os.Exit(1)
	}
}

// serve ends only with an error.
func serve(file, iqn string, port int) error {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.PanicLevel)
	const device = 1000
	cfg := &config.Config{
		Storages:     []config.BackendStorage{{DeviceID: device, Path: "file:" + file, Online: true, BlockShift: 9}},
		ISCSIPortals: []config.ISCSIPortalInfo{{ID: 0, Portal: fmt.Sprintf("127.0.0.1:%d", port)}},
		ISCSITargets: map[string]config.ISCSITarget{
			iqn: {TPGTs: map[string][]uint64{"1": {0}}, LUNs: map[string]uint64{"1": device}},
		},
	}
	if err := scsi.InitSCSILUMap(cfg); err != nil {
		return err
	}
	driver, err := scsi.NewTargetDriver("iscsi", scsi.NewSCSITargetService())
	if err != nil {
		return err
	}
	if err := driver.NewTarget(iqn, cfg); err != nil {
		return err
	}
	return driver.Run(port)
}
