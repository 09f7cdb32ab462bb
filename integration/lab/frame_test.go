package lab

import (
	"encoding/hex"
	"math/rand/v2"
	"strings"
	"testing"
)

// Frames as they were seen on links, by what they are.
var samples = []struct {
	hex, words string
	fits       []Match
}{
	{"ffffffffffff02080000000108060001080006040001020800000001c6120001000000000000c6120002",
		"In  02:08:00:00:00:01 > ff:ff:ff:ff:ff:ff, ARP request who-has 198.18.0.2 tell 198.18.0.1 (02:08:00:00:00:01), length 42",
		[]Match{ARP(), ARPRequest().From("198.18.0.1").To("198.18.0.2"), ARP().SenderMAC("02:08:00:00:00:01").TargetMAC("00:00:00:00:00:00"), SourceMAC("02:08:00:00:00:01"), DestinationMAC("ff:ff:ff:ff:ff:ff")}},
	{"02080000000102080000000281000014080600010800060400020208000000" + "02c6120002020800000001c6120001",
		"In  02:08:00:00:00:02 > 02:08:00:00:00:01, vlan 20, ARP reply 198.18.0.2 is-at 02:08:00:00:00:02 (to 198.18.0.1, 02:08:00:00:00:01), length 46",
		[]Match{ARPReply().From("198.18.0.2").VLAN(20), Not(Frames().Untagged()), Not(Frames().VLAN(21)), Not(ARPRequest())}},
	{"0208000000020208000000010800450000200001000040010000c6120001c612000208000000000700016d61726b",
		"In  02:08:00:00:00:01 > 02:08:00:00:00:02, 198.18.0.1 > 198.18.0.2: ICMP EchoRequest, id 7, seq 1, length 46",
		[]Match{EchoRequest().From("198.18.0.1").To("198.18.0.2").Carrying("mark"), IPv4().Protocol(1), ICMPFrom("198.18.0.1"), ICMPType(8), Not(EchoReply()), Frames().Untagged()}},
	{"3333ff000002020800000001" + "86dd6000000000203aff" + "fd001800000000000000000000000001" + "ff0200000000000000000001ff000002" + "8700000000000000" + "fd001800000000000000000000000002" + "0101020800000001",
		"In  02:08:00:00:00:01 > 33:33:ff:00:00:02, fd00:1800::1 > ff02::1:ff00:2: ICMPv6 NeighborSolicitation of fd00:1800::2, link-layer address 02:08:00:00:00:01, length 86",
		[]Match{NeighbourSolicitation().About("fd00:1800::2").LinkLayer("02:08:00:00:00:01"), IPv6().Protocol(58), Not(ICMP()), Mentions("02:08:00:00:00:01"), ICMPv6Type(135)}},
	{"020800000002020800000001080045000020000100004011" + "0000c6120001c61200020050123400" + "0c00006d61726b",
		"In  02:08:00:00:00:01 > 02:08:00:00:00:02, 198.18.0.1:80 > 198.18.0.2:4660: UDP, 4 bytes, length 46",
		[]Match{UDP().FromPort(80).ToPort(4660), Either(TCP(), UDP().From("198.18.0.1")), Not(Either(TCP(), UDP().ToPort(80)))}},
	{"020800000002020800000001080045000028000100004006" + "0000c6120001c61200020050123400000001000000025012ffff00000000",
		"In  02:08:00:00:00:01 > 02:08:00:00:00:02, 198.18.0.1:80 > 198.18.0.2:4660: TCP [S.] seq 1, ack 2, 0 bytes, length 54",
		[]Match{TCP().FromPort(80), IPv4().Protocol(6), Not(UDP())}},
	{"ffffffffffff020800000001" + "0800" + "45000110000100004011000000000000ffffffff" + "0044004300fc0000" + "01010600" + "12345678" + "00000000" + strings.Repeat("00000000", 4) + "020800000001" + strings.Repeat("00", 10+192) + "63825363" + "350103" + "ff",
		"In  02:08:00:00:00:01 > ff:ff:ff:ff:ff:ff, 0.0.0.0:68 > 255.255.255.255:67: DHCP request, client 02:08:00:00:00:01, yours 0.0.0.0, length 286",
		[]Match{DHCP("request"), DHCP("Request").From("0.0.0.0").ToPort(67), Not(DHCP("discover"))}},
	{"0208000000020208000000010800450000200001000040840000c6120001c6120002",
		"In  02:08:00:00:00:01 > 02:08:00:00:00:02, 198.18.0.1 > 198.18.0.2: IP protocol 132, fragment offset 0, length 34",
		[]Match{IPv4().Protocol(132), Not(TCP())}},
	{"0180c200000e02080000000188b5", "In  02:08:00:00:00:01 > 01:80:c2:00:00:0e, ethertype 0x88b5", []Match{Not(IPv4()), Not(ARP())}},
	{vxlanSample, "In  02:08:00:00:00:01 > 02:08:00:00:00:02, 198.18.80.1:49152 > 198.18.80.2:14789: VXLAN vni 5001, inside 02:0a:00:00:00:01 > 02:0a:00:00:00:02, 10.90.0.1 > 10.90.0.2: ICMP EchoRequest, id 7, seq 1, length 46, length 96",
		[]Match{Encapsulated(14789).From("198.18.80.1").VNI(5001).Inside(EchoRequest().To("10.90.0.2")), Not(Encapsulated(4789)), Not(EchoRequest()), Not(Frames().VNI(5002)), Not(Group()), UDP().ChecksumMissing()}},
	{strings.Replace(vxlanSample, "39c5", "12b5", 1), "198.18.80.2:4789: VXLAN vni 5001, inside 02:0a", // which the decoder knows by itself
		[]Match{Encapsulated(4789).To("198.18.80.2").VNI(5001).Inside(ICMPFrom("10.90.0.1").Carrying("mark")), Not(EchoRequest()), Not(Frames().To("10.90.0.2"))}},
	{strings.Replace(vxlanSample, "0800000000138900", "0c00000000138900", 1), "UDP, 54 bytes", []Match{UDP().ToPort(14789), Not(Encapsulated(14789)), Not(Frames().VNI(5001))}},
	{"0180c2", "no Ethernet frame: 0180c2", []Match{Frames(), Not(SourceMAC("02:08:00:00:00:01"))}},
}

