// A worker as a card, or as a tile where there are many.

import { Chart, Series } from './charts.js';
import {
  both, duration, HOT, isFailing, isOf, KINDS, MINUTES, now, ofItself, sentence, short,
  shownState, SOURCES, STEPS, thousands, troubleOf, whyOf,
} from './words.js';

export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function look(node, name) {
  if (node.className !== name) node.className = name;
}

// --- A worker as a card -------------------------------------------------------------

export class Card {
  #app;
  #overview;
  #worker = null;

  constructor(overview, app, name) {
    this.#app = app;
    this.#overview = overview;
    this.name = name;
    const { el, format } = app;
    const series = (options) => new Series({ size: 90, step: 10, ...options });
    this.speed = series();
    this.p50 = series();
    this.p95 = series({ highest: true });
    this.failing = series({ highest: true });
    this.chart = new Chart({
      series: [this.speed], area: true, marked: this.failing,
      describe: ({ series: [one], marked }) => {
        const failed = marked.values.filter((each) => each).length * marked.step;
        return `Tokens per second, the last ${MINUTES} minutes: highest ${
          format.short(one.top)}${failed ? `; down or failing for ${duration(failed)}` : ''}`;
      },
    });
    this.firstChart = new Chart({
      series: [this.p50, this.p95], bridge: 12,
      describe: ({ series: [one, two] }) =>
        `Time to first token: median up to ${format.ms(one.top)}, 95 % up to ${
          format.ms(two.top)}`,
    });
    this.state = el('strong', {});
    this.since = el('span', { class: 'muted' });
    this.why = el('ul', { class: 'why', hidden: true });
    this.dots = el('span', { class: 'slots', 'aria-hidden': 'true' });
    this.busy = el('span', { class: 'text' });
    this.now = el('b', {}, '–');
    this.first = el('b', { title: 'p50 and p95' }, '–');
    this.models = el('ul', { class: 'models', 'aria-label': 'Models' });
    this.machine = el('ul', { class: 'machine', 'aria-label': 'Machine' });
    this.foot = el('p', { class: 'foot' });
    this.error = el('span', {});
    this.button = el('button', {
      type: 'button', class: 'quiet', 'aria-haspopup': 'menu', 'aria-expanded': 'false',
      'aria-label': `Actions for ${name}`, hidden: !app.can('admin'),
      onclick: () => overview.openMenu(this, this.#worker),
    }, '⋯');
    this.node = el('article', {
      class: 'card worker', tabindex: '-1', 'aria-label': name, 'data-worker': name,
    },
      el('header', {},
        el('div', {}, el('h3', {}, name),
          el('p', { class: 'state' }, this.state, this.since)),
        this.button),
      this.why,
      el('div', { class: 'slots' }, this.dots, this.busy),
      el('div', { class: 'pair' },
        el('div', { class: 'gauge' },
          el('p', { class: 'top' }, 'Tokens/s ', this.now), this.chart.node),
        el('div', { class: 'gauge' },
          el('p', { class: 'top' }, 'First token ', this.first), this.firstChart.node)),
      this.models, this.machine, this.foot);
  }

  loadHistory(columns = {}) {
    const { state = [], breaker = [] } = columns;
    this.speed.load(columns.tokens_per_second);
    this.p50.load(columns.first_token_p50);
    this.p95.load(columns.first_token_p95);
    this.failing.load(state.map((each, place) => isFailing(each, breaker[place])));
    this.#draw();
  }

  push(worker) {
    if (!worker) return;
    const changed = [
      this.speed.push(worker.tokens_per_second ?? 0),
      this.p50.push(worker.first_token_p50),
      this.p95.push(worker.first_token_p95),
      this.failing.push(isFailing(worker.state, worker.breaker.state)),
    ];
    if (changed.some(Boolean)) this.#draw();
  }

  #draw() {
    this.chart.draw();
    this.firstChart.draw();
  }

