module dayfly.dev/schemas

go 1.26.0

require (
	github.com/distribution/reference v0.6.0
	github.com/docker/go-units v0.5.0
	github.com/go-json-experiment/json v0.0.0-20260820222146-c27c302e5fc3
	github.com/oklog/ulid/v2 v2.1.2
	pgregory.net/rapid v1.3.0
)

require github.com/opencontainers/go-digest v1.0.0 // indirect
