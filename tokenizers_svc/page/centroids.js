// Centroids as pixels. Those of one stage are patches of the reconstruction; of a residual codebook,
// the sum of the first few stages is drawn from the codebook itself.

import { ask } from "./api.js";

const MAX_BYTES = 64_000_000; // of a codebook that is worth fetching
const TYPES = { "|u1": Uint8Array, "<i2": Int16Array, "<f4": Float32Array };

const codebooks = new Map(); // digest -> of readNpy

/** Return the centroids of a model, {shape, values}; null where they are too many to fetch. */
export async function fetchCodebook(model, { key, signal }) {
  const { id, digest, vocab_size: size, patch_size: side, num_stages: stages } = model;
  if (size * stages * side * side * 3 * 2 > MAX_BYTES) return null;
  if (!codebooks.has(digest)) {
    const path = `v1/models/${encodeURIComponent(id)}/codebook.npy`;
    const response = await ask(path, { query: { digest }, key, signal });
    codebooks.set(digest, readNpy(await response.arrayBuffer()));
  }
  return codebooks.get(digest);
}

/** Read a .npy file into {shape, values}. */
function readNpy(buffer) {
  const view = new DataView(buffer);
  const isLong = view.getUint8(6) > 1;
  const start = (isLong ? 12 : 10) + (isLong ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(new Uint8Array(buffer, 0, start));
  const kind = TYPES[/'descr': '([^']+)'/.exec(header)[1]];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((n) => n.trim()).map(Number);
  return { shape, values: new kind(buffer.slice(start)) };
}

/** Draw what the first `numStages` ids of every patch stand for. */
export function drawCentroids(canvas, { shape, values }, { ids, grid, stages, numStages, patchSize }) {
  const [rows, cols] = grid;
  const [numIds, dim] = shape.slice(-2);
  canvas.width = cols * patchSize;
  canvas.height = rows * patchSize;
  const image = new ImageData(canvas.width, canvas.height);
  for (let patch = 0; patch < rows * cols; patch += 1) {
    const top = Math.floor(patch / cols) * patchSize;
    const left = (patch % cols) * patchSize;
    for (let at = 0; at < dim; at += 1) {
      let value = 0;
      for (let stage = 0; stage < numStages; stage += 1) {
        value += values[(stage * numIds + ids[patch * stages + stage]) * dim + at];
      }
      const inPatch = at % (patchSize * patchSize); // channel by channel, row by row
      const channel = (at - inPatch) / (patchSize * patchSize);
      const y = top + Math.floor(inPatch / patchSize);
      image.data[(y * canvas.width + left + (inPatch % patchSize)) * 4 + channel] = Math.round(value);
    }
  }
  for (let at = 3; at < image.data.length; at += 4) image.data[at] = 255;
  canvas.getContext("2d").putImageData(image, 0, 0);
}
