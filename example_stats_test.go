package overlay_test

import (
	"encoding/json"
	"expvar"
	"fmt"

	"example.com/overlay"
)

// Metrics: Stats is a struct of counters, so that expvar, or whatever reads fields, can publish it as it is.
func ExampleStats() {
	dev, host, err := overlay.Pipe(overlay.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer dev.Close()
	expvar.Publish("overlay", expvar.Func(func() any { return dev.Stats() })) // in /debug/vars of an HTTP server

	if err := dev.Activate(); err != nil {
		fmt.Println(err)
		return
	}
	packet := []byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 59, 0, 0, 10, 0, 0, 1, 192, 168, 5, 5}
	for range 3 {
		if _, err := host.Queues()[0].Write(packet); err != nil {
			fmt.Println(err)
			return
		}
	}
	if _, err := dev.Queues()[0].ReadBatch(); err != nil {
		fmt.Println(err)
		return
	}

	var scraped overlay.Stats
	if err := json.Unmarshal([]byte(expvar.Get("overlay").String()), &scraped); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(scraped.ReadPackets, "packets of", scraped.ReadBytes, "bytes")
	// Output: 3 packets of 60 bytes
}
