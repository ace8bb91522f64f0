// A run or a search in a browser: its text with every set in its place, and its lattice.
//
// render(element, data, actions) draws into element and returns {update(data)}.
//   data     what GenerationResult.to_dict() or SearchResult.to_dict() gives, or parts of it: only
//            "steps" or "choices" is needed, as while a run is under way.
//   actions  what a page can do, all optional: commit(token, step) on click or Enter,
//            expand(token, step) with Shift. The token is the one of data.
//
// Texts come from a model, so they are only ever set as textContent. Everything stands in a shadow
// root with a constructed style sheet: it neither changes the page around it nor is changed by it,
// and needs no inline style that a Content-Security-Policy would refuse.

const SVG = "http://www.w3.org/2000/svg";

// The colours of the pictures that --plot draws, with the same meanings; and those for the dark.
const STYLE = `
:host { display: block; --ink: #1a1a1a; --grey: #5f5f5f; --faint: #d5d5d5; --paper: #ffffff;
  --blue: 0 114 178; --orange: #e69f00; --purple: #a3447e;
  color: var(--ink); background: var(--paper); position: relative; padding: 8px;
  font: 15px/1.5 system-ui, sans-serif; text-align: left; }
@media (prefers-color-scheme: dark) { :host { --ink: #ececec; --grey: #a8a8a8; --faint: #4a4a4a;
  --paper: #181818; --blue: 86 180 233; --purple: #e3a0c8; } }
.bar { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: center; margin-bottom: 8px; }
button { font: inherit; font-size: 13px; color: var(--ink); background: none; cursor: pointer;
  border: 1px solid var(--faint); border-radius: 4px; padding: 1px 8px; }
button[aria-pressed=true] { border-color: var(--ink); font-weight: 600; }
.note, .key { color: var(--grey); font-size: 13px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
.prompt, .pruned { color: var(--grey); }
.cell { cursor: default; border-radius: 2px; white-space: pre-wrap; }
.set .cell { white-space: pre; max-width: 14em; overflow: hidden; text-overflow: ellipsis; }
.set { display: inline-flex; flex-direction: column; align-items: stretch; vertical-align: baseline;
  margin: 0 2px 4px; border-bottom: 0 solid var(--purple); }
.set .cell:not(:first-child) { font-size: 12px; line-height: 1.35; }
.best { font-weight: 600; }
.pruned { text-decoration: line-through; text-decoration-thickness: 2px; }
.end { color: var(--purple); font-style: italic; }
:focus { outline: none; }
:focus-visible { outline: 2px solid var(--orange); outline-offset: 1px; }
.scroll { overflow-x: auto; }
svg { display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); white-space: pre; }
svg .tick, svg .prompt { fill: var(--grey); }
svg .pruned { fill: var(--grey); }
svg .end { fill: var(--purple); }
svg .grid { stroke: var(--faint); stroke-width: 0.5; }
svg .edge { stroke: rgb(var(--blue)); fill: none; stroke-opacity: 0.35; }
svg .path { stroke: var(--orange); fill: none; stroke-width: 11; stroke-opacity: 0.4;
  stroke-linecap: round; stroke-linejoin: round; }
svg .leader { stroke: var(--faint); fill: none; }
svg .dot { fill: rgb(var(--blue)); }
svg .dot.pruned { fill: var(--paper); stroke: var(--grey); stroke-dasharray: 2 1; }
svg .dot.end { fill: var(--purple); }
svg .strike { stroke: var(--grey); stroke-width: 1.5; }
svg .cell:focus-visible { outline: none; }
svg .cell:focus-visible text, svg .cell:hover text { text-decoration: underline; }
ol { margin: 8px 0 0; padding: 0; list-style: none; }
ol button { text-align: left; max-width: 100%; white-space: pre-wrap; overflow-wrap: anywhere;
  border-color: transparent; }
ol button[aria-pressed=true] { border-color: var(--orange); font-weight: inherit; }
.nats { font-variant-numeric: tabular-nums; color: var(--grey); }
.tip { position: fixed; inset: auto; margin: 0; max-width: min(340px, calc(100vw - 16px));
  color: var(--ink); background: var(--paper); border: 1px solid var(--grey); border-radius: 4px;
  padding: 6px 8px; font-size: 13px; box-shadow: 0 2px 8px rgb(0 0 0 / 25%); pointer-events: none; }
.tip table { border-collapse: collapse; }
.tip td, .tip th { padding: 0 10px 0 0; text-align: right; font-weight: normal;
  font-variant-numeric: tabular-nums; }
.tip td:first-child { text-align: left; white-space: pre; max-width: 150px; overflow: hidden;
  text-overflow: ellipsis; }
.tip tr.here td { font-weight: 700; }
`;

