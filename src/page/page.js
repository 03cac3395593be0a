// The page of a run. A document (see `Document`) comes embedded, as the run's report, or again and again as server-sent
// events `run` while it lives. Each section draws one part of it, and only when that part has changed. Order: what each
// section shows, the header, the reader's hands, the connection.

// Foreground classes, class 1 first: the colours of the pictures.
const CLASS_COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
const PART_COLOURS = {
  training: "#009e73", validation: "#56b4e9", saving: "#0072b2", starting: "#8a94a3", waiting: "#b9c0ca",
  joining: "#cc79a7", recovery: "#d55e00", rework: "#e69f00", stopping: "#5f6b7a",
};
const PHASES = {
  starting: "Starting", waiting: "Waiting for workers", training: "Training", validating: "Validating",
  saving: "Saving a checkpoint", recovering: "Recovering", joining: "A worker joins", stopping: "Stopping", finished: "Finished",
};
const ENDS = { 0: "Complete", 75: "Stopped; the same command resumes", 1: "Failed", 2: "Failed: usage or configuration" };
const UNITS = { voxel: "voxels" };
const SILENCE_S = 5;
const [PAUSE_S, PAUSE_STEPS] = [2.5, 5]; // and so many steps' time: from then on it is told that there is none
const RETRY_MS = 1000;
const SHOWN = 8; // of a long list, before “more”

const page = { doc: null, at: 0, broken: false, drawn: {}, told: null, stepped: { step: null, at: 0 } };
const element = (id) => document.getElementById(id);
const isOver = (doc) => !doc.live || doc.state.phase === "finished" || doc.state.status !== null;
const classColour = (index) => CLASS_COLOURS[index % CLASS_COLOURS.length];

// Now, by the clock of whoever sent the document; of a run that is over, its end.
function now() {
  return isOver(page.doc) ? page.doc.now : page.doc.now + (performance.now() - page.at) / 1000;
}

// A moment as a clock shows it, with the day where that is not the document's.
function time(unix, withDay = false) {
  if (!unix) return NONE;
  const at = new Date(unix * 1000);
  const two = (value) => String(value).padStart(2, "0");
  const clock = [at.getHours(), at.getMinutes(), at.getSeconds()].map(two).join(":");
  const day = [at.getFullYear(), at.getMonth() + 1, at.getDate()].map(two).join("-");
  const sameDay = at.toDateString() === new Date(page.doc.now * 1000).toDateString();
  return h("time", { datetime: at.toISOString() }, sameDay && !withDay ? clock : `${day} ${clock}`);
}

// How long ago, counted on by `tick`.
const age = (unix) => `${Math.max(0, now() - unix).toFixed(0)} s ago`;
const ageing = (unix) => h("span", { "data-since": unix }, age(unix));

function table({ caption, head, rows, label, kind }) {
  const columns = head && h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text))));
  return [caption && h("p", { class: "muted" }, caption), // one in the table would be cut off where that scrolls
    h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label ?? caption },
      h("table", { class: kind }, columns, h("tbody", {}, rows)))];
}

const row = (first, cells, attributes = {}) =>
  h("tr", attributes, h("th", { scope: "row" }, first), cells.map((cell) => h("td", {}, cell)));

const details = (summary, ...children) => h("details", {}, h("summary", {}, summary), children);

const chip = (kind, text) => h("span", { class: `chip ${kind}` }, text);

// --- Scores and cases, in the report.

