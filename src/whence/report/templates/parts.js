"use strict";
// What the scripts of pages have in common. All text goes in as text: nothing here parses markup.
const whence = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, name, ...children) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const drawn = (tag, attributes, ...children) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const has = (row, key) => Object.hasOwn(row, key);

  const tags = (row) => [
    has(row, "label") ? make("span", "tag", row.label) : null,
    has(row, "says") && row.says !== row.label ? make("span", "tag off", "model says " + row.says) : null,
    has(row, "flipped") ? make("span", "tag off", "flipped") : null,
  ];
  const words = (row, heat) => {
    if (heat && has(row, "tokens")) {
      const parts = row.tokens.map((token, place) => {
        const shade = heat[place] || 0;
        return shade ? make("span", (shade > 0 ? "p" : "n") + Math.abs(shade), token) : token;
      });
      return make("p", "text", ...parts);
    }
    return has(row, "text") ? make("p", "text", row.text + (row.cut ? " …" : "")) : null;
  };
  const image = (row, what) => {
    if (!has(row, "picture") || !row.picture.startsWith("data:image/png;base64,")) return null;
    const element = make("img", "ink");
    element.src = row.picture;
    element.alt = what;
    return element;
  };
  const bar = (width) =>
    drawn("svg", { class: "bar", viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" },
      drawn("rect", { width: width, height: 1 }));

  return { make, drawn, has, tags, words, image, bar };
})();
