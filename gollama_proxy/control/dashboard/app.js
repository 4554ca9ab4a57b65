// The shell of the page: signing in, calls to the hub, live events, navigation.
//
// A view is a module with `mount(root, app)`, which returns a function that unmounts it.
// What the hub sends becomes text, through textContent, and never markup.

const BASE = new URL('..', import.meta.url); // the hub, also behind a path
const KEPT = 'gollama-proxy token'; // in sessionStorage, if the user wants that
const THEME = 'gollama-proxy theme'; // in localStorage
const SILENCE = 12_000; // ms without an event, after which the stream counts as lost
const HIDDEN = 60_000; // ms that a hidden tab stays connected
const WAITS = [500, 1_000, 2_000, 4_000, 8_000, 15_000]; // ms between two tries

const VIEWS = [
  { path: '', name: 'Overview', file: './overview.js', scope: 'monitor' },
  { path: 'requests', name: 'Requests', file: './requests.js', scope: 'monitor' },
  { path: 'playground', name: 'Playground', file: './playground.js' },
  { path: 'usage', name: 'Usage', file: './usage.js' },
];

// --- Elements -----------------------------------------------------------------------

// Make an element.  Attributes: a function is a listener (`onclick`), true is an empty
// attribute, and false, null and undefined are none.  Children: nodes, text, lists.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === false || value == null) continue;
    if (typeof value === 'function') node.addEventListener(name.slice(2), value);
    else if (name === 'value') node.value = value;
    else node.setAttribute(name, value === true ? '' : String(value));
  }
  add(node, children);
  return node;
}

function add(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== false && child != null) {
      node.append(child instanceof Node ? child : String(child));
    }
  }
}

const byId = (id) => document.getElementById(id);

// --- Numbers and times in words -----------------------------------------------------

const whole = new Intl.NumberFormat('en');

export const format = {
  number: (value) => (value == null ? '–' : whole.format(Math.round(value))),

  // 0.42, 4.2, 5, 42, 1,234
  short(value) {
    if (value == null) return '–';
    if (value === 0) return '0';
    if (value < 10) return String(Number(value.toPrecision(2)));
    return whole.format(Math.round(value));
  },

  // Milliseconds: 42 ms, 1.2 s, 2 min
  ms(value) {
    if (value == null) return '–';
    if (value < 1_000) return `${Math.round(value)} ms`;
    return format.duration(value / 1_000);
  },

  // Seconds: 0.4 s, 12 s, 3 min, 2 h 5 min, 3 days
  duration(seconds) {
    if (seconds == null) return '–';
    if (seconds < 9.95) return `${Number(Math.max(seconds, 0).toFixed(1))} s`;
    if (seconds < 90) return `${Math.round(seconds)} s`;
    const minutes = Math.round(seconds / 60);
    if (minutes < 60) return `${minutes} min`;
    const hours = Math.floor(minutes / 60);
    if (hours < 10 && minutes % 60) return `${hours} h ${minutes % 60} min`;
    return hours < 48 ? `${hours} h` : `${Math.floor(hours / 24)} days`;
  },

  // Unix seconds, in the reader's own time
  time: (unix) => new Date(unix * 1_000).toLocaleTimeString([], { hour12: false }),

  plural: (count, one, many = `${one}s`) =>
    `${whole.format(count)} ${count === 1 ? one : many}`,
};

// --- Calls to the hub ---------------------------------------------------------------

export class ApiError extends Error {
  constructor(status, code, message, param = null) {
    super(message);
    this.name = 'ApiError';
    Object.assign(this, { status, code, param });
  }
}

let token = '';

