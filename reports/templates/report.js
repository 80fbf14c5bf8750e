"use strict";
// Model text enters the page as text nodes only (textContent): nothing that a model wrote is ever parsed as HTML.
(() => {
  const byId = (id) => document.getElementById(id);
  const told = (id) => JSON.parse(byId(id).textContent);
  const about = told("about");

  /** An element with text, a class, and children. */
  function make(tag, text = "", kind = "", ...children) {
    const element = document.createElement(tag);
    if (text) element.textContent = text;
    if (kind) element.className = kind;
    element.append(...children);
    return element;
  }

  // --- charts -----------------------------------------------------------------------------------------------------

  async function draw() {
    const options = {
      ast: true, // interpreted, so that the page needs no eval
      renderer: "svg", // crisp on paper, and coloured by report.css
      actions: { export: true, source: false, compiled: false, editor: false },
    };
    for (const [id, spec] of Object.entries(told("chart-data"))) await window.vegaEmbed(byId(id), spec, options);
    for (const menu of document.querySelectorAll(".vega-embed > details > summary")) menu.setAttribute("aria-label", "Save this chart");
    document.documentElement.dataset.charts = "drawn";
  }

  // --- copy buttons -----------------------------------------------------------------------------------------------

  async function copy(name) {
    const text = about.copy[name];
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = make("textarea", text); // where the clipboard is closed to a file's page
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    byId("copied").textContent = `Copied ${name}.`;
  }

  for (const button of document.querySelectorAll("[data-copy]"))
    button.addEventListener("click", () => copy(button.dataset.copy));

  // --- items ------------------------------------------------------------------------------------------------------

  const PAGE = 50;
  const SIDES = 6; // an item is [task, id, stratum, gold, choices, prompts, side, side, ...]
  const LL = 0, PICKED = 1, LOGPROBS = 2, GEN = 3, BEFORE = 4, SPAN = 5, AFTER = 6, RULE = 7;
  let data = null;
  let shown = []; // indices of the items that match
  let first = 0; // of the page
  let current = -1;
  let texts = null; // for the search, made when it is first used

  async function read() {
    const bytes = Uint8Array.from(atob(byId("item-data").textContent), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  const correct = (verdict) => verdict === 0;
  const scored = (verdict) => verdict >= 0;
  const wrong = (verdict) => scored(verdict) && !correct(verdict);
  const flip = (one, other, mode) => scored(one[mode]) && scored(other[mode]) && correct(one[mode]) !== correct(other[mode]);

  const PATTERNS = {
    "": () => true,
    hidden: (item, sides) => sides.some((side) => correct(side[LL]) && wrong(side[GEN])),
    said: (item, sides) => sides.some((side) => wrong(side[LL]) && correct(side[GEN])),
    flipped: (item, sides) => sides.some((side) => flip(item[SIDES], side, LL) || flip(item[SIDES], side, GEN)),
    lost: (item, sides) => sides.some((side) => correct(item[SIDES][GEN]) && wrong(side[GEN])),
    gained: (item, sides) => sides.some((side) => wrong(item[SIDES][GEN]) && correct(side[GEN])),
    "lost-ll": (item, sides) => sides.some((side) => correct(item[SIDES][LL]) && wrong(side[LL])),
    "gained-ll": (item, sides) => sides.some((side) => wrong(item[SIDES][LL]) && correct(side[LL])),
  };

  /** What an item's text is searched in: of a prompt its own part, without the examples before it. */
  function textOf(item) {
    const parts = [item[1], item[2]];
    if (Array.isArray(item[4])) parts.push(...item[4]);
    for (const [, blocks, own] of item[5]) for (const at of blocks.slice(own)) parts.push(data.blocks[at]);
    for (const side of item.slice(SIDES)) parts.push((side[BEFORE] || "") + (side[SPAN] || "") + (side[AFTER] || ""));
    return parts.join("\n").toLowerCase();
  }

  const value = (id) => (byId(id) ? byId(id).value : "");

  function filter() {
    const words = value("search").trim().toLowerCase();
    if (words && !texts) texts = data.items.map(textOf);
    const task = value("task") === "" ? -1 : Number(value("task"));
    const chosen = value("model") === "" ? -1 : Number(value("model"));
    const verdict = (id) => (value(id) === "" ? -1 : data.verdicts.indexOf(value(id)));
    const ll = verdict("loglikelihood"), gen = verdict("generation"), matches = PATTERNS[value("pattern")];
    shown = [];
    data.items.forEach((item, at) => {
      if (task >= 0 && item[0] !== task) return;
      let sides = chosen < 0 ? item.slice(SIDES) : [item[SIDES + chosen]];
      if (ll >= 0) sides = sides.filter((side) => side[LL] === ll);
      if (gen >= 0) sides = sides.filter((side) => side[GEN] === gen);
      if (!sides.length || !matches(item, sides)) return;
      if (!words || texts[at].includes(words)) shown.push(at);
    });
    first = 0;
    current = shown.length ? shown[0] : -1;
    render();
  }

  const nameOf = (verdict) => data.verdicts[verdict];
  const label = (who) => (about.names[who] === who || who === "model" ? about.names[who] : `${who}: ${about.names[who]}`);

  function badges(item) {
    return item.slice(SIDES, SIDES + 3).map((side) => {
      const marks = [side[LL], side[GEN]].map((verdict) => (scored(verdict) ? (correct(verdict) ? "✓" : "✗") : "·"));
      const cells = marks.map((mark) => make("span", mark, mark === "✓" ? "right" : mark === "✗" ? "wrong" : ""));
      return make("span", "", "badge", ...cells);
    });
  }

  function render() {
    const rows = shown.slice(first, first + PAGE).map((at) => {
      const item = data.items[at];
      const button = make("button", "", "", make("span", item[1], "id"), make("span", data.tasks[item[0]], "task"), ...badges(item));
      button.type = "button";
      button.dataset.at = at;
      const said = item.slice(SIDES).map((side, k) => `${data.who[k]}: ${nameOf(side[LL]) || "not scored"} by log-likelihood, ${nameOf(side[GEN]) || "not scored"} by generation`);
      button.title = said.join("\n");
      button.setAttribute("aria-label", `${data.tasks[item[0]]} ${item[1]}. ${said.join(". ")}`);
      return make("li", "", "", button);
    });
    byId("list").replaceChildren(...rows);
    byId("list").scrollTop = 0;
    const n = shown.length;
    byId("count").textContent = `${n.toLocaleString("en")} of ${data.items.length.toLocaleString("en")} items`;
    byId("where").textContent = n ? `${first + 1}–${Math.min(n, first + PAGE)} of ${n.toLocaleString("en")}` : "none";
    byId("previous").disabled = first === 0;
    byId("next").disabled = first + PAGE >= n;
    show(current);
  }

  function show(at) {
    current = at;
    for (const button of byId("list").querySelectorAll("button")) {
      const chosen = Number(button.dataset.at) === at;
      button.setAttribute("aria-current", chosen);
      button.tabIndex = chosen ? 0 : -1; // Tab stops at the list once; the arrow keys move within it
    }
    byId("detail").replaceChildren(...(at < 0 ? [make("p", "No item matches.", "note")] : detail(data.items[at])));
  }

  function detail(item) {
    const heading = make("h3", `${data.tasks[item[0]]} · ${item[1]}${item[2] ? ` · ${item[2]}` : ""}`);
    const sides = item.slice(SIDES);
    return [heading, ...item[5].map(([which, blocks, own]) => prompt(which, blocks, own)), choices(item, sides),
      make("div", "", "sides", ...sides.map(side))];
  }

  /** The question opens; the examples before it are folded. */
  function prompt(which, blocks, own) {
    const parts = blocks.map((at) => data.blocks[at]);
    const box = make("div", "", "", make("p", `Prompt (${which})`, "note"));
    if (own) {
      const before = make("details", "", "", make("summary", `${own} part${own > 1 ? "s" : ""} before it, as in other prompts`));
      before.append(make("pre", parts.slice(0, own).join("\n\n")));
      box.append(before);
    }
    box.append(make("pre", parts.slice(own).join("\n\n")));
    return box;
  }

  function choices(item, sides) {
    const named = Array.isArray(item[4]) ? item[4] : Array.from({ length: item[4] }, (_, k) => `choice ${k + 1}`);
    const head = make("tr", "", "", make("th", "Choice"), ...data.who.map((who) => make("th", who, "number")));
    const body = named.map((text, k) => {
      const cells = sides.map((one) => {
        const known = one[LOGPROBS][k];
        return make("td", known === undefined ? "–" : `${k === one[PICKED] ? "▸ " : ""}${known.toFixed(3)}`, "number");
      });
      return make("tr", "", k === item[3] ? "gold" : "", make("td", text + (k === item[3] ? "  (right)" : "")), ...cells);
    });
    const table = make("table", "", "", make("thead", "", "", head), make("tbody", "", "", ...body));
    const scroll = make("div", "", "scroll", table, make("p", "Log-probability of each choice: the sum over its tokens, in nats. ▸: picked, after normalisation.", "note"));
    scroll.tabIndex = 0;
    return scroll;
  }

  function side(one, at) {
    const box = make("section", "", "", make("h4", label(data.who[at])));
    for (const [mode, verdict] of [["log-likelihood", one[LL]], ["generation", one[GEN]]]) {
      if (!scored(verdict)) continue;
      const rule = mode === "generation" && one[RULE] ? `, read by rule “${one[RULE]}”` : "";
      const text = make("span", `${correct(verdict) ? "✓" : "✗"} ${nameOf(verdict)}`, correct(verdict) ? "right" : "wrong");
      box.append(make("p", "", "outcome", `by ${mode}: `, text, rule));
    }
    if (one.length > BEFORE) {
      const reply = make("pre");
      if (one[SPAN]) reply.append(one[BEFORE], make("mark", one[SPAN]), one[AFTER]);
      else reply.append(one[BEFORE] + one[AFTER] || "(empty)");
      box.append(reply);
    }
    return box;
  }

  /** Move within the matches, over the ends of a page. */
  function step(by) {
    const at = shown.indexOf(current) + by;
    if (at < 0 || at >= shown.length) return;
    current = shown[at];
    if (at < first || at >= first + PAGE) {
      first = Math.floor(at / PAGE) * PAGE;
      render();
    } else show(current);
    const button = byId("list").querySelector('[aria-current="true"]');
    button.focus({ preventScroll: true });
    button.scrollIntoView({ block: "nearest" });
  }

  function turn(by) {
    first += by * PAGE;
    current = shown[first];
    render();
  }

  function listen() {
    let waiting = 0;
    byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
    byId("filters").addEventListener("change", (event) => {
      // Leaving the search field is a change of it too; the list must not be made anew under the focus.
      if (event.target !== byId("search")) filter();
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", () => setTimeout(filter));
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    byId("list").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      show(Number(button.dataset.at));
      if (matchMedia("(max-width: 48rem)").matches) byId("detail").scrollIntoView({ block: "start" });
    });
    byId("list").addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
      if (by && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); step(by); }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.target.closest("input, select, textarea")) return;
      event.preventDefault();
      byId("search").focus();
    });
    if (byId("show-flipped")) byId("show-flipped").addEventListener("click", () => {
      byId("filters").reset();
      byId("pattern").value = "flipped";
      filter();
      byId("items").scrollIntoView();
      byId("pattern").focus({ preventScroll: true });
    });
  }

  function fill() {
    data.tasks.forEach((task, at) => byId("task").append(new Option(task, at)));
    if (!byId("model")) return;
    byId("model").append(new Option("any", ""));
    data.who.forEach((who, at) => byId("model").append(new Option(label(who), at)));
  }

  async function browse() {
    data = await read();
    fill();
    listen();
    filter();
    document.documentElement.dataset.items = "ready";
  }

  addEventListener("beforeprint", () => { byId("tables").open = true; });
  browse().catch((error) => { byId("count").textContent = `The items can't be shown: ${error.message}`; throw error; });
  draw();
})();
