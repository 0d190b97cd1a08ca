// The page: a picture, a model and a view go in; ids, a reconstruction and calls come out.

import { Refusal, ask, timingsOf } from "./api.js";
import { copy, curlCall, pythonCall } from "./calls.js";
import { drawCentroids, fetchCodebook } from "./centroids.js";
import { colourOf } from "./colours.js";
import { problemOf, showRefusal } from "./errors.js";
import { PatchGrid } from "./grid.js";
import {
  BoxEditor, centreSquare, drawPreview, drawView, readPicture, watchForPictures,
} from "./picture.js";
import { countIds, describeCounts, showFrequent, showTimes } from "./summary.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["top", "left", "height", "width"];

const state = {
  models: [],
  chosen: null, // the file that is being read, or has been
  picture: null, // of readPicture
  box: null, // what was asked for; null is the centred square
  answer: null, // the JSON, with the model that was asked and what was drawn of it
  running: null, // AbortController
};

const squares = [...document.querySelectorAll(".square")];
const grid = new PatchGrid({
  map: $("map"),
  squares,
  rowGroup: $("map-rows"),
  onSelect: showPatch,
  describe: describePatch,
});
const boxEditor = new BoxEditor($("box"), (box) => askFor(box));

function model() {
  return state.models.find(({ id }) => id === $("model").value);
}

function wantedView() {
  const hflip = $("hflip").checked;
  const box = state.box ?? (hflip ? shownBox() : null);
  return box && [...box, ...(hflip ? [1] : [])];
}

function shownBox() {
  return state.box ?? centreSquare(state.picture);
}

// ---- asking

async function loadModels() {
  showError(null);
  try {
    const response = await ask("v1/models", { key: $("key").value });
    state.models = (await response.json()).models;
  } catch (error) {
    $("about").textContent = "";
    showError(error, loadModels);
    return;
  }
  const before = $("model").value;
  $("model").replaceChildren(...state.models.map(({ id }) => new Option(id, id)));
  if (state.models.some(({ id }) => id === before)) $("model").value = before;
  $("model-field").hidden = state.models.length < 2;
  await takeModel();
}

async function takeModel() {
  const { id, vocab_size: size, grid: [rows, cols], patch_size: side, num_stages: stages, fingerprint } = model();
  const residual = stages > 1 ? ` in ${stages} stages` : "";
  $("about").textContent = `${id}: ${size.toLocaleString("en")} ids${residual}, `
    + `${rows} x ${cols} patches of ${side} pixels, fingerprint ${fingerprint.slice(0, 12)}`;
  $("about").title = fingerprint;
  await tokenize();
}

async function takePicture(blob, name) {
  state.chosen = blob;
  begin();
  let picture;
  try {
    picture = await readPicture(blob, name);
  } catch {
    setBusy(false);
    showError(new Refusal({ title: "The file cannot be read", detail: `Is ${name} a file?` }, null));
    return;
  }
  if (state.chosen !== blob) return; // another one was chosen meanwhile
  showNothing();
  Object.assign(state, { picture, box: null });
  $("hflip").checked = false;
  $("view").disabled = false;
  $("file-label").querySelector("strong").textContent = "Choose another picture";
  document.body.classList.add("has-picture");
  $("preview").hidden = !picture.bitmap;
  if (picture.bitmap) drawPreview($("preview"), $("picture"), picture.bitmap);
  showBox();
  await tokenize();
}

async function askFor(box) {
  state.box = box;
  showBox();
  await tokenize();
}

/** Say that something is under way, and stop what was before. */
function begin() {
  state.running?.abort();
  state.running = new AbortController();
  setBusy(true);
  return state.running;
}

async function tokenize() {
  if (!state.picture || !model()) {
    setBusy(false);
    return;
  }
  const { signal } = begin();
  const asked = { model: model(), view: wantedView() };
  showError(null);
  try {
    checkSize();
    const query = { model: asked.model.id, view: asked.view && asked.view.join(",") };
    const request = { query, body: state.picture.blob, key: $("key").value, signal };
    const start = performance.now();
    const response = await ask("v1/tokenize", request);
    const answer = await response.json();
    showAnswer(asked.model, answer, response, performance.now() - start);
    await showReconstruction(asked.model, request);
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    showNothing();
    showError(error, tokenize);
  }
  if (!signal.aborted) setBusy(false);
}

/** Refuse what the service would refuse: it would not read the whole of it, which looks like a failure. */
function checkSize() {
  const limit = model().limits?.max_body_bytes;
  const actual = state.picture.blob.size;
  if (limit && actual > limit) {
    throw new Refusal({
      title: "The file is too large",
      detail: `It has ${actual.toLocaleString("en")} bytes; this service takes ${limit.toLocaleString("en")}.`,
    }, null);
  }
}

// ---- showing

