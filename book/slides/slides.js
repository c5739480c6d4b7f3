"use strict";
// Turns slides by key, shrinks what would not fit the window, and follows the colour scheme.
(() => {
  const fills = matchMedia("(min-width: 50rem) and (min-height: 30rem)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => { document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; };
  theme();
  dark.addEventListener("change", theme);

  const slides = () => [...document.querySelectorAll("section")];
  const tooLarge = (slide, content) => {
    const style = getComputedStyle(slide);
    const room = slide.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
    const wide = [...content.querySelectorAll(".math, .wide, pre")];
    return content.getBoundingClientRect().height > room
      || wide.some((part) => part.scrollWidth > part.clientWidth + 1);
  };
  function fit() {
    for (const slide of slides()) {
      const content = slide.firstElementChild;
      content.style.zoom = 1;
      for (let zoom = 0.95; fills.matches && zoom > 0.4 && tooLarge(slide, content); zoom -= 0.05) {
        content.style.zoom = zoom;
      }
    }
  }

  function current() {
    const middle = innerHeight / 2;
    return slides().findIndex((slide) => slide.getBoundingClientRect().bottom > middle);
  }
  function go(number) {
    const all = slides();
    all[Math.max(0, Math.min(number, all.length - 1))].scrollIntoView();
  }
  const moves = {
    ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1,
    ArrowLeft: -1, ArrowUp: -1, PageUp: -1, Home: -Infinity, End: Infinity,
  };
  addEventListener("keydown", (event) => {
    const uses = event.target.closest?.("input, textarea, select, button, a, summary, .wide");
    if (!(event.key in moves) || uses || event.altKey || event.ctrlKey || event.metaKey) return;
    if (!fills.matches && !/Left|Right/.test(event.key)) return; // a long page scrolls by itself
    event.preventDefault();
    go(current() + (event.key === " " && event.shiftKey ? -1 : moves[event.key]));
  });

  window.MathJax = {
    options: { ignoreHtmlClass: "deck", processHtmlClass: "math" },
    startup: { pageReady: () => MathJax.startup.defaultPageReady().then(fit) },
  };
  addEventListener("load", fit);
  addEventListener("resize", fit);
})();
