// Bulk jobs: the form that starts one, and the list with their progress.

import { ask, askJson } from "./api.js";
import { element } from "./findings.js";

const PROFILES = {
  seg: "DICOM SEG", "seg-labelmap": "SEG, label map", "seg-fractional": "SEG, probabilities", report: "Structured report",
  nifti: "NIfTI", "nifti-upright": "Upright volume", stl: "STL", glb: "glTF", png: "Masks, PNG", overlays: "Pictures",
};
const ENDED = ["succeeded", "failed", "cancelled", "interrupted"];
const EVERY_MS = 2000;
const at = id => document.getElementById(id);
let timer = null;

export function prepare() {
  at("profiles").append(...Object.entries(PROFILES).map(([value, name]) => {
    const box = element("input", { type: "checkbox", name: "profiles", value, checked: value === "seg" });
    return element("label", {}, box, name);
  }));
  at("job-form").addEventListener("submit", submit);
}

/** Asks for the jobs now and again while they are looked at. */
export async function watch(on) {
  clearTimeout(timer);
  if (!on) return;
  try {
    show(await askJson("v1/jobs"));
    offer(true);
    timer = setTimeout(() => watch(true), EVERY_MS);
  } catch (error) {
    at("job-list").replaceChildren();
    at("no-jobs").hidden = false;
    offer(!["not_found", "no_jobs"].includes(error.reason));
    at("no-jobs").textContent = at("job-form").inert ? "This service runs no bulk jobs: serve.jobs of its recipe says where they may read and write." : `${error.words} ${error.message}`;
  }
}

/** Where the service runs no jobs there is nothing to fill in. */
function offer(on) {
  at("job-form").inert = !on;
  at("job-form").classList.toggle("off", !on);
}

async function submit(event) {
  event.preventDefault();
  const form = new FormData(event.target), told = at("job-told");
  const job = { source: form.get("source"), destination: form.get("destination"), profiles: form.getAll("profiles") };
  if (form.get("model")) job.model = form.get("model");
  try {
    const { id } = await askJson("v1/jobs", { method: "POST", body: JSON.stringify(job), headers: { "Content-Type": "application/json" } });
    told.textContent = `Started: ${id}`;
    await watch(true);
  } catch (error) {
    told.textContent = `Not started. ${error.words} (${error.message})`;
  }
}

function show(jobs) {
  at("no-jobs").hidden = jobs.length > 0;
  at("no-jobs").textContent = "No job yet.";
  const focused = document.activeElement?.dataset?.job; // the list is made anew: the focus stays where it was
  at("job-list").replaceChildren(...jobs.map(line));
  if (focused) at("job-list").querySelector(`[data-job="${focused}"]`)?.focus();
}

function line(job) {
  const head = element("div", { className: "head" }, element("span", { className: `state ${job.state}` }, job.state),
    element("span", {}, `${job.request.source ?? job.request.manifest} → ${job.request.destination}`));
  if (!ENDED.includes(job.state)) {
    const cancel = element("button", { type: "button", className: "small", disabled: job.state === "cancelling" }, "Cancel");
    cancel.dataset.job = job.id;
    cancel.addEventListener("click", async () => {
      cancel.disabled = true;
      await ask(`v1/jobs/${job.id}`, { method: "DELETE" }).catch(() => {});
      await watch(true);
    });
    head.append(cancel);
  }
  const made = element("li", {}, head), progress = job.progress;
  if (progress) {
    const bar = element("progress", { max: progress.slices_total || 1, value: progress.slices });
    bar.setAttribute("aria-label", `Progress of ${job.id}`);
    const left = progress.eta_s == null ? "" : `, ${duration(progress.eta_s)} left`;
    const reasons = Object.entries(progress.reasons).map(([reason, count]) => `${count} × ${reason.replaceAll("_", " ")}`).join(", ");
    made.append(bar, element("div", { className: "quiet" }, `${progress.slices} of ${progress.slices_total} slices, ` +
      `${progress.series} of ${progress.series_total} series, ${progress.slices_per_second.toFixed(1)} a second${left}`));
    if (reasons) made.append(element("div", { className: "quiet" }, `rejected: ${reasons}`));
  }
  if (job.error) made.append(element("div", { className: "bad" }, job.error));
  made.append(element("div", { className: "quiet" }, `${new Date(1000 * job.created).toLocaleString()} · ledger ${job.ledger}`));
  return made;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
