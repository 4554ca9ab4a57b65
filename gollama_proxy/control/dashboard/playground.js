// The playground: a chat with one model, or with two of them side by side.
//
// A conversation is in this module's memory alone. It survives a look at another view,
// and ends with the page, or when its user signs out. Nothing here stores anything.

import { Markdown, copyText } from './markdown.js';

const LONGEST_SIDE = 1536; // pixels of a picture; models see no more than about that
const SMALL_PICTURE = 1 << 20; // bytes that are sent as they are
const MOST_PICTURES = 8;
const MODELS_KEPT = 5_000; // ms
const STARTERS = [
  'Explain how the tides come about.',
  'Write a haiku about an old laptop.',
  'What can I cook with rice and eggs?',
];

let chat = null; // the conversation that was shown last

export function mount(root, app) {
  if (chat?.session !== app.session) {
    chat?.stop();
    chat = new Chat(app);
  }
  const shown = chat;
  root.append(shown.element);
  shown.enter();
  const onKey = (event) => {
    if (event.key === 'Escape' && !document.querySelector('dialog[open]')) shown.stop();
  };
  document.addEventListener('keydown', onKey);
  return () => {
    document.removeEventListener('keydown', onKey);
    shown.element.remove();
    if (!app.session) { // signed out
      shown.stop();
      if (chat === shown) chat = null;
    }
  };
}

// --- The conversation ---------------------------------------------------------------

class Chat {
  constructor(app) {
    Object.assign(this, { app, session: app.session });
    this.models = [];
    this.turns = []; // {question, pictures, answers, element}, oldest first
    this.pictures = []; // those of the next message
    this.preparing = 0; // choices of pictures that are being read
    this.attached = Promise.resolve();
    this.running = null; // aborts the answers that are being generated
    this.loaded = -Infinity; // when the models were, by performance.now()
    this.loading = false;
    this.entered = false; // a message, before the models were there
    this.#build();
  }

