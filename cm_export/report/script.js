// Hovering, sorting, filtering and copying; without it the page still says everything in its table.
(() => {
  const tip = document.getElementById("tip");
  let shown = null;
  const show = (mark) => {
    shown = mark;
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const at = mark.querySelector(".hit").getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.x + at.width / 2 - box.width / 2), innerWidth - box.width - 8);
    const above = at.y - box.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  };
  const hide = () => { shown = null; tip.hidden = true; };
  for (const mark of document.querySelectorAll(".mark[data-tip]")) {
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("focus", () => show(mark));
    for (const end of ["pointerleave", "blur"]) mark.addEventListener(end, hide);
  }
  // Reaching a mark by keyboard scrolls to it: the tip goes along.
  addEventListener("scroll", () => { if (shown) show(shown); }, { passive: true });

  for (const button of document.querySelectorAll("[data-kind]")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll("[data-kind]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      for (const table of document.querySelectorAll("[data-of]")) table.hidden = table.dataset.of !== button.dataset.kind;
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const rows = original.filter((row) => !row.classList.contains("group"));
    table.querySelectorAll("thead button").forEach((button, column) => {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const was = head.getAttribute("aria-sort");
        for (const th of table.querySelectorAll("th")) th.removeAttribute("aria-sort");
        if (was === "descending") return body.replaceChildren(...original); // third click: by budget again
        const sign = was === "ascending" ? -1 : 1;
        head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
        const value = (row) => row.cells[column].dataset.value;
        body.replaceChildren(...rows.toSorted((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
        }));
      });
    });
  }

  // A shade on the side to which a wide table goes on.
  const shades = () => {
    for (const box of document.querySelectorAll(".scroll")) {
      const left = box.scrollWidth - box.clientWidth - box.scrollLeft;
      box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 2);
      box.classList.toggle("more-right", left > 2);
      box.classList.toggle("more-left", box.scrollLeft > 2);
    }
  };
  for (const box of document.querySelectorAll(".scroll")) box.addEventListener("scroll", shades, { passive: true });
  for (const button of document.querySelectorAll("[data-kind]")) button.addEventListener("click", shades);
  addEventListener("resize", shades);
  shades();

  for (const button of document.querySelectorAll("button.save")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const text = button.closest(".copy").querySelector("pre").textContent;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text.endsWith("\n") ? text : text + "\n"], { type: "application/toml" }));
      link.download = button.dataset.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  for (const button of document.querySelectorAll("button.copies")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const pre = button.closest(".copy").querySelector("pre");
      getSelection().selectAllChildren(pre);
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
})();
