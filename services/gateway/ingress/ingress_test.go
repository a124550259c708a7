package ingress

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"dayfly.dev/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const label = "abcdefghijklmnopqrstuvwxyz"

// one is a Router with one task, a web server of this machine.
type one struct {
	addr  string
	limit int
	now   atomic.Int32
}

func (o *one) Find(_ context.Context, l string) (Target, error) {
	if l != label {
		return Target{}, noSuchHost()
	}
	return Target{Task: "t-1", Port: 80, Protocol: schemas.ProtocolHTTP, Life: "1"}, nil
}

func (o *one) Enter(schemas.TaskID) (func(), error) {
	if o.limit > 0 && int(o.now.Add(1)) > o.limit {
		o.now.Add(-1)
		return nil, &schemas.Error{Status: 503, Code: schemas.CodeTooManyRequests, Detail: "too many", RetryAfter: schemas.Duration(time.Second)}
	}
	return func() { o.now.Add(-1) }, nil
}

func (o *one) Dial(ctx context.Context, _ schemas.TaskID, _ int) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", o.addr)
}

// serve runs an ingress before a web server, and gives its address.
func serve(t *testing.T, cfg Config, o *one, task http.Handler, cert *Certificate, m *Metrics) string {
	t.Helper()
	web := httptest.NewServer(task)
	o.addr = web.Listener.Addr().String()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := New(cfg, o, zerolog.Nop(), m)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l, cert) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		s.Close()
		web.Close()
	})
	return l.Addr().String()
}

// say sends bytes as they are and gives what comes back until the connection ends.
func say(t *testing.T, addr, text string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(c)
	return string(b)
}

// asks counts the requests that reach the task.
type asks struct {
	mu   sync.Mutex
	seen []string
}

func (a *asks) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	a.seen = append(a.seen, fmt.Sprintf("%s %s %s %q", r.Method, r.RequestURI, r.Host, b))
	a.mu.Unlock()
	fmt.Fprint(w, "task")
}

func (a *asks) take() (all []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	all, a.seen = a.seen, nil
	return all
}

