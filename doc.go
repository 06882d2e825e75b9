// Package overlay is the TUN layer of a VPN daemon or mesh agent on Linux. It gives an overlay host one device that opens
// (or adopts) a TUN device, gives it the host's overlay addresses and routes, moves packets between kernel and program, and
// answers per packet, without a lock, which overlay host the packet goes to. It holds no crypto, no peer protocol, no DNS
// and no firewall: those are the program's that embeds it.
//
//	dev, err := overlay.New(overlay.Config{
//		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24")},
//		Routes: []overlay.Route{{
//			Prefix: netip.MustParsePrefix("192.168.7.0/24"),
//			Via:    []overlay.Gateway{{Addr: netip.MustParseAddr("10.42.0.2")}},
//		}},
//	})
//	if err != nil { … }
//	defer dev.Close()
//	if err := dev.Activate(); err != nil { … }
//	queue := dev.Queues()[0]
//	for {
//		packets, err := queue.ReadBatch()
//		if err != nil { … }
//		for _, p := range packets {
//			host, ok := dev.NextHop(p.Data, nil)
//			… for each i below p.Segments(): seal p.AppendSegment(nil, i) and send it to host …
//		}
//	}
//
// # Life
//
// New opens the device, down. Activate sets it up, Reload changes it, Close ends it. While the link is down reads wait and
// go on when it is up again, and writes fail with ErrDown. When the device is deleted both fail with ErrGone; after one's
// own Close, always with os.ErrClosed. Close undoes nothing: what outlives it (Config.Persist, a File that somebody kept)
// stays configured. One forgotten File keeps the device alive.
//
// A device can outlive its program: a Queue.File of each queue, kept by systemd or handed to the successor, who calls Adopt with the same
// Config. Addresses, routes and connections stay, packets wait in the queues (Config.TxQueueLen), and nothing is written that
// holds already: the Examples TakeOver and HandOver. A persistent device that is attached to again keeps the same, but without a
// descriptor it has no queue, and packets that come meanwhile are lost.
//
// A device that was moved to another network namespace is gone for Activate and Reload, which never reach for a device by
// its name; its queues go on.
//
// # Packets
//
// What ReadBatch returned is the caller's until the next read of that queue. WriteBatch neither changes nor keeps what it
// is given. Plain packets pass as they are, wrong checksums too; those of a superpacket are unfinished, so split it with
// AppendSegment or hand it to WriteBatch, which finishes them. 65,535 bytes are always enough for Read; the MTU is not.
// The kernel hands over superpackets where it grants the offloads (State.Offload; Config.NoOffload declines them), and WriteBatch makes
// superpackets of what may be merged: never what splitting would not give back, never out of the order of its flow. A packet without
// company goes by itself, at once. Where the kernel takes superpackets no more, as some releases did not, packets go one by one: that
// is EventDegraded, and after a minute it is tried again. A queue keeps 260 KiB for ReadBatch, 64 KiB for Read and up to 400 KiB for
// WriteBatch, each from its first use on. On a Queue.File each packet has a virtio header before it, of 10 bytes unless whoever
// prepared the device wanted more; TUNGETIFF and TUNGETVNETHDRSZ tell.
//
// Write a flow to the queue that shall receive its replies. A method value passed as alive, or a slice literal passed to
// WriteBatch, costs one allocation a call: hoist it.
//
// Source addresses are not checked: whether a peer may use the one it sends with is the program's to know.
//
// # Config
//
// A Config is the complete state: on Reload a field that is left out returns to its default. Host bits are kept in Networks
// and refused in Routes. A Route for the very prefix of a network sets the MTU of that network, and with NoInstall takes the
// network's connected route out of the kernel: RoutesFor answers still, but the host has no route there. One prefix and metric
// in two tables must agree on Via, and a network is on-link in every table: a Route for it in another one has no Via, unless
// in IPv6 its metric is below 256. Owner 0 is the effective uid.
//
// # What it does to the host
//
// To its device: MTU, queue length, link up; addresses without a prefix route of the kernel's and without duplicate address
// detection; one route for each network and Route, with MTU and advertised MSS. All carry Config.Protocol, and what does
// not is left alone; two exceptions: the kernel's own prefix route for one of Networks gives way where its MTU would be
// wrong, and the kernel's fe80:: address goes unless Config.LinkLocal.
//
// Redirects, source routes and router advertisements are switched off on the device. Where the host overrides that (IPv4
// redirects are OR-ed with conf/all) Write and WriteBatch drop them. What could not be switched off, as in a container with
// a read-only /proc/sys, is an EventDegraded. The device of more than one queue is only kept if no other process got hold of
// a queue before it had an owner. Nothing host-wide is written, but for the node /dev/net/tun where it is missing.
//
// # Healing
//
// Addresses, routes and hardening that others remove are put back: at once when the link comes up, else within a second where
// the table is not huge; with a tenth of the processor's time at most, or half of it while the link goes up and down, and an
// EventRestored each time, in a fight summed up. The link's MTU, its queue length, and whether it is up are left to the
// administrator until the next Reload; what does not fit them waits. Another's route in the place of ours is EventShadowed and
// no fight. Config.NoHeal switches all of it off; what State notes of others' routes is then as of the last Reload.
//
// # The kernel's routes
//
// With Config.SystemRoutes the kernel's routes through the device steer too: of one prefix the lower metric wins. Of TOS 0, no
// mark and an unspecified source, in the tables that Config names, RoutesFor gives the kernel's own answer: some milliseconds after
// a change; where the kernel did not tell of it, within a second, or ten times as long as it takes to read all routes if that is
// more. Gateways must lie in Networks; a route by none that does leads nowhere. One without a gateway is on-link for any prefix,
// outside Networks too. EventResynced says that all was read anew, the first time without a cause; State.Learned counts.
// In examples/bgpmesh BIRD and FRR steer an overlay so.
//
// The tables count in the order in which the rules look at them; one that only rules for other packets name (of a mark, a source,
// an interface) comes after those. What is not followed: suppress_ifgroup; goto, or not, with a destination; where a route of an
// earlier table throws, the Routes of Config that are shorter than it; and, where there are nexthop objects, an IPv6 route that throws
// between the legs of a multipath, of which the kernel tells nothing. Of more kernel routes than SystemRoutes.Max the first are
// followed, the others as there is room; that is an EventDegraded.
//
// # Privileges
//
// New, Activate and Reload need CAP_NET_ADMIN in the namespace, entering another namespace CAP_SYS_ADMIN, making a missing
// node CAP_MKNOD. Attach needs none for the device's owner, and Activate needs none where all holds already. After dropping
// CAP_NET_ADMIN netlink writes fail with EPERM, also on sockets opened before; reads, writes, routes that are followed, State, Events
// and closing a queue go on, and an equal Reload still succeeds, because it writes nothing. So does the Activate of a successor
// that adopts the device. What others remove is put back no more, which EventDegraded tells.
//
// # The house
//
//	your daemon:  Config ──► New ──► Activate ──► ReadBatch / NextHop / WriteBatch ──► Reload ──► Close
//
//	tun.go, errors.go        the contract. Portable. One short read.
//	─────────────────────────────────────────────────────────────────────────────────────────────
//	pure rooms               config.go      what is refused, and what may change at run time
//	(no descriptor, clock,   configmap.go   nebula's tun section, decoded by anybody
//	netlink or logger)       routes.go      Route, and what a Config asks of the kernel
//	                         plan.go        plan(have, want): ordered steps, each with its way back
//	                         changes.go     what a Reload changes of the routes, and the steps for that alone
//	                         harden.go      the settings that make a device deaf to its peers
//	                         restore.go     what the way back must put in order beside the steps
//	                         shadow.go      where to ask who answers for our prefixes
//	                         doubt.go       which announcements leave us in doubt
//	                         learned.go     the kernel's routes as the tree's second layer
//	                         pace.go        how often what others remove is put back
//	                         mtu.go         device MTU, route MTU, MSS
//	                         routetree.go   immutable bart snapshot behind an atomic pointer
//	                         gateways.go    Gateways and their selection; flowhash.go, by flow
//	                         packet.go      superpackets; filter.go, what the overlay may not say
//	                         state.go       names and the dump
//	                         pipe.go        the device in memory; idle.go, and the one that is none
//	                         internal/kernel, internal/virtio, internal/fib (what the kernel's route table answers)
//	─────────────────────────────────────────────────────────────────────────────────────────────
//	every device             device.go      tree, events and counters that all kinds share
//	─────────────────────────────────────────────────────────────────────────────────────────────
//	acting rooms             tun_linux.go       lifecycle; the only owner of descriptors and goroutines
//	(thin: decide nothing    open_linux.go      the node
//	that a pure room could)  create_linux.go    a new device; attach_linux.go, a prepared one; adopt_linux.go, an open one
//	                         activate_linux.go  looks, carries a plan out, or takes it back
//	                         reload_linux.go    from one Config to the next
//	                         heal_linux.go      puts back what others remove
//	                         apply_linux.go     a step as a message; shadow_linux.go, who answers for us
//	                         queue_linux.go     one kernel queue; read_linux.go, write_linux.go, its packets
//	                         offload_linux.go   which superpackets the kernel grants; vector_linux.go, many pieces in one system call
//	                         ioctl_linux.go     every ioctl, typed, through unix.Ifreq
//	                         netlink_watch.go   what the kernel announces of the device
//	                         follow_linux.go    its route table, followed; resync_linux.go, and read anew
//	                         internal/rtnl      one rtnetlink connection; internal/netns, other namespaces
//
//	examples/  internal/nstest (namespaces for tests)  internal/bench (beside its peers)  internal/tools (what holds the house)
//
// Imports point down or sideways into pure rooms, never up; `make check` holds that. Ids in comments such as "kernel.md V7"
// name rows of the project's list of kernel facts.
package overlay
