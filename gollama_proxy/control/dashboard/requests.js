// Requests that have ended, what happened to each of them, and what one would get now.
//
//   #/requests?subject=ann&outcome=error    a list; the address has the filters
//   #/requests/5f2c9a1be07d4433             one request, step by step

const NS = 'http://www.w3.org/2000/svg';
const MOST = 100; // rows of the list
const PAUSE = 1_000; // ms between two looks at what is new
const TEXTS = ['id', 'subject', 'model', 'worker']; // filters that are typed
const RANGES = {
  '': 'Any time',
  300: 'The last 5 minutes',
  900: 'The last 15 minutes',
  3600: 'The last hour',
  86400: 'The last day',
  own: 'From … to …',
};
const OUTCOMES = {
  complete: ['✓', 'Complete', 'good'],
  refused: ['▲', 'Refused by the worker', 'warn'],
  error: ['✕', 'Error', 'bad'],
  client_gone: ['○', 'Client left', ''],
};
// What the codes of errors mean; docs/api.md lists all of them.
const CODES = {
  invalid_api_key: 'The token is missing or not valid.',
  model_not_allowed: 'The token does not allow this model.',
  model_not_found: 'No worker serves this model.',
  context_length_exceeded: 'The prompt is too long for every worker of the model.',
  rate_limit_exceeded: 'The subject has used up its quota.',
  request_cancelled: 'An operator cancelled it.',
  request_timeout: 'It took longer than the limit for a whole request.',
  queue_full: 'Too many requests were waiting.',
  queue_timeout: 'It waited longer than the queue allows.',
  no_worker_available: 'No worker could take it.',
  worker_unreachable: 'No worker could be connected to.',
  worker_connection_lost: 'The connection to the worker was lost.',
  worker_bad_response: 'The worker’s answer was not valid.',
  worker_incomplete_answer: 'The worker’s answer broke off, and no other one continued it.',
  worker_refused_key: 'The worker rejects the API key that the hub has for it.',
  worker_timeout: 'The worker sent nothing within the time limit.',
  worker_slow: 'The worker was too slow to begin.',
  client_stalled: 'The client stopped reading its answer.',
  hub_draining: 'The hub was shutting down.',
  store_unavailable: 'The hub had not reached the store for too long to accept tokens.',
  internal_error: 'The hub itself failed; its log has the reason.',
};
// What a code of `explain` means.
const VERDICTS = {
  chosen: ['✓', (it) => `${it.worker} would get it now.`, 'good'],
  queued: ['…', () => 'It would wait for a slot.', 'warn'],
  wakes: ['☾', () => 'A machine would be woken for it.', 'warn'],
  waits_for_worker: ['…', () => 'It would wait for a worker to come back.', 'warn'],
  no_worker: ['✕', () => 'No worker could take it.', 'bad'],
  queue_full: ['✕', () => 'It would be refused: too many requests wait.', 'bad'],
};
const PATHS = [
  '/v1/chat/completions', '/v1/completions', '/v1/responses', '/v1/messages',
  '/v1/embeddings', '/v1/rerank',
];

