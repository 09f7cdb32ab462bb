package kernel

import (
	"encoding/binary"
	"errors"
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
	targetOffset := targetOffset4
	if family == "ip6" {
		domain, level = unix.AF_INET6, unix.IPPROTO_IPV6
		targetOffset = targetOffset6
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
	return forwardPolicy(entries[40:], underflow, targetOffset)
}

// Where struct ipt_entry and struct ip6t_entry say where a rule's target is.
const (
	targetOffset4 = 88
	targetOffset6 = 140
)

// forwardPolicy is the verdict of the rule at an offset.
func forwardPolicy(entries []byte, at uint32, targetOffset int) (verdict int, err error) {
	size := uint64(len(entries))
	if uint64(at)+uint64(targetOffset)+2 > size {
		return 0, errLegacy
	}
	rule := entries[at:]
	// struct xt_standard_target: xt_entry_target of 32 bytes, verdict; -v-1 is a final one.
	offset := int(binary.NativeEndian.Uint16(rule[targetOffset:])) + 32
	if offset+4 > len(rule) {
		return 0, errLegacy
	}
	return int(-int32(binary.NativeEndian.Uint32(rule[offset:])) - 1), nil
}

var errLegacy = errors.New("the table of legacy iptables points outside of itself")

func getsockopt(fd, level, option int, buf []byte) error {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
