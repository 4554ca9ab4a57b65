// The overview: a verdict, the hub's figures, a card for each worker, and its requests.

import { Chart, Series } from './charts.js';
import {
  duration, hubsOf, isOf, KINDS, LEVELS, MARKS, MINUTES, now, soon, STEPS, sumsOf,
  troubleOf, verdictOf,
} from './words.js';
import { Card, Tile, look, put } from './workers.js';

const MOST_CARDS = 60; // more workers than this are shown as tiles
const MOST_ROWS = 50; // of a table
const MOST_TROUBLES = 6; // below the verdict
const LEAST = 250; // ms between two renderings

export function mount(root, app) {
  const overview = new Overview(root, app);
  overview.start();
  return Object.assign(() => overview.stop(), { follow: () => overview.follow() });
}

class Overview {
  workers = new Map(); // by name: what is known of each, in the hub's order
  exchanges = new Map(); // by id
  queue = [];
  totals = { running: 0, waiting: 0 };
  cluster = { store: null, hubs: [], missing: [] }; // a store is null where there is one hub
  colours = new Map(); // of subjects
  #app;
  #boxes = new Map(); // by worker: its card or tile
  #compact = null;
  #dirty = new Set(); // workers to render
  #due = 0;
  #last = 0;
  #timers = [];
  #stopped = new AbortController();
  #requested = {}; // what is being fetched
  #mentioned = new Map(); // by worker: the trouble that was announced
  #filter = { text: '', kind: 'all' };

  constructor(root, app) {
    this.#app = app;
    this.root = root;
    this.#build();
  }

