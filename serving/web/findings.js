// What was found, beside the images: volumes, lesions, quality, the model and its times.

import { colour } from "./colours.js";

const FLAGS = {
  modality: "Another kind of scan than the model was trained on",
  body_part: "Another part of the body than the model was trained on",
  spacing: "Pixels of another size than in training",
  intensity: "Grey values unlike those in training",
  area: "More found in a slice than in any of training",
  volume: "More found than in any scan of training",
  fragments: "Many small pieces found",
  entropy: "The model is less sure than usual",
  pairwise_dice: "The models agree less than usual",
};
const at = id => document.getElementById(id);
const number = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits });

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Millilitres, of a slice alone square millimetres, or pixels: whatever is known. */
function size(volume_ml, area_mm2, pixels, slices) {
  if (slices === 1 && area_mm2 != null) return `${number(area_mm2, 1)} mm²`;
  if (slices > 1 && volume_ml != null) return `${number(volume_ml, volume_ml < 10 ? 2 : 1)} mL`;
  return `${number(pixels, 0)} px`;
}

function total({ volume_ml, foreground_pixels, lesions, slices }) {
  const areas = lesions.map(lesion => lesion.area_mm2);
  return size(volume_ml, areas.includes(null) ? null : areas.reduce((sum, area) => sum + area, 0), foreground_pixels, slices);
}

/** A line for each volume that has an interval: of all that was found, and of each class where there are several. */
function intervals({ labels, slices, ...whole }) {
  const ends = (name, { volume_low_ml: low, volume_high_ml: high }) => low == null ? [] :
    [["volume", name, "95 %"].filter(Boolean).join(", "), [low, high].map(ml => number(ml, ml < 10 ? 2 : 1)).join(" to ") + " mL"];
  const of = [["", whole], ...(labels.length > 1 ? labels.map(label => [label.name, label]) : [])];
  return slices > 1 ? of.map(([name, one]) => ends(name, one)).filter(row => row.length) : [];
}

export function dot(value) {
  const made = element("span", { className: "dot" });
  made.style.background = `rgb(${colour(value)})`;
  return made;
}

/** Fills the panel; `choose(lesion, value)` is called for the lesion that is picked. */
export function show({ answer, image }, name, seconds, choose) {
  const { lesions, lesion_count: count } = answer, value = lesion => answer.labels.find(label => label.name === lesion.label)?.value ?? 1;
  at("total").textContent = count ? total(answer) : "Nothing found";
  if (count) at("total").append(element("small", {}, `in ${count} ${count > 1 ? "lesions" : "lesion"}`));
  at("lesions").replaceChildren(...lesions.map((lesion, index) => {
    const [first, last] = lesion.slices, diameter = lesion.max_diameter_mm;
    const where = first === last ? `slice ${first + 1}` : `slices ${first + 1} to ${last + 1}`;
    const button = element("button", { type: "button" }, dot(value(lesion)), `${index + 1} · ${lesion.label}`, element("b", {}, size(lesion.volume_ml, lesion.area_mm2, lesion.pixels, answer.slices)),
      element("small", {}, diameter ? `${where}, ${number(diameter, 0)} mm across` : where));
    button.addEventListener("click", () => choose(lesion, value(lesion), button));
    return element("li", {}, button);
  }));
  quality(answer);
  details(answer, image, name, seconds);
  for (const id of ["found", "facts", "downloads", "another"]) at(id).hidden = false;
  at("start").hidden = true;
}

export function clear() {
  for (const id of ["found", "quality", "facts", "downloads", "another"]) at(id).hidden = true;
  at("start").hidden = false;
}

function quality({ quality, detail, rejected }) {
  // What exactly is told as `flag: detail; flag: detail`.
  const told = new Map((quality.detail ?? "").split("; ").map(piece => piece.split(": ")));
  const lines = quality.flags.map(flag => [FLAGS[flag] ?? flag, told.get(flag)].filter(Boolean).join(": "));
  if (detail) lines.push(detail);
  for (const [reason, count] of Object.entries(rejected ?? {})) {
    lines.push(`${count} ${count > 1 ? "files were" : "file was"} left out: ${reason.replaceAll("_", " ")}`);
  }
  at("flags").replaceChildren(...lines.map(line => element("li", {}, line)));
  at("quality").hidden = !lines.length;
}

function details(answer, { spacing, known }, name, seconds) {
  const segment = answer.timings_ms.segment;
  const rows = [
    ["file", name],
    ["size", [answer.columns, answer.rows, ...(answer.slices > 1 ? [answer.slices] : [])].join(" × ")],
    ["voxel", known ? `${spacing.map(mm => number(mm, 2)).join(" × ")} mm` : "not told"],
    ...intervals(answer),
    ["model", `${answer.model} ${answer.version}`],
    ["engine", answer.engine],
    ["segmented in", segment < 1000 ? `${number(segment, 0)} ms` : `${number(segment / 1000, 1)} s`],
    ["in all", `${number(seconds, 1)} s`],
  ];
  at("details").replaceChildren(...rows.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)]));
}
