// What was used: a bar chart and a table, by subject, model and day (UTC).
//
//   #/usage?by=subject,day&since=30d    the address has the question
//
// The chart shows what the table has, so it is one picture for screen readers.

const NS = 'http://www.w3.org/2000/svg';
const DAY = 86_400;
const BARS = 20; // of subjects or models; the table has the others
const SERIES = 7; // colours in a column of a day; the rest is added up
const ROWS = 500; // of the table; the file has all
const EVERY = 60_000; // ms between two looks

const GROUPS = {
  subject: 'Subject', model: 'Model', day: 'Day', 'subject,model': 'Subject and model',
  'day,subject': 'Day and subject', 'day,model': 'Day and model',
};
const RANGES = {
  '0d': 'Today', '6d': 'The last 7 days', '29d': 'The last 30 days',
  '89d': 'The last 90 days', '364d': 'The last 12 months', own: 'From … to …',
};
const MEASURES = {
  tokens: ['Tokens', (row) => row.prompt_tokens + row.completion_tokens],
  requests: ['Requests', (row) => row.requests],
  errors: ['Requests with an error', (row) => row.errors],
  slot_seconds: ['Time on slots', (row) => row.slot_seconds],
};
// What tokens consist of: a name, a colour, and how many.
const PARTS = [
  ['Prompt, from a cache', 's3', (row) => row.cached_tokens],
  ['Prompt', 's0', (row) => row.prompt_tokens - row.cached_tokens],
  ['Answer', 's1', (row) => row.completion_tokens],
];
const COLUMNS = [
  ['requests', 'Requests'], ['errors', 'Errors'], ['prompt_tokens', 'Prompt tokens'],
  ['cached_tokens', 'From a cache'], ['completion_tokens', 'Answer tokens'],
  ['slot_seconds', 'Time on slots'],
];
const LIMITS = {
  rpm: 'requests a minute', tpm: 'tokens a minute',
  tokens_per_day: 'tokens a day', tokens_per_month: 'tokens a month',
};

export function mount(root, app) {
  const view = new Usage(root, app);
  return () => view.unmount();
}

class Usage {
  #app;
  #stop = new AbortController();
  #call = null;
  #timer;
  #answer = null;

  constructor(root, app) {
    const { el } = app;
    this.#app = app;
    this.all = app.can('monitor');
    this.summary = el('p', { class: 'hint', role: 'status' });
    this.problem = el('div', { role: 'alert' });
    this.limits = el('section', { class: 'card limits', hidden: true, 'aria-label': 'Limits' });
    this.chart = el('section', { class: 'card', hidden: true, 'aria-label': 'Chart' });
    this.table = el('section', { class: 'card', hidden: true, 'aria-label': 'Table' });
    this.none = el('div', { class: 'card', hidden: true });
    root.append(
      el('div', { class: 'head' }, el('h1', {}, 'Usage'), this.summary),
      this.#makeForm(), this.problem, this.limits, this.none, this.chart, this.table);
    const { signal } = this.#stop;
    window.addEventListener('hashchange', () => {
      if (location.hash !== this.address && /^#\/usage\b/.test(location.hash)) this.#begin();
    }, { signal });
    this.#timer = setInterval(() => {
      if (!document.hidden) this.load();
    }, EVERY);
    this.#begin();
  }

  unmount() {
    this.#stop.abort();
    this.#call?.abort();
    clearInterval(this.#timer);
  }

  #begin() {
    this.#readAddress();
    this.load();
  }

  // --- The question ---

