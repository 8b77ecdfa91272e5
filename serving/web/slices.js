// Slices on a canvas: grey values through a window, the mask over them, scrolling, zooming, windowing by dragging.

import { colour } from "./colours.js";

const STEPS = 4; // pixels of a drag that change width or level by a hundredth of the range

export class Slices {
  /** `changed` is called after each picture, with this. */
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, image: null, slice: 0, opacity: 0.35, centre: 40, width: 80 });
    this.context = canvas.getContext("2d");
    this.grey = document.createElement("canvas");
    this.over = document.createElement("canvas");
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("wheel", event => this.#wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", event => this.#press(event));
    canvas.addEventListener("pointermove", event => this.#move(event));
    canvas.addEventListener("pointerup", () => { this.drag = null; });
    canvas.addEventListener("dblclick", () => this.fit());
  }

  /** Shows a new scan; starts where most was found, or in the middle. */
  open(image, mask) {
    Object.assign(this, { image, mask, wheeled: 0 });
    for (const layer of [this.grey, this.over]) Object.assign(layer, { width: image.columns, height: image.rows });
    this.slice = this.fullest(0, image.slices - 1) ?? Math.floor(image.slices / 2);
    this.auto = range(image);
    this.fit();
  }

  /** The slice with most foreground of `value` (0: of any class) between two slices; null where there is none. */
  fullest(first, last, value = 0) {
    const { rows, columns } = this.image, size = rows * columns;
    let best = null, most = 0;
    for (let slice = first; slice <= last; slice++) {
      let count = 0;
      for (let i = slice * size; i < (slice + 1) * size; i++) count += value ? this.mask.values[i] === value : this.mask.values[i] > 0;
      if (count > most) [best, most] = [slice, count];
    }
    return best;
  }

  go(slice) {
    this.slice = Math.max(0, Math.min(this.image.slices - 1, slice));
    this.draw();
  }

  setWindow(centre, width) {
    Object.assign(this, { centre, width: Math.max(width, this.auto.least) });
    this.draw();
  }

  fit() {
    Object.assign(this, { zoom: 1, shift: [0, 0] });
    this.draw();
  }

  zoomBy(factor) {
    this.zoom = Math.max(1, Math.min(12, this.zoom * factor));
    if (this.zoom === 1) this.shift = [0, 0];
    this.draw();
  }

  /** The value under a pointer with its place, or null outside. */
  at(event) {
    const box = this.canvas.getBoundingClientRect(), ratio = this.canvas.width / box.width;
    const x = Math.floor(((event.clientX - box.left) * ratio - this.place.x) / this.place.width * this.image.columns);
    const y = Math.floor(((event.clientY - box.top) * ratio - this.place.y) / this.place.height * this.image.rows);
    if (x < 0 || y < 0 || x >= this.image.columns || y >= this.image.rows) return null;
    const index = (this.slice * this.image.rows + y) * this.image.columns + x;
    return { x, y, value: this.image.values[index] * this.image.slope + this.image.intercept, label: this.mask.values[index] };
  }

  draw() {
    if (!this.image || !this.canvas.clientWidth) return;
    const { canvas, context, image } = this, ratio = window.devicePixelRatio;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    this.#paint();
    const wide = image.columns * image.spacing[0], high = image.rows * image.spacing[1];
    const scale = Math.min(canvas.width / wide, canvas.height / high) * this.zoom;
    const [width, height] = [wide * scale, high * scale];
    this.place = { x: (canvas.width - width) / 2 + this.shift[0] * ratio, y: (canvas.height - height) / 2 + this.shift[1] * ratio, width, height };
    context.imageSmoothingQuality = "high";
    context.drawImage(this.grey, this.place.x, this.place.y, width, height);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.over, this.place.x, this.place.y, width, height);
    this.changed(this);
  }

  /** Grey values of the slice, and the mask: filled as the opacity says, outlined in full. */
  #paint() {
    const { rows, columns, values, slope, intercept } = this.image, size = rows * columns, from = this.slice * size;
    const grey = new ImageData(columns, rows), over = new ImageData(columns, rows), mask = this.mask.values;
    const low = this.centre - this.width / 2, factor = 255 / this.width, fill = Math.round(255 * this.opacity);
    for (let i = 0; i < size; i++) {
      const level = (values[from + i] * slope + intercept - low) * factor, at = 4 * i;
      grey.data[at] = grey.data[at + 1] = grey.data[at + 2] = level; // clamped by its type
      grey.data[at + 3] = 255;
      const value = mask[from + i];
      if (!value || !fill) continue;
      const x = i % columns, here = from + i;
      const edge = x === 0 || x === columns - 1 || i < columns || i >= size - columns || mask[here - 1] !== value ||
        mask[here + 1] !== value || mask[here - columns] !== value || mask[here + columns] !== value;
      over.data.set(colour(value), at);
      over.data[at + 3] = edge ? 255 : fill;
    }
    this.grey.getContext("2d").putImageData(grey, 0, 0);
    this.over.getContext("2d").putImageData(over, 0, 0);
  }

  #wheel(event) {
    event.preventDefault();
    if (event.ctrlKey) return this.zoomBy(Math.exp(-event.deltaY / 200));
    // A notch of a wheel is about 100, a touchpad sends many small steps.
    this.wheeled += event.deltaMode ? event.deltaY * 40 : event.deltaY;
    const steps = Math.trunc(this.wheeled / 40);
    if (!steps) return;
    this.wheeled = 0;
    this.go(this.slice + Math.sign(steps) * Math.min(3, Math.abs(steps) > 3 ? 2 : 1));
  }

  #press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = { x: event.clientX, y: event.clientY, pan: event.button === 1 || event.shiftKey };
  }

  #move(event) {
    if (!this.drag || !this.image) return;
    const [right, down] = [event.clientX - this.drag.x, event.clientY - this.drag.y];
    Object.assign(this.drag, { x: event.clientX, y: event.clientY });
    if (this.drag.pan) {
      this.shift = [this.shift[0] + right, this.shift[1] + down];
      return this.draw();
    }
    const step = Math.max(this.auto.least, this.width / 100) / STEPS * 2;
    this.setWindow(this.centre + down * step, this.width + right * step * 2);
  }
}

/** The window from the 1st to the 99.5th percentile of what is not background, and the least width that makes sense. */
function range({ values, slope, intercept }) {
  const stride = Math.max(1, Math.floor(values.length / 200000)), some = [];
  let darkest = Infinity;
  for (let i = 0; i < values.length; i += stride) darkest = Math.min(darkest, values[i]);
  for (let i = 0; i < values.length; i += stride) if (values[i] > darkest) some.push(values[i] * slope + intercept);
  some.sort((a, b) => a - b);
  const low = some[Math.floor(some.length * 0.01)] ?? 0, high = some[Math.floor(some.length * 0.995)] ?? 1;
  const width = Math.max(high - low, Math.abs(slope));
  return { centre: (low + high) / 2, width, least: Math.max(width / 1000, Math.abs(slope)) };
}