// Characters that command a terminal or reorder the text around them, as text/printable.py has them.
const UNSAFE = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]/gu;
const SYMBOLS = { "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡" };

/** The text on one line; whatever is invisible or dangerous is shown as a symbol. */
export function visible(text) {
  return text.replace(UNSAFE, (character) => {
    const code = character.codePointAt(0);
    if (SYMBOLS[character]) return SYMBOLS[character];
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code >= 0xd800 && code < 0xe000) return "\ufffd";
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

/** The text with its lines and tabs. */
function running(text) {
  return text.split(/([\n\t])/).map((part) => (/^[\n\t]$/.test(part) ? part : visible(part))).join("");
}

/** A token as a label: a point for the space before a word. */
function label(text) {
  return visible(text).replace(/^ (?=\S)/, "·").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));
}

/** Bytes at the end that begin a character which is not complete. */
function unfinished(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte >= 0xc0) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2) ? back : 0;
    if (byte < 0x80) return 0;
  }
  return 0;
}

/** The cells of each column, most probable first; the same for runs and searches. */
function columnsOf(data) {
  return data.choices ? searchColumns(data) : latticeColumns(data);
}

function latticeColumns(data) {
  const found = [];
  for (const step of data.steps ?? []) {
    const cells = step.tokens.map((token) => ({
      token, step, id: token.id, text: token.text, bytes: token.bytes ?? [], height: token.probability,
      probability: token.probability, slot: token.slot, parent: token.parent, logprob: token.logprob,
      pruned: token.pruned_at != null, kind: token.pruned_at != null ? "pruned" : "token",
    }));
    for (const ending of step.endings ?? []) {
      cells.push({ token: ending, step, id: ending.id, text: "<end>", bytes: [], kind: "end",
        height: ending.probability, probability: ending.probability, parent: ending.parent,
        logprob: ending.logprob });
    }
    cells.sort((a, b) => b.probability - a.probability);
    if (cells.length) found.push({ position: step.position, cells });
  }
  return found;
}

function searchColumns(data) {
  const start = (data.prompt_tokens ?? []).length;
  return data.choices.map((choice, number) => {
    const visits = choice.children.reduce((sum, child) => sum + child.visits, 0) || 1;
    const cells = choice.children.map((child) => ({
      token: child, step: choice, id: child.action, text: child.text, bytes: child.bytes ?? [],
      height: child.visits / visits, probability: child.prior, visits: child.visits,
      value: child.value, kind: "token", chosen: child.action === choice.id,
    }));
    return { position: start + number, cells };
  });
}

/** The cells that a path goes through: by its token ids, along parents where tokens have them. */
function cellsOf(found, tokens) {
  const line = [];
  for (const column of found) {
    const live = column.cells.filter((cell) => cell.kind === "token");
    if (!live.length) continue;
    if (line.length === tokens.length) break;
    const same = live.filter((cell) => cell.id === tokens[line.length]);
    if (!same.length) break;
    const before = line.at(-1);
    line.push(same.find((cell) => before && cell.parent === before.slot) ?? same[0]);
  }
  // Where one id stands in a set twice, the last token knows which: its parents are the path.
  const bySlot = new Map(found.flatMap((c) => c.cells.map((cell) => [cell.slot, cell])));
  for (let i = line.length - 1; i > 0 && line[i].parent != null; i--) {
    line[i - 1] = bySlot.get(line[i].parent) ?? line[i - 1];
  }
  return new Set(line);
}

/** Entropy of a set's probabilities as shares of their sum, in nats. */
function entropy(column) {
  const sum = column.cells.reduce((total, cell) => total + cell.probability, 0);
  return column.cells.reduce((total, { probability }) => {
    const share = probability / sum;
    return share > 0 ? total - share * Math.log(share) : total;
  }, 0);
}

function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const many = (count, what) => `${count ?? "?"} ${what}${count === 1 ? "" : "s"}`;

/** A probability in two digits. */
function percent(p) {
  if (p == null) return "";
  return `${p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toPrecision(2)} %`;
}

