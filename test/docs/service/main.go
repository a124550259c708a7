// Command service is the program of docs/guides/service.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := client.New(os.Getenv("DAYFLY_URL"))
	if err != nil {
		log.Fatal(err)
	}
	job := schemas.Spec{
		Image: os.Args[1], Command: []string{"sh", "-c", `echo "$ORDER items"`},
		Env: map[string]string{"ORDER": "1834"}, TTL: schemas.Duration(time.Minute),
		OnLost: schemas.OnLostFail, Labels: map[string]string{"order": "1834"},
	}
	const key = "order-1834"
	task, err := c.Create(ctx, job, client.CreateOptions{IdempotencyKey: key})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("accepted", key)
	for line, err := range c.Logs(ctx, task.ID, client.LogOptions{Follow: true}) {
		if err != nil {
			log.Fatal(err)
		}
		text, err := client.LineBytes(line)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %s\n", line.Stream, text)
	}
	if task, err = c.Wait(ctx, task.ID); err != nil {
		log.Fatal(err)
	}
	fmt.Println(task.State, "with exit code", task.Exit.Code)

	again, err := c.Create(ctx, job, client.CreateOptions{IdempotencyKey: key})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("the same task:", again.ID == task.ID)

	job.Network = schemas.NetworkEgress
	_, err = c.Create(ctx, job, client.CreateOptions{})
	var problem *schemas.Error
	if errors.As(err, &problem) {
		fmt.Println("refused:", problem.Code, "in", problem.Field)
	}
}
