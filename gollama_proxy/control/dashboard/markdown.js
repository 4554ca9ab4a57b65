// Markdown, as far as answers of models use it: `parse` makes a tree of plain values,
// and `Markdown` shows it while it grows.
//
// A node is a string, or `{tag, attributes, children}`. All text of a model ends in a
// text node: nothing here makes markup of a string. Each step takes time in proportion
// to the text, whatever the text is.

const DEEPEST = 16; // lists and quotations in each other, and emphasis in emphasis
const LONGEST_URL = 2000; // characters

const FENCE = /^( *)(`{3,}|~{3,})(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const HEADING = /^ {0,3}(#{1,6})(?: +|$)/;
const QUOTE = /^ {0,3}> ?/;

// Return the nodes of a text; each block is one of them.
export function parse(text) {
  return blocksOf(linesOf(text), 0).map(({ node }) => node);
}

const linesOf = (text) => text.replace(/\r\n?/g, '\n').replaceAll('\t', '    ').split('\n');

const node = (tag, attributes, ...children) => ({ tag, attributes, children });

// --- Blocks -----------------------------------------------------------------------

// Cut lines into blocks: `{at, node}`, with the index of the first line.
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    blocks.push({ at, node: block });
    at = next;
  }
  return blocks;
}

// Read the block that begins at a line; return it and the index behind it.
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = fenceIn(line);
  if (fence) return codeAt(lines, at, fence);
  if (isRule(line)) return [node('hr', {}), at + 1];
  const heading = HEADING.exec(line);
  if (heading) {
    // The page has its own h1 and h2.
    const tag = `h${Math.min(heading[1].length + 2, 6)}`;
    return [node(tag, {}, ...inline(headingText(line.slice(heading[0].length)))), at + 1];
  }
  if (isTable(lines, at)) return tableAt(lines, at);
  if (depth < DEEPEST) {
    if (QUOTE.test(line)) return quoteAt(lines, at, depth);
    const item = ITEM.exec(line);
    if (item) return listAt(lines, at, depth, item);
  }
  return paragraphAt(lines, at, depth);
}

const isBlank = (line) => line === undefined || !line.trim();

function headingText(text) {
  const words = text.trimEnd();
  let end = words.length;
  while (words[end - 1] === '#') end -= 1;
  return end === 0 || words[end - 1] === ' ' ? words.slice(0, end).trim() : words.trim();
}

function isRule(line) {
  const marks = line.replaceAll(' ', '');
  return marks.length > 2 && '*-_'.includes(marks[0]) && isRun(marks, marks[0]);
}

function isRun(text, mark) {
  for (const each of text) if (each !== mark) return false;
  return true;
}

function fenceIn(line) {
  const fence = FENCE.exec(line);
  // Three backticks with more of them behind are code in a line of text.
  return fence && !(fence[2][0] === '`' && fence[3].includes('`')) ? fence : null;
}

// Read code up to its closing fence; an unclosed fence is still code.
function codeAt(lines, first, [, { length: indent }, mark, info]) {
  const code = [];
  let at = first + 1;
  for (; at < lines.length; at++) {
    const end = lines[at].trim();
    if (end.length >= mark.length && end[0] === mark[0] && isRun(end, mark[0])) break;
    code.push(outdent(lines[at], indent));
  }
  return [codeBlock(code.join('\n'), info.trim().split(' ', 1)[0]), at + 1];
}

function codeBlock(text, language) {
  const name = language.slice(0, 40) || 'text';
  const copy = node('button', { type: 'button', class: 'copy' }, 'Copy');
  const bar = node('div', { class: 'bar-of-code' }, node('span', {}, name), copy);
  const code = node('code', {}, ...(text ? [text] : []));
  return node('div', { class: 'code' }, bar, node('pre', { tabindex: '0' }, code));
}

function outdent(line, most) {
  let at = 0;
  while (at < most && line[at] === ' ') at += 1;
  return line.slice(at);
}

const indentOf = (line) => line.length - line.trimStart().length;

function quoteAt(lines, first, depth) {
  let at = first;
  const inner = [];
  for (; at < lines.length && QUOTE.test(lines[at]); at++) {
    inner.push(lines[at].replace(QUOTE, ''));
  }
  const blocks = blocksOf(inner, depth + 1).map((each) => each.node);
  return [node('blockquote', {}, ...blocks), at];
}

// Read a list. Two spaces are enough to be inside an item: models count differently.
function listAt(lines, first, depth, { 1: { length: base }, 2: firstMark }) {
  const ordered = isOrdered(firstMark);
  const items = [];
  let loose = false;
  let at = first;
  while (at < lines.length) {
    const mark = ITEM.exec(lines[at]);
    if (!mark || mark[1].length > base + 1 || isOrdered(mark[2]) !== ordered) break;
    if (mark[1].length < base && items.length) break;
    if (isRule(lines[at])) break;
    const [item, next] = itemAt(lines, at, base, mark[0].length);
    items.push(item);
    let after = next;
    while (after < lines.length && isBlank(lines[after])) after += 1;
    const another = after < lines.length && ITEM.exec(lines[after]);
    if (another && after > next && isOrdered(another[2]) === ordered) loose = true;
    at = another ? after : next;
  }
  const children = items.map((item) => node('li', {}, ...itemNodes(item, depth, loose)));
  const start = parseInt(firstMark, 10);
  const attributes = ordered && start !== 1 ? { start: String(start) } : {};
  return [node(ordered ? 'ol' : 'ul', attributes, ...children), at];
}

const isOrdered = (mark) => mark.length > 1;

// Read the lines of one item, without their indent.
function itemAt(lines, first, base, width) {
  const inner = [lines[first].slice(width)];
  let fence = fenceIn(inner[0]);
  let at = first + 1;
  for (; at < lines.length; at++) {
    const line = lines[at];
    const inside = indentOf(line) >= base + 2;
    if (isBlank(line)) {
      let after = at;
      while (after < lines.length && isBlank(lines[after])) after += 1;
      if (after === lines.length || indentOf(lines[after]) < base + 2) break;
      for (; at < after; at++) inner.push('');
      at -= 1;
    } else if (inside) {
      inner.push(outdent(line, width));
      fence = fence ? (closes(line, fence) ? null : fence) : fenceIn(inner.at(-1));
    } else if (fence || isBlank(inner.at(-1)) || ITEM.test(line) || beginsBlock(lines, at)) {
      break;
    } else {
      inner.push(line); // the paragraph of the item goes on
    }
  }
  return [inner, at];
}

function closes(line, fence) {
  const end = line.trim();
  return end.length >= fence[2].length && isRun(end, fence[2][0]);
}

function itemNodes(lines, depth, loose) {
  const box = /^\[([ xX])\] /.exec(lines[0]);
  const rest = box ? [lines[0].slice(4), ...lines.slice(1)] : lines;
  const blocks = blocksOf(rest, depth + 1).map((each) => each.node);
  const alone = blocks.filter((each) => each.tag === 'p').length === 1;
  const nodes = loose || !alone ? blocks : blocks.flatMap((each) => (
    each.tag === 'p' ? each.children : [each]
  ));
  return joined(box ? [box[1] === ' ' ? '☐ ' : '☑ ', ...nodes] : nodes);
}

// Whether a line ends a paragraph in front of it.
function beginsBlock(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return isBlank(line) || fenceIn(line) || isRule(line) || HEADING.test(line) ||
    QUOTE.test(line) || isTable(lines, at) ||
    // A year at the beginning of a line is no list, and neither is a lone dash.
    item && item[0].length < line.length && (!isOrdered(item[2]) || parseInt(item[2], 10) === 1);
}

function paragraphAt(lines, first) {
  let at = first + 1;
  while (at < lines.length && !beginsBlock(lines, at)) at += 1;
  const text = lines.slice(first, at).map((line) => line.trim()).join('\n');
  return [node('p', {}, ...inline(text)), at];
}

// --- Tables -----------------------------------------------------------------------

// Whether a table begins here; the last line so far may be the head of one.
function isTable(lines, at) {
  const line = lines[at];
  if (!line.includes('|')) return false;
  if (at + 1 === lines.length) return line.trimStart().startsWith('|');
  return aligned(lines[at + 1]) !== null;
}

// Return the alignments in the line below the head; null if it is something else.
function aligned(line) {
  if (!line.includes('|') || !line.includes('-')) return null;
  const cells = cellsOf(line);
  if (!cells.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return cells.map((cell) => (
    !cell.endsWith(':') ? '' : cell.startsWith(':') ? 'center' : 'right'
  ));
}

function tableAt(lines, first) {
  const head = cellsOf(lines[first]);
  const aligns = first + 1 < lines.length ? aligned(lines[first + 1]) : [];
  const row = (tag, cells) => node('tr', {}, ...cells.slice(0, head.length).map(
    (cell, n) => node(tag, aligns[n] ? { class: aligns[n] } : {}, ...inline(cell)),
  ));
  const rows = [];
  let at = first + 2;
  for (; at < lines.length && lines[at].includes('|'); at++) {
    rows.push(row('td', cellsOf(lines[at])));
  }
  const body = rows.length ? [node('tbody', {}, ...rows)] : [];
  const table = node('table', {}, node('thead', {}, row('th', head)), ...body);
  return [node('div', { class: 'sheet', tabindex: '0' }, table), Math.min(at, lines.length)];
}

function cellsOf(line) {
  const cells = [''];
  const text = line.trim();
  for (let at = 0; at < text.length; at++) {
    if (text[at] === '\\' && text[at + 1] === '|') cells[cells.length - 1] += text[++at];
    else if (text[at] !== '|') cells[cells.length - 1] += text[at];
    else if (at > 0 && at < text.length - 1) cells.push('');
  }
  return cells.map((cell) => cell.trim());
}

// --- Text in a line ---------------------------------------------------------------

const SPECIAL = /[\\`*_~[\]!<]|https?:\/\//gi;
const ESCAPED = /[!-/:-@[-`{-~]/;
const SPACE = /^\s?$/; // also the ends of the text
const PUNCTUATION = /[\p{P}\p{S}]/u;

// Return the nodes of a text without blocks. Links cannot be in each other.
function inline(text, links = true) {
  const emphasis = new Emphasis();
  const codeEnds = pairBackticks(text);
  const brackets = links ? pairBrackets(text, codeEnds) : new Map();
  let at = 0;
  for (;;) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    const { index, 0: mark } = found;
    emphasis.add(text.slice(at, index));
    at = index + 1;
    if (mark.length > 1 || mark === '<') {
      const link = links ? addressAt(text, index) : null;
      if (link) at = index + link.length;
      emphasis.add(link ? link.node : mark);
      if (!link) at = index + mark.length;
    } else if (mark === '\\') {
      const escapes = at < text.length && ESCAPED.test(text[at]);
      emphasis.add(escapes ? text[at++] : mark);
    } else if (mark === '`') {
      at = runEnd(text, index);
      const end = codeEnds.get(index);
      if (end === undefined) emphasis.add(text.slice(index, at));
      else {
        emphasis.add(node('code', {}, codeText(text.slice(at, end))));
        at = end + (at - index);
      }
    } else if (mark === '[' || mark === '!') {
      const bracket = mark === '!' ? index + 1 : index;
      const link = brackets.get(bracket);
      if (link) {
        // Pictures are links, too: this page loads nothing from elsewhere.
        const words = inline(text.slice(bracket + 1, link.close), false);
        emphasis.add(linkTo(link.url, words.length ? words : [link.url]));
        at = link.end;
      } else emphasis.add(mark);
    } else if (mark === ']') emphasis.add(mark);
    else {
      at = runEnd(text, index);
      emphasis.run(mark, at - index, text[index - 1] ?? '', text[at] ?? '');
    }
  }
  emphasis.add(text.slice(at));
  return joined(emphasis.finish());
}