const nats = (x, digits = 2) => (x == null || !isFinite(x) ? "" : x.toFixed(digits));

class View {
  constructor(element, data, actions) {
    this.actions = actions;
    this.mode = "text";
    this.chosen = 0; // the path that is drawn through
    this.root = element.shadowRoot ?? element.attachShadow({ mode: "open" });
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(STYLE);
    this.root.adoptedStyleSheets = [sheet];
    this.body = make("div", { lang: "und" });
    // A popover, which no frame of the page around it cuts off.
    this.tip = make("div", { class: "tip", role: "status", popover: "manual" });
    this.told = false;
    this.root.replaceChildren(this.body, this.tip);
    this.root.addEventListener("keydown", (event) => this.walk(event));
    this.update(data);
  }

  update(data) {
    this.data = data;
    this.columns = columnsOf(data);
    this.isSearch = Boolean(data.choices);
    this.paths = data.paths ?? [];
    this.show();
  }

  show() {
    this.hide();
    this.nodes = new Map(); // cell -> the element that stands for it
    this.path = this.isSearch
      ? new Set(this.columns.flatMap((column) => column.cells.filter((cell) => cell.chosen)))
      : cellsOf(this.columns, this.paths[this.chosen]?.tokens ?? []);
    const bar = make("div", { class: "bar", role: "group", "aria-label": "View" });
    const modes = [["text", "Text"], ["lattice", this.isSearch ? "Choices" : "Lattice"]];
    if (this.data.tree?.nodes.length > 1) modes.push(["tree", "Tree of the last token"]);
    for (const [mode, name] of modes) {
      const button = make("button", { type: "button", "aria-pressed": String(mode === this.mode) }, name);
      button.addEventListener("click", () => {
        this.mode = mode;
        this.show();
      });
      bar.append(button);
    }
    bar.append(make("span", { class: "note" }, this.summary()));
    const picture = this[this.mode]();
    this.body.replaceChildren(bar, picture, this.key(), ...this.list());
    const first = this.nodes.values().next().value;
    if (first) first.setAttribute("tabindex", "0");
  }

  summary() {
    const data = this.data;
    const tokens = this.columns.reduce((sum, column) => sum + column.cells.length, 0);
    const ended = data.finish_reason ? `, ended by ${data.finish_reason}` : "";
    return this.isSearch
      ? `${many(data.choices.length, "token")}, ${many(data.stats?.simulations, "simulation")}${ended}`
      : `${many(this.columns.length, "step")}, ${many(tokens, "token")}${ended}`;
  }

  key() {
    const pruned = this.columns.some((column) => column.cells.some((cell) => cell.pruned));
    const meanings = {
      text: "colour: probability; bold: the chosen path; purple line: entropy of the set",
      lattice: "height and size: probability; orange: the chosen path",
      tree: "width and size: visits; it begins with the token before",
    };
    if (this.isSearch) {
      meanings.text = "colour: share of the visits; bold: chosen";
      meanings.lattice = "height and size: share of the visits; orange: chosen";
    }
    return make("div", { class: "key" }, meanings[this.mode], pruned ? "; struck: pruned later" : "");
  }

  list() {
    if (this.paths.length < 2) return [];
    const list = make("ol", { "aria-label": "The best texts" });
    this.paths.forEach((path, number) => {
      const button = make(
        "button", { type: "button", "aria-pressed": String(number === this.chosen) },
        make("span", { class: "nats" }, `${nats(path.logprob, 3)} nats `), running(path.text));
      button.addEventListener("click", () => {
        this.chosen = number;
        this.show();
      });
      list.append(make("li", {}, button));
    });
    return [list];
  }

  prompt() {
    const { prompt, prompt_tokens } = this.data;
    return prompt ?? (prompt_tokens ? `[${prompt_tokens.length} prompt tokens]` : "");
  }

  // The text: every set is a stack, the token of the path on the line.

  text() {
    const line = make("div", { class: "text" }, make("span", { class: "prompt" }, running(this.prompt())));
    let held = null;
    for (const column of this.columns) {
      const [only] = column.cells;
      if (column.cells.length > 1 || only.kind !== "token") {
        held = null;
        line.append(this.stack(column));
        continue;
      }
      // Tokens that hold parts of one character are written as that character.
      const bytes = held ? [...held.bytes, ...only.bytes] : only.bytes;
      const rest = unfinished(bytes);
      if (held) {
        held.node.textContent = running(rest ? held.text + only.text : decode(bytes));
        this.nodes.set(only, held.node);
        only.column = column;
        held = rest ? { ...held, bytes, text: held.text + only.text } : null;
        continue;
      }
      const node = this.cell(make("span"), only, column);
      node.textContent = running(only.text);
      line.append(node);
      held = rest ? { bytes, text: only.text, node } : null;
    }
    return line;
  }