  #build() {
    const { el } = this.app;
    const onModel = () => this.#showReady();
    this.first = el('select', { id: 'chat-model', onchange: onModel });
    this.second = el('select', { id: 'chat-second', onchange: onModel });
    for (const select of [this.first, this.second]) {
      select.addEventListener('focus', () => this.#load());
    }
    this.system = el('textarea', { id: 'chat-system', rows: 3 });
    this.temperature = el('input', {
      id: 'chat-temperature', type: 'number', min: 0, max: 2, step: 'any',
      placeholder: 'as the model has it',
    });
    this.most = el('input', {
      id: 'chat-most', type: 'number', min: 1, step: 1, placeholder: 'no limit',
    });
    const fresh = el('button', { type: 'button', onclick: () => this.#restart() }, 'New chat');
    this.options = el('details', { class: 'options' },
      el('summary', {}, 'Settings'),
      el('div', { class: 'settings' },
        el('div', { class: 'field wide' },
          el('label', { for: 'chat-system' }, 'System prompt'), this.system),
        el('div', { class: 'field' },
          el('label', { for: 'chat-temperature' }, 'Temperature'), this.temperature),
        el('div', { class: 'field' },
          el('label', { for: 'chat-most' }, 'Most tokens of an answer'), this.most)));
    const bar = el('div', { class: 'chat-bar' },
      el('div', { class: 'field' },
        el('label', { for: 'chat-model' }, 'Model'), this.first),
      el('div', { class: 'field' },
        el('label', { for: 'chat-second' }, 'Compare with'), this.second),
      fresh, this.options);
    this.trouble = el('div', {});
    this.welcome = el('section', { class: 'welcome' },
      el('h2', {}, 'What is on your mind?'),
      el('p', { class: 'muted' }, 'Your own machines answer.'),
      el('ul', { class: 'row' }, STARTERS.map((text) => el('li', {}, el('button', {
        type: 'button', onclick: () => this.#suggest(text),
      }, text)))));
    this.log = el('div', { class: 'log', role: 'region', 'aria-label': 'Conversation' });
    this.element = el('div', { class: 'chat' },
      el('h1', { class: 'unseen' }, 'Playground'),
      bar, this.trouble, this.welcome, this.log, this.#composer());
    this.#showModels();
  }

  #composer() {
    const { el } = this.app;
    this.words = el('textarea', {
      id: 'chat-words', rows: 1, placeholder: 'Write a message', autocomplete: 'off',
      oninput: () => {
        this.entered = false;
        this.#showReady();
      },
      onkeydown: (event) => {
        // While an input method composes a word, Enter belongs to it.
        if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        this.#submit();
      },
      onpaste: (event) => {
        const files = picturesIn(event.clipboardData);
        if (files.length && this.#takesPictures()) {
          event.preventDefault();
          this.#attach(files);
        }
      },
    });
    this.file = el('input', {
      type: 'file', accept: 'image/*', multiple: true, hidden: true,
      onchange: () => {
        this.#attach([...this.file.files]);
        this.file.value = ''; // the same file may be chosen again
      },
    });
    this.attach = el('button', {
      type: 'button', class: 'quiet', onclick: () => this.file.click(),
    }, 'Add a picture');
    this.send = el('button', { class: 'main' }, 'Send');
    this.halt = el('button', { type: 'button', onclick: () => this.stop() }, 'Stop');
    this.thumbs = el('ul', {
      class: 'thumbs', 'aria-label': 'Pictures of this message', hidden: true,
    });
    return el('div', { class: 'composer' },
      el('form', {
        class: 'write',
        onsubmit: (event) => {
          event.preventDefault();
          this.#submit();
        },
        ondragover: (event) => event.preventDefault(),
        ondrop: (event) => {
          event.preventDefault();
          const files = picturesIn(event.dataTransfer);
          if (files.length && this.#takesPictures()) this.#attach(files);
        },
      },
      this.thumbs,
      el('label', { class: 'unseen', for: 'chat-words' }, 'Your message'),
      this.words, this.file,
      el('div', { class: 'row' }, this.attach, this.send, this.halt)),
      el('p', { class: 'hint' },
        'Enter sends, Shift+Enter begins a new line, Esc stops. ',
        'Nothing is stored: a reload ends the conversation.'));
  }

  // Show the conversation, after another view has been shown.
  enter() {
    this.#load();
    this.#showReady();
    this.words.focus({ preventScroll: true });
    if (this.turns.length) scrollDown();
  }

  stop() {
    this.running?.abort();
  }

  // --- Models -----------------------------------------------------------------------

  async #load() {
    if (performance.now() - this.loaded < MODELS_KEPT) return;
    this.loaded = performance.now();
    this.loading = true;
    let trouble = null;
    try {
      const listing = await this.app.api('/v1/models');
      this.models = (listing?.data ?? []).map(modelOf);
      if (!this.models.length) trouble = this.#noModel();
    } catch (error) {
      this.loaded = -Infinity;
      trouble = { message: 'The models could not be listed.', hints: [error.message] };
    }
    const again = () => {
      this.loaded = -Infinity;
      this.#load();
    };
    this.trouble.replaceChildren(...(trouble ? [notice(this.app, trouble, again)] : []));
    this.loading = false;
    this.#showModels();
    this.#showReady();
    if (this.entered) this.#submit();
  }

  #noModel() {
    const patterns = this.session.models;
    const hints = [patterns?.length
      ? `Your token allows these models: ${patterns.join(', ')}.`
      : 'A worker has to be connected, and to have loaded a model.'];
    return { message: 'No worker serves a model that you may use just now.', hints };
  }

  #showModels() {
    const { el } = this.app;
    const option = ({ id, state }) => el('option', { value: id },
      state === 'ready' ? id : `${id} (${state})`);
    const shown = JSON.stringify(this.models);
    if (this.shownModels === shown) return; // an open list of options stays open
    this.shownModels = shown;
    const [first, second] = [this.first.value, this.second.value];
    const none = el('option', { value: '' }, 'No model');
    this.first.replaceChildren(...(this.models.length ? this.models.map(option) : [none]));
    this.second.replaceChildren(
      el('option', { value: '' }, 'no second model'), ...this.models.map(option));
    const known = (id) => this.models.some((model) => model.id === id);
    const ready = this.models.find((model) => model.state === 'ready') ?? this.models[0];
    this.first.value = known(first) ? first : ready?.id ?? '';
    this.second.value = known(second) ? second : '';
    this.first.disabled = this.second.disabled = !this.models.length;
  }