export function mount(root, app) {
  const path = location.hash.replace(/^#\/?requests\/?/, '');
  const id = path.startsWith('?') ? '' : decode(path.split('?')[0]);
  const view = id ? new Detail(root, app, id) : new List(root, app);
  return () => view.unmount();
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function tagOf(app, request) {
  const { el } = app;
  const [mark, words, kind] = OUTCOMES[request.outcome] ?? ['○', request.outcome, ''];
  return el('span', { class: `tag ${kind}` },
    el('span', { 'aria-hidden': 'true' }, mark), words);
}

// --- The list -----------------------------------------------------------------------

const COLUMNS = [
  ['Ended', ''], ['Outcome', ''], ['Subject', ''], ['Model', ''], ['Worker', 'less'],
  ['Waited', 'num less'], ['First token', 'num less'], ['Took', 'num'],
  ['Tokens', 'num less'], ['Tries', 'num less'], ['Hub', 'hub less'],
];

class List {
  #app;
  #stop = new AbortController();
  #timer = 0;
  #rows = new Map();
  #busy = false;
  #again = false;

  constructor(root, app) {
    const { el } = app;
    this.#app = app;
    this.root = root;
    this.body = el('tbody');
    this.count = el('p', { class: 'hint', role: 'status' });
    this.none = el('p', { class: 'muted', hidden: true });
    this.sheet = el('div', { class: 'sheet', tabindex: '0', role: 'group', 'aria-label': 'Requests' },
      el('table', {},
        el('thead', {}, el('tr', {}, COLUMNS.map(([name, kind]) =>
          el('th', { class: kind, scope: 'col' }, name)))),
        this.body));
    this.explain = new Explain(app, this.#stop.signal);
    root.append(
      el('div', { class: 'head' }, el('h1', {}, 'Requests'), this.count),
      this.#makeFilters(),
      el('section', { class: 'card', 'aria-label': 'Requests that have ended' },
        this.sheet, this.none),
      this.explain.node);
    const { signal } = this.#stop;
    app.live.addEventListener('exchange', ({ detail }) => {
      if (detail.change === 'ended') this.#soon();
    }, { signal });
    app.live.addEventListener('connection', ({ detail }) => {
      if (detail.state === 'open') this.#soon();
    }, { signal });
    window.addEventListener('hashchange', () => {
      if (location.hash === this.address) return;
      this.#readAddress();
      this.load();
    }, { signal });
    this.load();
  }

  unmount() {
    this.#stop.abort();
    clearTimeout(this.#timer);
  }

  // --- Filters ---

  #makeFilters() {
    const { el } = this.#app;
    const change = () => this.#applyFilters();
    const field = (name, title, input) => {
      input.id = `filter-${name}`;
      return el('div', { class: 'field' }, el('label', { for: input.id }, title), input);
    };
    this.inputs = {};
    for (const name of TEXTS) {
      this.inputs[name] = el('input', {
        type: 'search', autocomplete: 'off', spellcheck: 'false', maxlength: '200',
        onchange: change, onsearch: change,
      });
    }
    this.inputs.outcome = el('select', { onchange: change },
      el('option', { value: '' }, 'Any'),
      Object.entries(OUTCOMES).map(([value, [, words]]) => el('option', { value }, words)),
      el('optgroup', { label: 'Errors' },
        Object.keys(CODES).map((value) => el('option', { value }, value))));
    this.range = el('select', { onchange: change },
      Object.entries(RANGES).map(([value, words]) => el('option', { value }, words)));
    this.from = el('input', { type: 'datetime-local', step: '1', onchange: change });
    this.to = el('input', { type: 'datetime-local', step: '1', onchange: change });
    this.own = [field('from', 'From', this.from), field('to', 'To', this.to)];
    const titles = { id: 'Request id', subject: 'Subject', model: 'Model', worker: 'Worker' };
    const form = el('form', {
      class: 'card request-filters', role: 'search', 'aria-label': 'Filter requests',
      onsubmit(event) {
        event.preventDefault();
        change();
      },
    },
    TEXTS.map((name) => field(name, titles[name], this.inputs[name])),
    field('outcome', 'Outcome', this.inputs.outcome),
    field('range', 'Time', this.range),
    this.own,
    el('div', { class: 'row' },
      el('button', { class: 'main' }, 'Show'),
      el('button', { type: 'button', class: 'quiet', onclick: () => this.#clear() }, 'Clear')));
    this.#readAddress();
    return form;
  }

  #readAddress() {
    const given = new URLSearchParams(location.hash.split('?')[1] ?? '');
    for (const [name, input] of Object.entries(this.inputs)) {
      const value = given.get(name) ?? '';
      if (name === 'outcome' && value && ![...input.options].some((each) => each.value === value)) {
        input.append(this.#app.el('option', { value }, value));
      }
      input.value = value;
    }
    const since = Number(given.get('since')) || 0;
    const until = Number(given.get('until')) || 0;
    const range = given.get('range') ?? '';
    this.range.value = since || until ? 'own' : range in RANGES ? range : '';
    this.from.value = since ? local(since) : '';
    this.to.value = until ? local(until) : '';
    this.#showOwn();
    this.address = location.hash;
  }

  #showOwn() {
    for (const field of this.own) field.hidden = this.range.value !== 'own';
  }

  #applyFilters() {
    if (this.range.value === 'own' && this.own[0].hidden && !this.from.value) {
      this.from.value = local(Date.now() / 1_000 - 900);
    }
    this.#showOwn();
    const kept = this.#filters();
    if (this.range.value && this.range.value !== 'own') {
      kept.delete('since');
      kept.set('range', this.range.value);
    }
    const query = kept.toString();
    this.address = `#/requests${query && `?${query}`}`;
    history.replaceState(null, '', this.address);
    this.load();
  }

  #clear() {
    history.replaceState(null, '', '#/requests');
    this.#readAddress();
    this.load();
  }

  // The query of the API.
  #filters() {
    const query = new URLSearchParams();
    for (const [name, input] of Object.entries(this.inputs)) {
      if (input.value.trim()) query.set(name, input.value.trim());
    }
    if (this.range.value === 'own') {
      if (this.from.value) query.set('since', unix(this.from.value));
      if (this.to.value) query.set('until', unix(this.to.value));
    } else if (this.range.value) {
      query.set('since', (Date.now() / 1_000 - Number(this.range.value)).toFixed(0));
    }
    return query;
  }

  // --- Rows ---

  // Look again soon, but not for each of many requests.
  #soon() {
    if (!this.#timer) this.#timer = setTimeout(() => this.load(), PAUSE);
  }

  async load() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (this.#busy) {
      this.#again = true;
      return;
    }
    this.#busy = true;
    const query = this.#filters();
    const filtered = query.size > 0;
    query.set('limit', MOST);
    try {
      const { signal } = this.#stop;
      const { requests, missing } = await this.#app.api(`/admin/requests?${query}`, { signal });
      requestAnimationFrame(() => this.#render(requests, filtered, missing));
    } catch (error) {
      if (error.name !== 'AbortError') this.#fail(error);
    } finally {
      this.#busy = false;
      if (this.#again && !this.#stop.signal.aborted) {
        this.#again = false;
        this.#soon();
      }
    }
  }

  #fail(error) {
    this.none.hidden = false;
    this.none.textContent = error.message;
    this.none.className = 'problem';
  }

  #render(requests, filtered, missing = []) {
    if (this.#stop.signal.aborted) return;
    const kept = new Map();
    requests.forEach((each, place) => {
      const key = `${each.id} ${each.ended.toFixed(0)}`;
      const row = kept.has(key) ? this.#row(each) : (this.#rows.get(key) ?? this.#row(each));
      if (this.body.children[place] !== row) {
        this.body.insertBefore(row, this.body.children[place] ?? null);
      }
      kept.set(key, row);
    });
    while (this.body.children.length > requests.length) this.body.lastChild.remove();
    this.#rows = kept;
    this.root.classList.toggle('several', requests.some((each) => each.hub));
    this.sheet.hidden = !requests.length;
    this.none.hidden = requests.length > 0;
    this.none.className = 'muted';
    this.none.textContent = filtered
      ? 'No request that is still kept fits these filters. The hub keeps the last 1,000.'
      : 'No request has ended yet. Those that run are on the overview.';
    const most = requests.length === MOST;
    this.count.textContent = requests.length
      ? `${most ? `the newest ${MOST}` : this.#app.format.plural(requests.length, 'request')}`
      : '';
    if (missing.length) {
      this.count.append(` ▲ without those of ${missing.join(', ')}, which did not answer`);
    }
  }

  #row(request) {
    const { el, format } = this.#app;
    const time = new Date(request.ended * 1_000);
    const cells = [
      el('a', { href: `#/requests/${encodeURIComponent(request.id)}`, title: request.id },
        el('time', { datetime: time.toISOString() }, shortTime(time))),
      outcomeText(request),
      request.subject || '–',
      request.model || '–',
      request.worker || '–',
      took(this.#app, request.attempts ? request.queued : null),
      took(this.#app, request.first_byte),
      took(this.#app, request.duration),
      format.number(request.tokens),
      format.number(request.attempts),
      request.hub ?? '',
    ];
    const [, , kind] = OUTCOMES[request.outcome] ?? ['', '', ''];
    return el('tr', {}, cells.map((cell, place) => {
      const name = COLUMNS[place][1];
      const text = typeof cell === 'string' ? cell : '';
      return el('td', {
        class: COLUMNS[place][0] === 'Outcome' ? `${name} ${kind}` : name,
        title: text.length > 20 ? text : null,
      }, cell);
    }));
  }
}

// "✓ complete", "✕ worker_unreachable", "✓ complete, rescued"
function outcomeText(request) {
  const [mark, words] = OUTCOMES[request.outcome] ?? ['○', request.outcome];
  const notes = [request.error || words.toLowerCase()];
  if (request.rescued) notes.push('rescued');
  if (request.fell_back) notes.push('fallback');
  return `${mark} ${notes.join(', ')}`;
}

// Seconds that may be a few milliseconds.
function took(app, seconds) {
  return app.format.ms(seconds == null ? null : seconds * 1_000);
}

function shortTime(time) {
  const today = time.toDateString() === new Date().toDateString();
  const hours = time.toLocaleTimeString([], { hour12: false });
  return today ? hours : `${time.toLocaleDateString()} ${hours}`;
}

// Unix seconds as an input of local time has them, and back.
function local(seconds) {
  const time = new Date(seconds * 1_000);
  time.setMinutes(time.getMinutes() - time.getTimezoneOffset());
  return time.toISOString().slice(0, 19);
}

function unix(text) {
  return Math.round(new Date(text).getTime() / 1_000);
}

// --- One request --------------------------------------------------------------------

class Detail {
  #app;
  #id;
  #stop = new AbortController();
  #timer = 0;

  constructor(root, app, id) {
    this.#app = app;
    this.#id = id;
    const { el } = app;
    this.box = el('div', { class: 'stack' }, el('p', { class: 'muted' }, 'Looking for it…'));
    root.append(
      el('p', {}, el('a', { href: '#/requests' }, '← All requests')),
      el('div', { class: 'head' }, el('h1', {}, 'Request ', el('span', { class: 'mono' }, id))),
      this.box);
    app.live.addEventListener('exchange', ({ detail }) => {
      if (detail.id === id) this.#soon();
    }, { signal: this.#stop.signal });
    this.load();
  }

  unmount() {
    this.#stop.abort();
    clearTimeout(this.#timer);
  }

  #soon() {
    if (!this.#timer) this.#timer = setTimeout(() => this.load(), PAUSE);
  }

  async load() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const { api, el } = this.#app;
    const { signal } = this.#stop;
    try {
      const [{ requests, missing = [] }, { exchanges }] = await Promise.all([
        api(`/admin/requests?${new URLSearchParams({ id: this.#id })}`, { signal }),
        api('/admin/exchanges', { signal }),
      ]);
      const running = exchanges.filter((each) => each.id === this.#id);
      const cards = [
        ...running.map((each) => this.#showRunning(each)),
        ...requests.map((each) => this.#show(each)),
      ];
      if (!cards.length) {
        cards.push(el('div', { class: 'empty' },
          el('h2', {}, 'The hub does not know this request'),
          missing.length > 0 && el('p', { class: 'problem' },
            `${missing.join(', ')} did not answer, and may know it.`),
          el('p', {}, 'It keeps the last 1,000 requests until it restarts. The id is the '
            + 'X-Request-Id of an answer; the access log may still have it.')));
      }
      this.box.replaceChildren(...cards);
    } catch (error) {
      if (error.name === 'AbortError') return;
      this.box.replaceChildren(el('p', { class: 'problem' }, error.message));
    }
  }

  #showRunning(exchange) {
    const { el, format } = this.#app;
    const where = exchange.worker ? ` on ${exchange.worker}` : '';
    return el('section', { class: 'card stack' },
      el('h2', {}, exchange.state === 'queued' ? 'It waits' : `It runs${where}`),
      this.#facts({
        For: format.duration(exchange.age),
        Subject: exchange.subject,
        Model: exchange.model,
        'Tokens so far': format.number(exchange.tokens),
        Tries: format.number(exchange.attempts),
        Class: exchange.class,
        ...(exchange.hub && { Hub: exchange.hub }),
      }),
      this.#listSteps({ ...exchange, first_byte: null }),
      el('p', { class: 'hint' }, exchange.steps.length
        ? 'The rest is shown as soon as it has ended.'
        : 'Nothing unusual has happened to it so far.'));
  }

  #show(request) {
    const { el, format } = this.#app;
    const begun = new Date((request.ended - request.duration) * 1_000);
    const answered = request.first_byte !== null;
    const writing = answered ? request.duration - request.first_byte : 0;
    const speed = request.tokens > 1 && writing > 0.05 ? request.tokens / writing : null;
    return el('section', { class: 'card stack' },
      el('div', { class: 'head' },
        el('h2', {}, tagOf(this.#app, request)),
        el('span', { class: 'muted' }, begun.toLocaleString())),
      el('p', {}, sentenceOf(request)),
      this.#drawBar(request),
      this.#listSteps(request),
      this.#facts({
        Subject: request.subject || '–',
        From: request.remote || '–',
        Request: `${request.method} ${request.route}`,
        Model: request.fell_back
          ? `${request.model}, instead of ${request.fell_back}` : request.model || '–',
        Worker: request.worker || '–',
        ...(request.hub && { Hub: request.hub }),
        Status: request.status || '–',
        Took: took(this.#app, request.duration),
        'First token': took(this.#app, request.first_byte),
        'Prompt tokens': format.number(request.prompt_tokens),
        'Generated tokens': format.number(request.tokens)
          + (speed ? `, ${format.short(speed)} per second` : ''),
        'Bytes sent': format.number(request.bytes),
        ...(request.trace && { Trace: request.trace }),
      }),
      this.#links(request));
  }

  #facts(facts) {
    const { el } = this.#app;
    return el('dl', { class: 'facts-of-request' }, Object.entries(facts).map(
      ([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, String(value)))));
  }

  #links(request) {
    const { el } = this.#app;
    const link = (name, value, words) => value && el('a', {
      class: 'button', href: `#/requests?${new URLSearchParams({ [name]: value })}`,
    }, words);
    const around = new URLSearchParams({
      since: Math.floor(request.ended - request.duration - 30),
      until: Math.ceil(request.ended + 30),
    });
    return el('div', { class: 'row' },
      link('subject', request.subject, 'Others of this subject'),
      link('worker', request.worker, 'Others on this worker'),
      el('a', { class: 'button', href: `#/requests?${around}` }, 'Others at that time'));
  }

  // A list of what happened, with the times; it has more detail than the bar.
  #listSteps(request) {
    const { el } = this.#app;
    return el('ol', { class: 'steps' }, storyOf(request).map(({ at, kind, text }) =>
      el('li', { class: kind },
        el('span', { class: 'num muted' }, `+${took(this.#app, at)}`),
        el('span', { 'aria-hidden': 'true' }, { bad: '✕', good: '✓', warn: '▲' }[kind] ?? '•'),
        el('span', {}, text))));
  }

  // Waiting, failed attempts, reading and writing, as parts of the whole time.
  #drawBar(request) {
    const parts = partsOf(request);
    const all = Math.max(request.duration, 1e-6);
    const bar = document.createElementNS(NS, 'svg');
    bar.setAttribute('class', 'phases');
    bar.setAttribute('viewBox', '0 0 1000 10');
    bar.setAttribute('preserveAspectRatio', 'none');
    bar.setAttribute('aria-hidden', 'true');
    for (const { begin, end, kind } of parts) {
      const rect = document.createElementNS(NS, 'rect');
      rect.setAttribute('class', kind);
      rect.setAttribute('x', (1_000 * begin) / all);
      rect.setAttribute('width', Math.max((1_000 * (end - begin)) / all, 1));
      rect.setAttribute('height', 10);
      bar.append(rect);
    }
    const { el } = this.#app;
    const names = { waits: 'waited', fails: 'failed attempts', reads: 'until the first token', writes: 'answer' };
    const sums = Object.entries(names).map(([kind, words]) => {
      const seconds = parts.filter((each) => each.kind === kind)
        .reduce((sum, each) => sum + each.end - each.begin, 0);
      return seconds > 0.0005
        && el('span', { class: `phase ${kind}` }, `${words} ${took(this.#app, seconds)}`);
    });
    return el('div', {}, bar, el('p', { class: 'row hint' }, sums));
  }
}

function sentenceOf(request) {
  if (request.outcome === 'complete') {
    const notes = [];
    if (request.attempts > 1) notes.push(`after ${request.attempts} attempts`);
    if (request.rescued) notes.push('continued by another worker when one broke off');
    if (request.fell_back) notes.push('by a fallback model');
    return `The client got the whole answer${notes.length ? `, ${notes.join(', ')}` : ''}.`;
  }
  if (request.outcome === 'refused') return 'The worker refused it, and the client got the worker’s own error.';
  if (request.error in CODES) return CODES[request.error];
  if (request.outcome === 'client_gone') return 'The client left before the end of its answer.';
  return request.error || 'It ended.';
}

// The steps in words, and the first token, which is no step.
function storyOf(request) {
  const story = request.steps.map(({ at, step, worker, reason }) => {
    switch (step) {
      case 'queued': return { at, kind: 'warn', text: `It waits: ${reason}.` };
      case 'attempt': return { at, kind: '', text: `${worker} gets it.` };
      case 'failed': return { at, kind: 'bad', text: `The attempt on ${worker} fails: ${reason}.` };
      case 'resumed': return { at, kind: 'good', text: `${worker} continues the answer.` };
      case 'fell_back': return { at, kind: 'warn', text: `Another model takes over: ${reason}.` };
      default: {
        const [, , kind] = OUTCOMES[request.outcome] ?? ['', '', ''];
        return { at, kind, text: `It ends: ${reason}.` };
      }
    }
  });
  if (request.first_byte !== null) {
    const place = story.findIndex((each) => each.at > request.first_byte);
    story.splice(place < 0 ? story.length - 1 : place, 0,
      { at: request.first_byte, kind: '', text: 'The first token arrives.' });
  }
  return story;
}

function partsOf(request) {
  const parts = [];
  const end = request.duration;
  const first = request.first_byte ?? end;
  const add = (begin, until, kind) => {
    if (until > begin) parts.push({ begin, end: until, kind });
  };
  const steps = request.steps;
  steps.forEach(({ at, step }, place) => {
    const next = steps[place + 1];
    const until = next?.at ?? end;
    if (step === 'queued') add(at, until, 'waits');
    if (step !== 'attempt' && step !== 'resumed') return;
    if (next?.step === 'failed') {
      add(at, until, 'fails');
    } else {
      const reads = Math.min(Math.max(first, at), until);
      add(at, reads, 'reads');
      add(reads, until, 'writes');
    }
  });
  return parts;
}

// --- Explain ------------------------------------------------------------------------

class Explain {
  #app;
  #signal;

  constructor(app, signal) {
    const { el } = app;
    this.#app = app;
    this.#signal = signal;
    const field = (id, title, input) => {
      input.id = id;
      return el('div', { class: 'field' }, el('label', { for: id }, title), input);
    };
    const text = (placeholder = null) => el('input', {
      autocomplete: 'off', spellcheck: 'false', maxlength: '200', placeholder,
    });
    this.model = text();
    this.model.required = true;
    this.model.setAttribute('list', 'explain-models');
    this.models = el('datalist', { id: 'explain-models' });
    this.subject = text('yourself');
    this.path = el('select', {}, PATHS.map((path) => el('option', { value: path }, path)));
    this.priority = el('select', {},
      el('option', { value: '' }, 'As usual'),
      el('option', { value: 'interactive' }, 'interactive'),
      el('option', { value: 'batch' }, 'batch'));
    this.prompt = el('textarea', {
      rows: '3', spellcheck: 'false',
      placeholder: 'Its length matters, and its beginning, which a worker may have in its cache.',
    });
    this.button = el('button', { class: 'main' }, 'Explain');
    this.problem = el('p', { class: 'problem', role: 'alert' });
    this.result = el('div', { class: 'stack', role: 'status' });
    this.node = el('details', { class: 'card explain', ontoggle: () => this.#listModels() },
      el('summary', {}, el('h2', {}, 'What would a request get now?')),
      el('form', { class: 'stack', onsubmit: (event) => this.#submit(event) },
        el('p', { class: 'muted' }, 'The hub decides as for a real request, and sends nothing to '
          + 'any worker but a count of the tokens.'),
        el('div', { class: 'request-filters' },
          field('explain-model', 'Model', this.model),
          field('explain-subject', 'Subject', this.subject),
          field('explain-path', 'Path', this.path),
          field('explain-priority', 'Priority', this.priority)),
        field('explain-prompt', 'Prompt', this.prompt),
        this.models,
        el('div', { class: 'row' }, this.button),
        this.problem),
      this.result);
  }

  async #listModels() {
    if (!this.node.open || this.models.children.length) return;
    try {
      const { models } = await this.#app.api('/admin/models', { signal: this.#signal });
      const names = models.flatMap((model) => [model.name, ...model.aliases]);
      this.models.replaceChildren(
        ...names.map((value) => this.#app.el('option', { value })));
      if (!this.model.value && names.length === 1) [this.model.value] = names;
    } catch (error) {
      if (error.name !== 'AbortError') this.problem.textContent = error.message;
    }
  }

  async #submit(event) {
    event.preventDefault();
    const body = { model: this.model.value.trim(), path: this.path.value };
    if (this.subject.value.trim()) body.subject = this.subject.value.trim();
    if (this.priority.value) body.priority = this.priority.value;
    if (this.prompt.value) body.prompt = this.prompt.value;
    this.button.disabled = true;
    this.problem.textContent = '';
    try {
      const it = await this.#app.api('/admin/explain', {
        method: 'POST', body, signal: this.#signal,
      });
      this.result.replaceChildren(...this.#show(it));
    } catch (error) {
      if (error.name === 'AbortError') return;
      this.result.replaceChildren();
      this.problem.textContent = error.message;
    } finally {
      this.button.disabled = false;
    }
  }

  #show(it) {
    const { el, format } = this.#app;
    const [mark, words, kind] = VERDICTS[it.code]
      ?? ['✕', () => 'It would get an error.', 'bad'];
    const { context, queue, charge } = it;
    const tokens = `${context.counted ? '' : 'about '}${format.plural(context.prompt_tokens, 'token')}`;
    const largest = context.largest ? ` of ${format.number(context.largest)}` : '';
    const fits = { true: `fits the largest context${largest}`, false: `does not fit the largest context${largest}` }[context.fits]
      ?? 'may fit: no worker has reported its context';
    const lines = it.model ? [
      `The prompt has ${tokens}, and ${fits}.`,
      queue && `It would be number ${queue.position} of ${queue.waiting} in the queue${
        queue.expected == null ? '' : `, for about ${format.duration(queue.expected)}`}.`,
      charge.most_tokens == null
        ? 'Its answer has no limit of tokens.'
        : `With its answer it may use ${format.plural(charge.most_tokens, 'token')}.`,
      `The policy is ${it.policy}.`,
    ] : [];
    return [
      el('p', { class: kind }, el('strong', {},
        el('span', { 'aria-hidden': 'true' }, `${mark} `), words(it))),
      el('p', {}, `${it.reason[0]?.toUpperCase() ?? ''}${it.reason.slice(1)}`
        + (it.code in VERDICTS ? '' : ` (${it.code})`)),
      el('ul', { class: 'stack-tight' }, lines.filter(Boolean).map((line) => el('li', {}, line))),
      it.others.length > 0 && el('div', { class: 'sheet', tabindex: '0', role: 'group', 'aria-label': 'Other workers' },
        el('table', {},
          el('thead', {}, el('tr', {},
            el('th', { scope: 'col' }, 'Not'), el('th', { scope: 'col' }, 'Why'))),
          el('tbody', {}, it.others.map((each) => el('tr', {},
            el('td', {}, each.worker), el('td', { class: 'wrap' }, each.reason)))))),
    ].filter(Boolean);
  }
}
