module dayfly.dev/services/agent

go 1.26.0

require (
	dayfly.dev/schemas v0.0.0
	dayfly.dev/bus v0.0.0
	dayfly.dev/ops v0.0.0
)

replace (
	dayfly.dev/schemas => ../../schemas
	dayfly.dev/bus => ../../bus
	dayfly.dev/ops => ../../ops
)