  stack(column) {
    const order = [...column.cells].sort((a, b) => this.path.has(b) - this.path.has(a));
    const nodes = order.map((cell) => {
      const node = this.cell(make("span"), cell, column);
      node.textContent = visible(cell.text);
      return node;
    });
    const label = `set of ${nodes.length}`;
    const set = make("span", { class: "set", role: "group", "aria-label": label }, ...nodes);
    if (!this.isSearch) set.style.borderBottomWidth = `${(2.5 * entropy(column)).toFixed(1)}px`;
    return set;
  }

  // The lattice: columns are positions, height is probability.

  lattice() {
    const measure = measuring();
    const line = 15, top = 14, height = 190, tall = (p) => top + height * (1 - Math.sqrt(p));
    const places = new Map(); // cell -> where its dot, its label and their ends are
    const marks = [0, 0.01, 0.1, 0.25, 0.5, 1];
    let left = 44, lowest = top + height;
    const prompt = short(label([...this.prompt()].slice(-17).join("")));
    const prompts = { x: left, y: tall(1), text: prompt };
    left += measure(prompt) + 8;
    const root = { x: left, y: tall(1) };
    left += 30;
    for (const column of this.columns) {
      let y = -Infinity, widest = 0;
      for (const cell of column.cells) {
        const text = short(label(cell.text)), dot = tall(cell.height);
        y = Math.max(dot, y + line);
        widest = Math.max(widest, measure(text));
        places.set(cell, { x: left, dot, y, text, width: measure(text) });
        lowest = Math.max(lowest, y);
      }
      column.x = left;
      column.end = left + 12 + widest;
      left = column.end + 34;
    }
    const width = Math.max(left, 60);
    const svg = draw("svg", { width, height: lowest + 28, role: "group", "aria-label": "lattice" });
    for (const mark of marks) {
      svg.append(
        draw("line", { class: "grid", x1: 40, x2: width, y1: tall(mark), y2: tall(mark) }),
        draw("text", { class: "tick", x: 36, y: tall(mark) + 4, "text-anchor": "end" }, `${100 * mark}%`));
    }
    svg.append(draw("text", { class: "prompt", x: prompts.x, y: prompts.y + 4 }, prompts.text));
    svg.append(...this.edges(places, root), this.line(places, root));
    for (const column of this.columns) {
      svg.append(draw("text", { class: "tick", x: column.x, y: lowest + 22, "text-anchor": "middle" },
        String(column.position)));
      for (const cell of column.cells) svg.append(this.node(cell, column, places.get(cell)));
    }
    return scrolling("lattice", svg);
  }

  /** From every token to what it continues: its parent, or each live token of the set before. */
  edges(places, root) {
    const bySlot = new Map(this.columns.flatMap((c) => c.cells.map((cell) => [cell.slot, [cell, c]])));
    let before = [];
    return this.columns.flatMap((column) => {
      const drawn = column.cells.flatMap((cell) => {
        const parents = cell.parent == null ? before : [bySlot.get(cell.parent)].filter(Boolean);
        const from = parents.map(([parent, at]) => this.end(places.get(parent), at));
        return (from.length ? from : [root]).map((start) => draw("path", {
          class: "edge", d: curve(start, { x: places.get(cell).x, y: places.get(cell).dot }, start.text),
          "stroke-width": (0.5 + 3 * cell.height).toFixed(2) }));
      });
      const live = column.cells.filter((cell) => (this.isSearch ? cell.chosen : cell.kind === "token"));
      if (live.length) before = live.map((cell) => [cell, column]);
      return drawn;
    });
  }

  /** Where the edges of a cell's children leave: behind its column; from its text on. */
  end(place, column) {
    return { x: column.end + 4, y: place.y, text: place.x + 14 + place.width };
  }

