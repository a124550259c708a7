package main

import (
	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/bus/natsd"
)

// natsMetrics asks the NATS server of this process at each scrape. On a cluster a
// stream is told of by its leader alone, so that sums over the servers are right.
type natsMetrics struct{ *natsd.Server }

var (
	descStored = prometheus.NewDesc("dayfly_jetstream_store_bytes", "Bytes of a stream on the disk.", []string{"stream"}, nil)
	descKept   = prometheus.NewDesc("dayfly_jetstream_messages", "Messages in a stream.", []string{"stream"}, nil)
	descBehind = prometheus.NewDesc("dayfly_jetstream_pending", "Messages of a stream that its consumers have not been given, or not acknowledged.", []string{"stream"}, nil)
	descUsed   = prometheus.NewDesc("dayfly_jetstream_used_bytes", "Bytes on this server's disk.", nil, nil)
	descLimit  = prometheus.NewDesc("dayfly_jetstream_limit_bytes", "Most bytes that this server puts on its disk.", nil, nil)
	descSlow   = prometheus.NewDesc("dayfly_nats_slow_consumers_total", "Connections cut because they did not take what was sent to them.", nil, nil)
	descConns  = prometheus.NewDesc("dayfly_nats_connections", "Connections to this server.", nil, nil)
)

func (m natsMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descStored, descKept, descBehind, descUsed, descLimit, descSlow, descConns} {
		ch <- d
	}
}

func (m natsMetrics) Collect(ch chan<- prometheus.Metric) {
	srv := m.NATS()
	if srv == nil {
		return
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(descConns, float64(srv.NumClients()))
	ch <- prometheus.MustNewConstMetric(descSlow, prometheus.CounterValue, float64(srv.NumSlowConsumers()))
	info, err := srv.Jsz(&natsserver.JSzOptions{Accounts: true, Streams: true, Consumer: true, StreamLeaderOnly: true})
	if err != nil {
		return // it is just ending
	}
	gauge(descUsed, float64(info.Store))
	gauge(descLimit, float64(info.Config.MaxStore))
	for _, account := range info.AccountDetails {
		for _, s := range account.Streams {
			gauge(descStored, float64(s.State.Bytes), s.Name)
			gauge(descKept, float64(s.State.Msgs), s.Name)
			behind := 0.0
			for _, c := range s.Consumer {
				behind += float64(c.NumPending) + float64(c.NumAckPending)
			}
			gauge(descBehind, behind, s.Name)
		}
	}
}