  render(worker, exchanges) {
    this.#worker = worker;
    const { format } = this.#app;
    const passed = now() - worker.at;
    const trouble = troubleOf(worker);
    const [mark, word, kind, since] = shownState(worker);
    const sought = this.node.classList.contains('sought') ? ' sought' : '';
    const edge = trouble.level || kind;
    look(this.node, `card worker ${edge ? `${edge}-edge` : ''}${sought}`);
    look(this.state, kind);
    put(this.state, `${mark} ${word}`);
    put(this.since, since == null ? '' : `for ${duration(since + passed)}`);
    this.#renderWhy(worker, trouble);
    this.#renderSlots(worker, exchanges);
    put(this.now, format.short(worker.tokens_per_second ?? 0));
    const p50 = worker.first_token_p50 ?? this.p50.last;
    const p95 = worker.first_token_p95 ?? this.p95.last;
    put(this.first, p50 == null ? '–' : both(p50, p95 ?? p50, format));
    this.#renderModels(worker);
    this.#renderMachine(worker);
    this.#renderFoot(worker, passed);
  }

  #renderWhy(worker, trouble) {
    const { el } = this.#app;
    const lines = whyOf(worker);
    this.why.hidden = !lines.length;
    look(this.why, `why ${trouble.level}`);
    while (this.why.children.length > lines.length) this.why.lastChild.remove();
    lines.forEach((line, place) => {
      if (!this.why.children[place]) this.why.append(el('li'));
      put(this.why.children[place], line);
    });
  }

  // A dot for each slot, in the colour of its subject; many slots are only counted.
  #renderSlots({ slots, running, hubs = [] }, exchanges) {
    const { el } = this.#app;
    const count = Math.max(slots ?? 0, running ?? 0, exchanges.length);
    const dots = count > 40 ? 0 : count;
    while (this.dots.children.length > dots) this.dots.lastChild.remove();
    while (this.dots.children.length < dots) this.dots.append(el('span', { class: 'slot' }));
    const sorted = dots && exchanges.toSorted((a, b) => (a.subject < b.subject ? -1 : 1));
    for (let place = 0; place < dots; place += 1) {
      const exchange = sorted[place];
      const dot = this.dots.children[place];
      if (exchange) {
        const step = exchange.state === 'streaming' ? 'busy' : 'reading';
        look(dot, `slot ${step} ${this.#overview.colour(exchange.subject)}`);
        const title = `${exchange.subject}: ${STEPS[exchange.state] ?? exchange.state}`;
        if (dot.title !== title) dot.title = title;
      } else {
        look(dot, place < (running ?? 0) ? 'slot busy' : 'slot');
        if (dot.title) dot.title = '';
      }
    }
    const busy = Math.max(running ?? 0, exchanges.length);
    const shares = hubs.filter((each) => each.running)
      .map((each) => `${each.hub}: ${each.running}`).join(', ');
    put(this.busy, (slots == null ? `${busy} running, slots not known yet`
      : `${busy} of ${slots} slots busy`) + (shares && ` (${shares})`));
  }

  #renderModels(worker) {
    const { el, format } = this.#app;
    const key = JSON.stringify([worker.models, worker.breaker.state]);
    if (key === this.modelsKey) return;
    this.modelsKey = key;
    const shown = worker.models.slice(0, 8);
    const rows = shown.map((model) => {
      const state = model.progress != null && !model.loaded
        ? [el('progress', {
          max: 1, value: model.progress, 'aria-label': `Loading ${model.name}`,
        }), `loading, ${Math.round(model.progress * 100)} %`]
        : model.loaded != null && [model.loaded ? 'loaded' : 'not loaded'];
      const context = model.context ?? worker.context;
      return el('li', {}, el('span', { class: 'name' }, model.name),
        context && el('span', { class: 'muted', title: `${format.number(context)} tokens` },
          `${thousands(context)} context`),
        state && el('span', { class: `row ${model.loaded ? 'good' : 'muted'}` }, state),
        ofItself(model, worker)
          && el('span', { class: 'warn' }, `▲ breaker ${model.breaker.state}`));
    });
    const more = worker.models.length - shown.length;
    if (more > 0) rows.push(el('li', { class: 'muted' }, `and ${more} more models`));
    this.models.replaceChildren(...rows);
  }

  #renderMachine({ agent }) {
    const { el } = this.#app;
    const key = JSON.stringify(agent);
    if (key === this.machineKey) return;
    this.machineKey = key;
    const rows = (agent?.devices ?? []).slice(0, 8).map((device) => {
      const { name, memory_gib: all, used_gib: used, busy, celsius } = device;
      const memory = all && (used == null ? `${short(all)} GiB`
        : `${short(used)} of ${short(all)} GiB`);
      return el('li', {}, el('span', { class: 'name' }, name),
        celsius != null && el('span', { class: celsius >= HOT ? 'bad' : '' },
          `${celsius >= HOT ? '▲ ' : ''}${Math.round(celsius)} °C`),
        busy != null && el('span', {}, `${Math.round(busy * 100)} % busy`),
        all && used != null && el('meter', {
          min: 0, max: all, high: all * 0.97, value: used, 'aria-label': `Memory of ${name}`,
        }),
        memory && el('span', { class: 'memory' }, memory));
    });
    if (agent?.load != null) {
      rows.push(el('li', {}, `${agent.host ? `${agent.host}: ` : ''}processor load ${
        Math.round(agent.load * 100)} %`));
    }
    this.machine.hidden = !rows.length;
    this.machine.replaceChildren(...rows);
  }

  #renderFoot(worker, passed) {
    const { el, format } = this.#app;
    const { last_error: error } = worker;
    if (!this.foot.firstChild) {
      this.about = el('span', {});
      const query = new URLSearchParams({ worker: worker.name });
      this.foot.append(this.about, this.error,
        el('a', { href: `#/requests?${query}` }, 'Its last requests'));
    }
    const parts = [worker.url, worker.build && `build\u00a0${worker.build}`,
      worker.vram_gib && !worker.agent?.devices?.length
        && `${short(worker.vram_gib)}\u00a0GiB\u00a0VRAM`,
      worker.source !== 'file' && SOURCES[worker.source]];
    put(this.about, parts.filter(Boolean).join(' · '));
    put(this.error, error
      ? `Last error, ${duration(error.ago + passed)} ago: ${error.detail || error.code}`
      : '');
  }
}