  start() {
    const { live } = this.#app;
    const signal = this.#stopped.signal;
    const on = (name, listener) =>
      live.addEventListener(name, (event) => listener(event.detail), { signal });
    on('connection', ({ state }) => state === 'open' && this.#load());
    on('sample', (sample) => this.#sample(sample));
    on('worker', (worker) => this.#take(worker, Infinity));
    on('fleet', (change) => this.#changeFleet(change));
    on('exchange', (exchange) => this.#follow(exchange));
    on('queue', (waiting) => this.#join(waiting));
    this.#timers.push(setInterval(() => this.#tick(), 1_000));
    this.#load();
  }

  stop() {
    this.#stopped.abort();
    this.#timers.forEach(clearInterval);
    clearTimeout(this.#due);
    this.#closeMenu();
    this.dialog?.close();
  }

  // --- What it shows ------------------------------------------------------------------

  #build() {
    const { el } = this.#app;
    const admin = this.#app.can('admin');
    this.mark = el('span', { class: 'mark', 'aria-hidden': 'true' });
    this.verdict = el('span', {}, 'Loading…');
    this.troubles = el('ul', {});
    this.age = el('p', { class: 'notice', hidden: true });
    this.hubs = el('ul', { class: 'hubs row', 'aria-label': 'Hubs', hidden: true });
    this.totalsBox = new Totals(this.#app);
    this.count = el('h2', {});
    this.filters = this.#buildFilters();
    this.list = el('div', { class: 'workers' });
    this.waiting = new Table(this.#app, 'Nothing waits for a slot.', [
      ['Place', 'num'], ['Subject'], ['Class', 'less'], ['Model', 'less'], ['Waited', 'num'],
      ['Expected', 'num'], ['Hub', 'hub less'], ...(admin ? [['', 'num']] : []),
    ]);
    this.queueHead = el('h2', {}, 'Queue');
    this.queueSums = el('p', { class: 'hint' });
    this.flight = new Table(this.#app, 'No request is being answered.', [
      ['Subject'], ['Model', 'less'], ['Worker'], ['State', 'less'], ['Age', 'num'],
      ['Tokens', 'num'], ['Hub', 'hub less'],
      ...(admin ? [['', 'num']] : []),
    ]);
    this.flightHead = el('h2', {}, 'In flight');
    this.root.append(
      this.age,
      el('section', { class: 'verdict', 'aria-label': 'Verdict' },
        el('div', { class: 'head' },
          el('h1', {}, this.mark, this.verdict),
          admin && el('div', { class: 'row' },
            el('button', { type: 'button', onclick: () => this.#add() }, 'Add worker'),
            el('button', { type: 'button', onclick: () => this.#reload() },
              'Reload settings'))),
        this.troubles, this.hubs),
      this.totalsBox.node,
      el('section', { class: 'fleet', 'aria-label': 'Workers' },
        el('div', { class: 'head' }, this.count, this.filters), this.list),
      (this.two = el('div', { class: 'two' },
        el('section', { class: 'card', 'aria-label': 'Queue' },
          this.queueHead, this.queueSums, this.waiting.node),
        el('section', { class: 'card', 'aria-label': 'Requests in flight' },
          this.flightHead, this.flight.node))));
  }

  #buildFilters() {
    const { el } = this.#app;
    const input = el('input', {
      type: 'search', placeholder: 'Find a worker or model',
      'aria-label': 'Find a worker or model',
      oninput: () => {
        this.#filter.text = input.value.trim().toLowerCase();
        this.#arrange();
      },
    });
    this.kinds = ['all', 'trouble', 'busy', 'idle', 'held'].map((kind) =>
      el('button', {
        type: 'button', 'data-kind': kind, 'aria-pressed': String(kind === 'all'),
        onclick: () => {
          this.#filter.kind = kind;
          for (const each of this.kinds) {
            each.setAttribute('aria-pressed', String(each.dataset.kind === kind));
          }
          this.#arrange();
        },
      }, kind));
    return el('div', { class: 'row filters', hidden: true }, input, this.kinds);
  }

  // --- What the hub sends -------------------------------------------------------------

  async #load() {
    if (this.#requested.all) return;
    this.#requested.all = true;
    const { api } = this.#app;
    const signal = this.#stopped.signal;
    const asked = now();
    try {
      const [{ workers }, exchanges, { queue }, hubs] = await Promise.all([
        api('/admin/workers', { signal }), api('/admin/exchanges', { signal }),
        api('/admin/queue', { signal }), api('/admin/hubs', { signal }),
      ]);
      this.#setHubs(hubs);
      this.#setWorkers(workers, asked);
      this.#setExchanges(exchanges);
      this.queue = queue;
      this.totals.waiting = Math.max(this.totals.waiting, queue.length);
      this.#render(true);
      await this.#loadHistory();
    } catch (error) {
      this.#fail(error);
    } finally {
      this.#requested.all = false;
    }
  }

  async #loadHistory() {
    const { api } = this.#app;
    const signal = this.#stopped.signal;
    const seconds = MINUTES * 60;
    const hub = await api(`/admin/history?seconds=${seconds}&step=5`, { signal });
    this.totalsBox.load(hub.hub);
    if (this.workers.size && !this.#compact) {
      const query = `worker=*&seconds=${seconds}&step=10`;
      const { workers } = await api(`/admin/history?${query}`, { signal });
      for (const [name, columns] of Object.entries(workers ?? {})) {
        this.#boxes.get(name)?.loadHistory(columns);
      }
    }
  }

  #fail(error) {
    if (error.name === 'AbortError' || this.#stopped.signal.aborted) return;
    console.error(error);
    if (!this.workers.size) {
      look(this.mark, 'mark bad');
      put(this.mark, MARKS.bad);
      put(this.verdict, error.message);
    }
  }

  // Fetch something again, at most once at a time.
  async #refetch(what, take) {
    if (this.#requested[what]) {
      this.#requested[what] = 'again'; // what is on its way may be older than the reason
      return;
    }
    try {
      do {
        this.#requested[what] = 'once';
        const asked = now();
        const signal = this.#stopped.signal;
        take(await this.#app.api(`/admin/${what}`, { signal }), asked);
        this.#schedule();
      } while (this.#requested[what] === 'again');
    } catch (error) {
      if (!(error instanceof this.#app.ApiError) && error.name !== 'AbortError') throw error;
    } finally {
      this.#requested[what] = false;
    }
  }

  // `asked`: when the answer was asked for.  A worker of whom an event came since then may
  // have changed after the answer was written.
  #setWorkers(workers, asked) {
    const known = this.workers;
    this.workers = new Map(workers.map((each) => {
      const before = known.get(each.name);
      if (before?.heard > asked) return [each.name, before];
      return [each.name, { ...recent(before), ...each, at: now() }];
    }));
    for (const name of this.workers.keys()) this.#dirty.add(name);
  }

  // Of a hub that did not answer in time, the requests that are known stay.
  #setExchanges({ exchanges, missing = [] }) {
    const before = [...this.exchanges.values()];
    const touched = new Set(before.map((each) => each.worker));
    const kept = before.filter((each) => missing.includes(each.hub));
    this.exchanges = new Map([
      ...kept.map((each) => [each.id, each]),
      ...exchanges.map((each) => [each.id, { ...each, at: now() }]),
    ]);
    for (const each of exchanges) touched.add(each.worker);
    for (const name of touched) this.#dirty.add(name);
  }

  #take(worker, asked) {
    const before = this.workers.get(worker.name);
    if (before?.heard > asked) return;
    const heard = asked === Infinity ? now() : 0;
    this.workers.set(worker.name, { ...recent(before), ...worker, at: now(), heard });
    this.#dirty.add(worker.name);
    this.#schedule();
  }

  #setHubs({ store, hubs, missing = [] }) {
    this.cluster = { store, hubs, missing };
  }

  #changeFleet({ change, worker }) {
    if (change === 'removed' || change === 'gone') {
      this.workers.delete(worker);
      this.#schedule();
    }
    this.#refetch('workers', ({ workers }, asked) => this.#setWorkers(workers, asked));
  }

  #sample(sample) {
    this.totals = sample;
    if (sample.store) {
      const missing = this.cluster.missing.filter((name) =>
        !sample.hubs.some(({ hub }) => hub === name));
      this.#setHubs({ ...sample, missing });
    }
    for (const each of sample.workers ?? []) {
      const known = this.workers.get(each.name);
      if (!known) continue;
      const { state, hold, breaker, ...figures } = each;
      Object.assign(known, figures);
      this.#dirty.add(each.name);
    }
    this.totalsBox.push(sample);
    if (!this.#compact) {
      for (const [name, box] of this.#boxes) box.push(this.workers.get(name));
    }
    this.detail?.push(this.workers.get(this.detail.name));
    this.#schedule();
  }

  #follow(exchange) {
    const { id, change } = exchange;
    const before = this.exchanges.get(id);
    if (before) this.#dirty.add(before.worker);
    if (change === 'ended') {
      this.exchanges.delete(id);
      this.#leave(id);
    } else {
      this.exchanges.set(id, { ...exchange, at: now() });
      this.#dirty.add(exchange.worker);
      if (change === 'attempt') this.#leave(id);
    }
    this.#schedule();
  }

  #join(waiting) {
    this.queue.push({ ...waiting, at: now() });
    this.#schedule();
  }

  #leave(id) {
    const place = this.queue.findIndex((each) => each.id === id);
    if (place >= 0) this.queue.splice(place, 1);
  }

  // Once a second: what no event is sent for.
  #tick() {
    const seconds = (this.seconds = (this.seconds ?? 0) + 1);
    if (document.hidden) return;
    this.#schedule();
    if (this.#app.live.state !== 'open') return;
    // The longer a list, the less often: each row costs the hub some microseconds.
    const often = (size) => (size > MOST_ROWS ? 5 : 2);
    const running = Math.max(this.exchanges.size, this.totals.running ?? 0);
    if (running && seconds % often(running) === 0) {
      this.#refetch('exchanges', (answer) => this.#setExchanges(answer));
    }
    const waiting = Math.max(this.queue.length, this.totals.waiting ?? 0);
    if (waiting && seconds % often(waiting) === 1) {
      this.#refetch('queue', ({ queue, missing = [] }) => {
        const kept = this.queue.filter((each) => missing.includes(each.hub));
        this.queue = [...queue.map((each) => ({ ...each, at: now() })), ...kept];
      });
    }
    if (this.cluster.store && seconds % 5 === 0) {
      this.#refetch('hubs', (hubs) => this.#setHubs(hubs));
    }
    if (seconds % (this.#compact ? 60 : 15) === 0) {
      this.#refetch('workers', ({ workers }, asked) => this.#setWorkers(workers, asked));
    }
    for (const [name, worker] of this.workers) {
      // Their times go on: for how long, and until when.
      if (!this.#compact || troubleOf(worker).level) this.#dirty.add(name);
    }
    this.#schedule();
  }

  // --- Rendering ----------------------------------------------------------------------

  #schedule() {
    if (this.#due || this.#stopped.signal.aborted) return;
    const least = this.#compact ? 4 * LEAST : LEAST;
    const wait = Math.max(least - (performance.now() - this.#last), 0);
    this.#due = setTimeout(() => requestAnimationFrame(() => this.#render()), wait);
  }

  #render(all = false) {
    clearTimeout(this.#due);
    this.#due = 0;
    if (this.#stopped.signal.aborted) return;
    this.#last = performance.now();
    const compact = this.workers.size > MOST_CARDS;
    const names = [...this.workers.keys()];
    const same = compact === this.#compact && names.length === this.#boxes.size
      && names.every((name) => this.#boxes.has(name));
    if (!same || all) this.#setBoxes(compact);
    const byWorker = this.#exchangesByWorker();
    let moved = false;
    for (const name of this.#dirty) {
      const worker = this.workers.get(name);
      const box = this.#boxes.get(name);
      if (worker && box) moved = box.render(worker, byWorker.get(name) ?? []) || moved;
      if (worker && this.detail?.name === name) {
        this.detail.render(worker, byWorker.get(name) ?? []);
      }
    }
    this.#dirty.clear();
    if (compact && (moved || !same)) this.#arrange();
    this.#renderVerdict();
    this.totalsBox.render(this.totals, this.workers);
    this.#renderQueue();
    this.#renderFlight();
  }

  #exchangesByWorker() {
    const found = new Map();
    for (const each of this.exchanges.values()) {
      if (!each.worker || each.state === 'queued') continue;
      if (!found.has(each.worker)) found.set(each.worker, []);
      found.get(each.worker).push(each);
    }
    return found;
  }

  #setBoxes(compact) {
    if (compact !== this.#compact) {
      this.#compact = compact;
      this.#boxes.clear();
      this.list.replaceChildren();
      look(this.list, compact ? 'tiles' : 'workers');
      this.filters.hidden = !compact;
    }
    for (const [name, box] of this.#boxes) {
      if (!this.workers.has(name)) {
        box.node.remove();
        this.#boxes.delete(name);
      }
    }
    let place = 0;
    for (const name of this.workers.keys()) {
      let box = this.#boxes.get(name);
      if (!box) {
        box = compact ? new Tile(this, this.#app, name) : new Card(this, this.#app, name);
        this.#boxes.set(name, box);
        this.#dirty.add(name);
      }
      if (!compact && this.list.children[place] !== box.node) {
        this.list.insertBefore(box.node, this.list.children[place] ?? null);
      }
      place += 1;
    }
    if (!this.workers.size) this.list.replaceChildren(this.#emptyHub());
    else this.list.querySelector('.first')?.remove();
    this.#seek();
  }

  // Tiles: those that the filter leaves, the ones in trouble first.
  #arrange() {
    const { text, kind } = this.#filter;
    const wanted = [];
    for (const [name, worker] of this.workers) {
      const words = [name, worker.url, ...worker.models.map((each) => each.name)];
      const named = !text || words.some((each) => each.toLowerCase().includes(text));
      if (named && isOf(kind, worker)) wanted.push(worker);
    }
    wanted.sort((a, b) => LEVELS[troubleOf(a).level] - LEVELS[troubleOf(b).level]);
    const nodes = wanted.map(({ name }) => this.#boxes.get(name).node);
    const focused = document.activeElement;
    arrange(this.list, nodes);
    if (focused !== document.activeElement && this.list.contains(focused)) focused.focus();
    for (const each of this.kinds) {
      const found = [...this.workers.values()].filter((one) => isOf(each.dataset.kind, one));
      put(each, `${KINDS[each.dataset.kind]} ${this.#app.format.number(found.length)}`);
    }
  }

  #emptyHub() {
    const { el, command } = this.#app;
    const add = 'gollama-proxy workers add http://10.0.0.13:8080 --name attic';
    return el('div', { class: 'first card' },
      el('h3', {}, 'How to add the first worker'),
      el('p', {}, 'Start a llama-server on any machine of your network:'),
      command('llama-server -m model.gguf --host 0.0.0.0 --port 8080'),
      el('p', {}, this.#app.can('admin')
        ? 'Then add its address with the button above, or with this command:'
        : 'Then add its address:'),
      command(add),
      el('p', { class: 'muted' }, 'Workers can also stand in the settings file, as ',
        el('code', {}, '[[workers]]'), ', and a machine can register itself: see ',
        el('code', {}, 'gollama-proxy agent --help'), '.'));
  }

  #renderVerdict() {
    const { level, text, list } = verdictOf(this.workers, this.totals, this.queue,
      this.cluster);
    this.#renderHubs();
    const empty = !this.workers.size;
    this.totalsBox.node.hidden = this.two.hidden = empty && !this.exchanges.size;
    look(this.mark, `mark ${level}`);
    put(this.mark, MARKS[level]);
    put(this.verdict, text);
    const title = `${level === 'good' || !level ? '' : `${MARKS[level]} `}${
      text.split(':')[0]} · gollama_proxy`;
    if (document.title !== title) document.title = title;
    this.#renderTroubles(list);
    this.#renderAge();
    const size = this.workers.size;
    this.count.hidden = !size;
    put(this.count, this.#app.format.plural(size, 'worker'));
    this.#mentionNews();
  }

  // The hubs that share a store, with what each of them runs.
  #renderHubs() {
    const lines = hubsOf(this.cluster);
    this.hubs.hidden = !lines.length;
    this.root.classList.toggle('several', lines.length > 0);
    while (this.hubs.children.length > lines.length) this.hubs.lastChild.remove();
    lines.forEach(({ level, name, text }, place) => {
      if (!this.hubs.children[place]) {
        const { el } = this.#app;
        this.hubs.append(el('li', {}, el('span', { class: 'name' }), ' ', el('span')));
      }
      const [first, , second] = this.hubs.children[place].childNodes;
      put(first, name);
      put(second, text);
      look(second, level || 'muted');
    });
  }

  // Without events, what is shown gets old.
  #renderAge() {
    const { state, sampled, reason } = this.#app.live;
    const age = sampled ? (Date.now() - sampled) / 1_000 : 0;
    const old = age >= 4 && (state === 'lost' || state === 'open');
    this.age.hidden = !old && !(state === 'lost' && !sampled);
    if (!this.age.hidden) {
      const since = old ? `The figures are ${duration(age)} old. ` : '';
      put(this.age, `${since}${reason} The page is reconnecting…`);
    }
  }

  #renderTroubles(list) {
    const { el } = this.#app;
    const lines = list.slice(0, this.#compact ? 3 : MOST_TROUBLES);
    const more = list.length - lines.length;
    const rows = more > 0 ? [...lines, { level: '', text: `and ${more} more` }] : lines;
    while (this.troubles.children.length > rows.length) this.troubles.lastChild.remove();
    rows.forEach(({ level, name, text }, place) => {
      let row = this.troubles.children[place];
      if (!row) {
        const link = el('a', { onclick: () => location.hash === link.hash && this.follow() });
        row = el('li', {}, el('span', { 'aria-hidden': 'true' }), ' ', link, el('span'));
        this.troubles.append(row);
      }
      const [mark, , link, rest] = row.childNodes;
      look(mark, level);
      put(mark, level ? MARKS[level] : '');
      put(link, name ?? '');
      link.hidden = !name;
      const href = `#/workers/${encodeURIComponent(name ?? '')}`;
      if (link.getAttribute('href') !== href) link.setAttribute('href', href);
      put(rest, name ? ` ${text}` : text);
    });
  }

  // For screen readers: a worker got into trouble, or out of it.
  #mentionNews() {
    const news = [];
    for (const [name, worker] of this.workers) {
      const { level, brief } = troubleOf(worker);
      const key = level && brief;
      if (this.#mentioned.has(name) && this.#mentioned.get(name) !== key) {
        news.push(key ? `${name} ${brief}.` : `${name} is ready again.`);
      }
      this.#mentioned.set(name, key);
    }
    if (news.length) this.#app.mention(news.slice(0, 3).join(' '));
  }

  colour(subject) {
    if (!this.colours.has(subject)) this.colours.set(subject, this.colours.size % 8);
    return `s${this.colours.get(subject)}`;
  }

  #subject(name) {
    return this.#app.el('span', { class: `subject ${this.colour(name)}` }, name || '–');
  }

