package facts

import (
	"slices"
	"sort"
)

// maxNumber bounds epochs, counters and clocks that come from elsewhere, so that counting on from
// them never overflows.
const maxNumber = 1<<63 - 1

// Span is a run of counters, from First to Last, both included.
type Span struct{ First, Last uint64 }

// spans is a set of counters: spans in ascending order that neither overlap nor touch. A complete
// log's set is one span, whatever its length.
type spans []Span

// watermark returns the highest counter up to which all are in the set, or 0.
func (s spans) watermark() uint64 {
	if len(s) == 0 || s[0].First > 1 {
		return 0
	}
	return s[0].Last
}

// search returns the index of the first span that does not end below the counter.
func (s spans) search(counter uint64) int {
	if n := len(s); n == 0 || s[n-1].Last < counter {
		return n
	}
	return sort.Search(len(s), func(i int) bool { return s[i].Last >= counter })
}

func (s spans) has(counter uint64) bool {
	i := s.search(counter)
	return i < len(s) && s[i].First <= counter
}

// with returns the set with a span added. It may use the memory of s.
func (s spans) with(add Span) spans {
	i := s.search(add.First - 1)
	j := i
	for ; j < len(s) && s[j].First <= add.Last+1; j++ {
		add.First = min(add.First, s[j].First)
		add.Last = max(add.Last, s[j].Last)
	}
	if j == i+1 {
		s[i] = add
		return s
	}
	return slices.Replace(s, i, j, add)
}

// union returns the counters that are in either set.
func (s spans) union(other spans) spans {
	if len(other) == 0 || s.covers(other) {
		return s
	}
	if len(other) == 1 {
		return s.with(other[0])
	}
	all := make(spans, 0, len(s)+len(other))
	for len(s) > 0 || len(other) > 0 {
		least := &s
		if len(s) == 0 || len(other) > 0 && other[0].First < s[0].First {
			least = &other
		}
		if n := len(all); n > 0 && (*least)[0].First <= all[n-1].Last+1 {
			all[n-1].Last = max(all[n-1].Last, (*least)[0].Last)
		} else {
			all = append(all, (*least)[0])
		}
		*least = (*least)[1:]
	}
	return all
}

// minus returns the counters that are in s and not in other.
func (s spans) minus(other spans) spans {
	var rest spans
	for _, span := range s {
		first := span.First
		for i := other.search(first); i < len(other) && other[i].First <= span.Last; i++ {
			if first < other[i].First {
				rest = append(rest, Span{first, other[i].First - 1})
			}
			first = other[i].Last + 1
		}
		if first <= span.Last {
			rest = append(rest, Span{first, span.Last})
		}
	}
	return rest
}

// covers reports whether all counters of other are in s.
func (s spans) covers(other spans) bool {
	for _, span := range other {
		if i := s.search(span.First); i == len(s) || s[i].First > span.First || s[i].Last < span.Last {
			return false
		}
	}
	return true
}
