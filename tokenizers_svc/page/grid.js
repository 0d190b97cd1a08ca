// The patches: which one is pointed at, and all that have the same id, marked on every square.

const SVG = "http://www.w3.org/2000/svg";

/** Marks and selection over the squares; one of them, the map, takes the keyboard. */
export class PatchGrid {
  /**
   * `onSelect(index, isHeld)` is called when the chosen patch changes; index is null for none.
   * `describe(index)` returns what a screen reader says about a patch.
   */
  constructor({ map, squares, rowGroup, onSelect, describe }) {
    Object.assign(this, { map, squares, rowGroup, onSelect, describe });
    this.ids = [];
    this.index = null;
    this.isHeld = false;
    map.addEventListener("keydown", (event) => this.#press(event));
    map.addEventListener("focus", () => {
      if (this.index === null && this.ids.length) this.select(0);
      else this.#announce();
    });
    for (const square of squares) {
      square.addEventListener("pointermove", (event) => this.#point(square, event));
      square.addEventListener("pointerleave", () => !this.#hasFocus() && !this.isHeld && this.select(null));
      square.addEventListener("pointerdown", (event) => this.#hold(square, event));
    }
  }

  /** Show other ids, rows x cols of them; the chosen patch stays where the grid is the same. */
  show(ids, rows, cols) {
    const isSame = this.rows === rows && this.cols === cols && this.ids.length;
    Object.assign(this, { ids, rows, cols });
    this.map.setAttribute("aria-rowcount", rows);
    this.map.setAttribute("aria-colcount", cols);
    this.map.tabIndex = 0;
    for (const square of this.squares) marksOf(square).setAttribute("viewBox", `0 0 ${cols} ${rows}`);
    if (!isSame) this.isHeld = false;
    this.select(isSame ? this.index : null);
  }

  /** Forget the ids. */
  clear() {
    this.ids = [];
    this.isHeld = false;
    this.map.removeAttribute("tabindex");
    this.select(null);
  }

  /** Choose a patch, or none. */
  select(index, isHeld = this.isHeld) {
    this.index = index;
    this.isHeld = isHeld && index !== null;
    this.#mark();
    this.#announce();
    this.onSelect(index, this.isHeld);
  }

  /** Return the indices of all patches with the same id as one. */
  same(index) {
    return this.ids.flatMap((id, other) => (id === this.ids[index] ? [other] : []));
  }

  #hasFocus() {
    return document.activeElement === this.map;
  }

  #indexAt(square, event) {
    const bounds = square.getBoundingClientRect();
    const row = Math.floor(((event.clientY - bounds.top) / bounds.height) * this.rows);
    const col = Math.floor(((event.clientX - bounds.left) / bounds.width) * this.cols);
    const isInside = row >= 0 && row < this.rows && col >= 0 && col < this.cols;
    return isInside ? row * this.cols + col : null;
  }

  #point(square, event) {
    if (this.isHeld || !this.ids.length) return;
    const index = this.#indexAt(square, event);
    if (index !== null && index !== this.index) this.select(index);
  }

  #hold(square, event) {
    if (!this.ids.length || event.button !== 0) return;
    const index = this.#indexAt(square, event);
    const isAgain = this.isHeld && index === this.index;
    this.select(index, !isAgain);
  }

  #press(event) {
    if (!this.ids.length || event.altKey || event.metaKey) return;
    const at = this.index ?? 0;
    const { rows, cols } = this;
    const [row, col] = [Math.floor(at / cols), at % cols];
    const last = rows * cols - 1;
    const targets = {
      ArrowLeft: () => (col ? at - 1 : at),
      ArrowRight: () => (col < cols - 1 ? at + 1 : at),
      ArrowUp: () => (row ? at - cols : at),
      ArrowDown: () => (row < rows - 1 ? at + cols : at),
      Home: () => (event.ctrlKey ? 0 : at - col),
      End: () => (event.ctrlKey ? last : at - col + cols - 1),
      PageUp: () => col,
      PageDown: () => last - cols + 1 + col,
      n: () => this.#next(at, 1),
      N: () => this.#next(at, -1),
    };
    if (event.key === "Enter" || event.key === " ") this.select(at, !this.isHeld);
    else if (event.key === "Escape") this.select(this.index, false);
    else if (targets[event.key] && (!event.ctrlKey || /Home|End/.test(event.key))) {
      this.select(targets[event.key]());
    } else return;
    event.preventDefault();
  }

  #next(index, step) {
    const same = this.same(index);
    return same.at((same.indexOf(index) + step) % same.length);
  }

  #mark() {
    for (const square of this.squares) {
      const svg = marksOf(square);
      svg.replaceChildren();
      if (this.index === null) continue;
      const cell = (index) => `M${index % this.cols} ${Math.floor(index / this.cols)}h1v1h-1z`;
      const same = this.same(this.index).map(cell).join("");
      const whole = `M0 0V${this.rows}H${this.cols}V0z`;
      draw(svg, "scrim", whole + same);
      draw(svg, "same", same);
      draw(svg, "chosen-ground", cell(this.index));
      draw(svg, this.isHeld ? "chosen held" : "chosen", cell(this.index));
    }
  }

  // A grid of which only the chosen cell is in the document; its place is told by the indices.
  #announce() {
    if (this.index === null) {
      this.map.removeAttribute("aria-activedescendant");
      this.rowGroup.replaceChildren();
      return;
    }
    const row = document.createElement("div");
    row.setAttribute("role", "row");
    row.setAttribute("aria-rowindex", Math.floor(this.index / this.cols) + 1);
    const cell = row.appendChild(document.createElement("div"));
    cell.setAttribute("role", "gridcell");
    cell.setAttribute("aria-colindex", (this.index % this.cols) + 1);
    cell.setAttribute("aria-selected", this.isHeld);
    cell.id = `patch-${this.index}`;
    cell.textContent = this.describe(this.index);
    this.rowGroup.replaceChildren(row);
    this.map.setAttribute("aria-activedescendant", cell.id);
  }
}

function marksOf(square) {
  return square.querySelector("svg.marks");
}

function draw(svg, kind, path) {
  const element = svg.appendChild(document.createElementNS(SVG, "path"));
  element.setAttribute("class", kind);
  element.setAttribute("d", path);
}