func TestHostsAndFormsOfRequests(t *testing.T) {
	a := &asks{}
	addr := serve(t, Config{Domain: "tasks.example"}, &one{}, a, nil, NewMetrics(nil))
	host := label + ".tasks.example"
	get := func(target, host, more string) string {
		return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n" + more + "\r\n"
	}
	for name, c := range map[string]struct{ send, status, seen string }{
		"a plain one":                 {get("/", host, ""), "200", `GET / ` + host + ` ""`},
		"in capitals, with a port":    {get("/", strings.ToUpper(host)+":8081", ""), "200", `GET / ` + strings.ToUpper(host) + `:8081 ""`},
		"with a final dot":            {get("/", host+".", ""), "200", `GET / ` + host + `. ""`},
		"an absolute form":            {get("http://"+host+"/x?y", "evil.example", ""), "200", `GET /x?y ` + host + ` ""`},
		"an absolute form elsewhere":  {get("http://169.254.169.254/", host, ""), "404", ""},
		"userinfo":                    {get("http://user:secret@"+host+"/", host, ""), "400", ""},
		"two slashes":                 {get("//evil.example/x", host, ""), "200", `GET //evil.example/x ` + host + ` ""`},
		"dots":                        {get("/../..//a/./b", host, ""), "200", `GET /../..//a/./b ` + host + ` ""`},
		"escapes":                     {get("/%2e%2e/%00%2f?a;b&%zz", host, ""), "200", `GET /%2e%2e/%00%2f?a;b&%zz ` + host + ` ""`},
		"OPTIONS *":                   {"OPTIONS * HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n", "200", ""}, // net/http answers it in the task
		"CONNECT":                     {"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n", "400", ""},
		"TRACE":                       {"TRACE / HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n", "400", ""},
		"the domain alone":            {get("/", "tasks.example", ""), "404", ""},
		"one label more":              {get("/", "x."+host, ""), "404", ""},
		"another domain":              {get("/", label+".tasks.example.evil.example", ""), "404", ""},
		"a label that nobody has":     {get("/", strings.Repeat("a", 26)+".tasks.example", ""), "404", ""},
		"an address":                  {get("/", "127.0.0.1", ""), "404", ""},
		"letters of another alphabet": {get("/", "ａbcdefghijklmnopqrstuvwxyz.tasks.example", ""), "40", ""},
		"punycode":                    {get("/", "xn--abcdefghijklmnopqrstuv.tasks.example", ""), "404", ""},
		"a long one":                  {get("/", strings.Repeat("a.", 10_000)+"tasks.example", ""), "404", ""},
		"no host":                     {"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", "400", ""},
		"no host, HTTP/1.0":           {"GET / HTTP/1.0\r\n\r\n", "404", ""},
		"two hosts":                   {get("/", host, "Host: evil.example\r\n"), "400", ""},
		"an empty host":               {get("/", "", ""), "404", ""},
		"a huge header":               {get("/", host, "X: "+strings.Repeat("x", 80<<10)+"\r\n"), "431", ""},
		"a space before the colon":    {get("/", host, "Transfer-Encoding : chunked\r\n"), "400", ""},
		"a folded header":             {get("/", host, "X: a\r\n b\r\n"), "", ""},
	} {
		answer := say(t, addr, c.send)
		if !strings.HasPrefix(answer, "HTTP/1.1 "+c.status) && !strings.HasPrefix(answer, "HTTP/1.0 "+c.status) {
			t.Errorf("%s: %.100q, want %s", name, answer, c.status)
		}
		if seen := strings.Join(a.take(), "|"); seen != c.seen && c.status != "" {
			t.Errorf("%s: the task saw %q, want %q", name, seen, c.seen)
		}
	}
}

// However the length of a body is told twice, the task sees one request or none: never one
// that was hidden in the body.
func TestNoRequestIsSmuggled(t *testing.T) {
	a := &asks{}
	addr := serve(t, Config{Domain: "tasks.example"}, &one{}, a, nil, NewMetrics(nil))
	hidden := "GET /hidden HTTP/1.1\r\nHost: " + label + ".tasks.example\r\n\r\n"
	for name, headers := range map[string]string{
		"length and chunked":     fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding: chunked\r\n", len(hidden)+5),
		"chunked and length":     fmt.Sprintf("Transfer-Encoding: chunked\r\nContent-Length: %d\r\n", len(hidden)+5),
		"two lengths":            fmt.Sprintf("Content-Length: 0\r\nContent-Length: %d\r\n", len(hidden)),
		"an unknown encoding":    "Transfer-Encoding: xchunked\r\n",
		"chunked twice":          "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
		"a length with a sign":   "Content-Length: +5\r\n",
		"a tab before chunked":   "Transfer-Encoding:\tchunked\r\n",
		"chunked in another way": "Transfer-Encoding: \x0bchunked\r\n",
	} {
		answer := say(t, addr, "POST /first HTTP/1.1\r\nHost: "+label+".tasks.example\r\n"+headers+"Connection: close\r\n\r\n0\r\n\r\n"+hidden)
		for _, seen := range a.take() {
			if strings.Contains(seen, "/hidden") && !strings.HasPrefix(seen, "POST /first") {
				t.Errorf("%s: the task saw %s (%.80q)", name, seen, answer)
			}
		}
	}
}

