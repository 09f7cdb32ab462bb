package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// message is one netlink request, see netlink(7). A request without NLM_F_ACK and NLM_F_DUMP is
// answered by one message, unless it is quiet: then only a failure is answered.
type message struct {
	kind  uint16
	flags uint16
	body  []byte
	quiet bool
	about string // for errors: what the request makes
}

// single reports whether the request's first answer is its last.
func (m message) single() bool { return m.flags&(unix.NLM_F_ACK|unix.NLM_F_DUMP) == 0 }

// reply is what the kernel answered to one request.
type reply struct {
	bodies [][]byte // payloads of the answers, without the netlink header
	err    error    // the kernel's refusal: wraps a unix.Errno; EINTR: a dump that changed under way
}

// socket is a netlink socket, opened when it is first used. It is safe for concurrent use: one
// exchange at a time.
type socket struct {
	open    func() (*os.File, error)
	buffers *sync.Pool // for what is read, of largestSkb bytes

	mu     sync.Mutex
	file   *os.File      // nil: not open yet
	port   atomic.Uint32 // 0: not open yet
	seq    uint32
	closed bool
}

const (
	answerTime   = 20 * time.Second // the kernel answers within the call that asks; longer is a lost answer
	bufferSize   = 1 << 20          // answers that wait to be read
	largestSkb   = 64 << 10         // of the answers to what this package asks
	largestEvent = 16 << 10         // of what happens
	headerSize   = unix.SizeofNlMsghdr
	dumpRetries  = 50
)

func newBuffers() *sync.Pool {
	return &sync.Pool{New: func() any { b := make([]byte, largestSkb); return &b }}
}

// netlinkSocket makes a socket in the Kernel's network namespace, of a protocol and in groups.
func (k *Kernel) netlinkSocket(protocol int, groups ...int) *socket {
	return &socket{buffers: k.buffers, open: func() (file *os.File, err error) {
		err = k.inside(func() error {
			file, err = dial(protocol, groups...)
			return err
		})
		return file, err
	}}
}

// dial opens a netlink socket in the calling thread's network namespace and joins groups.
func dial(protocol int, groups ...int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := setUp(fd, groups); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

func setUp(fd int, groups []int) error {
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for _, option := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK} {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, option, 1); err != nil {
			return err
		}
	}
	for _, group := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			return err
		}
	}
	setBuffer(fd, unix.SO_RCVBUF, unix.SO_RCVBUFFORCE, bufferSize)
	return nil
}

// setBuffer makes a socket's buffer as large as may be: beyond the host's limit with
// CAP_NET_ADMIN, else up to it.
func setBuffer(fd, option, force, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size)
	}
}

// dial opens the socket if it is not open.
func (s *socket) dial() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dialLocked()
}

func (s *socket) dialLocked() error {
	if s.closed {
		return fmt.Errorf("netlink socket: %w", os.ErrClosed)
	}
	if s.file != nil {
		return nil
	}
	file, err := s.open()
	if err != nil {
		return err
	}
	raw, err := file.SyscallConn()
	if err == nil {
		var name unix.Sockaddr
		var failure error
		err = raw.Control(func(fd uintptr) { name, failure = unix.Getsockname(int(fd)) })
		if err = errors.Join(err, failure); err == nil {
			s.port.Store(name.(*unix.SockaddrNetlink).Pid)
		}
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	s.file = file
	return nil
}

// Close closes the socket for good, once an exchange that is under way has ended.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.file == nil {
		return nil
	}
	file := s.file
	s.file = nil
	return file.Close()
}

// receive has used what has arrived at a netlink socket, once something has: as many datagrams as
// there are. The error may come after some of them.
func (k *Kernel) receive(file *os.File, use func([]byte)) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	buf := k.buffers.Get().(*[]byte)
	defer k.buffers.Put(buf)
	var got int
	var failure error
	err = raw.Read(func(fd uintptr) bool {
		failure = nil
		for len(*buf)-got >= largestEvent && failure == nil {
			var n int
			if n, failure = unix.Read(int(fd), (*buf)[got:]); failure == nil {
				got += aligned(n)
			}
		}
		return got > 0 || !errors.Is(failure, unix.EAGAIN)
	})
	use((*buf)[:got])
	if failure != nil && !errors.Is(failure, unix.EAGAIN) && !errors.Is(failure, unix.EINTR) {
		err = errors.Join(err, failure)
	}
	return err
}

