// What the page is drawn with: elements, numbers in words, and charts. Pure functions from data to elements, but for
// `morph`, which makes a part of the page look like a freshly drawn one and keeps all of it that need not change: so focus,
// open details, scroll positions and selections survive an update. Texts become text nodes, never markup.
"use strict";

// --- Elements.

function make(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const h = (name, attributes, ...children) => make(document.createElement(name), attributes, children);

const svg = (name, attributes, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  const kept = (name) => name === "open" && old.nodeName === "DETAILS"; // the reader's, not ours
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !kept(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value && !kept(name)) old.setAttribute(name, value);
  }
  if (old.nodeName === "INPUT" && old.value !== fresh.value) old.value = fresh.value;
  morphChildren(old, [...fresh.childNodes]);
}

function morphChildren(old, fresh) {
  const now = [...old.childNodes];
  fresh.forEach((child, i) => (i < now.length ? morph(now[i], child) : old.append(child)));
  now.slice(fresh.length).forEach((child) => child.remove());
}

// --- Numbers in words.

const NONE = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : NONE);
const percent = (share, digits = 1) => (isNumber(share) ? `${(share * 100).toFixed(digits)} %` : NONE);
const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

// Three digits that say something, whatever the size.
function short(value) {
  if (!isNumber(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 0.1) return `${seconds === 0 ? 0 : seconds.toFixed(3)} s`;
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  return minutes < 60 ? `${minutes} min ${two(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
}

// What is only estimated.
const about = (seconds) => (isNumber(seconds) && seconds < 60 ? `${Math.round(seconds)} s` : duration(seconds));

function bytes(count) {
  if (!isNumber(count)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(Math.floor(Math.log2(Math.max(count, 1)) / 10), units.length - 1);
  return `${(count / 1024 ** power).toFixed(power && count / 1024 ** power < 100 ? 1 : 0)} ${units[power]}`;
}

// --- Lines by step.

// Okabe and Ito: those that show on white as well as on black.
const LINES = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#808080"];

// By id, of what was drawn last: which step is pointed at, and how to find a step under a pointer.
const pointedAt = new Map();
const drawnCharts = new Map();

const widthOf = (id) => Math.max(240, document.getElementById(id)?.clientWidth || 640);

function nearest(steps, step) {
  let best = 0;
  for (let i = 1; i < steps.length; i += 1) if (Math.abs(steps[i] - step) <= Math.abs(steps[best] - step)) best = i;
  return best;
}

// Round numbers between two, at most so many.
function ticks(from, to, most) {
  const rough = Math.max((to - from) / Math.max(most, 1), 1e-12);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-9; i += 1) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function logTicks(from, to) {
  const decades = Math.log10(to / from);
  const found = [];
  const stride = Math.ceil(decades / 6);
  for (let power = Math.floor(Math.log10(from)); power <= Math.log10(to); power += 1) {
    const factors = decades < 2.2 ? (decades < 1 ? [1, 2, 3, 5, 7] : [1, 2, 5]) : power % stride ? [] : [1];
    found.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(6))));
  }
  return found.filter((value) => value >= from && value <= to);
}

// How values become height: `log` over what there is, `unit` from 0 to 1, `zero` from 0 to the largest.
function heights(scale, series, top, bottom) {
  const drawable = (value) => isNumber(value) && (scale !== "log" || value > 0);
  const values = series.flatMap((line) => line.values).filter(drawable);
  const place = (share) => bottom - share * (bottom - top);
  const by = (share, at) => ({ y: (value) => (drawable(value) ? place(share(value)) : null), at });
  if (scale === "log") {
    const [low, high] = values.length ? [Math.min(...values) * 0.8, Math.max(...values) * 1.25] : [0.1, 1];
    return by((value) => Math.log(value / low) / Math.log(high / low), logTicks(low, high));
  }
  const most = scale === "unit" ? 1 : Math.max(...values, 1e-9) * 1.1;
  return by((value) => Math.max(value, 0) / most, ticks(0, most, scale === "unit" ? 5 : 3));
}

// A path with gaps where there is no value.
function pathOf(steps, values, x, y) {
  let pen = "M";
  return values.map((value, i) => {
    const height = y(value);
    const part = height === null ? "" : `${pen}${x(steps[i]).toFixed(1)} ${height.toFixed(1)}`;
    pen = height === null ? "M" : "L";
    return part;
  }).join("");
}

// Room for the names at the ends of lines: for the longest of them, within reason.
const END_CHARS = 16;
const endRoom = (series) => 14 + 6.9 * Math.min(END_CHARS, Math.max(...series.map((line) => line.name.length)));

// Names at the ends of their lines, pushed apart; without colour they are still told from each other.
function endLabels(chart, y, box) {
  const ends = chart.series.map((line, i) => {
    const last = line.values.findLastIndex((value) => y(value) !== null);
    return last < 0 ? null : { i, name: line.name, at: y(line.values[last]) };
  }).filter(Boolean).sort((a, b) => a.at - b.at);
  ends.forEach((end, i) => { if (i > 0) end.at = Math.max(end.at, ends[i - 1].at + 13); });
  for (let i = ends.length - 1, floor = box.bottom; i >= 0; i -= 1, floor -= 13) ends[i].at = Math.min(ends[i].at, floor);
  const text = (name) => (name.length > END_CHARS ? `${name.slice(0, END_CHARS - 1)}…` : name);
  return ends.map((end) =>
    svg("text", { class: "end", x: box.right + 7, y: end.at + 4, style: `--c:${chart.series[end.i].colour}` }, text(end.name)));
}

const readOut = (chart, index) =>
  `step ${chart.steps[index]}: ${chart.series.map((line) => `${line.name} ${chart.show(line.values[index])}`).join(", ")}`;

function summaryOf(chart) {
  const told = chart.series.map((line) => {
    const values = line.values.filter(isNumber);
    return values.length ? `${line.name} from ${chart.show(values[0])} to ${chart.show(values.at(-1))}` : `${line.name} nowhere`;
  });
  return `${chart.title}, steps ${chart.steps[0]} to ${chart.steps.at(-1)}: ${told.join("; ")}.`;
}

// How much of the page a chart has, and where its values are in it.
function frameOf(chart) {
  const id = `plot-${chart.id}`;
  const width = widthOf(id);
  const named = width >= 460 && chart.series.length > 1;
  const box = { left: 46, right: width - (named ? endRoom(chart.series) : 12), top: 10, bottom: chart.height - 24 };
  const [from, to] = chart.domain[0] < chart.domain[1] ? chart.domain : [chart.domain[0] - 1, chart.domain[0] + 1];
  const wide = box.right - box.left;
  const x = (step) => box.left + ((step - from) / (to - from)) * wide;
  const stepAt = (px) => from + ((px - box.left) / wide) * (to - from);
  return { id, width, named, box, from, to, x, stepAt, ...heights(chart.scale, chart.series, box.top, box.bottom) };
}

function gridOf(chart, { box, from, to, x, y, at }) {
  const level = (value) => y(value) ?? box.bottom;
  const upright = ticks(from, to, Math.floor((box.right - box.left) / 70)).filter(Number.isInteger);
  return [
    at.map((value) => [
      svg("line", { class: "grid-line", x1: box.left, x2: box.right, y1: level(value), y2: level(value) }),
      svg("text", { class: "tick", x: box.left - 6, y: level(value) + 4, "text-anchor": "end" }, short(value)),
    ]),
    svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    upright.map((step) => svg("text", { class: "tick", x: x(step), y: chart.height - 6, "text-anchor": "middle" }, String(step))),
  ];
}

// Dots where a step is pointed at, else on all values where those are few.
function dotsOf(chart, pointed, index, { x, y }) {
  const shown = pointed ? [index] : chart.steps.length <= 40 ? [...chart.steps.keys()] : [];
  return chart.series.map((line) => shown.filter((i) => y(line.values[i]) !== null).map((i) => svg("circle", {
    class: "dot", style: `--c:${line.colour}`, r: pointed ? 4 : 3,
    cx: x(chart.steps[i]).toFixed(1), cy: y(line.values[i]).toFixed(1),
  })));
}

// chart: id, title, hint, steps, series [{name, values, colour}], scale, domain [from, to], marks [step], height, show(value).
function lineChart(chart) {
  const frame = frameOf(chart);
  const { id, width, box, from, to, x, y } = frame;
  const pointed = pointedAt.has(chart.id);
  const index = pointed ? nearest(chart.steps, pointedAt.get(chart.id)) : chart.steps.length - 1;
  drawnCharts.set(chart.id, { steps: chart.steps, width, stepAt: frame.stepAt });
  const upright = (kind, step) => svg("path", { class: kind, d: `M${x(step).toFixed(1)} ${box.top}V${box.bottom}` });
  const picture = svg("svg", { viewBox: `0 0 ${width} ${chart.height}`, role: "img", "aria-label": summaryOf(chart) },
    gridOf(chart, frame),
    chart.marks.filter((step) => step >= from && step <= to).map((step) => upright("mark", step)),
    chart.series.map(({ values, colour }) =>
      svg("path", { class: "line", style: `--c:${colour}`, d: pathOf(chart.steps, values, x, y) })),
    pointed && upright("cursor", chart.steps[index]),
    dotsOf(chart, pointed, index, frame),
    frame.named && endLabels(chart, y, box));
  const legend = chart.series.map((line) => h("li", {}, h("span", { class: "key", style: `--c:${line.colour}` }),
    line.name, " ", h("b", {}, chart.show(line.values[index]))));
  // Reached by keys only: pointers are followed by where they are.
  const scrub = h("input", { type: "range", class: "scrub", "data-chart": chart.id,
    min: 0, max: chart.steps.length - 1, value: index,
    "aria-label": `${chart.title}: read out a step`, "aria-valuetext": readOut(chart, index) });
  return h("figure", { class: "chart", id: `chart-${chart.id}` },
    h("figcaption", {}, h("span", { class: "chart-title" }, chart.title), " ",
      h("span", { class: "muted" }, `${chart.hint}step ${chart.steps[index]}`)),
    h("ul", { class: "legend" }, legend),
    h("div", { class: "plot", id, "data-chart": chart.id }, picture, scrub));
}

// --- Shares and times.

// Parts of a whole as one bar and as a list with numbers; parts: [{name, seconds, colour, text}], null where it is not known.
function stack(parts, kind = "") {
  // Below a sum of 1 they would not fill the bar.
  const style = (part) => `flex-grow:${part.seconds * 1000};--c:${part.colour}`;
  const bar = parts.filter((part) => part.seconds > 0).map((part) =>
    h("span", { style: style(part), title: `${part.name}: ${duration(part.seconds)}` }));
  const items = parts.map((part) => h("li", {}, h("span", { class: "swatch", style: `--c:${part.colour}` }),
    part.name, " ", h("b", {}, part.text ?? duration(part.seconds))));
  return [h("div", { class: `stack ${kind}`, "aria-hidden": "true" }, bar), h("ul", { class: "legend" }, items)];
}

// Generations as bars as high as their number of workers, what came in between as marks above. `now` where it goes on.
function timelineChart(generations, interruptions, now) {
  const [width, height, left, top, bottom] = [widthOf("plot-timeline"), 128, 8, 30, 104];
  const endOf = (generation) => generation.to ?? now ?? generation.from;
  const from = Math.min(...generations.map((it) => it.from));
  const to = Math.max(from + 1, now ?? from, ...generations.map(endOf), ...interruptions.map((it) => it.at));
  const x = (time) => left + ((time - from) / (to - from)) * (width - 2 * left);
  const most = Math.max(...generations.map((it) => it.world), 1);
  const bars = generations.map((it) => {
    const [begin, end, y] = [x(it.from), x(endOf(it)), bottom - (it.world / most) * (bottom - top)];
    const long = `generation ${it.generation}, ${plural(it.world, "worker")}`;
    const label = [long, `gen ${it.generation}`, `${it.generation}`].find((text) => text.length * 6.6 + 12 < end - begin);
    const told = `${long}: ${duration(endOf(it) - it.from)}${it.end ? `; ${it.end}` : ""}`;
    const size = { width: Math.max(end - begin - 1.5, 2).toFixed(1), height: (bottom - y).toFixed(1) };
    return [
      svg("rect", { class: it.to === null ? "bar open" : "bar", x: begin.toFixed(1), y: y.toFixed(1), rx: 3, ...size },
        svg("title", {}, told)),
      svg("text", { class: "bar-label", x: begin + 7, y: bottom - 9 }, label ?? ""),
    ];
  });
  const marks = interruptions.map((it) => {
    const d = it.loss ? `M${(x(it.at) - 6).toFixed(1)} 10h12l-6 11z` : `M${x(it.at).toFixed(1)} 9l6 6.5-6 6.5-6-6.5z`;
    return svg("path", { class: it.loss ? "event loss" : "event", d }, svg("title", {}, it.text));
  });
  const anchor = (at) => (at < left + 20 ? "start" : at > width - 40 ? "end" : "middle");
  const times = ticks(0, to - from, Math.floor(width / 90)).map((time) => {
    const at = x(from + time);
    return svg("text", { class: "tick", x: at, y: height - 6, "text-anchor": anchor(at) }, stopwatch(time));
  });
  const losses = plural(interruptions.filter((it) => it.loss).length, "loss", "losses");
  const told = `${plural(generations.length, "generation")} in ${duration(to - from)}, ${losses}; the list below has them.`;
  return h("div", { id: "plot-timeline" }, svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told },
    svg("line", { class: "axis", x1: left, x2: width - left, y1: bottom, y2: bottom }), bars, marks, times));
}

// Seconds since the beginning.
function stopwatch(seconds) {
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(seconds % 60)}` : `${minutes}:${two(seconds % 60)}`;
}
