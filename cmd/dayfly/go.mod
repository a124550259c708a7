module dayfly.dev/cmd/dayfly

go 1.26.0

require (
	dayfly.dev/schemas v0.0.0
	dayfly.dev/bus v0.0.0
	dayfly.dev/ops v0.0.0
	dayfly.dev/services/gateway v0.0.0
	dayfly.dev/services/placer v0.0.0
	dayfly.dev/services/agent v0.0.0
	dayfly.dev/services/reaper v0.0.0
	dayfly.dev/client v0.0.0
)

replace (
	dayfly.dev/schemas => ../../schemas
	dayfly.dev/bus => ../../bus
	dayfly.dev/ops => ../../ops
	dayfly.dev/services/gateway => ../../services/gateway
	dayfly.dev/services/placer => ../../services/placer
	dayfly.dev/services/agent => ../../services/agent
	dayfly.dev/services/reaper => ../../services/reaper
	dayfly.dev/client => ../../client
)
