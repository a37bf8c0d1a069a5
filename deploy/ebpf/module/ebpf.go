// Package ebpf carries an object file that is compiled, not checked in.
package ebpf

import _ "embed"

//go:embed bpf.o
var Object []byte
