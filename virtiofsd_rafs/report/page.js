// Details of the fetch under the pointer or at the keyboard's place. The page is complete without it. Data comes from a
// JSON block and is shown as text, never as markup.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  let current = null;

  const line = (list, name, value) => {
    if (value === "") return;
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    list.append(dt, dd);
  };

  const hide = () => {
    tip.hidden = true;
    if (current) current.classList.remove("on");
    current = null;
  };

  const show = (row, rows, x, y) => {
    if (row !== current) {
      if (current) current.classList.remove("on");
      current = row;
      row.classList.add("on");
      const fetch = rows.data.fetches[Array.prototype.indexOf.call(row.parentNode.children, row)];
      const head = document.createElement("b"), list = document.createElement("dl");
      head.textContent = rows.data.texts[fetch[0]];
      rows.data.fields.forEach((name, i) => {
        const value = fetch[i + 1];
        line(list, name, typeof value === "number" ? rows.data.texts[value] : value);
      });
      tip.replaceChildren(head, list);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(12, Math.min(x + 14, innerWidth - box.width - 12)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18) + "px";
  };

  for (const rows of document.querySelectorAll(".rows")) {
    rows.data = JSON.parse(document.getElementById(rows.dataset.of).textContent);
    const place = rows.parentNode;
    const at = (event) => {
      const row = event.target.closest("li");
      if (row) show(row, rows, event.clientX, event.clientY);
    };
    rows.addEventListener("pointermove", at);
    rows.addEventListener("click", at);
    rows.addEventListener("pointerleave", hide);
    place.addEventListener("blur", hide);
    place.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const inside = current && current.parentNode === rows;
      const next = !inside ? rows.firstElementChild
        : step > 0 ? current.nextElementSibling : current.previousElementSibling;
      if (!next) return;
      next.scrollIntoView({ block: "nearest" });
      const box = next.getBoundingClientRect();
      show(next, rows, box.left + 40, box.bottom - 12);
    });
  }
  // The highlighted row stays: the keyboard goes on from there.
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
