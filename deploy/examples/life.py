#!/usr/bin/env python3
"""A task's whole life over the API, with nothing but Python's standard library: create with
an Idempotency-Key, wait, events, follow the log, extend, cancel, a batch, a callback
whose signature is checked, errors. It needs an image with a shell:

    dayfly up --callback-allow 127.0.0.1/32
    life.py busybox
"""

import hmac
import http.server
import json
import os
import queue
import secrets
import sys
import threading
import time
import urllib.error
import urllib.request

API = os.environ.get("DAYFLY_URL", "http://127.0.0.1:8080") + "/v1"


class Problem(Exception):
    """What the API refuses: tell such errors apart by their code."""

    def __init__(self, status, body):
        super().__init__(f"{status} {body.get('code')}: {body.get('detail')}")
        self.status, self.code, self.field = status, body.get("code"), body.get("field")


def send(method, path, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(API + path, data, {k.replace("_", "-"): v for k, v in headers.items()}, method=method)
    if data is not None:
        request.add_header("Content-Type", "application/json")
    try:
        return urllib.request.urlopen(request, timeout=90)
    except urllib.error.HTTPError as e:
        raise Problem(e.code, json.loads(e.read() or b"{}")) from None


def call(method, path, body=None, **headers):
    """Asks again while the API is away. That is safe: a POST has its key, and 503 with
    unavailable says that nothing was done."""
    for wait in (0.2, 0.5, 1, 2, 4, None):
        try:
            with send(method, path, body, **headers) as answer:
                return json.load(answer), answer.headers
        except (Problem, urllib.error.URLError) as e:
            again = e.status in (429, 503) if isinstance(e, Problem) else True
            if not again or wait is None:
                raise
        time.sleep(wait)


def refused(status, code, *request, **headers):
    try:
        call(*request, **headers)
    except Problem as e:
        assert (e.status, e.code) == (status, code), e
        return e
    raise AssertionError(f"{request} was taken")


def follow(path, accept):
    """Gives the lines of a stream as they come, to its end; a thread reads them."""
    lines = queue.Queue()

    def read():
        try:
            with send("GET", path, Accept=accept) as answer:
                for line in answer:
                    lines.put(line.decode().rstrip("\n"))
        finally:
            lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return iter(lambda: lines.get(timeout=60), None)


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes callbacks: a good signature, and each delivery once."""

    secret, seen, fresh = secrets.token_hex(16), set(), queue.Queue()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        at, signature = (part.split("=", 1)[1] for part in self.headers["Dayfly-Signature"].split(","))
        want = hmac.new(self.secret.encode(), at.encode() + b"." + body, "sha256").hexdigest()
        good = hmac.compare_digest(signature, want) and abs(time.time() - int(at)) < 300
        if good and self.headers["Dayfly-Delivery"] not in self.seen:
            self.seen.add(self.headers["Dayfly-Delivery"])
            self.fresh.put(json.loads(body))
        self.send_response(204 if good else 403)
        self.end_headers()

    def log_message(self, *_):
        pass


def main(image):
    key = f"life-{secrets.token_hex(8)}"
    spec = {"image": image, "command": ["sh", "-c", "for n in 1 2 3; do echo line $n; done; exec sleep 600"],
            "ttl": "5m", "labels": {"by": "python"}}
    task, _ = call("POST", "/tasks", spec, Idempotency_Key=key)
    again, headers = call("POST", "/tasks", spec, Idempotency_Key=key)
    assert again["id"] == task["id"] and headers["Idempotency-Replayed"] == "true"
    path = "/tasks/" + task["id"]
    print(task["id"], "was created once")

    log = follow(path + "/logs?follow=1", "application/x-ndjson")
    events = follow(path + "/events", "text/event-stream")
    task, headers = call("GET", path + "?wait=running&timeout=60s")
    assert task["state"] == "running", task
    print("it runs")

    while True:  # only if it is as we saw it
        try:
            longer, _ = call("POST", path + "/extend", {"ttl": "15m"}, If_Match=headers["ETag"])
            break
        except Problem as e:
            if e.code != "precondition_failed":
                raise
            task, headers = call("GET", path)
    assert longer["expires_at"] > task["expires_at"]
    print("it has more time, until", longer["expires_at"])

    wrote = ""
    while not wrote.endswith("line 3\n"):
        wrote += json.loads(next(log))["data"]
    call("DELETE", path + "?grace=1s")
    task, _ = call("GET", path + "?wait=done&timeout=60s")
    assert task["state"] == "canceled", task
    assert wrote == "line 1\nline 2\nline 3\n" and list(log) == [], wrote
    states = [json.loads(line[6:]).get("state") for line in events if line.startswith("data: ")]
    assert [s for s in ("queued", "assigned", "running", "canceled") if s in states] == ["queued", "assigned", "running", "canceled"], states
    print("it was canceled; its log and its events ended with it")

    assert refused(422, "invalid_value", "POST", "/tasks", {"image": image, "ttl": "0s"}).field == "ttl"
    refused(409, "state_conflict", "POST", path + "/extend", {"ttl": "1h"})
    refused(404, "not_found", "GET", "/tasks/t-01jd0000000000000000000000")
    refused(422, "idempotency_reused", "POST", "/tasks", {"image": "other"}, Idempotency_Key=key)
    print("what cannot be was refused")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/done"
    forged = urllib.request.Request(url, b"{}", {"Dayfly-Signature": f"t={int(time.time())},v1=00", "Dayfly-Delivery": "forged"})
    try:
        urllib.request.urlopen(forged, timeout=10)
        raise AssertionError("a forged callback was taken")
    except urllib.error.HTTPError as e:
        assert e.code == 403, e
    batch, _ = call("POST", "/batches", {
        "template": {"image": image, "command": ["sh", "-c", "exit $CODE"], "ttl": "1m", "env": {"CODE": "0"}},
        "items": [{"name": "good"}, {"name": "better"}, {"name": "bad", "env": {"CODE": "3"}}],
        "labels": {"by": "python"},
        "callback": {"url": url, "secret": Receiver.secret},
    }, Idempotency_Key=key)
    done = Receiver.fresh.get(timeout=60)
    assert done["id"] == batch["id"] and done["counts"] == {"completed": 2, "failed": 1}, done
    items, _ = call("GET", f"/batches/{batch['id']}/items")
    assert [(i["name"], i["state"]) for i in items["items"]] == [("good", "completed"), ("better", "completed"), ("bad", "failed")], items
    listed, _ = call("GET", "/batches?limit=1000")
    assert batch["id"] in [b["id"] for b in listed["items"]]
    server.shutdown()
    print("the batch", batch["id"], "is done, and said so with a good signature")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: life.py IMAGE")
    main(sys.argv[1])