// backlog is how many bytes wait to be read from a netlink socket.
func backlog(file *os.File) (n int, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	const memInfo, allocated = 55, 0 // SO_MEMINFO, SK_MEMINFO_RMEM_ALLOC
	var info [16]uint32
	err = errors.Join(raw.Control(func(fd uintptr) {
		size := uint32(len(info) * 4)
		if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, memInfo,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
			err = errno
		}
	}), err)
	return int(info[allocated]), err
}

// exchange sends requests as one write, so that the kernel carries them out one after the other
// before anything can interrupt this process, and collects the answers. The error is the
// transport's; what the kernel refused is in the replies.
func (s *socket) exchange(ctx context.Context, requests ...message) ([]reply, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.dialLocked(); err != nil {
		return nil, err
	}
	buf := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buf)
	first := s.seq + 1
	s.seq += uint32(len(requests))
	var out []byte
	waiting := 0
	for i, m := range requests {
		if !m.quiet {
			waiting++
		}
		out = appendMessage(out, m, first+uint32(i))
	}
	if err := s.send(out); err != nil {
		return nil, err
	}
	replies := make([]reply, len(requests))
	if err := s.file.SetReadDeadline(time.Now().Add(answerTime)); err != nil {
		return nil, err
	}
	for waiting > 0 {
		n, err := s.file.Read(*buf)
		if err != nil {
			return nil, fmt.Errorf("read netlink answer: %w", err)
		}
		for h, body := range messages((*buf)[:n]) {
			i := int(h.Seq - first)
			if i < 0 || i >= len(requests) {
				continue // an answer to a request given up earlier
			}
			last := replies[i].take(h, body)
			if !requests[i].quiet && (last || requests[i].single()) {
				waiting--
			}
		}
		// A batch that was refused as a whole is answered for its first message only.
		if requests[0].kind == unix.NFNL_MSG_BATCH_BEGIN && replies[0].err != nil {
			return replies, nil
		}
	}
	return replies, nil
}

func (s *socket) send(out []byte) error {
	if len(out) > bufferSize/8 {
		raw, err := s.file.SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) {
			setBuffer(int(fd), unix.SO_SNDBUF, unix.SO_SNDBUFFORCE, 2*len(out))
		}); err != nil {
			return err
		}
	}
	if _, err := s.file.Write(out); err != nil {
		return fmt.Errorf("send netlink request: %w", err)
	}
	return nil
}

// take notes one message of an answer and reports whether it was the last.
func (r *reply) take(h unix.NlMsghdr, body []byte) bool {
	if h.Flags&unix.NLM_F_DUMP_INTR != 0 {
		r.err = unix.EINTR
	}
	switch h.Type {
	case unix.NLMSG_ERROR, unix.NLMSG_DONE:
		if err := refusal(h, body); err != nil {
			r.err = err
		}
		return true
	default:
		r.bodies = append(r.bodies, append([]byte(nil), body...))
	}
	return false
}

// refusal decodes NLMSG_ERROR and NLMSG_DONE: nil when the kernel is content.
func refusal(h unix.NlMsghdr, body []byte) error {
	if len(body) < 4 {
		return nil
	}
	code := int32(binary.NativeEndian.Uint32(body))
	if code >= 0 {
		return nil
	}
	err := error(unix.Errno(-code))
	if h.Type == unix.NLMSG_ERROR && h.Flags&unix.NLM_F_ACK_TLVS != 0 && len(body) >= 4+headerSize {
		for kind, value := range attributes(body[4+headerSize:]) {
			if kind == unix.NLMSGERR_ATTR_MSG {
				err = fmt.Errorf("%w (%s)", err, text(value))
			}
		}
	}
	return err
}

