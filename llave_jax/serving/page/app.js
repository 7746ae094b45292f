// The page: what is searched for, its place in the address, and what is shown for it.
//
// A search is {text, like, image, where, k}. All but the image is kept in the address after #, so that it can be
// linked. Images stay in this tab, for Back.

import { Filters, isEmpty, understood } from "./filters.js";
import { imageIn, readImage } from "./pictures.js";
import { Results, titleOf } from "./results.js";
import { Server, ServerError } from "./server.js";

const PAGE_OF_RESULTS = 40;

const $ = (id) => document.getElementById(id);
const subject = { box: $("subject"), image: $("subject").querySelector("img"), name: $("subject").querySelector("span") };
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

const server = new Server({ wait: waitFor, askKey });
const results = new Results($("results"), $("detail"), $("card"), {
  picture: (path) => server.picture(path),
  like: (result) => searchLike(result),
});
const filters = new Filters($("filters"), (where) => go({ ...typed(), where }));

let index = null;
let started = null;
let search = { text: "", like: "", image: null, where: {}, k: PAGE_OF_RESULTS };
let running = new AbortController();
// What this tab remembers: images by number, and results that were chosen, for their names and pictures.
const images = [];
const chosen = new Map();

// The address.

function addressOf({ text, like, image, where, k }) {
  const parts = new URLSearchParams();
  if (text) parts.set("text", text);
  if (like) parts.set("like", like);
  if (image) parts.set("image", "1");
  if (!isEmpty(where)) parts.set("where", JSON.stringify(where));
  if (k !== PAGE_OF_RESULTS) parts.set("k", k);
  return `#${parts}`;
}

/** The search of the address; `lost` if it had an image that is not here. */
function searchOfAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  let where = {};
  try {
    where = understood(JSON.parse(parts.get("where") ?? "{}"), index.columns);
  } catch {
    // A link that was cut off.
  }
  const image = parts.has("image") ? (images[history.state?.image] ?? null) : null;
  const k = Math.min(Math.max(1, parseInt(parts.get("k")) || PAGE_OF_RESULTS), index.limits.results);
  const like = image ? "" : (parts.get("like") ?? "");
  const text = like ? "" : (parts.get("text") ?? "");
  return { text, like, image, where, k, lost: parts.has("image") && !image };
}

/** Searches, and keeps the search in the address. */
function go(next, { replace = false } = {}) {
  const address = addressOf(next);
  const state = { image: next.image ? images.indexOf(next.image) : null };
  const same = address === addressOf(search) && next.image === search.image;
  history[same || replace ? "replaceState" : "pushState"](state, "", address);
  return run(next);
}

/** The search with the words that are in the box now, and from its first results on. */
function typed() {
  const text = $("text").value.trim();
  return { ...search, text, like: text ? "" : search.like, k: PAGE_OF_RESULTS };
}

function setText(text) {
  $("text").value = text;
  $("text").classList.toggle("long", text.length > 44);
}

// Searching.

async function run(next) {
  search = next;
  running.abort();
  running = new AbortController();
  const { signal } = running;
  showQuery();
  hideNotice();
  if (!index.items) return showEmpty();
  if (next.lost && !next.text) return showLost();
  const { text, like, image, where, k } = next;
  if (!text && !like && !image) return showStart();
  busy(true);
  const body = { k, ...(isEmpty(where) ? {} : { where }) };
  // The item itself is the most similar one, and is left out.
  if (like) Object.assign(body, { like, k: Math.min(k + 1, index.limits.results) });
  if (text) body.text = text;
  if (image) body.image = image.uri;
  try {
    const answer = await server.json("search", { body, signal });
    await showResults(answer, next);
  } catch (error) {
    if (!signal.aborted) showError(error);
  } finally {
    if (!signal.aborted) busy(false);
  }
}

function searchLike(result) {
  chosen.set(result.id, result);
  scrollTo({ top: 0 });
  return go({ ...search, text: "", like: result.id, image: null, k: PAGE_OF_RESULTS }).then(() => results.focus(0));
}

async function searchImage(file) {
  await started;
  if (!index) return;
  try {
    const image = await readImage(file, index.limits);
    images.push(image);
    await go({ ...typed(), like: "", image });
  } catch (error) {
    showNotice("That is no image", error.message);
  }
}

function removeSubject() {
  $("text").focus();
  return go({ ...typed(), like: "", image: null });
}