// Fetch a path of the hub with the token.  The answer may be an error.
async function send(path, { headers, ...options } = {}) {
  const sent = new Headers(headers);
  if (token) sent.set('Authorization', `Bearer ${token}`);
  const url = new URL(path.replace(/^\//, ''), BASE);
  try {
    return await fetch(url, {
      ...options, headers: sent, credentials: 'omit', cache: 'no-store',
    });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, 'unreachable', 'The hub does not answer. Is it running?');
  }
}

// Call the API: the parsed JSON of the answer, or an ApiError is thrown.
// With `open`, it needs no token, so a 401 is not about the one that the page has.
async function api(path, { method = 'GET', body, signal, headers, open } = {}) {
  const sent = { method, signal, headers: { ...headers } };
  if (body !== undefined) {
    sent.body = JSON.stringify(body);
    sent.headers['Content-Type'] = 'application/json';
  }
  const answer = await send(path, sent);
  if (!answer.ok) throw await errorOf(answer, open);
  try {
    return answer.status === 204 ? null : await answer.json();
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(answer.status, 'not_json', 'The answer of the hub is not JSON.');
  }
}

async function errorOf(answer, open = false) {
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // The status has to be enough.
  }
  if (answer.status === 401 && app.session && !open) expire();
  const message = error.message || `The hub answered with the status ${answer.status}.`;
  return new ApiError(answer.status, error.code ?? '', message, error.param ?? null);
}

// --- Events as they happen ----------------------------------------------------------

// One stream of /admin/events for the whole page.  Each event is dispatched with its data
// as `detail`; `connection` has {state: 'connecting', 'open', 'lost' or 'closed'}.
class Live extends EventTarget {
  state = 'closed';
  heard = 0; // when the last event came, by performance.now()
  sampled = 0; // when the last figures came, by Date.now()
  #abort = null;
  #failures = 0;
  #timer = 0;
  #reason = '';

  get reason() {
    return this.#reason;
  }

