// Draws the loss curves of the study's runs from the data in the page: arms over each other, to be read off, filtered and enlarged.
"use strict";
(() => {
  const COLOURS = 8, DASHES = 3; // classes c0…, d0… of page.css
  const FIRST = 8; // arms that are shown at first, where there are many
  const FRAMED_FROM = 0.1; // of the run: the steep fall before it may leave the frame
  const NS = "http://www.w3.org/2000/svg";
  const KINDS = { validation: "validation loss", training: "training loss" };
  const make = (tag, attributes = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...inside);
    return made;
  };
  const draw = (tag, attributes, parent) => {
    const made = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    parent?.append(made);
    return made;
  };
  const median = (values) => {
    const sorted = values.filter((v) => v !== null && v !== undefined).sort((a, b) => a - b), half = sorted.length >> 1;
    if (!sorted.length) return null;
    return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  };
  const shown = (loss) => (loss === null || loss === undefined ? "–" : loss.toFixed(loss < 10 ? 3 : 1));
  const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

  // what the reader has set: kept while `watch` replaces the part
  const state = { stage: null, kind: "validation", off: new Map(), zoom: null, cursor: null, run: null, find: "" };

  // -- the data: arms with their runs, and the median over these at every step ------------------------------------------------
  function armsOf(data, stage, kind) {
    const arms = data.arms.map((arm, index) => ({ ...arm, index, runs: [] })).filter((arm) => arm.stage === stage);
    const byIndex = new Map(arms.map((arm) => [arm.index, arm]));
    for (const run of data.runs) {
      const arm = byIndex.get(run.arm);
      if (arm && run[kind]) arm.runs.push({ ...run, steps: data.steps[run[kind][0]], losses: run[kind][1] });
    }
    const known = arms.filter((arm) => arm.runs.length);
    for (const arm of known) {
      const at = new Map();
      for (const run of arm.runs) run.steps.forEach((step, i) => at.set(step, [...(at.get(step) || []), run.losses[i]]));
      arm.steps = [...at.keys()].sort((a, b) => a - b);
      arm.losses = arm.steps.map((step) => median(at.get(step)));
      arm.end = arm.losses.findLast((loss) => loss !== null) ?? Infinity;
    }
    known.sort((a, b) => a.end - b.end);
    known.forEach((arm, i) => {
      const place = arm.place ?? i; // in the palette: of the arms that a study compares as in its pictures
      arm.look = `c${place % COLOURS} d${Math.floor(place / COLOURS) % DASHES}`;
    });
    return known;
  }
  const nearest = (steps, x) => steps.reduce((best, step) => (Math.abs(step - x) < Math.abs(best - x) ? step : best), steps[0]);
  const valueAt = (arm, step) => {
    const i = arm.steps.indexOf(nearest(arm.steps, step));
    const gap = arm.steps.length > 1 ? arm.steps.at(-1) / (arm.steps.length - 1) : Infinity;
    return Math.abs(arm.steps[i] - step) <= gap ? arm.losses[i] : null; // an arm that ended earlier has no value there
  };

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const by = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
    const digits = Math.max(0, -Math.floor(Math.log10(by) + 1e-9)), made = [];
    for (let i = Math.ceil(low / by - 1e-9); i * by <= high + 1e-9 * by; i++) made.push([i * by, (i * by).toFixed(digits)]);
    return made;
  }

  // -- the view --------------------------------------------------------------------------------------------------------
  function view(box, data) {
    const stages = [...new Set(data.arms.map((arm) => arm.stage))];
    if (!stages.includes(state.stage)) state.stage = stages[0];
    let arms = [], frame = null, steps = [];
    const strong = { arm: null };

    const option = (value, text) => make("option", { value }, text);
    const select = (label, name, options, act) => {
      const control = make("select", { "data-curves": name }, ...options);
      control.value = state[name];
      control.addEventListener("change", () => { state[name] = control.value; act(); });
      return [make("label", {}, `${label} `, control), control];
    };
    const button = (text, label, act) => {
      const made = make("button", { type: "button", "aria-label": label, title: label }, text);
      made.addEventListener("click", act);
      return made;
    };
    const [stageLabel, stageSelect] = select("Stage", "stage", stages.map((s) => option(s, s)), () => { state.zoom = state.cursor = state.run = null; arrange(); });
    const [kindLabel, kindSelect] = select("Loss", "kind", Object.keys(KINDS).map((k) => option(k, k)), () => { state.zoom = null; arrange(); });
    const find = make("input", { type: "search", "data-curves": "find", placeholder: "arm …" });
    find.value = state.find;
    find.addEventListener("input", () => { state.find = find.value; list(); });
    const findLabel = make("label", {}, "Find ", find);
    const zoomer = make("div", { class: "zoomer", role: "group", "aria-label": "Zoom" },
      button("+", "Zoom in", () => zoomBy(0.5)), button("−", "Zoom out", () => zoomBy(2)), button("Reset", "Show the whole run", () => { state.zoom = null; paint(); }));
    const whose = make("p", { class: "whose", role: "status" });
    const plot = make("div", { class: "plot", tabindex: "0", role: "slider", "aria-label": "Step at which the losses are read", "aria-orientation": "horizontal" });
    const at = make("p", { class: "at" });
    const said = make("p", { class: "unseen", "aria-live": "polite" });
    const legend = make("ul", { class: "arms" });
    const every = make("div", { class: "every", role: "group", "aria-label": "Arms" }, button("All", "Show all arms", () => set(() => true)), button("None", "Hide all arms", () => set(() => false)));
    box.replaceChildren(
      make("div", { class: "filters" }, stageLabel, kindLabel, zoomer), whose,
      make("div", { class: "drawn" }, plot, make("div", { class: "legend" }, at, every, findLabel, legend)),
      make("p", { class: "muted" }, "Thick: median of the seeds; thin: each seed. Drag to enlarge, double-click for the whole run; with the chart in focus, arrow keys read off values, + and − zoom."), said);

    const key = (arm) => `${arm.stage}/${arm.name}`;
    const isOn = (arm) => !state.off.get(key(arm));
    function set(on) {
      const wanted = new Set(listed());
      arms.forEach((arm) => wanted.has(arm) && state.off.set(key(arm), !on(arm)));
      list();
      paint();
    }
    const listed = () => {
      const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
      return arms.filter((arm) => words.every((word) => arm.name.toLowerCase().includes(word)));
    };

    function arrange() {
      const of = (kind) => data.runs.some((run) => data.arms[run.arm].stage === state.stage && run[kind]);
      if (!of(state.kind)) state.kind = Object.keys(KINDS).find(of);
      [...kindSelect.options].forEach((o) => (o.disabled = !of(o.value)));
      kindSelect.value = state.kind;
      stageSelect.value = state.stage;
      arms = armsOf(data, state.stage, state.kind);
      arms.forEach((arm, i) => { if (!state.off.has(key(arm))) state.off.set(key(arm), i >= FIRST && arms.length > FIRST + 2); });
      findLabel.hidden = arms.length <= FIRST;
      if (findLabel.hidden) state.find = find.value = "";
      list();
      paint();
    }

    // -- the arms, with a value each -----------------------------------------------------------------------------------
    function list() {
      legend.replaceChildren(...listed().map((arm) => {
        const check = make("input", { type: "checkbox" });
        check.checked = isOn(arm);
        check.addEventListener("change", () => { state.off.set(key(arm), !check.checked); paint(); });
        const swatch = draw("svg", { class: `swatch ${arm.look}`, viewBox: "0 0 26 10", width: 26, height: 10, "aria-hidden": "true" });
        draw("line", { class: "line", x1: 1, x2: 25, y1: 5, y2: 5 }, swatch);
        const row = make("li", { "data-arm": arm.name }, make("label", {}, check, swatch, make("span", {}, arm.name)), make("output", {}));
        row.addEventListener("pointerenter", () => { strong.arm = arm; paint(); });
        row.addEventListener("pointerleave", () => { strong.arm = null; paint(); });
        return row;
      }));
      values();
    }
    function values() {
      const step = state.cursor === null ? null : nearest(steps.length ? steps : [0], state.cursor);
      at.textContent = step === null ? `${KINDS[state.kind]} at the end` : `${KINDS[state.kind]} at step ${step}`;
      [...legend.children].forEach((row) => {
        const arm = arms.find((a) => a.name === row.dataset.arm);
        row.querySelector("output").textContent = isOn(arm) ? shown(step === null ? (isFinite(arm.end) ? arm.end : null) : valueAt(arm, step)) : "";
      });
      plot.setAttribute("aria-valuemin", steps[0] ?? 0);
      plot.setAttribute("aria-valuemax", steps.at(-1) ?? 0);
      plot.setAttribute("aria-valuenow", step ?? steps.at(-1) ?? 0);
      plot.setAttribute("aria-valuetext", step === null ? "end of the run" : `step ${step}`);
    }

    // -- the picture ---------------------------------------------------------------------------------------------------
    function limits(on) {
      const last = Math.max(...on.map((arm) => arm.steps.at(-1)), 1);
      const x = state.zoom?.x || [0, last];
      if (state.zoom?.y) return { x, y: state.zoom.y, last };
      const from = state.zoom ? x[0] : FRAMED_FROM * last;
      const inside = on.flatMap((arm) => arm.losses.filter((loss, i) => loss !== null && arm.steps[i] >= from && arm.steps[i] <= x[1]));
      const low = Math.min(...inside), high = Math.max(...inside);
      if (!inside.length) return { x, y: [0, 1], last };
      const room = Math.max(high - low, 0.01);
      return { x, y: [low - 0.06 * room, high + 0.06 * room], last };
    }
    function paint() {
      const on = arms.filter(isOn), width = plot.clientWidth || 600, height = width < 500 ? 300 : 440;
      const all = [...new Set(on.flatMap((arm) => arm.steps))].sort((a, b) => a - b);
      const { x, y, last } = limits(on), edge = { left: 52, right: 14, top: 12, bottom: 42 };
      const X = (step) => edge.left + ((step - x[0]) / (x[1] - x[0])) * (width - edge.left - edge.right);
      const Y = (loss) => edge.top + ((y[1] - loss) / (y[1] - y[0])) * (height - edge.top - edge.bottom);
      steps = all.filter((step) => step >= x[0] && step <= x[1]);
      frame = { x, y, X, last, edge, width, height };
      const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
      const clip = draw("clipPath", { id: "curves-clip" }, svg);
      const right = width - edge.right, bottom = height - edge.bottom;
      draw("rect", { x: edge.left, y: edge.top, width: right - edge.left, height: bottom - edge.top }, clip);
      const text = (words, at, anchor, turned) => { draw("text", { ...at, "text-anchor": anchor, ...(turned ? { transform: `rotate(-90 ${at.x} ${at.y})` } : {}) }, svg).textContent = words; };
      for (const [loss, label] of ticks(y[0], y[1], height / 60)) {
        draw("line", { class: "grid", x1: edge.left, x2: right, y1: Y(loss), y2: Y(loss) }, svg);
        text(label, { x: edge.left - 6, y: Y(loss) + 4 }, "end");
      }
      for (const [step, label] of ticks(x[0], x[1], width / 90)) {
        draw("line", { class: "grid", x1: X(step), x2: X(step), y1: edge.top, y2: bottom }, svg);
        text(label, { x: X(step), y: bottom + 16 }, "middle");
      }
      text("training step", { x: (edge.left + right) / 2, y: height - 6 }, "middle");
      text(`${KINDS[state.kind]}, nats per token`, { x: 12, y: (edge.top + bottom) / 2 }, "middle", true);
      const lines = draw("g", { "clip-path": "url(#curves-clip)" }, svg);
      const path = (at, losses, look) => {
        let d = "", pen = "M";
        losses.forEach((loss, i) => {
          if (loss === null) { pen = "M"; return; }
          d += `${pen}${X(at[i]).toFixed(1)} ${Y(loss).toFixed(1)}`;
          pen = "L";
        });
        if (d) draw("path", { d, class: look }, lines);
      };
      for (const arm of [...on].reverse()) if (arm.runs.length > 1) arm.runs.forEach((run) => path(run.steps, run.losses, `seed ${arm.look}`));
      for (const arm of [...on].reverse()) path(arm.steps, arm.losses, `line ${arm.look}${strong.arm && strong.arm !== arm ? " dim" : ""}`);
      const chosen = on.flatMap((arm) => arm.runs).find((run) => run.id === state.run);
      if (chosen) { path(chosen.steps, chosen.losses, "halo"); path(chosen.steps, chosen.losses, "chosen"); }
      draw("rect", { class: "frame", x: edge.left, y: edge.top, width: right - edge.left, height: bottom - edge.top }, svg);
      if (!on.length) text("No arm is shown.", { x: (edge.left + right) / 2, y: (edge.top + bottom) / 2 }, "middle");
      plot.replaceChildren(svg);
      whose.replaceChildren();
      if (chosen) whose.append(`Run ${chosen.id}, seed ${chosen.seed}${chosen.outcome ? `, ${chosen.outcome}` : ""} `, button("Clear", "Show no single run", () => { state.run = null; paint(); }));
      point();
    }
    function point() { // the cursor, and a dot on each line
      const svg = plot.querySelector("svg");
      svg.querySelector(".cursor")?.remove();
      values();
      if (state.cursor === null || !steps.length) return;
      const step = nearest(steps, state.cursor), { X, y, edge, height } = frame, g = draw("g", { class: "cursor" }, svg);
      draw("line", { x1: X(step), x2: X(step), y1: edge.top, y2: height - edge.bottom }, g);
      for (const arm of arms.filter(isOn)) {
        const loss = valueAt(arm, step);
        if (loss === null || loss < y[0] || loss > y[1]) continue;
        const top = edge.top + ((y[1] - loss) / (y[1] - y[0])) * (height - edge.top - edge.bottom);
        draw("circle", { class: arm.look, cx: X(step), cy: top, r: 3.5 }, g);
      }
    }

    // -- mouse, touch and keyboard -------------------------------------------------------------------------------------
    const stepAt = (px) => frame.x[0] + ((px - frame.edge.left) / (frame.width - frame.edge.left - frame.edge.right)) * (frame.x[1] - frame.x[0]);
    const lossAt = (py) => frame.y[1] - ((py - frame.edge.top) / (frame.height - frame.edge.top - frame.edge.bottom)) * (frame.y[1] - frame.y[0]);
    const spot = (event) => {
      const rect = plot.getBoundingClientRect();
      return [clamp(event.clientX - rect.left, frame.edge.left, frame.width - frame.edge.right), clamp(event.clientY - rect.top, frame.edge.top, frame.height - frame.edge.bottom)];
    };
    function zoomBy(factor, around = state.cursor ?? (frame.x[0] + frame.x[1]) / 2) {
      const [low, high] = frame.x, span = Math.min((high - low) * factor, frame.last);
      if (span < frame.last / 200) return;
      const from = clamp(around - ((around - low) / (high - low)) * span, 0, frame.last - span);
      state.zoom = span >= frame.last ? null : { x: [from, from + span], y: null };
      paint();
    }
    let start = null, marked = null;
    plot.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse") { // a finger reads off; the buttons zoom
        state.cursor = stepAt(spot(event)[0]);
        return point();
      }
      if (event.button) return;
      start = spot(event);
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointermove", (event) => {
      const [px, py] = spot(event);
      if (start) {
        marked ||= draw("rect", { class: "marked" }, plot.querySelector("svg"));
        const box = { x: Math.min(px, start[0]), y: Math.min(py, start[1]), width: Math.abs(px - start[0]), height: Math.abs(py - start[1]) };
        for (const [name, value] of Object.entries(box)) marked.setAttribute(name, value);
        return;
      }
      state.cursor = stepAt(px);
      point();
    });
    plot.addEventListener("pointerup", (event) => {
      if (!start) return;
      const [px, py] = spot(event), from = start;
      start = null;
      marked?.remove();
      marked = null;
      if (Math.abs(px - from[0]) < 8) return;
      const tall = Math.abs(py - from[1]) >= 24; // else the losses in between set the frame
      state.zoom = { x: [stepAt(Math.min(px, from[0])), stepAt(Math.max(px, from[0]))], y: tall ? [lossAt(Math.max(py, from[1])), lossAt(Math.min(py, from[1]))] : null };
      paint();
    });
    plot.addEventListener("pointerleave", (event) => { if (!start && event.pointerType === "mouse" && document.activeElement !== plot) { state.cursor = null; point(); } });
    plot.addEventListener("dblclick", () => { state.zoom = null; paint(); });
    plot.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return; // plain scrolling is the page's
      event.preventDefault();
      zoomBy(event.deltaY < 0 ? 0.8 : 1.25, stepAt(spot(event)[0]));
    }, { passive: false });
    plot.addEventListener("keydown", (event) => {
      const now = state.cursor === null ? steps.length : steps.indexOf(nearest(steps, state.cursor));
      const to = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: 0, End: steps.length - 1, PageUp: now + 5, PageDown: now - 5 }[event.key];
      if (to !== undefined && steps.length) {
        state.cursor = steps[clamp(to, 0, steps.length - 1)];
        point();
        said.textContent = arms.filter(isOn).map((arm) => `${arm.name} ${shown(valueAt(arm, state.cursor))}`).join("; ");
      } else if (event.key === "+" || event.key === "=") zoomBy(0.5);
      else if (event.key === "-") zoomBy(2);
      else if (event.key === "0" || event.key === "Escape") { state.zoom = null; paint(); }
      else return;
      event.preventDefault();
    });

    // a run's row leads here
    box.show = (id) => {
      const run = data.runs.find((r) => r.id === id);
      if (!run) return;
      const { stage, name } = data.arms[run.arm];
      Object.assign(state, { stage, run: id, zoom: null, find: "", kind: run[state.kind] ? state.kind : Object.keys(KINDS).find((k) => run[k]) });
      find.value = "";
      state.off.set(`${stage}/${name}`, false);
      arrange();
    };
    let seen = 0;
    new ResizeObserver(() => { if (plot.clientWidth !== seen) { seen = plot.clientWidth; paint(); } }).observe(plot);
    box.hidden = false;
    arrange();
  }

  document.addEventListener("ebc-lab-fresh", (event) => {
    const source = event.detail.querySelector("#curves-data"), box = event.detail.querySelector("#curves-view");
    if (!source || !box) return;
    const data = JSON.parse(source.textContent);
    const drawn = data.runs.length > 0;
    box.closest("section").classList.toggle("scripted", drawn); // the picture is left for paper
    if (drawn) view(box, data);
  });
  document.addEventListener("click", (event) => {
    const lead = event.target.closest?.('tr[id^="run-"] a[href="#curves"]');
    if (lead) document.getElementById("curves-view")?.show?.(lead.closest("tr").id.slice(4));
  });
})();