function drawScores({ scores, cases, last, classes }) {
  const swatch = (index) => h("span", { class: "swatch", style: `--c:${classColour(index)}` });
  const named = (name, i) => [swatch(classes.includes(name) ? classes.indexOf(name) : i), name];
  if (!scores) {
    if (!last) return [];
    const rows = Object.entries(last.classes).map(([name, dice], i) => row(named(name, i), [percent(dice, 2)]));
    rows.push(row("mean", [percent(last.mean_dice, 2)], { class: "mean" }));
    return [table({ caption: `Last validation, at step ${last.step}`, head: ["Class", "Dice"], rows })];
  }
  const hundredths = (value) => (isNumber(value) ? fixed(value * 100, 2) : NONE);
  const cells = (score) => [...[score.dice, score.jaccard].map(hundredths),
    ...[score.hd95, score.asd, score.assd].map((value) => fixed(value, 2)), String(score.empty)];
  const rows = scores.classes.map((score, i) => row(named(score.name, i), cells(score)));
  rows.push(row("mean", cells(scores.mean), { class: "mean" }));
  const distances = ["HD95", "ASD", "ASSD"].map((name) => `${name} (${scores.unit})`);
  const head = ["Class", "Dice %", "Jaccard %", ...distances, "Empty predictions"];
  const names = scores.classes.map((score) => score.name);
  const units = UNITS[scores.unit] ?? scores.unit;
  const byCase = {
    label: "Dice by case, in %", head: ["Case", "Mean %", ...names.map((name) => `${name} %`)],
    rows: cases.map((it) => row(it.case, [hundredths(it.mean), ...names.map((name) => hundredths(it.dice[name]))])),
  };
  return [
    table({ caption: `${plural(scores.volumes, "volume")}; distances in ${units}; ${scores.policy}`, head, rows }),
    cases.length > 0 && details("Dice by case", table(byCase)),
  ];
}

// A picture may come from the document or from beside the page, from nowhere else.
const isOurs = (src) => /^data:image\/png;base64,/.test(src) || (/^[\w][\w./-]*$/.test(src) && !src.includes("//"));

function pictures(overlays) {
  return h("div", { class: "grid" }, overlays.filter((overlay) => isOurs(overlay.src)).map((overlay) => h("figure", {},
    h("img", { src: overlay.src, alt: `Truth on the left, prediction on the right: ${overlay.caption}` }),
    h("figcaption", {}, overlay.caption.replaceAll(" %", "\u00a0%")))));
}

function classLegend(classes) {
  const items = classes.map((name, i) => h("li", {}, h("span", { class: "swatch", style: `--c:${classColour(i)}` }), name));
  return [h("p", {}, "Truth on the left, prediction on the right."), h("ul", { class: "legend" }, items)];
}

function drawCases({ best, worst, classes }) {
  const group = (title, overlays) => overlays.length > 0 && h("div", {}, h("h3", {}, title), pictures(overlays));
  return [classLegend(classes), h("div", { class: "groups" }, group("Best", best), group("Worst", worst))];
}

function drawOverlays({ overlays, classes }) {
  const newest = overlays.at(-1).step;
  const of = (is) => overlays.filter((overlay) => (overlay.step === newest) === is);
  const earlier = of(false).reverse().map((overlay) => ({ ...overlay, caption: `step ${overlay.step}: ${overlay.caption}` }));
  return [classLegend(classes), h("h3", {}, `Step ${newest}`), pictures(of(true)),
    earlier.length > 0 && details("Earlier steps", pictures(earlier))];
}

// --- Curves.

function drawCurves({ curves, interruptions, classes }) {
  const { steps, validations, images_per_s: speeds } = curves;
  const all = [...steps, ...validations.map((it) => it.step)];
  const shared = {
    steps, hint: "", height: 280, domain: [Math.min(...all), Math.max(...all)],
    marks: interruptions.filter((it) => it.loss && it.step !== null).map((it) => it.step),
  };
  const drawable = Object.keys(curves.losses).filter((name) => curves.losses[name].some((value) => value > 0));
  const terms = drawable.sort((a, b) => (b === "total") - (a === "total") || a.localeCompare(b));
  const losses = {
    ...shared, id: "losses", title: "Losses", hint: "logarithmic, ", scale: "log", show: short,
    series: terms.map((name, i) => ({ name, values: curves.losses[name], colour: LINES[i % LINES.length] })),
  };
  const names = classes.length ? classes : [...new Set(validations.flatMap((it) => Object.keys(it.classes)))];
  const dice = {
    ...shared, id: "dice", title: "Validation Dice", scale: "unit", show: (value) => fixed(value, 3),
    steps: validations.map((it) => it.step),
    series: [
      { name: "mean", values: validations.map((it) => it.mean_dice), colour: "var(--ink)" },
      ...names.map((name, i) => ({ name, values: validations.map((it) => it.classes[name] ?? null), colour: classColour(i) })),
    ],
  };
  const speed = {
    ...shared, id: "speed", title: "Images per second", scale: "zero", height: 130, show: (value) => fixed(value, 1),
    series: [{ name: "all workers", values: speeds, colour: LINES[0] }],
  };
  const charts = [steps.length && terms.length && losses, validations.length && dice, speeds.some(isNumber) && speed];
  return [
    h("div", { class: "charts" }, charts.filter(Boolean).map(lineChart)),
    shared.marks.length > 0 && h("p", { class: "muted" }, "Dashed upright lines: something was lost at that step."),
    numbers("Losses as numbers", losses, { lr: curves.lr, "consistency weight": curves.consistency, "images/s": speeds }),
    numbers("Dice as numbers", dice, {}),
  ];
}

