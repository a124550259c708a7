package ops

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/pflag"
)

// BindEnv lets the environment set what the command line does not: for a flag
// --log-level and the prefix "DAYFLY" that is DAYFLY_LOG_LEVEL. The flag's help
// names the variable. Call ApplyEnv after parsing.
func BindEnv(fs *pflag.FlagSet, prefix string) {
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Name != "help" {
			f.Usage += " [$" + EnvName(prefix, f.Name) + "]"
		}
	})
}

// ApplyEnv sets the flags that were not given from the environment.
func ApplyEnv(fs *pflag.FlagSet, prefix string) (err error) {
	fs.VisitAll(func(f *pflag.Flag) {
		value, ok := os.LookupEnv(EnvName(prefix, f.Name))
		if !ok || f.Changed || f.Name == "help" || err != nil {
			return
		}
		if e := fs.Set(f.Name, value); e != nil {
			err = fmt.Errorf("environment variable %s: %w", EnvName(prefix, f.Name), e)
		}
	})
	return err
}

// EnvName is the environment variable of a flag.
func EnvName(prefix, flag string) string {
	return prefix + "_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}
