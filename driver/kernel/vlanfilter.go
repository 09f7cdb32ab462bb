package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The hooks that tc(8) has on a link: what comes in and what goes out.
const (
	hookIn  = netlink.HANDLE_MIN_INGRESS
	hookOut = netlink.HANDLE_MIN_EGRESS
)

// Our filters have one priority of their own at a hook, so that they are one list in the kernel,
// and nobody else's are in it: "dw" in ASCII. It is before those that the kernel chooses, which are
// 49152 and below by one each, so that a tagged frame that is a VLAN's own meets us first.
const filterPriority = 0x6477

const (
	linkHandle   = 1      // at a hook of a VLAN's link; at an uplink it is the VLAN's number
	markerHandle = 0x1000 // above all VLANs
	markerName   = "dockway promiscuous"
	shutName     = "dockway shut"
	kindBPF      = "bpf"
	kindClsact   = "clsact"
)

// A tagging says what the programs of a VLAN do, as far as it is baked into them. Both filters of
// the VLAN are named after it: so a look at them tells whether they are right. An interface that
// vanishes and returns has another index.
type tagging struct {
	id          int
	uplink      string
	uplinkIndex int32
	link        string
	linkIndex   int32
}

const taggingForm = "dockway vlan %d of %s on %s"

func (t tagging) String() string {
	return fmt.Sprintf(taggingForm, t.id,
		fmt.Sprintf("%s/%d", t.uplink, t.uplinkIndex), fmt.Sprintf("%s/%d", t.link, t.linkIndex))
}

func parseTagging(name string) (t tagging, ok bool) {
	var uplink, link string
	if _, err := fmt.Sscanf(name, taggingForm, &t.id, &uplink, &link); err != nil {
		return tagging{}, false
	}
	t.uplink, t.uplinkIndex = parseIndexed(uplink)
	t.link, t.linkIndex = parseIndexed(link)
	return t, t.String() == name
}

// parseIndexed reads an interface's name, which has no slash in it, and its index.
func parseIndexed(s string) (string, int32) {
	name, number, _ := strings.Cut(s, "/")
	index, _ := strconv.ParseInt(number, 10, 32)
	return name, int32(index)
}

// A filter is what is at our priority of a hook.
type filter struct {
	link     int32
	hook     uint32
	protocol uint16
	handle   uint32
	name     string
	direct   bool // the program's answer is the verdict
}

// outFilter and inFilter are the two of a VLAN.
func outFilter(t tagging) filter {
	return filter{link: t.linkIndex, hook: hookOut, protocol: unix.ETH_P_ALL, handle: linkHandle, name: t.String(), direct: true}
}

func inFilter(t tagging) filter {
	return filter{link: t.uplinkIndex, hook: hookIn, protocol: unix.ETH_P_8021Q, handle: uint32(t.id), name: t.String(), direct: true}
}

// marker says that an uplink is promiscuous because of us. It does nothing.
func marker(uplink int32) filter {
	return filter{link: uplink, hook: hookIn, protocol: unix.ETH_P_8021Q, handle: markerHandle, name: markerName, direct: true}
}

// shutFilter is the one at the ingress of a VLAN's link.
func shutFilter(link int32) filter {
	return filter{link: link, hook: hookIn, protocol: unix.ETH_P_ALL, handle: linkHandle, name: shutName, direct: true}
}

// tcBody is struct tcmsg and attributes.
func tcBody(link int32, handle, parent, info uint32, a attrs) []byte {
	b := []byte{unix.AF_UNSPEC, 0, 0, 0}
	for _, v := range []uint32{uint32(link), handle, parent, info} {
		b = append(b, native32(v)...)
	}
	return append(b, a...)
}

func (f filter) body(a attrs) []byte {
	info := uint32(filterPriority)<<16 | uint32(uint16(network16(f.protocol)))
	return tcBody(f.link, f.handle, f.hook, info, append(attrs{}.str(nl.TCA_KIND, kindBPF), a...))
}

// install loads a program and puts a filter with it at its hook.
func (k *Kernel) install(ctx context.Context, f filter, name string, code asm.Instructions) error {
	p, err := loadProgram(name, code)
	if err != nil {
		return err
	}
	defer p.Close()
	return k.attach(ctx, f, p)
}

// attach puts a filter with a program at its hook; one of the same handle is replaced, and no frame
// meets neither.
func (k *Kernel) attach(ctx context.Context, f filter, p *ebpf.Program) error {
	_, err := k.route.request(ctx, message{kind: unix.RTM_NEWTFILTER, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE,
		body: f.body(attrs{}.nest(nl.TCA_OPTIONS, attrs{}.
			u32(nl.TCA_BPF_FD, uint32(p.FD())).str(nl.TCA_BPF_NAME, f.name).
			u32(nl.TCA_BPF_FLAGS, nl.TCA_BPF_FLAG_ACT_DIRECT).u32(nl.TCA_BPF_FLAGS_GEN, nl.TCA_CLS_FLAGS_SKIP_HW)))})
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("filter %q: %w: the kernel has no eBPF filters (CONFIG_NET_CLS_BPF)", f.name, err)
	case err != nil:
		return fmt.Errorf("filter %q: %w", f.name, err)
	}
	return nil
}

