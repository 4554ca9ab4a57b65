// Small charts of a quarter of an hour: SVG, of which a new value changes one attribute.

const NS = 'http://www.w3.org/2000/svg';
const WIDTH = 300; // of the drawing, which is stretched to its box
const HEIGHT = 40;
const LEAST = 120; // seconds that a chart shows, of a hub that has just started

function svg(tag, attributes) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// The values of the last `size * step` seconds, one for each `step` seconds: the mean of
// those that were pushed, or the highest.  null: nothing was measured.
export class Series {
  #sum = 0;
  #known = 0; // values in the last step that are not null
  #pushed = Infinity; // seconds in the last step: it is complete, so a new one begins

  constructor({ size = 180, step = 5, highest = false } = {}) {
    Object.assign(this, { size, step, highest });
    this.values = new Array(size).fill(null);
  }

  // Replace all values; `values` are one for each step, the oldest first.
  load(values) {
    const kept = (values ?? []).slice(-this.size);
    this.values = [...new Array(this.size - kept.length).fill(null), ...kept];
    this.#pushed = Infinity;
  }

  // Add the value of one second; returns whether the chart differs.
  push(value) {
    const fresh = this.#pushed >= this.step;
    if (fresh) {
      this.values.shift();
      this.values.push(null);
      this.#sum = this.#known = this.#pushed = 0;
    }
    this.#pushed += 1;
    if (value == null) return fresh;
    const before = this.values[this.size - 1];
    this.#known += 1;
    this.#sum = this.highest ? Math.max(this.#sum, value) : this.#sum + value;
    const after = this.highest ? this.#sum : this.#sum / this.#known;
    this.values[this.size - 1] = after;
    return fresh || after !== before;
  }

  get top() {
    let top = 0;
    for (const value of this.values) if (value > top) top = value;
    return top;
  }

  // The place of the first value that was measured.
  get first() {
    const place = this.values.findIndex((each) => each != null);
    return place < 0 ? this.size : place;
  }

  // The last value that was measured.
  get last() {
    return this.values.findLast((each) => each != null) ?? null;
  }
}

// A chart of one or two lines, the first with its area if `area`.  Up to `bridge` missing
// values are drawn over, and the scale ends at `least` or higher.  It begins with the
// first value, and `span` is its length in seconds; behind the steps in which `marked` is
// not 0, the ground is red.  `describe(chart)` is its text for screen readers.
export class Chart {
  #paths;
  #area = null;
  #ground = null;
  #label = '';

  constructor({ series, area = false, bridge = 0, least = 0, marked = null, describe }) {
    this.series = series;
    this.bridge = bridge;
    this.least = least;
    this.marked = marked;
    this.describe = describe;
    this.node = svg('svg', {
      class: 'chart', role: 'img', viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: 'none',
    });
    this.node.append(svg('path', { class: 'base', d: `M0 ${HEIGHT}H${WIDTH}` }));
    if (marked) this.node.prepend((this.#ground = svg('path', { class: 'ground' })));
    if (area) this.node.append((this.#area = svg('path', { class: 'area' })));
    this.#paths = series.map((_, place) => {
      const path = svg('path', { class: place ? 'b' : 'a' });
      this.node.append(path);
      return path;
    });
    this.draw(); // also without values it has a name
  }

  draw() {
    this.top = ceiling(Math.max(this.least, ...this.series.map((each) => each.top)));
    const [{ size, step }] = this.series;
    const first = Math.min(...this.series.map((each) => each.first));
    const count = Math.min(Math.max(size - first, Math.ceil(LEAST / step)), size);
    this.span = count * step;
    this.series.forEach((series, place) => {
      const runs = runsOf(series.values.slice(-count), this.top, this.bridge);
      this.#paths[place].setAttribute('d', runs.map(line).join(''));
      if (!place) this.#area?.setAttribute('d', runs.map(surface).join(''));
    });
    this.#ground?.setAttribute('d', groundOf(this.marked.values.slice(-count)));
    const label = this.describe(this);
    if (label !== this.#label) this.node.setAttribute('aria-label', (this.#label = label));
  }
}

// The points of each run of values without a gap.
function runsOf(values, top, bridge) {
  const width = WIDTH / (values.length - 1);
  const runs = [];
  let run = null;
  let last = 0;
  values.forEach((value, place) => {
    if (value == null) return;
    if (!run || place - last > bridge + 1) runs.push((run = []));
    last = place;
    const height = HEIGHT * (1 - value / top);
    run.push([Math.round(place * width * 10) / 10, Math.round(height * 10) / 10]);
  });
  // A value alone has no length, so that it gets one.
  for (const each of runs) {
    if (each.length === 1) {
      const [x, y] = each[0];
      each[0] = [Math.max(x - width / 2, 0), y];
      each.push([Math.min(x + width / 2, WIDTH), y]);
    }
  }
  return runs;
}

const line = (run) => `M${run.map((point) => point.join(' ')).join('L')}`;

// A rectangle for each run of steps with a value above 0.
function groundOf(values) {
  const width = WIDTH / (values.length - 1);
  let path = '';
  for (let end, place = 0; place < values.length; place = end + 1) {
    for (end = place; values[end] > 0;) end += 1;
    if (end > place) {
      const left = Math.max(place - 0.5, 0) * width;
      const right = Math.min(end - 0.5, values.length - 1) * width;
      path += `M${left.toFixed(1)} 0H${right.toFixed(1)}V${HEIGHT}H${left.toFixed(1)}Z`;
    }
  }
  return path;
}

const surface = (run) => `${line(run)}V${HEIGHT}H${run[0][0]}Z`;

// The next number that is easy to read: 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15 …
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((each) => each * power >= value * 0.999) * power;
}
