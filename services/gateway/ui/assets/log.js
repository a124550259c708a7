// Shows a log as it comes: what arrives is put in once in a frame, and the oldest goes
// when there is too much of it to show.
import { whileSeen } from "./live.js";

const most = 1 << 20; // characters

export function showLog(place) {
  if (!place) return;
  const pane = place.querySelector("pre");
  const state = place.querySelector(".logstate");
  let complete = false;
  whileSeen(() => {
    if (complete) return null;
    return read(place.dataset.log, pane, (text) => {
      state.textContent = text;
      complete = text === "complete";
    });
  });
}

// Reads the log from its beginning, or from what is shown of it, until it is complete or
// the function that it returns is called.
function read(address, pane, say) {
  const source = new EventSource(address);
  let waiting = [];
  let shown = -1; // nothing yet: what the server drew is the beginning of the same
  let attempt = 0;

  function put() {
    const follow = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 24;
    if (shown < 0) {
      pane.replaceChildren();
      shown = 0;
    }
    const parts = waiting.flatMap((line) => {
      const next = attempt && line.attempt > attempt ? [part("mark", `attempt ${line.attempt}\n`)] : [];
      attempt = line.attempt;
      return [...next, part(line.stream, text(line))];
    });
    waiting = [];
    pane.append(...parts);
    for (const p of parts) shown += p.textContent.length;
    while (shown > most) {
      shown -= pane.firstChild.textContent.length;
      pane.firstChild.remove();
    }
    if (follow) pane.scrollTop = pane.scrollHeight;
  }

  source.addEventListener("open", () => say("follows live"));
  source.addEventListener("error", () => say("not connected"));
  source.addEventListener("log", (event) => {
    if (waiting.push(JSON.parse(event.data)) === 1) requestAnimationFrame(put);
  });
  source.addEventListener("end", () => {
    source.close();
    say("complete");
  });
  return () => source.close();
}

function part(kind, text) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = text;
  return span;
}

const escapes = /\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\))/g;

function text(line) {
  if (!line.base64) return (line.data ?? "").replace(escapes, "");
  const bytes = Uint8Array.from(atob(line.base64), (c) => c.charCodeAt(0));
  return new TextDecoder().decode(bytes).replace(escapes, "");
}
