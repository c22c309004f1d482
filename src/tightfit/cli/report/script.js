"use strict";
(() => {
  const root = document.documentElement;
  const all = (query) => [...document.querySelectorAll(query)];
  const status = document.getElementById("status");

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  dark.addEventListener("change", showTheme);
  showTheme();

  const unfold = document.getElementById("unfold");
  unfold.hidden = false;
  unfold.addEventListener("click", () => {
    const open = unfold.getAttribute("aria-pressed") !== "true";
    unfold.setAttribute("aria-pressed", String(open));
    for (const one of all("details")) one.open = open;
  });

  // Paper cannot be clicked: what is folded is unfolded for it, and folded again afterwards.
  let folded = [];
  const before = () => {
    folded = folded.concat(all("details:not([open])"));
    for (const one of folded) one.open = true;
  };
  const after = () => {
    for (const one of folded) one.open = false;
    folded = [];
  };
  addEventListener("beforeprint", before);
  addEventListener("afterprint", after);

  for (const code of all("code.copy")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", `Copy ${code.textContent}`);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        status.textContent = "Copied";
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        status.textContent = "Selected";
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    code.after(button);
  }

  // What the pointer or the focus is on is shown in the bar and in the list alike.
  const parts = all("[data-part]");
  const mark = (name) => {
    for (const one of parts) one.classList.toggle("dim", name !== null && one.dataset.part !== name);
  };
  for (const one of parts) {
    one.addEventListener("pointerenter", () => mark(one.dataset.part));
    one.addEventListener("pointerleave", () => mark(null));
    // A shape that listened to the focus would be a stop of the Tab key.
    if (one instanceof SVGElement) continue;
    one.addEventListener("focusin", () => mark(one.dataset.part));
    one.addEventListener("focusout", () => mark(null));
  }

  // A link to a point of a sweep opens it.
  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
