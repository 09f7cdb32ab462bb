package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Cluster is what the manager asks of the other hosts about shared subnets. What a host claims is a block of a subnet, or a
// single address as a prefix of full length.
//
// Taken, Own and Release answer from memory, at once. The manager calls them with locks held that Busy takes too, so
// none of the implementation's own locks may be held while it calls Busy.
//
// A host that is asked for a single address inside of a block of its own grants it unless Busy says that it is held. The
// claim must be in Taken before Busy is asked, and be taken out again if it is: so an address that is being given at
// that moment is seen by one of the two.
type Cluster interface {
	// Claim makes a block of a subnet this host's, unless another has an overlapping one: then the error is a TakenError.
	// It asks every host that can be reached. What this host has already is claimed again without harm, and is taken if
	// another host turned out to have part of it too, and to come first. After another error Own may have the block or not.
	Claim(ctx context.Context, subnet, block netip.Prefix) error
	// Release gives up a block. One that is not this host's is released already.
	Release(subnet, block netip.Prefix)
	// Taken lists the blocks of the subnet that other hosts have, single addresses too.
	Taken(subnet netip.Prefix) []netip.Prefix
	// Own lists those of this host. After its restart they are what Manager.Blocks lists; more is of no use.
	Own(subnet netip.Prefix) []netip.Prefix
}

// TakenError is why a block cannot be claimed. IsTaken reports true of it.
type TakenError struct {
	Block netip.Prefix // of the other host; it overlaps the one claimed
	Host  string       // who has it, for people
}

func (e TakenError) Error() string { return fmt.Sprintf("%s is held by host %s", e.Block, e.Host) }

// Unwrap makes it one of the reasons.
func (e TakenError) Unwrap() error { return taken }

var errNoCluster = errors.New("this dockway has no cluster: set JOIN, so that it finds the other hosts")

// noCluster is that of a host which is in none: nothing can be claimed.
type noCluster struct{}

func (noCluster) Claim(context.Context, netip.Prefix, netip.Prefix) error { return errNoCluster }
func (noCluster) Release(netip.Prefix, netip.Prefix)                      {}
func (noCluster) Taken(netip.Prefix) []netip.Prefix                       { return nil }
func (noCluster) Own(netip.Prefix) []netip.Prefix                         { return nil }
