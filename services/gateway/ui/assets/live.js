// Keeps the page as the server would draw it now: an event, or a few seconds, makes the
// page be asked for again, never twice at a time, and what differs is taken over.
import { morph } from "./morph.js";

const pause = 250; // ms between two drawings, however many events there are
const patience = 5000; // ms after which the page is asked for all the same

const main = document.getElementById("main");
const connection = document.getElementById("connection");
let stale = false;
let busy = false;

// Marks the page as out of date.
export function refresh() {
  stale = true;
  if (!busy) draw();
}

async function draw() {
  busy = true;
  stale = false;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.status === 503) throw new Error("it is away"); // what is shown is better than nothing
    if (!answer.headers.get("Content-Type")?.startsWith("text/html")) throw new Error("not a page");
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    await new Promise(requestAnimationFrame);
    document.title = next.title;
    morph(main, next.getElementById("main"));
    say("live");
  } catch {
    say("not connected");
  }
  setTimeout(() => {
    busy = false;
    if (stale) draw();
  }, pause);
}

function say(text) {
  if (connection.textContent !== text) connection.textContent = text;
  connection.classList.toggle("away", text !== "live");
}

// Calls open when the page is seen, and what open returned when it no longer is: a
// browser gives a site few connections, so a page that nobody sees holds none.
export function whileSeen(open) {
  let close = null;
  const seen = (is) => {
    if (is && !close) close = open();
    else if (!is) close = close?.();
  };
  addEventListener("visibilitychange", () => seen(!document.hidden));
  addEventListener("pagehide", () => seen(false));
  addEventListener("pageshow", () => seen(true));
  seen(!document.hidden);
}

// A page that names no events is as it will stay.
export function keepFresh() {
  whileSeen(() => {
    let source = null;
    const look = () => {
      if (main.dataset.events) refresh();
      if (!main.dataset.events || source && source.readyState !== EventSource.CLOSED) return;
      source = new EventSource(main.dataset.events);
      source.addEventListener("open", refresh); // for what came before it
      source.addEventListener("task", refresh);
      source.addEventListener("end", () => source.close());
    };
    look();
    const timer = setInterval(look, patience);
    return () => {
      clearInterval(timer);
      source?.close();
    };
  });
}
