// The page: what is pressed, dropped and typed, and what follows.

import { Problem, ask, askJson } from "./api.js";
import { clear, element, show } from "./findings.js";
import * as jobs from "./jobs.js";
import * as keys from "./keys.js";
import { readNifti } from "./nifti.js";
import { MODES, Solid } from "./solid.js";
import { Slices } from "./slices.js";
import * as token from "./token.js";
import { dropped, folders, megabytes, nameOf, request, wanted } from "./upload.js";

// Level and width in HU, as the presets of `preprocess.window`; null: of the scan's own values.
const PRESETS = { Brain: [40, 80], Subdural: [80, 200], Stroke: [40, 40], Bone: [600, 2800], Auto: null };
const at = id => document.getElementById(id);
const slices = new Slices(at("canvas"), told);
const solid = new Solid(at("solid-canvas"));
let scan = null; // { files, answer, image, mask, lesion }
let running = null, mode = "Glass", solidOf = null;

// Opening

async function open(all) {
  const files = wanted(all);
  if (!files.length) return;
  running?.abort();
  const control = running = new AbortController(), started = performance.now();
  hideProblem();
  busy(`Segmenting ${nameOf(files)} (${megabytes(files).toFixed(1)} MB) …`);
  try {
    const reply = await ask("v1/segment", { ...request(files, "multipart/form-data"), signal: control.signal });
    const form = await reply.formData();
    const [answer, numbers] = await Promise.all(["answer", "numbers"].map(async part => JSON.parse(await form.get(part).text())));
    const [image, mask] = await Promise.all(["image", "mask"].map(part => readNifti(form.get(part))));
    if (control !== running) return;
    // Slices without a mask are not shown: lesions are told of all, and meant of those that are.
    for (const lesion of answer.lesions) lesion.slices = lesion.slices.map(number => Math.max(0, numbers.indexOf(number)));
    scan = { files, answer, image, mask, lesion: -1 };
    view("slices");
    for (const id of ["invite", "slices"]) at(id).hidden = id === "invite";
    at("slider").max = image.slices;
    at("scroll").hidden = image.slices === 1;
    scan.hounsfield = isHounsfield(image);
    for (const button of at("presets").children) button.disabled = Boolean(PRESETS[button.textContent]) && !scan.hounsfield;
    slices.open(image, mask);
    setPreset(scan.hounsfield ? "Brain" : "Auto");
    marks();
    show(scan, nameOf(files), (performance.now() - started) / 1000, choose);
    at("canvas").focus();
  } catch (error) {
    if (error.name === "AbortError" || control !== running) return;
    complain(`Not segmented: ${nameOf(files)}`, error);
    if (error.reason === "series_mixed") offer(folders(files));
  } finally {
    if (control === running) busy("");
  }
}

/** The folders of what was dropped, each of which may be a series. */
function offer(found) {
  if (found.length < 2) return;
  const choices = element("div", { className: "choices" });
  buttons(choices, found, ({ files }) => open(files), ({ name, files }) => `${name} (${files.length})`);
  at("problem").append(choices);
}

/** Air in the volume: the values are of CT. */
function isHounsfield({ values, slope, intercept }) {
  for (let i = 0; i < values.length; i += 97) if (values[i] * slope + intercept < -500) return true;
  return false;
}

/** Where on the slider something was found. */
function marks() {
  const { answer, image } = scan;
  at("marks").replaceChildren(...answer.lesions.map(({ slices: [first, last] }) => {
    const mark = element("i");
    mark.style.top = `${100 * first / image.slices}%`;
    mark.style.height = `${100 * (last - first + 1) / image.slices}%`;
    return mark;
  }));
}

function choose(lesion, value) {
  const [first, last] = lesion.slices;
  scan.lesion = scan.answer.lesions.indexOf(lesion);
  view("slices");
  slices.go(slices.fullest(first, last, value) ?? first);
  [...at("lesions").querySelectorAll("button")].forEach((one, index) => one.setAttribute("aria-current", index === scan.lesion));
}

