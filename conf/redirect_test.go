package conf

import (
	"strings"
	"testing"
	"time"
)

func TestRedirectionLeadsToTheDestination(t *testing.T) {
	const to = "iqn.2026-11.net.example:db01"
	same := strings.Replace(minimal, `"/dev/sdx"`, `"iscsi://10.0.0.9/`+to+`/3"`, 1) + "lun = 3\n"
	for text, want := range map[string]Portal{
		"10.0.0.9:3260": {"10.0.0.9:3260", 1}, "[2001:db8::9]:3260,7": {"[2001:db8::9]:3260", 7}, "array.example:860,65535": {"array.example:860", 65535},
	} {
		if got := load(t, same+"redirect = '"+text+"'\n").Volumes[0].Redirect; got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
	for host, want := range map[string]string{"10.0.0.9": "10.0.0.9:3260", "10.0.0.9:3261": "10.0.0.9:3261", "[2001:db8::9]": "[2001:db8::9]:3260", "array:860": "array:860"} {
		at := strings.Replace(same, "10.0.0.9", host, 1)
		if got := load(t, at+"redirect = true\n").Volumes[0].Redirect; got != (Portal{want, 1}) {
			t.Errorf("the destination's portal %s: %v, want %s", host, got, want)
		}
	}
	t.Run("a user", func(t *testing.T) {
		t.Setenv("LUNSHIFT_SECRET_DB01_DESTINATION", "opens the array's door")
		if got := load(t, strings.Replace(same, "10.0.0.9", "me@10.0.0.9", 1)+"redirect = true\n").Volumes[0].Redirect; got != (Portal{"10.0.0.9:3260", 1}) {
			t.Errorf("with a user: %v", got)
		}
	})
	v := load(t, same+"redirect = false\nredirect_for = '0s'\nlogout_timeout = '2m'\n").Volumes[0]
	if v.Redirect != (Portal{}) || v.RedirectFor != 0 || v.LogoutTimeout != 2*time.Minute {
		t.Errorf("%+v", v)
	}
	load(t, minimal+"redirect = '10.0.0.9:3260'\n") // a device may be served by anything
	second := "[[volume]]\nname='db02'\niqn='" + to + "'\nlun=4\nsource='/a'\ndestination='/b'\n"
	load(t, same+"redirect='10.0.0.9:3260'\n"+second+"redirect='10.0.0.9:3260'\n")
	for _, portal := range []string{"0.0.0.0:3261", "[::]:3260", "127.0.0.1:3260"} { // none of them takes it
		load(t, "[service]\nportals = ['"+portal+"']\n"+same+"redirect = '127.0.0.2:3260'\n")
	}
	for _, tc := range []struct{ name, text, want string }{
		{"no port", same + "redirect = '10.0.0.9'\n", `8: volume[db01].redirect: "10.0.0.9" is no address to log in to`},
		{"port 0", same + "redirect = '10.0.0.9:0'\n", `8: volume[db01].redirect: "10.0.0.9:0" is no address`},
		{"no host", same + "redirect = ':3260'\n", `8: volume[db01].redirect: ":3260" is no address`},
		{"group 0", same + "redirect = '10.0.0.9:3260,0'\n", `8: volume[db01].redirect: "10.0.0.9:3260,0" is no address`},
		{"empty", same + "redirect = ''\n", `8: volume[db01].redirect: "" is no address`},
		{"number", same + "redirect = 3260\n", `8: volume[db01].redirect: is the number 3260; it is a text`},
		{"host with a space", same + "redirect = 'a b:3260'\n", `8: volume[db01].redirect: "a b:3260" is no address`},
		{"itself", "[service]\nportals = ['10.0.0.9:3260']\n" + same + "redirect = '10.0.0.9:3260'\n", `10: volume[db01].redirect: 10.0.0.9:3260 is a portal of lunshift itself`},
		{"itself behind all addresses", "[service]\nportals = ['0.0.0.0:3260']\n" + same + "redirect = '127.0.0.2:3260'\n", `10: volume[db01].redirect: 127.0.0.2:3260 is a portal of lunshift itself`},
		{"itself behind all of IPv6", "[service]\nportals = ['[::]:3260']\n" + same + "redirect = '[::1]:3260'\n", `10: volume[db01].redirect: [::1]:3260 is a portal of lunshift itself`},
		{"itself in other words", "[service]\nportals = ['[2001:db8::1]:3260']\n" + same + "redirect = '[2001:db8:0::1]:3260'\n", `10: volume[db01].redirect: [2001:db8:0::1]:3260 is a portal of lunshift itself`},
		{"itself by name", "[service]\nportals = ['0.0.0.0:3260']\n" + same + "redirect = 'localhost:3260'\n", `10: volume[db01].redirect: localhost:3260 is a portal of lunshift itself`},
		{"all addresses", same + "redirect = '0.0.0.0:3260'\n", `8: volume[db01].redirect: "0.0.0.0:3260" is no address`},
		{"another lun", strings.Replace(same, "lun = 3", "lun = 2", 1) + "redirect = '10.0.0.9:3260'\n", `8: volume[db01].redirect: initiators ask for ` + to + ` LUN 2 there, but the destination is ` + to + ` LUN 3`},
		{"another iqn", strings.Replace(same, to+"/3", "iqn.2001-04.com.example:new/3", 1) + "redirect = '10.0.0.9:3260'\n", `8: volume[db01].redirect: initiators ask for ` + to + ` LUN 3 there, but the destination is iqn.2001-04.com.example:new LUN 3`},
		{"a device as destination", minimal + "redirect = true\n", `7: volume[db01].redirect: is true, but the destination is no iSCSI unit that initiators could be sent to; name host:port`},
		{"the destination is lunshift", "[service]\nportals = ['10.0.0.9:3260']\n" + same + "redirect = true\n", `10: volume[db01].redirect: 10.0.0.9:3260 is a portal of lunshift itself`},
		{"another iqn at the destination", strings.Replace(same, to+"/3", "iqn.2001-04.com.example:new/3", 1) + "redirect = true\n", `8: volume[db01].redirect: initiators ask for ` + to + ` LUN 3 there, but the destination is iqn.2001-04.com.example:new LUN 3`},
		{"another time for one of two", same + "redirect = true\n" + second + "redirect = '10.0.0.9:3260'\nredirect_for = '1h'\n", `16: volume[db02].redirect_for: is not that of volume db01 of the same iqn`},
		{"no time", same + "redirect_for = '-1s'\n", `8: volume[db01].redirect_for: is -1s; it is from 0s to 8784h0m0s`},
		{"no time to log out", same + "logout_timeout = '0s'\n", `8: volume[db01].logout_timeout: is 0s; it is from 1s to 10m0s`},
		{"one volume of two", same + "redirect = '10.0.0.9:3260'\n" + second, `9: volume[db02].redirect: is not that of volume db01 of the same iqn`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := faultsOf(t, tc.text)
			if len(got) != 1 || !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("got %q, want one fault %q", got, tc.want)
			}
		})
	}
}
