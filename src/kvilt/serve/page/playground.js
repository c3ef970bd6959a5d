// The playground: one module, no dependencies. Whatever comes from outside is put into the page as text.

const STEPS = ["queue", "tokenise", "fetch", "plan", "run", "decode"];
const BEFORE = STEPS.slice(0, -1); // the first token
const STEP_HUES = { queue: 0, tokenise: 280, fetch: 210, plan: 45, run: 170, decode: 320 };
const EXAMPLES = [
  { title: "Ada Lorn", text: "Ada Lorn was born in Tavik. Ada Lorn works for Tavik Press." },
  { title: "Tavik Press", text: "Tavik Press is based in Orsa." },
  { title: "Orsa", text: "Orsa is a city in the north. The mayor of Orsa is Ben Hald." },
];
const MEMORY = "kvilt.playground";

const state = {
  documents: new Map(), // id -> what the server says of it
  order: [], // ids in the prompt
  told: new Map(), // id -> the sentence under a document in the drawer
  segments: [], // of the strategy's plan
  strategy: "", // the server's own
  key: sessionStorage.getItem(MEMORY) ?? "",
  answers: 0,
  running: null, // an AbortController while answers are written
  planning: null,
};
const $ = (id) => document.getElementById(id);

/** An element with attributes, handlers (onclick) and children; texts become text nodes. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const number = (n) => n.toLocaleString("en");
const count = (n, what) => `${number(n)} ${what}${n === 1 ? "" : "s"}`;
const seconds = (s) => (s < 0.9995 ? `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)} ms` : `${s.toFixed(2)} s`);
const hueOf = (id) => parseInt(id.slice(0, 6), 16) % 360;
function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const unit = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(n, 1)) / 3)));
  return `${(n / 1000 ** unit).toFixed(unit && n / 1000 ** unit < 10 ? 1 : 0)} ${units[unit]}`;
}

// The server

class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** What the server answers: the response if it is a stream, else its JSON. Throws Failure with the server's own words. */
async function call(method, path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (state.key) headers.authorization = `Bearer ${state.key}`;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?", 0);
  }
  if (response.ok && body?.stream) return response;
  const data = await response.json().catch(() => ({}));
  if (response.status === 401) $("key-form").hidden = false;
  if (!response.ok) throw new Failure(data.error?.message ?? `${response.status} ${response.statusText}`, response.status);
  return data;
}

