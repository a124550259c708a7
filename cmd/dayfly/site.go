package main

import (
	"context"
	"errors"
)

// up runs the site.
func (c *cli) up(context.Context, upConfig) error {
	return errors.New("this build has no services yet")
}
