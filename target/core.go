package target

import (
	"errors"
	"sync"

	"github.com/gostor/gotgt/pkg/api"
	"github.com/gostor/gotgt/pkg/config"
	"github.com/gostor/gotgt/pkg/scsi"

	"lunshift/iscsi"
)

// DriverName is the name under which the target is in gotgt's registry.
const DriverName = "lunshift"

// gotgt's registry is a plain map without a lock; registering happens once, before
// any Server lives.
var registerDriver = sync.OnceFunc(func() {
	scsi.RegisterTargetDriver(DriverName, func(*scsi.SCSITargetService) (scsi.SCSITargetDriver, error) {
		s, err := New(Config{})
		if err != nil {
			return nil, err
		}
		return &driver{s}, nil
	})
})

func init() { registerDriver() }

// driver is a Server as gotgt's registry sees target drivers.
type driver struct{ *Server }

var errOwnUnits = errors.New("target: logical units are added with AddUnit, not through gotgt's configuration")

// Run serves portals that were configured; gotgt's port number is not used.
func (d *driver) Run(int) error { return errOwnUnits }

// NewTarget refuses: gotgt's back ends are not served.
func (d *driver) NewTarget(string, *config.Config) error { return errOwnUnits }

// RereadTargetLUNMap has nothing to read again.
func (d *driver) RereadTargetLUNMap() {}

// Resize refuses: a unit's capacity is its device's.
func (d *driver) Resize(uint64) error { return errOwnUnits }

// Stats are those of no back end of gotgt's.
func (d *driver) Stats() scsi.Stats { return scsi.Stats{} }

// SetClusterIP has no meaning here.
func (d *driver) SetClusterIP(string) {}

// EnableBlockMultipleHostLogin has no meaning here: many hosts may log in.
func (d *driver) EnableBlockMultipleHostLogin() {}

// newLogicalUnit is the unit as gotgt's core sees it, for the ops that are gotgt's.
func newLogicalUnit(u *unit) *api.SCSILu {
	return &api.SCSILu{
		Address: u.LUN, Size: u.info.Size(), UUID: u.NAA, BlockShift: u.shift,
		DeviceProtocol: scsi.NewSBCDevice(api.TYPE_DISK),
		Attrs: api.SCSILuPhyAttribute{
			DeviceType: api.TYPE_DISK, Online: true,
			VendorID: u.Vendor, ProductID: u.Product, ProductRev: u.Revision,
			SCSISN: u.Serial, ThinProvisioning: u.info.Thin, Lbppbe: int(u.info.PhysicalExponent),
		},
	}
}

// core performs a command with gotgt's own op, found in the op table of the logical
// unit's device protocol.
func core(t *task) error {
	op, ok := t.u.lu.DeviceProtocol.PerformCommand(int(t.cdb[0])).(scsi.SCSIDeviceOperation)
	if !ok || op.CommandPerformFunc == nil {
		return senseInvalidOpcode
	}
	in := make([]byte, t.alloc)
	cmd := &api.SCSICommand{
		OpCode: t.cdb[0], Device: t.u.lu, Direction: api.SCSIDataRead,
		SCB: t.cdb[:], SCBLength: len(t.op.usage), Tag: uint64(t.itt),
		InSDBBuffer:  &api.SCSIDataBuffer{Buffer: in, Length: uint32(len(in)), TransferLength: t.expected},
		OutSDBBuffer: &api.SCSIDataBuffer{},
	}
	stat := op.CommandPerformFunc(0, cmd)
	if stat.Stat == iscsi.StatusGood {
		return t.reply(in, len(in))
	}
	if s := cmd.SenseBuffer; stat.Stat == iscsi.StatusCheckCondition && s != nil && len(s.Buffer) >= 14 && s.Buffer[2]&0xf != keyNoSense {
		return sense{s.Buffer[2] & 0xf, s.Buffer[12], s.Buffer[13]}
	}
	return senseInternal
}