/** The events of a stream, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request(strategy) {
  const body = {
    messages: [{ role: "user", content: $("question").value.trim() || "?" }],
    documents: state.order.map((id) => ({ id })),
    max_tokens: Number($("tokens").value) || 64,
  };
  return strategy === state.strategy ? body : { ...body, kvilt: { strategy } };
}

// What is said to the user

const say = (text) => ($("status").textContent = text);
const complain = (error) => ($("error").textContent = error ? String(error.message ?? error) : "");

function remember() {
  const kept = {
    order: state.order, question: $("question").value, strategy: $("strategy").value, tokens: $("tokens").value,
    compare: $("compare").checked, again: $("again").checked,
  };
  try {
    localStorage.setItem(MEMORY, JSON.stringify(kept));
  } catch {
    // a browser that keeps nothing
  }
}

function recall() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(MEMORY)) ?? {};
  } catch {
    // nothing was kept
  }
  state.order = Array.isArray(kept.order) ? kept.order : [];
  for (const name of ["question", "tokens"]) if (kept[name]) $(name).value = kept[name];
  for (const name of ["compare", "again"]) if (name in kept) $(name).checked = kept[name];
  return kept.strategy;
}

// The plan bar

const titleOf = (id) => state.documents.get(id)?.title || `document ${id.slice(0, 8)}`;

function segmentsShown() {
  const planned = state.segments.filter((s) => s.kind === "document").map((s) => s.id);
  const fits = planned.length === state.order.length && planned.every((id, n) => id === state.order[n]);
  return fits ? state.segments : state.order.map((id) => ({ kind: "document", id, tokens: state.documents.get(id)?.tokens ?? 0 }));
}

function parts(segment) {
  const kept = segment.kept ?? 0;
  return { kept, reused: Math.max(0, (segment.reused ?? 0) - kept), computed: Math.max(0, (segment.computed ?? 0) - Math.max(0, kept - (segment.reused ?? 0))) };
}

function sums(segments) {
  const total = { reused: 0, kept: 0, computed: 0 };
  for (const s of segments) for (const [kind, n] of Object.entries(parts(s))) total[kind] += n;
  return total;
}

function drawPlan() {
  const focused = document.activeElement?.closest?.("#plan .strip")?.dataset.id;
  const strips = segmentsShown().map((s) => (s.kind === "document" && s.id ? strip(s) : fixed(s)));
  $("plan").replaceChildren(...(strips.length ? strips : [el("li", { class: "empty" }, "No documents in the prompt: tick some, or add one.")]));
  const movable = [...$("plan").querySelectorAll(".strip[data-id]")];
  (movable.find((s) => s.dataset.id === focused) ?? movable[0])?.setAttribute("tabindex", "0");
  if (focused) movable.find((s) => s.dataset.id === focused)?.focus();
  const total = sums(state.segments);
  const known = segmentsShown() === state.segments && state.segments.length;
  $("plan-sum").textContent = known ? `${number(total.computed)} of ${count(total.computed + total.reused + total.kept, "token")} to compute` : "";
}

function strip(segment) {
  const place = state.order.indexOf(segment.id) + 1;
  const { reused, kept, computed } = parts(segment);
  const planned = segment.computed != null;
  const told = !planned ? "" : computed ? (reused + kept ? `${number(computed)} of ${number(segment.tokens)} computed` : "computed") : kept ? "still placed" : "reused";
  const made = el(
    "li",
    {
      class: `strip${planned && computed && !reused && !kept ? " computed" : ""}`, "data-id": segment.id, tabindex: "-1", title: titleOf(segment.id),
      "aria-label": `${titleOf(segment.id)}, ${count(segment.tokens, "token")}${told ? `, ${told}` : ""}, ${place} of ${state.order.length}`,
      onkeydown: (event) => keyOnStrip(event, segment.id), onpointerdown: (event) => drag(event, made),
    },
    el("span", { class: "title" }, titleOf(segment.id)),
    el("span", { class: "told" }, number(segment.tokens)),
    fill({ reused, kept, computed }, "fill"),
  );
  made.style.setProperty("--hue", hueOf(segment.id));
  made.style.flexGrow = segment.tokens;
  return made;
}

function fixed(segment) {
  const what = { system: "system", question: "question", links: "links" }[segment.kind] ?? segment.kind;
  return el("li", { class: "strip fixed" }, el("span", { class: "title" }, what), el("span", { class: "told" }, number(segment.tokens)), fill(parts(segment), "fill"));
}

function fill(amounts, name) {
  const made = el("div", { class: name, "aria-hidden": "true" });
  for (const kind of ["reused", "kept", "computed"]) {
    if (!amounts[kind]) continue;
    const part = el("div", { class: `part-${kind}` });
    part.style.flexGrow = amounts[kind];
    made.append(part);
  }
  return made;
}

function keyOnStrip(event, id) {
  const at = state.order.indexOf(id);
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (step && event.shiftKey) move(id, at + step);
  else if (step || event.key === "Home" || event.key === "End") focusStrip(step ? at + step : event.key === "Home" ? 0 : state.order.length - 1);
  else if (event.key === "Delete" || event.key === "Backspace") {
    choose(id, false);
    focusStrip(Math.min(at, state.order.length - 1));
  } else return;
  event.preventDefault();
}

function focusStrip(at) {
  const strips = [...$("plan").querySelectorAll(".strip[data-id]")];
  if (!strips[at]) return;
  for (const other of strips) other.setAttribute("tabindex", "-1");
  strips[at].setAttribute("tabindex", "0");
  strips[at].focus();
}

/** Put a document at a place of the prompt, and ask again if that is wanted. */
function move(id, to) {
  const from = state.order.indexOf(id);
  if (from < 0 || to < 0 || to >= state.order.length || to === from) return;
  state.order.splice(from, 1);
  state.order.splice(to, 0, id);
  say(`${titleOf(id)} is now ${to + 1} of ${state.order.length}.`);
  changed(true);
}

