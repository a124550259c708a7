// Package prometheus has no code: its tests check rules.yml with promtool, and that the
// runbook says what to do about each alert.
package prometheus
