// One panel of curves, drawn as SVG at the size it has on the screen.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 210;
const EDGE = { top: 10, right: 14, bottom: 26, left: 50 };
// Of the values. What lies outside is cut off and told, so that the first wild steps do not flatten the rest.
const LOW_SHARE = 0.005;
const HIGH_SHARE = 0.975;
const MARKERS_A_LINE = 4;
// More curves than these are drawn without the unsmoothed ones behind them.
const RAW_LINES = 3;
// A curve of more points that is not smoothed is drawn thinly.
const MANY_POINTS = 200;

/** A measured number in four digits: 2.210, 0.2795, 5,514, 1.311M. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(4)}B`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e3) return whole(value);
  if (size === 0) return "0";
  return size >= 1e-3 ? value.toPrecision(4) : value.toExponential(3);
}

/** A counted number: 1,200. */
export function whole(value) {
  return Math.round(value).toLocaleString("en");
}

/** A count that can be very large: 640, 12,800, 1.311M. */
export function amount(value) {
  return value !== null && value < 1e6 ? whole(value) : figure(value);
}

/** A number beside an axis, no longer than need be: 1,200, 250k, 2.2, 1e-4. */
export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${trimmed(value / 1e9)}B`;
  if (size >= 1e6) return `${trimmed(value / 1e6)}M`;
  if (size >= 1e4) return `${trimmed(value / 1e3)}k`;
  if (size >= 1e3) return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  return value === 0 || size >= 1e-3 ? trimmed(value) : Number(value.toPrecision(4)).toExponential();
}

/** Seconds as a person says them: 45 s, 3 min 20 s, 5 h 07 min, 2 d 03 h. */
export function duration(seconds) {
  const all = Math.max(0, Math.round(seconds));
  const [minutes, hours, days] = [60, 3600, 86400].map((unit) => Math.floor(all / unit));
  const two = (value) => String(value).padStart(2, "0");
  if (days) return `${days} d ${two(hours % 24)} h`;
  if (hours) return `${hours} h ${two(minutes % 60)} min`;
  if (minutes) return `${minutes} min ${two(all % 60)} s`;
  return `${all} s`;
}

function trimmed(value) {
  return String(Number(value.toPrecision(4)));
}

export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const PLUS = [[-0.5, -1.5], [0.5, -1.5], [0.5, -0.5], [1.5, -0.5], [1.5, 0.5], [0.5, 0.5], [0.5, 1.5], [-0.5, 1.5], [-0.5, 0.5],
  [-1.5, 0.5], [-1.5, -0.5], [-0.5, -0.5]];

/** The shape that marks a run, the same for those who do not see its colour. */
export function marker(shape, x, y, size = 3.4) {
  const at = (...places) => places.map(([dx, dy]) => `${x + dx * size},${y + dy * size}`).join(" ");
  const polygon = (...places) => svg("polygon", { points: at(...places) });
  const shapes = [
    () => svg("circle", { cx: x, cy: y, r: size }),
    () => polygon([-1, -1], [1, -1], [1, 1], [-1, 1]),
    () => polygon([0, -1.3], [1.2, 0.9], [-1.2, 0.9]),
    () => polygon([0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]),
    () => polygon([0, 1.3], [1.2, -0.9], [-1.2, -0.9]),
    () => polygon(...PLUS),
    () => polygon(...PLUS.map(([dx, dy]) => [(dx - dy) * 0.75, (dx + dy) * 0.75])),
    () => polygon([-1.3, 0], [0.9, -1.2], [0.9, 1.2]),
  ];
  const made = shapes[shape % shapes.length]();
  made.classList.add("marker");
  return made;
}

/** A piece of a run's line with its marker, as a legend. */
export function key(slot) {
  const drawing = svg("svg", { class: `key ${runClass(slot)}`, viewBox: "0 0 26 12", "aria-hidden": "true" });
  drawing.append(svg("path", { class: "line", d: "M1 6H25" }), marker(slot, 13, 6));
  return drawing;
}

/** Colours repeat behind the eighth run, with other dashes. */
export function runClass(slot) {
  return `run-${slot % 8} dash-${Math.floor(slot / 8) % 3}`;
}

/** Mean of each point's neighbours, as many before as after, so that a steep beginning is not shifted. */
function smoothed(points, share) {
  const widest = Math.round((points.length * share) / 2);
  if (widest < 1) return points;
  const sums = [0];
  for (const point of points) sums.push(sums.at(-1) + point.y);
  return points.map((point, place) => {
    const reach = Math.min(widest, place);
    const end = Math.min(points.length, place + reach + 1);
    return { ...point, y: (sums[end] - sums[place - reach]) / (end - place + reach) };
  });
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
}

/** Round values that part a range into about `count`. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [[1.5, 1], [3.5, 2], [7.5, 5], [Infinity, 10]].find(([most]) => rough / power < most)[1];
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high * (1 + 1e-9); place += 1) {
    found.push(Number((place * step).toPrecision(12)));
  }
  return found;
}

function wholeTicks(low, high, count) {
  return ticks(low, high, count).filter(Number.isInteger);
}

function logarithmicTicks(low, high) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) {
    all.push(...[1, 2, 3, 5].map((each) => Number((each * 10 ** power).toPrecision(6))));
  }
  const inside = all.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  if (inside.length < 2) return ticks(low, high, 4);
  const decades = inside.filter((value) => Number.isInteger(Math.log10(value)));
  return inside.length > 6 && decades.length >= 2 ? decades : inside;
}

const TIMES = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

function timeTicks(low, high, count) {
  const rough = (high - low) / count;
  if (rough > TIMES.at(-1)) return ticks(low / 86400, high / 86400, count).map((days) => days * 86400);
  const distance = (step) => Math.abs(Math.log(step / rough));
  const step = TIMES.reduce((best, each) => (distance(each) < distance(best) ? each : best));
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, place) => place * step).filter((at) => at >= low);
}

function shortTime(seconds) {
  if (seconds === 0) return "0";
  const [unit, name] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([each]) => seconds % each === 0) ?? [1, "s"];
  return unit > 1 || seconds < 60 ? `${short(seconds / unit)} ${name}` : duration(seconds);
}

/** The three axes along which curves can be drawn. */
export const AXES = {
  step: { ticks: wholeTicks, short, long: (x) => `step ${whole(x)}` },
  tokens: { ticks: wholeTicks, short, long: (x) => `${amount(x)} tokens` },
  elapsed: { ticks: timeTicks, short: shortTime, long: (x) => duration(x) },
};

/** The point at `x` or the last before it. None before the first and far behind the last. */
function pointAt(points, x, reach) {
  if (!points.length || x < points[0].x - reach || x > points.at(-1).x + reach) return null;
  let [low, high] = [0, points.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (points[middle].x <= x + reach) low = middle;
    else high = middle - 1;
  }
  return points[low];
}

/** Draws lines `{name, className, slot, points: [{x, y, low, high}], dots}`, and tells where the pointer is. */
export class Chart {
  /** onMove: told the chart, the x under the pointer or the keys, or null, and whether it came from keys. */
  constructor(title, unit, onMove, hasTip = true) {
    this.hasTip = hasTip;
    this.title = title;
    this.onMove = onMove;
    this.unit = element("span", { class: "unit" }, unit);
    this.svg = svg("svg", { tabindex: "0", role: "img", "aria-describedby": "help" });
    this.tip = element("div", { class: "tip", "aria-hidden": "true" });
    this.tip.hidden = true;
    const plot = element("div", { class: "plot" }, this.svg, this.tip);
    this.figure = element("figure", {}, element("figcaption", {}, element("h3", {}, title), this.unit), plot);
    this.lines = [];
    this.view = null;
    this.cross = svg("g", { class: "cross" });
    this._listen();
    new ResizeObserver(() => this._resized()).observe(plot);
  }

  /** view: {axis, domain: [first, last], smoothing, isExact, logarithmic, format, tick}. The last one is for the axis. */
  update(lines, view) {
    this.view = view;
    this.lines = lines.map((line) => this._prepared(line));
    this._draw();
  }

  _prepared(line) {
    const keep = (point) => !this.view.logarithmic || point.y > 0;
    const raw = line.points.filter(keep);
    return { ...line, raw, drawn: smoothed(raw, this.view.smoothing), dots: (line.dots ?? []).filter(keep) };
  }

  _resized() {
    if (this.view && this.svg.clientWidth !== this.width) this._draw();
  }

  _draw() {
    this.width = this.svg.clientWidth;
    if (!this.width) return;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", this._words());
    this.svg.replaceChildren();
    if (!this._scale()) {
      this.svg.append(this._label(EDGE.left, HEIGHT / 2, "No value above zero.", "start"));
      return;
    }
    const lines = svg("g", { "clip-path": `url(#${this._clip()})` });
    if (this.lines.length <= RAW_LINES) this.lines.forEach((line) => this._drawRaw(line, lines));
    this.lines.forEach((line) => this._drawLine(line, lines));
    this.svg.append(...this._axes(), lines, this.cross);
    if (this.above !== null) {
      const words = `↑ up to ${this.view.format(this.above)}`;
      this.svg.append(this._label(this.width - EDGE.right, EDGE.top + 8, words, "end"));
    }
    this.point(this.at ?? null);
  }

  /** Find the ranges. False where nothing can be drawn. */
  _scale() {
    const values = this._values();
    if (!values.length) return false;
    const [low, high] = this._range(values);
    const [first, last] = this.view.domain;
    const map = this.view.logarithmic ? Math.log10 : (value) => value;
    const [bottom, top] = [HEIGHT - EDGE.bottom, EDGE.top];
    const [left, right] = [EDGE.left, this.width - EDGE.right];
    this.range = [low, high];
    this.x = (value) => left + ((value - first) / (last - first || 1)) * (right - left);
    this.y = (value) => bottom - ((map(value) - map(low)) / (map(high) - map(low) || 1)) * (bottom - top);
    this.xBack = (place) => first + ((place - left) / (right - left)) * (last - first);
    return true;
  }

  /** All that is to be seen, sorted. */
  _values() {
    const isPlain = this.lines.length > RAW_LINES;
    const reached = ({ y, low, high }) => (high === undefined || isPlain ? [y] : [low, y, high]);
    const points = this.lines.flatMap((line) => [...(isPlain ? line.drawn : line.raw), ...line.dots]);
    const values = points.flatMap(reached).filter((value) => !this.view.logarithmic || value > 0);
    return values.sort((a, b) => a - b);
  }

  _range(values) {
    let [low, high] = [quantile(values, LOW_SHARE), quantile(values, HIGH_SHARE)];
    const greatest = values.at(-1);
    const near = high + 0.35 * (high - low);
    if (greatest <= near) high = greatest;
    this.above = greatest > near ? greatest : null;
    if (values[0] > low - 0.35 * (high - low)) low = values[0];
    if (this.view.logarithmic) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    const fromZero = low >= 0 && low < 0.25 * high;
    return [fromZero ? 0 : low - margin, high + margin];
  }

  _axes() {
    const { axis, domain, logarithmic, tick } = this.view;
    const [low, high] = this.range;
    const right = this.width - EDGE.right;
    const bottom = HEIGHT - EDGE.bottom;
    const made = [svg("defs", {}, svg("clipPath", { id: this._clip() },
      svg("rect", { x: EDGE.left - 4, y: EDGE.top - 4, width: right - EDGE.left + 10, height: bottom - EDGE.top + 4 })))];
    for (const value of logarithmic ? logarithmicTicks(low, high) : ticks(low, high, 4)) {
      const y = Math.round(this.y(value)) + 0.5;
      made.push(svg("path", { class: "grid", d: `M${EDGE.left} ${y}H${right}` }));
      made.push(this._label(EDGE.left - 8, y + 4, tick(value), "end"));
    }
    made.push(svg("path", { class: "base", d: `M${EDGE.left} ${bottom + 0.5}H${right}` }));
    for (const value of AXES[axis].ticks(...domain, Math.max(2, Math.min(6, (right - EDGE.left) / 80)))) {
      const x = this.x(value);
      const anchor = x > right - 16 ? "end" : "middle";
      made.push(this._label(x, HEIGHT - 8, AXES[axis].short(value), anchor));
    }
    return made;
  }

  _label(x, y, text, anchor) {
    return svg("text", { x, y, "text-anchor": anchor }, text);
  }

  _clip() {
    return `clip-${this.title.replace(/[^a-z]/gi, "-")}`;
  }

  _path(points) {
    return points.map((point, place) => `${place ? "L" : "M"}${this.x(point.x).toFixed(1)} ${this.y(point.y).toFixed(1)}`).join("");
  }

  /** Behind the smoothed curve, what was logged: a pale line, or the reach of the values that make a point. */
  _drawRaw(line, into) {
    const group = svg("g", { class: `raw ${line.className}` });
    const spread = line.raw.filter((point) => point.high !== undefined && (!this.view.logarithmic || point.low > 0));
    if (spread.length > 1) {
      const low = spread.map((point) => ({ x: point.x, y: point.low })).reverse();
      const high = spread.map((point) => ({ x: point.x, y: point.high }));
      group.append(svg("path", { class: "band", d: `${this._path([...high, ...low])}Z` }));
    } else if (line.drawn !== line.raw) {
      group.append(svg("path", { class: "line", d: this._path(line.raw) }));
    }
    into.append(group);
  }

  _drawLine(line, into) {
    const isRaw = !this.view.isExact && line.drawn === line.raw && line.raw.length > MANY_POINTS;
    const group = svg("g", { class: isRaw ? `thin ${line.className}` : line.className });
    group.append(svg("path", { class: "line", d: this._path(line.drawn) }));
    if (line.slot !== undefined) this._marks(line).forEach(([x, y]) => group.append(marker(line.slot, x, y)));
    for (const dot of line.dots) {
      group.append(svg("circle", { class: "dot", cx: this.x(dot.x), cy: this.y(dot.y), r: 3.6 }));
    }
    into.append(group);
  }

  /** Where a line is marked: at its end, and between where it has company. Runs take turns. */
  _marks({ drawn, slot }) {
    if (!drawn.length) return [];
    const end = drawn.at(-1);
    const places = [end.x];
    const step = (this.view.domain[1] - this.view.domain[0]) / MARKERS_A_LINE;
    for (let turn = 0; this.lines.length > 1 && turn < MARKERS_A_LINE; turn += 1) {
      const x = this.view.domain[0] + (turn + 0.25 + ((slot * 3) % 8) / 12) * step;
      if (x > drawn[0].x && x < end.x - step / 3) places.push(x);
    }
    return places.map((x) => pointAt(drawn, x, 0)).map((point) => [this.x(point.x), this.y(point.y)]);
  }

  /** Show the values at an x, or none. */
  point(x) {
    this.at = x;
    this.cross.replaceChildren();
    const found = x === null || !this.x ? [] : this._found(x);
    const tells = this.leads && this.hasTip;
    this.tip.hidden = !found.length || !tells;
    if (!found.length) return;
    const place = Math.round(this.x(this._nearest(found, x))) + 0.5;
    this.cross.append(svg("path", { class: "hair", d: `M${place} ${EDGE.top}V${HEIGHT - EDGE.bottom}` }));
    for (const { line, point } of found) {
      const y = this.y(point.y);
      if (y < EDGE.top - 4) continue;
      this.cross.append(svg("circle", { class: `spot ${line.className}`, cx: this.x(point.x), cy: y, r: 4 }));
    }
    if (tells) this._tell(found, place);
  }

  _nearest(found, x) {
    return found.map(({ point }) => point.x).reduce((best, each) => (Math.abs(each - x) < Math.abs(best - x) ? each : best));
  }

  _found(x) {
    const reach = (this.view.domain[1] - this.view.domain[0]) / 150;
    const known = this.lines.map((line) => ({ line, point: pointAt(line.drawn, x, reach) }));
    return known.filter(({ point }) => point);
  }

  _tell(found, place) {
    // In the order in which the curves lie there.
    const rows = found.sort((a, b) => b.point.y - a.point.y).map(({ line, point }) => {
      return element("div", {}, key(line.slot), element("span", {}, line.name), element("b", {}, this.view.format(point.y)));
    });
    this.tip.replaceChildren(element("p", {}, AXES[this.view.axis].long(this._nearest(found, this.at))), ...rows);
    const flips = place > this.width / 2;
    this.tip.style.left = flips ? "auto" : `${place + 12}px`;
    this.tip.style.right = flips ? `${this.width - place + 12}px` : "auto";
  }

  /** The x that is shown for the crosshair, in words. */
  where() {
    const found = this.at === null || this.at === undefined ? [] : this._found(this.at);
    return found.length ? AXES[this.view.axis].long(this._nearest(found, this.at)) : "";
  }

  /** What a screen reader says of the values at the crosshair. */
  spoken() {
    const where = this.where();
    const values = where ? this._found(this.at).map(({ line, point }) => `${line.name} ${this.view.format(point.y)}`) : [];
    return where && `${where}: ${values.join(", ")}`;
  }

  _words() {
    const ends = this.lines.filter((line) => line.drawn.length);
    const told = ends.map((line) => `${line.name} ends at ${this.view.format(line.drawn.at(-1).y)}`);
    return `${this.title}. ${told.slice(0, 8).join(", ") || "No values"}.`;
  }

  _listen() {
    this.svg.addEventListener("pointermove", (event) => {
      const place = event.clientX - this.svg.getBoundingClientRect().left;
      if (this.xBack) this.onMove(this, this.xBack(place), false);
    });
    this.svg.addEventListener("pointerleave", () => this.onMove(this, null, false));
    this.svg.addEventListener("blur", () => this.onMove(this, null, false));
    this.svg.addEventListener("keydown", (event) => this._key(event));
  }

  _key(event) {
    const [first, last] = this.view?.domain ?? [0, 0];
    const step = (last - first) / (event.shiftKey ? 10 : 100);
    const here = this.at ?? last;
    const moves = { ArrowLeft: here - step, ArrowRight: here + step, Home: first, End: last, Escape: null };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const to = moves[event.key];
    this.onMove(this, to === null ? null : Math.min(last, Math.max(first, to)), true);
  }
}
