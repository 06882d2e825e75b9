package overlay_test

import (
	"fmt"
	"net/netip"
	"strings"

	"example.com/overlay"
)

// Debugging: a State prints as what the device believes, one object a line with a keyword first, in an order that stays. Serve it
// on a signal or a debug page, and grep.
func ExampleState() {
	dev, _, err := overlay.Pipe(overlay.Config{
		Name:     "overlay0",
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24"), netip.MustParsePrefix("fd42::1/64")},
		MTU:      1400,
		Routes: []overlay.Route{
			{Prefix: netip.MustParsePrefix("192.168.7.0/24"), Via: []overlay.Gateway{
				{Addr: netip.MustParseAddr("10.42.0.2"), Weight: 3}, {Addr: netip.MustParseAddr("10.42.0.3")},
			}},
			{Prefix: netip.MustParsePrefix("2001:db8::/32"), MTU: 1280, Metric: 5, NoInstall: true},
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil {
		fmt.Println(err)
		return
	}
	for line := range strings.Lines(dev.State().String()) {
		if !strings.HasPrefix(line, "config ") { // what of Config the other lines do not say, 200 characters of it
			fmt.Print(line)
		}
	}
	// Output:
	// device overlay0 index 1 link up mtu 1400 txqueuelen 500 queues 1 offload tcp+udp learned 0
	// network 10.42.0.1/24 mtu 1400 mss 1360
	// network fd42::1/64 mtu 1400 mss 1340
	// route 192.168.7.0/24 via 10.42.0.2*3 10.42.0.3*1 layer static metric 0 table 254 mtu 1400 mss 1360
	// route 2001:db8::/32 on-link layer static metric 5 table 254 mtu 1280 mss 1220 steer-only
	// count read packets 0 bytes 0 super 0 invalid 0 dropped 0
	// count write packets 0 bytes 0 super 0 refused 0 filtered 0 down 0
	// count control overruns 0 resyncs 0 restores 0 restore-fails 0 offload-fails 0 events-missed 0
}