func TestSlowClientsAreCutOff(t *testing.T) {
	asked := make(chan string, 1)
	task := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/much" {
			b := make([]byte, 1<<20)
			for {
				if _, err := w.Write(b); err != nil {
					asked <- "cut"
					return
				}
			}
		}
		_, err := io.ReadAll(r.Body)
		asked <- fmt.Sprint(err != nil)
	})
	if answer := say(t, serve(t, Config{HeaderWithin: 50 * time.Millisecond}, &one{}, task, nil, NewMetrics(nil)), "GET / HTTP/1.1\r\nX: "); strings.Contains(answer, "200") {
		t.Errorf("half a head: %q", answer)
	}
	addr := serve(t, Config{Stall: 200 * time.Millisecond}, &one{}, task, nil, NewMetrics(nil))
	host := "Host: " + label + ".localhost\r\n"
	if answer := say(t, addr, "POST / HTTP/1.1\r\n"+host+"Content-Length: 10\r\n\r\nhalf"); !strings.Contains(answer, " 408 ") || <-asked != "true" {
		t.Errorf("half a body: %q", answer)
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /much HTTP/1.1\r\n%s\r\n", host)
	if got := <-asked; got != "cut" { // nobody reads
		t.Error(got)
	}
}

// A stream of HTTP/2 that nobody reads is cut off alone: the others of its connection go on,
// also one that has been quiet for longer.
func TestSlowStreamsAreCutOff(t *testing.T) {
	cut, more := make(chan struct{}), make(chan struct{})
	addr := serve(t, Config{Stall: 500 * time.Millisecond}, &one{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/much":
			defer close(cut)
			b := make([]byte, 1<<20)
			for {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		case "/quiet":
			fmt.Fprintln(w, "one")
			_ = http.NewResponseController(w).Flush()
			<-more
			fmt.Fprintln(w, "two")
		}
	}), nil, NewMetrics(nil))
	over := &http.Transport{Protocols: new(http.Protocols)}
	over.Protocols.SetUnencryptedHTTP2(true)
	defer over.CloseIdleConnections()
	get := func(path string) *http.Response {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+addr+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = label + ".localhost"
		answer, err := over.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { answer.Body.Close() })
		return answer
	}
	quiet := get("/quiet")
	lines := bufio.NewReader(quiet.Body)
	if line, err := lines.ReadString('\n'); line != "one\n" {
		t.Fatalf("%q, %v", line, err)
	}
	much := get("/much")
	<-cut // nobody reads
	if _, err := io.Copy(io.Discard, much.Body); err == nil {
		t.Error("it came to an end")
	}
	close(more)
	if line, err := lines.ReadString('\n'); line != "two\n" || quiet.ProtoMajor != 2 {
		t.Errorf("%q, %v over %s", line, err, quiet.Proto)
	}
	if _, err := lines.ReadByte(); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
}

// What a task says before its answer reaches no further than the answer itself.
func TestEarlyHintsStayWithinTheirHost(t *testing.T) {
	addr := serve(t, Config{}, &one{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</a.css>; rel=preload")
		w.Header().Set("Set-Cookie", "a=b; Domain=localhost; Path=/")
		w.Header().Set("Clear-Site-Data", "*")
		w.Header().Set(codeHeader, "gone")
		w.WriteHeader(http.StatusEarlyHints)
	}), nil, NewMetrics(nil))
	answer := say(t, addr, "GET / HTTP/1.1\r\nHost: "+label+".localhost\r\nConnection: close\r\n\r\n")
	if !strings.HasPrefix(answer, "HTTP/1.1 103 ") || strings.Count(answer, "Link: ") != 2 || strings.Count(answer, "a=b; Path=/") != 2 {
		t.Errorf("%s", answer)
	}
	for _, not := range []string{"Domain=", "Clear-Site-Data", codeHeader} {
		if strings.Contains(answer, not) {
			t.Errorf("%s is in it: %s", not, answer)
		}
	}
}

