package lun

import (
	"fmt"
	"runtime"
	"unsafe"
)

// sgHeader is struct sg_io_hdr of the kernel's SCSI generic interface.
type sgHeader struct {
	interfaceID  int32
	direction    int32
	cdbLen       uint8
	senseMax     uint8
	iovecs       uint16
	dataLen      uint32
	data         unsafe.Pointer
	cdb          unsafe.Pointer
	sense        unsafe.Pointer
	timeout      uint32 // milliseconds
	flags        uint32
	packID       int32
	user         unsafe.Pointer
	status       uint8
	maskedStatus uint8
	msgStatus    uint8
	senseLen     uint8
	hostStatus   uint16
	driverStatus uint16
	residual     int32
	duration     uint32
	infoFlags    uint32
}

const (
	sgIO          = 0x2285
	sgFromDevice  = -3
	sgTimeoutMs   = 20000
	sgInterfaceID = 'S'
)

// sgRead sends a CDB that takes no data and fills answer; it gives the number of
// bytes that came.
func sgRead(fd int, cdb, answer []byte) (int, error) {
	// The kernel writes through these addresses, which the header alone holds, so
	// they must lie on the heap and be pinned while it does.
	sense := make([]byte, 64)
	h := &sgHeader{
		interfaceID: sgInterfaceID, direction: sgFromDevice, timeout: sgTimeoutMs,
		cdbLen: uint8(len(cdb)), cdb: unsafe.Pointer(&cdb[0]),
		dataLen: uint32(len(answer)), data: unsafe.Pointer(&answer[0]),
		senseMax: uint8(len(sense)), sense: unsafe.Pointer(&sense[0]),
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(h.cdb)
	pin.Pin(h.data)
	pin.Pin(h.sense)
	if err := retry(func() error { return ioctlPtr(fd, sgIO, unsafe.Pointer(h)) }); err != nil {
		return 0, err
	}
	if h.status == statusCheckCondition {
		return 0, parseSense(sense[:min(int(h.senseLen), len(sense))])
	}
	if h.status != statusGood || h.hostStatus != 0 {
		return 0, fmt.Errorf("command %02Xh: status %02Xh, host status %02Xh", cdb[0], h.status, h.hostStatus)
	}
	return max(len(answer)-max(int(h.residual), 0), 0), nil
}
