// The grid of results, moving in it by keys, and the view of one result.

import { isEmpty } from "./filters.js";

// Pictures up to this size, in pixels, are shown in whole multiples of their pixels.
const TINY = 60;
const [NARROWEST, WIDEST] = [0.56, 2.4];
// So long the old results stay while the pictures of the new ones arrive.
const PATIENCE = 1000;

/** What a result is called. */
export function titleOf(result) {
  return result.text.trim() || result.name || result.id;
}

/**
 * The results in `list` and the dialog `detail`.
 *
 * picture(path) gives the address of a thumbnail, like(result) searches for more like one.
 */
export class Results {
  #results = [];
  #cards = [];
  // The latest cards, which may not be shown yet.
  #making = [];
  #current = 0;
  #shown = 0;
  #turn = 0;

  constructor(list, detail, template, { picture, like }) {
    this.list = list;
    this.detail = detail;
    this.template = template;
    this.picture = picture;
    this.like = like;
    list.addEventListener("keydown", (event) => this.#key(event));
    list.addEventListener("focusin", (event) => this.#visit(this.#cards.indexOf(event.target.closest("li"))));
    detail.addEventListener("keydown", (event) => this.#detailKey(event));
    detail.addEventListener("click", (event) => event.target === detail && detail.close());
    // The browser gives the focus to the result that was opened first; others may have been shown since.
    detail.addEventListener("close", () => this.focus(this.#shown));
    const on = (name, action) => detail.querySelector(`.${name}`).addEventListener("click", action);
    on("like", () => this.#likeIt());
    on("previous", () => this.#step(-1));
    on("next", () => this.#step(1));
    on("close", () => detail.close());
  }

  /** Shows results in place of the ones before; resolves when they are there. */
  async show(results, { kinds = false } = {}) {
    const turn = this.#begin();
    const folders = new Set(results.map(folderOf));
    const cards = results.map((result) => this.#card(result, kinds, folders.size > 1));
    this.#making = cards;
    await Promise.race([
      Promise.all(cards.map((card) => card.loaded)),
      new Promise((resolve) => setTimeout(resolve, PATIENCE)),
    ]);
    if (turn !== this.#turn) return;
    this.#results = results;
    this.#cards = cards;
    this.list.classList.toggle("texts", results.length > 0 && results.every((result) => result.kind === "text"));
    this.#arrange();
    this.list.replaceChildren(...cards);
    this.#current = 0;
    cards.forEach((card, place) => this.#reachable(card, place === 0));
  }

  /** A grid of equal cells if all pictures that have arrived are tiny. */
  #arrange() {
    const arrived = this.#cards.filter((card) => card.arrived);
    const tiny = arrived.length > 0 && arrived.every((card) => card.classList.contains("tiny"));
    this.list.classList.toggle("scans", tiny);
  }

  /** Pictures that nobody will see must not hold up others: browsers load a few at a time. */
  #begin() {
    for (const card of this.#making) {
      if (!card.arrived) card.querySelector("img")?.removeAttribute("src");
    }
    this.#making = [];
    return ++this.#turn;
  }

  clear() {
    this.#begin();
    this.#results = this.#cards = [];
    this.list.replaceChildren();
  }

  /** Moves the focus to a result; false if there is none. */
  focus(place) {
    const card = this.#cards[place];
    card?.querySelector(".open").focus();
    return card !== undefined;
  }

  #card(result, kinds, folders) {
    const card = this.template.content.cloneNode(true).firstElementChild;
    const part = (name) => card.querySelector(`.${name}`);
    const open = part("open");
    card.dataset.kind = result.kind;
    const title = result.kind === "text" ? result.name || result.id : titleOf(result);
    part("title").textContent = part("title").title = title;
    const values = isEmpty(result.metadata) && folders ? [folderOf(result)] : valuesOf(result);
    part("values").textContent = part("values").title = values.join(" · ");
    let spoken = `${titleOf(result).slice(0, 200)}, ${result.kind}`;
    if (result.score === undefined) {
      part("score").remove();
    } else {
      part("score").textContent = result.score.toFixed(3);
      part("score").title = `cosine similarity ${result.score}`;
      card.style.setProperty("--score", Math.max(0, result.score));
      spoken += `, score ${result.score.toFixed(3)}`;
    }
    open.setAttribute("aria-label", spoken);
    open.addEventListener("click", () => this.open(this.#cards.indexOf(card)));
    part("like").setAttribute("aria-label", `More like ${titleOf(result).slice(0, 200)}`);
    part("like").addEventListener("click", () => this.like(result));
    if (kinds && result.kind !== "image") {
      const badge = document.createElement("span");
      badge.className = "badge";
      badge.textContent = result.kind;
      part("frame").append(badge);
    }
    if (result.thumbnail) card.loaded = this.#pictureIn(open, card, result);
    else {
      open.append(wordsOf(result, card));
      card.arrived = true;
    }
    return card;
  }

  async #pictureIn(open, card, result) {
    const image = document.createElement("img");
    image.alt = "";
    image.draggable = false;
    open.append(image);
    try {
      await load(image, await this.picture(result.thumbnail));
      const [width, height] = [image.naturalWidth, image.naturalHeight];
      const ratio = Math.min(WIDEST, Math.max(NARROWEST, width / height));
      card.style.setProperty("--ratio", ratio);
      const scale = tinyScale(image, Math.min(120, (this.list.clientWidth - 20) / 3));
      if (scale) {
        card.classList.add("tiny");
        card.style.setProperty("--width", `${width * scale}px`);
      }
    } catch {
      image.replaceWith(wordsOf(result, card));
    }
    card.arrived = true;
    if (this.#cards.includes(card)) this.#arrange();
  }

  #reachable(card, yes) {
    for (const button of card.querySelectorAll("button")) button.tabIndex = yes ? 0 : -1;
  }

  #visit(place) {
    if (place < 0 || place === this.#current) return;
    this.#reachable(this.#cards[this.#current], false);
    this.#reachable(this.#cards[place], true);
    this.#current = place;
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.#cards.length - 1;
    const place = {
      ArrowLeft: () => this.#current - 1,
      ArrowRight: () => this.#current + 1,
      ArrowUp: () => this.#beside(-1),
      ArrowDown: () => this.#beside(1),
      Home: () => 0,
      End: () => last,
    }[event.key]?.();
    if (event.key === "m") {
      event.preventDefault();
      this.like(this.#results[this.#current]);
    } else if (place !== undefined) {
      event.preventDefault();
      if (place < 0 && event.key === "ArrowUp") this.list.dispatchEvent(new Event("leave"));
      else this.focus(Math.min(last, Math.max(0, place)));
    }
  }

  /** The nearest card of the row above (-1) or below (1); -1 above the first row. */
  #beside(direction) {
    const boxes = this.#cards.map((card) => card.getBoundingClientRect());
    const here = boxes[this.#current];
    const middle = here.left + here.width / 2;
    const rows = boxes.map((box) => direction * (box.top - here.top)).filter((distance) => distance > 1);
    if (!rows.length) return direction < 0 ? -1 : this.#current;
    const row = Math.min(...rows);
    let [best, least] = [this.#current, Infinity];
    boxes.forEach((box, place) => {
      const aside = Math.abs(box.left + box.width / 2 - middle);
      if (Math.abs(direction * (box.top - here.top) - row) < 1 && aside < least) [best, least] = [place, aside];
    });
    return best;
  }

  /** Shows one result in the dialog. */
  open(place) {
    const result = this.#results[place];
    if (!result) return;
    this.#shown = place;
    const part = (name) => this.detail.querySelector(name);
    const box = part(".picture");
    part("h2").textContent = result.name || (result.kind === "text" ? "Text" : result.id);
    part(".text").textContent = result.text;
    part(".text").hidden = !result.text.trim();
    const rows = [...Object.entries(result.metadata), ["id", result.id], ["kind", result.kind]];
    if (result.score !== undefined) rows.push(["score", result.score]);
    part("dl").replaceChildren(...rows.flatMap(([name, value]) => [cell("dt", name), cell("dd", readable(value))]));
    box.replaceChildren();
    box.hidden = !result.thumbnail;
    if (result.thumbnail) this.#enlarge(box, result);
    part(".previous").disabled = place === 0;
    part(".next").disabled = place === this.#results.length - 1;
    if (!this.detail.open) this.detail.showModal();
    part(".words").scrollTop = 0;
  }

  async #enlarge(box, result) {
    const image = document.createElement("img");
    image.alt = titleOf(result).slice(0, 500);
    box.append(image);
    try {
      await load(image, await this.picture(result.thumbnail));
      const scale = tinyScale(image, 280);
      image.classList.toggle("tiny", scale > 0);
      if (scale) image.style.setProperty("--width", `${image.naturalWidth * scale}px`);
    } catch {
      if (image.parentNode === box) box.hidden = true;
    }
  }

  #detailKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      event.preventDefault();
      this.#step(step);
    } else if (event.key === "m") {
      event.preventDefault();
      this.#likeIt();
    }
  }

  #step(by) {
    this.open(this.#shown + by);
  }

  #likeIt() {
    const result = this.#results[this.#shown];
    this.detail.close();
    this.like(result);
  }
}

function load(image, address) {
  return new Promise((resolve, reject) => {
    image.onload = resolve;
    image.onerror = reject;
    image.src = address;
  });
}

/** How many pixels of the screen a pixel of a tiny picture takes, to fill `shown` of them; 0 for others. */
function tinyScale(image, shown) {
  const side = Math.max(image.naturalWidth, image.naturalHeight);
  return side <= TINY ? Math.floor(shown / side) : 0;
}

/** What stands in the place of a picture. */
function wordsOf(result, card) {
  card.classList.add("words");
  const words = document.createElement("span");
  words.className = "words";
  words.textContent = result.kind === "text" ? result.text.slice(0, 1200) : `no picture\n${result.name || result.id}`;
  return words;
}

/** The folder of a file whose path is its id; "" for other items. */
function folderOf({ id, name }) {
  return name && id.endsWith(`/${name}`) ? id.slice(0, -name.length - 1).split("/").pop() : "";
}

/** Metadata in a few words: texts speak for themselves, numbers with their names, of booleans those that hold. */
function valuesOf({ metadata }) {
  return Object.entries(metadata).flatMap(([name, value]) => {
    if (typeof value === "boolean") return value ? [name] : [];
    if (typeof value === "number") return [`${name} ${readable(value)}`];
    return readable(value) ? [readable(value)] : [];
  });
}

function readable(value) {
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(7)));
  return String(value ?? "");
}

function cell(kind, text) {
  const element = document.createElement(kind);
  element.textContent = text;
  return element;
}
