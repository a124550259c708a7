// Web is what the tests reach through the ingress: a web server that says what it was
// asked, in an image without anything else. It listens on 127.0.0.1 alone.
//
//	/headers       the request as it came, as JSON
//	/echo          the body back, as it comes
//	/bytes/{n}     n bytes
//	/count         reads the body and says how long it was
//	/sse/{n}       n events, each after the client has asked for it at /next
//	/ws            a WebSocket that sends back what comes
//	/trailer       an answer with a trailer
//	/cookies       sets cookies, some for the whole domain
//	/hang          an answer that never comes
//	/cut           half of an answer
//
// On a port that is given as echo:PORT it sends back what comes, and after the end of that
// how many bytes it was.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"

	"github.com/coder/websocket"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "web PORT…")
		os.Exit(64)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	failed := make(chan error)
	for _, port := range os.Args[1:] {
		number, echoes := strings.CutPrefix(port, "echo:")
		l, err := net.Listen("tcp4", "127.0.0.1:"+number)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if echoes {
			go func() { failed <- echo(l) }()
			continue
		}
		go func() { failed <- (&http.Server{Handler: handler(), Protocols: protocols}).Serve(l) }()
	}
	fmt.Println("ready")
	fmt.Fprintln(os.Stderr, <-failed)
	os.Exit(1)
}

func echo(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if n, err := io.Copy(c, c); err == nil {
				fmt.Fprintf(c, "%d bytes", n)
			}
		}()
	}
}

func handler() http.Handler {
	mux := http.NewServeMux()
	next := make(chan struct{}, 1024)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{"host": r.Host, "uri": r.RequestURI, "proto": r.Proto, "method": r.Method, "header": r.Header})
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		_ = control.EnableFullDuplex()
		b := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(b)
			if _, failed := w.Write(b[:n]); failed != nil || control.Flush() != nil || err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/bytes/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.CopyN(w, zeros{}, n)
	})
	mux.HandleFunc("/count", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, n, err)
	})
	mux.HandleFunc("/next", func(http.ResponseWriter, *http.Request) { next <- struct{}{} })
	mux.HandleFunc("/sse/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("n"))
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range n {
			fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(16 << 20)
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), kind, b) != nil {
				return
			}
		}
	})
	mux.HandleFunc("/trailer", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprintln(w, "body")
		w.Header().Set("X-Sum", "42")
	})
	mux.HandleFunc("/cookies", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Set-Cookie", "a=1; Path=/; Domain=localhost; HttpOnly")
		w.Header().Add("Set-Cookie", "b=2; domain = .localhost")
		w.Header().Set("Clear-Site-Data", `"cookies"`)
	})
	mux.HandleFunc("/hang", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/cut", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		fmt.Fprint(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	return mux
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, errors.New("an empty buffer")
	}
	clear(p)
	return len(p), nil
}
