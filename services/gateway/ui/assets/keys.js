// Keys for those who like them; everything is reachable by Tab too.
const help = document.getElementById("help");

function step(by) {
  const rows = Array.from(document.querySelectorAll("[data-row]"));
  const here = rows.indexOf(document.activeElement);
  const row = rows[here < 0 ? (by > 0 ? 0 : rows.length - 1) : here + by];
  row?.focus();
  row?.scrollIntoView({ block: "nearest" });
  return Boolean(row);
}

const press = (id) => document.getElementById(id)?.click();

const keys = {
  j: () => step(1),
  k: () => step(-1),
  ArrowDown: () => step(1),
  ArrowUp: () => step(-1),
  "/": () => document.getElementById("filter")?.focus(),
  "?": () => help.showModal(),
  t: () => location.assign("/ui/"),
  w: () => location.assign("/ui/workers"),
  e: () => document.getElementById("ttl")?.focus(),
  c: () => press("cancel"),
};

export function takeKeys() {
  document.getElementById("help-button").addEventListener("click", keys["?"]);
  document.addEventListener("keydown", (event) => {
    const { target, key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (target.matches("input, select, textarea")) {
      if (key === "Escape") target.blur();
      return;
    }
    if (target.matches(".log") && key.startsWith("Arrow")) return; // it scrolls
    if (!Object.hasOwn(keys, key)) return;
    if (key.startsWith("Arrow") && !document.querySelector("[data-row]")) return;
    event.preventDefault();
    keys[key]();
  });
}