  line(places, root) {
    let d = "", last = root;
    for (const column of this.columns) {
      const cell = column.cells.find((each) => this.path.has(each));
      if (!cell) continue;
      const place = places.get(cell);
      d += curve(last, { x: place.x, y: place.dot });
      d += `L${place.x + 8} ${place.y}L${column.end + 4} ${place.y}`;
      last = { x: column.end + 4, y: place.y };
    }
    return draw("path", { class: "path", d });
  }

  node(cell, column, { x, dot, y, text, width }) {
    const group = this.cell(draw("g"), cell, column);
    if (Math.abs(y - dot) > 1) {
      group.append(draw("path", { class: "leader", d: `M${x} ${dot}L${x + 9} ${y}` }));
    }
    group.append(
      draw("circle", { class: `dot ${cell.kind}`, cx: x, cy: dot, r: 3 + 3 * Math.sqrt(cell.height) }),
      draw("text", { class: cell.kind, x: x + 11, y: y + 4 }, text),
      // Something to point at between the letters, too.
      draw("rect", { x: x - 6, y: y - 8, width: width + 20, height: 16, fill: "transparent" }));
    if (this.path.has(cell)) group.querySelector("text").classList.add("best");
    if (cell.kind === "pruned") {
      group.append(draw("line", { class: "strike", x1: x + 9, x2: x + 13 + width, y1: y, y2: y }));
    }
    return group;
  }

  // The tree that a search's last token was chosen from: the width of an edge is its visits.

  tree() {
    const nodes = this.data.tree.nodes, root = nodes[0];
    const start = (this.data.prompt_tokens ?? []).length;
    const cells = nodes.map((token) => ({
      token, step: null, id: token.action, text: token.text ?? String(token.action), bytes: [],
      kind: "token", height: token.visits / (root.visits || 1), probability: token.prior,
      visits: token.visits, value: token.value, children: [] }));
    // Parents stand before their children. What was never visited is left out.
    nodes.forEach(({ parent, visits }, number) => {
      if (parent == null || !visits) return;
      cells[parent].children.push(cells[number]);
      cells[number].before = cells[parent];
    });
    const measure = measuring(), widths = [];
    const reach = (cell, depth) => {
      cell.short = cell === cells[0] ? "…" + label(cell.text) : short(label(cell.text));
      widths[depth] = Math.max(widths[depth] ?? 0, measure(cell.short));
      cell.children.sort((a, b) => b.visits - a.visits);
      for (const child of cell.children) reach(child, depth + 1);
    };
    reach(cells[0], 0);
    const lefts = [20], line = 20;
    for (const width of widths) lefts.push(lefts.at(-1) + width + 60);
    let row = 0;
    const drawn = [], edges = [];
    const put = (cell, depth, column) => {
      const at = { x: lefts[depth], dot: 0, y: 0, text: cell.short, width: measure(cell.short) };
      const below = { position: start + (cell.token.depth ?? depth), cells: cell.children };
      const first = row;
      const ends = cell.children.map((child) => put(child, depth + 1, below));
      if (!ends.length) row++;
      at.y = at.dot = 16 + line * first;
      ends.forEach((end, i) => edges.push(draw("path", { class: "edge",
        d: curve({ x: at.x + 14 + at.width, y: at.y }, { x: end.x, y: end.y }),
        "stroke-width": (0.5 + 6 * cell.children[i].height).toFixed(2) })));
      drawn.push(this.node(cell, column, at));
      return at;
    };
    put(cells[0], 0, { position: "", cells: [cells[0]] });
    const size = { width: lefts.at(-1), height: 16 + line * row };
    const svg = draw("svg", { ...size, role: "group", "aria-label": "tree" }, ...edges, ...drawn.reverse());
    return scrolling("tree", svg);
  }

  // What every cell does, in every view.

  cell(node, cell, column) {
    this.nodes.set(cell, node);
    cell.column = column;
    node.classList.add("cell", cell.kind);
    if (this.path.has(cell)) node.classList.add("best");
    const shade = Math.max(0.06, cell.height);
    if (node instanceof HTMLElement && cell.kind === "token" && column.cells.length > 1) {
      node.style.backgroundColor = `rgb(var(--blue) / ${(0.45 * shade).toFixed(3)})`;
    }
    node.setAttribute("tabindex", "-1");
    // In the text a token is text; what is told of it is read out when it gets the focus.
    const role = this.actions.commit ? "button" : node instanceof SVGElement ? "img" : null;
    if (role) {
      node.setAttribute("role", role);
      node.setAttribute("aria-label", `${visible(cell.text)}, ${percent(cell.probability)}`);
    }
    node.addEventListener("pointerenter", () => this.tell(node, cell, column));
    node.addEventListener("focus", () => this.tell(node, cell, column));
    node.addEventListener("pointerleave", () => this.hide());
    node.addEventListener("blur", () => this.hide());
    node.addEventListener("click", (event) => this.act(event, cell));
    return node;
  }

