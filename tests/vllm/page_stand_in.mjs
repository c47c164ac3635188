// A stand-in for a browser's page: runs console.js under node, does what it reads from standard input, and prints what
// was requested and what is shown. `test_console.py` has the real browser.

import { readFileSync } from "node:fs";

const { script, url, replies, steps, answers } = JSON.parse(readFileSync(0));
const requests = [];
let timers = 0;

class Element {
  constructor(tag) {
    Object.assign(this, { tag, value: "", checked: false, hidden: false, style: {}, children: [], own: "" });
    this.attributes = new Map();
    this.listeners = new Map();
  }
  get textContent() { return this.own + this.children.map((child) => child.textContent).join("|"); }
  set textContent(text) { [this.own, this.children] = [String(text), []]; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { [this.own, this.children] = ["", children]; }
  setAttribute(name, value) { this.attributes.set(name, value); }
  addEventListener(kind, listener) { this.listeners.set(kind, listener); }
  contains() { return false; }
  querySelector() { return new Element("button"); }
  focus() {}
  reset() {}
  showModal() {
    this.returnValue = answers.shift();
    this.shown = this.shown ?? [];
    this.shown.push(element("confirm-text").textContent);
    setImmediate(() => this.listeners.get("close")());
  }
}

const elements = new Map();
function element(id) {
  if (!elements.has(id)) elements.set(id, new Element("div"));
  return elements.get(id);
}

globalThis.Node = Element;
globalThis.location = new URL(url);
globalThis.document = { getElementById: element, createElement: (tag) => new Element(tag), activeElement: null };
globalThis.setInterval = () => { timers += 1; return timers; };
globalThis.clearInterval = () => { timers = 0; };
globalThis.setTimeout = (then) => setImmediate(then);
globalThis.fetch = async (path, { method, headers, body }) => {
  const { pathname } = new URL(path, url);
  requests.push({ method, path: pathname, bearer: headers.Authorization ?? "", body: JSON.parse(body) });
  const [status, answer] = replies[`${method} ${pathname}`] ?? [404, { detail: "Not Found" }];
  return { ok: status < 300, status, statusText: String(status), json: async () => answer };
};

await import(script);
for (const [what, id, value] of steps) {
  if (what === "type") element(id).value = value;
  else if (what === "check") element(id).checked = value;
  else await element(id).listeners.get(what)({ preventDefault() {} });
}
const shown = Object.fromEntries([...elements].map(([id, { textContent }]) => [id, textContent]));
const hidden = Object.fromEntries([...elements].map(([id, element]) => [id, element.hidden]));
console.log(JSON.stringify({ requests, shown, hidden, timers, dialogs: element("confirm").shown ?? [] }));
