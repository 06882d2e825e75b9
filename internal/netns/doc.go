// Package netns runs a function in another network namespace without moving the caller's thread there.
//
// A network namespace belongs to a thread, a goroutine does not: what fn opens (sockets, devices) belongs to the namespace
// for good and can be used anywhere afterwards, but a goroutine started inside fn runs on any thread, in any namespace.
// Open handles inside, use them outside.
package netns
