package ingress

import (
	"net"

	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
)

// Kinds of connections from outside to tasks.
const (
	KindHTTP   = "http"
	KindTCP    = "tcp"
	KindTunnel = "tunnel"
)

// Metrics of everything that reaches tasks from outside.
type Metrics struct {
	Requests    *prometheus.HistogramVec // code_class
	Failures    *prometheus.CounterVec   // code
	Open        *prometheus.GaugeVec     // kind
	bytes       *prometheus.CounterVec   // kind, direction
	Certificate prometheus.Gauge
	BadCert     prometheus.Counter
	Ports       prometheus.Gauge
	PortErrors  prometheus.Counter
}

// NewMetrics makes them; reg may be nil.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		Requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "dayfly_ingress_response_seconds",
			Help: "Requests to hostnames of tasks, until the answer began.", Buckets: ops.BucketsFast}, []string{"code_class"}),
		Failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_ingress_failures_total",
			Help: "Requests to hostnames of tasks that dayfly answered itself, by the code of the reason."}, []string{"code"}),
		Open:  prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dayfly_ingress_connections_open", Help: "Connections from outside to tasks, by kind."}, []string{"kind"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_ingress_bytes_total", Help: "Bytes of connections from outside to tasks."}, []string{"kind", "direction"}),
		Certificate: prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_ingress_certificate_expiry_seconds",
			Help: "When the certificate of the ingress ends, in seconds since 1970; 0 without one."}),
		BadCert: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_ingress_certificate_failures_total",
			Help: "New certificates that could not be used; the one before stays."}),
		Ports: prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_ingress_ports_open", Help: "TCP ports of tasks on which this gateway listens."}),
		PortErrors: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_ingress_port_errors_total",
			Help: "Tries to listen on the TCP port of a task that failed."}),
	}
	for _, kind := range []string{KindHTTP, KindTCP, KindTunnel} {
		m.Open.WithLabelValues(kind)
		m.bytes.WithLabelValues(kind, "in")
		m.bytes.WithLabelValues(kind, "out")
	}
	if reg != nil {
		reg.MustRegister(m.Requests, m.Failures, m.Open, m.bytes, m.Certificate, m.BadCert, m.Ports, m.PortErrors)
	}
	return m
}

// Outside counts the bytes of a connection from outside: in is what is read from it.
func (m *Metrics) Outside(c net.Conn, kind string) net.Conn {
	return &counted{Conn: c, read: m.bytes.WithLabelValues(kind, "in"), written: m.bytes.WithLabelValues(kind, "out")}
}

// Inside counts those of a connection to a task: in is what is written to it.
func (m *Metrics) Inside(c net.Conn, kind string) net.Conn {
	return &counted{Conn: c, read: m.bytes.WithLabelValues(kind, "out"), written: m.bytes.WithLabelValues(kind, "in")}
}

type counted struct {
	net.Conn
	read, written prometheus.Counter
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read.Add(float64(n))
	return n, err
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.written.Add(float64(n))
	return n, err
}

// CloseWrite passes a half-close on, where the connection knows it.
func (c *counted) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Conn.Close()
}
