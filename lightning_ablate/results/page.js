"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);

/** A new element with these properties and children. */
function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const digits = (value) => (value === null ? "–" : String(+value.toPrecision(3)).replace("-", "−"));
const link = (name) => make("a", { href: `#unit=${encodeURIComponent(name)}`, textContent: name });
const swatch = (method) => make("span", { className: "swatch", style: `background: ${inked(page.colours[method])}` });

/** The colour of a method, lighter where it is too dark for dark paper. */
function inked(colour) {
  const parts = colour.startsWith("#") ? colour.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)) : [];
  const bright = parts.reduce((sum, part) => sum + part, 0);
  if (!parts.length || bright > 260 || !dark.matches) return colour;
  return bright ? `rgb(${parts.map((part) => (part + 255) >> 1)})` : "#ffffff";
}

/** What a cell of a table shows: text, a number, or a value with the ends of its interval, bold where it was found. */
function cell(value) {
  if (typeof value === "string") return value in page.colours ? [swatch(value), value] : [value];
  if (!Array.isArray(value)) return [digits(value)];
  const [middle, low, high] = value.slice(0, 3).map(digits), shown = value[3] ? make("b", { textContent: middle }) : middle;
  return value[1] === null ? [shown] : [shown, make("span", { className: "ends", textContent: ` [${low}, ${high}]` })];
}

/** A table that its heads sort; where rows are units, the first cell opens one, and a search finds them. */
function table(place, { columns, rows, count = rows.length }, units = false) {
  const body = make("tbody"), key = (row, column) => (Array.isArray(row[column]) ? row[column][0] : row[column]);
  let sought = "";
  const fill = () => body.replaceChildren(...rows.filter(([name]) => !sought || name.toLowerCase().includes(sought)).map((row) =>
    make("tr", {}, ...row.map((value, i) => make("td", {}, ...(units && !i ? [link(value)] : cell(value)))))));
  const sort = (column, head) => {
    const rising = head.ariaSort === "descending" || (!head.ariaSort && typeof rows[0]?.[column] === "string");
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    rows.sort((a, b) => {
      const [one, other] = [key(a, column), key(b, column)];
      if (one === null || other === null) return (one === null) - (other === null);
      return (rising ? 1 : -1) * (typeof one === "string" ? one.localeCompare(other, "en", { numeric: true }) : one - other);
    });
    fill();
  };
  const heads = columns.map((name, column) => {
    const button = make("button", { type: "button", textContent: name }), head = make("th", { scope: "col" }, button);
    button.onclick = () => sort(column, head);
    return head;
  });
  const whole = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  if (units) {
    const search = make("input", { type: "search", oninput: () => { sought = search.value.toLowerCase(); fill(); } });
    const said = count > rows.length ? `the first ${rows.length} of ${count} units` : `${count} units`;
    place.append(make("label", { className: "choice" }, "Search ", search), make("span", { className: "ends", textContent: said }));
    place.append(make("div", { className: "scroll", tabIndex: 0 }, whole));
  } else place.replaceChildren(whole);
  fill();
}

/** A labelled choice; `then` gets the one that is chosen, the first one at once. */
function choose(place, label, names, then) {
  const select = make("select", { onchange: () => then(select.value) }, ...names.map((name) => make("option", { value: name, textContent: name })));
  place.append(make("label", { className: "choice" }, `${label} `, select));
  if (names.length) then(names[0]);
}

/** Draws a figure in the colours of the page. */
function draw(place, { data, layout }) {
  const color = getComputedStyle(document.body).color, clear = "rgba(0, 0, 0, 0)", grid = "rgba(128, 128, 128, 0.25)";
  const axis = (own) => ({ automargin: true, gridcolor: grid, zerolinecolor: "rgba(128, 128, 128, 0.6)", ...own });
  for (const { line, marker } of data)
    for (const style of [line, marker]) if (style && typeof style.color === "string") style.color = inked(style.color);
  const base = { paper_bgcolor: clear, plot_bgcolor: clear, font: { color, size: 12 }, margin: { l: 50, r: 10, t: 20, b: 40 }, dragmode: false };
  base.hoverlabel = { bgcolor: getComputedStyle(document.body).backgroundColor, font: { color } };
  base.legend = { orientation: "h", y: 1.02, yanchor: "bottom" };
  Plotly.react(place, data, { height: 340, ...base, ...layout, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) }, { displayModeBar: false, responsive: true });
}