/** Follow a strip that is dragged; it moves when it is let go. */
function drag(event, dragged) {
  if (event.button) return;
  const strips = () => [...$("plan").querySelectorAll(".strip[data-id]")];
  let target = null, after = false;
  const follow = (at) => {
    if (!dragged.classList.contains("dragged") && Math.hypot(at.clientX - event.clientX, at.clientY - event.clientY) < 5) return;
    dragged.classList.add("dragged");
    const over = document.elementFromPoint(at.clientX, at.clientY)?.closest(".strip[data-id]");
    target = over && over.dataset.id !== dragged.dataset.id ? over : null; // the bar may be drawn anew meanwhile
    const box = target?.getBoundingClientRect();
    after = Boolean(box && at.clientX > box.left + box.width / 2);
    for (const other of strips()) other.classList.remove("before", "after");
    target?.classList.add(after ? "after" : "before");
  };
  const end = (at) => {
    removeEventListener("pointermove", follow);
    removeEventListener("pointerup", end);
    removeEventListener("pointercancel", end);
    for (const other of strips()) other.classList.remove("before", "after", "dragged");
    if (at.type !== "pointerup" || !target) return;
    const rest = state.order.filter((id) => id !== dragged.dataset.id);
    move(dragged.dataset.id, rest.indexOf(target.dataset.id) + (after ? 1 : 0));
  };
  addEventListener("pointermove", follow);
  addEventListener("pointerup", end);
  addEventListener("pointercancel", end);
}

let timer = 0;
/** The prompt is another one: draw it, and ask or plan again when the last change is a moment old. */
function changed(reordered) {
  remember();
  drawPlan();
  for (const box of $("documents").querySelectorAll("input")) box.checked = state.order.includes(box.closest("li").dataset.id);
  clearTimeout(timer);
  const asks = reordered && state.answers && $("again").checked && $("question").value.trim();
  timer = setTimeout(asks ? askAll : plan, asks ? 500 : 200);
}

