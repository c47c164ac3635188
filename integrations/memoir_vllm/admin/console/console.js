// The console of the admin API. Text from the store and from the model only ever becomes textContent.

const PAGE = 20;
const POLL_MS = 2000;
const MOST_REPHRASES = 32; // of an edit that is sent
const EXTRAS = { // what an edit may have beyond the fields of the form
  subject: "its subject", rephrases: "its rephrasings", requires: "what it requires", before: "the messages before it",
};
// This page is at /memoir/ or at /memoir/stores/NAME/; a proxy may put a path before that.
const ROOT = location.pathname.replace(/memoir\/(stores\/[^/]+\/)?$/, "");
const $ = (id) => document.getElementById(id);

let token = "";
let key = "";
let stats = null;
let offset = 0;
let timer = 0;

class Refused extends Error {
  constructor(status, detail) {
    super(Array.isArray(detail) ? detail.map((d) => `${d.loc.at(-1)}: ${d.msg}`).join("; ") : detail);
    this.status = status;
  }
}

async function call(path, { method = "GET", body = null, bearer = token } = {}) {
  const headers = bearer ? { Authorization: `Bearer ${bearer}` } : {};
  if (body !== null) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, { method, headers, body: body === null ? null : JSON.stringify(body) });
  const answer = await reply.json().catch(() => ({}));
  if (!reply.ok) {
    const detail = answer.detail ?? answer.error?.message ?? answer.error ?? reply.statusText;
    throw new Refused(reply.status, detail);
  }
  return answer;
}

