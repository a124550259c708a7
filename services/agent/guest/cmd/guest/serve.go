package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func flaky(a []string) int {
	const path = "/tmp/runs"
	b, _ := os.ReadFile(path)
	run, _ := strconv.Atoi(string(b))
	run++
	if err := os.WriteFile(path, []byte(strconv.Itoa(run)), 0o600); err != nil {
		return report("count", err)
	}
	fmt.Printf("run %d\n", run)
	if run <= num(a, 0, 1) {
		return num(a, 1, 1)
	}
	fmt.Println("ready")
	time.Sleep(dur(a, 2, 0))
	return 0
}

func serveHTTP(a []string) int {
	began := time.Now()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") })
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(num([]string{r.PathValue("code")}, 0, 200))
	})
	mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/until/{d}", func(w http.ResponseWriter, r *http.Request) {
		if time.Since(began) > dur([]string{r.PathValue("d")}, 0, 0) {
			w.WriteHeader(http.StatusInternalServerError)
		}
	})
	time.Sleep(dur(a, 1, 0))
	addr := arg(a, 0, "8080")
	if !strings.Contains(addr, ":") {
		addr = "127.0.0.1:" + addr
	}
	l, err := net.Listen("tcp4", addr)
	if err != nil {
		return report("listen", err)
	}
	fmt.Println("ready")
	return report("serve", http.Serve(l, mux))
}

func serveTCP(a []string) int {
	l, err := net.Listen("tcp4", "127.0.0.1:"+arg(a, 0, "8080"))
	if err != nil {
		return report("listen", err)
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return report("accept", err)
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}
