// What was dropped or chosen, as one request: a single file as it is, several as the parts of a form.

const TYPES = {
  png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", tif: "image/tiff", tiff: "image/tiff",
  dcm: "application/dicom", zip: "application/zip", nii: "application/nifti", gz: "application/gzip",
};

/** Every file of a drop, those inside of folders too. */
export async function dropped(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return (await Promise.all(entries.map(walk))).flat();
}

async function walk(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [Object.assign(file, { path: entry.fullPath.slice(1) })];
  }
  const reader = entry.createReader(), found = [];
  for (;;) { // it tells at most a hundred at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return (await Promise.all(found.map(walk))).flat();
    found.push(...some);
  }
}

/** Files without those that systems and DICOM media leave beside the images. */
export function wanted(files) {
  const some = files.filter(file => !/^(\..*|DICOMDIR|Thumbs\.db|desktop\.ini)$/i.test(file.name));
  return some.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
}

/** What a person calls it: the file, or the folder and how many are in it. */
export function nameOf(files) {
  if (files.length === 1) return files[0].name;
  const [folder, ...below] = pathOf(files[0]).split("/");
  return `${below.length ? `${folder}: ` : ""}${files.length} files`;
}

/** The same files by the folders they lie in. */
export function folders(files) {
  const found = new Map();
  for (const file of files) {
    const name = pathOf(file).split("/").slice(0, -1).pop() ?? "";
    found.set(name, [...(found.get(name) ?? []), file]);
  }
  return [...found].map(([name, some]) => ({ name, files: some }));
}

function pathOf(file) {
  return file.path || file.webkitRelativePath || file.name;
}

export function megabytes(files) {
  return files.reduce((sum, file) => sum + file.size, 0) / 1e6;
}

export function request(files, accept) {
  const headers = { Accept: accept };
  if (files.length === 1) {
    headers["Content-Type"] = TYPES[files[0].name.split(".").pop().toLowerCase()] || "application/octet-stream";
    return { method: "POST", body: files[0], headers };
  }
  const form = new FormData();
  for (const file of files) form.append("file", file, "slice"); // names may be a patient's: they stay here
  return { method: "POST", body: form, headers };
}