  #makeForm() {
    const { el } = this.#app;
    const onchange = () => this.#changed();
    const select = (id, choices, attributes = {}) => el('select', { id, onchange, ...attributes },
      Object.entries(choices).map(([value, name]) => el('option', { value }, name)));
    const field = (input, label) => el('div', { class: 'field' },
      el('label', { for: input.id }, label), input);
    const date = (id) => el('input', { id, type: 'date', onchange, min: '1970-01-01' });
    this.whose = select('usage-of', { all: 'All subjects', own: 'Me' });
    this.by = select('usage-by', GROUPS);
    this.range = select('usage-range', RANGES);
    this.from = date('usage-from');
    this.to = date('usage-to');
    this.measure = select('usage-measure', Object.fromEntries(
      Object.entries(MEASURES).map(([name, [text]]) => [name, text])), {
      onchange: () => this.#show(),
    });
    this.dates = el('div', { class: 'row', hidden: true },
      field(this.from, 'From (UTC)'), field(this.to, 'To, with that day'));
    this.save = el('button', {
      type: 'button', disabled: true, onclick: () => this.#download(),
    }, 'Download as CSV');
    return el('form', {
      class: 'row usage-form', 'aria-label': 'What to add up', onsubmit: (event) => event.preventDefault(),
    },
    this.all && field(this.whose, 'Of'), field(this.by, 'By'), field(this.range, 'When'),
    this.dates, field(this.measure, 'Chart of'), this.save);
  }

  get own() {
    return !this.all || this.whose.value === 'own';
  }

  #readAddress() {
    const given = new URLSearchParams(location.hash.split('?')[1] ?? '');
    const by = given.get('by');
    const since = given.get('since') ?? '6d';
    this.whose.value = given.get('of') === 'own' ? 'own' : 'all';
    this.#offerGroups();
    this.by.value = by in GROUPS && !(this.own && by.includes('subject')) ? by
      : this.own ? 'model' : 'subject';
    this.range.value = since in RANGES ? since : 'own';
    this.from.value = since in RANGES ? '' : since;
    this.to.value = given.get('until') ?? '';
    this.dates.hidden = this.range.value !== 'own';
    this.address = location.hash;
  }

  // A subject alone is not divided into subjects.
  #offerGroups() {
    for (const option of this.by.options) {
      option.hidden = option.disabled = this.own && option.value.includes('subject');
    }
  }

  #changed() {
    this.#offerGroups();
    if (this.by.selectedOptions[0]?.disabled) this.by.value = 'model';
    const own = this.range.value === 'own';
    this.dates.hidden = !own;
    if (own && !this.from.value) {
      this.from.value = dayOf(Date.now() / 1_000 - 29 * DAY);
      this.to.value = dayOf(Date.now() / 1_000);
    }
    const query = new URLSearchParams({ by: this.by.value, ...this.#range() });
    if (this.all && this.own) query.set('of', 'own');
    this.address = `#/usage?${query}`;
    history.replaceState(null, '', this.address);
    this.load();
  }

  #range() {
    if (this.range.value !== 'own') return { since: this.range.value };
    const until = this.to.value ? { until: this.to.value } : {};
    return { ...(this.from.value ? { since: this.from.value } : {}), ...until };
  }

  async load() {
    this.#call?.abort();
    const call = (this.#call = new AbortController());
    const query = new URLSearchParams({ by: this.by.value, ...this.#range() });
    const path = this.own ? '/v1/usage' : '/admin/usage';
    try {
      const answer = await this.#app.api(`${path}?${query}`, { signal: call.signal });
      this.problem.replaceChildren();
      this.#answer = answer;
      this.#show();
    } catch (error) {
      if (error.name === 'AbortError' || call.signal.aborted) return;
      const { el } = this.#app;
      this.problem.replaceChildren(el('div', { class: 'notice bad row spread' },
        el('span', {}, error.message),
        el('button', { type: 'button', onclick: () => this.load() }, 'Try again')));
    }
  }

  // --- The answer ---

  #show() {
    const answer = this.#answer;
    if (!answer) return;
    const { format } = this.#app;
    const { total, rows } = answer;
    const tokens = total.prompt_tokens + total.completion_tokens;
    const errors = total.errors ? `, ${format.number(total.errors)} of them with an error` : '';
    this.summary.textContent = rows.length
      ? `${format.plural(tokens, 'token')} in ${format.plural(total.requests, 'request')}`
        + `${errors}, ${rangeOf(answer)} (UTC)`
      : '';
    this.none.hidden = rows.length > 0;
    this.chart.hidden = this.table.hidden = !rows.length;
    this.save.disabled = !rows.length;
    if (!rows.length) this.#showNothing(answer);
    else {
      this.#showChart(answer);
      this.#showTable(answer);
    }
    this.#showLimits(answer.limits ?? {});
  }

  #showNothing(answer) {
    const { el } = this.#app;
    this.none.replaceChildren(el('div', { class: 'empty' },
      el('h2', {}, 'Nothing was used'),
      el('p', {}, `There was no request ${rangeOf(answer)} (UTC). `
        + 'A request is counted when it has ended, on the day on which it ended.')));
  }

  #showLimits(limits) {
    const { el, format } = this.#app;
    this.limits.hidden = !Object.keys(limits).length;
    this.limits.replaceChildren(el('h2', {}, 'What is left of your limits'),
      ...Object.entries(limits).map(([claim, { limit, remaining, resets_in: wait }]) => {
        const id = `left-${claim}`;
        const resets = wait ? `, all of them again in ${format.duration(wait)}` : '';
        return el('div', { class: 'limit' },
          el('label', { for: id }, `${format.number(remaining)} of ${format.number(limit)} `
            + `${LIMITS[claim] ?? claim}${resets}`),
          el('meter', { id, min: 0, max: limit, low: limit / 10, optimum: limit, value: remaining }));
      }));
  }

  // --- The chart ---

  #showChart(answer) {
    const { el } = this.#app;
    const [name] = MEASURES[this.measure.value];
    const byDay = answer.by.includes('day');
    const { svg, key } = byDay ? this.#columns(answer) : this.#bars(answer);
    const text = `${name} by ${answer.by.join(' and ')}, ${rangeOf(answer)}`;
    svg.setAttribute('role', 'img');
    svg.setAttribute('aria-label', `Bar chart: ${text}. The table has the same figures.`);
    this.chart.replaceChildren(
      el('div', { class: 'head' }, el('h2', {}, text),
        el('ul', { class: 'row usage-key' }, key.map(([label, colour]) =>
          el('li', { class: colour }, label)))),
      svg);
  }

  // What a row is divided into: [name, colour, value].
  #partsOf(row) {
    const name = this.measure.value;
    if (name !== 'tokens') return [['', name === 'errors' ? 's1' : 's0', MEASURES[name][1](row)]];
    return PARTS.map(([text, colour, value]) => [text, colour, value(row)]);
  }

  get #partNames() {
    return this.measure.value === 'tokens' ? PARTS.map(([text, colour]) => [text, colour]) : [];
  }

  // One bar for each subject or model, from the largest to the smallest.
  #bars({ by, rows }) {
    const value = MEASURES[this.measure.value][1];
    const shown = [...rows].sort((a, b) => value(b) - value(a)).slice(0, BARS);
    const most = Math.max(1, ...shown.map(value));
    const svg = draw('svg', { class: 'usage-chart', width: '100%', height: shown.length * 26 });
    shown.forEach((row, index) => {
      const label = by.map((name) => row[name]).join(' · ');
      const y = index * 26;
      // A picture in the picture cuts a name that is too long.
      const text = draw('svg', { y, width: '23%', height: 26 },
        draw('text', { x: 0, y: 17 }, cut(label, 60)));
      let x = 24; // percent; the names are in front
      const group = draw('g', {}, draw('title', {}, `${label}: ${this.#words(row)}`), text);
      for (const [, colour, amount] of this.#partsOf(row)) {
        const width = (amount / most) * 62;
        if (width > 0) {
          group.append(draw('rect', {
            class: colour, x: `${x}%`, y: y + 4, width: `${width}%`, height: 18,
          }));
        }
        x += width;
      }
      group.append(draw('text', { class: 'value', x: `${x + 0.6}%`, y: y + 17 },
        this.#amount(value(row))));
      svg.append(group);
    });
    return { svg, key: this.#partNames };
  }

  // One column for each day, of what a day consists of.
  #columns({ by, rows, since, until }) {
    const value = MEASURES[this.measure.value][1];
    const other = by.find((name) => name !== 'day');
    const colours = other ? colourOf(rows, other, value) : null;
    const days = new Map();
    for (const row of rows) {
      const parts = days.get(row.day) ?? days.set(row.day, new Map()).get(row.day);
      const of = colours
        ? [[colours.has(row[other]) ? row[other] : 'others', colours.get(row[other]) ?? 's7', value(row)]]
        : this.#partsOf(row);
      for (const [name, colour, amount] of of) {
        const before = parts.get(name)?.[1] ?? 0;
        parts.set(name, [colour, before + amount]);
      }
    }
    const first = Math.max(since, Date.parse(`${[...days.keys()].sort()[0]}T00:00Z`) / 1_000);
    const count = Math.max(1, Math.round((until - first) / DAY));
    const sums = [...days.values()].map((parts) => sum([...parts.values()].map(([, each]) => each)));
    const most = Math.max(1, ...sums);
    const high = 180;
    const svg = draw('svg', { class: 'usage-chart', width: '100%', height: high + 40 });
    for (const share of [0, 0.5, 1]) {
      const y = 14 + high * (1 - share);
      svg.append(draw('line', { x1: 0, x2: '100%', y1: y, y2: y }),
        draw('text', { class: 'value', x: 0, y: y - 3 }, share ? this.#amount(most * share) : ''));
    }
    const every = Math.ceil(count / 6);
    for (let index = 0; index < count; index += 1) {
      const day = dayOf(first + index * DAY);
      const x = 6 + (index / count) * 94;
      const width = Math.min((0.78 / count) * 94, 6);
      const parts = days.get(day) ?? new Map();
      const names = [...parts].filter(([, [, each]]) => each > 0)
        .map(([name, [, each]]) => `${name && `${name}: `}${this.#amount(each)}`);
      const group = draw('g', {}, draw('title', {}, `${day}: ${names.join(', ') || 'nothing'}`));
      let y = 14 + high;
      for (const [colour, amount] of parts.values()) {
        const height = (amount / most) * high;
        y -= height;
        if (height > 0) {
          group.append(draw('rect', { class: colour, x: `${x}%`, y, width: `${width}%`, height }));
        }
      }
      if (index % every === 0) {
        group.append(draw('text', { x: `${x}%`, y: high + 32 }, shortDay(day)));
      }
      svg.append(group);
    }
    const rest = colours && rows.some((row) => !colours.has(row[other]));
    const key = colours ? [...colours, ...(rest ? [['others', 's7']] : [])] : this.#partNames;
    return { svg, key };
  }

  #amount(value) {
    const { format } = this.#app;
    return this.measure.value === 'slot_seconds' ? format.duration(value) : compact.format(value);
  }

  #words(row) {
    return COLUMNS.map(([name, title]) => `${title.toLowerCase()} ${this.#cell(name, row)}`)
      .join(', ');
  }

  // --- The table ---

  #cell(name, row) {
    const { format } = this.#app;
    const value = row[name];
    if (name === 'slot_seconds') return format.duration(value);
    if (name !== 'cached_tokens' || !row.prompt_tokens) return format.number(value);
    return `${format.number(value)} (${Math.round((value / row.prompt_tokens) * 100)} %)`;
  }

  #showTable({ by, rows, total, complete }) {
    const { el, format } = this.#app;
    const line = (row) => COLUMNS.map(([name]) =>
      el('td', { class: `num${name === 'errors' && row.errors ? ' bad' : ''}` }, this.#cell(name, row)));
    const left = rows.length > ROWS
      ? `The first ${format.number(ROWS)} of ${format.number(rows.length)} rows; the file has them all.`
      : '';
    const more = complete ? '' : ' There are more than 10,000 rows: choose fewer days to see all.';
    const focused = this.table.contains(document.activeElement);
    const sheet = el('div', {
      class: 'sheet', tabindex: '0', role: 'group', 'aria-label': 'Usage',
    }, el('table', {},
      el('thead', {}, el('tr', {},
        by.map((name) => el('th', { scope: 'col' }, GROUPS[name])),
        COLUMNS.map(([, title]) => el('th', { scope: 'col', class: 'num' }, title)))),
      el('tbody', {}, rows.slice(0, ROWS).map((row) => el('tr', {},
        by.map((name) => el('td', { title: row[name] }, row[name])), line(row)))),
      el('tfoot', {}, el('tr', {},
        el('th', { scope: 'row', colspan: by.length }, 'Total'), line(total)))));
    this.table.replaceChildren(sheet, el('p', { class: 'hint' }, left + more));
    if (focused) sheet.focus();
  }

  // --- The file ---

  #download() {
    const { by, rows, since, until } = this.#answer;
    const names = [...by, ...COLUMNS.map(([name]) => name)];
    const lines = [names, ...rows.map((row) => names.map((name) => row[name]))];
    const text = lines.map((line) => `${line.map(field).join(',')}\r\n`).join('');
    const url = URL.createObjectURL(new Blob([text], { type: 'text/csv;charset=utf-8' }));
    const link = this.#app.el('a', {
      href: url, download: `usage-${dayOf(since)}-to-${dayOf(until - 1)}.csv`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    this.#app.announce('The file is in your downloads.');
  }
}

// --- Helpers ------------------------------------------------------------------------

const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 });

// A field of CSV (RFC 4180) that no spreadsheet takes for a formula.
function field(value) {
  let text = String(value);
  if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// The colours of the largest groups, by name.
function colourOf(rows, group, value) {
  const sums = new Map();
  for (const row of rows) sums.set(row[group], (sums.get(row[group]) ?? 0) + value(row));
  const largest = [...sums].sort(([, a], [, b]) => b - a).slice(0, SERIES);
  return new Map(largest.map(([name], index) => [name, `s${index}`]));
}

function draw(tag, attributes, ...children) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const dayOf = (unix) => new Date(unix * 1_000).toISOString().slice(0, 10);
const shortDay = (day) => new Date(`${day}T00:00Z`).toLocaleDateString('en', {
  day: 'numeric', month: 'short', timeZone: 'UTC',
});

function rangeOf({ since, until }) {
  const [first, last] = [shortDay(dayOf(since)), shortDay(dayOf(until - 1))];
  return first === last ? `on ${first}` : `from ${first} to ${last}`;
}
