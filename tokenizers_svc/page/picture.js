// The picture that is asked about: where it comes from, and the box of its view.

const PREVIEW_SIDE = 1024;
const PREVIEW_REM = 22; // its greatest height
const SVG = "http://www.w3.org/2000/svg";
const CORNER_PX = 14; // how near the pointer has to be to a corner of the box to take hold of it

/** Read a file into {blob, name, bitmap, height, width}; no bitmap where the browser has no decoder. */
export async function readPicture(blob, name) {
  // The bytes are kept: a file that is changed or deleted later cannot be read again.
  const copy = new Blob([await blob.arrayBuffer()]);
  try {
    const bitmap = await createImageBitmap(copy);
    return { blob: copy, name, bitmap, height: bitmap.height, width: bitmap.width };
  } catch {
    return { blob: copy, name, bitmap: null, height: 0, width: 0 };
  }
}

/** Call `take(blob, name)` for every picture that is chosen, dropped or pasted. */
export function watchForPictures(input, take) {
  const named = (file) => take(file, file.name || `pasted.${file.type.split("/")[1] || "png"}`);
  input.addEventListener("change", () => {
    if (input.files.length) named(input.files[0]);
    input.value = ""; // so that choosing the same file again is a change
  });
  addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) named(file);
  });
  let depth = 0; // dragenter and dragleave come for every element on the way
  const mark = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dropping", depth > 0);
  };
  addEventListener("dragenter", () => mark(1));
  addEventListener("dragleave", () => mark(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-depth);
    const file = event.dataTransfer.files[0];
    if (file) named(file);
  });
}

/** Draw a picture, or a box of it, on white, as the service does with what is transparent. */
export function drawView(canvas, bitmap, [top, left, height, width, hflip], size) {
  canvas.width = canvas.height = size;
  drawOnWhite(canvas, hflip, bitmap, left, top, width, height);
}

/** Show the whole picture in `frame`, as large as there is room. */
export function drawPreview(frame, canvas, bitmap) {
  frame.style.width = `min(100%, ${(PREVIEW_REM * bitmap.width) / bitmap.height}rem)`;
  const scale = Math.min(1, PREVIEW_SIDE / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  drawOnWhite(canvas, false, bitmap, 0, 0, bitmap.width, bitmap.height);
}

function drawOnWhite(canvas, hflip, bitmap, ...source) {
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (hflip) context.setTransform(-1, 0, 0, 1, canvas.width, 0);
  context.drawImage(bitmap, ...source, 0, 0, canvas.width, canvas.height);
}

/** Return the box of the largest centred square: [top, left, height, width]. */
export function centreSquare({ height, width }) {
  const side = Math.min(height, width);
  return [Math.floor((height - side) / 2), Math.floor((width - side) / 2), side, side];
}

/** The box over the picture: drag a new one, move it, or pull it by a corner. */
export class BoxEditor {
  /** `onChange(box)` is called when a drag ends. */
  constructor(svg, onChange) {
    this.svg = svg;
    this.onChange = onChange;
    this.scrim = svg.appendChild(document.createElementNS(SVG, "path"));
    this.frame = svg.appendChild(document.createElementNS(SVG, "rect"));
    this.scrim.setAttribute("class", "scrim");
    this.frame.setAttribute("class", "frame");
    svg.addEventListener("pointerdown", (event) => this.#begin(event));
  }

  /** Show a box of a picture. */
  show({ height, width }, box) {
    this.size = { height, width };
    this.box = box;
    const [top, left, high, wide] = box;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.scrim.setAttribute(
      "d",
      `M0 0H${width}V${height}H0zM${left} ${top}v${high}h${wide}v${-high}z`,
    );
    Object.entries({ x: left, y: top, width: wide, height: high }).forEach(([name, value]) =>
      this.frame.setAttribute(name, value));
  }

  #place(event) {
    const bounds = this.svg.getBoundingClientRect();
    const { height, width } = this.size;
    const share = (value) => Math.min(1, Math.max(0, value));
    return [
      Math.round(share((event.clientY - bounds.top) / bounds.height) * height),
      Math.round(share((event.clientX - bounds.left) / bounds.width) * width),
    ];
  }

  #begin(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.svg.setPointerCapture(event.pointerId);
    const start = this.#place(event);
    const before = this.box;
    const change = this.#grip(start, before);
    const move = (moved) => this.show(this.size, change(this.#place(moved), moved.shiftKey));
    const end = (ended) => {
      this.svg.removeEventListener("pointermove", move);
      this.svg.removeEventListener("pointerup", end);
      this.svg.removeEventListener("pointercancel", end);
      if (ended.type === "pointercancel") this.show(this.size, before);
      else if (this.box.join() !== before.join()) this.onChange(this.box);
    };
    this.svg.addEventListener("pointermove", move);
    this.svg.addEventListener("pointerup", end);
    this.svg.addEventListener("pointercancel", end);
  }

  /** Return what a drag from `start` does to the box: a function of the pointer's place. */
  #grip([y, x], [top, left, height, width]) {
    const scale = this.size.width / this.svg.getBoundingClientRect().width;
    const near = Math.min(CORNER_PX * scale, height / 3, width / 3);
    for (const [cornerY, oppositeY] of [[top, top + height], [top + height, top]]) {
      for (const [cornerX, oppositeX] of [[left, left + width], [left + width, left]]) {
        if (Math.hypot(y - cornerY, x - cornerX) < near) return this.#spanner([oppositeY, oppositeX]);
      }
    }
    const isWhole = height === this.size.height && width === this.size.width;
    const isInside = y > top && y < top + height && x > left && x < left + width;
    if (!isInside || isWhole) return this.#spanner([y, x]);
    const within = (value, most) => Math.min(most, Math.max(0, value));
    return ([toY, toX]) => [
      within(top + toY - y, this.size.height - height),
      within(left + toX - x, this.size.width - width),
      height,
      width,
    ];
  }

  #spanner([y, x]) {
    return ([toY, toX], isSquare) => {
      let [high, wide] = [Math.abs(toY - y), Math.abs(toX - x)];
      if (isSquare) high = wide = Math.min(high, wide);
      const top = Math.min(toY < y ? y - high : y, this.size.height - 1);
      const left = Math.min(toX < x ? x - wide : x, this.size.width - 1);
      return [top, left, Math.max(1, high), Math.max(1, wide)];
    };
  }
}