// request sends one request and returns its answers, or what the kernel refused.
func (s *socket) request(ctx context.Context, m message) ([][]byte, error) {
	replies, err := s.exchange(ctx, m)
	if err != nil {
		return nil, err
	}
	return replies[0].bodies, replies[0].err
}

// dump lists objects. A list that changed while it was read is read again.
func (s *socket) dump(ctx context.Context, kind uint16, body []byte) ([][]byte, error) {
	for range dumpRetries {
		bodies, err := s.request(ctx, message{kind: kind, flags: unix.NLM_F_DUMP, body: body})
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) {
			return bodies, err
		}
	}
	return nil, fmt.Errorf("list changed under way %d times: %w", dumpRetries, unix.EINTR)
}

func appendMessage(out []byte, m message, seq uint32) []byte {
	length := headerSize + len(m.body)
	out = binary.NativeEndian.AppendUint32(out, uint32(length))
	out = binary.NativeEndian.AppendUint16(out, m.kind)
	out = binary.NativeEndian.AppendUint16(out, m.flags|unix.NLM_F_REQUEST)
	out = binary.NativeEndian.AppendUint32(out, seq)
	out = binary.NativeEndian.AppendUint32(out, 0)
	return pad(append(out, m.body...))
}

// messages splits a datagram.
func messages(b []byte) iter.Seq2[unix.NlMsghdr, []byte] {
	return func(yield func(unix.NlMsghdr, []byte) bool) {
		for len(b) >= headerSize {
			h := unix.NlMsghdr{
				Len:   binary.NativeEndian.Uint32(b),
				Type:  binary.NativeEndian.Uint16(b[4:]),
				Flags: binary.NativeEndian.Uint16(b[6:]),
				Seq:   binary.NativeEndian.Uint32(b[8:]),
				Pid:   binary.NativeEndian.Uint32(b[12:]),
			}
			if int(h.Len) < headerSize || int(h.Len) > len(b) || !yield(h, b[headerSize:h.Len]) {
				return
			}
			b = b[min(aligned(int(h.Len)), len(b)):]
		}
	}
}

// attrs is a list of netlink attributes under construction: type, length, value.
type attrs []byte

func (a attrs) put(kind uint16, value []byte) attrs {
	a = binary.NativeEndian.AppendUint16(a, uint16(4+len(value)))
	a = binary.NativeEndian.AppendUint16(a, kind)
	return pad(append(a, value...))
}

func (a attrs) nest(kind uint16, inner attrs) attrs { return a.put(kind|unix.NLA_F_NESTED, inner) }
func (a attrs) str(kind uint16, s string) attrs     { return a.put(kind, append([]byte(s), 0)) }
func (a attrs) u8(kind uint16, v uint8) attrs       { return a.put(kind, []byte{v}) }
func (a attrs) u32(kind uint16, v uint32) attrs     { return a.put(kind, native32(v)) }
func (a attrs) be32(kind uint16, v uint32) attrs {
	return a.put(kind, binary.BigEndian.AppendUint32(nil, v))
}
func (a attrs) be64(kind uint16, v uint64) attrs {
	return a.put(kind, binary.BigEndian.AppendUint64(nil, v))
}

// attributes walks a list of netlink attributes; the flags are cut off the types.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for kind, value := range rawAttributes(b) {
			if !yield(kindOf(kind), value) {
				return
			}
		}
	}
}

// kindOf is an attribute's type without the flags.
func kindOf(kind uint16) uint16 { return kind &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER) }

func rawAttributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= 4 {
			n := int(binary.NativeEndian.Uint16(b))
			if n < 4 || n > len(b) || !yield(binary.NativeEndian.Uint16(b[2:]), b[4:n]) {
				return
			}
			b = b[min(aligned(n), len(b)):]
		}
	}
}

// attribute finds the first attribute of a kind.
func attribute(b []byte, kind uint16) ([]byte, bool) {
	for k, value := range attributes(b) {
		if k == kind {
			return value, true
		}
	}
	return nil, false
}

// text is a string attribute without its end mark.
func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// number32 is a number of four bytes in the byte order of the machine. What is shorter, as the kernel tells nothing, is 0.
func number32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func aligned(n int) int { return (n + 3) &^ 3 }

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}
