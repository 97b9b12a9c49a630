// The live page: asks the API what is going on, and shows it.
//
// Two loops: one lists virtual machines and operations, one for each running operation follows it, by its events or,
// where those are not to be had, by asking. What the API tells goes into the page as text, never as markup.
"use strict";

const LIST_INTERVAL_MS = 2000;
const POLL_INTERVAL_MS = 500;
// A browser has six connections to a host; the lists and an abort need some.
const STREAMS_MAX = 3;
// Rates are those of so long a time, and are drawn for so long.
const RATE_WINDOW_MS = 1000;
const CHART_MS = 60000;
const CHART = { width: 600, height: 120 };
const ENDED_SHOWN = 10;
const PHASES = ["queued", "preparing", "arming", "frozen", "copying", "draining", "committing"];
const OUTCOMES = ["completed", "aborted", "failed"];
const VERIFIED = { running: "being verified", sound: "sound", failed: "not sound" };

// Units.

function scaled(value, units, step) {
  let unit = 0;
  while (value >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  return `${value.toFixed(value < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

function bytes(count) {
  return count == null ? "–" : scaled(count, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
}

function rate(bytesPerSecond) {
  return bytesPerSecond == null ? "–" : `${bytes(bytesPerSecond)}/s`;
}

function duration(ns) {
  if (ns == null) return "–";
  return ns < 1e9 ? scaled(ns, ["ns", "µs", "ms"], 1000) : seconds(ns / 1e9);
}

function seconds(value) {
  if (value == null) return "–";
  return value < 90 ? `${value.toFixed(1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

function percent(share) {
  return share == null ? "–" : `${Math.round(share * 100)} %`;
}

function instant(text) {
  return text ? new Date(text).toLocaleString() : "–";
}

// The upper edge of the bucket that a quantile lies in: it is no more than that.
function quantile(histogram, share) {
  let left = histogram.count * share;
  for (const [upper, count] of histogram.buckets) {
    left -= count;
    if (left <= 0) return Math.min(upper, histogram.max_ns);
  }
  return histogram.count ? histogram.max_ns : null;
}

// The API.

const TOKEN = "token";

async function call(path, options) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { ...options, headers });
  element("token-form").hidden = answer.status !== 401;
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.detail || told.title || `the daemon answered ${answer.status}`);
}

// The browser keeps the entity tag, and what it stands for.
const ask = async (path) => (await call(path, { cache: "no-cache" })).json();

const pathOf = (id) => `/snapshot/${encodeURIComponent(id)}`;
const idOf = (path) => path?.slice(path.lastIndexOf("/") + 1);

// The page.

const element = (id) => document.getElementById(id);

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function announce(text) {
  element("announcement").textContent = text;
}

function connection(isThere, text) {
  const node = element("connection");
  node.dataset.state = isThere ? "there" : "lost";
  setText(node, text);
}

// Rows of cells; a cell is a text, or a text and a class. Left alone if nothing changed, for whoever is reading.
function fill(body, rows, none) {
  const shown = JSON.stringify(rows);
  if (body.dataset.shown === shown) return;
  body.dataset.shown = shown;
  const isEmpty = rows.length === 0;
  body.replaceChildren(...(isEmpty ? [[none]] : rows).map((cells) => {
    const row = document.createElement("tr");
    row.className = isEmpty ? "none" : "";
    for (const cell of cells) {
      const [text, name] = Array.isArray(cell) ? cell : [cell, ""];
      const node = row.insertCell();
      node.textContent = text;
      node.className = name;
      if (isEmpty) node.colSpan = body.parentElement.tHead.rows[0].cells.length;
    }
    return row;
  }));
}

// Those that run, and the ids of those that did.
const followers = new Map();
const over = new Set();

// A running operation.
class Follower {
  constructor(operation) {
    this.id = operation.id;
    this.vm = operation.vm;
    this.samples = [];
    this.points = [];
    this.root = element("operation").content.cloneNode(true).firstElementChild;
    this.fields = Object.fromEntries(
      [...this.root.querySelectorAll("[data-field]")].map((node) => [node.dataset.field, node]),
    );
    this.root.setAttribute("aria-label", `Snapshot of ${this.vm}`);
    this.fields.abort.setAttribute("aria-label", `Abort the snapshot of ${this.vm}`);
    this.fields.progress.setAttribute("aria-label", "Memory saved, in percent");
    this.fields.buffer.setAttribute("aria-label", "Copy buffer in use");
    this.fields.abort.addEventListener("click", () => askToAbort(this));
    this.fields.phases.append(...PHASES.map((phase) => {
      const item = document.createElement("li");
      item.textContent = phase;
      return item;
    }));
    element("running").append(this.root);
    followers.set(this.id, this);
    this.show(operation);
    this.follow();
  }

  follow() {
    const streams = [...followers.values()].filter((other) => other.stream).length;
    // Events are asked for without headers, and so without a token.
    if (streams >= STREAMS_MAX || sessionStorage.getItem(TOKEN)) return this.poll();
    this.stream = new EventSource(`${pathOf(this.id)}/events`);
    const show = (event) => this.show(JSON.parse(event.data));
    for (const name of ["message", "operation"]) this.stream.addEventListener(name, show);
    this.stream.addEventListener("error", () => {
      // The browser connects anew by itself, unless the daemon will not have it.
      if (this.stream?.readyState === EventSource.CLOSED) {
        this.stream = null;
        this.poll();
      }
    });
  }

  async poll() {
    while (followers.get(this.id) === this) {
      try {
        this.show(await ask(pathOf(this.id)));
      } catch {
        // The list tells whether the daemon is gone, or the operation.
      }
      await new Promise((wake) => setTimeout(wake, POLL_INTERVAL_MS));
    }
  }

  close() {
    this.stream?.close();
    this.stream = null;
    followers.delete(this.id);
    over.add(this.id);
    const hadFocus = this.root.contains(document.activeElement);
    this.root.remove();
    if (hadFocus) element("running").focus();
  }

  show(operation) {
    // Events and answers may overtake each other.
    if (this.version > operation.version) return;
    this.version = operation.version;
    if (OUTCOMES.includes(operation.state)) {
      announce(`${this.vm}: ${operation.state}`);
      this.close();
      list();
      return;
    }
    if (this.state !== operation.state) {
      this.state = operation.state;
      announce(`${this.vm}: ${operation.state}`);
      this.showPhases();
    }
    setText(this.fields.vm, this.vm);
    setText(this.fields.id, this.id);
    if (operation.progress) this.showProgress(operation.progress);
  }

  showPhases() {
    const at = PHASES.indexOf(this.state);
    const items = [...this.fields.phases.children];
    if (at < 0) {
      const last = items[items.length - 1];
      const item = last.className === "amiss" ? last : document.createElement("li");
      item.className = "amiss";
      setText(item, this.state);
      this.fields.phases.append(item);
      this.fields.abort.disabled = true;
    }
    items.forEach((item, index) => {
      if (at >= 0) item.className = index < at ? "passed" : "";
      if (index === at) item.setAttribute("aria-current", "step");
      else item.removeAttribute("aria-current");
    });
  }

  showProgress(progress) {
    const { fields } = this;
    const share = progress.total_bytes ? progress.saved_bytes / progress.total_bytes : 0;
    fields.progress.value = share * 100;
    // All is saved only when it is.
    setText(fields.percent, `${Math.floor(share * 100)} %`);
    const took = duration(progress.elapsed_ns);
    setText(fields.saved, `${bytes(progress.saved_bytes)} of ${bytes(progress.total_bytes)}, ${took}`);

    fields.buffer.max = Math.max(progress.buffer_limit_bytes, 1);
    fields.buffer.low = fields.buffer.max * 0.6;
    fields.buffer.high = fields.buffer.max * 0.85;
    fields.buffer.value = progress.buffer_used_bytes;
    setText(fields["buffer-used"], bytes(progress.buffer_used_bytes));
    setText(fields["buffer-limit"], bytes(progress.buffer_limit_bytes));

    this.showRates(progress);
    this.showStalls(progress);
    this.showControl(progress.control);
  }

  showRates(progress) {
    const now = progress.elapsed_ns / 1e6;
    const sample = { at: now, touched: progress.fault_bytes, drained: progress.drained_bytes };
    this.samples.push(sample);
    // The latest that lies a whole window back, or else the first.
    while (this.samples.length > 2 && this.samples[1].at <= now - RATE_WINDOW_MS) this.samples.shift();
    const before = this.samples[0];
    if (now <= before.at) return;
    const perSecond = (field) => (1000 * (sample[field] - before[field])) / (now - before.at);
    const point = { at: now, touch: perSecond("touched"), drain: perSecond("drained") };
    this.points = [...this.points, point].filter(({ at }) => at >= now - CHART_MS);
    setText(this.fields["touch-rate"], rate(point.touch));
    setText(this.fields["drain-rate"], rate(point.drain));

    const first = this.points[0].at;
    const span = Math.max(now - first, 1);
    const highest = Math.max(1, ...this.points.flatMap(({ touch, drain }) => [touch, drain]));
    const line = (field) => this.points.map((each) => {
      const x = (CHART.width * (each.at - first)) / span;
      const y = CHART.height - 2 - ((CHART.height - 4) * each[field]) / highest;
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    }).join(" ");
    this.fields["touch-line"].setAttribute("points", line("touch"));
    this.fields["drain-line"].setAttribute("points", line("drain"));
    setText(this.fields["chart-span"], seconds(span / 1000));
    setText(this.fields["chart-top"], rate(highest));
    this.fields.chart.setAttribute("aria-label", "First touch and drain in the course of time");
  }

  showStalls({ stalls, service }) {
    const { fields } = this;
    const histogram = stalls ?? service;
    if (!histogram) return;
    setText(fields["stall-title"], stalls ? "Stalls of the guest" : "Handler's time for a fault");
    setText(fields["stall-p50"], duration(quantile(histogram, 0.5)));
    setText(fields["stall-p99"], duration(quantile(histogram, 0.99)));
    setText(fields["stall-max"], duration(histogram.max_ns));
    setText(fields["stall-count"], String(histogram.count));
  }

  showControl(control) {
    if (!control) return;
    const { fields } = this;
    const { cpu_ratio_min: least, cpu_ratio_mean: mean } = control;
    setText(fields.action, control.action);
    setText(fields.cpu, least === mean ? percent(mean) : `${percent(mean)}, least ${percent(least)}`);
    setText(fields.withheld, seconds(control.withheld_seconds));
    if (!control.forecast) return;
    setText(fields["forecast-peak"], bytes(control.forecast.peak_buffer_bytes));
    const end = control.forecast.completion_seconds;
    setText(fields["forecast-end"], end == null ? "beyond an hour" : `in ${seconds(end)}`);
  }
}

// Whose snapshot the dialog asks about.
let asked = null;

function askToAbort(follower) {
  asked = follower;
  setText(element("abort-question"), `Abort the snapshot of ${follower.vm}?`);
  element("abort-dialog").showModal();
}

// By the button itself: the dialog's event of its closing may come after it was opened again.
async function abort(follower) {
  follower.fields.abort.disabled = true;
  try {
    await call(`${pathOf(follower.id)}/abort`, { method: "POST" });
  } catch (error) {
    follower.fields.abort.disabled = false;
    connection(false, `not aborted: ${error.message}`);
  }
}

function outcome(operation) {
  const { state, verification, removed_at: removed } = operation;
  const words = [state, VERIFIED[verification?.state], removed && "removed"];
  const isGood = state === "completed" && verification?.state !== "failed";
  return [words.filter(Boolean).join(", "), isGood ? "good" : "bad"];
}

// What was seen of a virtual machine, and what would refuse a snapshot of it.
function condition(seen) {
  if (!seen) return "–";
  const hindrances = [seen.error?.detail, ...seen.refusals.map(({ what, remedy }) => `${what}: ${remedy}`)];
  const told = hindrances.filter(Boolean).join("; ");
  return told ? [`${seen.state}: ${told}`, "bad"] : seen.state;
}

async function list() {
  const [vms, known] = await Promise.all([ask("/vms"), ask("/snapshot")]);
  const operations = known.operations;
  for (const operation of operations) {
    if (OUTCOMES.includes(operation.state)) followers.get(operation.id)?.show(operation);
    // What ended meanwhile may still be running in this list.
    else if (!followers.has(operation.id) && !over.has(operation.id)) new Follower(operation);
  }
  for (const [id, follower] of followers) {
    if (!operations.some((operation) => operation.id === id)) follower.close();
  }
  element("nothing-running").hidden = followers.size > 0;
  fill(element("vms"), vms.vms.map((vm) => [
    vm.name,
    condition(vm.seen),
    followers.get(idOf(vm.operation))?.state ?? "–",
    instant(vm.last_completed_at),
    vm.left_out ? [vm.left_out, "bad"] : instant(vm.next_at),
    vm.qmp,
  ]), "None is configured or was found.");
  const ended = operations.filter((operation) => OUTCOMES.includes(operation.state));
  fill(element("ended"), ended.slice(0, ENDED_SHOWN).map((operation) => [
    instant(operation.ended_at),
    operation.vm,
    outcome(operation),
    operation.schedule ?? "–",
    operation.error?.detail ?? operation.destination,
  ]), "None that is remembered.");
  connection(true, "connected");
}

async function keepListing() {
  for (;;) {
    try {
      await list();
    } catch (error) {
      connection(false, `no answer: ${error.message}`);
    }
    await new Promise((wake) => setTimeout(wake, LIST_INTERVAL_MS));
  }
}

element("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, element("token").value.trim());
  element("token").value = "";
  list().catch((error) => connection(false, `no answer: ${error.message}`));
});

element("abort").addEventListener("click", () => abort(asked));

keepListing();