  get chosen() {
    return [this.first.value, this.second.value].filter(Boolean);
  }

  #model(id) {
    return this.models.find((model) => model.id === id);
  }

  #takesPictures() {
    return this.chosen.length > 0 && this.chosen.every((id) => this.#model(id)?.pictures);
  }

  // --- The next message -------------------------------------------------------------

  #suggest(text) {
    this.words.value = text;
    this.#showReady();
    this.words.focus();
  }

  #showReady() {
    const { words } = this;
    const busy = this.running !== null;
    const pictures = this.#takesPictures();
    const given = words.value.trim() || this.pictures.length;
    this.send.disabled = !given || !this.chosen.length || this.preparing > 0 ||
      (this.pictures.length > 0 && !pictures);
    this.send.title = this.pictures.length && !pictures
      ? 'This model takes no pictures. Remove them, or choose another model.' : '';
    this.attach.hidden = !pictures;
    this.send.hidden = busy;
    this.halt.hidden = !busy;
    this.welcome.hidden = this.turns.length > 0;
    words.style.height = 'auto';
    words.style.height = `${words.scrollHeight + 2}px`;
  }

  // Add pictures, one after the other: each takes a moment to be read.
  #attach(files) {
    this.preparing += 1;
    this.attached = this.attached.then(async () => {
      await this.#addPictures(files);
      this.preparing -= 1;
      this.#showThumbs();
    });
    this.#showReady();
  }

  async #addPictures(files) {
    for (const file of files) {
      if (this.pictures.length >= MOST_PICTURES) {
        this.app.announce(`A message takes up to ${MOST_PICTURES} pictures.`, 'bad');
        break;
      }
      try {
        this.pictures.push({ url: await pictureOf(file), name: file.name || 'picture' });
      } catch {
        this.app.announce(`${file.name || 'This file'} is not a picture that this `
          + 'browser can read.', 'bad');
      }
    }
  }

  #showThumbs() {
    const { el } = this.app;
    this.thumbs.hidden = !this.pictures.length;
    this.thumbs.replaceChildren(...this.pictures.map((picture, at) => el('li', {},
      el('img', { src: picture.url, alt: picture.name }),
      el('button', {
        type: 'button', 'aria-label': `Remove ${picture.name}`, title: 'Remove',
        onclick: () => {
          this.pictures.splice(at, 1);
          this.#showThumbs();
          this.words.focus();
        },
      }, '×'))));
    this.#showReady();
  }

  #submit() {
    this.entered = this.send.disabled && this.loading;
    if (this.running || this.send.disabled) return;
    const wrong = [this.temperature, this.most].find((input) => !input.checkValidity());
    if (wrong) {
      this.options.open = true;
      wrong.reportValidity();
      return;
    }
    const question = this.words.value.trim();
    const pictures = this.pictures;
    const turn = { question, pictures, answers: [] };
    const body = this.#bodyFor(this.first.value, 0, turn);
    const most = this.session.largest_body ?? Infinity;
    if (JSON.stringify(body).length > most) {
      const size = `${Math.floor(most / (1 << 20))} MiB`;
      this.app.announce(`This is more than the ${size} that the hub takes in one request. `
        + 'Remove a picture, or begin a new chat.', 'bad');
      return;
    }
    this.words.value = '';
    this.pictures = [];
    this.#showThumbs();
    this.#ask(turn);
  }

  // --- Turns ------------------------------------------------------------------------

  async #ask(turn) {
    const { el } = this.app;
    const models = this.chosen;
    const controller = this.running = new AbortController();
    turn.answers = models.map((model) => new Answer(this.app, model, models.length > 1));
    turn.actions = el('div', { class: 'row actions' });
    turn.element = el('section', { class: 'turn' },
      el('div', { class: 'question', role: 'group', 'aria-label': 'You' },
        turn.pictures.length > 0 && el('div', { class: 'thumbs' },
          turn.pictures.map(({ url, name }) => el('img', { src: url, alt: name }))),
        turn.question && el('p', {}, turn.question)),
      el('div', { class: models.length > 1 ? 'answers two-up' : 'answers' },
        turn.answers.map((answer) => answer.element)),
      turn.actions);
    const bodies = models.map((model, column) => this.#bodyFor(model, column, turn));
    this.turns.at(-1)?.actions.replaceChildren();
    this.turns.push(turn);
    this.log.append(turn.element);
    const focused = document.activeElement === this.send;
    this.#showReady();
    if (focused) this.halt.focus();
    scrollDown();
    await Promise.all(turn.answers.map((answer, column) => answer.run(
      bodies[column], controller.signal, this.models,
    )));
    if (this.running === controller) {
      const halting = document.activeElement === this.halt;
      this.running = null;
      this.#showReady();
      if (halting) this.words.focus();
    }
    if (this.turns.at(-1) === turn) following(() => this.#showActions(turn));
    if (!controller.signal.aborted) {
      const endings = turn.answers.map(({ model, failed }) => (
        failed ? `${model} did not answer.` : `The answer of ${model} is complete.`));
      this.app.mention(endings.join(' '));
    }
  }

  #showActions(turn) {
    const { app, app: { el } } = this;
    const button = (text, label, onclick) => el('button', {
      type: 'button', class: 'quiet', 'aria-label': label, onclick,
    }, text);
    const alone = turn.answers.length === 1;
    const copies = turn.answers.map((answer, n) => answer.text && button(
      alone ? 'Copy' : `Copy the ${n ? 'second' : 'first'}`,
      alone ? 'Copy the answer' : null,
      async () => {
        const done = await copyText(answer.text);
        app.announce(done ? 'Copied.' : 'The browser does not allow copying here.',
          done ? '' : 'bad');
      }));
    turn.actions.replaceChildren(...[
      button('Try again', null, () => this.#retry(turn)),
      button('Edit', 'Edit this message', () => this.#edit(turn)),
      ...copies,
    ].filter(Boolean));
  }

  #retry(turn) {
    if (this.running || !this.chosen.length) return;
    this.#remove(turn);
    this.words.focus({ preventScroll: true });
    this.#ask({ question: turn.question, pictures: turn.pictures, answers: [] });
  }

  #edit(turn) {
    if (this.running) return;
    this.#remove(turn);
    this.words.value = turn.question;
    this.pictures = turn.pictures;
    this.#showThumbs();
    this.words.focus();
  }

  #remove(turn) {
    this.turns.splice(this.turns.indexOf(turn), 1);
    turn.element.remove();
    const last = this.turns.at(-1);
    if (last) this.#showActions(last);
  }

  #restart() {
    this.stop();
    this.running = null;
    this.turns = [];
    this.log.replaceChildren();
    this.#showReady();
    this.words.focus();
  }

  // Return the request for a model, with the turns that it, or the other one, answered:
  // roles have to alternate.
  #bodyFor(model, column, turn) {
    const messages = [];
    const system = this.system.value.trim();
    if (system) messages.push({ role: 'system', content: system });
    const pictures = this.#model(model)?.pictures;
    for (const each of this.turns) {
      const answer = [each.answers[column], ...each.answers].find((one) => one?.text);
      if (!answer) continue;
      messages.push({ role: 'user', content: contentOf(each, pictures) });
      messages.push({ role: 'assistant', content: answer.text });
    }
    messages.push({ role: 'user', content: contentOf(turn, pictures) });
    const body = {
      model, messages, stream: true, stream_options: { include_usage: true },
    };
    if (this.temperature.value) body.temperature = Number(this.temperature.value);
    if (this.most.value) body.max_tokens = Number(this.most.value);
    return body;
  }
}