const vxlanSample = "020800000002020800000001080045000052000040004011" + "0000c6125001c6125002" + "c00039c5003e0000" + "0800000000138900" +
	"020a00000002020a0000000108004500002000010000400100000a5a00010a5a000208000000000700016d61726b"

func TestFrames(t *testing.T) {
	for _, s := range samples {
		data, err := hex.DecodeString(s.hex)
		if err != nil {
			t.Fatal(err)
		}
		f := decode(0, false, data)
		if got := f.String(); !strings.Contains(got, s.words) {
			t.Errorf("%x is\n%s, want\n%s", data, got, s.words)
		}
		for _, m := range s.fits {
			if !m.fits(f) {
				t.Errorf("%q does not fit %s", m, f)
			}
		}
	}
}

// TestBrokenFrames: whatever is on the wire, it can be asked about and told of.
func TestBrokenFrames(t *testing.T) {
	var all []Match
	for _, s := range samples {
		all = append(all, s.fits...)
	}
	look := func(data []byte) {
		f := decode(0, true, data)
		_ = f.String()
		for _, m := range all {
			m.fits(f)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for _, s := range samples {
		data, err := hex.DecodeString(s.hex)
		if err != nil {
			t.Fatal(err)
		}
		for n := range len(data) + 1 {
			look(data[:n])
		}
		for range 2000 {
			b := append([]byte(nil), data...)
			for range 1 + random.IntN(4) {
				b[random.IntN(len(b))] = byte(random.Uint32())
			}
			look(b)
		}
	}
	look(nil)
	for _, m := range all {
		m.fits(Frame{}) // what Saw gives when it saw nothing
	}
	_ = Frame{}.String()
}

func TestWords(t *testing.T) {
	const mac = "02:08:00:00:00:01"
	for want, m := range map[string]Match{
		"frame": Frames(),
		"ICMP from 198.18.0.1 to 198.18.0.2 sent":                             ICMPFrom("198.18.0.1").To("198.18.0.2").Sent(),
		"ARP request to 198.18.0.2 with the sender's MAC " + mac:              ARPRequest().To("198.18.0.2").SenderMAC(mac),
		"neighbour solicitation about fd00::1 with link-layer address " + mac: NeighbourSolicitation().About("fd00::1").LinkLayer(mac),
		"either (TCP to port 80) or (UDP) in VLAN 20":                         Either(TCP().ToPort(80), UDP()).VLAN(20),
		"not (from MAC " + mac + ")":                                          Not(SourceMAC(mac)),
		"ARP sent":                                                            ARP().And(Frames().Sent()),
	} {
		if m.String() != want {
			t.Errorf("%q, want %q", m, want)
		}
	}
}