function showBox() {
  const { picture } = state;
  const box = shownBox();
  const isKnown = picture.height > 0;
  NUMBERS.forEach((name, index) => {
    $(name).value = isKnown ? box[index] : "";
    $(name).removeAttribute("aria-invalid");
  });
  $("picture-name").hidden = false;
  const unseen = picture.bitmap ? "" : "; this browser cannot show it";
  $("picture-name").textContent = isKnown
    ? `${picture.name}, ${picture.width} x ${picture.height} pixels${unseen}`
    : `${picture.name}${unseen}`;
  $("picture").setAttribute("aria-label", `The picture ${picture.name}`);
  if (picture.bitmap) boxEditor.show(picture, box);
}

function showAnswer(asked, answer, response, totalMs) {
  const [rows, cols, stages = 1] = answer.shape;
  const [, , height, width] = answer.view;
  const { picture } = state;
  if (!picture.bitmap) {
    Object.assign(picture, { height: answer.image.height, width: answer.image.width });
    showBox();
  }
  state.answer = { ...answer, model: asked, rows, cols, stages, isDrawn: false };
  $("results").hidden = $("calls").hidden = false;
  document.body.classList.add("has-answer");
  $("view-size").textContent = `${width} x ${height} to ${asked.image_size} x ${asked.image_size}`;
  $("map-size").textContent = `${rows} x ${cols}`;
  if (picture.bitmap) {
    drawView($("view-picture"), picture.bitmap, answer.view, asked.image_size);
  } else $("view-picture").width = 1;
  showStages(stages);
  showIds();
  showTimes($("time-bar"), $("times"), timingsOf(response), totalMs);
  $("total").textContent = `${totalMs.toFixed(0)} ms from asking to the answer`;
  showNotes(response);
  showCalls();
}

function showStages(stages) {
  const before = Math.min(Number($("stage").value || 1), stages);
  $("stage").replaceChildren(...Array.from({ length: stages }, (_, i) => new Option(`${i + 1} of ${stages}`, i + 1)));
  $("stage").value = before;
  $("stage-field").hidden = stages === 1;
}

function stageIds() {
  const { token_ids: ids, stages } = state.answer;
  const stage = Number($("stage").value) - 1;
  return stages === 1 ? ids : ids.filter((_, at) => at % stages === stage);
}

