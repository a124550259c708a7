module dayfly.dev/bus

go 1.26.0

require (
	dayfly.dev/schemas v0.0.0
)

replace (
	dayfly.dev/schemas => ../schemas
)