function contentOf({ question, pictures }, takesPictures) {
  if (!pictures.length || !takesPictures) return question;
  const images = pictures.map(({ url }) => ({ type: 'image_url', image_url: { url } }));
  return question ? [{ type: 'text', text: question }, ...images] : images;
}

function modelOf(entry) {
  return {
    id: String(entry.id),
    state: entry.gollama?.state ?? 'ready',
    pictures: entry.architecture?.input_modalities?.includes('image') ?? false,
  };
}

// --- Pictures -----------------------------------------------------------------------

const picturesIn = (data) =>
  [...(data?.files ?? [])].filter((file) => file.type.startsWith('image/'));

// Return a picture as a data URL, scaled down if it is large. llama-server reads JPEG
// and PNG; other formats become JPEG.
async function pictureOf(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: 'from-image' });
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const plain = ['image/jpeg', 'image/png'].includes(file.type);
  if (plain && scale === 1 && file.size <= SMALL_PICTURE) return dataUrlOf(file);
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext('2d');
  context.fillStyle = 'white'; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL('image/jpeg', 0.85);
}

function dataUrlOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// --- One answer ---------------------------------------------------------------------

class Answer {
  text = ''; // without the reasoning
  failed = false;

  constructor(app, model, compared) {
    Object.assign(this, { app, model });
    const { el } = app;
    const text = el('div', { class: 'text' });
    this.markdown = new Markdown(text, following);
    const thoughts = el('div', { class: 'text' });
    this.thoughts = new Markdown(thoughts, following);
    this.thinking = el('details', { class: 'thinking', hidden: true },
      el('summary', {}, 'Thinking'), thoughts);
    this.facts = el('ul', { class: 'facts', 'aria-label': 'About this answer' });
    this.notices = el('div', {});
    this.element = el('article', {
      class: 'answer', 'aria-label': `Answer of ${model}`, 'aria-busy': 'true',
    }, compared && el('h2', {}, model), this.thinking, text, this.notices, this.facts);
    this.about = {
      asked: model, answered: '', workers: [], rescues: 0, state: '', place: '',
      queued: 0, attempts: 1, sent: 0, first: 0, last: 0, pieces: 0, request: '',
      usage: null, timings: null, ending: 'running',
    };
  }

