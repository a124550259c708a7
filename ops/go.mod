module dayfly.dev/ops

go 1.26.0