async function download(button) {
  button.disabled = true;
  hideProblem();
  try {
    const reply = await ask("v1/segment", request(scan.files, button.dataset.accept));
    const address = URL.createObjectURL(await reply.blob());
    const name = scan.files.length > 1 ? "series" : scan.files[0].name.replace(/\.[^.]*$/, "");
    element("a", { href: address, download: `${name}-${button.dataset.suffix}` }).click();
    URL.revokeObjectURL(address);
  } catch (error) {
    complain(`No ${button.textContent} for this scan`, error);
  } finally {
    button.disabled = false;
  }
}

// Showing

function told({ slice, image, centre, width, zoom }) {
  at("slider").value = slice + 1;
  const words = `Slice ${slice + 1} of ${image.slices}`;
  at("corner-tl").textContent = words;
  at("corner-bl").textContent = `L ${Math.round(centre)}  W ${Math.round(width)}`;
  at("corner-tr").textContent = zoom > 1 ? `${zoom.toFixed(1)} ×` : "";
  ["left", "right", "top", "bottom"].forEach((side, index) => { at(`side-${side}`).textContent = image.letters[index]; });
  at("slider").setAttribute("aria-valuetext", words);
  at("canvas").setAttribute("aria-label", `${words}, level ${Math.round(centre)}, width ${Math.round(width)}`);
  at("told").textContent = words;
}

function setPreset(name) {
  if (scan && PRESETS[name] && !scan.hounsfield) return;
  [...at("presets").children].forEach(button => button.setAttribute("aria-pressed", button.textContent === name));
  if (!scan) return;
  const [centre, width] = PRESETS[name] ?? [slices.auto.centre, slices.auto.width];
  slices.setWindow(centre, width);
}

async function view(which) {
  if (which === "solid" && !scan) return;
  const flat = which === "slices";
  if (!flat && scan.image.why) return complain("No 3D view of this scan", new Problem("", scan.image.why));
  at("slices").hidden = !flat || !scan;
  at("solid").hidden = flat;
  for (const id of ["presets", "mask-opacity"]) at(id).hidden = !flat;
  at("solid-modes").hidden = flat;
  at("view-slices").setAttribute("aria-pressed", flat);
  at("view-solid").setAttribute("aria-pressed", !flat);
  if (flat) return slices.draw();
  if (solidOf === scan) return at("solid-canvas").focus();
  try {
    busy("Building the 3D view …");
    // Of CT skin to bone; else what the eyes have set for the slices.
    const tissue = scan.hounsfield ? { low: -300, high: 700 } : { low: slices.auto.centre - slices.auto.width / 2, high: slices.auto.centre + slices.auto.width / 2 };
    await solid.open(scan.image, scan.mask, mode, tissue);
    solidOf = scan;
    at("solid-canvas").focus();
  } catch (error) {
    await view("slices");
    complain("No 3D view", new Problem("", "The viewer could not be loaded, or this browser has no WebGL 2. " + error.message));
  } finally {
    busy("");
  }
}

function setMode(name) {
  mode = name;
  [...at("solid-modes").children].forEach(button => button.setAttribute("aria-pressed", button.textContent === name));
  if (solidOf) solid.setMode(name);
}

function setOpacity(percent) {
  at("opacity").value = percent;
  slices.opacity = at("opacity").value / 100;
  slices.draw();
}

function busy(text) {
  at("busy").hidden = !text;
  at("busy-text").textContent = text;
}

function complain(what, error) {
  const close = element("button", { type: "button", className: "small" }, "Close");
  close.addEventListener("click", hideProblem);
  const words = error instanceof Problem ? (error.reason ? error.words : "") : "The answer could not be read.";
  at("problem").replaceChildren(close, element("strong", {}, what), [words, error.message && sentence(error.message)].filter(Boolean).join(" "));
  if (error.reason) at("problem").append(" ", element("code", {}, error.reason));
  at("problem").hidden = false;
  at("problem").focus();
}

function sentence(detail) {
  return `${detail[0].toUpperCase()}${detail.slice(1)}${/[.!?]$/.test(detail) ? "" : "."}`;
}

function hideProblem() {
  at("problem").hidden = true;
}

// Keys

