// Local times, and keys. Pages work without this file.
(() => {
  "use strict";
  const two = (number) => String(number).padStart(2, "0");
  const local = (at) =>
    `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;

  function showLocalTimes(root) {
    for (const time of root.querySelectorAll("time[datetime]:not([title])")) {
      const at = new Date(time.dateTime);
      if (isNaN(at)) continue;
      time.title = time.textContent;
      time.textContent = local(at);
    }
  }

  const rows = () => [...document.querySelectorAll("main tbody tr")].filter((row) => row.querySelector("a[href]"));
  function moveRow(step) {
    const all = rows();
    if (!all.length) return;
    const at = all.findIndex((row) => row.classList.contains("at"));
    const next = all[Math.min(all.length - 1, Math.max(0, at + step))];
    all.forEach((row) => row.classList.toggle("at", row === next));
    next.querySelector("a[href]").focus();
    next.scrollIntoView({ block: "nearest" });
  }

  const follow = (selector) => document.querySelector(selector)?.click();
  const isField = (element) => element.closest("input, select, textarea, [contenteditable]") !== null;
  let afterG = 0;

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const dialog = document.getElementById("keys");
    if (event.key === "Escape" && isField(event.target)) return event.target.blur();
    if (isField(event.target) || dialog?.open) return;
    const was = afterG;
    afterG = 0;
    if (Date.now() - was < 1500) {
      const link = [...document.querySelectorAll("header nav a[data-key]")].find((each) => each.dataset.key === event.key);
      if (link) { event.preventDefault(); link.click(); return; }
    }
    switch (event.key) {
      case "?": dialog?.showModal(); break;
      case "g": afterG = Date.now(); break;
      case "j": moveRow(1); break;
      case "k": moveRow(-1); break;
      case "n": follow("[data-page=next]"); break;
      case "p": if (document.querySelector("[data-page=first]")) history.back(); break;
      case "/": {
        const field = document.querySelector("main form.filters input, main form.filters select");
        if (field) { event.preventDefault(); field.focus(); }
        break;
      }
      default: return;
    }
  }

  document.addEventListener("keydown", onKey);
  // A hidden tab asks for nothing.
  document.addEventListener("htmx:config:request", (event) => { if (document.hidden) event.preventDefault(); });
  const button = document.getElementById("show-keys");
  if (button) {
    button.hidden = false;
    button.addEventListener("click", () => document.getElementById("keys").showModal());
  }
  showLocalTimes(document);
  document.addEventListener("htmx:after:swap", () => showLocalTimes(document));
})();
