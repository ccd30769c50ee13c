package lun_test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

func selfCPU() (time.Duration, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, err
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}

// ioCalls counts the read and write system calls of this process so far.
func ioCalls() (n int) {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		var calls int
		if _, err := fmt.Sscanf(line, "syscr: %d", &calls); err == nil {
			n += calls
		} else if _, err := fmt.Sscanf(line, "syscw: %d", &calls); err == nil {
			n += calls
		}
	}
	return n
}
