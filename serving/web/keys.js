// The keys of the page: what each does is told by whoever has it do so.

import { element } from "./findings.js";

const KEYS = [
  ["↑ ↓, wheel", "slice by slice"], ["Page ↑ ↓", "five slices"], ["Home, End", "first, last slice"], ["N, P", "next, previous lesion"],
  ["1 to 5", "window"], ["Shift + arrows, drag", "level and width"], ["M", "mask on and off"], ["[ ]", "its opacity"],
  ["+ − 0, Ctrl + wheel", "zoom"], ["Shift + drag", "move"], ["V", "slices or 3D"], ["O", "open files"], ["?", "these keys"],
];
const LEVELS = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
const at = id => document.getElementById(id);

/**
 * `actions` by key, for when a scan is shown; `level(up, wider)` and `preset(number)` for whole groups of keys; `pick`
 * opens files. Fields of forms keep their keys, sliders their arrows, buttons and tabs what they are pressed with.
 */
export function prepare({ ready, actions, level, preset, pick }) {
  at("keys-list").append(...KEYS.flatMap(([keys, what]) => [element("dt", {}, element("kbd", {}, keys)), element("dd", {}, what)]));
  at("keys-open").addEventListener("click", () => at("keys").showModal());
  document.addEventListener("keydown", event => {
    const action = taken(event) ? null : meant(event);
    if (!action) return;
    event.preventDefault();
    action();
  });

  function meant({ key, shiftKey }) {
    if (key === "?") return () => at("keys").showModal();
    if (key === "o") return pick;
    if (!ready()) return null;
    if (shiftKey && LEVELS[key]) return () => level(...LEVELS[key]);
    if (/^[1-5]$/.test(key)) return () => preset(Number(key));
    return actions[key] ?? actions[key.toLowerCase()];
  }
}

function taken({ key, target, ctrlKey, metaKey, altKey }) {
  if (ctrlKey || metaKey || altKey || document.querySelector("dialog[open]") || at("viewer").hidden) return true;
  if (target.matches("input:not([type=range]), select, textarea, [role=tab]")) return true;
  return target.matches("input") && /^(Arrow|Page|Home|End)/.test(key);
}
