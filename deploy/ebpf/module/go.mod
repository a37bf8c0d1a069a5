module go.test/ebpf

go 1.21
