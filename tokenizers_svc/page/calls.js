// The same request as a shell command and as a Python program.

import { address } from "./api.js";

const KEY_VARIABLE = "PATCHCACHE_KEY";

/** Return a word as a POSIX shell reads it. */
function shellWord(text) {
  return /^[A-Za-z0-9@%+=:,./_-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

/** Return the curl command; the key is named by a variable, never written out. */
export function curlCall({ file, model, view, hasKey }) {
  const parts = ["curl"];
  if (hasKey) parts.push(`-H "Authorization: Bearer $${KEY_VARIABLE}"`);
  const url = address("v1/tokenize", { model, view: view && view.join(",") });
  parts.push(`--data-binary ${shellWord(`@${file}`)}`, shellWord(url));
  return parts.join(" \\\n  ");
}

/** Return the Python program; it prints the token ids. */
export function pythonCall({ file, model, view, hasKey }) {
  // A JSON string is a Python string: both know \", \\, \n and \uXXXX.
  const text = JSON.stringify;
  const service = [text(address("").replace(/\/$/, ""))];
  if (hasKey) service.push(`key=os.environ[${text(KEY_VARIABLE)}]`);
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from tokenizers_svc.client import TokenizerClient",
    "",
    `with TokenizerClient(${service.join(", ")}) as client:`,
    "    tokens = client.tokenize(",
    `        ${text(file)},`,
    ...(view ? [`        view=(${view.map((n, at) => (at < 4 ? n : "True")).join(", ")}),`] : []),
    `        model=${text(model)},`,
    "    )",
    "print(tokens.ids)",
  ].join("\n");
}

/** Put text into the clipboard; return whether that worked. */
export async function copy(text, element) {
  if (navigator.clipboard) {
    // Only over https and on localhost; elsewhere the old way below is the one there is.
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Not permitted here.
    }
  }
  getSelection().selectAllChildren(element);
  return document.execCommand("copy");
}
