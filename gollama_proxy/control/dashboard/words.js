// The texts of the overview: about one worker, and about all of them.
//
// A worker is as `GET /admin/workers` shows it, with `at`: when that was, by `now()`.

import { format } from './app.js';

// Seconds since the page was opened.
export const now = () => performance.now() / 1_000;

export const MINUTES = 15; // that charts show

export const STATES = {
  ready: ['✓', 'Ready', 'good'],
  starting: ['…', 'Starting', 'warn'],
  loading: ['…', 'Loading', 'warn'],
  down: ['✕', 'Down', 'bad'],
  asleep: ['☾', 'Asleep', ''],
  waking: ['…', 'Waking', 'warn'],
};

export const LEVELS = { bad: 0, warn: 1, '': 2 }; // in the order of their urgency
export const MARKS = { bad: '✕', warn: '▲', good: '✓', '': '○' };

export const HOT = 90; // °C
export const KINDS = {
  all: 'All', trouble: 'In trouble', busy: 'Busy', idle: 'Idle', held: 'Held',
};
export const SOURCES = { admin: 'added by an operator', agent: 'registered by its agent' };
export const STEPS = {
  reading: 'request arrives', queued: 'waits', connecting: 'connecting',
  waiting: 'reads the prompt', streaming: 'answers', broken: 'broken off',
  resuming: 'continues elsewhere', ended: 'ended',
};

// Whether a model has a breaker that is not closed, besides that of its worker.
export function ofItself({ breaker }, worker) {
  return breaker.state !== 'closed' && (breaker.state !== worker.breaker.state
    || breaker.reason !== worker.breaker.reason);
}

export const isFailing = (state, breaker) => (state === 'down' || breaker === 'open' ? 1 : 0);

export const isHeld = ({ hold }) => hold === 'paused' || hold === 'draining';

// The symbol, the word and the kind of its state, and the seconds since it began, if they
// are known; a hold and a breaker come before "ready".
export function shownState(worker) {
  const { state, hold, breaker } = worker;
  if (state === 'ready') {
    if (hold === 'paused') return ['‖', 'Paused', '', null];
    if (hold === 'draining') return ['↓', 'Draining', 'warn', null];
    if (breaker.state === 'open') return ['✕', 'Failing', 'bad', breaker.since];
    if (breaker.state === 'half-open') return ['◐', 'On trial', 'warn', breaker.since];
  }
  return [...(STATES[state] ?? ['?', state, 'warn']), worker.since];
}