// What is shown.

function showQuery() {
  const { text, like, image, where } = search;
  setText(text);
  $("text").placeholder = image ? "Add words, if you like" : like ? "Or describe what you look for" : "Describe what you look for";
  subject.box.hidden = !like && !image;
  subject.image.hidden = true;
  subject.image.removeAttribute("src");
  const name = image ? image.name : `like ${like}`;
  subject.name.textContent = subject.name.title = name;
  if (image) showSubject(image.shown);
  else if (chosen.has(like)) showChosen(chosen.get(like));
  filters.show(where);
  const sought = text || (image ? image.name : like);
  document.title = sought ? `${sought.slice(0, 80)} – llave search` : "llave search";
}

function showSubject(address) {
  subject.image.src = address;
  subject.image.hidden = false;
}

/** Shows which item the results are like. */
function showChosen(result) {
  subject.name.textContent = subject.name.title = `like ${titleOf(result)}`;
  if (!result.thumbnail) return;
  const shows = (address) => search.like === result.id && showSubject(address);
  server.picture(result.thumbnail).then(shows, () => {});
}

async function showResults(answer, shown) {
  const { like, k, where, lost } = shown;
  const self = answer.results.find((result) => result.id === like);
  if (self && !chosen.has(like)) {
    chosen.set(like, self);
    showChosen(self);
  }
  const found = answer.results.filter((result) => result.id !== like).slice(0, k);
  const several = Object.keys(index.kinds).length > 1;
  await results.show(found, { kinds: several });
  if (search !== shown) return;
  const milliseconds = Math.max(1, Math.round(1000 * answer.search_seconds));
  $("status").textContent = found.length ? `${plural(found.length, "result")} · ${milliseconds} ms` : "No results";
  $("more").hidden = found.length < k || k >= index.limits.results;
  if (lost) showNotice("", "This search also had an image, which a link does not hold: drop it once more.");
  if (found.length) return;
  if (isEmpty(where)) showNotice("Nothing was found", "The index holds nothing that can be compared with this.");
  else showNotice("Nothing passes these filters", "The search itself may well have results.", { label: "Remove the filters", action: () => go({ ...search, where: {} }) });
}

function showStart() {
  busy(false);
  $("more").hidden = true;
  const several = Object.keys(index.kinds).length > 1;
  const shown = index.examples;
  $("status").textContent = `Type, drop or paste an image, or begin with one of these ${shown.length}.`;
  return results.show(shown, { kinds: several });
}

function showEmpty() {
  results.clear();
  $("status").textContent = "0 items";
  const command = "python -m llave_jax.index add --index INDEX --input photos/";
  showNotice("The index is empty", "Add images, texts or videos to it; this page sees them at once.", { command, label: "Look again", action: start });
}

function showLost() {
  results.clear();
  $("status").textContent = "";
  showNotice("The image of this search is not here", "A link does not hold images, and they are forgotten when the page is loaded again. Drop it once more.");
}

function showError(error) {
  results.clear();
  $("more").hidden = true;
  $("status").textContent = "";
  if (!(error instanceof ServerError)) throw error;
  if (error.code === "no_index") {
    const command = "python -m llave_jax.index build --model MODEL --input photos/ --output my.lance\npython -m llave_jax.serve --model MODEL --index my.lance";
    showNotice("This server has no index to search", "It answers /v1/embeddings. To search, make an index and serve it:", { command });
  } else if (error.code === "not_found" && search.like) {
    showNotice("That item is no longer in the index", "It was deleted, or the link is of another index.");
  } else {
    const headings = { 401: "No API key", 400: "The server cannot use that", 413: "That is too large" };
    const again = index ? () => run(search) : start;
    showNotice(headings[error.status] ?? "The search failed", error.message, { label: "Try again", action: again });
  }
}

function showNotice(heading, text, { command = "", label = "", action = null } = {}) {
  const [h2, p, pre, button] = $("notice").children;
  h2.textContent = heading;
  h2.hidden = !heading;
  p.textContent = text;
  pre.textContent = command;
  pre.hidden = !command;
  button.textContent = label;
  button.hidden = !label;
  button.onclick = action;
  $("notice").hidden = false;
}

function hideNotice() {
  $("notice").hidden = true;
}

function busy(is) {
  document.body.classList.toggle("busy", is);
  $("results").setAttribute("aria-busy", is);
}