  // Request the answer, and show it as it arrives. It never throws.
  async run(body, signal, models) {
    const { about } = this;
    about.sent = performance.now();
    const known = new Set(models.map(({ id }) => id));
    const split = new ThoughtSplitter(
      (text) => this.#addText(text), (thought) => this.#addThought(thought));
    const clock = setInterval(() => this.#showFacts(), 250);
    try {
      await streamChat(this.app, body, signal, {
        onHead: (headers) => this.#readHead(headers),
        onComment: (comment) => this.#readComment(comment),
        onChunk: (chunk) => {
          const { delta, finish_reason: reason } = chunk.choices?.[0] ?? {};
          if (delta?.content || delta?.reasoning_content) {
            about.last = performance.now();
            about.first ||= about.last;
            about.pieces += 1;
            if (delta.reasoning_content) this.#addThought(delta.reasoning_content);
            if (delta.content) split.add(delta.content);
          }
          if (reason === 'length') about.cut = true;
          about.usage = chunk.usage ?? about.usage;
          about.timings = chunk.timings ?? about.timings;
          if (known.has(chunk.model)) about.answered = chunk.model;
        },
      });
      about.ending = 'complete';
    } catch (error) {
      about.ending = signal.aborted ? 'stopped' : 'broken';
      if (about.ending === 'broken') this.#complain(error);
    }
    clearInterval(clock);
    split.finish();
    this.markdown.finish();
    this.thoughts.finish();
    this.element.setAttribute('aria-busy', 'false');
    this.#showFacts();
  }

  #addText(text) {
    this.text += text;
    this.markdown.add(text);
  }

  #addThought(thought) {
    if (this.thinking.hidden && !thought.trim()) return;
    this.thinking.hidden = false;
    this.thoughts.add(thought);
  }