// Hundreds of rows are made only while someone looks.
function numbers(title, chart, more) {
  if (!chart.steps.length) return null;
  const id = `numbers-${chart.id}`;
  const columns = chart.series.map(({ name, values }) => [name, values, chart.show]);
  columns.push(...Object.entries(more).map(([name, values]) => [name, values, short]));
  const steps = element(id)?.open ? chart.steps : [];
  const rows = steps.map((step, i) => row(step, columns.map(([, values, show]) => show(values[i]))));
  const head = ["Step", ...columns.map(([name]) => name)];
  const made = details(title, h("div", { class: "tall" }, table({ label: title, head, rows })));
  made.id = id;
  return made;
}

// --- Workers.

const WORKER_CHIPS = { training: ["good", "training"], lost: ["bad", "✕ lost"], stranded: ["warn", "stranded"] };
const PRESENT = ["training", "standby", "stranded"];

// Columns of the table: name, what is shown of a worker, whether at all. What is no more once all have left is not.
function workerColumns(workers, over) {
  const longest = Math.max(...workers.map((it) => it.step_s ?? 0), 1e-9);
  const known = (key) => workers.some((it) => isNumber(it[key]));
  const number = (value, show) => (isNumber(value) ? show(value) : NONE);
  const state = (it) => chip(...(WORKER_CHIPS[it.state] ?? ["plain", it.state]));
  const straggler = (it) => it.straggler && [" ", chip("warn", "▲ straggler")];
  return [
    ["Host", (it) => [h("span", { class: "host" }, it.host), over && straggler(it)]],
    !over && ["State", (it) => [state(it), straggler(it)]],
    !over && ["Rank", (it) => it.rank ?? NONE],
    !over && ["Step", (it) => it.step ?? NONE],
    ["Step time", (it) => [duration(it.step_s), isNumber(it.step_s) && stepBar(it, longest)]],
    ["Own time", (it) => duration(it.own_s)],
    ["Data wait", (it) => percent(it.data_wait)],
    ["Memory", (it) => bytes(it.memory)],
    known("gpu_memory") && ["GPU memory", (it) => bytes(it.gpu_memory)],
    !over && known("queue") && ["Batches ready", (it) => number(it.queue, String)],
    !over && ["Heard", (it) => number(it.heard || null, ageing)],
  ].filter(Boolean);
}

// Without what its process said that is no more.
const present = (it) => (PRESENT.includes(it.state) ? it
  : { ...it, step_s: null, own_s: null, data_wait: null, memory: null, gpu_memory: null, queue: null, straggler: false });

function drawWorkers({ workers: seen, over }) {
  const workers = over ? seen : seen.map(present);
  const columns = workerColumns(workers, over);
  const rows = workers.map((it) => row(it.node, columns.map(([, show]) => show(it)), {
    "data-node": it.node, "data-state": it.state, class: !over && (it.state === "lost" || it.state === "gone") ? "away" : null,
  }));
  const [kind, standing] = over ? ["workers over", ", as they were last heard"] : ["workers", `: ${workersInWords(workers)}`];
  return [
    h("p", {}, `${plural(workers.length, "worker")}${standing}.`),
    table({ label: "Workers", head: ["Node", ...columns.map(([name]) => name)], rows, kind }),
    h("p", { class: "muted" }, "Own time is the part of a step before a worker waits for the others: the full part of the bar."),
  ];
}

