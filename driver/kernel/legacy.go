package kernel

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const verdictDrop = 0 // NF_DROP

// Warnings tells what on this host dockway can see but not mend.
func (k *Kernel) Warnings() []string {
	var out []string
	_ = k.inside(func() error {
		for _, family := range []string{"ip", "ip6"} {
			names, err := os.ReadFile("/proc/thread-self/net/" + family + "_tables_names")
			if err != nil || !strings.Contains(string(names), filterTable) {
				continue
			}
			if policy, err := legacyForward(family); err == nil && policy == verdictDrop {
				out = append(out, fmt.Sprintf("legacy %stables has FORWARD policy DROP, which nftables cannot overrule: "+
					"use iptables-nft, or add `-m mark --mark 0x%x/0x%x -j ACCEPT` to FORWARD there", family, k.mark, k.mark))
			}
		}
		return nil
	})
	return out
}

// legacyForward reads the policy of chain FORWARD of legacy iptables: the verdict of the last rule
// of its part of the table, see linux/netfilter_ipv4/ip_tables.h.
func legacyForward(family string) (verdict int, err error) {
	domain, level := unix.AF_INET, unix.IPPROTO_IP
	targetOffset := 88 // of struct ipt_entry
	if family == "ip6" {
		domain, level = unix.AF_INET6, unix.IPPROTO_IPV6
		targetOffset = 140 // of struct ip6t_entry
	}
	const getInfo, getEntries = 64, 65 // IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	info := make([]byte, 84) // struct ipt_getinfo: name, hooks, hook_entry[5], underflow[5], entries, size
	copy(info, filterTable)
	if err := getsockopt(fd, level, getInfo, info); err != nil {
		return 0, err
	}
	underflow := binary.NativeEndian.Uint32(info[32+4+20+4*unix.NF_INET_FORWARD:])
	size := binary.NativeEndian.Uint32(info[80:])
	entries := make([]byte, 40+int(size)) // struct ipt_get_entries: name, size, entries
	copy(entries, filterTable)
	binary.NativeEndian.PutUint32(entries[32:], size)
	if err := getsockopt(fd, level, getEntries, entries); err != nil {
		return 0, err
	}
	rule := entries[40+int(underflow):]
	offset := int(binary.NativeEndian.Uint16(rule[targetOffset:]))
	// struct xt_standard_target: xt_entry_target of 32 bytes, verdict; -v-1 is a final one.
	return int(-int32(binary.NativeEndian.Uint32(rule[offset+32:])) - 1), nil
}

func getsockopt(fd, level, option int, buf []byte) error {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