  #readHead(headers) {
    const { about } = this;
    about.request = headers.get('X-Request-Id') ?? '';
    about.queued = Number(headers.get('X-Gollama-Queue-Ms') ?? 0);
    about.attempts = Number(headers.get('X-Gollama-Attempts') ?? 1);
    const worker = headers.get('X-Gollama-Worker');
    if (worker) about.workers.push(worker);
    this.#showFacts();
  }

  // Read what the hub reports between the events of a stream.
  #readComment(comment) {
    const { about } = this;
    const [, word, rest] = /^(\S+) ?(.*)$/.exec(comment) ?? [];
    const queued = /^(\d+)\/(\d+)(?: eta (\d+)s)?$/.exec(rest);
    if (word === 'queued' && queued) {
      const [, place, waiting, eta] = queued;
      if (!about.place) this.app.mention(`Place ${place} of ${waiting} in the queue.`);
      about.place = `place ${place} of ${waiting} in the queue`
        + (eta ? `, about ${this.app.format.duration(Number(eta))} to go` : '');
      about.state = about.place;
    } else if (word === 'waking') about.state = `waking ${rest}`;
    else if (word === 'processing') about.state = 'reading the prompt';
    else if (word === 'loading') about.state = `loading the ${rest}`;
    else if (word === 'worker') about.workers.push(rest);
    else if (word === 'gollama') {
      const [, count, worker] = /^rescued (\d+)(?: by (.*))?$/.exec(rest) ?? [];
      if (!count) return;
      about.rescues = Number(count);
      if (worker) about.workers.push(worker);
      this.app.mention(`${worker ?? 'Another worker'} continues the answer.`);
    }
    this.#showFacts();
  }

  #showFacts() {
    const facts = describe(this.about, this.app.format);
    const shown = JSON.stringify(facts);
    if (this.shown === shown) return;
    this.shown = shown;
    const { el } = this.app;
    following(() => this.facts.replaceChildren(...facts.map(([text, title, kind]) => el(
      'li', { class: kind ?? null, title: title ?? null }, text)), ...this.#link()));
  }

  #link() {
    const { request, ending } = this.about;
    if (!request || ending === 'running' || !this.app.can('monitor')) return [];
    const href = `#/requests/${encodeURIComponent(request)}`;
    return [this.app.el('li', {}, this.app.el('a', { href }, 'what happened'))];
  }

  #complain(error) {
    this.failed = true;
    if (!(error instanceof Trouble)) console.error(error);
    const { request } = this.about;
    const hints = [...(error.hints ?? []), ...(request ? [`Request id: ${request}`] : [])];
    const shown = { message: error.message, hints };
    following(() => this.notices.append(notice(this.app, shown)));
  }
}