function runEnd(text, start) {
  let at = start;
  while (text[at] === text[start]) at += 1;
  return at;
}

const codeText = (text) => (
  text.length > 2 && text[0] === ' ' && text.at(-1) === ' ' && text.trim()
    ? text.slice(1, -1) : text
);

// Return where the code that begins with a run of backticks ends: start → end.
function pairBackticks(text) {
  const runs = [];
  for (let at = text.indexOf('`'); at >= 0; at = text.indexOf('`', at)) {
    const end = runEnd(text, at);
    runs.push({ at, length: end - at });
    at = end;
  }
  const ends = new Map();
  const next = new Map(); // by length
  for (const { at, length } of runs.reverse()) {
    if (next.has(length)) ends.set(at, next.get(length));
    next.set(length, at);
  }
  return ends;
}

// Return the links of a text: index of the bracket → `{close, end, url}`.
function pairBrackets(text, codeEnds) {
  const found = new Map();
  let open = []; // indexes
  for (let at = 0; at < text.length; at++) {
    const mark = text[at];
    if (mark === '\\') at += 1;
    else if (mark === '`') {
      const behind = runEnd(text, at);
      const end = codeEnds.get(at);
      at = (end === undefined ? behind : end + behind - at) - 1;
    } else if (mark === '[') open.push(at);
    else if (mark === ']' && open.length) {
      const start = open.pop();
      const target = text[at + 1] === '(' ? targetAt(text, at + 2) : null;
      if (!target) continue;
      found.set(start, { close: at, ...target });
      open = [];
      at = target.end - 1;
    }
  }
  return found;
}