  #renderQueue() {
    const { format } = this.#app;
    const waiting = Math.max(this.queue.length, this.totals.waiting ?? 0);
    put(this.queueHead, waiting ? `Queue: ${format.number(waiting)} waiting` : 'Queue');
    this.queueSums.hidden = this.queue.length < 2;
    if (!this.queueSums.hidden) put(this.queueSums, sumsOf(this.queue));
    this.waiting.render(this.queue, (each, cells) => {
      const passed = each.at ? now() - each.at : 0;
      cells(each.position ?? '–', () => this.#subject(each.subject), each.class,
        each.model, duration((each.waited ?? 0) + passed), soon(each.expected),
        each.hub ?? '', () => this.#cancelButton(each));
    }, (each) => `${each.id} ${each.subject}`);
  }

  #renderFlight() {
    const { format } = this.#app;
    const rows = [...this.exchanges.values()].filter((each) => each.state !== 'queued');
    const head = rows.length ? `In flight: ${format.number(rows.length)}` : 'In flight';
    put(this.flightHead, head);
    this.flight.render(rows, (each, cells) => {
      cells(() => this.#subject(each.subject), each.model, each.worker || '–',
        STEPS[each.state] ?? each.state, duration(each.age + now() - each.at),
        format.number(each.tokens), each.hub ?? '', () => this.#cancelButton(each));
    }, (each) => `${each.id} ${each.subject}`);
  }

