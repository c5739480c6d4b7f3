/* <book-selector>: mark pictures in a grid. The markup comes from lib/selector.py.
   No fetch and no modules, since browsers block both on file://. */
(() => {
  "use strict";

  const STEPS = { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: (n) => -n, ArrowDown: (n) => n };

  class BookSelector extends HTMLElement {
    connectedCallback() {
      if (this.pictures) return;
      this.pictures = [...this.querySelectorAll(".sel-picture")];
      this.note = this.querySelector(".sel-note");
      this.text = this.querySelector("pre");
      const grid = this.querySelector(".sel-grid");
      grid.addEventListener("click", (event) => this.toggle(event.target.closest("button")));
      grid.addEventListener("keydown", (event) => this.key(event));
      grid.addEventListener("focusin", (event) => this.reach(event.target));
      this.querySelector(".sel-save").addEventListener("click", () => this.save());
      this.querySelector(".sel-copy").addEventListener("click", () => this.copy());
      this.querySelector(".sel-clear").addEventListener("click", () => this.clear());
      this.reach(this.pictures[0]);
      this.show();
    }

    /* Let Tab stop at one picture only, the last that had the focus. */
    reach(picture) {
      for (const other of this.pictures) other.tabIndex = other === picture ? 0 : -1;
    }

    key(event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const last = this.pictures.length - 1;
      const at = this.pictures.indexOf(event.target);
      let to = { Home: 0, End: last }[event.key];
      if (STEPS[event.key]) {
        const top = this.pictures[0].offsetTop;
        const columns = this.pictures.filter((picture) => picture.offsetTop === top).length;
        to = at + STEPS[event.key](columns);
      }
      if (to === undefined) return;
      /* The page would scroll, and the theme turn to the next chapter. */
      event.preventDefault();
      event.stopPropagation();
      if (to >= 0 && to <= last) this.pictures[to].focus();
    }

    toggle(picture) {
      if (!picture) return;
      picture.setAttribute("aria-pressed", picture.getAttribute("aria-pressed") !== "true");
      this.show();
    }

    clear() {
      for (const picture of this.pictures) picture.setAttribute("aria-pressed", "false");
      this.show();
    }

    show() {
      const marked = [...this.pictures.keys()].filter(
        (number) => this.pictures[number].getAttribute("aria-pressed") === "true",
      );
      const { format, feature, fingerprint } = this.dataset;
      const pictures = this.pictures.length;
      this.text.textContent = JSON.stringify({ format, feature, pictures, fingerprint, marked });
      const count = this.querySelector(".sel-count");
      count.textContent = `${marked.length} of ${pictures} marked`;
      this.note.textContent = "";
    }

    save() {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([this.text.textContent], { type: "application/json" }));
      link.download = `marked-${this.dataset.feature.replace(/\W+/g, "-")}.json`;
      link.click();
      URL.revokeObjectURL(link.href);
      this.note.textContent = "Saved.";
    }

    async copy() {
      try {
        await navigator.clipboard.writeText(this.text.textContent);
        this.note.textContent = "Copied.";
      } catch {
        /* Some browsers refuse it for a file; the reader can always copy the text by hand. */
        this.querySelector("details").open = true;
        getSelection().selectAllChildren(this.text);
        this.text.focus();
        this.note.textContent = "Press Ctrl+C to copy the text below.";
      }
    }
  }

  customElements.define("book-selector", BookSelector);
})();
