// Package vm boots a Linux in a virtual machine and lets its own iSCSI initiator
// (iscsi_tcp, open-iscsi) use a lunshift that runs beside it: what an application host
// sees, with its kernel, its /dev and its logs. udev and multipathd run where a test starts them.
//
// Everything runs in a user and network namespace of the test's own, so that no root is
// needed and the addresses are those of README.md: arrays at 10.0.0.5 and 10.0.0.9,
// lunshift at 10.0.0.20, the host app1 at 10.0.0.30, all of them on port 3260. It needs
// qemu-system-x86_64 and Debian's packages, which it gets through apt-get download and
// keeps in the user's cache directory; LUNSHIFT_VM_KVM=1 lets it use /dev/kvm.
//
// The tests run where LUNSHIFT_VM is set: `make vm`.
package vm
