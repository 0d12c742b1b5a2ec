// Live updates, local time and keys. Everything else works without this script.
// Values of the store are only ever set as text.
"use strict";
const body = document.body, root = body.dataset.root, page = body.dataset.page;
const labels = JSON.parse(body.dataset.labels), $ = (one) => document.querySelector(one);

// Times: UTC as the server writes them, or local.
const zone = $("#zone");
const isLocal = () => localStorage.getItem("openclaw-store-zone") === "local";
function showTimes(part) {
  for (const time of part.querySelectorAll("time")) {
    const at = new Date(time.dateTime);
    if (isNaN(at)) continue;
    time.title = at.toISOString();
    const two = (number) => String(number).padStart(2, "0");
    time.textContent = isLocal()
      ? `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`
      : `${at.toISOString().slice(0, 19).replace("T", " ")} UTC`;
  }
  zone.textContent = isLocal() ? "Local" : "UTC";
}
zone.hidden = false;
zone.onclick = () => { localStorage.setItem("openclaw-store-zone", isLocal() ? "utc" : "local"); showTimes(document); };
showTimes(document);

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    event.preventDefault();
    $("header input")?.focus();
  }
});

// The same page again, without a reload: its main part is replaced.
let loading = false;
async function renew() {
  const main = $("main");
  if (loading || main.contains(document.activeElement) && /^(INPUT|SELECT|BUTTON)$/.test(document.activeElement.tagName)) return;
  loading = true;
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } });
    if (!answer.ok || answer.redirected) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
    showTimes(fresh);
    main.replaceChildren(...fresh.childNodes);
  } finally { loading = false; }
}

function cell(row, text, kind) {
  const made = row.insertCell();
  made.className = kind ?? "";
  if (text !== undefined) made.textContent = text;
  return made;
}

function rowOf(change) {
  const row = document.createElement("tr");
  row.className = "new";
  cell(row, change.revision, "number");
  const time = cell(row).appendChild(document.createElement("time"));
  time.dateTime = change.changed_at;
  const link = cell(row).appendChild(document.createElement("a"));
  link.className = "id";
  link.href = `${root}/${change.item}?id=${encodeURIComponent(change.item_id)}`;
  link.textContent = change.item_id;
  const status = cell(row);
  if (change.to_status) {
    const badge = status.appendChild(document.createElement("span"));
    badge.className = `badge ${change.to_status}`;
    badge.textContent = labels[change.to_status];
  }
  cell(row, change.effect, "text");
  showTimes(row);
  return row;
}

const table = $("#changes"), pause = $("#pause");
if (table) { pause.hidden = false; pause.onclick = () => pause.setAttribute("aria-pressed", pause.ariaPressed !== "true"); }

function show(event) {
  for (const tile of document.querySelectorAll("[data-count]")) {
    const [item, status] = tile.dataset.count.split(".");
    tile.textContent = (event[item][status] ?? 0).toLocaleString("en");
  }
  if (table && pause.ariaPressed !== "true") {
    table.prepend(...event.changes.map(rowOf).reverse());
    while (table.rows.length > 300) table.rows[300].remove();
  }
  if (page === "tasks") $("#news").hidden = false;
  const watched = $("[data-watch]")?.dataset.watch;
  if (event.changes.some((one) => one.item_id === watched || one.node === watched)) renew();
}

if (page !== "login" && page !== "refused") {
  const source = new EventSource(`${root}/events?since=${body.dataset.revision}`), light = $("#live");
  source.onopen = () => { light.hidden = false; };
  source.onerror = () => { light.hidden = true; };
  source.onmessage = (message) => show(JSON.parse(message.data));
  source.addEventListener("reload", () => renew());
  // Heartbeats and progress are no changes.
  const seconds = { overview: 15, nodes: 15, node: 15, task: 3 }[page];
  const isStill = () => document.hidden || page === "task" && !$("main .badge.running");
  if (seconds) setInterval(() => isStill() || renew(), 1000 * seconds);
  addEventListener("pagehide", () => source.close());
}