function make(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function row(...cells) {
  const made = make("tr");
  made.append(...cells.map((cell) => {
    const td = make("td", cell instanceof Node ? "" : String(cell));
    if (cell instanceof Node) td.append(cell);
    return td;
  }));
  return made;
}

/** Show what an action throws below it. */
function guarded(errorId, action) {
  return async (event) => {
    event?.preventDefault();
    $(errorId).textContent = "";
    try {
      await action(event);
    } catch (error) {
      $(errorId).textContent = error.message;
      if (error.status === 401 && token) leave(`Signed out: ${error.message}`);
    }
  };
}

// ---- signing in ------------------------------------------------------------------------------------------------------

async function enter() {
  const given = $("token").value.trim();
  stats = await call("stats", { bearer: given });
  token = given;
  key = $("key").value.trim();
  $("enter").reset();
  $("enter").hidden = true;
  $("work").hidden = false;
  $("leave").hidden = false;
  $("chat").checked = stats.chat;
  show(stats);
  timer = setInterval(watch, POLL_MS);
  await refresh();
  if (token) $("prompt").focus();
}

/** Draw the lists again. Each shows its own error. */
async function refresh() {
  await Promise.all([guarded("edits-error", list)(), guarded("audit-error", audit)()]);
}

/** Sign out. A reason is shown where the next sign-in begins. */
function leave(reason = "") {
  clearInterval(timer);
  token = key = "";
  $("work").hidden = true;
  $("leave").hidden = true;
  $("enter").hidden = false;
  $("summary").textContent = "";
  for (const id of ["edits", "recent", "audit", "nearest", "parts", "counts"]) $(id).replaceChildren();
  const texts = ["base", "edited", "decision", "change", "try-error", "edits-error", "change-error", "audit-error"];
  for (const id of texts) $(id).textContent = "";
  $("enter-error").textContent = reason;
  $("answers").hidden = true;
  $("token").focus();
}

// ---- trying ----------------------------------------------------------------------------------------------------------

/** A prompt as a request has it. */
function worded(prompt, chat) {
  return chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
}

/** Ask /v1 as any client does, with its own key: a refusal there does not end the session here. */
async function complete(path, body) {
  try {
    return await call(`${ROOT}v1/${path}`, { method: "POST", body, bearer: key });
  } catch (error) {
    if (error.status !== 401) throw error;
    throw new Error(`/v1 refuses the API key (${error.message}): sign out, and sign in with the key of /v1`);
  }
}

async function answer(prompt, options) {
  const chat = $("chat").checked;
  const store = stats.store ? { memoir_store: stats.store } : {};
  const body = { model: stats.model, temperature: 0, max_tokens: 64, vllm_xargs: { ...options, ...store } };
  const completion = await complete(chat ? "chat/completions" : "completions", { ...body, ...worded(prompt, chat) });
  const [choice] = completion.choices;
  return [chat ? choice.message.content : choice.text, completion.kv_transfer_params.memoir];
}

/** What became of a request, in words. */
function decided({ edit, overlap, result, reason, generation }) {
  if (edit !== null) return `Edit ${edit} answered, overlap ${overlap.toFixed(3)} (generation ${generation}).`;
  const why = {
    unroutable: `No question could be looked up${reason ? ` (${reason})` : ""}`,
    image: "A prompt with an image is not looked up",
    adapter: "A request for an adapter without a store is not looked up",
  };
  return `${why[result] ?? "No edit matched"}: the base model answered (generation ${generation}).`;
}

async function attempt() {
  const prompt = $("prompt").value;
  const button = $("try").querySelector("button");
  button.disabled = true;
  try {
    const [[base], [edited, said], found] = await Promise.all([
      answer(prompt, { memoir: "off" }),
      answer(prompt, {}),
      call("lookup", { method: "POST", body: { ...worded(prompt, $("chat").checked), n: 3 } }),
    ]);
    $("base").textContent = base;
    $("edited").textContent = edited;
    $("decision").textContent = decided(said);
    $("nearest").replaceChildren(...found.matches.map((match) => near(match, found.tau)));
    $("parts").replaceChildren(...found.parts.map(verdict));
    $("answers").hidden = false;
  } finally {
    button.disabled = false;
  }
}

function verdict(part) {
  const near = part.edit === null ? "no edit is near" : `edit ${part.edit}: ${part.same ? "same" : "another"} question`;
  const why = part.words.length && !part.same ? `${part.reason}, ${part.words.slice(0, 6).join(" ")}` : part.reason;
  const item = make("li", part.text);
  item.append(make("p", `${near} (${why})${part.decides ? "; this decides" : ""}`, { class: "hint" }));
  return item;
}

function near(match, tau) {
  const gone = `edit ${match.edit}, which the store does not have any more`;
  const item = make("li", match.prompt === null ? gone : `${match.prompt} → ${match.target} (edit ${match.edit})`);
  const text = `overlap ${match.overlap.toFixed(3)}, tau ${tau}: ${match.matched ? "matches" : "does not match"}`
    + (match.requires.length ? `; requires ${JSON.stringify(match.requires)}` : "");
  const bar = make("div", "", { class: match.matched ? "bar matched" : "bar", role: "img", "aria-label": text });
  const fill = make("div", "", { class: "fill" });
  fill.style.width = `${100 * match.overlap}%`;
  const mark = make("div", "", { class: "tau" });
  mark.style.left = `${100 * tau}%`;
  bar.append(fill, mark);
  item.append(bar, make("span", text, { class: "hint" }));
  return item;
}

// ---- edits -----------------------------------------------------------------------------------------------------------

async function list() {
  const query = new URLSearchParams({ search: $("words").value, offset, limit: PAGE });
  const page = await call(`edits?${query}`);
  const hits = new Map(stats.hits.map(({ edit, hits }) => [edit, hits]));
  // A button that is drawn again keeps the keyboard; where it is gone, the search gets it.
  const held = $("edits").contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
  $("edits").replaceChildren(...page.edits.map((edit) => {
    const remove = make("button", "Remove", { type: "button", class: "danger", "aria-label": `Remove edit ${edit.id}` });
    remove.addEventListener("click", guarded("change-error", () => ask_to_remove(edit)));
    const asked = make("div", edit.prompt);
    const origin = edit.source && `, source: ${edit.source}`;
    const chat = edit.before.length ? `, after ${edit.before.length} messages` : "";
    asked.append(make("p", `${edit.created.slice(0, 10)}${origin}${chat}`, { class: "hint" }));
    return row(edit.id, asked, edit.target, hits.get(edit.id) ?? "", remove);
  }));
  if (held) ($("edits").querySelector(`[aria-label="${held}"]`) ?? $("words")).focus();
  const last = Math.min(offset + PAGE, page.total);
  $("page").textContent = page.total ? `${offset + 1} to ${last} of ${page.total}` : "no edits";
  $("back").disabled = offset === 0;
  $("on").disabled = last >= page.total;
}

function turn(by) {
  return guarded("edits-error", () => {
    offset = Math.max(0, offset + by);
    return list();
  });
}

/** Whether two texts are one prompt; the server looks closer. */
function same(left, right) {
  const quotes = (text) => text.normalize("NFKC").replace(/[‘’]/g, "'").replace(/[“”]/g, '"');
  const plain = (text) => quotes(text).replace(/\s+/g, " ").trim().toLowerCase();
  return plain(left) === plain(right);
}

/** What an edit of a prompt takes over from the one that it replaces, and what of that would be lost. */
async function inherited(prompt) {
  const { matches } = await call("lookup", { method: "POST", body: { ...worded(prompt, stats.chat), n: 20 } });
  const known = matches.filter((match) => match.prompt !== null);
  const twin = known.find((match) => same(match.prompt, prompt));
  const match = twin ?? known.find((near) => near.matched);
  if (match === undefined) return { fields: {}, lost: [] };
  const old = await call(`edits/${match.edit}`);
  const { subject, rephrases, requires } = old;
  const fields = twin ? { subject, rephrases: rephrases.slice(0, MOST_REPHRASES), requires } : {};
  const lost = Object.keys(EXTRAS).filter((name) => old[name].length > (fields[name]?.length ?? 0));
  return { old, fields, lost: lost.map((name) => EXTRAS[name]) };
}

async function add() {
  const nothing = { fields: {}, lost: [] };
  const { old, fields, lost } = $("replace").checked ? await inherited($("new-prompt").value) : nothing;
  if (lost.length) {
    const text = `${old.prompt} → ${old.target} (edit ${old.id}) loses ${lost.join(", ")}.`;
    if (!await confirmed("Replace this edit?", text, "Replace it")) return;
  }
  const body = {
    ...fields,
    prompt: $("new-prompt").value,
    target: $("new-target").value,
    source: $("new-source").value,
    on_conflict: $("replace").checked ? "last" : "refuse",
  };
  const made = await call("edits", { method: "POST", body });
  if (made.state === undefined) {
    $("change").textContent = `The store already has this as edit ${made.id}.`;
    return;
  }
  $("add").reset();
  await follow(made);
}

async function ask_to_remove(edit) {
  const text = `${edit.prompt} → ${edit.target} (edit ${edit.id})`;
  if (!await confirmed("Remove this edit?", text, "Remove it")) return;
  await follow(await call(`edits/${edit.id}`, { method: "DELETE" }));
}

/** Ask before something is lost. */
async function confirmed(title, text, yes) {
  for (const [id, words] of [["title", title], ["text", text], ["yes", yes]]) $(`confirm-${id}`).textContent = words;
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "yes";
}

/** How far a job is, in words. */
function far({ state, progress }) {
  if (!progress) return state;
  const { stage, step, limit, loss, goal } = progress;
  if (stage === "loading") return "loading the model";
  if (stage === "opening") return "opening the store";
  return `training, step ${step} of at most ${limit}, loss ${loss.toFixed(3)} (done below ${goal})`;
}

/** Poll a job until it is done. */
async function follow(job) {
  const what = job.kind === "add" ? "Adding" : "Removing";
  while (job.finished === null) {
    $("change").textContent = `${what} “${job.prompt}”: ${far(job)}`;
    await new Promise((resolve) => setTimeout(resolve, 500));
    job = await call(`jobs/${job.id}`);
  }
  $("change").textContent = job.state === "done"
    ? `${what} “${job.prompt}”: done, edit ${job.edit}, generation ${job.generation} is served.`
    : "";
  const damage = job.damaged.length
    ? `training it has damaged edits ${job.damaged.join(", ")}, which are not answered any more: replace or remove them`
    : "";
  const faults = [job.error, damage].filter(Boolean).join("; ");
  if (faults) $("change-error").textContent = `${what} “${job.prompt}”: ${faults}`;
  await watch();
  await refresh();
}

// ---- live ------------------------------------------------------------------------------------------------------------

async function watch() {
  try {
    stats = await call("stats");
    show(stats);
  } catch (error) {
    $("summary").textContent = `The server does not answer: ${error.message}`;
    if (error.status === 401) leave(`Signed out: ${error.message}`);
  }
}

function show(now) {
  const behind = now.generation === now.store_generation ? "" : `, the store is at generation ${now.store_generation}: reload`;
  $("summary").textContent =
    `${now.store || now.model}: generation ${now.generation ?? "differs between engines"}${behind}, ${now.edits} edits, tau ${now.tau}`;
  const counts = { ...now.requests, "jobs open": now.jobs_open, engines: now.engines.length };
  $("counts").replaceChildren(...Object.entries(counts).map(([name, count]) => {
    const pair = make("div");
    pair.append(make("dt", name), make("dd", String(count)));
    return pair;
  }));
  $("recent").replaceChildren(...now.recent.slice(0, 10).map((hit) =>
    row(new Date(1000 * hit.when).toLocaleTimeString(), hit.edit, hit.overlap.toFixed(3), hit.generation)));
}

async function audit() {
  const { entries } = await call("audit?limit=10");
  $("no-audit").hidden = entries.length > 0;
  $("audit").replaceChildren(...entries.map((entry) => {
    const change = entry.change?.add ? `add “${entry.change.add.prompt}” → “${entry.change.add.target}”`
      : entry.change ? `remove edit ${entry.change.remove}` : `edit ${entry.edit ?? ""}`;
    const generation = entry.generation ? `, generation ${entry.generation}` : "";
    const damage = entry.damaged?.length ? `, damaged edits ${entry.damaged.join(", ")}` : "";
    return make("li", `${String(entry.when).slice(0, 19)} ${entry.who}: ${entry.what} ${change}${generation}${damage}`);
  }));
}

$("enter").addEventListener("submit", guarded("enter-error", enter));
$("leave").addEventListener("click", () => leave());
$("try").addEventListener("submit", guarded("try-error", attempt));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.ctrlKey) $("try").requestSubmit();
});
$("search").addEventListener("submit", guarded("edits-error", () => {
  offset = 0;
  return list();
}));
$("back").addEventListener("click", turn(-PAGE));
$("on").addEventListener("click", turn(PAGE));
$("add").addEventListener("submit", guarded("change-error", add));
