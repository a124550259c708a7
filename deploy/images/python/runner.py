"""Runs the script of a task of the kind "python".

The payload is in /task/input/task.json: {"script": TEXT} or {"script_base64": BYTES}, and
"args". The script takes this program's place, so its output and its exit code are the task's.
"""
import base64
import json
import os
import sys

with open("/task/input/task.json", "rb") as f:
    payload = json.load(f)
script = payload.get("script")
if script is None:
    source = base64.b64decode(payload["script_base64"])
else:
    source = script.encode()
with open("/tmp/main.py", "wb") as f:
    f.write(source)
os.execv(sys.executable, [sys.executable, "-u", "/tmp/main.py"] + payload.get("args", []))
