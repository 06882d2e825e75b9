package main

import (
	"fmt"
	"go/ast"
	"go/token"
	"path/filepath"
	"strings"
)

const (
	functionLines     = 70  // a screen
	testFunctionLines = 100 // the same and a table of cases
	fileLines         = 500
	contractLines     = 199 // tun.go: one short read
)

// checkLengths reports functions that do not fit a screen, and files that are more than one room.
func checkLengths(root string, fset *token.FileSet, f *ast.File, report func(token.Pos, string)) {
	file := fset.File(f.FileStart)
	most := fileLines
	if file.Name() == filepath.Join(root, "tun.go") {
		most = contractLines
	}
	if n := file.Line(f.FileEnd - 1); n > most {
		report(f.FileStart, fmt.Sprintf("the file has %d lines, at most %d are allowed", n, most))
	}
	most = functionLines
	if strings.HasSuffix(file.Name(), "_test.go") {
		most = testFunctionLines
	}
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		if n := file.Line(fn.End()) - file.Line(fn.Pos()) + 1; n > most {
			report(fn.Pos(), fmt.Sprintf("function %s has %d lines, at most %d are allowed", fn.Name.Name, n, most))
		}
	}
}
