#!/bin/busybox sh
# First process of the guest. The harness puts the list of modules in /modules/order.
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /var/lib /run/lock/iscsi /var/lock /mnt
/bin/busybox --install -s /bin
mkdir -p /usr && ln -s /sbin /usr/bin # rules of udev's name programs there
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
export PATH=/sbin:/bin:/usr/sbin:/usr/bin
echo 2 >/proc/sys/kernel/printk # the console is slow; dmesg has all of it
while read -r module; do insmod "/modules/$module" || echo "init: $module"; done </modules/order
ln -s udevadm /sbin/systemd-udevd
hostname app1
ip link set lo up
ip link set eth0 up
ip addr add 10.0.0.30/24 dev eth0
iscsid >/run/iscsid.log 2>&1
/sbin/agent &
while :; do wait; sleep 60; done