function showIds() {
  const { rows, cols, model: asked } = state.answer;
  const ids = stageIds();
  for (const canvas of [$("map-ids"), $("view-ids")]) {
    canvas.width = cols;
    canvas.height = rows;
    const image = new ImageData(cols, rows);
    ids.forEach((id, at) => image.data.set([...colourOf(id), 255], at * 4));
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
  const counts = countIds(ids);
  $("distinct").textContent = describeCounts(counts, ids.length, asked.vocab_size);
  const found = counts.length === 1 ? "1 distinct id" : `${counts.length} distinct ids`;
  $("status").textContent = `${found} in ${ids.length} patches`;
  showFrequent($("frequent"), counts, (index) => grid.select(index, true));
  grid.show(ids, rows, cols);
}

function showNotes(response) {
  const cached = timingsOf(response).some(([name]) => name === "cache");
  const batch = response.headers.get("X-Batch-Size");
  const notes = [
    cached ? "answered from the kept answers" : batch && `in a batch of ${batch}`,
    `request ${response.headers.get("X-Request-Id")}`,
  ];
  $("answer-notes").textContent = notes.filter(Boolean).join("; ");
}

async function showReconstruction(asked, request) {
  const { answer } = state;
  if (!asked.decodes_to_pixels) {
    showNoReconstruction(`The centroids of ${asked.extractor} are not pixels, so there is none.`);
    return;
  }
  try {
    const response = await ask("v1/reconstruct", request);
    const bitmap = await createImageBitmap(await response.blob());
    const isSum = answer.stages > 1 && asked.extractor === "pixel"; // of patches, stage by stage
    const codebook = isSum ? await fetchCodebook(asked, request) : null;
    Object.assign(answer, { whole: bitmap, codebook, psnr: response.headers.get("X-PSNR") });
  } catch (error) {
    if (request.signal.aborted) return;
    const { title, detail } = problemOf(error);
    showNoReconstruction(`${title}. ${detail}`);
    return;
  }
  if (request.signal.aborted) return;
  $("no-reconstruction").hidden = true;
  drawReconstruction();
}

function showNoReconstruction(reason) {
  $("reconstruction").width = 1;
  $("psnr").textContent = "";
  $("no-reconstruction").hidden = false;
  $("no-reconstruction").textContent = reason;
}

/** Draw what the ids up to the chosen stage stand for. */
function drawReconstruction() {
  const { answer } = state;
  if (!answer?.whole) return;
  const canvas = $("reconstruction");
  const numStages = Number($("stage").value);
  const isWhole = numStages === answer.stages || !answer.codebook;
  if (isWhole) {
    canvas.width = answer.whole.width;
    canvas.height = answer.whole.height;
    canvas.getContext("2d").drawImage(answer.whole, 0, 0);
  } else {
    const { token_ids: ids, stages, model: { grid: shape, patch_size: patchSize } } = answer;
    drawCentroids(canvas, answer.codebook, { ids, stages, numStages, grid: shape, patchSize });
  }
  answer.isDrawn = true;
  const psnr = Number(answer.psnr);
  const quality = `${Number.isFinite(psnr) ? psnr.toFixed(2) : answer.psnr} dB PSNR`;
  $("psnr").textContent = isWhole
    ? quality
    : `stages 1 to ${numStages}; all ${answer.stages}: ${quality}`;
  showPatch(grid.index, grid.isHeld);
}

function describePatch(index) {
  const id = grid.ids[index];
  const others = grid.same(index).length - 1;
  const same = others === 0 ? "no other patch" : others === 1 ? "1 other patch" : `${others} other patches`;
  const [row, col] = [Math.floor(index / grid.cols), index % grid.cols];
  return `Row ${row}, column ${col}: id ${id}, ${same} with it`;
}

function showPatch(index, isHeld) {
  $("patch").hidden = index === null;
  $("no-patch").hidden = index !== null;
  $("patch-title").textContent = isHeld ? "Patch (held)" : "Patch";
  if (index === null) return;
  const { answer } = state;
  const { stages, cols, rows, token_ids: ids } = answer;
  const numSame = grid.same(index).length;
  $("patch-id").textContent = grid.ids[index];
  $("patch-place").textContent = `${Math.floor(index / cols)}, ${index % cols}`;
  $("patch-same").textContent = `${numSame} of ${rows * cols} patches`;
  $("patch-stages").hidden = $("patch-stages-title").hidden = stages === 1;
  $("patch-stages").textContent = ids.slice(index * stages, (index + 1) * stages).join(", ");
  const numStages = Number($("stage").value);
  $("centroid-title").textContent = stages === 1 || numStages === 1 ? "centroid" : `sum of ${numStages}`;
  $("centroid-figure").hidden = !answer.isDrawn;
  cutPatch($("patch-pixels"), $("view-picture"), index);
  if (answer.isDrawn) cutPatch($("patch-centroid"), $("reconstruction"), index);
}

function cutPatch(canvas, source, index) {
  const { cols, model: { patch_size: side } } = state.answer;
  canvas.width = canvas.height = side;
  const [x, y] = [(index % cols) * side, Math.floor(index / cols) * side];
  canvas.getContext("2d").drawImage(source, x, y, side, side, 0, 0, side, side);
}

function showCalls() {
  const call = {
    file: state.picture.name,
    model: model().id,
    view: wantedView(),
    hasKey: Boolean($("key").value),
  };
  $("curl").textContent = curlCall(call);
  $("python").textContent = pythonCall(call);
}

function showNothing() {
  state.answer = null;
  grid.clear();
  document.body.classList.remove("has-answer");
  $("results").hidden = $("calls").hidden = true;
  for (const canvas of document.querySelectorAll(".square canvas")) canvas.width = 1;
  for (const id of ["view-size", "map-size", "psnr"]) $(id).textContent = "";
  $("no-reconstruction").hidden = true;
}

function setBusy(isBusy) {
  $("tokens").setAttribute("aria-busy", isBusy);
  if (isBusy) $("status").textContent = "Asking ...";
  else if (!state.answer) $("status").textContent = "No tokens yet.";
}

function showError(error, again) {
  $("error").replaceChildren();
  if (!error) return;
  showRefusal($("error"), error, again);
  if (error.status === 401 || error.status === 403) {
    $("access").open = true;
    $("key").setAttribute("aria-invalid", "true");
  }
}

// ---- wiring

watchForPictures($("file"), takePicture);
$("model").addEventListener("change", takeModel);
$("key").addEventListener("change", () => {
  $("key").removeAttribute("aria-invalid");
  loadModels();
});
$("key-form").addEventListener("submit", (event) => event.preventDefault()); // a change it is anyway
$("hflip").addEventListener("change", tokenize);
$("centre").addEventListener("click", () => {
  $("hflip").checked = false;
  askFor(null);
});
$("whole").addEventListener("click", () => askFor([0, 0, state.picture.height, state.picture.width]));
for (const name of NUMBERS) {
  $(name).addEventListener("change", () => {
    const isNumber = $(name).value !== "" && $(name).checkValidity();
    $(name).setAttribute("aria-invalid", !isNumber);
    if (isNumber) askFor(NUMBERS.map((each) => Number($(each).value)));
    else $(name).reportValidity();
  });
}
$("stage").addEventListener("change", () => {
  showIds();
  drawReconstruction();
});
$("overlay").addEventListener("change", () => {
  $("view-ids").hidden = !$("overlay").checked;
});
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const element = $(button.dataset.of);
    const worked = await copy(element.textContent, element);
    $("copied").textContent = worked ? "Copied." : "The browser refused; the text is selected.";
  });
}
loadModels();