// What is wrong with a worker: {level: 'bad', 'warn' or '', text, brief}.
export function troubleOf(worker) {
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
export function whyOf(worker) {
  const passed = now() - worker.at;
  const { state, hold, breaker, models } = worker;
  const lines = [];
  if (hold === 'paused') lines.push('Paused by an operator: it gets no new request.');
  if (hold === 'draining') {
    lines.push('Draining: no new request; running ones have a time limit.');
  }
  if (state !== 'ready' && worker.reason) lines.push(sentence(worker.reason));
  if (breaker.state !== 'closed') lines.push(`Breaker ${breakerWords(breaker, passed)}`);
  for (const each of models) {
    if (ofItself(each, worker)) {
      lines.push(`${each.name}: breaker ${breakerWords(each.breaker, passed)}`);
    }
  }
  if (worker.agent?.serving === false) lines.push('The server does not answer its agent.');
  for (const each of worker.hubs ?? []) {
    const other = differs(each, worker);
    if (other) lines.push(`${each.hub} sees it differently: ${other}.`);
  }
  return lines.slice(0, 6);
}

// How another hub sees a worker, if not as this one does.
function differs({ state, hold, breaker }, worker) {
  const parts = [state !== worker.state && state, hold !== worker.hold && `hold ${hold}`,
    breaker !== worker.breaker.state && `breaker ${breaker}`];
  return parts.filter(Boolean).join(', ');
}

function breakerWords({ state, reason, since, opens_in: left }, passed) {
  const lasting = since == null ? '' : ` for ${duration(since + passed)}`;
  const next = state === 'open' && left > passed
    ? ` Tried again in ${duration(Math.ceil(left - passed))}.` : '';
  return `${state}${lasting}: ${reason}.${next}`;
}

export function sentence(text, end = '.') {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? '' : end}`;
}

export function isOf(kind, worker) {
  if (kind === 'trouble') return Boolean(troubleOf(worker).level);
  if (kind === 'busy') return worker.running > 0;
  if (kind === 'idle') return !worker.running && worker.state === 'ready' && !isHeld(worker)
    && !troubleOf(worker).level;
  if (kind === 'held') return isHeld(worker);
  return true;
}

// One sentence about the whole hub, and a line for each trouble that is not in it:
// {level, text, list: [{level, name, text}]}.
export function verdictOf(workers, { waiting = 0 }, queue, cluster = {}) {
  const all = [...workers.values()];
  if (!all.length) return { level: '', text: 'This hub has no workers yet', list: [] };
  const troubles = all.map((worker) => ({ name: worker.name, ...troubleOf(worker) }))
    .filter(({ level }) => level)
    .sort((a, b) => LEVELS[a.level] - LEVELS[b.level]);
  const bad = troubles.filter(({ level }) => level === 'bad');
  const list = bad.length === 1 || troubles.length === 1 ? troubles.slice(1) : troubles;
  const verdict = { ...sentenceOf(all, troubles, bad), list: [...list] };
  const gone = storeTrouble(cluster);
  if (gone) {
    verdict.list.unshift(gone);
    if (verdict.level === 'good') verdict.level = 'warn';
  }
  const wait = waitOf(waiting, queue);
  if (wait) {
    verdict.list.push({ level: 'warn', text: wait.text });
    if (verdict.level === 'good' && wait.longest > LONG) verdict.level = 'warn';
  }
  return verdict;
}

const LONG = 10; // seconds in the queue that are worth a mark

function sentenceOf(all, troubles, bad) {
  const size = all.length.toLocaleString('en');
  const [first] = troubles;
  const held = all.filter(isHeld).length;
  const asleep = all.filter(({ state }) => state === 'asleep').length;
  const usable = all.filter((worker) => worker.state === 'ready' && !isHeld(worker)
    && worker.breaker.state !== 'open').length;
  const level = bad.length ? 'bad' : troubles.length ? 'warn' : 'good';
  if (all.length === 1 && troubles.length) {
    return { level, text: `The worker ${first.name} ${first.text}` };
  }
  if (bad.length === 1) {
    const text = first.text.replace(/^(is down|gets no requests): /, `$1: ${first.name}, `);
    return { level, text: `1 of ${size} workers ${text}` };
  }
  if (bad.length) {
    const down = bad.filter(({ kind }) => kind === 'down').length;
    const what = down === bad.length ? 'are down' : down ? 'are down or fail' : 'fail';
    const which = bad.length < all.length ? `${bad.length} of ${size}`
      : all.length === 2 ? 'Both' : `All ${size}`;
    return { level, text: `${which} workers ${what}` };
  }
  if (!usable && held) {
    const text = `No worker takes requests: ${held} of ${size} paused or drained`;
    return { level: 'bad', text };
  }
  const ready = `${usable.toLocaleString('en')} of ${size} workers ${
    usable === 1 ? 'is' : 'are'} ready`;
  if (troubles.length === 1) return { level, text: `${ready}; ${first.name} ${first.text}` };
  if (troubles.length) return { level, text: usable ? ready : 'No worker is ready yet' };
  if (usable < all.length) {
    const rest = [held && `${held} paused or drained`, asleep && `${asleep} asleep`];
    return { level, text: `${ready}; ${rest.filter(Boolean).join(', ')}` };
  }
  if (all.length === 1) return { level, text: `The worker ${all[0].name} is ready` };
  return { level, text: `${all.length === 2 ? 'Both' : `All ${size}`} workers are ready` };
}

// The hubs that share a store, a line for each: {level, name, text}; none for one hub alone.
export function hubsOf({ store, hubs, missing }) {
  if (!store) return [];
  const lines = hubs.map(({ hub, running, waiting, draining }) => {
    const parts = [`${running} running`, waiting && `${waiting} waiting`,
      draining && 'shutting down'];
    return { level: '', name: hub, text: parts.filter(Boolean).join(', ') };
  });
  const silent = missing.map((name) => ({ level: 'warn', name, text: '▲ does not answer' }));
  const mode = store.mode === 'up' ? { level: 'good', name: 'Store', text: '✓ connected' }
    : { level: 'warn', name: 'Store', text: '▲ not connected' };
  return [...lines, ...silent, mode];
}

// What it means that the store is gone; null while it is there.
export function storeTrouble({ store }) {
  if (!store || store.mode === 'up') return null;
  const why = store.reason ? `: ${store.reason}` : '';
  return { level: 'warn', text: `The store cannot be reached${why}. Each hub goes on with its `
    + 'part of the slots and its own quotas, and this page shows one hub only.' };
}

// How many requests wait, and for how long; null if none does.
function waitOf(waiting, queue) {
  const count = Math.max(waiting, queue.length);
  if (!count) return null;
  const longest = Math.max(0, ...queue.map((each) =>
    (each.waited ?? 0) + (each.at ? now() - each.at : 0)));
  const expected = queue.map((each) => each.expected).filter((each) => each != null);
  const parts = [count === 1 ? '1 request waits' : `${count} requests wait`];
  if (longest >= 1) parts.push(`, the longest for ${duration(longest)}`);
  if (expected.length) {
    parts.push(`; the last gets its slot in about ${soon(Math.max(...expected))}`);
  }
  return { longest, text: parts.join('') };
}

// The queue by subject and class, in a line.
export function sumsOf(queue) {
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

// Two times: "188 · 502 ms", or with a unit each.
export function both(low, high, { ms }) {
  return high < 1_000 ? `${Math.round(low)} · ${ms(high)}` : `${ms(low)} · ${ms(high)}`;
}

// Tokens: 8k, 128k, 1,000
export function thousands(tokens) {
  return tokens % 1_024 ? tokens.toLocaleString('en') : `${tokens / 1_024}k`;
}

export const short = (value) => String(Math.round(value * 10) / 10);

// A wait that is expected.
export function soon(seconds) {
  if (seconds == null) return 'unknown';
  return seconds < 1 ? '1 s' : duration(seconds);
}

// As elsewhere on the page, but in whole seconds, as these texts change each second.
export function duration(seconds) {
  if (seconds < 9.95) return `${Math.round(Math.max(seconds, 0))} s`;
  return format.duration(seconds);
}
