"use strict";
(() => {
  const SIDE = 10000;
  const root = document.documentElement;

  const button = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = dark() ? "light" : "dark"; button.setAttribute("aria-label", `show in ${button.textContent} colours`); };
  button.hidden = false;
  button.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; name(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();

  const unfold = () => { const target = location.hash && document.getElementById(location.hash.slice(1)); if (target && "open" in target) target.open = true; };
  addEventListener("hashchange", unfold);
  unfold();
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { if (!d.open) { d.open = true; d.dataset.shut = "1"; } }));
  addEventListener("afterprint", () => document.querySelectorAll("details[data-shut]").forEach((d) => { d.open = false; delete d.dataset.shut; }));

  // The values under the pointer are read back from the paths: x of a point -> all its y.
  const points = (path) => {
    const at = new Map();
    for (const [, x, y] of path.getAttribute("d").matchAll(/(-?\d+) (-?\d+)/g)) at.set(+x, [...(at.get(+x) || []), +y]);
    return at;
  };
  const nearest = (xs, x) => xs.reduce((best, v) => (Math.abs(v - x) < Math.abs(best - x) ? v : best), xs[0]);
  const show = (v) => (Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4)));

  document.querySelectorAll("figure[data-x]").forEach((figure) => {
    const svg = figure.querySelector(".area svg"), cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
    const [x0, x1] = figure.dataset.x.split(",").map(Number), [y0, y1] = figure.dataset.y.split(",").map(Number);
    const log = figure.dataset.log === "1";
    const value = (y) => { const t = 1 - y / SIDE; return log ? y0 * (y1 / y0) ** t : y0 + (y1 - y0) * t; };
    const step = (x) => show(Math.round(x0 + (x1 - x0) * x / SIDE));
    let layers, xs, here = -1;
    const prepare = () => {
      layers ??= [...svg.querySelectorAll("path[data-label]:not(.skips)")].map((path) => ({ path, at: points(path) })).filter((l) => l.at.size);
      xs ??= [...new Set(layers.flatMap((l) => [...l.at.keys()]))].sort((a, b) => a - b);
    };
    const put = (x) => {
      here = xs.indexOf(x);
      tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: `step ${step(x)}` }));
      for (const { path, at } of layers) {
        const near = nearest([...at.keys()], x);
        if (Math.abs(near - x) > SIDE / 25) continue;
        const ys = at.get(near).map(value).sort((a, b) => a - b), low = show(ys[0]), high = show(ys[ys.length - 1]);
        const row = document.createElement("div"), dot = document.createElement("i");
        dot.setAttribute("class", path.getAttribute("class").match(/c\d/)[0]);
        row.append(dot, `${path.dataset.label}: ${low === high ? low : `${low} to ${high}`}${figure.dataset.unit ? " " + figure.dataset.unit : ""}${step(near) === step(x) ? "" : ` (step ${step(near)})`}`);
        tip.append(row);
      }
      cursor.hidden = tip.hidden = false;
      cursor.style.left = `${100 * x / SIDE}%`;
      const width = svg.clientWidth, left = width * x / SIDE + 12;
      tip.style.left = `${Math.max(0, left + tip.offsetWidth > width ? left - tip.offsetWidth - 24 : left)}px`;
    };
    const hide = () => { cursor.hidden = tip.hidden = true; };
    svg.addEventListener("pointermove", (event) => {
      prepare();
      const box = svg.getBoundingClientRect();
      put(nearest(xs, SIDE * (event.clientX - box.left) / box.width));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) { if (event.key === "Escape") hide(); return; }
      event.preventDefault();
      prepare();
      put(xs[Math.min(xs.length - 1, Math.max(0, here + move))]);
    });
  });
})();