// Describe where an answer comes from, and how fast: [text, explanation, class] each.
function describe(about, format) {
  const facts = [];
  const { workers, rescues, usage, timings, ending } = about;
  if (ending === 'running' && !about.first) {
    const waited = Math.floor((performance.now() - about.sent) / 1000);
    if (about.state) facts.push([about.state]);
    if (waited >= 2) facts.push([`waiting for the first word for ${waited} s`]);
  }
  if (workers.length) facts.push([workers.join(' → '), 'The worker that answers']);
  if (rescues) {
    const text = rescues === 1 ? 'rescued' : `rescued ${rescues} times`;
    const title = 'A worker failed in the middle; another one continued the answer.';
    facts.push([`✚ ${text}`, title, 'warn']);
  }
  if (about.attempts > 1) {
    facts.push([`${about.attempts} attempts`, 'Other workers failed before the first word']);
  }
  if (about.answered && about.answered !== about.asked) {
    facts.push([`answered by ${about.answered}`, 'A fallback of the model', 'warn']);
  }
  if (about.queued >= 50) {
    facts.push([`${format.ms(about.queued)} in the queue`, 'Time before a slot was free']);
  }
  if (about.first) {
    const tokens = usage?.completion_tokens ?? about.pieces;
    const seconds = (about.last - about.first) / 1000;
    // n tokens have n - 1 gaps between them; a very short time means nothing.
    const own = seconds > 0.1 ? (tokens - 1) / seconds : 0;
    // The figures of a rescued answer's last worker are of its part alone.
    const rate = (!rescues && timings?.predicted_per_second) || own;
    facts.push([`first token after ${format.ms(about.first - about.sent)}`]);
    facts.push([format.plural(tokens, 'token')]);
    if (rate) facts.push([`${format.short(rate)} tokens/s`]);
  }
  if (usage?.prompt_tokens) {
    const { prompt_tokens: prompt = 0 } = usage;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? timings?.cache_n ?? 0;
    const share = cached ? `, ${format.number(cached)} from the cache` : '';
    facts.push([`prompt: ${format.plural(prompt, 'token')}${share}`,
      'A worker keeps the beginning of a conversation, and reads only what is new']);
  }
  if (about.cut) facts.push(['cut at its token limit', '', 'warn']);
  if (ending === 'stopped') facts.push(['stopped']);
  return facts;
}

// Divides text into what the model thinks, between `<think>` tags at its beginning, and
// what it answers. The tags may arrive in pieces.
class ThoughtSplitter {
  #held = '';
  #state = 'before'; // then 'in' and 'behind'

  constructor(onText, onThought) {
    Object.assign(this, { onText, onThought });
  }

