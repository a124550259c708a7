package schemas

import (
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

// BlobID names a blob by what it holds: "sha256:" and 64 hexadecimal digits in lower case.
type BlobID string

const blobPrefix = "sha256:"

// ParseBlobID reads the name of a blob, with its prefix or without.
func ParseBlobID(s string) (BlobID, error) {
	digits := strings.TrimPrefix(s, blobPrefix)
	if len(digits) != 2*sha256.Size || strings.Trim(digits, "0123456789abcdef") != "" {
		return "", fmt.Errorf("a blob is named by its SHA-256: %s and 64 hexadecimal digits in lower case", blobPrefix)
	}
	return BlobID(blobPrefix + digits), nil
}

// BlobIDOf is the name of the blob with such a SHA-256.
func BlobIDOf(sum [sha256.Size]byte) BlobID { return BlobID(blobPrefix + hex.EncodeToString(sum[:])) }

// Hex is the name without its prefix: its key in the bucket "blobs".
func (b BlobID) Hex() string { return strings.TrimPrefix(string(b), blobPrefix) }

// Sum is the SHA-256 itself; of a name that is none it is zero.
func (b BlobID) Sum() (sum [sha256.Size]byte) {
	_, _ = hex.Decode(sum[:], []byte(b.Hex()))
	return sum
}

// Blob says how the bytes of a blob are stored, the value of its key in the bucket
// "blobs". It is written once all of them were stored and verified, and again, by
// compare-and-set, whenever somebody is going to need it: the collector removes only
// what has been left alone.
type Blob struct {
	Size     Size      `json:"size"`
	Upload   string    `json:"upload"` // whose messages hold it, of BlobChunk bytes each but the last
	StoredAt time.Time `json:"stored_at"`
	UsedAt   time.Time `json:"used_at"` // by the clock of who last wrote this, for people
	Op       string    `json:"op"`      // of the last write

	// RemovedAt is when a client has removed it: nobody finds it any more, and the collector
	// takes it away once no record names it. Whoever sends it again takes this back.
	RemovedAt time.Time `json:"removed_at,omitzero"`
}

// BlobChunks is how many messages hold so many bytes.
func BlobChunks(size Size) int64 { return (int64(size) + BlobChunk - 1) / BlobChunk }

// BlobCipher hides and shows the bytes of an upload, from the chunk with number first on.
// The key follows from the blob's name. A worker can read any message of the stream, since
// a server takes a wildcard in place of an upload's id; it makes sense only of those blobs
// whose names it was told.
func BlobCipher(b BlobID, upload string, first int64) cipher.Stream {
	key := sha256.Sum256([]byte("dayfly blob\x00" + b.Hex() + "\x00" + upload))
	block, _ := aes.NewCipher(key[:]) // its length is right
	var iv [aes.BlockSize]byte
	binary.BigEndian.PutUint64(iv[aes.BlockSize-8:], uint64(first)*(BlobChunk/aes.BlockSize))
	return cipher.NewCTR(block, iv[:])
}

// BlobInfo is what the API says of a blob.
type BlobInfo struct {
	Blob     BlobID    `json:"blob"`
	Size     Size      `json:"size_bytes"`
	StoredAt time.Time `json:"stored_at"`
	UsedAt   time.Time `json:"used_at,omitzero"` // when it was last sent or named, about
	InUse    bool      `json:"in_use,omitzero"`  // in lists: a task that is not over names it, or a batch that is not done
}

// BlobList is a page of blobs, those first that were not used for longest.
type BlobList struct {
	Items      []BlobInfo `json:"items"`
	NextCursor string     `json:"next_cursor,omitzero"`
}

// Info is what the API says of it.
func (b Blob) Info(id BlobID) BlobInfo {
	return BlobInfo{Blob: id, Size: b.Size, StoredAt: b.StoredAt, UsedAt: b.UsedAt}
}

// How long blobs stay. BlobGrace is how long the collector leaves an entry alone that
// somebody has just written; whoever names a blob writes it first, no longer ago than a
// part of that. Blobs that nobody has named for BlobAge go, and where all together take more than
// --blob-bytes those first that nobody has named for longest.
const (
	BlobGrace = 10 * time.Minute
	BlobAge   = 24 * time.Hour
	BlobBytes = 20 << 30 // default of --blob-bytes
)

// Bounds of blobs.
const (
	// BlobChunk is how many bytes of a blob a message holds. A server takes 1 MiB at most,
	// and what is under way through a connection holds up what comes behind it.
	BlobChunk = 256 << 10
	// MaxBlobs is how many blobs a task may name, those included that its own contents become.
	MaxBlobs = 64
	// MaxBatchBlobs is how many blobs all items of a batch may name together.
	MaxBatchBlobs = 256
	// MaxBlobSize bounds --blob-max-size.
	MaxBlobSize = 1 << 40
)

// BlobUse is a blob that a task needs.
type BlobUse struct {
	Blob   BlobID `json:"blob"`
	Size   Size   `json:"size"`
	Upload string `json:"upload"` // where its bytes are

	Unknown Unknown `json:",embed"`
}

// Blobs names the blobs that a spec needs, each once, with the field that names it first.
func (s *Spec) Blobs() (names []BlobID, fields []string) {
	add := func(b BlobID, field string) {
		if b != "" && !slices.Contains(names, b) {
			names, fields = append(names, b), append(fields, field)
		}
	}
	for i, f := range s.Files {
		add(f.Blob, fmt.Sprintf("files.%d.blob", i))
	}
	add(s.StdinBlob, "stdin_blob")
	if s.Judge != nil {
		for i, t := range s.Judge.Tests {
			add(t.StdinBlob, s.testField(i)+".stdin_blob")
			add(t.ExpectedBlob, s.testField(i)+".expected_blob")
		}
	}
	return names, fields
}

// Slim gives a spec that a record has room for, and the contents that became blobs for
// it, the largest first. A spec that is small enough is its own.
func (s Spec) Slim() (Spec, [][]byte) {
	b, err := Encode(s)
	if err != nil || len(b) <= MaxSpecBytes {
		return s, nil
	}
	type content struct {
		size    int // as JSON
		bytes   func() ([]byte, error)
		becomes func(BlobID)
	}
	var all []content
	add := func(text string, bytes func() ([]byte, error), becomes func(BlobID)) {
		if len(text) > 2*len(blobPrefix)+2*sha256.Size {
			encoded, _ := Encode(text)
			all = append(all, content{len(encoded), bytes, becomes})
		}
	}
	addText := func(text *string, blob *BlobID) {
		add(*text, func() ([]byte, error) { return []byte(*text), nil }, func(id BlobID) { *text, *blob = "", id })
	}
	s.Files = slices.Clone(s.Files)
	for i := range s.Files {
		f := &s.Files[i]
		add(f.Content+f.Base64, f.Bytes, func(id BlobID) { f.Content, f.Base64, f.Blob = "", "", id })
	}
	addText(&s.Stdin, &s.StdinBlob)
	if s.Judge != nil {
		j := *s.Judge
		s.Judge, j.Tests = &j, slices.Clone(j.Tests)
		for i := range j.Tests {
			t := &j.Tests[i]
			addText(&t.Stdin, &t.StdinBlob)
			addText(&t.Expected, &t.ExpectedBlob)
		}
	}
	slices.SortStableFunc(all, func(a, b content) int { return cmp.Compare(b.size, a.size) })
	named, _ := s.Blobs()
	left := len(b)
	var out [][]byte
	for _, c := range all {
		if left <= MaxSpecBytes || len(named)+len(out) >= MaxBlobs {
			break
		}
		data, err := c.bytes()
		if err != nil {
			continue
		}
		id := BlobIDOf(sha256.Sum256(data))
		c.becomes(id)
		out = append(out, data)
		left += len(`"blob":""`) + len(id) - c.size
		if left <= MaxSpecBytes {
			b, _ := Encode(s)
			left = len(b)
		}
	}
	return s, out
}

// blobsHeader is the value of HeaderBlobs.
func blobsHeader(uses []BlobUse) string {
	names := make([]BlobID, len(uses))
	for i, u := range uses {
		names[i] = u.Blob
	}
	return joinBlobs(names)
}

func joinBlobs(blobs []BlobID) string {
	names := make([]string, len(blobs))
	for i, b := range blobs {
		names[i] = b.Hex()
	}
	return strings.Join(names, " ")
}

// ParseBlobsHeader gives the SHA-256 of each blob that a record names.
func ParseBlobsHeader(h string) (sums [][sha256.Size]byte) {
	for name := range strings.FieldsSeq(h) {
		sums = append(sums, BlobID(name).Sum())
	}
	return sums
}

// BlobFilter says which blobs a worker holds, as a Bloom filter: it never denies one that
// is there, and affirms one that is not in about 1 of 100 cases for up to 6,500 blobs. Its
// length follows from their number, 10 bits for each, and ends at MaxBlobFilter; of 20,000
// blobs two fifths of the answers for others is wrong. Nil holds none.
type BlobFilter []byte

// MaxBlobFilter is how many bytes of a beat say which blobs the worker holds.
const MaxBlobFilter = 8 << 10

const (
	filterBits   = 10 // for each blob
	filterHashes = 7  // bits that a blob sets: the best for 10
)

// NewBlobFilter makes the filter of some blobs. Equal sets give equal filters.
func NewBlobFilter(blobs []BlobID) BlobFilter {
	if len(blobs) == 0 {
		return nil
	}
	f := make(BlobFilter, min((len(blobs)*filterBits+7)/8+1, MaxBlobFilter))
	for _, b := range blobs {
		sum := b.Sum()
		for i := range filterHashes {
			n := f.bit(sum, i)
			f[n/8] |= 1 << (n % 8)
		}
	}
	return f
}

// bit is the i-th that a blob sets. A SHA-256 needs no more hashing.
func (f BlobFilter) bit(sum [sha256.Size]byte, i int) uint32 {
	return binary.BigEndian.Uint32(sum[4*i:]) % uint32(8*len(f))
}

// Has says whether the worker holds the blob with that SHA-256, probably.
func (f BlobFilter) Has(sum [sha256.Size]byte) bool {
	if len(f) == 0 {
		return false
	}
	for i := range filterHashes {
		if n := f.bit(sum, i); f[n/8]&(1<<(n%8)) == 0 {
			return false
		}
	}
	return true
}
