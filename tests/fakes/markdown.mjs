// Reads texts in Markdown, one JSON object a line: {"text": …, "cuts": [offsets]}.
// Writes for each the nodes of the whole, or with cuts also those of the text as it grew
// in pieces.

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

// Node 18 takes a file that ends in .js for a module of another kind.
const source = readFileSync(process.argv[2], "utf8");
const module = `data:text/javascript,${encodeURIComponent(source)}`;
const { Growing, parse } = await import(module);

function grow(text, cuts) {
  const growing = new Growing();
  let nodes = [];
  let before = 0;
  const ends = [...cuts, text.length];
  ends.forEach((end, n) => {
    growing.add(text.slice(n ? ends[n - 1] : 0, end));
    before = growing.kept.length;
    nodes = growing.read();
  });
  return [...growing.kept.slice(0, before), ...nodes];
}

for await (const line of createInterface({ input: process.stdin })) {
  const { text, cuts } = JSON.parse(line);
  const answer = { whole: parse(text), grown: cuts && grow(text, cuts) };
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