  #cancelButton(each) {
    return this.#app.el('button', {
      type: 'button', onclick: () => this.#cancel(each),
      'aria-label': `Cancel the request ${each.id} of ${each.subject}`,
    }, 'Cancel');
  }

  // --- Actions ------------------------------------------------------------------------

  async #do(path, options, done) {
    try {
      const answer = await this.#app.api(path, { method: 'POST', ...options });
      this.#app.announce(done(answer));
      return answer;
    } catch (error) {
      this.#app.announce(error.message, 'bad');
      return null;
    }
  }

  async #cancel({ id, subject }) {
    const sure = await this.#app.ask(`Cancel this request of ${subject}?`, 'Cancel request', {
      detail: `${id}. Its client gets an error, and its slot is free at once.`, danger: true,
    });
    if (!sure) return;
    await this.#do(`/admin/exchanges/${encodeURIComponent(id)}`, { method: 'DELETE' },
      () => `The request ${id} is cancelled.`);
  }

  async act(action, worker) {
    const { name } = worker;
    const { question, button, detail, danger, done } = ACTIONS[action];
    if (!await this.#app.ask(question(name), button, { detail, danger })) return;
    const path = `/admin/workers/${encodeURIComponent(name)}`;
    const asked = now();
    const answer = action === 'remove'
      ? await this.#do(path, { method: 'DELETE' }, (result) =>
        [`${name} is ${result.state}.`, result.note].filter(Boolean).join(' '))
      : await this.#do(`${path}/${action}`, {}, (result) =>
        [done(name, result.worker), result.note].filter(Boolean).join(' '));
    if (answer?.worker) this.#take(answer.worker, asked);
    else if (answer) this.#changeFleet({ change: 'removed', worker: name });
  }

  async #reload() {
    const sure = await this.#app.ask('Read the settings again?', 'Reload settings', {
      detail: 'New requests get the new settings; running ones keep theirs. A file with a '
        + 'mistake changes nothing.',
    });
    if (!sure) return;
    await this.#do('/admin/reload', {}, ({ changed, restart }) => [
      changed.length ? `Changed: ${changed.join('; ')}.` : 'Nothing has changed.',
      restart.length ? `Only a restart changes: ${restart.join('; ')}.` : '',
    ].filter(Boolean).join(' '));
    this.#load();
  }

  #add() {
    const { el, api, announce } = this.#app;
    const inputs = {};
    const field = (key, label, hint, attributes = {}) => {
      inputs[key] = el('input', {
        id: `add-${key}`, autocomplete: 'off', 'aria-describedby': `add-${key}-hint`,
        ...attributes,
      });
      return el('div', { class: 'field' }, el('label', { for: `add-${key}` }, label),
        inputs[key], el('span', { class: 'hint', id: `add-${key}-hint` }, hint));
    };
    const trouble = el('p', { class: 'problem', role: 'alert' });
    const form = el('form', {},
      el('h2', { id: 'add-title' }, 'Add a worker'),
      field('url', 'Address', 'of a llama-server, or any server with an OpenAI-compatible API',
        { required: true, placeholder: 'http://10.0.0.13:8080', inputmode: 'url' }),
      field('name', 'Name', 'optional; its address if empty', { maxlength: 100 }),
      el('div', { class: 'pair' },
        field('slots', 'Slots', 'optional; the worker reports them',
          { type: 'number', min: 1, max: 10_000 }),
        field('vram_gib', 'VRAM in GiB', 'optional; its share of the requests',
          { type: 'number', min: 0, step: 'any' })),
      field('context', 'Context in tokens', 'optional, for servers that do not report it',
        { type: 'number', min: 1, max: 100_000_000 }),
      field('models', 'Models', 'optional, separated by commas; all that it has if empty'),
      field('mac', 'Hardware address', 'optional; wakes its machine when it sleeps',
        { placeholder: '00:11:22:aa:bb:cc' }),
      trouble,
      el('div', { class: 'row end' },
        el('button', { type: 'button', onclick: () => dialog.close() }, 'Cancel'),
        el('button', { class: 'main' }, 'Add worker')));
    const dialog = el('dialog', { 'aria-labelledby': 'add-title' }, form);
    form.addEventListener('submit', async (event) => {
      event.preventDefault();
      trouble.textContent = '';
      for (const input of Object.values(inputs)) input.removeAttribute('aria-invalid');
      const asked = now();
      try {
        const worker = await api('/admin/workers', { method: 'POST', body: rowOf(inputs) });
        dialog.close();
        announce(`${worker.name} is added. It gets requests after its first good check.`);
        this.#take(worker, asked);
      } catch (error) {
        trouble.textContent = error.message;
        const wrong = inputs[error.param?.replace(/^workers?\./, '')] ?? inputs.url;
        wrong.setAttribute('aria-invalid', 'true');
        wrong.focus();
      }
    });
    dialog.addEventListener('close', () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }

  // --- Menus, and the card of a tile --------------------------------------------------

  #menu = null;

  openMenu(card, worker) {
    if (this.#menu?.card === card) return this.#closeMenu();
    this.#closeMenu();
    const { el } = this.#app;
    const items = actionsOf(worker).map((action) => el('button', {
      type: 'button', role: 'menuitem', class: ACTIONS[action].danger ? 'bad' : '',
      onclick: () => {
        this.#closeMenu();
        this.act(action, this.workers.get(worker.name) ?? worker);
      },
    }, ACTIONS[action].button));
    const node = el('div', {
      class: 'menu', role: 'menu', 'aria-label': `Actions for ${worker.name}`,
    }, items);
    const stopped = new AbortController();
    const { signal } = stopped;
    node.addEventListener('keydown', (event) => {
      const place = items.indexOf(document.activeElement);
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        items.at((place + step) % items.length).focus();
      } else if (event.key === 'Escape') {
        event.preventDefault();
        event.stopPropagation();
        this.#closeMenu();
        card.button.focus();
      }
    }, { signal });
    document.addEventListener('pointerdown', (event) => {
      if (!node.contains(event.target) && event.target !== card.button) this.#closeMenu();
    }, { signal });
    card.node.addEventListener('focusout', (event) => {
      if (event.relatedTarget && !card.node.contains(event.relatedTarget)) this.#closeMenu();
    }, { signal });
    card.node.append(node);
    card.button.setAttribute('aria-expanded', 'true');
    this.#menu = { card, node, stopped };
    items[0]?.focus();
    return undefined;
  }

  #closeMenu() {
    const menu = this.#menu;
    this.#menu = null;
    if (!menu) return;
    menu.stopped.abort();
    menu.node.remove();
    menu.card.button.setAttribute('aria-expanded', 'false');
  }

  async show(name) {
    const worker = this.workers.get(name);
    if (!worker) return;
    const { el, api } = this.#app;
    const card = (this.detail = new Card(this, this.#app, name));
    const dialog = (this.dialog = el('dialog', { class: 'wide', 'aria-label': name },
      card.node,
      el('form', { method: 'dialog', class: 'row end' },
        el('button', { autofocus: true }, 'Close'))));
    dialog.addEventListener('close', () => {
      dialog.remove();
      this.detail = this.dialog = this.sought = null;
      if (location.hash.startsWith('#/workers/')) history.replaceState(null, '', '#/');
    });
    document.body.append(dialog);
    card.render(worker, this.#exchangesByWorker().get(name) ?? []);
    dialog.showModal();
    try {
      const query = `worker=${encodeURIComponent(name)}&seconds=${MINUTES * 60}&step=10`;
      const { workers } = await api(`/admin/history?${query}`);
      card.loadHistory(workers?.[name]);
    } catch (error) {
      this.#fail(error);
    }
  }

  // The address has changed; returns whether it is still one of this view.
  follow() {
    this.sought = null;
    if (!/^#?\/?(workers\/.*)?$/.test(location.hash)) return false;
    this.#seek();
    return true;
  }

  // Show the worker that the address names.
  #seek() {
    const [, , name] = location.hash.split('/');
    if (!name || this.sought === name) return;
    const wanted = decodeURIComponent(name);
    if (!this.workers.has(wanted)) return;
    this.list.querySelector('.sought')?.classList.remove('sought');
    this.sought = name;
    if (this.#compact) {
      this.show(wanted);
    } else {
      const { node } = this.#boxes.get(wanted);
      node.classList.add('sought');
      node.scrollIntoView({ block: 'center' });
      node.focus();
    }
  }
}

// Make these nodes the children of a list, in this order, and move as few as possible.
function arrange(list, nodes) {
  const wanted = new Set(nodes);
  for (const each of [...list.children]) if (!wanted.has(each)) each.remove();
  let next = list.firstElementChild;
  for (const node of nodes) {
    if (next && next !== node && next.nextElementSibling === node) {
      const later = next; // its place is further down
      next = node;
      later.remove();
    }
    if (next === node) next = node.nextElementSibling;
    else list.insertBefore(node, next);
  }
}

// --- Totals -------------------------------------------------------------------------

class Totals {
  #app;
  pointed = {}; // the chart that the pointer is on, and where

  constructor(app) {
    this.#app = app;
    const { el, format } = app;
    this.speed = new Series();
    this.p50 = new Series();
    this.p95 = new Series({ highest: true });
    this.running = new Series();
    this.waiting = new Series({ highest: true });
    this.requests = new Series();
    this.errors = new Series();
    const now = (series) => series.values.at(-1);
    const text = (name, unit) => (chart) => `${name}, the last ${MINUTES} minutes: now ${
      chart.series.map((each) => unit(now(each))).join(' and ')}, highest ${
      unit(Math.max(...chart.series.map((each) => each.top)))}`;
    const chart = (name, unit, series, options = { area: true }) =>
      new Chart({ series, ...options, describe: text(name, unit) });
    this.charts = {
      speed: chart('Tokens per second', format.short, [this.speed]),
      first: chart('Time to first token, median and 95 %', format.ms, [this.p50, this.p95],
        { bridge: 24 }),
      running: chart('Requests that run and wait', format.short, [this.running, this.waiting],
        { area: true, least: 1 }),
      requests: chart('Requests and errors per minute', format.short,
        [this.requests, this.errors], { area: true, least: 6 }),
    };
    this.figures = {};
    this.tops = {};
    this.spans = {};
    const figure = (key, after = '', kind = '') => el('span', { class: 'figure' },
      (this.figures[key] = el('b', {}, '–')), ' ',
      after && el('small', { class: kind }, after));
    const box = (name, title, figures) => {
      this.tops[name] = el('span', {});
      this.#watchPointer(name);
      return el('section', { class: 'card total' }, el('h2', {}, title),
        el('p', { class: 'figures' }, figures), this.charts[name].node,
        el('p', { class: 'axis', 'aria-hidden': 'true' },
          (this.spans[name] = el('span', {})), this.tops[name], el('span', {}, 'now')));
    };
    this.slots = el('span', {});
    this.node = el('section', { class: 'totals', 'aria-label': 'Figures of the hub' },
      box('speed', 'Tokens per second', figure('speed')),
      box('first', 'Time to first token',
        [figure('p50', 'p50', 'key'), figure('p95', 'p95', 'key b')]),
      box('running', ['Requests', this.slots],
        [figure('running', 'running', 'key'), figure('waiting', 'waiting', 'key b')]),
      box('requests', 'Requests per minute',
        [figure('requests', 'done', 'key'), figure('errors', 'errors', 'key b')]));
  }

  load(columns = {}) {
    this.speed.load(columns.tokens_per_second);
    this.p50.load(columns.first_token_p50);
    this.p95.load(columns.first_token_p95);
    this.running.load(columns.running?.map((each, place) =>
      active(each, columns.waiting[place])));
    this.waiting.load(columns.waiting);
    this.requests.load(columns.requests?.map(perMinute));
    this.errors.load(columns.errors?.map(perMinute));
    this.#draw();
  }

  push(sample) {
    this.speed.push(sample.tokens_per_second);
    this.p50.push(sample.first_token_p50);
    this.p95.push(sample.first_token_p95);
    this.running.push(active(sample.running, sample.waiting));
    this.waiting.push(sample.waiting);
    this.requests.push(perMinute(sample.requests));
    this.errors.push(perMinute(sample.errors));
    this.#draw();
  }

  #draw() {
    for (const [name, chart] of Object.entries(this.charts)) {
      chart.draw();
      this.#showTop(name);
    }
  }

  // Below a chart: its highest value, or those at the pointer.
  #showTop(name) {
    const { format } = this.#app;
    const { series, top, span } = this.charts[name];
    put(this.spans[name], duration(span));
    const unit = name === 'first' ? format.ms : format.short;
    const { chart, place } = this.pointed;
    if (chart !== name) return put(this.tops[name], `up to ${unit(top)}`);
    const [{ size, step }] = series;
    const ago = duration((size - 1 - place) * step);
    const values = series.map((each) => unit(each.values[place])).join(', ');
    return put(this.tops[name], `${ago} ago: ${values}`);
  }

  #watchPointer(name) {
    const { node, series: [{ size, step }] } = this.charts[name];
    const point = (event) => {
      const { left, width } = node.getBoundingClientRect();
      const part = Math.min(Math.max((event.clientX - left) / width, 0), 1);
      const count = this.charts[name].span / step;
      this.pointed = { chart: name, place: size - count + Math.round(part * (count - 1)) };
      this.#showTop(name);
    };
    node.addEventListener('pointermove', point);
    node.addEventListener('pointerdown', point);
    node.addEventListener('pointerleave', () => {
      this.pointed = {};
      this.#showTop(name);
    });
  }

  render(totals, workers) {
    const { format } = this.#app;
    let slots = 0;
    for (const each of workers.values()) slots += each.slots ?? 0;
    put(this.figures.speed, format.short(totals.tokens_per_second));
    put(this.figures.p50, format.ms(totals.first_token_p50 ?? this.p50.last));
    put(this.figures.p95, format.ms(totals.first_token_p95 ?? this.p95.last));
    put(this.figures.running, format.number(active(totals.running, totals.waiting)));
    put(this.slots, slots ? `, ${format.number(slots)} slots` : '');
    put(this.figures.waiting, format.number(totals.waiting));
    const minute = (series) => {
      const known = series.values.slice(-12).filter((each) => each != null);
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    };
    put(this.figures.requests, format.number(minute(this.requests)));
    put(this.figures.errors, format.number(minute(this.errors)));
    look(this.figures.errors, minute(this.errors) ? 'bad' : '');
  }
}

