//go:build race

package iscsi

import "syscall"

// What a write passes to whoever reads it through the kernel comes after the write.
// Package syscall tells the race detector so; with the race detector direct goes by it.

func rawRead(fd uintptr, p []byte) (int, syscall.Errno) {
	n, err := syscall.Read(int(fd), p)
	e, _ := err.(syscall.Errno)
	return n, e
}

// beforeWrite is a write to no descriptor: its failure changes nothing.
func beforeWrite() { syscall.Write(-1, nil) }
