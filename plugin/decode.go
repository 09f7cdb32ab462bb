package plugin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"regexp"
	"strings"

	"github.com/dockway/dockway/driver/plan"
)

// errEmptyBody says what an engine has done: when a connection breaks, it sends the request
// again from a buffer that is already read.
var errEmptyBody = errors.New("the request's body is empty, as when an engine repeats a request after a broken connection: run the command again")

// unmarshal decodes one JSON object and nothing else. Fields that are not known are ignored:
// engines add some.
func unmarshal(body []byte, v any) error {
	body = bytes.TrimSpace(body)
	if len(body) == 0 {
		return errEmptyBody
	}
	if body[0] != '{' {
		return fmt.Errorf("the request's body begins with %.10q: a JSON object is needed", body)
	}
	return explain(json.Unmarshal(body, v))
}

// explain says what is wrong with JSON in the words of JSON.
func explain(err error) error {
	if typ, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		where := "the value"
		if typ.Field != "" {
			where = "field " + cut(typ.Field)
		}
		return fmt.Errorf("%s is %s: %s is needed", where, cut(typ.Value), describe(typ.Type))
	}
	if syn, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("not valid JSON at byte %d: %w", syn.Offset, err)
	}
	if err != nil {
		return fmt.Errorf("not valid JSON: %w", err)
	}
	return nil
}

// describe names what JSON a Go type is decoded from.
func describe(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Uint16:
		return "a whole number from 0 to 65535"
	case reflect.Int:
		return "a whole number"
	case reflect.Slice:
		return "an array"
	case reflect.Map, reflect.Struct:
		return "an object"
	}
	return "another type"
}

// cut shortens text of any length for a message.
func cut(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "…"
	}
	return s
}

// quote is cut for text that somebody else chose.
func quote(s string) string { return fmt.Sprintf("%q", cut(s)) }

// word is text that needs no quotes in a message.
var word = regexp.MustCompile(`^[!-~]{1,64}$`)

// plain is quote for text that usually is a word.
func plain(s string) string {
	if word.MatchString(s) {
		return s
	}
	return quote(s)
}

// identifier is an engine's ID: 64 hexadecimal digits, or 25 letters and digits from swarm.
var identifier = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z_-]{0,127}$`)

func checkID(field, id string) error {
	if id == "" {
		return fmt.Errorf("field %s is missing", field)
	}
	if !identifier.MatchString(id) {
		return fmt.Errorf("field %s is %s: an ID has up to 128 letters and digits", field, quote(id))
	}
	return nil
}

// brief is the part of an ID that people read.
func brief(id string) string {
	if identifier.MatchString(id) {
		return id[:min(12, len(id))]
	}
	return quote(id)
}

// parsePool parses a subnet.
func parsePool(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%s is not a subnet such as 10.80.0.0/24", quote(s))
	}
	return p.Masked(), nil
}

// parseAddress parses an address with its subnet's length. None is "".
func parseAddress(s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%s is not an address with its subnet's length such as 10.80.0.2/24", quote(s))
	}
	return p, nil
}

// parseHost parses an address whose subnet's length may follow and does not matter. None is "".
func parseHost(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	bare, _, hasLength := strings.Cut(s, "/")
	a, err := netip.ParseAddr(bare)
	if hasLength && err == nil {
		_, err = netip.ParsePrefix(s)
	}
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s is not an address such as 10.80.0.2 or 10.80.0.2/24", quote(s))
	}
	return a.Unmap(), nil
}

// parseMAC parses the Ethernet address of one host. None is "".
func parseMAC(s string) (plan.MAC, error) {
	if s == "" {
		return plan.MAC{}, nil
	}
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(plan.MAC{}) {
		return plan.MAC{}, fmt.Errorf("%s is not an Ethernet address such as 02:42:0a:50:00:02", quote(s))
	}
	mac := plan.MAC(hw)
	if mac == (plan.MAC{}) || mac[0]&1 != 0 {
		return plan.MAC{}, fmt.Errorf("%s is not the address of one host: its first octet must be even, and not all can be 0", quote(s))
	}
	return mac, nil
}