function workersInWords(workers) {
  const own = workers.map((it) => it.own_s).filter(isNumber).sort((a, b) => a - b);
  const median = duration(own[Math.floor((own.length - 1) / 2)]);
  const all = workers.filter((it) => it.straggler);
  const slow = all.slice(0, 3).map((it) =>
    `node ${it.node} is a straggler: its own part of a step takes ${duration(it.own_s)}, the median is ${median}`);
  if (all.length > 3) slow.push(`${all.length - 3} more stragglers`);
  const count = (state) => workers.filter((it) => it.state === state).length;
  const states = ["training", "standby", "starting", "stranded", "lost", "gone"].filter(count);
  return [...states.map((state) => `${count(state)} ${state}`), ...slow].join("; ");
}

// The step against the longest one; the full part is the worker's own.
function stepBar(worker, longest) {
  const width = (seconds) => `width:${Math.min(100, ((seconds ?? 0) / longest) * 100).toFixed(1)}%`;
  return h("span", { class: "step-bar", "aria-hidden": "true" },
    h("span", { style: width(worker.step_s) }), h("span", { class: "own", style: width(worker.own_s) }));
}

// --- What happened, where the time went, checkpoints, notes.

function drawTimeline({ generations: all, interruptions, over }) {
  // The report is made by one who does not hear the last one's end.
  const generations = over ? all.map((it) => ({ ...it, to: it.to ?? page.doc.now })) : all;
  const open = generations.some((it) => it.to === null) || interruptions.some((it) => it.open);
  const newest = [...interruptions].reverse();
  const list = (items, start) => h("ol", { class: "happened", reversed: true, start }, items.map(drawInterruption));
  const more = newest.length - SHOWN;
  return [
    generations.length > 0 && [
      timelineChart(generations, interruptions, open ? now() : null),
      h("p", { class: "muted" }, "Bars: generations, as high as they have workers. ▼ a loss, ◆ a change that is none."),
    ],
    newest.length > 0 ? list(newest.slice(0, SHOWN), newest.length) : h("p", {}, "No process was lost."),
    more > 0 && details(`${more} before that`, list(newest.slice(SHOWN), more)),
  ];
}

const RECOVERY = [
  ["detect", "detect_s", "#d55e00"], ["fence", "fence_s", "#e69f00"], ["regroup", "regroup_s", "#cc79a7"],
  ["restore", "restore_s", "#56b4e9"], ["first step", "step_s", "#009e73"],
];

function drawInterruption(it) {
  const parts = RECOVERY.map(([name, key, colour]) => ({ name, seconds: it[key], colour }))
    .filter((part) => isNumber(part.seconds)); // while it lasts, those that are over
  const where = [it.step !== null && `step ${it.step}`, `generation ${it.generation}`].filter(Boolean).join(", ");
  const outage = isNumber(it.outage_s) && h("b", {}, `${duration(it.outage_s)} without training`);
  return h("li", { "data-loss": it.loss, "data-open": it.open },
    h("p", {}, time(it.at), " ", chip(it.loss ? "bad" : "plain", it.kind.replaceAll("-", " ")), " ",
      h("span", { class: "muted" }, where), " ", it.open ? [chip("warn", "still lasts"), " ", ageing(it.at)] : outage),
    h("p", { class: "verdict" }, it.text),
    parts.some((part) => part.seconds > 0) && stack(parts, "thin"));
}

// Each start counts its generations anew, and its time.
const wasResumed = ({ generations }) => generations.some((it, i) => i > 0 && it.generation <= generations[i - 1].generation);

function drawGoodput({ wall_s: wall, goodput, parts_s: seconds, losses, joins, resumed }) {
  const order = Object.keys(PART_COLOURS);
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  const names = Object.keys(seconds).filter((name) => seconds[name] > 0).sort((a, b) => place(a) - place(b));
  const parts = names.map((name) => ({
    name, seconds: seconds[name], colour: PART_COLOURS[name] ?? "#808080",
    text: `${duration(seconds[name])}, ${percent(seconds[name] / wall)}`,
  }));
  const all = ` of ${duration(wall)}${resumed ? " since its last start" : ""} was training that counts`;
  const rest = `; ${plural(losses, "loss", "losses")}, ${plural(joins, "join")}.`;
  return [h("p", {}, h("b", { class: "big" }, percent(goodput)), all, rest), stack(parts)];
}

