package lun_test

import (
	"strings"
	"testing"

	"lunshift/lun"
)

func TestAddressesAreRead(t *testing.T) {
	const iqn = "iqn.2001-04.com.example:old"
	for in, want := range map[string]lun.Address{
		"iscsi://10.0.0.5:3261/" + iqn + "/1":          {Host: "10.0.0.5", Port: 3261, Target: iqn, LUN: 1},
		"iscsi://user@10.0.0.9/" + iqn + "/0":          {User: "user", Host: "10.0.0.9", Port: 3260, Target: iqn},
		"iscsi://[fd00::1]/" + iqn + "/16383":          {Host: "fd00::1", Port: 3260, Target: iqn, LUN: 16383},
		"iscsi://[fd00::1]:99/" + iqn + "/2":           {Host: "fd00::1", Port: 99, Target: iqn, LUN: 2},
		"ISCSI://array.example/eui.02004567A425678D/3": {Host: "array.example", Port: 3260, Target: "eui.02004567A425678D", LUN: 3},
		"/dev/sdb":     {Path: "/dev/sdb"},
		"./old//x.img": {Path: "old/x.img"},
	} {
		a, err := lun.ParseAddress(in)
		if err != nil || a != want {
			t.Errorf("%s: %+v, %v", in, a, err)
			continue
		}
		if again, err := lun.ParseAddress(a.String()); err != nil || again != a {
			t.Errorf("%s becomes %s: %+v, %v", in, a, again, err)
		}
	}
}

func TestBadAddressesAreRefusedWithoutTheirSecrets(t *testing.T) {
	const iqn = "iqn.2001-04.com.example:old"
	for in, says := range map[string]string{
		"":                                                    "empty",
		"iscsi://":                                            "lacks the host",
		"iscsi://host":                                        "target name",
		"iscsi://host/" + iqn:                                 "LUN",
		"iscsi://host/" + iqn + "/":                           "LUN",
		"iscsi://host/disk/1":                                 "not an iSCSI name",
		"iscsi://host/" + iqn + "/x":                          "not a number",
		"iscsi://host/" + iqn + "/-1":                         "not a number",
		"iscsi://host/" + iqn + "/16384":                      "not a number",
		"iscsi://host:0/" + iqn + "/1":                        "port",
		"iscsi://host:/" + iqn + "/1":                         "port",
		"iscsi://host:99999/" + iqn + "/1":                    "port",
		"iscsi://fd00::1/" + iqn + "/1":                       "brackets",
		"iscsi://[fd00::1/" + iqn + "/1":                      "bracket",
		"iscsi://@host/" + iqn + "/1":                         "empty user",
		"iscsi://user:s3cr3t@host/" + iqn + "/1":              "secret",
		"iscsi://user%s3cr3t@host/" + iqn + "/1":              "secret",
		"iscsi://user:s3cr3t/x@host/" + iqn + "/1":            "secret",
		"iscsi://user:s3cr3t@x@host/" + iqn + "/1":            "secret",
		"iscsi:host/" + iqn + "/1":                            "iscsi://",
		"nfs://host/x":                                        "scheme",
		"iscsi://host/" + iqn + "\n/1":                        "control character",
		"iscsi://host/iqn." + strings.Repeat("x", 220) + "/1": "223",
	} {
		_, err := lun.ParseAddress(in)
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: want one line with %q, got %v", in, says, err)
		} else if strings.Contains(err.Error(), "s3cr3t") {
			t.Errorf("%s: the error holds the secret: %v", in, err)
		}
	}
}

func FuzzParseAddress(f *testing.F) {
	f.Add("iscsi://user@[fd00::1]:3260/iqn.2001-04.com.example:old/1")
	f.Add("/dev/sdb")
	f.Add("iscsi:[/_ser@/fd00::1]:3260/iqn.2001-04.com.si://")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := lun.ParseAddress(s)
		if err != nil {
			return
		}
		if again, err := lun.ParseAddress(a.String()); err != nil || again != a {
			t.Fatalf("%q: %+v becomes %q: %+v, %v", s, a, a, again, err)
		}
	})
}