// detach removes a filter; one that is not there is fine.
func (k *Kernel) detach(ctx context.Context, f filter) error {
	_, err := k.route.request(ctx, message{kind: unix.RTM_DELTFILTER, flags: unix.NLM_F_ACK, body: f.body(nil)})
	if isGone(err) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // EINVAL: the hooks are gone
		return nil
	}
	return err
}

// hooked gives a link the hooks; on a link that has them, nothing changes. They stay when our
// filters go: nobody can know who else counts on them, and without filters they do nothing.
func (k *Kernel) hooked(ctx context.Context, link int32) error {
	_, err := k.route.request(ctx, message{kind: unix.RTM_NEWQDISC, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_EXCL,
		body: tcBody(link, netlink.MakeHandle(0xffff, 0), netlink.HANDLE_CLSACT, 0, attrs{}.str(nl.TCA_KIND, kindClsact))})
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("qdisc clsact: %w: the kernel has none (CONFIG_NET_SCH_INGRESS)", err)
	case err != nil:
		return fmt.Errorf("qdisc clsact: %w", err)
	}
	return nil
}

// hooks lists the links that have hooks, and the kind of qdisc that they have them from: clsact, or
// ingress, which has only the one for what comes in.
func (k *Kernel) hooks(ctx context.Context) (map[int32]string, error) {
	bodies, err := k.route.dump(ctx, unix.RTM_GETQDISC, tcBody(0, 0, 0, 0, nil))
	if err != nil {
		return nil, fmt.Errorf("list qdiscs: %w", err)
	}
	out := map[int32]string{}
	for _, body := range bodies {
		if len(body) >= nl.SizeofTcMsg && binary.NativeEndian.Uint32(body[12:]) == netlink.HANDLE_CLSACT {
			kind, _ := attribute(body[nl.SizeofTcMsg:], nl.TCA_KIND)
			out[int32(binary.NativeEndian.Uint32(body[4:]))] = text(kind)
		}
	}
	return out, nil
}

// filters lists what is at our priority of a hook. A link that is not there has nothing.
func (k *Kernel) filters(ctx context.Context, link int32, hook uint32) ([]filter, error) {
	bodies, err := k.route.dump(ctx, unix.RTM_GETTFILTER, tcBody(link, 0, hook, filterPriority<<16, nil))
	if isGone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	var out []filter
	for _, body := range bodies {
		if f, ok := parseFilter(body, hook); ok {
			out = append(out, f)
		}
	}
	return out, nil
}

// parseFilter reads a filter at our priority. The list of filters itself, which the kernel shows as
// a filter without a handle, is none.
func parseFilter(body []byte, hook uint32) (f filter, ok bool) {
	if len(body) < nl.SizeofTcMsg {
		return f, false
	}
	info := binary.NativeEndian.Uint32(body[16:])
	f = filter{
		link: int32(binary.NativeEndian.Uint32(body[4:])), hook: hook,
		handle:   binary.NativeEndian.Uint32(body[8:]),
		protocol: uint16(network16(uint16(info))),
	}
	kind, _ := attribute(body[nl.SizeofTcMsg:], nl.TCA_KIND)
	if text(kind) == kindBPF {
		options, _ := attribute(body[nl.SizeofTcMsg:], nl.TCA_OPTIONS)
		name, _ := attribute(options, nl.TCA_BPF_NAME)
		flags, _ := attribute(options, nl.TCA_BPF_FLAGS)
		f.name = text(name)
		f.direct = len(flags) == 4 && binary.NativeEndian.Uint32(flags)&nl.TCA_BPF_FLAG_ACT_DIRECT != 0
	}
	return f, f.handle != 0 && info>>16 == filterPriority
}

// tcLink is the link that an event of tc is about.
func tcLink(body []byte) (int32, bool) {
	if len(body) < nl.SizeofTcMsg {
		return 0, false
	}
	return int32(binary.NativeEndian.Uint32(body[4:])), true
}

// allInFilters lists what is at our priority of all links, for what comes in.
func (k *Kernel) allInFilters(ctx context.Context) (map[int32][]filter, error) {
	hooks, err := k.hooks(ctx)
	if err != nil {
		return nil, err
	}
	out := map[int32][]filter{}
	for link := range hooks {
		list, err := k.filters(ctx, link, hookIn)
		if err != nil {
			return nil, err
		}
		if len(list) > 0 {
			out[link] = list
		}
	}
	return out, nil
}
