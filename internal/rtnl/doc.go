// Package rtnl is one rtnetlink connection: many requests a send with their answers matched, dumps that are whole or say
// that they are not, and multicast. The codecs (message, link, addr, route) never see a socket.
package rtnl
