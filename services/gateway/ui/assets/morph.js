// Makes the element old like next with as few changes as there are, so that focus,
// selection and what a person typed stay. Children with an id are found by it, others by
// their place: what may come and go beside others needs an id.
export function morph(old, next) {
  if (old.isEqualNode(next)) return;
  attributes(old, next);
  if (old.matches("[data-log], select, input[type=search]")) return; // these are the browser's own
  const wanted = new Set(Array.from(next.children, (c) => c.id).filter(Boolean));
  const kept = new Map();
  for (const child of Array.from(old.children)) {
    if (!child.id) continue;
    if (wanted.has(child.id)) kept.set(child.id, child);
    else child.remove();
  }
  let at = old.firstChild;
  for (const child of Array.from(next.childNodes)) {
    const same = child.id ? kept.get(child.id) : alike(at, child) ? at : null;
    if (!same) {
      old.insertBefore(document.importNode(child, true), at);
      continue;
    }
    if (child.id) at = skip(at, same, kept);
    if (same === at) at = at.nextSibling;
    else old.insertBefore(same, at);
    if (same.nodeType === Node.ELEMENT_NODE) morph(same, child);
    else if (same.data !== child.data) same.data = child.data;
  }
  while (at) {
    const rest = at.nextSibling;
    at.remove();
    at = rest;
  }
}

// Removes what nobody wants before same: moving same there would lose its focus and scroll.
function skip(at, same, kept) {
  while (at && at !== same && !kept.has(at.id)) {
    const rest = at.nextSibling;
    at.remove();
    at = rest;
  }
  return at;
}

function alike(a, b) {
  return a && a.nodeName === b.nodeName && !a.id && !b.id;
}

function attributes(old, next) {
  for (const { name, value } of next.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const { name } of Array.from(old.attributes)) {
    if (!next.hasAttribute(name)) old.removeAttribute(name);
  }
}
