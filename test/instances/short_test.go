//go:build !cluster

package instances

import "time"

// churnFor is how long owners come and go; untilGone says whether the end of the records
// is waited for too, which are kept for a minute.
const churnFor, untilGone = 20 * time.Second, false
