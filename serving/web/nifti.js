// The two volumes of an answer (NIfTI-1, little endian, gzipped) as typed arrays with their place.

const TYPES = { 2: Uint8Array, 4: Int16Array, 8: Int32Array, 16: Float32Array, 512: Uint16Array };
const LETTERS = [["L", "R"], ["P", "A"], ["I", "S"]];

/**
 * Returns `values` (columns run fastest, then rows, then slices), to be scaled by `slope` and `intercept`; `spacing` in
 * mm, if `known`; `letters`, where the picture's left, right, top and bottom lie in the patient ("" where that is not known); `why`
 * there is no place in space, "" where there is one; `buffer`, the file itself.
 */
export async function readNifti(blob) {
  const buffer = await new Response(blob.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const view = new DataView(buffer);
  const short = at => view.getInt16(at, true), float = at => view.getFloat32(at, true);
  const [columns, rows, slices] = [short(42), short(44), Math.max(1, short(46))];
  const placed = short(254) > 0;
  const told = new TextDecoder().decode(new Uint8Array(buffer, 148, 80)).replace(/\0.*$/s, "");
  const sides = [0, 1].map(axis => side([280, 296, 312].map(at => float(at + 4 * axis))));
  return {
    buffer, columns, rows, slices, spacing: [float(80), float(84), float(88)],
    values: new TYPES[short(70)](buffer, float(108), columns * rows * slices),
    slope: float(112) || 1, intercept: float(116),
    letters: placed ? [...sides[0], ...sides[1]] : ["", "", "", ""],
    known: placed || [80, 84].some(at => float(at) !== 1), // what the files do not tell is 1
    why: placed ? "" : told || "the files do not say where the slices lie",
  };
}

/** Where an axis of the grid begins and ends, of its direction towards right, anterior and superior. */
function side(direction) {
  const most = direction.map(Math.abs).reduce((best, value, index, all) => (value > all[best] ? index : best), 0);
  const [negative, positive] = LETTERS[most];
  return direction[most] > 0 ? [negative, positive] : [positive, negative];
}
