package main

import (
	"fmt"
	"go/ast"
	"go/token"
	"os/exec"
	"strings"
	"sync"

	"github.com/OpenPeeDeeP/depguard/v2"
	"github.com/gobwas/glob"
	"golang.org/x/tools/go/analysis"
)

const (
	module  = "example.com/overlay"
	bart    = "github.com/gaissmai/bart"
	logrus  = "github.com/sirupsen/logrus"
	netlink = "github.com/vishvananda/netlink"
	netns   = "github.com/vishvananda/netns"
	unix    = "golang.org/x/sys/unix"
	cpu     = "golang.org/x/sys/cpu" // what the processor can do
)

// The rooms, as globs below the root of the module. A file that is named nowhere is in a pure room.
var (
	free         = []string{"examples/**", "internal/nstest/**", "**_linux_test.go", "internal/rtnl/**_test.go", "internal/netns/**_test.go"}
	acting       = []string{"*_linux.go", "netlink_watch.go", "internal/rtnl/**", "internal/netns/**"}
	actingLogger = []string{"tun_linux.go", "open_linux.go", "activate_linux.go", "netlink_watch.go"} // lifecycle and watch
	pureLogger   = []string{"tun.go", "device.go"}                                                    // the Config field, the lifecycle
	tests        = []string{"**_test.go"}
)

// forbidden says why and where to go instead. Strict lists refuse more than this: whatever they do not allow.
var forbidden = map[string]string{
	unix:                        "system calls belong to *_linux.go, internal/rtnl or internal/netns",
	netlink:                     "netlink belongs to *_linux.go, netlink_watch.go, internal/rtnl or internal/netns",
	logrus:                      "only the lifecycle and the watch log; return an error or an event",
	"net$":                      "pure rooms use net/netip",
	"os/exec$":                  "pure rooms start no process",
	"syscall$":                  "pure rooms make no system call",
	"log$":                      "pure rooms do not log",
	"log/slog$":                 "pure rooms do not log",
	module + "/internal/nstest": "for tests and examples",
	module + "/internal/rtnl":   "arrows point down or sideways into pure rooms",
	module + "/internal/netns":  "arrows point down or sideways into pure rooms",
}

// lists returns one list for each kind of room: every file below root falls under exactly one, or is free.
func lists(root string, std []string) depguard.LinterSettings {
	below := glob.QuoteMeta(root) + "/"
	files := func(in []string, but ...[]string) []string {
		var globs []string
		for _, g := range in {
			globs = append(globs, below+g)
		}
		for _, some := range but {
			for _, g := range some {
				globs = append(globs, "!"+below+g)
			}
		}
		return globs
	}
	list := func(files, allow []string, more ...string) *depguard.List {
		deny := map[string]string{}
		for pkg, why := range forbidden {
			deny[pkg] = why
		}
		for _, pkg := range append(allow, more...) {
			delete(deny, pkg)
		}
		return &depguard.List{ListMode: "strict", Files: files, Allow: append(allow[:len(allow):len(allow)], more...), Deny: deny}
	}

	var pureAllow []string
	for _, pkg := range std {
		if isPure(pkg) {
			pureAllow = append(pureAllow, pkg+"$")
		}
	}
	pureAllow = append(pureAllow, bart, cpu, module+"/internal/")

	actingAllow := []string{bart, cpu, unix, netlink, netns, module + "/internal/", module + "/internal/rtnl", module + "/internal/netns"}
	for _, pkg := range std {
		actingAllow = append(actingAllow, pkg+"$")
	}

	// Everything else is pure, wherever it lies: if root were wrong, the check would be too strict, not blind.
	rest := append([]string{"**.go"}, files(nil, free, acting, pureLogger, tests)...)
	return depguard.LinterSettings{
		"pure room":                 list(rest, pureAllow),
		"pure room with a logger":   list(files(pureLogger), pureAllow, logrus),
		"tests of a pure room":      list(files(tests, free), pureAllow, logrus, module+"$"),
		"acting room":               list(files(acting, free, actingLogger), actingAllow),
		"acting room with a logger": list(files(actingLogger), actingAllow, logrus),
	}
}

// isPure tells whether a package of the standard library neither reaches the world nor logs.
func isPure(pkg string) bool {
	switch top, _, _ := strings.Cut(pkg, "/"); {
	case pkg == "net/netip":
		return true
	case top == "net", top == "log", top == "syscall", pkg == "os/exec", pkg == "plugin":
		return false
	}
	return true
}

// importRules returns depguard as a function of one parsed file. Depguard looks at nothing but names and imports,
// so no types are loaded, and files for other systems are checked too.
func importRules(root string, std []string) (func(*token.FileSet, *ast.File, func(token.Pos, string)) error, error) {
	settings := lists(root, std)
	analyzer, err := depguard.NewAnalyzer(&settings)
	if err != nil {
		return nil, err
	}
	return func(fset *token.FileSet, f *ast.File, report func(token.Pos, string)) error {
		_, err := analyzer.Run(&analysis.Pass{
			Analyzer: analyzer,
			Fset:     fset,
			Files:    []*ast.File{f},
			Report:   func(d analysis.Diagnostic) { report(d.Pos, d.Message) },
		})
		return err
	}, nil
}

// standardLibrary lists what may be imported of it.
var standardLibrary = sync.OnceValues(func() ([]string, error) {
	out, err := exec.Command("go", "list", "std").Output()
	if err != nil {
		return nil, fmt.Errorf("go list std: %w", err)
	}
	var std []string
	for pkg := range strings.FieldsSeq(string(out)) {
		if !strings.HasPrefix(pkg, "vendor/") && !strings.Contains("/"+pkg+"/", "/internal/") {
			std = append(std, pkg)
		}
	}
	return std, nil
})