function drawCheckpoints(checkpoints) {
  const state = ({ verified }) => (verified ? chip("good", "✓ verified") : chip("plain", "not verified"));
  const rows = [...checkpoints].reverse().map((it) =>
    row(it.step, [state(it), time(it.at), bytes(it.bytes), duration(it.hold_s), duration(it.upload_s)]));
  const made = (label, some) =>
    table({ label, head: ["Step", "State", "Made", "Size", "Held up", "Upload"], rows: some, kind: "checkpoints" });
  const shown = 5; // as high as the account of time beside it
  const more = rows.length - shown;
  return [made("Checkpoints, the newest first", rows.slice(0, shown)),
    more > 0 && details(`${more} older`, made("Older checkpoints", rows.slice(shown)))];
}

function drawNotes({ notes, damaged }) {
  const item = (note) => h("li", {}, h("span", { class: "muted" }, time(note.at)), " ", note.text);
  const list = (items) => h("ul", { class: "notes" }, items.map(item));
  const newest = [...notes].reverse();
  const more = newest.length - SHOWN;
  return [list(newest.slice(0, SHOWN)), more > 0 && details(`${more} earlier ones`, list(newest.slice(SHOWN))),
    damaged > 0 && h("p", {}, `${plural(damaged, "line")} of the history could not be read.`)];
}

const drawHints = (hints) => [h("ul", {}, hints.map((hint) => h("li", {}, hint)))];

const drawCommands = (commands) => commands.map(([what, command]) => [h("h3", {}, what), h("pre", { tabindex: 0 }, command)]);

function drawSetup({ environment, config }) {
  const rows = environment.map(([name, value]) => row(name, [value]));
  return [rows.length > 0 && table({ label: "Environment", rows, kind: "pairs" }),
    config && details("Configuration, resolved", h("pre", { tabindex: 0 }, config))];
}

// Of each section: its part of the document, and how that is drawn. It is hidden where its part is nothing or empty.
const SECTIONS = {
  hints: [(doc) => doc.hints, drawHints],
  scores: [
    ({ report, curves, run }) =>
      report && { scores: report.scores, cases: report.cases, last: curves.validations.at(-1), classes: run.classes },
    drawScores,
  ],
  cases: [
    ({ report, run }) =>
      report?.best.length + report?.worst.length > 0 && { best: report.best, worst: report.worst, classes: run.classes },
    drawCases,
  ],
  curves: [
    ({ curves, interruptions, run }) =>
      curves.steps.length + curves.validations.length > 0 && { curves, interruptions, classes: run.classes },
    drawCurves,
  ],
  workers: [(doc) => doc.workers.length > 0 && { workers: doc.workers, over: isOver(doc) }, drawWorkers],
  timeline: [
    ({ generations, interruptions, report, ...doc }) => (generations.length + interruptions.length > 0 || report) && {
      generations, interruptions, over: isOver(doc),
      now: generations.some((it) => it.to === null) && Math.floor(doc.now), // it grows
    },
    drawTimeline,
  ],
  goodput: [(doc) => doc.goodput && { ...doc.goodput, resumed: wasResumed(doc) }, drawGoodput],
  checkpoints: [(doc) => doc.checkpoints, drawCheckpoints],
  overlays: [({ overlays, run }) => overlays.length > 0 && { overlays, classes: run.classes }, drawOverlays],
  notes: [
    ({ notes, report }) => notes.length + (report?.damaged_lines ?? 0) > 0 && { notes, damaged: report?.damaged_lines ?? 0 },
    drawNotes,
  ],
  commands: [(doc) => doc.report?.commands, drawCommands],
  setup: [({ report }) => report && { environment: report.environment, config: report.config }, drawSetup],
};

function drawSection(id, anyway) {
  const [part, draw] = SECTIONS[id];
  const found = part(page.doc);
  const text = JSON.stringify(found ?? null);
  if (page.drawn[id] === text && !anyway) return;
  page.drawn[id] = text;
  const nodes = found && found.length !== 0 ? draw(found).flat(9).filter(Boolean) : [];
  element(id).hidden = nodes.length === 0;
  morphChildren(element(id).querySelector(".body"), nodes);
  element(id).querySelectorAll(".plot, #plot-timeline").forEach(watchWidth);
}

// --- The header.