let shown = 35; // the opacity to come back to
const step = by => () => slices.go(slices.slice + by);
const lesion = by => () => {
  const all = at("lesions").querySelectorAll("button");
  if (all.length) all[(scan.lesion + by + all.length * 2) % all.length].click();
};
const ACTIONS = {
  ArrowUp: step(-1), ArrowDown: step(1), PageUp: step(-5), PageDown: step(5), Home: step(-1e6), End: step(1e6),
  n: lesion(1), p: () => lesion(scan.lesion < 0 ? 0 : -1)(),
  m: () => { const on = Number(at("opacity").value); if (on) shown = on; setOpacity(on ? 0 : shown); },
  "[": () => setOpacity(Number(at("opacity").value) - 10), "]": () => setOpacity(Number(at("opacity").value) + 10),
  "+": () => slices.zoomBy(1.25), "=": () => slices.zoomBy(1.25), "-": () => slices.zoomBy(0.8), 0: () => slices.fit(),
  v: () => view(at("solid").hidden ? "solid" : "slices"),
};
function level(up, wider) {
  const by = Math.max(slices.auto.least, slices.width / 20);
  slices.setWindow(slices.centre + up * by, slices.width + wider * by);
}

function tab(name) {
  for (const one of ["viewer", "jobs"]) {
    at(one).hidden = one !== name;
    at(`tab-${one}`).setAttribute("aria-selected", one === name);
    at(`tab-${one}`).tabIndex = one === name ? 0 : -1;
  }
  jobs.watch(name === "jobs");
  slices.draw();
}

// Wiring

function buttons(into, names, press, label = name => name) {
  into.append(...names.map(name => {
    const button = element("button", { type: "button" }, label(name));
    button.addEventListener("click", () => press(name));
    return button;
  }));
}

const on = (id, kind, action) => at(id).addEventListener(kind, action);
buttons(at("presets"), Object.keys(PRESETS), setPreset);
buttons(at("solid-modes"), Object.keys(MODES), setMode);
setPreset("Auto");
setMode(mode);
on("pick-files", "click", () => at("files").click());
on("pick-folder", "click", () => at("folder").click());
on("another", "click", () => at("files").click());
for (const id of ["files", "folder"]) on(id, "change", event => { open([...event.target.files]); event.target.value = ""; });
on("slider", "input", event => slices.go(event.target.value - 1));
on("opacity", "input", event => setOpacity(event.target.value));
on("view-slices", "click", () => view("slices"));
on("view-solid", "click", () => view("solid"));
on("cancel", "click", () => { running?.abort(); busy(""); });
on("canvas", "pointermove", event => {
  const here = scan && slices.at(event);
  at("corner-br").textContent = here ? `${here.x}, ${here.y}: ${Math.round(here.value * 10) / 10}` : "";
});
for (const name of ["viewer", "jobs"]) on(`tab-${name}`, "click", () => tab(name));
for (const [from, to] of [["viewer", "jobs"], ["jobs", "viewer"]]) {
  on(`tab-${from}`, "keydown", event => { if (/^Arrow(Left|Right)$/.test(event.key)) { tab(to); at(`tab-${to}`).focus(); } });
}
document.querySelectorAll("[data-accept]").forEach(button => button.addEventListener("click", () => download(button)));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, async event => {
    event.preventDefault();
    at("stage").classList.toggle("over", kind === "dragover");
    if (kind === "drop") { tab("viewer"); open(await dropped(event.dataTransfer)); }
  });
}
at("curl").textContent = ["curl --data-binary @slice.dcm -o mask.png", "-H 'Content-Type: application/dicom'", "-H 'Accept: image/png'",
  `${location.origin}/v1/segment`].join(" \\\n  ");
clear();
jobs.prepare();
token.prepare();
keys.prepare({ ready: () => scan, actions: ACTIONS, level, preset: number => setPreset(Object.keys(PRESETS)[number - 1]), pick: () => at("files").click() });
askJson("v1/model").then(model => {
  at("model").replaceChildren("model ", element("b", {}, `${model.name} ${model.version}`), model.alias ? ` · ${model.alias}` : "", ` · ${model.labels.join(", ")}`);
}).catch(() => { at("model").textContent = "no model is serving"; });
