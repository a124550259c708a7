package gateway

import (
	"slices"
	"sync"
)

// index holds the ids of the view's tasks in their order, which is that of their
// acceptance. Ids come at the end and go at the beginning, mostly; blocks keep that
// cheap with 100,000 of them. The zero value is empty.
type index struct {
	mu     sync.RWMutex
	blocks [][]string // under mu: sorted, none empty, all ids of one before those of the next
}

const indexBlock = 512

// block says in which block id is or belongs; mu is held.
func (x *index) block(id string) int {
	i, found := slices.BinarySearchFunc(x.blocks, id, func(b []string, id string) int {
		if b[0] > id {
			return 1
		}
		if b[0] == id {
			return 0
		}
		return -1
	})
	if !found {
		i--
	}
	return i
}

func (x *index) add(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.blocks) == 0 {
		x.blocks = [][]string{{id}}
		return
	}
	b := max(0, x.block(id))
	at, found := slices.BinarySearch(x.blocks[b], id)
	if found {
		return
	}
	block := slices.Insert(x.blocks[b], at, id)
	if len(block) <= indexBlock {
		x.blocks[b] = block
		return
	}
	half := len(block) / 2
	if at == len(block)-1 { // ids grow: leave full blocks behind
		half = len(block) - 1
	}
	rest := slices.Clone(block[half:])
	clear(block[half:])
	x.blocks[b] = block[:half]
	x.blocks = slices.Insert(x.blocks, b+1, rest)
}

func (x *index) remove(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.blocks) == 0 {
		return
	}
	b := x.block(id)
	if b < 0 {
		return
	}
	at, found := slices.BinarySearch(x.blocks[b], id)
	if !found {
		return
	}
	x.blocks[b] = slices.Delete(x.blocks[b], at, at+1)
	if len(x.blocks[b]) == 0 {
		x.blocks = slices.Delete(x.blocks, b, b+1)
	}
}

// before gives up to n ids that come before id, the greatest first; "" is the end.
func (x *index) before(id string, n int) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	b := len(x.blocks) - 1
	if id != "" {
		b = min(b, x.block(id))
	}
	var ids []string
	for ; b >= 0 && len(ids) < n; b-- {
		block := x.blocks[b]
		end := len(block)
		if id != "" {
			end, _ = slices.BinarySearch(block, id)
		}
		for i := end - 1; i >= 0 && len(ids) < n; i-- {
			ids = append(ids, block[i])
		}
	}
	return ids
}
