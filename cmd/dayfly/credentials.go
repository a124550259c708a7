package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"dayfly.dev/bus/natsd"
	"dayfly.dev/schemas"
)

// credentials is a file of secrets. That of the core services and the NATS servers
// has the first three; that of a worker has only its own token, which follows from
// the join secret: so an agent needs no registration.
type credentials struct {
	Core   string           `json:"core,omitempty"`   // password of the core services
	Join   string           `json:"join,omitempty"`   // from which the workers' tokens follow
	Routes string           `json:"routes,omitempty"` // by which NATS servers know one another
	Worker schemas.WorkerID `json:"worker,omitempty"`
	Token  string           `json:"token,omitempty"`
}

// newSecret has more bits than anybody can guess, and no character that is special
// anywhere.
func newSecret() string { return strings.ToLower(rand.Text() + rand.Text()) }

func newCredentials() credentials {
	return credentials{Core: newSecret(), Join: newSecret(), Routes: newSecret()}
}

func readCredentials(path string) (c credentials, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return c, &hintError{fmt.Errorf("read credentials: %w", err), "dayfly credentials init FILE makes them"}
	}
	if json.Unmarshal(b, &c) != nil {
		return c, &hintError{fmt.Errorf("%s holds no credentials", path), "dayfly credentials init FILE makes them"}
	}
	return c, nil
}

// readCore reads the file of the core services.
func readCore(path string) (credentials, error) {
	c, err := readCredentials(path)
	if err == nil && (c.Core == "" || c.Join == "" || c.Routes == "") {
		err = &hintError{fmt.Errorf("%s does not hold the core services' credentials", path),
			"the file that dayfly credentials init made; that of a worker is for its agent alone"}
	}
	return c, err
}

// readWorker reads the file of one worker.
func readWorker(path string) (credentials, error) {
	c, err := readCredentials(path)
	if err == nil && (c.Worker == "" || c.Token == "") {
		err = &hintError{fmt.Errorf("%s does not hold a worker's credentials", path),
			"dayfly credentials worker FILE NAME prints them; the core services' own never leave their machines"}
	}
	return c, err
}

// ownCredentials are those of `up`, made once for a data folder.
func ownCredentials(path string) (credentials, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := writeCredentials(path, newCredentials()); err != nil {
			return credentials{}, err
		}
	}
	return readCore(path)
}

func writeCredentials(path string, c credentials) error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(path, append(b, '\n'), 0o600)
}

func (c *cli) credentialsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "credentials",
		Short: "Make the secrets by which services know one another",
		Long: `The core services (gateway, placer, reaper) and the NATS servers share one file of
secrets. Each worker has its own, which lets in its agent and nobody else; a new one
is made without telling anybody. Whoever has the core file may do everything.`,
		Example: `  dayfly credentials init /etc/dayfly/core.json
  dayfly credentials worker /etc/dayfly/core.json lab-3 > lab-3.json`,
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "init FILE",
		Short: "Make the secrets of a new dayfly",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if _, err := os.Lstat(args[0]); err == nil {
				return &hintError{fmt.Errorf("%s is there already", args[0]), "another FILE; with new secrets nobody of the old ones gets in"}
			}
			return writeCredentials(args[0], newCredentials())
		},
	}, &cobra.Command{
		Use:   "worker FILE NAME",
		Short: "Print the secrets of one worker",
		Long: `worker prints the file of one worker, made from the core services' FILE. Keep it
readable for the agent alone: umask 077.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			w, err := schemas.ParseWorkerID(args[1])
			if err != nil || w == natsd.CoreUser {
				return &usageError{errors.New("NAME must be 1 to 63 of a-z, 0-9 and -, and not core"), cmd.CommandPath()}
			}
			core, err := readCore(args[0])
			if err != nil {
				return err
			}
			b, err := json.MarshalIndent(credentials{Worker: w, Token: natsd.WorkerToken(core.Join, w)}, "", "  ")
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.out, "%s\n", b)
			return err
		},
	})
	return cmd
}
