// Package nstest gives tests of this library, and of its nested modules, real kernels to break: throw-away network
// namespaces, other programs and other users in them, abilities that skip by name, and leak checks.
//
//	func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }
//
//	func TestRoute(t *testing.T) {
//		nstest.Require(t, nstest.TUN, nstest.Program("ip"))
//		nstest.Leaks(t)
//		ns := nstest.New(t)
//		dev, err := overlay.New(overlay.Config{NetNS: ns.Path()})
//		...
//		ns.Run(t, "ip route add 192.0.2.0/24 dev overlay0")
//	}
//
// Main takes the whole test process to a network namespace of its own first, so that nothing here can touch the host's.
package nstest