const perMinute = (value) => (value == null ? null : value * 60);

// Requests in flight that do not wait for a slot.
const active = (running, waiting) =>
  (running == null ? null : Math.max(running - (waiting ?? 0), 0));

// --- A table that changes only where it has to --------------------------------------

class Table {
  #app;

  constructor(app, empty, columns) {
    const { el } = app;
    this.#app = app;
    this.columns = columns;
    this.rows = new Map();
    this.body = el('tbody');
    this.none = el('p', { class: 'muted' }, empty);
    this.more = el('p', { class: 'hint' });
    const heads = columns.map(([name, kind]) => (name
      ? el('th', { class: kind, scope: 'col' }, name)
      : el('td', {}, el('span', { class: 'unseen' }, 'Action'))));
    this.sheet = el('div', {
      class: 'sheet', tabindex: '0', role: 'group', 'aria-label': 'Table',
    }, el('table', {}, el('thead', {}, el('tr', {}, heads)), this.body));
    this.node = el('div', {}, this.none, this.sheet, this.more);
  }

  // `fill(each, cells)` calls `cells` with a text for each column, or with a function
  // that makes a node once.
  render(all, fill, keyOf) {
    const { el } = this.#app;
    const list = all.slice(0, MOST_ROWS);
    this.none.hidden = list.length > 0;
    this.sheet.hidden = !list.length;
    put(this.more, all.length > list.length ? `and ${all.length - list.length} more` : '');
    const kept = new Map();
    list.forEach((each, place) => {
      const key = keyOf(each);
      let row = this.rows.get(key);
      const fresh = !row;
      if (fresh) row = el('tr', {}, this.columns.map(([, kind]) => el('td', { class: kind })));
      fill(each, (...cells) => {
        this.columns.forEach((_, column) => {
          const cell = cells[column];
          const box = row.children[column];
          if (typeof cell !== 'function') {
            const text = String(cell ?? '');
            put(box, text);
            if (text.length > 20 && box.title !== text) box.title = text;
          } else if (fresh) box.append(cell());
        });
      });
      if (this.body.children[place] !== row) {
        this.body.insertBefore(row, this.body.children[place] ?? null);
      }
      kept.set(key, row);
    });
    for (const [key, row] of this.rows) if (!kept.has(key)) row.remove();
    this.rows = kept;
  }
}

