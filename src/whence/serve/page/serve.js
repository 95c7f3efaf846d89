(() => {
  const { make, drawn, has, tags, words, image, bar } = whence;
  const byId = (id) => document.getElementById(id);
  let about = null, shown = null, busy = false, loaded = 0;

  const request = async (path, body) => {
    let response;
    try {
      response = await fetch(path, body === undefined ? {} : {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
    } catch {
      throw new Error("whence serve does not answer. Does it still run?");
    }
    const found = await response.json().catch(() => null);
    if (!response.ok || !found) throw new Error((found && found.error) || "whence serve answers with " + response.status + " and no reason. Try again in a moment.");
    return found;
  };
  const tell = (text, waiting) => {
    byId("status").textContent = text;
    byId("status").classList.toggle("busy", Boolean(waiting));
  };
  const fail = (text) => {
    byId("error").textContent = text;
    byId("error").hidden = !text;
  };
  // One question at a time: the model takes no more.
  const once = async (waiting, work) => {
    if (busy) return;
    busy = true;
    fail("");
    tell(waiting, true);
    document.body.classList.add("waiting");
    try {
      tell(await work() || "");
    } catch (error) {
      tell("");
      fail(error.message);
    } finally {
      busy = false;
      document.body.classList.remove("waiting");
    }
  };

  const signed = (width) =>
    drawn("svg", { class: "bar signed", viewBox: "-100 0 200 1", preserveAspectRatio: "none", "aria-hidden": "true" },
      drawn("rect", { x: Math.min(0, width), width: Math.max(1, Math.abs(width)), height: 1 }), drawn("path", { d: "M0 0V1" }));
  const marking = (row) => {
    if (!about.tokens || !has(row, "text")) return null;
    const button = make("button", "more mark-tokens", "Mark tokens");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", "Mark the tokens of row " + row.row);
    return button;
  };
  const hit = (row, place) => {
    const item = make("li", "hit",
      image(row, "row " + row.row),
      make("p", "head", make("span", "score", row.score), signed(row.width), make("span", "id", "row " + row.row), ...tags(row), marking(row)),
      words(row, null));
    item.dataset.place = place;
    item.dataset.row = row.row;
    return item;
  };
  const side = (name, title, what, rows) =>
    make("div", "side " + name, make("h3", "", title), make("p", "what", what), make("ol", "hits", ...rows.map(hit)));
  const likely = (reading) => make("ul", "likely", ...reading.map(([name, share, width]) =>
    make("li", "", bar(width), make("span", "share", share), make("span", "", name))));

  const spoken = (asked) => {
    if (!has(asked, "continuation")) return words(asked, null);
    return make("p", "text", make("span", "given", asked.given), make("span", "continued", asked.continuation));
  };
  const meaning = (answer) => {
    const asked = answer.asked;
    if (has(asked, "continuation")) {
      const given = asked.given.trim();
      return "Asked: what made the model go on so after “" + (given.length > 90 ? "…" + given.slice(-89) : given) + "”. Only what it went on with is measured.";
    }
    if (has(asked, "query")) {
      const turned = has(asked, "says") && has(asked, "label") && asked.says !== asked.label;
      return "Asked: what made the model give this query " + (has(asked, "label") ? "its label, “" + asked.label + "”." : "its score.")
        + (turned ? " The model says “" + asked.says + "”: look at what pushed it away from “" + asked.label + "”." : "");
    }
    if (has(asked, "says")) return "Asked: what made the model read “" + asked.says + "” in this text.";
    return "Asked: what made the model find this text likely. All its tokens but the first are measured, as a text that it was trained on.";
  };
  const askedView = (answer) => {
    const asked = answer.asked;
    return make("div", "ask",
      image(asked, "what was asked"),
      make("p", "head", make("strong", "", asked.title), ...(has(asked, "query") ? tags(asked) : [])),
      spoken(asked),
      has(asked, "reading") ? make("p", "what", "The model reads") : null,
      has(asked, "reading") ? likely(asked.reading) : null,
      make("p", "verdict", meaning(answer)));
  };
  const show = (answer) => {
    shown = answer;
    byId("asked").replaceChildren(askedView(answer));
    byId("view").replaceChildren(make("div", "duo" + (about.tokens ? " can-mark" : ""),
      side("for", answer.heads[0], "training on these lowered " + answer.effect, answer.sides[0]),
      side("against", answer.heads[1], "training on these raised " + answer.effect, answer.sides[1])));
    byId("marks").hidden = !about.tokens;
    byId("filter").value = "";
    byId("answer").hidden = false;
    filter();
  };

  const filter = () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    let left = 0, all = 0;
    for (const list of document.querySelectorAll("#view ol.hits")) {
      const items = [...list.children];
      for (const item of items) {
        item.hidden = Boolean(wanted) && wanted !== item.dataset.row && !item.textContent.toLowerCase().includes(wanted);
        all += 1;
        left += item.hidden ? 0 : 1;
      }
      list.classList.toggle("bare", items.length > 0 && items.every((item) => item.hidden));
    }
    byId("count").textContent = wanted ? left + " of " + all + " rows shown" : "";
  };

  const ask = (question) => once(question.generate ? "The model goes on …" : "Asking …", async () => {
    const k = byId("k");
    if (!k.reportValidity()) return "";
    const answer = await request("/api/query", { ...question, k: Number(k.value), exact: byId("exact").checked });
    for (const button of byId("queries").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.query) === question.query));
    }
    if (byId("own").contains(document.activeElement)) byId("own").querySelector("summary").focus({ preventScroll: true });
    if (has(answer.asked, "query")) byId("own").open = false;
    show(answer);
    byId("asked").scrollIntoView({ block: "nearest" });
    return "Answered in " + answer.seconds.toFixed(2) + " s from " + about.rows + " rows. "
      + (answer.exact ? "Scores are exact, of the best by the index." : "Scores are the index's own.");
  });
  const askText = (generate) => {
    const text = byId("text").value;
    if (!text.trim()) { fail("The text is empty. Type something."); byId("text").focus(); return; }
    ask({ text: text, generate: generate });
  };

  const plain = (item) => {
    const row = shown.sides.flat().find((one) => String(one.row) === item.dataset.row);
    item.querySelector(".text").replaceWith(words(row, null));
    item.classList.remove("marked");
    item.querySelector(".mark-tokens").setAttribute("aria-pressed", "false");
  };
  const mark = (item) => {
    const button = item.querySelector(".mark-tokens");
    if (!button || busy) return;
    const before = document.querySelector("#view .hit.marked");
    if (before) plain(before);
    byId("asked").replaceChildren(askedView(shown));
    if (before === item) { tell("Marks removed."); return; }
    once("Marking tokens …", async () => {
      const found = await request("/api/tokens", { answer: shown.answer, row: Number(item.dataset.row) });
      const whole = words(found.row, found.row.heat), query = words(found.query, found.query.heat);
      whole.classList.add("whole");
      item.querySelector(".text").replaceWith(whole);
      const old = byId("asked").querySelector(".text");
      if (old) old.replaceWith(query);
      item.classList.add("marked");
      button.setAttribute("aria-pressed", "true");
      return "Tokens marked: row " + item.dataset.row + ", exact score " + found.score + ".";
    });
  };

  const choice = (query) => {
    const wrong = has(query, "says") && has(query, "label") && query.says !== query.label;
    const button = make("button", "",
      image(query, ""),
      make("span", "", "Query " + query.query),
      has(query, "label") ? make("span", wrong ? "off" : "", query.label + (wrong ? ", read as " + query.says : "")) : null,
      has(query, "text") ? make("span", "clip", query.text) : null);
    button.type = "button";
    button.dataset.query = query.query;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => ask({ query: query.query }));
    return make("li", "", button);
  };
  const more = () => once("Reading the queries …", async () => {
    const found = await request("/api/queries?first=" + loaded);
    byId("queries").append(...found.queries.map(choice));
    loaded += found.queries.length;
    byId("more").hidden = loaded >= found.count || !found.queries.length;
    return "";
  });

  const begin = async () => {
    about = await request("/api/index");
    const facts = new Map(about.facts);
    about.rows = facts.get("Training rows");
    document.title = "What made " + about.name + " say this?";
    byId("title").textContent = document.title;
    byId("facts").textContent = [facts.get("Model"), about.rows + " training rows", facts.get("Bytes per row").split(",").slice(0, -1).join(",") + " bytes per row"].join(" · ");
    byId("terms").append(...about.facts.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))));
    for (const id of ["by-text", "text", "go"]) byId(id).hidden = !about.text;
    byId("go-on").hidden = !about.generates;
    byId("text").maxLength = about.longest;
    byId("what").textContent = !about.text ? "" : about.classifier
      ? "Asked is what made the model read what it reads in the text. Ctrl+Enter asks."
      : "Asked is what made the model find the text likely. Ctrl+Enter asks.";
    byId("k").value = about.k;
    byId("k").max = about.most;
    byId("exact").checked = about.rescore !== null;
    byId("exactly").hidden = about.rescore === null;
    byId("exact-words").textContent = "Score exactly the " + about.rescore + " of rows that are best by the index";
    byId("own-title").textContent = (about.text ? "Or one of its own queries" : "Choose one of its queries") + ", " + about.queries.toLocaleString("en");
    byId("own").hidden = !about.queries;
    byId("queries").classList.toggle("pictures", about.pictures);
    byId("ask").hidden = false;
    byId("own").addEventListener("toggle", () => { if (byId("own").open && !loaded) more(); });
    byId("own").open = !about.text;
  };

  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); if (about.text) askText(false); });
  byId("go-on").addEventListener("click", () => askText(true));
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); askText(false); }
  });
  byId("more").addEventListener("click", more);
  byId("filter").addEventListener("input", filter);
  byId("view").addEventListener("click", (event) => {
    const item = event.target.closest(".hit");
    if (item && event.target.closest(".text, .mark-tokens") && !String(getSelection())) mark(item);
  });
  begin().catch((error) => fail(error.message));
})();
