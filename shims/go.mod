module dayfly.dev/shims

go 1.26.0

require (
	dayfly.dev/client v0.0.0
	dayfly.dev/schemas v0.0.0
	github.com/go-json-experiment/json v0.0.0-20260820222146-c27c302e5fc3
)

require (
	github.com/coder/websocket v1.8.15 // indirect
	github.com/distribution/reference v0.6.0 // indirect
	github.com/docker/go-units v0.5.0 // indirect
	github.com/oklog/ulid/v2 v2.1.2 // indirect
	github.com/opencontainers/go-digest v1.0.0 // indirect
)

replace (
	dayfly.dev/client => ../client
	dayfly.dev/schemas => ../schemas
)