// --- What can be done ----------------------------------------------------------------

const ACTIONS = {
  pause: {
    button: 'Pause', question: (name) => `Pause ${name}?`,
    detail: 'It gets no new request. Running ones end without a time limit.',
    done: (name) => `${name} is paused.`,
  },
  unpause: {
    button: 'Unpause', question: (name) => `Let ${name} take requests again?`,
    done: (name) => `${name} takes requests again.`,
  },
  drain: {
    button: 'Drain', question: (name) => `Drain ${name}?`,
    detail: 'It gets no new request. Running ones have a time limit, and continue on '
      + 'another worker after that.',
    done: (name, worker) => `${name} is draining; ${
      worker?.running ? `${worker.running} still running` : 'nothing runs on it'}.`,
  },
  undrain: {
    button: 'Undrain', question: (name) => `End the drain of ${name}?`,
    done: (name) => `${name} takes requests again.`,
  },
  'reset-breaker': {
    button: 'Reset breaker', question: (name) => `Close the breakers of ${name} now?`,
    detail: 'It gets requests at once, although it failed before.',
    done: (name) => `The breakers of ${name} are closed.`,
  },
  wake: {
    button: 'Wake', question: (name) => `Wake the machine of ${name}?`,
    done: (name) => `A wake-up packet is on its way to ${name}.`,
  },
  remove: {
    button: 'Remove…', question: (name) => `Remove ${name} from the fleet?`, danger: true,
    detail: 'It is drained, and then forgotten. A worker of the settings file comes back '
      + 'when that is read again.',
  },
};

function actionsOf(worker) {
  const tripped = [worker, ...worker.models].some((each) => each.breaker.state !== 'closed');
  return [
    worker.state === 'asleep' && 'wake',
    tripped && 'reset-breaker',
    worker.hold === 'paused' ? 'unpause' : worker.hold !== 'draining' && 'pause',
    worker.hold === 'draining' ? 'undrain' : 'drain',
    'remove',
  ].filter(Boolean);
}

// The table of a new worker, of the fields that are filled in.
function rowOf(inputs) {
  const row = {};
  for (const [key, input] of Object.entries(inputs)) {
    const value = input.value.trim();
    if (!value) continue;
    if (key === 'models') row.models = value.split(/\s*,\s*/).filter(Boolean);
    else row[key] = ['slots', 'context', 'vram_gib'].includes(key) ? Number(value) : value;
  }
  return row;
}

// What samples have added to what is known of a worker.
function recent(worker) {
  if (!worker) return {};
  const { tokens_per_second, first_token_p50, first_token_p95 } = worker;
  return { tokens_per_second, first_token_p50, first_token_p95 };
}
