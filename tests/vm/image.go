package vm

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

//go:embed init.sh
var initScript []byte

// packages are what the guest is made of, beside this machine's C library and ext4 tools.
var packages = []string{"open-iscsi", "libopeniscsiusr", "libisns0", "libkmod2", "busybox-static", "sg3-utils", "libsgutils2-1.46-2",
	"udev", "libudev1", "sg3-utils-udev", "dmsetup", "libdevmapper1.02.1", "multipath-tools", "libaio1", "liburcu8", "libgcc-s1"}

// modules of the guest's kernel; what they depend on comes with them.
var modules = []string{"virtio_pci", "virtio_net", "sd_mod", "sg", "iscsi_tcp", "crc32c-intel", "dm-multipath", "dm-service-time"}

// programs of the guest, from the packages or from this machine. A name that ends in "*"
// stands for all in the packages that begin like it. They come to /sbin; a path in the packages
// stays where it is.
var programs = []string{"iscsid", "iscsiadm", "iscsi-iname", "sg_*", "mkfs.ext4", "e2fsck", "blkdiscard", "fstrim",
	"mount", "umount", "blkid", "blockdev", "dmsetup", "multipath", "multipathd", "udevadm",
	"lib/multipath/*", "lib/x86_64-linux-gnu/libgcc_s.so.1", "lib/udev/rules.d/*", "lib/udev/scsi_id"}

// Image is a kernel and an initial RAM disk.
type Image struct {
	Kernel, Disk string
}

// MakeImage gets the packages that are not in cache yet through apt-get, and makes the image
// in dir. agent is the path of the static binary of ./agent, name the initiator's name.
func MakeImage(cache, dir, agent, name string) (Image, error) {
	kernel, err := kernelPackage()
	if err != nil {
		return Image{}, err
	}
	// Another list of packages is another directory.
	list := crc32.ChecksumIEEE([]byte(strings.Join(packages, " ")))
	root := filepath.Join(cache, fmt.Sprintf("%s-%08x", kernel, list))
	if err := unpack(root, append([]string{kernel}, packages...)); err != nil {
		return Image{}, err
	}
	image := Image{Disk: filepath.Join(dir, "initrd.gz")}
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return Image{}, fmt.Errorf("%s holds %d kernels: remove the directory", root, len(kernels))
	}
	image.Kernel = kernels[0]
	f, err := os.Create(image.Disk)
	if err != nil {
		return Image{}, err
	}
	defer f.Close()
	z, _ := gzip.NewWriterLevel(f, gzip.BestSpeed)
	a := &archive{w: z, made: map[string]bool{}}
	a.file("init", initScript, 0o755)
	a.file("etc/passwd", []byte("root:x:0:0:root:/:/bin/sh\n"), 0o644)
	a.file("etc/group", []byte("root:x:0:\n"), 0o644)
	a.file("etc/iscsi/initiatorname.iscsi", []byte("InitiatorName="+name+"\n"), 0o600)
	a.copy(filepath.Join(root, "etc/iscsi/iscsid.conf"), "etc/iscsi/iscsid.conf")
	a.copy(agent, "sbin/agent")
	a.copy(filepath.Join(root, "bin/busybox"), "bin/busybox")
	a.programs(root)
	a.modules(root)
	a.entry("TRAILER!!!", nil, 0)
	return image, errors.Join(a.err, z.Close())
}

var kernelName = regexp.MustCompile(`Depends: (linux-image-\S+)`)

// kernelPackage is the package that linux-image-cloud-amd64 stands for today.
func kernelPackage() (string, error) {
	out, err := exec.Command("apt-cache", "depends", "linux-image-cloud-amd64").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends linux-image-cloud-amd64: %w: %s", err, out)
	}
	m := kernelName.FindSubmatch(out)
	if m == nil {
		return "", errors.New("apt-cache knows no linux-image-cloud-amd64: run apt-get update")
	}
	return string(m[1]), nil
}

// unpack fills root with the packages' files, once.
func unpack(root string, names []string) error {
	if _, err := os.Stat(root); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(root), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(root), "unpack")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	get := exec.Command("apt-get", append([]string{"download", "-q"}, names...)...)
	get.Dir = tmp
	if out, err := get.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download: %w: %s", err, out)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	into := filepath.Join(tmp, "root")
	for _, deb := range debs {
		if out, err := exec.Command("dpkg-deb", "-x", deb, into).CombinedOutput(); err != nil {
			return fmt.Errorf("dpkg-deb -x %s: %w: %s", deb, err, out)
		}
	}
	return os.Rename(into, root)
}

