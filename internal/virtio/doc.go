// Package virtio holds what a TUN device adds to plain IP packets: the virtio_net_hdr that precedes each of them, one's
// complement checksums, the splitting of superpackets and the merging of packets into them. It is pure: byte slices in, byte slices out, no descriptors.
package virtio
