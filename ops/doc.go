// Package ops is what every dayfly process does alike: flags that are also
// environment variables, the logger, the metrics registry, and the admin server
// with health checks. It knows no bus and no task.
package ops