// Read `url "title")`; null if it is not that, or not an address to be shown.
function targetAt(text, start) {
  let at = start;
  let depth = 0;
  const most = Math.min(text.length, start + LONGEST_URL);
  for (; at < most; at++) {
    if (text[at] === '(' && ++depth > 8) return null;
    if (text[at] === ')' && --depth < 0) break;
    if (/\s/.test(text[at])) break;
  }
  const url = safeUrl(text.slice(start, at).replace(/^<|>$/g, ''));
  if (url && text[at] === ' ') {
    const title = text.slice(at, at + 300);
    at += /^ +(?:"[^"]*"|'[^']*') *(?=\))/.exec(title)?.[0].length ?? 0;
  }
  return url && text[at] === ')' ? { end: at + 1, url } : null;
}

// Return an address of the web as browsers write it; null for any other.
function safeUrl(text) {
  if (!/^https?:\/\//i.test(text)) return null;
  try {
    const url = new URL(text);
    return /^https?:$/.test(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function linkTo(url, words) {
  const attributes = { href: url, title: url, target: '_blank', rel: 'noreferrer noopener' };
  return node('a', attributes, ...words);
}

// Read an address in the text, with or without angle brackets.
function addressAt(text, start) {
  const angled = text[start] === '<';
  const first = angled ? start + 1 : start;
  if (!angled && /\w/.test(text[start - 1] ?? '')) return null;
  const limit = Math.min(text.length, first + LONGEST_URL);
  let end = first;
  while (end < limit && !/[\s<>"`|\\]/.test(text[end])) end += 1;
  if (angled && text[end] !== '>') return null;
  if (!angled) {
    const bracket = text.slice(first, end).includes('(');
    while (end > first && /[.,;:!?'*_~\])]/.test(text[end - 1])) {
      if (text[end - 1] === ')' && bracket) break;
      end -= 1;
    }
  }
  const words = text.slice(first, end);
  const url = safeUrl(words);
  return url && { node: linkTo(url, [words]), length: end - start + (angled ? 1 : 0) };
}

// Pairs runs of `*`, `_` and `~~`. What stays without a partner is text.
//
// As in CommonMark, but for two things: `**` and `*` are no pair, so that half of a mark
// does no harm while a text arrives, and `**` ends what `**` began also in `**a:**b`.
class Emphasis {
  #frames = [{ key: '', mark: '', left: 0, nodes: [], depth: 0 }]; // outermost first
  #open = new Map(); // by key: the indexes of its frames

  add(child) {
    if (child !== '') this.#frames.at(-1).nodes.push(child);
  }

  // Take a run of a mark between two characters.
  run(mark, length, before, after) {
    if (mark === '~' && length !== 2) {
      this.add(mark.repeat(length));
      return;
    }
    const opens = !SPACE.test(after) &&
      (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const closes = !SPACE.test(before) &&
      (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const inWord = mark === '_' && opens && closes;
    const ends = closes ||
      (!SPACE.test(before) && length === 2 && this.#find(mark, 2) > 0);
    let left = length;
    if (ends && !(inWord && !PUNCTUATION.test(after))) {
      for (let used = 1; used && left; left -= used) used = this.#close(mark, left);
    }
    if (left && opens && !(inWord && !PUNCTUATION.test(before))) {
      this.#push({ mark, left, nodes: [], depth: 0 });
    } else if (left) this.add(mark.repeat(left));
  }

  #push(frame) {
    frame.key = keyOf(frame.mark, frame.left);
    if (!this.#open.has(frame.key)) this.#open.set(frame.key, []);
    this.#open.get(frame.key).push(this.#frames.length);
    this.#frames.push(frame);
  }

  // Return the index of the innermost run that this one may end; 0 if there is none.
  #find(mark, left) {
    const sizes = left > 2 ? [1, 2, 3] : [left, 3];
    return Math.max(...sizes.map((size) => this.#open.get(keyOf(mark, size))?.at(-1) ?? 0));
  }

  // Close the innermost run that fits; return how many marks that used.
  #close(mark, left) {
    const index = this.#find(mark, left);
    if (!index) return 0;
    this.#flatten(index);
    const top = this.#frames.at(-1);
    if (top.depth >= DEEPEST) return 0;
    const used = mark === '~' || (left > 1 && top.left > 1) ? 2 : 1;
    const tag = mark === '~' ? 'del' : used === 2 ? 'strong' : 'em';
    this.#frames.pop();
    this.#open.get(top.key).pop();
    top.nodes = [node(tag, {}, ...joined(top.nodes))];
    top.depth += 1;
    top.left -= used;
    if (top.left) this.#push(top);
    else this.#take(this.#frames.at(-1), top);
    return used;
  }

  // Turn the runs behind an index into text, and add them to the run there.
  #flatten(index) {
    const target = this.#frames[index];
    for (const frame of this.#frames.splice(index + 1)) {
      this.#open.get(frame.key).pop();
      target.nodes.push(frame.mark.repeat(frame.left));
      this.#take(target, frame);
    }
  }

  #take(target, { nodes, depth }) {
    for (const each of nodes) target.nodes.push(each);
    target.depth = Math.max(target.depth, depth);
  }

  finish() {
    this.#flatten(0);
    return this.#frames[0].nodes;
  }
}

const keyOf = (mark, left) => `${mark}${Math.min(left, 3)}`;

// Join strings that follow each other, as a browser may do with text nodes.
function joined(nodes) {
  const result = [];
  let texts = [];
  const flush = () => {
    if (texts.length) result.push(texts.join(''));
    texts = [];
  };
  for (const each of nodes) {
    if (typeof each === 'string') {
      if (each) texts.push(each);
    } else {
      flush();
      result.push(each);
    }
  }
  flush();
  return result;
}

// --- Showing it -------------------------------------------------------------------

// Cuts a growing text into nodes; those that cannot change any more are kept.
export class Growing {
  kept = []; // nodes that are final
  #text = '';
  #start = 0; // where the rest begins, which is read again each time

  // Add text.
  add(text) {
    this.#text += text;
  }

  get text() {
    return this.#text;
  }

  // Return the nodes behind those that were kept before this call, and keep some.
  read() {
    const rest = this.#text.slice(this.#start);
    const lines = linesOf(rest);
    const blocks = blocksOf(lines, 0);
    // A block is final when the next one is: its first line and the one below it
    // decide what it is, and that needs the beginning of the line that follows.
    let final = 0;
    while (final + 1 < blocks.length && blocks[final + 1].at + 2 < lines.length) final += 1;
    if (final) this.#start += lengthOf(rest, blocks[final].at);
    const nodes = blocks.map((block) => block.node);
    this.kept.push(...nodes.slice(0, final));
    return nodes;
  }
}

// Return the length of the first lines of a text.
function lengthOf(text, lines) {
  const ends = /\r\n?|\n/g;
  for (let count = 0; count < lines; count++) ends.exec(text);
  return ends.lastIndex;
}

// A text that is shown in an element as it arrives.
export class Markdown {
  #root;
  #growing = new Growing();
  #shown = []; // the nodes that are shown and may change
  #kept = 0; // elements in front of them
  #frame = 0;
  #notBefore = 0;
  #onDraw;

  // `onDraw` gets the function that changes the page.
  constructor(root, onDraw = (draw) => draw()) {
    this.#root = root;
    this.#onDraw = onDraw;
    root.addEventListener('click', copyCode);
  }

  get text() {
    return this.#growing.text;
  }

  // Add text; it is shown with the next frame, or later if drawing takes long.
  add(text) {
    this.#growing.add(text);
    this.#frame ||= requestAnimationFrame(() => this.#tick());
  }

  // Show everything at once.
  finish() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#onDraw(() => this.#draw());
  }

  #tick() {
    const began = performance.now();
    if (began < this.#notBefore) {
      this.#frame = requestAnimationFrame(() => this.#tick());
      return;
    }
    this.finish();
    this.#root.getBoundingClientRect(); // so that the time of its layout counts
    // However long the text is, a tenth of the time is enough for it.
    const now = performance.now();
    this.#notBefore = now + 9 * (now - began);
  }

  #draw() {
    const before = this.#growing.kept.length;
    const nodes = this.#growing.read();
    patch(this.#root, this.#shown, nodes, this.#kept);
    const kept = this.#growing.kept.length - before;
    this.#kept += kept;
    this.#shown = nodes.slice(kept);
  }
}

// Change the children of an element behind `skip` so that they show other nodes.
function patch(parent, before, after, skip = 0) {
  after.forEach((wanted, n) => {
    const old = before[n];
    const shown = parent.childNodes[skip + n];
    if (old === undefined) parent.append(build(wanted));
    else if (typeof old === 'string' && typeof wanted === 'string') {
      // A selection of text survives its growth.
      if (wanted.startsWith(old)) {
        if (wanted.length > old.length) shown.appendData(wanted.slice(old.length));
      } else shown.data = wanted;
    } else if (old.tag !== undefined && isLike(old, wanted)) {
      patch(shown, old.children, wanted.children);
    } else shown.replaceWith(build(wanted));
  });
  while (parent.childNodes.length > skip + after.length) parent.lastChild.remove();
}

function isLike(old, wanted) {
  if (old.tag !== wanted.tag) return false;
  const names = Object.keys(old.attributes);
  return names.length === Object.keys(wanted.attributes ?? {}).length &&
    names.every((name) => old.attributes[name] === wanted.attributes[name]);
}

function build(wanted) {
  if (typeof wanted === 'string') return document.createTextNode(wanted);
  const element = document.createElement(wanted.tag);
  for (const [name, value] of Object.entries(wanted.attributes)) {
    element.setAttribute(name, value);
  }
  for (const child of wanted.children) element.append(build(child));
  return element;
}

// Copy the code whose button was pressed.
async function copyCode({ target }) {
  if (!target.matches?.('button.copy')) return;
  const code = target.closest('.code').querySelector('code');
  target.textContent = await copyText(code.textContent) ? 'Copied' : 'Select it to copy';
  setTimeout(() => { target.textContent = 'Copy'; }, 1500);
}

// Copy a text; there is no clipboard on a page from another machine by plain HTTP.
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
