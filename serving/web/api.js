// Requests to the service: the token where it asks for one, and its refusals in plain words.

const WORDS = {
  empty_object: "The file is empty.",
  not_dicom: "This is neither DICOM nor a picture.",
  not_an_image: "The picture cannot be read; the file may be damaged.",
  truncated: "The file ends too early: it was probably not copied completely.",
  no_pixels: "This DICOM object has no image in it.",
  decode_failed: "The image inside cannot be decoded; the file may be damaged.",
  unsupported_sop_class: "This kind of DICOM object is not an image that can be segmented.",
  unsupported_transfer_syntax: "The image is compressed in a way that is not read here.",
  unsupported_pixels: "The image has a pixel format that is not read here.",
  unsupported_multiframe: "The object holds several images where one is expected.",
  mosaic: "Its slices are tiles of one image (a mosaic): take them apart with dcm2niix first.",
  missing_attribute: "The file lacks something that is needed.",
  localizer: "There are only localizers (scout views) in it.",
  series_mixed: "The images differ in size or orientation, so they are not one series.",
  series_duplicates: "Several slices lie at the same place: phases or echoes of one scan, perhaps. Drop one of them.",
  uneven_slices: "The slices lie at uneven distances, which this format cannot express. DICOM SEG can.",
  needs_neighbours: "The model looks at neighbouring slices too: drop the whole series.",
  too_large: "This is more than the service takes at once.",
  unsupported_media_type: "The service does not take this kind of file.",
  not_acceptable: "The service cannot give this format for this scan.",
  deadline: "The model did not answer in time. It may be busy: try again in a moment.",
  unavailable: "No model is answering just now: try again in a moment.",
  busy: "The service has more to do than it can: try again in a moment.",
  unknown_model: "There is no such model.",
  unauthorized: "A token is needed for this.",
  corrupt: "The file is damaged.",
  forbidden: "Your token does not allow this.",
  no_jobs: "This service runs no bulk jobs.",
  place_not_allowed: "The service may not read or write there.",
  destination_in_use: "Another job writes there just now.",
  too_many_jobs: "Enough jobs are running: start this one when they have ended.",
  not_found: "This service does not offer that.",
  no_answer: "The service does not answer. Is it running, and is the network there?",
};

/** A refusal: `reason` is the service's code, `message` its detail, `words` what that means. */
export class Problem extends Error {
  constructor(reason, detail) {
    super(detail);
    this.reason = reason;
  }

  get words() {
    return WORDS[this.reason] || "The service could not do this.";
  }
}

let askForToken = async () => false;

/** `ask(why)` shows the dialog and tells whether there is a token to try. */
export function onUnauthorized(ask) {
  askForToken = ask;
}

export function setToken(token) {
  sessionStorage.setItem("token", token);
}

export function hasToken() {
  return Boolean(sessionStorage.getItem("token"));
}

/** As `fetch`, below the service's root; throws a Problem for each answer that is no success. */
export async function ask(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("no_answer", "");
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({}));
    if (answer.status !== 401 || !(await askForToken(token ? "The token was not accepted." : ""))) {
      throw new Problem(told.reason || "unknown", told.detail ?? `HTTP status ${answer.status}`);
    }
  }
}

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}