function drawHeader(doc) {
  const { run, state, report } = doc;
  document.title = doc.live ? `${run.name} - cpcr` : `${run.name} - cpcr report`;
  element("brand").textContent = doc.live ? "cpcr · dashboard" : "cpcr · run report";
  element("name").textContent = run.name;
  const data = run.data && [" · data ", h("code", {}, run.data)];
  const when = !doc.live && [" · ", time(doc.now, true)];
  morphChildren(element("about"), [...h("p", {}, h("code", {}, run.url), data, ` · method\u00a0${run.method}`, when).childNodes]);
  element("version").textContent = `Made by cpcr ${run.version}.`;
  morphChildren(element("progress"), drawProgress(doc));
  const small = (text) => h("small", {}, ` ${text}`);
  const [last, over] = [doc.curves.validations.at(-1), isOver(doc)];
  const which = () => (!doc.live ? small("mean") : over && small("last step"));
  const dice = report?.scores ? [fixed(report.scores.mean.dice, 4), small("final")]
    : [fixed(state.mean_dice, 4), last && small(`at step ${last.step}`)];
  const training = doc.workers.filter((it) => it.state === "training").length;
  const tiles = [
    ["Mean Dice", dice],
    ["Best Dice", state.best ? [fixed(state.best.mean_dice, 4), small(`at step ${state.best.step}`)] : NONE],
    ["Loss", [short(state.loss.total), over && isNumber(state.loss.total) && small("last step")]],
    ["Images/s", [fixed(state.images_per_s, 1), isNumber(state.images_per_s) && which()]],
    over ? ["Took", [duration(doc.goodput?.wall_s), wasResumed(doc) && small("since its last start")]] : ["Time left", about(state.eta_s)],
    ["Workers", [`${state.workers} of ${state.wanted}`,
      !over && training < state.workers && small(`${training} training`)]],
    ["Data wait", [percent(state.data_wait), isNumber(state.data_wait) && which()]],
    ["Workers lost", String(doc.interruptions.filter((i) => i.loss).length)],
  ];
  morphChildren(element("tiles"), tiles.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  Object.assign(document.body.dataset, { phase: state.phase, step: state.step, generation: state.generation });
}

// Whoever makes the report does not hear how its coordinator ends.
const phaseText = ({ phase, status, step }, { steps }) =>
  ENDS[status ?? (phase === "finished" && step >= steps ? 0 : null)] ?? PHASES[phase] ?? phase;

// Seconds since the last step while it should be training, where that is long: who is frozen is not found at once.
function pauseOf({ state, workers }) {
  if (page.stepped.step !== state.step || state.phase !== "training") page.stepped = { step: state.step, at: performance.now() };
  const seconds = (performance.now() - page.stepped.at) / 1000;
  return seconds > Math.max(PAUSE_S, ...workers.map((it) => PAUSE_STEPS * (it.step_s ?? 0))) ? seconds : null;
}

function drawProgress({ run, state }) {
  const said = phaseText(state, run);
  const bad = state.status === 1 || state.status === 2 || state.phase === "recovering";
  const kind = bad ? "bad" : state.phase === "finished" ? "done" : "";
  const left = isNumber(state.eta_s) && !isOver(page.doc) ? `, ${about(state.eta_s)} left` : "";
  const text = `${state.step} of ${run.steps} steps, ${percent(state.step / Math.max(run.steps, 1), 0)}${left}`;
  const pause = pauseOf(page.doc);
  const lasting = page.doc.interruptions.filter((it) => it.open);
  return [
    h("p", {}, h("b", { class: `phase ${kind}` }, said), " ",
      h("span", { class: "muted" }, `${text} · generation\u00a0${state.generation}`),
      pause && [" ", chip("warn", `no step for ${pause.toFixed(0)} s`)]),
    h("progress", { max: Math.max(run.steps, 1), value: state.step, "aria-label": "Steps done" }, text),
    lasting.map((it) => h("p", { class: "reason" }, it.text, " · ", h("span", { class: "muted" }, ageing(it.at)))),
    state.reason && state.reason !== said.toLowerCase() && h("p", { class: "reason" }, state.reason),
  ].flat().filter(Boolean);
}

// For those who listen: phases and interruptions, not each step. A save is too short to be told.
function announce({ run, state, interruptions }) {
  const phase = state.phase === "saving" ? "Training" : phaseText(state, run);
  const before = page.told ?? { phase, count: interruptions.length }; // what was there at first is to be read
  const news = [interruptions.length > before.count && interruptions.at(-1).text, phase !== before.phase && phase].filter(Boolean);
  page.told = { phase, count: interruptions.length };
  if (news.length) element("announce").textContent = `${news.join(". ")}.`;
}

// Which of live, ended, stale, lost and connecting the connection is, and how to say it.
function link() {
  const { doc, at, broken } = page;
  const silent = (performance.now() - at) / 1000;
  if (doc && isOver(doc)) return ["ended", doc.live ? "the run has ended" : ""];
  if (broken) return ["lost", `connection lost, retrying${doc ? `; last news ${silent.toFixed(0)} s ago` : ""}`];
  if (!doc) return ["connecting", "connecting"];
  return silent > SILENCE_S ? ["stale", `no news for ${silent.toFixed(0)} s`] : ["live", "live"];
}

function tick() {
  const [state, text] = link();
  document.body.dataset.link = state;
  morphChildren(element("link"), text ? [h("span", { class: "pulse", "aria-hidden": "true" }), h("span", {}, text)] : []);
  document.querySelectorAll("[data-since]").forEach((it) => { it.textContent = age(Number(it.dataset.since)); });
}

function receive(doc) {
  Object.assign(page, { doc, at: performance.now(), broken: false });
  drawHeader(doc);
  for (const id of Object.keys(SECTIONS)) {
    try {
      drawSection(id);
    } catch (error) {
      console.error(`section ${id}:`, error); // the others are worth seeing
    }
  }
  announce(doc);
  tick();
}

// --- The reader's hands: widths, pointers and keys on charts.

const knownWidths = new WeakMap();

const widths = new ResizeObserver((entries) => {
  const changed = entries.map(({ target }) => target).filter((plot) => knownWidths.get(plot) !== plot.clientWidth);
  changed.forEach((plot) => knownWidths.set(plot, plot.clientWidth));
  new Set(changed.map((plot) => plot.closest("section")?.id)).forEach((id) => id && drawSection(id, true));
});

function watchWidth(plot) {
  if (knownWidths.has(plot)) return;
  knownWidths.set(plot, 0);
  widths.observe(plot);
}

function point(id, step) {
  const before = JSON.stringify([...pointedAt]);
  pointedAt.clear();
  if (id !== null) pointedAt.set(id, step);
  if (JSON.stringify([...pointedAt]) !== before) drawSection("curves", true);
}

function follow(event) {
  const plot = event.target.closest?.(".plot");
  if (!plot) return pointedAt.size && !document.activeElement?.classList.contains("scrub") ? point(null) : undefined;
  const chart = drawnCharts.get(plot.dataset.chart);
  const rect = plot.getBoundingClientRect();
  const step = chart.stepAt(((event.clientX - rect.left) / rect.width) * chart.width);
  return point(plot.dataset.chart, chart.steps[nearest(chart.steps, step)]);
}

document.addEventListener("pointermove", follow);
document.addEventListener("pointerdown", follow);
document.documentElement.addEventListener("mouseleave", () => point(null));
for (const kind of ["input", "focusin"]) {
  document.addEventListener(kind, ({ target }) => {
    if (target.classList.contains("scrub")) point(target.dataset.chart, drawnCharts.get(target.dataset.chart).steps[target.value]);
  });
}
document.addEventListener("focusout", ({ target }) => target.classList.contains("scrub") && point(null));
document.addEventListener("toggle", ({ target }) => target.id.startsWith("numbers-") && drawSection("curves", true), true);

// --- The connection.

function connect() {
  const source = new EventSource("events");
  source.addEventListener("run", (event) => receive(JSON.parse(event.data)));
  source.addEventListener("open", () => { page.broken = false; tick(); });
  source.addEventListener("error", () => {
    source.close(); // it would try again by itself, but late, and not after each kind of answer
    if (!page.doc || !isOver(page.doc)) {
      page.broken = true;
      setTimeout(connect, RETRY_MS);
    }
    tick();
  });
}

const embedded = JSON.parse(element("data").textContent);
if (embedded) receive(embedded);
if (!embedded || embedded.live) {
  connect();
  setInterval(tick, 1000);
}
tick();
