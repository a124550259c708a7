// What a page does beyond what the server drew: it keeps itself up to date, sends its
// forms to the API, shows a log as it comes, and takes keys.
import { keepFresh, refresh } from "./live.js";
import { takeKeys } from "./keys.js";
import { showLog } from "./log.js";

document.documentElement.classList.add("js");

const problem = document.getElementById("problem");

function complain(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

// Resolves to whether the person says yes.
function confirmed(text) {
  if (!text) return Promise.resolve(true);
  const dialog = document.getElementById("confirm");
  document.getElementById("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => {
    dialog.onclose = () => dialog.open || done(dialog.returnValue === "yes"); // it may come late, of the question before
  });
}

// A form of main that posts goes to the API as JSON; the page then asks how things are.
document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.action.includes("/v1/")) return;
  event.preventDefault();
  if (form.ariaBusy === "true" || !(await confirmed(form.dataset.confirm))) return;
  form.ariaBusy = "true";
  complain("");
  try {
    const method = form.dataset.method ?? "POST";
    const ask = method === "DELETE" ? { method } : {
      method,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(Object.fromEntries(new FormData(form))),
    };
    const answer = await fetch(form.action, ask);
    if (!answer.ok) complain((await answer.json()).detail ?? answer.statusText);
  } catch {
    complain("dayfly does not answer; nothing is known of what was asked");
  }
  form.ariaBusy = "false";
  refresh();
});

takeKeys();
showLog(document.querySelector("[data-log]"));
keepFresh();
