/* <book-explorer>: sliders over stored results. The markup and its data come from lib/explorer.py.
   No fetch and no modules, since browsers block both on file://. */
(() => {
  "use strict";

  /* Return the SVG path of one frame of a series; lib/explorer_draw.py draws the same one. */
  function path(kind, data, row) {
    const { x, top, floor } = data;
    const marks = row.filter((v) => v !== null);
    if (kind === "marker") return marks.map((v) => `M${v / 10} ${top}V${floor}`).join("");
    if (kind === "dots") return marks.map((v) => `M${v / 10} ${floor - 12}l5 12h-10z`).join("");
    let d = data.fill ? `M${x[0] / 10} ${floor}` : "";
    let pen = data.fill ? "L" : "M";
    row.forEach((value, i) => {
      if (value === null && !data.fill) {
        pen = "M";
        return;
      }
      const y = value === null ? floor : value / 10;
      if (data.step) {
        const left = (x[Math.max(i - 1, 0)] + x[i]) / 20;
        const right = (x[i] + x[Math.min(i + 1, x.length - 1)]) / 20;
        d += `${pen}${left} ${y}H${right}`;
      } else {
        d += `${pen}${x[i] / 10} ${y}`;
      }
      pen = "L";
    });
    return data.fill ? `${d}L${x.at(-1) / 10} ${floor}` : d;
  }

  class BookExplorer extends HTMLElement {
    connectedCallback() {
      if (this.parts) return;
      const data = JSON.parse(this.querySelector("script").textContent);
      this.axes = data.axes;
      this.inputs = [...this.querySelectorAll("input")];
      this.outputs = [...this.querySelectorAll("output")];
      this.status = this.querySelector(".ex-say");
      this.parts = []; /* what is redrawn: {strides, show(frame number)} */
      const panels = this.querySelectorAll(".ex-panel");
      data.panels.forEach((panel, i) => {
        if (panel.src) this.addPicture(panel, panels[i].querySelector("img"));
        else this.addCurves(panel, panels[i].querySelectorAll(".ex-plot .ex-series"));
      });
      const cells = this.querySelectorAll("dd");
      this.values = data.values.map((value, i) => ({
        ...value,
        show: (frame) => (cells[i].textContent = value.text[frame]),
      }));
      this.parts.push(...this.values);
      this.inputs.forEach((input, axis) => input.addEventListener("input", () => this.move(axis)));
      /* Browsers may restore a slider's old position on reload. */
      this.inputs.forEach((_, axis) => this.move(axis, true));
    }

    addPicture(panel, still) {
      const canvas = document.createElement("canvas");
      canvas.width = panel.width;
      canvas.height = panel.height;
      canvas.className = still.className;
      canvas.style.cssText = still.style.cssText;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", still.alt);
      const part = { strides: panel.strides, show() {} };
      const sheet = new Image();
      sheet.onload = () => {
        const context = canvas.getContext("2d");
        part.show = (frame) => {
          const left = (frame % panel.columns) * panel.width;
          const top = Math.floor(frame / panel.columns) * panel.height;
          const size = [panel.width, panel.height];
          context.drawImage(sheet, left, top, ...size, 0, 0, ...size);
        };
        part.show(this.frame(part));
        still.replaceWith(canvas);
      };
      sheet.src = panel.src;
      this.parts.push(part);
    }

    addCurves(panel, lines) {
      panel.series.forEach(({ kind, strides, frames }, i) => {
        const show = (frame) => lines[i].setAttribute("d", path(kind, panel, frames[frame]));
        this.parts.push({ strides, show });
      });
    }

    frame(part) {
      return part.strides.reduce((sum, step, axis) => sum + step * this.inputs[axis].value, 0);
    }

    move(axis, silent) {
      const { label, values } = this.axes[axis];
      const value = values[this.inputs[axis].value];
      this.outputs[axis].textContent = value;
      this.inputs[axis].setAttribute("aria-valuetext", `${label} = ${value}`);
      for (const part of this.parts) if (part.strides[axis]) part.show(this.frame(part));
      /* A screen reader hears the numbers once the slider rests. */
      clearTimeout(this.timer);
      if (!silent) this.timer = setTimeout(() => this.say(), 400);
    }

    say() {
      const numbers = this.values.map((part) => `${part.label}: ${part.text[this.frame(part)]}`);
      this.status.textContent = numbers.join(", ");
    }
  }

  customElements.define("book-explorer", BookExplorer);
})();
