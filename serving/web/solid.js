// Lesions and head in three dimensions, by NiiVue, which is loaded when it is first needed.

import { COLOURS } from "./colours.js";

const RENDER = 4; // NiiVue's number for a view in three dimensions
// How the head is shown around the lesions: as a body cut open by scrolling, as glass, or not at all.
export const MODES = { Glass: 0.4, Solid: 1, "Lesions only": 0 };

export class Solid {
  constructor(canvas) {
    this.canvas = canvas;
    this.cut = 2; // beyond the head: nothing is cut off
    canvas.addEventListener("keydown", event => this.#key(event));
    canvas.addEventListener("wheel", event => this.#wheel(event), { passive: false, capture: true });
  }

  /** Shows a scan; throws where the viewer is not there or the browser cannot draw it. */
  async open(image, mask, mode, window) {
    const { Niivue } = await import("./niivue.js");
    if (!this.niivue) {
      this.niivue = new Niivue({
        backColor: [0, 0, 0, 1], show3Dcrosshair: false, isColorbar: false, dragAndDropEnabled: false, loadingText: "",
        isOrientCube: true, logLevel: "silent", clipPlaneColor: [0, 0, 0, 0],
        viewModeHotKey: "None", clipPlaneHotKey: "None", // its keys would be a second set beside the page's
      });
      await this.niivue.attachToCanvas(this.canvas);
      this.niivue.setSliceType(RENDER);
      this.niivue.setScale(1.3);
      this.#turn(140, 15);
    }
    for (const volume of [...this.niivue.volumes]) this.niivue.removeVolume(volume);
    await this.niivue.loadFromArrayBuffer(image.buffer.slice(0), "image.nii");
    await this.niivue.loadFromArrayBuffer(mask.buffer.slice(0), "mask.nii");
    const [head, lesions] = this.niivue.volumes;
    head.cal_min = window.low;
    head.cal_max = window.high;
    const named = [[0, 0, 0], ...COLOURS];
    lesions.setColormapLabel({
      R: named.map(rgb => rgb[0]), G: named.map(rgb => rgb[1]), B: named.map(rgb => rgb[2]),
      A: named.map((_, index) => (index ? 255 : 0)), I: named.map((_, index) => index), labels: named.map(String),
    });
    this.cut = 2;
    this.setMode(mode);
  }

  setMode(mode) {
    const [head, lesions] = this.niivue.volumes;
    head.opacity = MODES[mode];
    lesions.opacity = 1;
    this.niivue.updateGLVolume(); // once: it takes as long as all the rest
    this.#look();
  }

  #turn(azimuth, elevation) {
    this.niivue.setRenderAzimuthElevation((azimuth + 360) % 360, Math.max(-90, Math.min(90, elevation)));
  }

  /** Draws, cut towards where the eye is: by dragging, too, NiiVue turns the head. */
  #look() {
    const { renderAzimuth, renderElevation } = this.niivue.scene;
    this.niivue.setClipPlane([this.cut, renderAzimuth, renderElevation]);
  }

  #key(event) {
    const turns = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10] };
    if (turns[event.key]) {
      const { renderAzimuth, renderElevation } = this.niivue.scene, [right, up] = turns[event.key];
      this.#turn(renderAzimuth + right, renderElevation + up);
    } else if (event.key === "PageUp" || event.key === "PageDown") {
      this.#cutBy(event.key === "PageUp" ? -0.05 : 0.05);
    } else return;
    event.preventDefault();
    event.stopPropagation();
    this.#look();
  }

  #wheel(event) {
    event.preventDefault();
    event.stopPropagation();
    this.#cutBy(event.deltaY > 0 ? -0.03 : 0.03);
    this.#look();
  }

  #cutBy(step) {
    this.cut = Math.max(-0.5, Math.min(0.55, (this.cut > 1 ? 0.55 : this.cut) + step));
  }
}
