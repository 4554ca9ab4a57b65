// The overview: a verdict, the hub's figures, a card for each worker, and its requests.

import { Chart, Series } from './charts.js';

const MOST_CARDS = 60; // more workers than this are shown as tiles
const MOST_ROWS = 50; // of a table
const MOST_TROUBLES = 6; // below the verdict
const LEAST = 250; // ms between two renderings
const MINUTES = 15;
const STATES = {
  ready: ['✓', 'Ready', 'good'],
  starting: ['…', 'Starting', 'warn'],
  loading: ['…', 'Loading', 'warn'],
  down: ['✕', 'Down', 'bad'],
  asleep: ['☾', 'Asleep', ''],
  waking: ['…', 'Waking', 'warn'],
};
const MARKS = { bad: '✕', warn: '▲', good: '✓', '': '○' };

const now = () => performance.now() / 1_000;

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function look(node, name) {
  if (node.className !== name) node.className = name;
}

export function mount(root, app) {
  const overview = new Overview(root, app);
  overview.start();
  return () => overview.stop();
}

class Overview {
  workers = new Map(); // by name: what is known of each, in the hub's order
  exchanges = new Map(); // by id
  queue = [];
  totals = { running: 0, waiting: 0 };
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
  #said = new Map(); // by worker: the trouble that was announced
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
    on('worker', (worker) => this.#take(worker));
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
    this.totalsBox = new Totals(this.#app);
    this.count = el('h2', {});
    this.filters = this.#buildFilters();
    this.list = el('div', { class: 'workers' });
    this.waiting = new Table(this.#app, 'Nothing waits for a slot.', [
      ['Place', 'num'], ['Subject'], ['Class', 'less'], ['Model', 'less'], ['Waited', 'num'],
      ['Expected', 'num'], ...(admin ? [['', 'num']] : []),
    ]);
    this.queueHead = el('h2', {}, 'Queue');
    this.queueSums = el('p', { class: 'hint' });
    this.flight = new Table(this.#app, 'No request is being answered.', [
      ['Subject'], ['Model', 'less'], ['Worker'], ['State', 'less'], ['Age', 'num'], ['Tokens', 'num'],
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
        this.troubles),
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
      type: 'search', placeholder: 'Find a worker or model', 'aria-label': 'Find a worker or model',
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
    try {
      const [{ workers }, { exchanges }, { queue }] = await Promise.all([
        api('/admin/workers', { signal }), api('/admin/exchanges', { signal }),
        api('/admin/queue', { signal }),
      ]);
      this.#setWorkers(workers);
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
    if (this.#requested[what]) return;
    this.#requested[what] = true;
    try {
      take(await this.#app.api(`/admin/${what}`, { signal: this.#stopped.signal }));
      this.#schedule();
    } catch (error) {
      if (!(error instanceof this.#app.ApiError) && error.name !== 'AbortError') throw error;
    } finally {
      this.#requested[what] = false;
    }
  }

  #setWorkers(workers) {
    const known = this.workers;
    this.workers = new Map(workers.map((each) => {
      const before = known.get(each.name);
      return [each.name, { ...recent(before), ...each, at: now() }];
    }));
    for (const name of this.workers.keys()) this.#dirty.add(name);
  }

  #setExchanges(exchanges) {
    const touched = new Set([...this.exchanges.values()].map((each) => each.worker));
    this.exchanges = new Map(exchanges.map((each) => [each.id, { ...each, at: now() }]));
    for (const each of exchanges) touched.add(each.worker);
    for (const name of touched) this.#dirty.add(name);
  }

  #take(worker) {
    const before = this.workers.get(worker.name);
    this.workers.set(worker.name, { ...recent(before), ...worker, at: now() });
    this.#dirty.add(worker.name);
    this.#schedule();
  }

  #changeFleet({ change, worker }) {
    if (change === 'removed' || change === 'gone') {
      this.workers.delete(worker);
      this.#schedule();
    }
    this.#refetch('workers', ({ workers }) => this.#setWorkers(workers));
  }

  #sample(sample) {
    this.totals = sample;
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
    if (seconds % 2 === 0 && (this.exchanges.size || this.totals.running)) {
      this.#refetch('exchanges', ({ exchanges }) => this.#setExchanges(exchanges));
    }
    if (seconds % 2 === 1 && (this.queue.length || this.totals.waiting)) {
      this.#refetch('queue', ({ queue }) => {
        this.queue = queue.map((each) => ({ ...each, at: now() }));
      });
    }
    if (seconds % (this.#compact ? 60 : 15) === 0) {
      this.#refetch('workers', ({ workers }) => this.#setWorkers(workers));
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
    const wait = Math.max(LEAST - (performance.now() - this.#last), 0);
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
    const order = { bad: 0, warn: 1, '': 2 };
    wanted.sort((a, b) => order[troubleOf(a).level] - order[troubleOf(b).level]);
    const nodes = wanted.map(({ name }) => this.#boxes.get(name).node);
    const shown = this.list.children;
    if (nodes.length !== shown.length || nodes.some((node, i) => node !== shown[i])) {
      const focused = document.activeElement;
      this.list.replaceChildren(...nodes);
      if (this.list.contains(focused)) focused.focus();
    }
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
    const { level, text, list } = verdictOf(this.workers, this.totals, this.queue);
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
    put(this.count, size ? this.#app.format.plural(size, 'worker') : '');
    this.#tellNews();
  }

  // Without events, what is shown gets old.
  #renderAge() {
    const { state, sampled } = this.#app.live;
    const age = sampled ? (Date.now() - sampled) / 1_000 : 0;
    this.age.hidden = age < 4 || (state !== 'lost' && state !== 'open');
    if (!this.age.hidden) {
      put(this.age, `The hub has sent nothing for ${duration(age)}. `
        + 'What you see is that old; the page is reconnecting.');
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
        row = el('li', {}, el('span', { 'aria-hidden': 'true' }), ' ', el('a'), el('span'));
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
  #tellNews() {
    const news = [];
    for (const [name, worker] of this.workers) {
      const { level, brief } = troubleOf(worker);
      const key = level && brief;
      if (this.#said.has(name) && this.#said.get(name) !== key) {
        news.push(key ? `${name} ${brief}.` : `${name} is ready again.`);
      }
      this.#said.set(name, key);
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
        () => this.#cancelButton(each));
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
        format.number(each.tokens), () => this.#cancelButton(each));
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
    const answer = action === 'remove'
      ? await this.#do(path, { method: 'DELETE' }, (result) =>
        [`${name} is ${result.state}.`, result.note].filter(Boolean).join(' '))
      : await this.#do(`${path}/${action}`, {}, (result) =>
        [done(name, result.worker), result.note].filter(Boolean).join(' '));
    if (answer?.worker) this.#take(answer.worker);
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
      try {
        const worker = await api('/admin/workers', { method: 'POST', body: rowOf(inputs) });
        dialog.close();
        announce(`${worker.name} is added. It gets requests after its first good check.`);
        this.#take(worker);
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
    const node = el('div', { class: 'menu', role: 'menu', 'aria-label': `Actions for ${worker.name}` },
      items);
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
      this.detail = this.dialog = null;
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

  // Show the worker that the address names.
  #seek() {
    const [, , name] = location.hash.split('/');
    if (!name || this.sought === name) return;
    const wanted = decodeURIComponent(name);
    if (!this.workers.has(wanted)) return;
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
      running: chart('Requests that run and wait', format.short, [this.running, this.waiting]),
      requests: chart('Requests and errors per second', format.short,
        [this.requests, this.errors]),
    };
    this.figures = {};
    this.tops = {};
    this.spans = {};
    const figure = (key, after = '', kind = '') => el('span', { class: 'figure' },
      (this.figures[key] = el('b', {}, '–')), ' ', after && el('small', { class: kind }, after));
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
    this.requests.load(columns.requests);
    this.errors.load(columns.errors);
    this.#draw();
  }

  push(sample) {
    this.speed.push(sample.tokens_per_second);
    this.p50.push(sample.first_token_p50);
    this.p95.push(sample.first_token_p95);
    this.running.push(active(sample.running, sample.waiting));
    this.waiting.push(sample.waiting);
    this.requests.push(sample.requests);
    this.errors.push(sample.errors);
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
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length * 60 : null;
    };
    put(this.figures.requests, format.number(minute(this.requests)));
    put(this.figures.errors, format.number(minute(this.errors)));
    look(this.figures.errors, minute(this.errors) ? 'bad' : '');
  }
}

// Requests in flight that do not wait for a slot.
const active = (running, waiting) =>
  (running == null ? null : Math.max(running - (waiting ?? 0), 0));

// --- A worker as a card -------------------------------------------------------------

class Card {
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
    this.node = el('article', { class: 'card worker', tabindex: '-1', 'aria-label': name, 'data-worker': name },
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
  #renderSlots({ slots, running }, exchanges) {
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
    put(this.busy, slots == null ? `${busy} running, slots not known yet`
      : `${busy} of ${slots} slots busy`);
  }

  #renderModels(worker) {
    const { el, format } = this.#app;
    const key = JSON.stringify([worker.models, worker.breaker.state]);
    if (key === this.modelsKey) return;
    this.modelsKey = key;
    const shown = worker.models.slice(0, 8);
    const rows = shown.map((model) => {
      const state = model.progress != null && !model.loaded
        ? [el('progress', { max: 1, value: model.progress, 'aria-label': `Loading ${model.name}` }),
          `loading, ${Math.round(model.progress * 100)} %`]
        : [model.loaded ? 'loaded' : 'not loaded'];
      const context = model.context ?? worker.context;
      return el('li', {}, el('span', { class: 'name' }, model.name),
        context && el('span', { class: 'muted', title: `${format.number(context)} tokens` },
          `${thousands(context)} context`),
        el('span', { class: `row ${model.loaded ? 'good' : 'muted'}` }, state),
        ofItself(model, worker) && el('span', { class: 'warn' }, `▲ breaker ${model.breaker.state}`));
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
      this.foot.append(this.about, this.error);
    }
    const parts = [worker.url, worker.build && `build\u00a0${worker.build}`,
      worker.vram_gib && !worker.agent?.devices?.length && `${short(worker.vram_gib)}\u00a0GiB\u00a0VRAM`,
      worker.source !== 'file' && SOURCES[worker.source]];
    put(this.about, parts.filter(Boolean).join(' · '));
    put(this.error, error
      ? `Last error, ${duration(error.ago + passed)} ago: ${error.detail || error.code}`
      : '');
  }
}

// --- A worker as a tile, where there are many ---------------------------------------

class Tile {
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
      type: 'button', class: 'tile', title: name, 'data-worker': name, onclick: () => overview.show(name),
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
    put(this.sub, level ? sentence(brief.replace(/^is /, ''), '') : `${word}${speed ? `, ${format.short(speed)} tok/s` : ''}`);
    const kinds = Object.keys(KINDS).filter((each) => isOf(each, worker)).join();
    const moved = level !== this.#level || kinds !== this.#kinds;
    this.#level = level;
    this.#kinds = kinds;
    return moved;
  }
}

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
    this.sheet = el('div', { class: 'sheet', tabindex: '0', role: 'group', 'aria-label': 'Table' },
      el('table', {}, el('thead', {}, el('tr', {}, columns.map(([name, kind]) =>
        (name ? el('th', { class: kind, scope: 'col' }, name) : el('td', {}, el('span', { class: 'unseen' }, 'Action')))))), this.body));
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

// --- Words --------------------------------------------------------------------------

const HOT = 90; // °C
const KINDS = { all: 'All', trouble: 'In trouble', busy: 'Busy', idle: 'Idle', held: 'Held' };
const SOURCES = { admin: 'added by an operator', agent: 'registered by its agent' };
const STEPS = {
  reading: 'request arrives', queued: 'waits', connecting: 'connecting',
  waiting: 'reads the prompt', streaming: 'answers', broken: 'broken off',
  resuming: 'continues elsewhere', ended: 'ended',
};

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

// Whether a model has a breaker that is not closed, besides that of its worker.
function ofItself({ breaker }, worker) {
  return breaker.state !== 'closed' && (breaker.state !== worker.breaker.state
    || breaker.reason !== worker.breaker.reason);
}

const isFailing = (state, breaker) => (state === 'down' || breaker === 'open' ? 1 : 0);

const isHeld = ({ hold }) => hold === 'paused' || hold === 'draining';

// The symbol, the word and the kind of its state, and the seconds since it began, if they
// are known; a hold and a breaker come before "ready".
function shownState(worker) {
  if (worker.state === 'ready' && worker.hold === 'paused') return ['‖', 'Paused', '', null];
  if (worker.state === 'ready' && worker.hold === 'draining') return ['↓', 'Draining', 'warn', null];
  if (worker.state === 'ready' && worker.breaker.state === 'open') {
    return ['✕', 'Failing', 'bad', worker.breaker.since];
  }
  if (worker.state === 'ready' && worker.breaker.state === 'half-open') {
    return ['◐', 'On trial', 'warn', worker.breaker.since];
  }
  return [...(STATES[worker.state] ?? ['?', worker.state, 'warn']), worker.since];
}

// What is wrong with a worker: {level: 'bad', 'warn' or '', text, brief}.
function troubleOf(worker) {
  const passed = now() - worker.at;
  const lasting = `for ${duration(worker.since + passed)}`;
  const { state, breaker, models } = worker;
  const progress = models.find((each) => each.progress != null && !each.loaded)?.progress;
  const hot = worker.agent?.devices?.find((each) => each.celsius >= HOT);
  const model = models.find((each) => ofItself(each, worker) && each.breaker.state === 'open');
  if (state === 'down') {
    return { level: 'bad', kind: 'down', brief: `is down: ${worker.reason}`,
      text: `is down: ${worker.reason}, ${lasting}` };
  }
  if (breaker.state === 'open') {
    const left = breaker.opens_in - passed;
    return { level: 'bad', kind: 'failing', brief: `fails: ${breaker.reason}`,
      text: `gets no requests: ${breaker.reason}${
        left > 0 ? `; it is tried again in ${duration(Math.ceil(left))}` : ''}` };
  }
  if (state === 'starting') {
    return { level: 'warn', kind: 'starting', brief: 'is not reached yet',
      text: `is not reached yet, ${lasting}` };
  }
  if (state === 'loading') {
    const far = progress ? `, ${Math.round(progress * 100)} %` : '';
    return { level: 'warn', kind: 'loading', brief: 'is loading its model',
      text: `is loading its model${far}, ${lasting}` };
  }
  if (state === 'waking') {
    return { level: 'warn', kind: 'waking', brief: 'is waking', text: `is waking, ${lasting}` };
  }
  if (breaker.state === 'half-open') {
    return { level: 'warn', kind: 'on trial', brief: 'is tried again after failures',
      text: `is tried again: ${breaker.reason}` };
  }
  if (model) {
    return { level: 'warn', kind: 'failing with a model', brief: `fails with ${model.name}`,
      text: `gets no requests for ${model.name}: ${model.breaker.reason}` };
  }
  if (hot) {
    const text = `is hot: ${hot.name} is at ${Math.round(hot.celsius)} °C`;
    return { level: 'warn', kind: 'hot', brief: text, text };
  }
  if (worker.agent?.serving === false) {
    const text = 'does not answer its agent';
    return { level: 'warn', kind: 'silent', brief: text, text };
  }
  return { level: '', kind: '', brief: '', text: '' };
}

// Why a worker is as it is: lines for its card.
function whyOf(worker) {
  const passed = now() - worker.at;
  const { state, hold, breaker, models } = worker;
  const lines = [];
  if (hold === 'paused') lines.push('Paused by an operator: it gets no new request.');
  if (hold === 'draining') lines.push('Draining: no new request; running ones have a time limit.');
  if (state !== 'ready' && worker.reason) lines.push(sentence(worker.reason));
  if (breaker.state !== 'closed') lines.push(`Breaker ${breakerWords(breaker, passed)}`);
  for (const each of models) {
    if (ofItself(each, worker)) {
      lines.push(`${each.name}: breaker ${breakerWords(each.breaker, passed)}`);
    }
  }
  if (worker.agent?.serving === false) lines.push('The server does not answer its agent.');
  return lines.slice(0, 6);
}

function breakerWords({ state, reason, since, opens_in: left }, passed) {
  const lasting = since == null ? '' : ` for ${duration(since + passed)}`;
  const next = state === 'open' && left > passed
    ? ` Tried again in ${duration(Math.ceil(left - passed))}.` : '';
  return `${state}${lasting}: ${reason}.${next}`;
}

function sentence(text, end = '.') {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? '' : end}`;
}

function isOf(kind, worker) {
  if (kind === 'trouble') return Boolean(troubleOf(worker).level);
  if (kind === 'busy') return worker.running > 0;
  if (kind === 'idle') return !worker.running && worker.state === 'ready' && !isHeld(worker);
  if (kind === 'held') return isHeld(worker);
  return true;
}

// One sentence about the whole hub, and a line for each trouble.
function verdictOf(workers, { waiting = 0 }, queue) {
  const all = [...workers.values()];
  if (!all.length) return { level: '', text: 'This hub has no workers yet', list: [] };
  const troubles = all.map((worker) => ({ name: worker.name, ...troubleOf(worker) }))
    .filter(({ level }) => level)
    .sort((a, b) => (a.level < b.level ? -1 : a.level > b.level ? 1 : 0));
  const bad = troubles.filter(({ level }) => level === 'bad');
  const held = all.filter(isHeld);
  const asleep = all.filter(({ state }) => state === 'asleep');
  const usable = all.filter((worker) => worker.state === 'ready' && !isHeld(worker)
    && worker.breaker.state !== 'open');
  const size = all.length.toLocaleString('en');
  const single = all.length === 1;
  const of = single ? 'The worker' : '';
  const list = [...troubles];
  let level = 'good';
  let text;
  if (bad.length) {
    level = 'bad';
    if (bad.length === 1) {
      const [{ name, text: what }] = bad;
      text = single ? `The worker ${name} ${what}`
        : `1 of ${size} workers ${what.replace(/^(is down|gets no requests): /, `$1: ${name}, `)}`;
      list.splice(list.indexOf(bad[0]), 1);
    } else {
      const down = bad.filter(({ kind }) => kind === 'down').length;
      const words = down === bad.length ? 'are down' : down ? 'are down or fail' : 'fail';
      text = bad.length === all.length ? `All ${size} workers ${words}`
        : `${bad.length} of ${size} workers ${words}`;
    }
  } else if (!usable.length && !asleep.length) {
    level = held.length ? 'bad' : 'warn';
    text = held.length ? `No worker takes requests: ${held.length} of ${size} held by operators`
      : of ? `${of} ${troubles[0]?.name ?? ''} ${troubles[0]?.text ?? 'is not ready'}`
        : 'No worker is ready yet';
    if (of && troubles.length) list.shift();
  } else if (troubles.length === 1) {
    level = 'warn';
    const [{ name, text: what }] = troubles;
    text = `${usable.length} of ${size} workers are ready; ${name} ${what}`;
    if (single) text = `The worker ${name} ${what}`;
    list.shift();
  } else if (troubles.length) {
    level = 'warn';
    text = `${usable.length} of ${size} workers are ready`;
  } else if (usable.length < all.length) {
    const rest = [held.length && `${held.length} held by operators`,
      asleep.length && `${asleep.length} asleep`].filter(Boolean).join(', ');
    text = `${usable.length} of ${size} workers ${usable.length === 1 ? 'is' : 'are'} ready; ${rest}`;
  } else {
    text = single ? `The worker ${all[0].name} is ready`
      : all.length === 2 ? 'Both workers are ready' : `All ${size} workers are ready`;
  }
  const count = Math.max(waiting, queue.length);
  if (count) {
    const longest = Math.max(0, ...queue.map((each) =>
      (each.waited ?? 0) + (each.at ? now() - each.at : 0)));
    const expected = queue.map((each) => each.expected).filter((each) => each != null);
    list.push({ level: 'warn', text: ` ${count === 1 ? '1 request waits' : `${count} requests wait`}${
      longest >= 1 ? `, the longest for ${duration(longest)}` : ''}${
      expected.length ? `; the last gets its slot in about ${soon(Math.max(...expected))}` : ''}` });
    if (level === 'good' && longest > 10) level = 'warn';
  }
  return { level, text, list };
}

// The queue by subject and class, in a line.
function sumsOf(queue) {
  const sums = new Map();
  for (const each of queue) {
    const key = `${each.subject}, ${each.class}`;
    const { count = 0, expected = null } = sums.get(key) ?? {};
    const next = each.expected != null && (expected == null || each.expected < expected)
      ? each.expected : expected;
    sums.set(key, { count: count + 1, expected: next });
  }
  const shown = [...sums].sort((a, b) => b[1].count - a[1].count);
  const words = shown.slice(0, 6).map(([key, { count, expected }]) =>
    `${key}: ${count}${expected == null ? '' : ` (next: ${soon(expected)})`}`);
  if (shown.length > 6) words.push(`and ${shown.length - 6} more`);
  return words.join(' · ');
}

// The table of a new worker, of the fields that are filled in.
function rowOf(inputs) {
  const row = {};
  for (const [key, input] of Object.entries(inputs)) {
    const value = input.value.trim();
    if (!value) continue;
    if (key === 'models') row.models = value.split(',').map((each) => each.trim()).filter(Boolean);
    else row[key] = key === 'slots' || key === 'vram_gib' ? Number(value) : value;
  }
  return row;
}

// What samples have added to what is known of a worker.
function recent(worker) {
  if (!worker) return {};
  const { tokens_per_second, first_token_p50, first_token_p95 } = worker;
  return { tokens_per_second, first_token_p50, first_token_p95 };
}

// Two times: "188 · 502 ms", or with a unit each.
function both(low, high, { ms }) {
  return high < 1_000 ? `${Math.round(low)} · ${ms(high)}` : `${ms(low)} · ${ms(high)}`;
}

// Tokens: 8k, 128k, 1,000
function thousands(tokens) {
  return tokens % 1_024 ? tokens.toLocaleString('en') : `${tokens / 1_024}k`;
}

const short = (value) => String(Math.round(value * 10) / 10);

// A wait that is expected.
function soon(seconds) {
  if (seconds == null) return 'unknown';
  return seconds < 1 ? '1 s' : duration(seconds);
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(Math.max(seconds, 0))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 10 && minutes % 60) return `${hours} h ${minutes % 60} min`;
  return hours < 48 ? `${hours} h` : `${Math.floor(hours / 24)} days`;
}