/** Text whose tokens are coloured by their values, orange above 0 and blue below; the one of index `asked` is framed. */
function coloured(pieces, largest, unit, asked, [above, below] = [page.harm, page.help]) {
  return make("span", { className: "text", dir: "auto" }, ...pieces.map(([word, value], index) => {
    if (word === null) return ""; // padding
    const token = make("span", { textContent: word.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t") });
    if (!word) token.style.paddingLeft = "3px"; // a part of a character, which the next token completes
    if (index === asked) token.className = "asked";
    if (value === null) return token;
    const strength = (0.85 * Math.min(1, Math.abs(value) / largest)).toFixed(2);
    token.style.background = `rgba(${value > 0 ? above : below}, ${strength})`;
    token.title = `${digits(value)} ${unit}`;
    return token;
  }));
}

page.targets.forEach((target, number) => {
  const section = find(`#target-${number}`), curves = section.querySelector(".curves"), off = new Set();
  if (target.methods.rows.length) table(section.querySelector(".methods"), target.methods);
  if (!Object.keys(target.curves).length) return;
  const controls = make("div"), plot = make("div"), boxes = make("fieldset", { ariaLabel: "Methods that are drawn" });
  curves.append(controls, boxes, plot);
  let drawn;
  const redraw = () => draw(plot, { ...drawn, data: drawn.data.filter(({ method }) => !off.has(method)) });
  choose(controls, "Curves of", Object.keys(target.curves), (name) => { drawn = target.curves[name]; redraw(); });
  for (const { method } of drawn.data.filter((trace) => trace.method)) {
    const box = make("input", { type: "checkbox", checked: true });
    box.onchange = () => { off[box.checked ? "delete" : "add"](method); redraw(); };
    boxes.append(make("label", { className: "choice" }, box, " ", swatch(method), method));
  }
});

/** What stands above a context: its example's picture and label, then numbers. */
function about(example, ...told) {
  const { label, picture } = page.examples[example] ?? {};
  const image = picture ? [make("img", { src: picture, alt: label ?? `example ${example}` })] : [];
  return [...image, make("span", { className: "ends", textContent: [label ?? `example ${example}`, ...told].join(", ") })];
}

/** The part of a unit's panel that is of one replacement. */
function showMethod({ contexts, promoted, dots }) {
  const largest = Math.max(...contexts.flatMap(({ pieces }) => pieces.map(([, value]) => Math.abs(value ?? 0)))) || 1;
  find("#contexts").replaceChildren(...contexts.map(({ example, change, clean, activation, pieces }) => {
    const told = [`${digits(clean)} → ${digits(clean + change)} nats`, `activation ${digits(activation)}`];
    return make("div", { className: "context" }, ...about(example, ...told), coloured(pieces, largest, "nats", pieces.findIndex(([, value]) => value === change)));
  }));
  table(find("#promoted"), { columns: ["promotes", "nats"], rows: promoted.filter(([, nats]) => nats > 0) });
  table(find("#held"), { columns: ["holds down", "nats"], rows: promoted.filter(([, nats]) => nats < 0).reverse() });
  draw(find("#dots"), dots);
}

/** What an attention head reads, or why that isn't known. */
function showAttention({ attention, reads }) {
  const place = find("#attention"), why = page.attention || "this unit is no attention head with evidence";
  place.replaceChildren(...(attention ? [] : [make("p", { className: "note", textContent: `Attention isn't shown: ${why}` })]));
  if (!attention) return;
  const scores = make("div"), names = { previous: "previous token", first: "first token", itself: "itself", induction: "induction" };
  table(scores, { columns: Object.keys(reads).map((name) => names[name] ?? name), rows: [Object.values(reads)] });
  const green = [[0, 158, 115], [0, 158, 115]];
  place.append("Mean attention, 0 to 1:", scores, "Green: what the framed token reads.", ...attention.map(({ example, at, pieces }) =>
    make("div", { className: "context" }, ...about(example), coloured(pieces, 1, "of the attention", at, green))));
}

function showUnit(name) {
  if (![...page.units.rows, ...page.neurons.rows].some(([unit]) => unit === name)) return; // of another page
  const { columns, rows } = [page.units, page.neurons].find((list) => list.rows.some(([unit]) => unit === name)) ?? { columns: [], rows: [] };
  const row = rows.find(([unit]) => unit === name), panel = page.panels[name];
  find("#unit").hidden = false;
  find("#unit-head").textContent = name;
  const known = columns.map((column, index) => [column, row[index]]).slice(1), marks = known.filter(([, value]) => typeof value === "number");
  table(find("#worth"), { columns: ["method, and how it is known", "worth"], rows: known.filter(([, value]) => Array.isArray(value)) });
  if (marks.length) find("#worth").append(`Its activations: ${marks.map(([column, value]) => `${column} ${digits(value)}`).join(", ")}.`);
  find("#evidence").hidden = !panel;
  find("#no-evidence").hidden = Boolean(panel);
  find("#option").textContent = `--ablation.explain '[${name}]'`;
  find("#of-method").replaceChildren();
  if (!panel) return;
  choose(find("#of-method"), "Replacement", Object.keys(panel.methods), (method) => showMethod(panel.methods[method]));
  find("#disagree").hidden = panel.compared.length === 0;
  find("#compared").replaceChildren(...panel.compared.map((textContent) => make("p", { textContent })));
  draw(find("#distribution"), panel.distribution);
  showAttention(panel);
}

function openUnit() {
  showUnit(decodeURIComponent(location.hash.slice("#unit=".length)));
  find("#unit-head").focus();
  find("#unit").scrollIntoView();
}

if (find("#units")) {
  const controls = make("div"), plot = make("div");
  find("#maps").append(controls, plot);
  if (Object.keys(page.maps).length) {
    choose(controls, "Worth under", Object.keys(page.maps), (name) => draw(plot, page.maps[name]));
    plot.on("plotly_click", ({ points: [{ data, pointNumber, x }] }) => {
      const name = Array.isArray(pointNumber) ? `${data.sites[pointNumber[0]]} head ${x}` : data.sites[pointNumber];
      location.hash = `unit=${encodeURIComponent(name)}`;
    });
  }
  table(find("#unit-list"), page.units, true);
}
if (find("#neuron-list")) table(find("#neuron-list"), page.neurons, true);
if (find("#unit")) {
  addEventListener("hashchange", openUnit);
  if (location.hash.startsWith("#unit=")) openUnit();
  else showUnit(Object.keys(page.panels)[0] ?? page.units.rows[0]?.[0]);
}
dark.addEventListener("change", () => location.reload());