func TestATaskHasOnlySoManyVisitors(t *testing.T) {
	inside, leave := make(chan struct{}), make(chan struct{})
	m := NewMetrics(nil)
	addr := serve(t, Config{}, &one{limit: 2}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		inside <- struct{}{}
		<-leave
	}), nil, m)
	request := "GET / HTTP/1.1\r\nHost: " + label + ".localhost\r\nConnection: close\r\n\r\n"
	var two sync.WaitGroup
	for range 2 {
		two.Go(func() {
			if answer := say(t, addr, request); !strings.Contains(answer, " 200 ") {
				t.Errorf("%q", answer)
			}
		})
		<-inside
	}
	if answer := say(t, addr, request); !strings.Contains(answer, " 503 ") || !strings.Contains(answer, "Retry-After: 1\r\n") {
		t.Errorf("%q", answer)
	}
	close(leave)
	two.Wait()
	if n := testutil.ToFloat64(m.Failures.WithLabelValues(string(schemas.CodeTooManyRequests))); n != 1 {
		t.Errorf("%v counted", n)
	}
}

func TestOnlyTrustedProxiesAreBelieved(t *testing.T) {
	task := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s %s %s", r.Header["X-Forwarded-For"], r.Header["X-Forwarded-Proto"], r.Header["X-Forwarded-Host"], r.Header["X-Real-Ip"], r.Header["Authorization"])
	})
	request := "GET / HTTP/1.1\r\nHost: " + label + ".localhost\r\nConnection: close\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: a.example\r\nX-Real-Ip: 1.2.3.4\r\nAuthorization: Basic x\r\n\r\n"
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"anybody": {Config{}, "[127.0.0.1] [http] [" + label + ".localhost] [] []"},
		"a trusted proxy": {Config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, PassAuthorization: true},
			"[1.2.3.4, 127.0.0.1] [https] [a.example] [1.2.3.4] [Basic x]"},
		"a proxy elsewhere": {Config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}, "[127.0.0.1] [http] [" + label + ".localhost] [] []"},
	} {
		addr := serve(t, c.cfg, &one{}, task, nil, NewMetrics(nil))
		if answer := say(t, addr, request); !strings.HasSuffix(answer, c.want) {
			t.Errorf("%s: %q, want %s", name, answer, c.want)
		}
	}
}

// writeCertificate makes a certificate of its own.
func writeCertificate(t *testing.T, dir string, serial int64) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"*.localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for name, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestANewCertificateIsTaken(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := writeCertificate(t, dir, 1)
	m := NewMetrics(nil)
	cert, err := LoadCertificate(certFile, keyFile, zerolog.Nop(), m)
	if err != nil {
		t.Fatal(err)
	}
	cert.every = 0 // each handshake looks
	addr := serve(t, Config{}, &one{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("X-Forwarded-Proto"))
	}), cert, m)
	serial := func(protocols ...string) int64 {
		t.Helper()
		c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, ServerName: label + ".localhost", NextProtos: protocols})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if len(protocols) == 0 {
			fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s.localhost\r\n\r\n", label)
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, _ := io.ReadAll(res.Body); string(b) != "https" {
				t.Errorf("%s: %s", res.Status, b)
			}
		} else if got := c.ConnectionState().NegotiatedProtocol; got != protocols[0] {
			t.Errorf("protocol %q", got)
		}
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	if got := serial(); got != 1 {
		t.Errorf("certificate %d", got)
	}
	if got := serial("h2"); got != 1 {
		t.Errorf("certificate %d", got)
	}
	if err := os.WriteFile(certFile, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := serial(); got != 1 || testutil.ToFloat64(m.BadCert) != 1 {
		t.Errorf("after a broken file: certificate %d, %v failures", got, testutil.ToFloat64(m.BadCert))
	}
	writeCertificate(t, dir, 2)
	if got := serial(); got != 2 {
		t.Errorf("after a new file: certificate %d", got)
	}
	if testutil.ToFloat64(m.Certificate) < float64(time.Now().Unix()) {
		t.Error("no time of its end")
	}
	if _, err := LoadCertificate(keyFile, keyFile, zerolog.Nop(), m); err == nil {
		t.Error("a key is taken for a certificate")
	}
}