  start() {
    if (this.#abort) return;
    this.#abort = new AbortController();
    this.#run(this.#abort);
  }

  stop() {
    this.#abort?.abort();
    this.#abort = null;
    clearTimeout(this.#timer);
    this.#enter('closed');
  }

  #enter(state, reason = '') {
    this.#reason = reason;
    if (this.state !== state || reason) {
      this.state = state;
      this.#emit('connection', { state, reason });
    }
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  async #run(abort) {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    abort.signal.addEventListener('abort', stop);
    if (this.state !== 'lost') this.#enter('connecting');
    let reason = 'The connection was lost.';
    const watch = setInterval(() => {
      if (performance.now() - this.heard > SILENCE) attempt.abort();
    }, 2_000);
    try {
      this.heard = performance.now();
      const answer = await send('/admin/events', { signal: attempt.signal });
      if (!answer.ok) throw await errorOf(answer);
      this.#failures = 0;
      this.#enter('open');
      await this.#read(answer.body.getReader());
    } catch (error) {
      if (error instanceof ApiError) reason = error.message;
      if (error.status === 403) abort.abort();
    } finally {
      clearInterval(watch);
      abort.signal.removeEventListener('abort', stop);
      attempt.abort();
    }
    if (abort.signal.aborted) {
      if (this.#abort === abort) this.#enter('closed', reason);
      return;
    }
    this.#enter('lost', reason);
    const wait = WAITS[Math.min(this.#failures++, WAITS.length - 1)];
    this.#timer = setTimeout(() => this.#run(abort), wait * (0.75 + Math.random() / 2));
  }

  async #read(reader) {
    const decoder = new TextDecoder();
    let text = '';
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.heard = performance.now();
      text += decoder.decode(value, { stream: true });
      const events = text.split('\n\n');
      text = events.pop();
      for (const each of events) this.#dispatch(each);
    }
  }

  #dispatch(text) {
    let name = 'message';
    let data = '';
    for (const line of text.split('\n')) {
      if (line.startsWith('event: ')) name = line.slice(7);
      else if (line.startsWith('data: ')) data += line.slice(6);
    }
    if (!data) return;
    let detail;
    try {
      detail = JSON.parse(data);
    } catch {
      return;
    }
    if (name === 'sample') this.sampled = Date.now();
    this.#emit(name, detail);
  }
}

// --- The application, as views see it -----------------------------------------------

export const app = {
  session: null, // {subject, scopes, models, expires, auth, version, started}
  live: new Live(),
  el,
  format,
  api,
  fetch: send,
  ask,
  announce,
  mention,
  command,
  ApiError,
  can(scope) {
    const scopes = app.session?.scopes ?? [];
    return scopes.includes(scope) || (scope === 'monitor' && scopes.includes('admin'));
  },
};

// Show a short message, which screen readers read out; `kind` may be 'bad'.
function announce(text, kind = '') {
  const close = el('button', {
    type: 'button', class: 'quiet', 'aria-label': 'Close this message',
  }, '×');
  const toast = el('div', { class: `toast ${kind}` }, el('p', {}, text), close);
  const timer = setTimeout(() => toast.remove(), kind === 'bad' ? 15_000 : 6_000);
  close.addEventListener('click', () => {
    clearTimeout(timer);
    toast.remove();
  });
  const toasts = byId('toasts');
  toasts.append(toast);
  while (toasts.children.length > 4) toasts.firstChild.remove();
  // Above a dialog that is open.
  toasts.hidePopover?.();
  toasts.showPopover?.();
}

// Have a screen reader read something that is seen already.
function mention(text) {
  byId('news').textContent = text;
}

// Ask whether to do something; `button` names it.  Resolves to true or false.
function ask(text, button, { detail = '', danger = false } = {}) {
  return new Promise((resolve) => {
    const dialog = el('dialog', { class: 'ask', 'aria-labelledby': 'ask-text' },
      el('form', { method: 'dialog' },
        el('h2', { id: 'ask-text' }, text),
        detail && el('p', { class: 'muted' }, detail),
        el('div', { class: 'row end' },
          el('button', { value: '', autofocus: danger }, 'Cancel'),
          el('button', {
            value: 'yes', class: danger ? 'danger' : 'main', autofocus: !danger,
          }, button))));
    dialog.addEventListener('close', () => {
      dialog.remove();
      resolve(dialog.returnValue === 'yes');
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

// --- Signing in ---------------------------------------------------------------------

const COMMAND = 'gollama-proxy token --sub me --scope admin';

function showSignIn(problem = '') {
  unmount();
  app.live.stop();
  app.session = null;
  document.title = 'Sign in · gollama_proxy';
  byId('views').hidden = byId('account').hidden = byId('connection').hidden = true;
  const input = el('input', {
    id: 'token', type: 'password', autocomplete: 'off', spellcheck: 'false',
    autocapitalize: 'off', required: true, 'aria-describedby': 'token-problem',
  });
  const keep = el('input', { type: 'checkbox', id: 'keep' });
  const button = el('button', { class: 'main' }, 'Sign in');
  const trouble = el('p', { id: 'token-problem', class: 'problem', role: 'alert' }, problem);
  const submit = async (event) => {
    event.preventDefault();
    const given = input.value.trim().replace(/^Bearer\s+/i, '');
    trouble.textContent = '';
    if (!given) {
      trouble.textContent = 'Paste a token first.';
      return input.focus();
    }
    button.disabled = true;
    try {
      await enter(given, keep.checked);
    } catch (error) {
      trouble.textContent = refusal(error, given);
      input.setAttribute('aria-invalid', 'true');
      input.focus();
      input.select();
    } finally {
      button.disabled = false;
    }
  };
  const form = el('form', { class: 'sign-in card', onsubmit: submit },
    el('h1', {}, 'Sign in to this hub'),
    el('label', { for: 'token' }, 'Token'),
    input,
    trouble,
    el('label', { class: 'check' }, keep, 'Keep me signed in for this tab'),
    el('p', { class: 'hint' },
      'Otherwise the token stays in memory, and reloading the page signs you out.'),
    button,
    el('h2', {}, 'No token yet?'),
    el('p', {}, 'Make one on the hub’s machine, with its settings:'),
    command(COMMAND),
    el('dl', { class: 'scopes' },
      el('dt', {}, '--scope admin'), el('dd', {}, 'sees and changes everything'),
      el('dt', {}, '--scope monitor'), el('dd', {}, 'sees everything, changes nothing'),
      el('dt', {}, 'no scope'), el('dd', {}, 'the playground, and your own usage')),
    el('p', {}, 'Or print a link that signs in once, within five minutes:'),
    command('gollama-proxy dashboard'));
  byId('main').replaceChildren(form);
  input.focus();
}

// A command to copy.
function command(text) {
  const copy = el('button', {
    type: 'button', class: 'quiet', 'aria-label': `Copy: ${text}`,
    async onclick() {
      try {
        await navigator.clipboard.writeText(text);
        announce('Copied.');
      } catch {
        announce('The browser does not allow copying here.', 'bad');
      }
    },
  }, 'Copy');
  return el('div', { class: 'command' }, el('code', {}, text), copy);
}

// Explain why a token was refused.
function refusal(error, given) {
  if (error.status !== 401) return error.message;
  if (given.split('.').length !== 3) {
    return 'This is not a token: a token has three parts, separated by dots.';
  }
  const expires = claim(given, 'exp');
  if (expires && expires * 1_000 < Date.now()) {
    const ago = format.duration(Date.now() / 1_000 - expires);
    return `This token expired ${ago} ago. Make a new one.`;
  }
  return 'The hub does not accept this token. It is from another hub, was revoked, '
    + 'or is incomplete.';
}

function claim(given, name) {
  try {
    const part = given.split('.')[1].replaceAll('-', '+').replaceAll('_', '/');
    const value = JSON.parse(atob(part))[name];
    return typeof value === 'number' ? value : null;
  } catch {
    return null;
  }
}

// Sign in with a token ('' without authentication), and show the page.
async function enter(given, keep) {
  unmount(); // what another subject has seen
  app.live.stop();
  token = given;
  try {
    app.session = null;
    app.session = await api('/dashboard/session');
  } catch (error) {
    token = '';
    throw error;
  }
  remember(keep);
  byId('views').hidden = byId('account').hidden = false;
  showAccount();
  document.querySelector('.brand').title = `Version ${app.session.version}`;
  watchExpiry();
  if (app.can('monitor') && !document.hidden) app.live.start();
  route();
}

function remember(keep) {
  try {
    if (keep && token) sessionStorage.setItem(KEPT, token);
    else sessionStorage.removeItem(KEPT);
  } catch {
    // The browser keeps nothing; the token stays in memory.
  }
}

function kept() {
  try {
    return sessionStorage.getItem(KEPT) ?? '';
  } catch {
    return '';
  }
}

let expiry = 0;

function watchExpiry() {
  clearTimeout(expiry);
  const left = (app.session.expires ?? Infinity) * 1_000 - Date.now();
  if (left < 2 ** 31) expiry = setTimeout(expire, Math.max(left, 0));
}

function expire() {
  const over = (app.session?.expires ?? Infinity) * 1_000 <= Date.now();
  signOut(over
    ? 'Your token has expired. Sign in with a new one.'
    : 'The hub no longer accepts your token: it was revoked, or the hub has other keys.');
}

function signOut(why = '') {
  token = '';
  clearTimeout(expiry);
  remember(false);
  showSignIn(why);
}

async function start() {
  byId('skip').addEventListener('click', (event) => {
    event.preventDefault();
    byId('main').focus();
  });
  byId('theme').addEventListener('click', turnTheme);
  showTheme();
  const match = location.hash.match(/^#sign-in=(.*)$/s);
  if (match) history.replaceState(null, '', '#/'); // before anything else can see it
  window.addEventListener('hashchange', onHash);
  document.addEventListener('visibilitychange', onVisibility);
  app.live.addEventListener('connection', showConnection);
  app.live.addEventListener('sample', showConnection);
  app.live.addEventListener('connection', ({ detail }) =>
    detail.state === 'open' && checkVersion());
  setInterval(showConnection, 1_000);
  await (match ? enterByLink(match[1]) : enterAsBefore());
}

// The tab may be signed in already: a link that is of no use changes nothing then, and
// another one replaces the subject, which is announced.
async function enterByLink(code) {
  let answer;
  try {
    answer = await api('/dashboard/sign-in', {
      method: 'POST', body: { code }, open: true,
    });
  } catch (error) {
    const problem = [400, 401, 413].includes(error.status)
      ? 'This link was used before, is older than five minutes, or is incomplete. Make a '
        + 'new one with gollama-proxy dashboard.'
      : error.message;
    if (!app.session && !kept()) return showSignIn(problem);
    if (app.session) route();
    else await enterAsBefore();
    return announce(problem, 'bad');
  }
  try {
    // Its user has no token to paste after a reload, so the tab keeps it.
    await enter(answer.token, true);
    announce(`You are signed in as ${app.session.subject}.`);
  } catch (error) {
    showSignIn(error.message);
  }
  return undefined;
}

async function enterAsBefore() {
  const given = kept();
  try {
    if (!given) {
      const hub = await api('/', { headers: { Accept: 'application/json' } });
      if (hub.auth !== 'off') return showSignIn();
    }
    await enter(given, Boolean(given));
  } catch (error) {
    if (error.status === 401) {
      remember(false);
      showSignIn(given && refusal(error, given));
    } else if (error.status === 403) {
      showSignIn(error.message);
    } else {
      showUnreachable(error);
    }
  }
  return undefined;
}

function showUnreachable(error) {
  byId('main').replaceChildren(el('div', { class: 'empty' },
    el('h1', {}, 'The hub does not answer'),
    el('p', {}, error.message),
    el('button', { class: 'main', onclick: enterAsBefore }, 'Try again')));
}

// --- The bar at the top -------------------------------------------------------------

function showAccount() {
  const { subject, scopes, auth, expires } = app.session;
  if (auth === 'off') {
    byId('account').replaceChildren(el('span', {
      class: 'muted', title: 'The hub runs with --auth off.',
    }, 'no sign-in needed'));
    return;
  }
  const rights = app.can('admin') ? 'admin' : app.can('monitor') ? 'read only' : 'user';
  const until = expires ? `until ${new Date(expires * 1_000).toLocaleString()}` : '';
  byId('account').replaceChildren(
    el('span', { class: 'caller', title: `Scopes: ${scopes.join(', ') || 'none'} ${until}` },
      subject, el('small', {}, rights)),
    el('button', {
      type: 'button', class: 'quiet', onclick: () => signOut('You have signed out.'),
    }, 'Sign out'));
}

// Whether the figures are live; if not, how old they are.
function showConnection() {
  const box = byId('connection');
  const { state, sampled, reason } = app.live;
  box.hidden = !app.session || !app.can('monitor');
  if (box.hidden) return;
  const age = sampled ? (Date.now() - sampled) / 1_000 : 0;
  const old = sampled && age >= 3 ? `, figures ${format.duration(age)} old` : '';
  let text = 'Connecting…';
  let kind = 'waiting';
  if (state === 'open') {
    kind = old ? 'lost' : 'open';
    text = old ? `No news${old}` : 'Live';
  } else if (state === 'lost') {
    kind = 'lost';
    text = `Reconnecting…${old}`;
  } else if (state === 'closed') {
    text = document.hidden ? 'Paused' : 'Not connected';
  }
  const shown = `${kind} ${text}`;
  if (box.dataset.shown !== shown) {
    const was = box.className;
    if (kind === 'open' && was.includes('lost')) mention('The hub is connected again.');
    box.dataset.shown = shown;
    box.className = `link-state ${kind}`;
    box.textContent = text;
    box.title = reason;
    document.body.classList.toggle('stale', kind === 'lost');
    if (kind === 'lost' && !was.includes('lost')) {
      mention('The connection to the hub was lost. It is being made again.');
    }
  }
}

function onVisibility() {
  clearTimeout(onVisibility.timer);
  if (!app.session || !app.can('monitor')) return;
  if (document.hidden) {
    onVisibility.timer = setTimeout(() => app.live.stop(), HIDDEN);
  } else {
    app.live.start();
  }
}

// A hub that was updated has another page.
async function checkVersion() {
  const { version } = app.session;
  const now = await api('/dashboard/session').catch(() => null);
  if (now && now.version !== version && app.session) {
    app.session.version = now.version;
    announce(`The hub is version ${now.version} now. Reload this page.`);
  }
}

const THEMES = { auto: 'light', light: 'dark', dark: 'auto' };
const GLYPHS = { auto: '◐', light: '☀', dark: '☾' };

function theme() {
  try {
    const value = localStorage.getItem(THEME);
    return value in THEMES ? value : 'auto';
  } catch {
    return document.documentElement.dataset.theme ?? 'auto';
  }
}

function turnTheme() {
  const next = THEMES[theme()];
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem(THEME, next);
  } catch {
    // It lasts until the page is reloaded.
  }
  showTheme();
  announce(`Colours: ${next === 'auto' ? 'as the system' : next}.`);
}

function showTheme() {
  const now = theme();
  const button = byId('theme');
  document.documentElement.dataset.theme = now;
  button.textContent = GLYPHS[now];
  button.title = `Colours: ${now === 'auto' ? 'as the system' : now}`;
  button.setAttribute('aria-label', `${button.title}. Change`);
}

// --- Navigation ---------------------------------------------------------------------

let leave = null; // unmounts the view that is shown
let shown = null; // its address
let current = null; // its entry of VIEWS

function unmount() {
  const left = leave;
  leave = null;
  shown = null;
  try {
    left?.();
  } catch (error) {
    console.error(error);
  }
}

function onHash() {
  const match = location.hash.match(/^#sign-in=(.*)$/s);
  if (match) { // a link that was opened in this tab
    history.replaceState(null, '', '#/');
    enterByLink(match[1]);
  } else if (app.session) {
    route();
  }
}

function allowed(view) {
  return !view.scope || app.can(view.scope);
}

async function route() {
  const [name] = location.hash.replace(/^#\/?/, '').split(/[/?]/);
  let view = VIEWS.find((each) => each.path === (name === 'workers' ? '' : name));
  if (!view || (view.path === '' && !allowed(view))) view = VIEWS.find(allowed);
  showViews(view);
  if (shown === location.hash) return;
  if (view === current && leave?.follow?.()) {
    shown = location.hash;
    return;
  }
  unmount();
  current = view;
  const at = (shown = location.hash);
  document.title = `${view.name} · gollama_proxy`;
  const main = byId('main');
  const root = el('div', { class: `view ${view.path || 'overview'}` });
  if (!allowed(view)) {
    main.replaceChildren(el('div', { class: 'empty' },
      el('h1', {}, 'Your token does not show this'),
      el('p', {}, `It needs the scope ${view.scope} or admin. Make such a token with:`),
      command(`gollama-proxy token --sub me --scope ${view.scope}`)));
    return;
  }
  try {
    const module = await import(view.file);
    if (shown !== at) return; // the user went on meanwhile
    main.replaceChildren(root);
    leave = module.mount(root, app);
  } catch (error) {
    console.error(error);
    if (shown === at) {
      main.replaceChildren(el('div', { class: 'empty' },
        el('h1', {}, 'This view does not load'),
        el('p', {}, 'The hub may have restarted with another version.'),
        el('button', { class: 'main', onclick: () => location.reload() }, 'Reload')));
    }
  }
}

function showViews(active) {
  byId('views').replaceChildren(...VIEWS.filter(allowed).map((view) =>
    el('a', {
      href: `#/${view.path}`, 'aria-current': view === active ? 'page' : null,
    }, view.name)));
}

start();
