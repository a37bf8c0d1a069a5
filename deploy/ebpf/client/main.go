package main

import (
	"fmt"

	"github.com/google/uuid"
	"go.test/ebpf"
)

func main() { fmt.Println(len(ebpf.Object), "bytes of object;", uuid.Nil) }