async function plan() {
  state.planning?.abort();
  if (!state.order.length) return;
  state.planning = new AbortController();
  try {
    const { max_tokens: _, ...body } = request($("strategy").value || state.strategy);
    const told = await call("POST", "/v1/plan", body, state.planning.signal);
    state.segments = told.segments;
    drawPlan();
    complain();
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
}

// Answers

class Column {
  constructor(id, title) {
    this.root = $(id);
    this.title = el("h2", { id: `${id}-title` }, title);
    this.time = el("span", { class: "ttft" });
    this.track = el("div", { class: "track", role: "img", "aria-label": "Parts of the prompt" });
    this.spent = el("div", { class: "track", role: "img", "aria-label": "Where the time until the first token went" });
    this.steps = new Map(STEPS.map((step) => [step, el("dd", {}, "–")]));
    this.text = el("div", { class: "answer", "aria-live": "polite", "data-empty": "Nothing asked yet.", tabindex: "0", role: "region", "aria-labelledby": `${id}-title` });
    this.sum = el("p", { class: "sum" });
    const list = STEPS.map((step) => {
      const mark = el("i");
      mark.style.background = `hsl(${STEP_HUES[step]} 45% 55%)`;
      return el("div", {}, mark, el("dt", {}, step), this.steps.get(step));
    });
    this.root.append(el("header", {}, this.title, this.time), this.track, this.spent, el("dl", { class: "steps" }, ...list), this.text, this.sum);
    this.clock();
  }

  name(title) {
    this.title.textContent = title;
  }

  clock(s) {
    const label = el("small", {}, s == null ? "" : " first token");
    this.time.replaceChildren(s == null ? "–" : seconds(s), label);
  }

  begin(note = "Waiting for the first token …") {
    this.text.textContent = this.sum.textContent = "";
    this.text.classList.remove("failed");
    this.text.dataset.empty = note;
    for (const shown of this.steps.values()) shown.textContent = "–";
    this.track.replaceChildren();
    this.spent.replaceChildren();
    this.spends = null;
    this.clock();
  }

  fail(message) {
    this.text.textContent = message;
    this.text.classList.add("failed");
  }

  /** Ask with a strategy; the receipt and the seconds until the first token came. */
  async ask(strategy, signal) {
    this.name(strategy);
    this.begin();
    const began = performance.now();
    let first = null, receipt = null;
    const tick = () => {
      if (first != null || signal.aborted || this.text.classList.contains("failed")) return;
      this.clock((performance.now() - began) / 1000);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
    try {
      const response = await call("POST", "/v1/chat/completions", { ...request(strategy), stream: true }, signal);
      for await (const event of events(response)) {
        if (event.error) throw new Failure(event.error.message, event.error.code);
        const piece = event.choices?.[0]?.delta?.content;
        if (piece) {
          first ??= (performance.now() - began) / 1000;
          this.clock(first);
          this.text.append(piece);
          this.text.scrollTop = this.text.scrollHeight;
        }
        receipt = event.kvilt ?? receipt;
      }
      if (!receipt) throw new Failure("The answer was cut off.", 0);
      first ??= (performance.now() - began) / 1000;
      this.clock(first);
      if (!this.text.textContent) this.text.dataset.empty = "(an empty answer)";
      this.show(receipt);
      drawTimes();
      return { receipt, first };
    } catch (error) {
      if (error.name === "AbortError") this.text.dataset.empty = "Stopped.";
      else this.fail(error.message);
      throw error;
    } finally {
      first ??= 0;
    }
  }

  show(receipt) {
    const whole = receipt.segments.reduce((sum, s) => sum + (s.reused ?? 0) + (s.computed ?? 0), 0);
    let document = 0; // the same one has the same colour in both columns, whatever its key is
    const shown = receipt.segments.flatMap((s) => {
      const hue = s.id && hueOf(state.order[document++] ?? s.id);
      return Object.entries(parts(s)).filter(([, n]) => n).map(([kind, n]) => {
        const part = el("div", { class: `part-${kind}${s.id ? "" : " text"}`, title: `${s.title ?? s.kind}: ${number(n)} ${kind}` });
        if (s.id) part.style.setProperty("--hue", hue);
        part.style.width = `${(100 * n) / whole}%`;
        return part;
      });
    });
    this.track.replaceChildren(...shown);
    for (const step of STEPS) this.steps.get(step).textContent = receipt.steps[step] == null ? "–" : seconds(receipt.steps[step]);
    this.spends = BEFORE.map((step) => [step, receipt.steps[step] ?? 0]);
    const { reused, kept, computed } = sums(receipt.segments);
    const still = kept ? `, ${number(kept)} still placed` : "";
    this.sum.replaceChildren(
      el("b", {}, `${count(receipt.hits, "hit")}, ${count(receipt.misses, "miss").replace("misss", "misses")}`),
      ` · ${number(reused)} tokens reused${still}, ${number(computed)} computed · ${(100 * receipt.charged).toFixed(1)} % of full recompute charged · ${bytes(receipt.bytes_loaded)} loaded`,
      receipt.note ? ` · ${receipt.note}` : "",
    );
  }
}

/** Where the time until the first token went, in all columns on one scale. */
function drawTimes() {
  const columns = [ours, full].filter((column) => column.spends);
  const longest = Math.max(...columns.map((column) => column.spends.reduce((sum, [, took]) => sum + took, 0)));
  for (const { spends, spent } of columns) {
    const shown = spends.filter(([, took]) => took).map(([step, took]) => {
      const part = el("div", { title: `${step}: ${seconds(took)}` });
      part.style.width = `${(100 * took) / longest}%`;
      part.style.background = `hsl(${STEP_HUES[step]} 45% 55%)`;
      return part;
    });
    spent.replaceChildren(...shown);
  }
}

async function askAll() {
  clearTimeout(timer);
  if (!$("question").value.trim()) return $("question").focus();
  if (!state.order.length) return complain("No documents in the prompt: tick some, or add one.");
  state.running?.abort();
  state.planning?.abort();
  const running = (state.running = new AbortController());
  $("stop").disabled = false;
  complain();
  remember();
  const strategy = $("strategy").value || state.strategy;
  try {
    if ($("compare").checked && strategy !== "full") full.begin("Waiting for the other answer …");
    else full.begin("Not asked.");
    const mine = await ours.ask(strategy, running.signal);
    state.segments = mine.receipt.segments;
    drawPlan();
    file(mine);
    if ($("compare").checked && strategy !== "full") {
      const whole = await full.ask("full", running.signal);
      file(whole);
      const times = whole.first / mine.first;
      say(`First token after ${seconds(mine.first)}, after ${seconds(whole.first)} with full recompute${times > 1.05 ? `: ${times.toFixed(1)} times sooner` : ""}.`);
    } else say(`First token after ${seconds(mine.first)}.`);
    await refresh();
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  } finally {
    if (state.running === running) {
      state.running = null;
      $("stop").disabled = true;
    }
  }
}

/** A receipt becomes a line of the table. */
function file({ receipt, first }) {
  state.answers += 1;
  const order = receipt.documents.map((d) => d.title || d.id.slice(0, 8)).join(" → ");
  const numbers = [receipt.hits, receipt.misses, receipt.reused_tokens, receipt.computed_tokens].map((n) => el("td", { class: "n" }, number(n)));
  const row = el(
    "tr", {}, el("td", {}, `${state.answers}`), el("td", {}, receipt.strategy), el("td", { class: "order", title: order }, order), ...numbers,
    el("td", { class: "n" }, `${(100 * receipt.charged).toFixed(1)} %`), el("td", { class: "n" }, bytes(receipt.bytes_loaded)), el("td", { class: "n" }, seconds(first)),
  );
  $("receipts").querySelector(".none")?.remove();
  $("receipts").prepend(row);
  while ($("receipts").children.length > 30) $("receipts").lastChild.remove();
}

// The drawer

async function refresh() {
  const listed = await call("GET", "/v1/documents?limit=1000");
  const own = listed.data.filter((d) => d.kind === "document");
  state.documents = new Map(own.map((d) => [d.id, d]));
  const there = state.order.filter((id) => state.documents.has(id));
  const lost = there.length < state.order.length;
  state.order = there;
  const more = listed.has_more ? `, the first ${number(own.length)} shown` : "";
  $("drawer-sum").textContent = own.length ? `${number(own.length)}, ${bytes(own.reduce((sum, d) => sum + d.bytes, 0))}${more}` : "";
  drawDocuments();
  if (lost) {
    remember();
    drawPlan();
  }
}

function drawDocuments() {
  const focus = document.activeElement?.dataset?.tool;
  const items = [...state.documents.values()].map(listed);
  $("documents").replaceChildren(...(items.length ? items : [el("li", { class: "none" }, "Nothing is stored yet.")]));
  if (focus) $("documents").querySelector(`[data-tool="${CSS.escape(focus)}"]`)?.focus();
}

function listed(d) {
  const name = titleOf(d.id);
  const told = state.told.get(d.id);
  const facts = [count(d.tokens, "token"), bytes(d.bytes), count(d.hits, "hit"), d.pinned && "pinned", d.compression];
  const tool = (what, label, does) =>
    el("button", { type: "button", class: "plain", "data-tool": `${what}-${d.id}`, "aria-label": `${label} ${name}`, onclick: () => attempt(does) }, label);
  return el(
    "li", { "data-id": d.id },
    el("input", { type: "checkbox", checked: state.order.includes(d.id), "data-tool": `use-${d.id}`, "aria-label": `${name} in the prompt`, onchange: (e) => choose(d.id, e.target.checked) }),
    el("button", { type: "button", class: "name", "data-tool": `read-${d.id}`, title: `Read ${name}`, onclick: () => attempt(() => read(d.id)) }, name),
    el("span", { class: `told${told?.bad ? " bad" : ""}`, title: `encoded ${d.encoding}` }, told?.text ?? facts.filter(Boolean).join(" · ")),
    el("span", { class: "tools" }, tool("verify", "verify", () => verify(d.id)), tool("pin", d.pinned ? "unpin" : "pin", () => pin(d)), tool("delete", "delete", () => remove(d.id))),
  );
}

/** Do something, and say what went wrong if it does. */
async function attempt(work) {
  try {
    complain();
    await work();
  } catch (error) {
    complain(error);
  }
}

function choose(id, wanted) {
  state.order = state.order.filter((other) => other !== id);
  if (wanted) state.order.push(id);
  say(`${titleOf(id)} is ${wanted ? "in" : "out of"} the prompt.`);
  changed(false);
}

async function read(id) {
  const told = await call("GET", `/v1/documents/${id}?text=yes`);
  $("reader-title").textContent = titleOf(id);
  $("reader-text").textContent = told.text;
  $("reader").showModal();
}

async function verify(id) {
  const told = await call("POST", `/v1/documents/${id}/verify`);
  state.told.set(id, { text: told.ok ? "every byte is as it was written" : `damaged: ${told.reason}`, bad: !told.ok });
  say(`${titleOf(id)}: ${told.ok ? "sound" : told.reason}`);
  drawDocuments();
  if (!told.ok) setTimeout(() => attempt(refresh), 3000);
}

async function pin(d) {
  await call("POST", `/v1/documents/${d.id}/${d.pinned ? "unpin" : "pin"}`);
  say(`${titleOf(d.id)} is ${d.pinned ? "no longer pinned" : "kept whatever else must go"}.`);
  await refresh();
}

async function remove(id) {
  const name = titleOf(id);
  await call("DELETE", `/v1/documents/${id}`);
  state.order = state.order.filter((other) => other !== id);
  await refresh();
  say(`${name} is deleted.`);
  changed(false);
}

/** Encode documents one after another, with progress; those that cannot be encoded are named. */
async function add(documents) {
  const bar = $("progress"), failed = [];
  bar.max = documents.length;
  bar.value = 0;
  bar.classList.add("on");
  $("add-button").disabled = true;
  for (const given of documents) {
    say(`Encoding ${bar.value + 1} of ${documents.length}: ${given.title ?? given.id ?? "a document"}`);
    try {
      const [told] = (await call("POST", "/v1/documents", { documents: [given], wait: true })).data;
      if (!told.stored) throw new Failure(told.error ?? "it could not be stored.", 0);
      if (!state.order.includes(told.id)) state.order.push(told.id);
    } catch (error) {
      failed.push(`${given.title ?? given.id ?? "the document"}: ${error.message}`);
    }
    bar.value += 1;
  }
  bar.classList.remove("on");
  $("add-button").disabled = false;
  say(`${count(documents.length - failed.length, "document")} encoded.`);
  await refresh();
  changed(false);
  if (failed.length) throw new Failure(failed.slice(0, 3).join(" ") + (failed.length > 3 ? ` And ${failed.length - 3} more.` : ""), 0);
}

/** The documents of a file: a .jsonl has one a line; a heading in the first line of an .md is its title. */
async function documentsOf(file) {
  const text = (await file.text()).replaceAll("\r\n", "\n");
  if (/\.jsonl$/i.test(file.name)) {
    return text.split("\n").map((line, n) => [line, n + 1]).filter(([line]) => line.trim()).map(([line, n]) => {
      try {
        const { text, title, id } = JSON.parse(line);
        if (typeof text === "string") return { text, ...(title && { title: String(title) }), id: String(id ?? `${file.name}:${n}`) };
      } catch {
        // told below
      }
      throw new Failure(`${file.name}:${n} is no document: write {"text": "..."}.`, 0);
    });
  }
  const heading = /\.md$/i.test(file.name) && /^\s*#{1,6} +(.+?)[# ]*\n+([^]*\S[^]*)$/.exec(text);
  return [heading ? { title: heading[1], text: heading[2], id: file.name } : { text, id: file.name }];
}

async function addFiles(files) {
  const documents = [], bad = [];
  for (const file of files) {
    try {
      if (!/\.(txt|md|jsonl)$/i.test(file.name)) throw new Failure(`${file.name} is none of .txt, .md, .jsonl.`, 0);
      documents.push(...(await documentsOf(file)));
    } catch (error) {
      bad.push(error.message);
    }
  }
  if (documents.length) await add(documents);
  if (bad.length) throw new Failure(bad.join(" "), 0);
}

// The same request elsewhere

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl() {
  const key = state.key ? ` \\\n  -H "Authorization: Bearer $KVILT_KEY"` : "";
  return `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(request($("strategy").value), null, 1))}\n`;
}

function asPython() {
  const { documents, kvilt, ...rest } = request($("strategy").value);
  const literal = (value) => JSON.stringify(value).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const key = state.key ? 'os.environ["KVILT_KEY"]' : '"none"';
  return `${state.key ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=${key})
answer = client.chat.completions.create(
    model=${literal($("model").dataset.id ?? "")},
    messages=${literal(rest.messages)},
    max_tokens=${rest.max_tokens},
    extra_body=${literal({ documents, ...(kvilt && { kvilt }) })},
)
print(answer.choices[0].message.content)
print(answer.usage.prompt_tokens_details.cached_tokens, "tokens reused")
`;
}

async function copy(what, text) {
  $("reader-title").textContent = `As ${what}`;
  $("reader-text").textContent = text;
  $("reader").showModal();
  try {
    await navigator.clipboard.writeText(text);
    say(`Copied as ${what}.`);
  } catch {
    say("This browser copies nothing: select the text.");
  }
}

// Beginning

const ours = new Column("ours", "Strategy");
const full = new Column("full", "full");

async function start() {
  const { data: [model] } = await call("GET", "/v1/models");
  const told = model.kvilt ?? {};
  state.strategy = told.strategy ?? "";
  $("model").dataset.id = model.id;
  $("model").textContent = [model.id, told.dtype, told.context_length && `${number(told.context_length)} tokens of context`, told.compress].filter(Boolean).join(" · ");
  const chosen = recall();
  const names = told.strategies ?? [state.strategy];
  $("strategy").replaceChildren(...names.map((name) => el("option", { value: name, selected: name === (names.includes(chosen) ? chosen : state.strategy) }, name)));
  ours.name($("strategy").value);
  $("key-form").hidden = true;
  await refresh();
  drawPlan();
  await plan();
}

$("ask").addEventListener("submit", (event) => (event.preventDefault(), askAll()));
$("stop").addEventListener("click", () => state.running?.abort());
for (const id of ["strategy", "compare", "again", "tokens"]) $(id).addEventListener("change", () => changed(false));
$("question").addEventListener("change", () => changed(false));
$("strategy").addEventListener("change", () => ours.name($("strategy").value));
$("copy-curl").addEventListener("click", () => copy("curl", asCurl()));
$("copy-python").addEventListener("click", () => copy("Python", asPython()));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  sessionStorage.setItem(MEMORY, state.key);
  attempt(start);
});
$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value, title = $("title").value.trim();
  if (!text.trim()) return $("text").focus();
  attempt(async () => {
    await add([{ text, ...(title && { title }) }]);
    $("text").value = $("title").value = "";
  });
});
$("files").addEventListener("change", (event) => attempt(async () => {
  await addFiles([...event.target.files]);
}).finally(() => (event.target.value = "")));
$("examples").addEventListener("click", () => attempt(async () => {
  $("question").value ||= "Where was Ada Lorn born?";
  await add(EXAMPLES);
}));
for (const name of ["dragover", "dragleave", "drop"]) {
  $("add").addEventListener(name, (event) => {
    event.preventDefault();
    $("add").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) attempt(() => addFiles([...event.dataTransfer.files]));
  });
}
attempt(start);
