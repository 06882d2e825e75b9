package main

import (
	"fmt"
	"runtime"
	"slices"
	"time"
)

// lapSample is what one of many short things takes.
type lapSample struct{ Nanoseconds, Allocations float64 }

// lap is how many things are timed at once.
const lap = 64

// timeLaps does each, for i from 0 to size and again, for a twentieth of a second and takes the median of its laps: the few that
// others interrupt do not move it. each returns whether it found what it must; before, if not nil, prepares the lap that begins at an
// i, and is not timed. size is a multiple of a lap.
func timeLaps(size int, before func(i int), each func(i int) bool) (s lapSample, err error) {
	laps := make([]float64, 0, 1<<16)
	misses := 0
	var was, is runtime.MemStats
	runtime.ReadMemStats(&was)
	for at, end := 0, time.Now().Add(50*time.Millisecond); time.Now().Before(end) && len(laps) < cap(laps); at = (at + lap) % size {
		if before != nil {
			before(at)
		}
		start := time.Now()
		for i := at; i < at+lap; i++ {
			if !each(i) {
				misses++
			}
		}
		laps = append(laps, float64(time.Since(start))/lap)
	}
	runtime.ReadMemStats(&is)
	if misses != 0 {
		return s, fmt.Errorf("%d lookups found nothing", misses)
	}
	slices.Sort(laps)
	s.Nanoseconds = laps[len(laps)/2]
	// The runtime allocates now and then, too: what is less than one in a hundred is not each's.
	s.Allocations = float64(int(float64(is.Mallocs-was.Mallocs)/float64(len(laps)*lap)*100)) / 100
	return s, nil
}