  act(event, cell) {
    const action = event.shiftKey ? this.actions.expand : this.actions.commit;
    if (action) action(cell.token, cell.step);
    else this.nodes.get(cell)?.focus();
  }

  tell(node, cell, column) {
    const best = Math.max(...column.cells.map((each) => each.probability));
    const names = this.isSearch ? ["visits", "value", "prior"] : ["p", "nats", "to best"];
    const table = make("table", {}, make("tr", {}, ...["", ...names].map((name) => make("th", {}, name))));
    for (const each of column.cells) {
      const values = this.isSearch
        ? [String(each.visits), each.visits ? nats(each.value) : "", percent(each.probability)]
        : [percent(each.probability), ...[1, best].map((of) => nats(Math.log(each.probability / of)))];
      table.append(make("tr", each === cell ? { class: "here" } : {},
        make("td", {}, label(each.text)), ...values.map((value) => make("td", {}, value))));
    }
    const { token } = cell, notes = [`position ${column.position}`, `id ${cell.id}`];
    if (cell.bytes.length) notes.push(cell.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" "));
    if (cell.logprob != null) notes.push(`text up to here ${nats(cell.logprob, 3)} nats`);
    if (cell.pruned) {
      notes.push(`pruned after step ${token.pruned_at} by ${token.pruned_by}, score ${nats(token.score, 3)}`);
    }
    this.tip.replaceChildren(table, make("div", { class: "note" }, notes.join(" · ")));
    if (!this.told) this.tip.showPopover();
    this.told = true;
    const box = (node.closest(".set") ?? node).getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const below = box.bottom + 6 + height <= innerHeight;
    this.tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
    this.tip.style.top = `${below ? box.bottom + 6 : Math.max(0, box.top - 6 - height)}px`;
  }

  hide() {
    if (this.told) this.tip.hidePopover();
    this.told = false;
  }

  /** Arrow keys: left and right along the steps, up and down within a set; Enter acts. */
  walk(event) {
    const here = [...this.nodes].find(([, node]) => node === event.target)?.[0];
    if (!here) return;
    if (event.key === "Escape") this.hide();
    if (event.key === "Enter" || event.key === " ") this.act(event, here);
    const target = this.nodes.get(this.neighbour(here, event.key));
    if (target) {
      event.target.setAttribute("tabindex", "-1");
      target.setAttribute("tabindex", "0");
      target.focus();
    }
    if (event.key.startsWith("Arrow") || event.key === " ") event.preventDefault();
  }

  neighbour(cell, key) {
    const siblings = cell.column.cells, rank = siblings.indexOf(cell);
    if (key === "ArrowUp") return siblings[rank - 1];
    if (key === "ArrowDown") return siblings[rank + 1];
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (!sideways) return undefined;
    if (cell.children) return sideways < 0 ? cell.before : cell.children[0];
    const beside = this.columns[this.columns.indexOf(cell.column) + sideways]?.cells ?? [];
    return beside.find((each) => this.path.has(each)) ?? beside[0];
  }
}

function scrolling(name, svg) {
  const label = `${name}, scrolls sideways`;
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, svg);
}

/** The width of a text in a picture, in pixels. */
function measuring() {
  const canvas = document.createElement("canvas").getContext("2d");
  canvas.font = "600 12px system-ui, sans-serif";
  return (text) => canvas.measureText(text).width;
}

function short(text) {
  const characters = [...text];
  return characters.length > 18 ? `${characters.slice(0, 17).join("")}…` : text;
}

/** A curve that leaves and arrives level, after a straight stroke from `start` where there is one. */
function curve(from, to, start = from.x) {
  const half = (from.x + to.x) / 2;
  return `M${start} ${from.y}H${from.x}C${half} ${from.y} ${half} ${to.y} ${to.x} ${to.y}`;
}

function decode(bytes) {
  return new TextDecoder().decode(new Uint8Array(bytes));
}

export function render(element, data, actions = {}) {
  const view = new View(element, data, actions);
  return { update: (changed) => view.update(changed) };
}
