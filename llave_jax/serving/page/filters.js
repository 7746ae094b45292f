// Filters made from what the server tells of the index's columns, and the `where` of a search they stand for.

const OWN_COLUMNS = ["id", "kind", "text"];

/** Whether an object has nothing in it. */
export function isEmpty(object) {
  return Object.keys(object).length === 0;
}

/** The part of a filter that this page can show: known columns, in its own forms. */
export function understood(where, columns) {
  const kept = {};
  for (const [name, test] of Object.entries(where ?? {})) {
    const simple = Array.isArray(test)
      ? test.every((value) => ["string", "number", "boolean"].includes(typeof value))
      : test && typeof test === "object" && Object.keys(test).every((key) => ["contains", "gte", "lte"].includes(key));
    if (Object.hasOwn(columns, name) && simple) kept[name] = test;
  }
  return kept;
}

/**
 * The controls of an index's filters in `details`.
 *
 * changed(where) is called with each new filter.
 */
export class Filters {
  #where = {};

  constructor(details, changed) {
    this.details = details;
    this.box = details.querySelector("div");
    this.count = details.querySelector("output");
    this.changed = changed;
  }

  /** Makes the controls for an index, as /index describes it. */
  build(index) {
    const groups = [];
    const kinds = Object.keys(index.kinds);
    if (kinds.length > 1) groups.push(this.#choice("kind", kinds));
    if (index.kinds.text || index.kinds.mixed) groups.push(this.#words("text"));
    for (const [name, type] of Object.entries(index.columns)) {
      if (OWN_COLUMNS.includes(name)) continue;
      const values = index.values[name];
      if (type === "boolean") groups.push(this.#choice(name, [true, false]));
      else if (values?.length) groups.push(this.#choice(name, values));
      else if (type === "text" || type === "list of texts") groups.push(this.#words(name));
      else groups.push(this.#range(name));
    }
    this.box.replaceChildren(...groups);
    this.details.hidden = groups.length === 0;
    this.details.open = matchMedia("(min-width: 720px)").matches;
    this.show(this.#where);
  }

  /** Shows a filter in the controls. */
  show(where) {
    this.#where = where;
    for (const group of this.box.children) group.show(where[group.dataset.column]);
    const count = Object.keys(where).length;
    this.count.textContent = count || "";
  }

  #set(name, test) {
    const where = { ...this.#where };
    if (test === undefined) delete where[name];
    else where[name] = test;
    this.show(where);
    this.changed(where);
  }

  #group(name, ...controls) {
    const group = document.createElement("fieldset");
    group.dataset.column = name;
    const legend = document.createElement("legend");
    legend.textContent = name;
    group.append(legend, ...controls);
    return group;
  }

  #choice(name, values) {
    const chips = values.map((value) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "chip";
      chip.textContent = value === true ? "yes" : value === false ? "no" : String(value);
      chip.addEventListener("click", () => {
        const chosen = this.#where[name] ?? [];
        const next = chosen.includes(value) ? chosen.filter((other) => other !== value) : [...chosen, value];
        this.#set(name, next.length ? next : undefined);
      });
      return chip;
    });
    const group = this.#group(name, ...chips);
    group.show = (test) =>
      chips.forEach((chip, place) => {
        const pressed = Array.isArray(test) && test.includes(values[place]);
        chip.setAttribute("aria-pressed", pressed);
      });
    return group;
  }

  #words(name) {
    const input = this.#input(name, "text", "contains");
    input.addEventListener("change", () => {
      this.#set(name, input.value.trim() ? { contains: input.value.trim() } : undefined);
    });
    const group = this.#group(name, input);
    group.show = (test) => (input.value = test?.contains ?? "");
    return group;
  }

  #range(name) {
    const [from, to] = [this.#input(name, "number", "from"), this.#input(name, "number", "to")];
    const read = () => {
      const test = {};
      if (from.value !== "") test.gte = from.valueAsNumber;
      if (to.value !== "") test.lte = to.valueAsNumber;
      this.#set(name, isEmpty(test) ? undefined : test);
    };
    for (const input of [from, to]) {
      input.step = "any";
      input.addEventListener("change", read);
    }
    const dash = document.createElement("span");
    dash.textContent = "–";
    const group = this.#group(name, from, dash, to);
    group.show = (test) => {
      from.value = test?.gte ?? "";
      to.value = test?.lte ?? "";
    };
    return group;
  }

  #input(name, type, placeholder) {
    const input = document.createElement("input");
    input.type = type;
    input.placeholder = placeholder;
    input.setAttribute("aria-label", `${name} ${placeholder}`);
    return input;
  }
}
