package conf

import (
	"strings"
	"testing"
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
