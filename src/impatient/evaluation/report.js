"use strict";
// The dials of the page. All numbers are recomputed from the recording in the page; names from
// outside are only ever set as text.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { times, exits, samples, words } = data;
  const count = exits.length;
  const last = count - 1;
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const quality = data.bits ? unpacked(bytes(data.quality)) : bytes(data.quality);
  /** A byte for every bit: 255 where it is set. */
  function unpacked(packed) {
    const found = new Uint8Array(count * samples);
    for (let place = 0; place < found.length; place++) found[place] = (packed[place >> 3] >> (7 - (place & 7))) & 1 ? 255 : 0;
    return found;
  }
  const scores = Object.fromEntries(Object.entries(data.scores).map(([name, text]) => [name, bytes(text)]));
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const exitRows = data.rows.filter((row) => row.kind === "exit");

  // --- what people read ---

  const digits = (number) => (number < 1000 ? Number(number.toPrecision(3)).toFixed(Math.max(0, 2 - Math.floor(Math.log10(Math.max(number, 1e-3))))) : number.toFixed(0));
  const ms = (time) => `${digits(time)}\u00a0ms`;
  const roundedUp = (number) => {
    const digit = 10 ** (Math.floor(Math.log10(number)) - 2);
    return Math.ceil(number / digit - 1e-9) * digit;
  };
  const percent = (share, places = 1) => `${(share * 100).toFixed(places)}\u00a0%`;
  const plural = (number, word) => `${number.toLocaleString("en").replaceAll(",", "\u202f")} ${word}${number === 1 ? "" : "s"}`;

  // --- what a policy does, for every deadline at once ---

  /** Count, per exit and per latest exit, where samples stop and how good they are. */
  function tally(stopsAt) {
    const leaving = new Float64Array(count);
    const good = new Float64Array(count);
    const forced = new Float64Array(count);
    for (let row = 0; row < samples; row++) {
      const exit = stopsAt(row);
      leaving[exit]++;
      good[exit] += quality[exit * samples + row];
      // had it been stopped before, at the latest exit that fits
      for (let cap = 0; cap < exit; cap++) forced[cap] += quality[cap * samples + row];
    }
    return { leaving, good: good.map((value) => value / 255), forced: forced.map((value) => value / 255) };
  }

  /** Mean milliseconds until each exit has answered, where some heads run when they are passed. */
  function untilExits(open, statistic = "mean") {
    const { stages, heads } = times[statistic];
    let passed = 0;
    return stages.map((stage, exit) => {
      passed += stage;
      const until = passed + heads[exit];
      if (open[exit]) passed += heads[exit];
      return until;
    });
  }

  const tallies = new Map();
  function stepOf(way, step) {
    const key = `${way.index}/${step}`;
    if (!tallies.has(key)) tallies.set(key, way.family ? familyStep(way, step) : pointStep(way));
    return tallies.get(key);
  }
  function familyStep(way, step) {
    const bounds = way.family.codes[step];
    const codes = scores[way.family.score];
    const open = [...bounds.map((bound) => bound < 256), true];
    const stopsAt = (row) => {
      for (let exit = 0; exit < last; exit++) if (codes[exit * samples + row] >= bounds[exit]) return exit;
      return last;
    };
    return { ...tally(stopsAt), until: untilExits(open), open, stopsAt };
  }
  function pointStep(way) {
    const stops = way.stops;
    const stopsAt = (row) => stops[row];
    return { ...tally(stopsAt), until: way.point.until, open: way.point.open, stopsAt };
  }

  /** The shortest deadline that each exit surely meets: the mean of what is past, p99 of what is next. */
  function needed(open) {
    const { stages, heads } = times.mean;
    const slow = times.p99;
    let spent = 0;
    let longest = 0;
    return stages.map((stage, exit) => {
      // a run comes past all exits before
      longest = Math.max(longest, spent + slow.stages[exit] + slow.heads[exit] + data.reserve);
      spent += stage + (open[exit] ? heads[exit] : 0);
      return longest;
    });
  }
  /** The deepest exit that surely fits; beyond rounding, so that a deadline as shown is enough. */
  const deepest = (open, deadline) => needed(open).findLastIndex((least) => least <= deadline + 1e-9);

  /** Quality, mean time and where samples leave, if no exit is deeper than `cap`. */
  function judged(step, cap) {
    const stop = Math.max(cap, 0);
    const leaving = step.leaving.slice(0, stop + 1);
    const good = step.good.slice(0, stop + 1);
    leaving[stop] += sum(step.leaving.slice(stop + 1));
    good[stop] += step.forced[stop];
    const time = sum(Array.from(leaving, (number, exit) => number * step.until[exit])) / samples;
    return { quality: sum(good) / samples, time, leaving, good };
  }

  function wilson(share) {
    const z = 1.959963984540054;
    const centre = (share + (z * z) / (2 * samples)) / (1 + (z * z) / samples);
    const half = (z * Math.sqrt((share * (1 - share)) / samples + (z * z) / (4 * samples * samples))) / (1 + (z * z) / samples);
    return [Math.max(0, centre - half), Math.min(1, centre + half)];
  }

  // --- the dials and the address ---

  const ways = [
    ...data.families.filter((family) => family.fitted).map((family) => ({ name: family.name, family })),
    ...data.points.map((point) => ({ name: point.name, point, stops: bytes(point.stops) })),
    ...data.families.filter((family) => !family.fitted).map((family) => ({ name: family.name, family })),
  ].map((way, index) => ({ ...way, index }));
  if (!ways.length) ways.push({ name: words.only, index: 0, point: { until: untilExits([true]), open: [true], name: words.only }, stops: new Uint8Array(samples) });
  const range = data.range;
  const logarithmic = data.logarithmic;
  const place = (time) => (logarithmic ? Math.log(time / range[0]) / Math.log(range[1] / range[0]) : (time - range[0]) / (range[1] - range[0]));
  const timeAt = (share) => (logarithmic ? range[0] * (range[1] / range[0]) ** share : range[0] + share * (range[1] - range[0]));
  const state = {};

  function asItWas() {
    const first = Math.max(0, ways.findIndex((way) => way.name === data.first));
    Object.assign(state, { way: first, deadline: data.deadline, guaranteed: false, level: 1 });
    state.step = ways[first].family ? ways[first].family.start : 0;
  }
  function readAddress() {
    asItWas();
    const given = new URLSearchParams(location.hash.slice(1));
    const whole = (name, most) => {
      const number = Number(given.get(name));
      return given.has(name) && Number.isInteger(number) && number >= 0 && number < most ? number : null;
    };
    const way = whole("policy", ways.length);
    if (way !== null) {
      state.way = way;
      state.step = ways[way].family ? ways[way].family.start : 0;
    }
    const family = ways[state.way].family;
    state.step = (family && whole("sure", family.codes.length)) ?? state.step;
    state.level = whole("level", data.levels.length) ?? state.level;
    state.guaranteed = given.get("guaranteed") === "1";
    const deadline = Number(given.get("deadline"));
    if (deadline > 0 && Number.isFinite(deadline)) state.deadline = Math.min(Math.max(deadline, range[0]), range[1]);
  }
  let writing = 0;
  function writeAddress() {
    clearTimeout(writing);
    writing = setTimeout(() => {
      const said = new URLSearchParams({ deadline: digits(state.deadline), policy: state.way, sure: state.step });
      if (state.guaranteed) said.set("guaranteed", "1");
      if (state.guaranteed) said.set("level", state.level);
      history.replaceState(null, "", `#${said}`);
      $("spoken").textContent = $("sentence").textContent;
    }, 300);
  }

  // --- drawing ---

  const SVG = "http://www.w3.org/2000/svg";
  function put(parent, tag, attributes = {}, text = null) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }
  function html(parent, tag, attributes = {}, text = null) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }
  // measured once: asking while drawing would lay the page out again and again
  const widths = {};
  function measure() {
    for (const id of ["curve", "leaves", "clock"]) widths[id] = Math.max(280, $(id).clientWidth);
  }
  function canvas(id, height, label) {
    const box = $(id);
    const width = widths[id];
    const svg = document.createElementNS(SVG, "svg");
    for (const [name, value] of Object.entries({ viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label })) svg.setAttribute(name, value);
    box.replaceChildren(svg);
    return { svg, width, height };
  }
  const cut = (text, most) => (text.length <= most ? text : `…${text.slice(1 - most)}`);
  const MARKS = { policy: "M-5-5H5V5H-5Z", exit_free: "M-5-5L5 5M-5 5L5-5", alone: "M0-6V6M-5.2-3L5.2 3M-5.2 3L5.2-3", static: "M0-6L6 5H-6Z", oracle: "M-6 0H6M0-6V6" };
  const COLOURS = ["#c27c0e", "#a64fa0", "#2a8fbd", "#8a8f2d", "#b0413e"];
  function mark(parent, x, y, kind, colour) {
    const lines = ["exit_free", "alone", "oracle"].includes(kind);
    return put(parent, "path", { d: MARKS[kind], transform: `translate(${x} ${y})`, fill: lines ? "none" : colour, stroke: colour, "stroke-width": lines ? 2.5 : 0 });
  }
  function niceTicks(low, high, wanted) {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const found = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) found.push(tick);
    return found;
  }
  function timeTicks(width) {
    if (!logarithmic) return niceTicks(range[0], range[1], width / 90);
    const found = [];
    for (let power = Math.floor(Math.log10(range[0])); power <= Math.log10(range[1]); power++) for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
    return found.filter((tick) => tick >= range[0] && tick <= range[1]);
  }
  const plain = (time) => `${Number(time.toPrecision(6))} ms`;

  /** The rows that are drawn beside the exits: other policies, networks without exits, oracle. */
  const beside = data.rows.filter((row) => row.kind !== "exit");
  const lookOf = (row) => (row.kind === "exit_free" && row !== beside.find((other) => other.kind === "exit_free") ? "alone" : row.kind);
  const colourOf = (row, index) => ({ policy: COLOURS[index % COLOURS.length], oracle: "var(--soft)", exit_free: "var(--ink)", static: COLOURS[(index + 2) % COLOURS.length] })[row.kind];

  function drawCurve(way, cap) {
    const { svg, width, height } = canvas("curve", 320, `${words.quality} over time`);
    const left = 44;
    const bottom = height - 26;
    const x = (time) => left + Math.min(Math.max(place(time), 0), 1) * (width - left - 8);
    const steps = way.family ? way.family.codes.map((_, step) => judged(stepOf(way, step), cap)) : [];
    const values = [...data.rows.map((row) => row.quality), ...steps.map((step) => step.quality), ...data.compared.flatMap((other) => other.exits.map((exit) => exit[1]))];
    const low = Math.min(...values);
    const high = Math.max(...values);
    const room = Math.max(high - low, 0.02) * 0.08;
    const floor = Math.max(0, low - room * (data.budget ? 3 : 1));
    const ceiling = Math.min(1, high + room);
    const y = (value) => bottom - ((value - floor) / (ceiling - floor)) * (bottom - 12);
    for (const tick of niceTicks(floor, ceiling, 5)) {
      put(svg, "line", { class: "grid", x1: left, x2: width - 8, y1: y(tick), y2: y(tick) });
      put(svg, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, `${Number((tick * 100).toFixed(2))} %`);
    }
    for (const tick of timeTicks(width)) put(svg, "text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, plain(tick));
    if (data.budget) {
      const points = data.budget.heights.map((tall, index) => `${x(data.budget.times[index])} ${bottom - tall * 0.2 * bottom}`);
      put(svg, "path", { class: "budget", d: `M${x(data.budget.times[0])} ${bottom}L${points.join("L")}L${x(data.budget.times.at(-1))} ${bottom}Z` });
    }
    const staircase = (held, look) => {
      const corners = held.map(([time, value], index) => `${index ? "H" : "M"}${x(time)}${index ? "V" : " "}${y(value)}`);
      return put(svg, "path", { ...look, d: `${corners.join("")}H${width - 8}` });
    };
    data.compared.forEach((other, index) => staircase(other.exits, { class: "other", stroke: COLOURS[index % COLOURS.length] }));
    const held = exitRows.map((row) => [row.interruptible, row.quality]);
    staircase(held, { class: "steps" });
    put(svg, "line", { class: "until", x1: x(state.deadline), x2: x(state.deadline), y1: 8, y2: bottom });
    const end = x(state.deadline) > width - 70;
    put(svg, "text", { class: "strong", x: x(state.deadline) + (end ? -5 : 5), y: 16, "text-anchor": end ? "end" : "start" }, "deadline");
    if (steps.length) {
      const limit = state.guaranteed ? way.family.certified[state.level] ?? steps.length : 0;
      const path = (from, to) => steps.slice(from, to).map((step) => `${x(step.time)} ${y(step.quality)}`).join("L");
      if (limit > 0) put(svg, "path", { class: "policy unsure", d: `M${path(0, limit + 1)}` });
      if (limit < steps.length - 1) put(svg, "path", { class: "policy", d: `M${path(limit)}` });
    }
    // over the curve, so that the numbers can be read
    held.forEach(([time, value], exit) => {
      put(svg, "circle", { class: "exit", cx: x(time), cy: y(value), r: 8 });
      put(svg, "text", { class: "number", x: x(time), y: y(value) + 3.5 }, String(exit));
    });
    // under the marks: where a policy is as fitted, its mark shows in the dot
    const here = judged(stepOf(way, state.step), cap);
    put(svg, "circle", { class: "here", cx: x(here.time), cy: y(here.quality), r: 10 });
    beside.forEach((row, index) => {
      const drawn = mark(svg, x(row.contract), y(row.quality), lookOf(row), colourOf(row, index));
      put(drawn, "title", {}, `${row.name}: ${percent(row.quality)} after ${ms(row.contract)}`);
    });
    return here;
  }

  function drawLegend() {
    const entry = (text, draw) => {
      const item = html($("legend"), "li");
      const picture = put(item, "svg", { width: 18, height: 14, "aria-hidden": "true" });
      draw(picture);
      html(item, "bdi", {}, text);
    };
    $("legend").replaceChildren();
    const line = (look) => (picture) => put(picture, "line", { x1: 0, x2: 18, y1: 7, y2: 7, ...look });
    entry("this policy, now", (picture) => put(picture, "circle", { class: "here", cx: 9, cy: 7, r: 6 }));
    entry("this policy, from bold to careful", line({ class: "policy" }));
    entry("if stopped at that moment", line({ class: "steps" }));
    beside.forEach((row, index) => {
      const name = { policy: `policy ${row.name}, as fitted`, oracle: "oracle: the cheapest exit that is right, which nobody knows before" }[row.kind] ?? row.name;
      entry(name, (picture) => mark(picture, 9, 7, lookOf(row), colourOf(row, index)));
    });
    data.compared.forEach((other, index) => entry(other.name, line({ class: "other", stroke: COLOURS[index % COLOURS.length] })));
    if (data.budget) entry(`budgets: ${data.budget.name}`, (picture) => put(picture, "rect", { class: "budget", width: 18, height: 14 }));
  }

  function drawLeaves(here) {
    const said = exits.map((_, exit) => `exit ${exit}: ${percent((here.leaving[exit] ?? 0) / samples, 0)}`).join(", ");
    const { svg, width, height } = canvas("leaves", 320, `Where samples leave: ${said}`);
    const bottom = height - 26;
    const tall = bottom - 12;
    const pitch = (width - 20) / count;
    const bar = Math.min(28, pitch * 0.42);
    const labels = [];
    let above = 0;
    let start = 10;
    for (let exit = 0; exit < count; exit++) {
      const centre = 10 + pitch * (exit + 0.5);
      const share = (here.leaving[exit] ?? 0) / samples;
      const flowing = 1 - above;
      put(svg, "rect", { class: "river", x: start, y: 12, width: Math.max(0, centre - bar / 2 - start), height: tall * flowing });
      if (share > 0) {
        const good = (here.good[exit] / samples) * tall;
        const base = 12 + tall * flowing;
        put(svg, "rect", { class: "good", x: centre - bar / 2, y: base - share * tall, width: bar, height: good });
        put(svg, "rect", { class: "bad", x: centre - bar / 2, y: base - share * tall + good, width: bar, height: Math.max(0, share * tall - good) });
        const side = exit < last ? 1 : -1;
        labels.push([{ class: "strong", x: centre + side * (bar / 2 + 4), y: Math.min(base - (share * tall) / 2 + 4, bottom - 3), "text-anchor": exit < last ? "start" : "end" }, percent(share, share < 0.01 ? 1 : 0)]);
        // what is left flows on, above
        if (exit < last && flowing - share > 1e-9) put(svg, "rect", { class: "river", x: centre - bar / 2, y: 12, width: bar, height: tall * (flowing - share) });
      } else if (flowing > 1e-9) put(svg, "rect", { class: "river", x: centre - bar / 2, y: 12, width: bar, height: tall * flowing });
      put(svg, "text", { x: centre, y: height - 6, "text-anchor": "middle" }, pitch > 58 ? `exit ${exit}` : String(exit));
      above += share;
      start = centre + bar / 2;
      if (above > 1 - 1e-9) for (let rest = exit + 1; rest < count; rest++) put(svg, "text", { x: 10 + pitch * (rest + 0.5), y: height - 6, "text-anchor": "middle" }, pitch > 58 ? `exit ${rest}` : String(rest));
      if (above > 1 - 1e-9) break;
    }
    for (const label of labels) put(svg, "text", ...label);
    $("leaves-said").textContent = `Where ${plural(samples, "sample")} leave (shares of all), and whether they were right.`;
  }

  function drawClock(step, cap) {
    const row = 24;
    const { svg, width, height } = canvas("clock", row * count + 44, "One run against the clock");
    const left = Math.min(150, Math.max(92, width * 0.2));
    const { stages, heads } = times.mean;
    const slow = times.p99;
    let end = 0;
    const parts = stages.map((stage, exit) => {
      const head = step.open[exit] || exit === cap ? heads[exit] : 0;
      const part = { start: end, stage, head, late: end + slow.stages[exit] + slow.heads[exit] };
      end += stage + head;
      return part;
    });
    const longest = Math.max(...parts.map((part) => part.late), Math.min(state.deadline * 1.05, end * 1.6));
    // room for the last exit's accuracy
    const x = (time) => left + Math.min(time / longest, 1) * (width - left - 56);
    for (const tick of niceTicks(0, longest, width / 110)) {
      put(svg, "line", { class: "grid", x1: x(tick), x2: x(tick), y1: 4, y2: row * count + 8 });
      put(svg, "text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, plain(tick));
    }
    if (state.deadline <= longest) {
      put(svg, "line", { class: "until", x1: x(state.deadline), x2: x(state.deadline), y1: 2, y2: row * count + 12 });
      const turned = x(state.deadline) > width - 120;
      put(svg, "text", { class: "strong", x: x(state.deadline) + (turned ? -5 : 5), y: row * count + 20, "text-anchor": turned ? "end" : "start" }, `deadline ${ms(state.deadline)}`);
    }
    parts.forEach((part, exit) => {
      const top = row * exit + 8;
      const pale = exit > cap ? " pale" : "";
      const name = put(svg, "text", { x: left - 8, y: top + 12, "text-anchor": "end" }, `${exit}  ${cut(exits[exit], Math.floor((left - 24) / 7))}`);
      put(name, "title", {}, exits[exit]);
      put(svg, "line", { class: `whisker${pale}`, x1: x(part.start + part.stage + part.head), x2: x(part.late), y1: top + 8, y2: top + 8 });
      const good = exitRows[exit].quality;
      put(svg, "text", { class: exit > cap ? "" : "strong", x: Math.max(x(part.late), x(part.start + part.stage + part.head)) + 6, y: top + 12 }, percent(good));
      put(svg, "rect", { class: `stage${pale}`, x: x(part.start), y: top, width: x(part.start + part.stage) - x(part.start), height: 16 });
      put(svg, "rect", { class: `head${pale}`, x: x(part.start + part.stage), y: top, width: x(part.start + part.stage + part.head) - x(part.start + part.stage), height: 16 });
    });
  }

  // --- samples ---

  function drawSamples(way, cap) {
    const cards = document.querySelectorAll(".sample");
    const { stopsAt } = stepOf(way, state.step);
    cards.forEach((card, index) => {
      const example = data.examples[index];
      const exit = Math.min(stopsAt(example.row), Math.max(cap, 0));
      const right = quality[exit * samples + example.row] > 127;
      const layer = card.querySelector(".view:first-child .layer");
      if (layer) layer.src = example.answers[exit].layer;
      card.classList.toggle("wrong", !right);
      card.querySelector("small").replaceChildren(`exit ${exit}: `);
      html(card.querySelector("small"), "bdi", {}, example.answers[exit].said);
      card.querySelector("small").append(right ? "\u00a0✓" : "\u00a0✗");
    });
    if (state.example !== undefined) drawMind(state.example, way, cap);
  }
  function drawMind(index, way, cap) {
    const example = data.examples[index];
    const exit = Math.min(stepOf(way, state.step).stopsAt(example.row), Math.max(cap, 0));
    state.example = index;
    document.querySelectorAll(".sample").forEach((card, place) => card.classList.toggle("chosen", place === index));
    const mind = $("mind");
    mind.replaceChildren();
    example.answers.forEach((answer, place) => {
      const column = html(mind, "div", place > exit ? { class: "left" } : {});
      html(column, "strong", {}, `exit ${place}${place === exit ? " answers" : place > exit ? " is not run" : ""}`);
      if (!answer.top.length) html(column, "div", {}, answer.said);
      if (answer.layer) {
        const view = html(column, "div", { class: "view" });
        html(view, "img", { src: document.querySelectorAll(".sample")[index].querySelector("img").src, alt: "" });
        html(view, "img", { class: "layer", src: answer.layer, alt: "" });
      }
      for (const [name, share] of answer.top) {
        const bar = html(column, "div", { class: name === example.label ? "bar true" : "bar" });
        html(bar, "span").style.width = `${share * 100}%`;
        html(bar, "bdi", {}, name);
        bar.append(` ${percent(share, 0)}`);
      }
    });
  }
  function listenToSamples() {
    const cards = [...document.querySelectorAll(".sample")];
    if (!cards.length) return;
    const look = (index) => drawMind(index, ways[state.way], capNow());
    // first the one whose answers change most
    const changes = data.examples.map((example) => new Set(example.answers.map((answer) => answer.said)).size);
    look(changes.indexOf(Math.max(...changes)));
    cards.forEach((card, index) => {
      card.tabIndex = index ? -1 : 0;
      card.addEventListener("mouseenter", () => look(index));
      card.addEventListener("click", () => look(index));
      card.addEventListener("focus", () => look(index));
      card.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!move) return;
        event.preventDefault();
        const next = cards[(index + move + cards.length) % cards.length];
        card.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    });
  }

  // --- the sentence ---

  /** The row of a fitted policy, if this is one. */
  const rowOf = (way) => data.rows.find((row) => row.kind === "policy" && row.name === way.name);
  const capNow = () => {
    const way = ways[state.way];
    return way.point && way.point.routes ? last : deepest(stepOf(way, state.step).open, state.deadline);
  };
  /** The numbers of the state. As a policy was fitted, those of the evaluation, which are unquantised. */
  function quoted(way, cap, here) {
    const row = rowOf(way);
    const asFitted = row && (way.family ? way.family.fitted && state.step === way.family.start : true);
    if (asFitted && cap === last) return { quality: row.quality, time: row.contract, interval: row.interval, whole: exitRows[last].quality };
    const whole = sum(quality.subarray(cap * samples, (cap + 1) * samples)) / 255 / samples;
    return { ...here, interval: data.yes_or_no ? wilson(here.quality) : null, whole };
  }
  /** Say what leaving early costs against the deepest exit that fits. */
  function price(found, cap) {
    const lost = found.whole - found.quality;
    const way = ways[state.way];
    const after = way.point && way.point.routes ? "" : ` after ${ms(stepOf(way, state.step).until[cap])}`;
    const reference = `(all samples at exit ${cap}: ${percent(found.whole)}${after})`;
    if (Math.abs(lost) < 0.0005) return `leaving early costs no ${words.quality} ${reference}`;
    const points = (Math.abs(lost) * 100).toFixed(1);
    const rounded = (share) => Number((share * 100).toFixed(1));
    // a reader who subtracts the rounded numbers may get another one
    const exactly = Math.abs(rounded(found.whole) - rounded(found.quality)).toFixed(1) === points ? "" : ", before rounding";
    return `leaving early ${lost > 0 ? "costs" : "gains"} ${points} points of ${words.quality}${exactly} ${reference}`;
  }
  function say(way, cap, here) {
    const found = quoted(way, cap, here);
    const sentence = $("sentence");
    const number = (text) => html(sentence, "b", {}, text);
    const routes = way.point && way.point.routes;
    sentence.replaceChildren(routes ? "Without a deadline" : "With a deadline of ");
    if (!routes) number(ms(state.deadline));
    if (cap < 0) {
      sentence.append(" no answer is sure to be there: the first takes up to ");
      number(ms(needed(stepOf(way, state.step).open)[0]));
      sentence.append(".");
    } else {
      sentence.append(` ${words.it_is} `);
      number(percent(found.quality));
      sentence.append(", after ");
      number(ms(found.time));
      const change = found.time / times.free - 1;
      const compared = Math.abs(change) < 0.005 ? "as long as" : `${percent(Math.abs(change), 0)} ${change < 0 ? "less" : "more"} time than`;
      sentence.append(` on average: ${compared} the network without exits.`);
    }
    const under = $("under");
    under.replaceChildren();
    if (cap < 0) under.append(`The runner would give exit 0's answer, late, or raise an error if you say so. `);
    else {
      under.append(rowOf(way) ? "Policy " : "With ");
      html(under, "bdi", {}, way.name);
      under.append(`: ${price(found, cap)}. `);
    }
    if (data.free) under.append(`Without exits: ${percent(data.free.quality)}, always after ${ms(times.free)}. `);
    if (routes) under.append("It chooses which network comes next; the deadline is not applied to it here. ");
    else if (cap === last) under.append("Every exit fits this deadline. ");
    else if (cap >= 0) {
      under.append(`Exit ${cap} (`);
      html(under, "bdi", {}, exits[cap]);
      under.append(`) is the deepest that fits this deadline. `);
    }
    if (found.interval) under.append(`95 % interval of this ${words.quality}: ${percent(found.interval[0])} to ${percent(found.interval[1])}. `);
    if (data.samples < data.recorded) under.append(`Moved dials use ${plural(data.samples, "sample")} of ${data.recorded}.`);
    sentence.dataset.quality = found.quality;
    sentence.dataset.time = found.time;
    sentence.dataset.computed = here.quality;
    sentence.dataset.computedTime = here.time;
    sentence.dataset.cap = cap;
  }

  function sayPromise(way, cap) {
    const family = way.family;
    const limit = family && family.certified.length ? family.certified[state.level] : undefined;
    $("promise").hidden = !state.guaranteed;
    $("shade").hidden = !state.guaranteed || limit === undefined;
    if (!state.guaranteed) return;
    const level = percent(data.levels[state.level], 1).replace(".0", "");
    const promise = $("promise");
    promise.classList.toggle("late", limit === undefined || limit === null || state.step < limit);
    if (limit === undefined) promise.textContent = "Only thresholds on scores from 0 to 1 can be tested here; use impatient fit --delta for other policies.";
    else if (limit === null) promise.textContent = `${plural(data.recorded, "sample")} are too few to show that at most ${level} is lost.`;
    else {
      $("shade").style.width = `${(100 * limit) / Math.max(family.codes.length - 1, 1)}%`;
      const kept = state.step >= limit ? "This one keeps it" : "This one is bolder, and could not be shown to keep it";
      const most = limit < family.codes.length ? `from “${family.words[limit]}” on (right of the shaded part)` : "by none of these thresholds";
      const lost = data.yes_or_no ? `at most ${level} of inputs are answered wrongly that the whole network answers rightly` : `at most ${level} of ${words.quality} is lost against the whole network, on average`;
      const short = cap < last ? " It is about the policy, not about answers that the deadline cuts short." : "";
      promise.textContent = `With probability ${percent(1 - data.delta, 0)}, ${lost}: shown on these samples ${most}. ${kept}.${short} Choose the level before you look, and only one.`;
    }
  }

  /** Mark the exit that the deadline leads to, and say by when each one answers under this policy. */
  function sayExits(way, cap) {
    const least = needed(stepOf(way, state.step).open);
    [...$("exits").rows].forEach((row, exit) => {
      row.cells[1].textContent = ms(roundedUp(least[exit]));
      row.classList.toggle("pale", exit > cap);
      const isDeepest = exit === cap && !(way.point && way.point.routes);
      row.cells[3].textContent = exit > cap ? "late" : isDeepest ? "deepest in time" : "in time";
      row.classList.toggle("deepest", isDeepest);
    });
  }

  function sayOthers() {
    const body = $("others");
    if (!body) return;
    body.replaceChildren();
    for (const other of data.compared) {
      const held = other.exits.map((exit, index) => [...exit, index]).filter((exit) => exit[0] <= state.deadline);
      const policies = other.policies.filter((policy) => policy.time <= state.deadline);
      const best = policies.reduce((most, policy) => (most && most.quality >= policy.quality ? most : policy), null);
      const row = html(body, "tr");
      html(html(row, "th", { scope: "row" }), "bdi", {}, other.name);
      const [time, value, exit] = held.at(-1) ?? [null, null, null];
      for (const text of [value === null ? "nothing yet" : percent(value), exit === null ? "" : `exit ${exit}`, time === null ? "" : ms(time), best ? `${percent(best.quality)} (${best.name})` : "", best ? ms(best.time) : ""]) html(html(row, "td"), "bdi", {}, text);
    }
  }

  // --- all together ---

  function redraw() {
    const way = ways[state.way];
    const cap = capNow();
    const here = drawCurve(way, cap);
    say(way, cap, here);
    sayPromise(way, cap);
    drawLeaves(here);
    drawClock(stepOf(way, state.step), cap);
    drawSamples(way, cap);
    sayExits(way, cap);
    sayOthers();
    $("deadline-said").textContent = ms(state.deadline);
    $("deadline").setAttribute("aria-valuetext", ms(state.deadline));
    const word = way.family ? way.family.words[state.step] : "as learned";
    $("sure-said").textContent = word;
    $("sure").setAttribute("aria-valuetext", word);
  }
  function setDials() {
    const family = ways[state.way].family;
    $("deadline").value = Math.round(place(state.deadline) * 400);
    $("policy").value = state.way;
    $("sure").max = family ? family.codes.length - 1 : 1;
    $("sure").value = family ? state.step : 1;
    $("sure").disabled = !family;
    $("guaranteed").checked = state.guaranteed;
    $("level").value = state.level;
  }
  function changed() {
    redraw();
    writeAddress();
  }

  const asked = new Map(data.asked);
  ways.forEach((way) => html($("policy"), "option", { value: way.index }, asked.get(way.name) ? `${way.name} (asked for: ${asked.get(way.name)})` : way.name));
  data.levels.forEach((level, index) => html($("level"), "option", { value: index }, `${level * 100} %`));
  document.documentElement.classList.add("js");
  readAddress();
  setDials();
  drawLegend();
  measure();
  redraw();
  listenToSamples();
  $("deadline").addEventListener("input", (event) => {
    state.deadline = Math.max(timeAt(event.target.value / 400), 1e-6);
    changed();
  });
  $("sure").addEventListener("input", (event) => {
    state.step = Number(event.target.value);
    changed();
  });
  $("policy").addEventListener("input", (event) => {
    state.way = Number(event.target.value);
    state.step = ways[state.way].family ? ways[state.way].family.start : 0;
    setDials();
    changed();
  });
  $("guaranteed").addEventListener("input", (event) => {
    state.guaranteed = event.target.checked;
    changed();
  });
  $("level").addEventListener("input", (event) => {
    state.level = Number(event.target.value);
    state.guaranteed = true;
    setDials();
    changed();
  });
  $("again").addEventListener("click", () => {
    asItWas();
    setDials();
    changed();
  });
  addEventListener("hashchange", () => {
    readAddress();
    setDials();
    redraw();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    measure();
    redraw();
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
})();
