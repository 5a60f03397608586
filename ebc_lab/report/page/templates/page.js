// Adds to a page that is complete without it: sorting, filtering, downloading, enlarging, copying, the theme, and, under `watch`, refreshing.
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const button = (text, label, act) => {
    const made = make("button", text, { type: "button" });
    if (label) made.setAttribute("aria-label", label);
    made.addEventListener("click", act);
    return made;
  };
  const kept = {
    get(key) { try { return localStorage.getItem(key); } catch { return null; } },
    set(key, value) { try { localStorage.setItem(key, value); } catch { /* a browser that keeps nothing */ } },
  };

  // -- the theme ---------------------------------------------------------------------------------------------------------
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (prefers.matches ? "dark" : "light")) === "dark";
  function theme() {
    const tools = document.getElementById("tools");
    if (!tools || tools.childElementCount) return;
    const toggle = button("", "", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      kept.set("ebc-lab-theme", root.dataset.theme);
      name();
    });
    const name = () => { toggle.textContent = dark() ? "Light" : "Dark"; toggle.setAttribute("aria-label", `Change to ${dark() ? "light" : "dark"} colours`); };
    toggle.id = "theme";
    prefers.addEventListener("change", name);
    name();
    tools.append(toggle);
  }

  // -- tables ------------------------------------------------------------------------------------------------------------
  const sorted = {}; // table id -> [column, direction], for a part that is refreshed
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    if (text === "" || text === "–" || cell.classList.contains("number") && isNaN(Number(text))) return null;
    return cell.classList.contains("number") ? Number(text) : text;
  };
  function sort(table, column, direction) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is not known stays last
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return direction === "ascending" ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
    [...table.tHead.rows[0].cells].forEach((th, i) => (i === column ? th.setAttribute("aria-sort", direction) : th.removeAttribute("aria-sort")));
    sorted[table.id] = [column, direction];
  }
  function sortable(table) {
    [...table.tHead.rows[0].cells].forEach((th, column) => {
      const text = th.textContent.trim();
      if (!text || th.querySelector("button")) return;
      const control = button("", "", () => sort(table, column, th.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending"));
      control.append(...th.childNodes);
      th.append(control);
    });
    if (sorted[table.id]) sort(table, ...sorted[table.id]);
  }

  const filtered = {}; // table id -> what its filters were set to
  function filters(box) {
    const table = document.getElementById(box.dataset.filters);
    if (!table) return;
    const rows = [...table.tBodies[0].rows], text = box.querySelector("[data-filter-text]"), choices = all("[data-filter]", box);
    const words = rows.map((row) => row.textContent.toLowerCase());
    const heads = [...table.tHead.rows[0].cells].map((th) => th.textContent.trim());
    const kindOf = (row, choice) => row.cells[heads.indexOf(choice.dataset.filter)].textContent.trim().split(/\s/)[0];
    for (const choice of choices) choice.append(...new Set(rows.map((row) => kindOf(row, choice))).values().map((kind) => make("option", kind)));
    const apply = () => {
      const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        const fits = wanted.every((w) => words[i].includes(w)) && choices.every((c) => !c.value || kindOf(row, c) === c.value);
        row.hidden = !fits;
        shown += fits;
      });
      box.querySelector("[data-filter-count]").textContent = `${shown} of ${rows.length} runs shown`;
      filtered[table.id] = [text.value, ...choices.map((c) => c.value)];
    };
    if (filtered[table.id]) [text, ...choices].forEach((control, i) => (control.value = filtered[table.id][i]));
    text.addEventListener("input", apply);
    choices.forEach((c) => c.addEventListener("change", apply));
    box.querySelector("[data-filter-clear]").addEventListener("click", () => {
      [text, ...choices].forEach((c) => (c.value = ""));
      apply();
    });
    box.hidden = false;
    apply();
  }
  // the whole of a table as comma-separated values (RFC 4180), with figures in full
  const PLAIN = /^[×+−-]?[\d.,]+(e[+−-]?\d+)?%?$/;
  const FORMULA = /^[=+\-@\t\r]/; // a spreadsheet would run such a text
  function textOf(cell) {
    const copy = cell.cloneNode(true);
    all('[aria-hidden="true"]', copy).forEach((mark) => mark.remove());
    all("br", copy).forEach((line) => line.replaceWith(" "));
    return copy.textContent.trim().replace(/\s+/g, " ");
  }
  function fieldOf(cell) {
    let text = textOf(cell);
    if (cell.dataset.value !== undefined && PLAIN.test(text)) return cell.dataset.value;
    if (FORMULA.test(text) && isNaN(Number(text))) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }
  function csv(table) {
    const kept = [...table.tHead.rows[0].cells].flatMap((th, i) => (th.hasAttribute("data-drawn") ? [] : [i]));
    const lines = [table.tHead.rows[0], ...table.tBodies[0].rows].map((row) => kept.map((i) => fieldOf(row.cells[i])).join(","));
    return lines.map((line) => `${line}\r\n`).join("");
  }
  function downloadable(table) {
    const caption = table.closest(".captioned").querySelector(".caption");
    if (caption.querySelector("button")) return;
    const control = button("CSV", `Download as CSV: ${caption.querySelector("strong").textContent}`, () => {
      const url = URL.createObjectURL(new Blob([csv(table)], { type: "text/csv;charset=utf-8" }));
      const study = document.querySelector(".eyebrow strong").textContent;
      make("a", "", { href: url, download: `${study}_${table.id}.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    });
    control.className = "csv";
    caption.append(" ", control);
  }

  // a link into what is folded opens it
  addEventListener("click", (event) => {
    const target = event.target.closest?.('a[href^="#"]')?.getAttribute("href").slice(1);
    const fold = target && document.getElementById(target)?.closest("details");
    if (fold) fold.open = true;
  });
  // a link to a run that the filter hides shows it again
  addEventListener("hashchange", () => {
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (row && row.hidden) all("[data-filter-clear]").forEach((clear) => clear.click());
    if (row && row.matches("tr")) row.scrollIntoView({ block: "center" });
  });

  // -- figures -----------------------------------------------------------------------------------------------------------
  const viewer = document.getElementById("viewer");
  let shown = null, opener = null;
  const figures = () => all("figure.figure:not(.scripted .static *)");
  function show(figure) {
    shown = figure.id;
    const image = figure.querySelector("img"), large = document.getElementById("viewer-image");
    large.src = image.src;
    large.alt = image.alt;
    document.getElementById("viewer-title").textContent = figure.querySelector("figcaption").dataset.title;
    if (!viewer.open) {
      opener = figure.id;
      viewer.showModal();
    }
  }
  function step(by) {
    const there = figures(), now = there.findIndex((f) => f.id === shown);
    show(there[(now + by + there.length) % there.length]);
  }
  function enlargeable(figure) {
    const caption = figure.querySelector("figcaption");
    if (caption.querySelector("button")) return;
    const control = button("Enlarge", `Enlarge: ${caption.dataset.title}`, () => show(figure));
    control.className = "zoom";
    caption.append(control);
    figure.querySelector("img").addEventListener("click", () => show(figure));
  }
  if (viewer) {
    viewer.querySelector("[data-close]").addEventListener("click", () => viewer.close());
    all("[data-step]", viewer).forEach((b) => b.addEventListener("click", () => step(Number(b.dataset.step))));
    viewer.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    viewer.addEventListener("close", () => document.getElementById(opener)?.querySelector("button").focus());
  }

  // -- commands, printing ------------------------------------------------------------------------------------------------
  function copyable(box) {
    if (box.querySelector("button")) return;
    const text = box.querySelector("code").textContent;
    const control = button("Copy", `Copy: ${text}`, async () => {
      let done = true;
      try { await navigator.clipboard.writeText(text); } catch {
        getSelection().selectAllChildren(box.querySelector("code")); // at least ready for the keyboard
        done = false;
      }
      control.textContent = done ? "Copied" : "Selected";
    });
    box.append(control);
  }
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((d) => (d.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((d) => (d.open = false)));

  // -- all of it, and again for what is refreshed ------------------------------------------------------------------------
  function enhance(within) {
    all("table[data-sortable]", within).forEach((table) => { sortable(table); downloadable(table); });
    all("[data-filters]", within).forEach(filters);
    all("figure.figure", within).forEach(enlargeable);
    all(".command", within).forEach(copyable);
    document.dispatchEvent(new CustomEvent("ebc-lab-fresh", { detail: within }));
    theme();
  }
  const stored = kept.get("ebc-lab-theme");
  if (stored === "light" || stored === "dark") root.dataset.theme = stored;
  const parts = new Map(all("[data-part]").map((part) => [part.id, part.outerHTML])); // as they came

  // -- a study in progress: take over the parts that have changed, and leave the reader where they are ----------------------
  let version = null, silent = false;
  async function look() {
    try {
      const state = await (await fetch("state", { cache: "no-store" })).json();
      if (version !== null && state.version !== version && !viewer?.open) await refresh();
      if (version === null || !viewer?.open) version = state.version;
      if (silent) { document.getElementById("gone")?.remove(); silent = false; }
    } catch {
      if (!silent) {
        const said = make("p", "ebc-lab watch has ended: this is what was last seen.", { id: "gone", class: "warning", role: "status" });
        document.getElementById("content").prepend(said);
        silent = true;
      }
    }
    setTimeout(look, silent ? 10000 : 2000);
  }
  async function refresh() {
    const text = await (await fetch("./", { cache: "no-store" })).text();
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const incoming = all("[data-part]", fresh);
    const names = (list) => list.map((part) => part.id).join();
    if (names(incoming) !== names(all("[data-part]"))) {
      if (!incoming.some((part) => document.getElementById(part.id))) return location.reload(); // from, or to, a message
    }
    const top = all("[data-part]:not(#toc)").find((part) => part.getBoundingClientRect().bottom > 0);
    const before = top?.getBoundingClientRect().top, focused = document.activeElement?.id;
    const open = new Set(all("details[open]").map((d) => d.id));
    let previous = null;
    for (const part of incoming) {
      const old = document.getElementById(part.id), source = part.outerHTML;
      if (parts.get(part.id) !== source || !old) {
        const node = document.importNode(part, true);
        if (old) old.replaceWith(node);
        else if (previous) previous.after(node);
        parts.set(part.id, source);
        all("details", node).forEach((d) => (d.open = d.open || open.has(d.id)));
        enhance(node);
      }
      previous = document.getElementById(part.id);
    }
    all("[data-part]").filter((part) => !incoming.some((other) => other.id === part.id)).forEach((part) => part.remove());
    document.title = fresh.title;
    const now = top && document.getElementById(top.id);
    if (now) scrollBy({ top: now.getBoundingClientRect().top - before, behavior: "instant" });
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  enhance(document);
  if (document.body.dataset.live) look();
})();