// --- A worker as a tile, where there are many ---------------------------------------

export class Tile {
  #level = '';
  #kinds = '';
  #app;

  constructor(overview, app, name) {
    const { el } = app;
    this.#app = app;
    this.name = name;
    this.mark = el('span', {});
    this.use = el('span', { class: 'num' });
    this.sub = el('span', { class: 'sub' });
    this.node = el('button', {
      type: 'button', class: 'tile', title: name, 'data-worker': name,
      onclick: () => overview.show(name),
    }, this.mark, el('span', { class: 'name' }, name), this.use, this.sub);
  }

  loadHistory() {}

  push() {}

  // Returns whether it may belong to another place now.
  render(worker) {
    const { format } = this.#app;
    const { level, brief } = troubleOf(worker);
    const [mark, word, kind] = shownState(worker);
    look(this.node, `tile ${level}`);
    look(this.mark, kind);
    put(this.mark, mark);
    put(this.use, `${worker.running ?? 0}/${worker.slots ?? '?'}`);
    const speed = worker.tokens_per_second;
    const about = speed ? `${word}, ${format.short(speed)} tok/s` : word;
    put(this.sub, level ? sentence(brief.replace(/^is /, ''), '') : about);
    const kinds = Object.keys(KINDS).filter((each) => isOf(each, worker)).join();
    const moved = level !== this.#level || kinds !== this.#kinds;
    this.#level = level;
    this.#kinds = kinds;
    return moved;
  }
}
