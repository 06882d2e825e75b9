// Package stage is what the examples share that build overlay hosts on one machine: network namespaces, an underlay between
// them, a program that runs itself anew in namespaces, and words about all that. None of it is needed to use an overlay.Device.
package stage