// Waiting and keys, for the server's requests.

async function waitFor({ seconds, reason, message, signal }) {
  const headings = { gone: "The server does not answer", busy: "The server is busy", loading: "The server is not ready yet" };
  const said = message ? `${message[0].toUpperCase()}${message.slice(1)}. ` : "";
  // Not read aloud each second.
  const left = document.createElement("span");
  left.setAttribute("aria-hidden", "true");
  const end = performance.now() + 1000 * seconds;
  await new Promise((resolve) => {
    const tick = () => {
      const seconds = Math.ceil((end - performance.now()) / 1000);
      if (seconds <= 0 || signal?.aborted) return done();
      left.textContent = `Trying again in ${seconds} s.`;
    };
    const done = () => {
      clearInterval(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setInterval(tick, 250);
    showNotice(headings[reason], said, { label: "Try now", action: done });
    $("notice").children[1].append(left);
    tick();
    signal?.addEventListener("abort", done);
  });
  if (!signal?.aborted) hideNotice();
}

function askKey(wrong) {
  const dialog = $("key");
  const [form, input] = [dialog.querySelector("form"), dialog.querySelector("input")];
  dialog.querySelector(".wrong").hidden = !wrong;
  input.value = "";
  dialog.returnValue = "";
  form.onsubmit = (event) => {
    event.preventDefault();
    dialog.close("given");
  };
  dialog.querySelector(".close").onclick = () => dialog.close();
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      resolve(dialog.returnValue === "given" ? input.value.trim() : null);
      input.value = "";
    };
  });
}

// The user.

$("query").addEventListener("submit", async (event) => {
  event.preventDefault();
  await started;
  if (index) go(typed());
});
$("text").addEventListener("input", () => setText($("text").value));
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) searchImage(file);
  $("file").value = "";
});
subject.box.querySelector("button").addEventListener("click", removeSubject);
$("more").addEventListener("click", () => go({ ...search, k: Math.min(search.k + PAGE_OF_RESULTS, index.limits.results) }, { replace: true }));
$("home").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey || !index) return;
  event.preventDefault();
  go({ text: "", like: "", image: null, where: {}, k: PAGE_OF_RESULTS });
});
$("results").addEventListener("leave", () => $("text").focus());
addEventListener("popstate", () => index && run(searchOfAddress()));

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("text").focus();
    $("text").select();
  } else if (event.key === "ArrowDown" && event.target === $("text")) {
    if (results.focus(0)) event.preventDefault();
  } else if (event.key === "Escape" && (search.image || search.like) && !(typing && event.target.value)) {
    removeSubject();
  } else if (event.key === "Escape" && !typing) {
    $("text").focus();
  }
});

addEventListener("paste", (event) => {
  const file = imageIn(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  searchImage(file);
});

let inside = 0;
const dropZone = (shown) => ($("drop").hidden = !shown);
addEventListener("dragenter", (event) => {
  if (event.dataTransfer.types.includes("Files")) dropZone(++inside > 0);
});
addEventListener("dragleave", (event) => {
  if (event.dataTransfer.types.includes("Files")) dropZone((inside = Math.max(0, inside - 1)) > 0);
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dropZone((inside = 0));
  const file = imageIn(event.dataTransfer);
  if (file) searchImage(file);
  else showNotice("That is no file", "This page fetches nothing from other sites: save the image, then drop the file.");
});

function start() {
  return (started = begin());
}

async function begin() {
  busy(true);
  try {
    index = await server.json("index");
  } catch (error) {
    busy(false);
    return showError(error);
  }
  busy(false);
  const counts = Object.entries(index.kinds).sort(([, a], [, b]) => b - a);
  index.kinds = Object.fromEntries(counts);
  const kinds = counts.map(([kind, count]) => (kind === "mixed" ? `${count.toLocaleString("en")} mixed` : plural(count, kind)));
  $("facts").textContent = `${kinds.join(", ") || "0 items"} · ${index.model}`;
  filters.build(index);
  const words = $("text").value;
  const shown = run(searchOfAddress());
  if (words) setText(words);
  return shown;
}

// A keyboard on the screen would hide the results.
if (matchMedia("(hover: hover)").matches) $("text").focus();
// What is typed until the server answers stays.
setText(new URLSearchParams(location.hash.slice(1)).get("text") ?? "");
start();
