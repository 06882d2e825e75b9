package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

// permutations yields every order of mtus.
func permutations(mtus []int, yield func([]int)) {
	var place func(done, rest []int)
	place = func(done, rest []int) {
		if len(rest) == 0 {
			yield(done)
			return
		}
		for i := range rest {
			place(append(slices.Clone(done), rest[i]), slices.Delete(slices.Clone(rest), i, i+1))
		}
	}
	place(nil, mtus)
}

// The device's MTU is the largest of all, whatever the order of the routes (kernel.md B8, U13).
func TestDeviceMTUIsTheLargest(t *testing.T) {
	for _, test := range []struct {
		config int
		routes []int
		want   int
	}{
		{0, nil, 1300},
		{1400, nil, 1400},
		{0, []int{0, 0, 0}, 1300},
		{0, []int{1200, 500, 0}, 1300},
		{0, []int{1301, 9000, 1500, 0}, 9000},
		{1500, []int{1499, 1500, 1501}, 1501},
	} {
		permutations(test.routes, func(mtus []int) {
			c := Config{MTU: test.config}
			for i, mtu := range mtus {
				c.Routes = append(c.Routes, Route{Prefix: netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/16", i)), MTU: mtu})
			}
			if got := c.deviceMTU(); got != test.want {
				t.Errorf("MTU %d, routes %v: device MTU %d, want %d", test.config, mtus, got, test.want)
			}
			for i := range c.Routes {
				want := mtus[i]
				if want == 0 {
					want = c.mtuOf()
				}
				if got := c.routeMTU(&c.Routes[i]); got != want {
					t.Errorf("MTU %d, routes %v: route %d has MTU %d, want %d", test.config, mtus, i, got, want)
				}
			}
		})
	}
}

// An advertised MSS leaves room for the headers of its family (kernel.md U61).
func TestSegmentSize(t *testing.T) {
	for prefix, want := range map[string]int{"10.0.0.0/8": 1260, "fd00::/64": 1240} {
		if got := segmentSize(netip.MustParsePrefix(prefix), 1300); got != want {
			t.Errorf("MSS to %s is %d, want %d", prefix, got, want)
		}
	}
}