// archive writes a cpio archive in the "newc" format. Its first error stays.
type archive struct {
	w    io.Writer
	ino  int
	made map[string]bool // directories and files that are in it
	err  error
}

func (a *archive) entry(name string, data []byte, mode uint32) {
	if a.err != nil {
		return
	}
	a.ino++
	var b bytes.Buffer
	fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	b.WriteString(name)
	b.Write(make([]byte, 1+(-(b.Len()+1)&3)))
	b.Write(data)
	b.Write(make([]byte, -b.Len()&3))
	_, a.err = a.w.Write(b.Bytes())
}

// file adds a regular file with the directories that it is in.
func (a *archive) file(name string, data []byte, perm uint32) {
	if a.made[name] {
		return
	}
	a.made[name] = true
	for i, c := range name {
		if dir := name[:i]; c == '/' && !a.made[dir] {
			a.made[dir] = true
			a.entry(dir, nil, 0o040755)
		}
	}
	a.entry(name, data, 0o100000|perm)
}

func (a *archive) copy(from, to string) {
	data, err := os.ReadFile(from)
	if err != nil && a.err == nil {
		a.err = err
	}
	a.file(to, data, 0o755)
}

var library = regexp.MustCompile(`(?m)(?:=> )?(/\S+) \(0x`)

// programs adds the programs and the shared libraries that they load.
func (a *archive) programs(root string) {
	var paths []string
	to := map[string]string{}
	for _, name := range programs {
		var found []string
		if strings.Contains(name, "/") {
			found, _ = filepath.Glob(filepath.Join(root, name))
		}
		for _, dir := range []string{"sbin", "bin", "usr/sbin", "usr/bin"} {
			for _, in := range []string{root, "/"} {
				if len(found) == 0 {
					found, _ = filepath.Glob(filepath.Join(in, dir, name))
				}
			}
		}
		if len(found) == 0 && a.err == nil {
			a.err = fmt.Errorf("%s is not installed", name)
		}
		for _, path := range found {
			to[path] = "sbin/" + filepath.Base(path)
			if strings.Contains(name, "/") {
				to[path], _ = filepath.Rel(root, path)
			}
		}
		paths = append(paths, found...)
	}
	lib := filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	for _, path := range paths {
		a.copy(path, to[path])
		cmd := exec.Command("ldd", path)
		cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+lib+":"+filepath.Join(root, "lib/x86_64-linux-gnu")+":"+filepath.Join(root, "lib"))
		out, err := cmd.CombinedOutput()
		if err != nil && !bytes.Contains(out, []byte("not a dynamic executable")) && a.err == nil {
			a.err = fmt.Errorf("ldd %s: %w: %s", path, err, out)
		}
		for _, m := range library.FindAllSubmatch(out, -1) {
			from := string(m[1])
			to := "lib/x86_64-linux-gnu/" + filepath.Base(from)
			if strings.HasPrefix(filepath.Base(from), "ld-linux") {
				to = "lib64/" + filepath.Base(from)
			}
			a.copy(from, to)
		}
	}
}

// modules adds the kernel modules with what they depend on, and the order to load them in.
func (a *archive) modules(root string) {
	at := map[string]string{}
	err := filepath.WalkDir(filepath.Join(root, "lib/modules"), func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			at[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil && a.err == nil {
		a.err = err
	}
	var order bytes.Buffer
	seen := map[string]bool{}
	var add func(name string)
	add = func(name string) {
		name = strings.ReplaceAll(name, "-", "_")
		path := at[name]
		if seen[name] || path == "" {
			return // built in where the kernel has no such module
		}
		seen[name] = true
		data, err := os.ReadFile(path)
		if err != nil && a.err == nil {
			a.err = err
		}
		_, depends, _ := bytes.Cut(data, []byte("\x00depends="))
		depends, _, _ = bytes.Cut(depends, []byte{0})
		for dep := range strings.SplitSeq(string(depends), ",") {
			add(dep)
		}
		a.file("modules/"+name+".ko", data, 0o644)
		order.WriteString(name + ".ko\n")
	}
	for _, name := range modules {
		add(name)
	}
	a.file("modules/order", order.Bytes(), 0o644)
}