  add(text) {
    if (this.#state === 'behind') {
      this.onText(text);
      return;
    }
    this.#held += text;
    if (this.#state === 'before') {
      const start = this.#held.trimStart();
      if ('<think>'.startsWith(start)) return; // it may become the tag
      if (!start.startsWith('<think>')) {
        this.#leave(this.#held);
        return;
      }
      this.#state = 'in';
      this.#held = start.slice('<think>'.length);
    }
    const end = this.#held.indexOf('</think>');
    if (end >= 0) {
      this.onThought(this.#held.slice(0, end));
      this.#leave(this.#held.slice(end + '</think>'.length).trimStart());
      return;
    }
    let sure = this.#held.length; // a tag may have begun behind that
    for (let size = Math.min(sure, 7); size > 0; size--) {
      if ('</think>'.startsWith(this.#held.slice(-size))) {
        sure -= size;
        break;
      }
    }
    if (sure) this.onThought(this.#held.slice(0, sure));
    this.#held = this.#held.slice(sure);
  }

  #leave(text) {
    this.#state = 'behind';
    this.#held = '';
    if (text) this.onText(text);
  }

  finish() {
    if (this.#held) (this.#state === 'in' ? this.onThought : this.onText)(this.#held);
    this.#held = '';
  }
}

// --- The request --------------------------------------------------------------------

class Trouble extends Error {
  constructor(message, hints = []) {
    super(message);
    this.hints = hints;
  }
}

const WORDS = {
  400: 'The request was refused.',
  401: 'The hub does not accept your token any more.',
  403: 'Your token does not allow that.',
  404: 'The hub does not know this model.',
  413: 'The conversation is too long for one request.',
  429: 'Too many requests.',
  502: 'The worker failed before it answered.',
  503: 'No worker is free for this model.',
  504: 'No worker answered in time.',
};

async function troubleOf(answer) {
  let reason = '';
  try {
    reason = (await answer.json()).error.message;
  } catch {
    // The status has to be enough.
  }
  const hints = [];
  const wait = answer.headers.get('Retry-After');
  if (reason) hints.push(`The hub’s message: ${reason}`);
  if (/^\d+$/.test(wait ?? '')) hints.push(`Try again in ${wait} s.`);
  const { status } = answer;
  return new Trouble(WORDS[status] ?? `The hub answered with the status ${status}.`, hints);
}

// Request a chat, and report its head, comments and chunks until `[DONE]`.
async function streamChat(app, body, signal, { onHead, onComment, onChunk }) {
  const answer = await app.fetch('/v1/chat/completions', {
    method: 'POST', signal, body: JSON.stringify(body),
    headers: { 'Content-Type': 'application/json' },
  }).catch((error) => {
    if (signal.aborted) throw error;
    throw new Trouble('The hub does not answer.', ['Is it running?']);
  });
  onHead(answer.headers);
  if (!answer.ok) throw await troubleOf(answer);
  let done = false;
  const feed = eventReader((data) => {
    if (done || data === '[DONE]') {
      done = true;
      return;
    }
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new Trouble('The answer broke off: an event in it could not be read.');
    }
    if (chunk.error) {
      const reason = String(chunk.error.message ?? 'no reason was given');
      throw new Trouble('The answer broke off.', [`The hub’s message: ${reason}`]);
    }
    onChunk(chunk);
  }, onComment);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  try {
    for (let ended = false; !ended && !done;) {
      const piece = await reader.read().catch((error) => {
        if (signal.aborted) throw error;
        throw new Trouble('The answer broke off: the connection was lost.');
      });
      ended = piece.done;
      feed(decoder.decode(piece.value, { stream: !ended }), ended);
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection after an error
  }
  if (!done) throw new Trouble('The answer broke off before its end.');
}

// Take text in any pieces; report the data of each complete event, and comments. Lines
// end in LF, CR or CRLF, as the standard of event streams has it.
function eventReader(onData, onComment) {
  let rest = '';
  let data = [];
  const take = (line) => {
    if (line === '') {
      if (data.length) onData(data.join('\n'));
      data = [];
    } else if (/^data(:|$)/.test(line)) data.push(line.slice(5).replace(/^ /, ''));
    else if (line[0] === ':') onComment(line.slice(1).trim());
  };
  return (text, last) => {
    rest += text;
    const ends = /\r\n|\r|\n/g;
    let start = 0;
    for (let end; (end = ends.exec(rest)); start = ends.lastIndex) {
      // A CR at the very end may be the first half of a CRLF.
      if (end[0] === '\r' && ends.lastIndex === rest.length && !last) break;
      take(rest.slice(start, end.index));
    }
    rest = rest.slice(start);
  };
}

// --- Around it ----------------------------------------------------------------------

// A box that explains what went wrong, and what may help.
function notice({ el }, { message, hints }, again = null) {
  return el('div', { class: 'notice bad', role: 'alert' },
    el('p', {}, el('strong', {}, message)),
    hints.map((hint) => el('p', {}, hint)),
    again && el('button', { type: 'button', onclick: again }, 'Try again'));
}

const page = document.documentElement;

function scrollDown() {
  window.scrollTo(0, page.scrollHeight);
}

// Change the page, and stay at its end unless its reader has scrolled up.
function following(change) {
  const atEnd = page.scrollHeight - window.scrollY - window.innerHeight < 80;
  change();
  if (atEnd) scrollDown();
}
