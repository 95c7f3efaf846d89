"use strict";
(() => {
  // All text goes in as text: nothing here parses markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const controls = byId("controls");
  if (!controls) return;

  const { make, drawn, has, tags, words, image, bar } = whence;

  const hit = (entry, row, place) => {
    const item = make("li", "hit" + (entry.quiet ? " quiet" : ""),
      image(row, "row " + entry.row),
      make("p", "head", make("span", "score", entry.score), bar(entry.width), make("span", "id", "row " + entry.row), ...tags(row)),
      words(row, entry.heat));
    item.dataset.place = place;
    item.dataset.row = entry.row;
    item.dataset.label = has(row, "label") ? row.label : "";
    return item;
  };
  const side = (name, title, what, entries, rows) =>
    make("div", "side " + name, make("h3", "", title), make("p", "what", what),
      make("ol", "hits", ...entries.map((entry, place) => hit(entry, rows[entry.row] || {}, place))));

  const histogram = (found, rows) => {
    const parts = [], count = found.bars.length;
    if (found.noise.length) {
      parts.push(drawn("rect", { class: "band", x: found.noise[0], y: 0, width: found.noise[1] - found.noise[0], height: 100 }));
    }
    found.bars.forEach((height, place) => parts.push(drawn("rect", {
      class: "bin", x: (1000 * place / count).toFixed(2), y: 100 - height, width: (1000 / count - 1.5).toFixed(2), height: height,
    })));
    if (found.zero !== null) parts.push(drawn("path", { class: "zero", d: "M" + found.zero + " 0V100" }));
    return make("figure", "histogram", make("h3", "", "Scores of all " + rows + " rows"),
      drawn("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img",
        "aria-label": "Histogram from " + found.low + " to " + found.high }, ...parts),
      make("p", "ends", make("span", "", found.low), make("span", "", found.high)),
      make("figcaption", "", "Heights are logarithmic, the highest bar " + found.most + " rows."
        + (found.noise.length ? " Shaded: the noise level." : "")));
  };
  const layers = (shares) => make("figure", "layers", make("h3", "", "Share of each layer"),
    make("ul", "", ...shares.map(([name, share, width]) =>
      make("li", "", make("span", "name", name), bar(width), make("span", "share", share)))),
    make("figcaption", "", "Of the absolute scores of all rows."));

  const show = (scores, query) => {
    const rows = scores.known ? data.rows.train : {};
    const own = (query.known && data.rows.queries[query.row]) || {};
    byId("view").replaceChildren(
      make("div", "ask",
        image(own, "query " + query.row),
        make("p", "head", make("strong", "", query.title), ...tags(own),
          has(own, "says") && own.says === own.label ? make("span", "tag", "model agrees") : null, make("span", "id", scores.name + ": " + scores.about)),
        words(own, null),
        make("p", "verdict", query.verdict)),
      make("div", "duo",
        side("for", query.heads[0], "training on these lowered " + scores.effect, query.sides[0], rows),
        side("against", query.heads[1], "training on these raised " + scores.effect, query.sides[1], rows)),
      make("div", "figures-below", histogram(query.histogram, scores.shown_rows), query.layers.length ? layers(query.layers) : null));
  };

  // What is shown stands in the address, so that a view can be sent on: #query=3&scores=ekfac&text=good&label=1&order=row
  const state = { scores: 0, query: 0, text: "", label: "", order: "" };
  const read = () => {
    const asked = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    const scores = data.scores.findIndex((one) => one.name === asked.get("scores"));
    state.scores = Math.max(0, scores);
    const queries = data.scores.length ? data.scores[state.scores].queries : [];
    state.query = Math.max(0, queries.findIndex((one) => String(one.row) === asked.get("query")));
    for (const key of ["text", "label", "order"]) state[key] = asked.get(key) || "";
  };
  const write = () => {
    const told = new URLSearchParams();
    if (data.scores.length) {
      told.set("query", data.scores[state.scores].queries[state.query].row);
      if (state.scores) told.set("scores", data.scores[state.scores].name);
    }
    for (const key of ["text", "label", "order"]) if (state[key]) told.set(key, state[key]);
    try { history.replaceState(null, "", "#" + told); } catch { /* some viewers forbid it; the page works without */ }
  };

  const filter = () => {
    const wanted = state.text.trim().toLowerCase();
    const key = { row: (item) => Number(item.dataset.row), label: (item) => item.dataset.label }[state.order];
    let shown = 0, all = 0;
    for (const list of document.querySelectorAll("ol.hits")) {
      const items = [...list.children];
      for (const item of items) {
        const numbered = wanted === item.dataset.row;
        item.hidden = !((!wanted || numbered || item.textContent.toLowerCase().includes(wanted))
          && (!state.label || item.dataset.label === state.label));
        all += 1;
        shown += item.hidden ? 0 : 1;
      }
      const byPlace = (one, other) => one.dataset.place - other.dataset.place;
      items.sort((one, other) => {
        if (!key) return byPlace(one, other);
        const a = key(one), b = key(other);
        return a < b ? -1 : a > b ? 1 : byPlace(one, other);
      });
      list.append(...items);
      list.classList.toggle("bare", items.length > 0 && items.every((item) => item.hidden));
    }
    byId("count").textContent = wanted || state.label ? shown + " of " + all + " rows shown" : "";
  };
  const unfold = () => {
    for (const text of document.querySelectorAll(".hit .text")) {
      if (text.scrollHeight <= text.clientHeight + 2 || (text.nextElementSibling || {}).className === "more") continue;
      const button = make("button", "more", "Show all");
      button.type = "button";
      button.addEventListener("click", () => { text.classList.add("whole"); button.remove(); });
      text.after(button);
    }
  };

  const option = (value, text) => {
    const element = make("option", "", text);
    element.value = value;
    return element;
  };
  const summary = (query) => {
    const row = (query.known && data.rows.queries[query.row]) || {};
    const text = (row.text || "").replace(/\s+/g, " ");
    const wrong = has(row, "says") && row.says !== row.label ? "✗ " : "";
    return wrong + query.title + (text ? " · " + (text.length > 90 ? text.slice(0, 89) + "…" : text) : "")
      + (has(row, "label") ? " (" + row.label + ")" : "");
  };
  const fill = () => {
    if (data.scores.length) {
      byId("pick-scores").replaceChildren(...data.scores.map((one, place) => option(place, one.name)));
      byId("pick-scores").value = state.scores;
      byId("pick-query").replaceChildren(...data.scores[state.scores].queries.map((one, place) => option(place, summary(one))));
      byId("pick-query").value = state.query;
      byId("previous").disabled = state.query === 0;
      byId("next").disabled = state.query === data.scores[state.scores].queries.length - 1;
    }
    byId("filter-text").value = state.text;
    byId("filter-label").value = state.label;
    byId("order").value = state.order;
  };
  const refresh = () => {
    if (data.scores.length) show(data.scores[state.scores], data.scores[state.scores].queries[state.query]);
    fill();
    filter();
    unfold();
  };
  const change = (changes) => {
    Object.assign(state, changes);
    write();
    refresh();
  };

  const labels = new Set(Object.values(data.rows.train).filter((row) => has(row, "label")).map((row) => row.label));
  byId("labels").hidden = labels.size < 2;
  byId("filter-label").append(option("", "any"), ...[...labels].sort().map((label) => option(label, label)));
  if (data.scores.length) {
    byId("pick-scores").addEventListener("change", (event) => {
      const row = data.scores[state.scores].queries[state.query].row;
      const scores = Number(event.target.value);
      // The same query by other scores, if they have it.
      change({ scores: scores, query: Math.max(0, data.scores[scores].queries.findIndex((one) => one.row === row)) });
    });
    byId("pick-query").addEventListener("change", (event) => change({ query: Number(event.target.value) }));
    byId("previous").addEventListener("click", () => change({ query: state.query - 1 }));
    byId("next").addEventListener("click", () => change({ query: state.query + 1 }));
  }
  byId("filter-text").addEventListener("input", (event) => change({ text: event.target.value }));
  byId("filter-label").addEventListener("change", (event) => change({ label: event.target.value }));
  byId("order").addEventListener("change", (event) => change({ order: event.target.value }));
  controls.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => { if (location.hash.includes("=")) { read(); refresh(); } });

  document.documentElement.classList.add("live");
  controls.hidden = false;
  read();
  refresh();
})();
