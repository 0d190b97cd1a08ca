// Refusals, as a person reads them.

import { Refusal } from "./api.js";

/** Show why something failed in `place`, with a button that calls `again` where that may help. */
export function showRefusal(place, error, again) {
  const problem = problemOf(error);
  const add = (kind, text) => {
    const element = place.appendChild(document.createElement(kind));
    element.textContent = text;
    return element;
  };
  place.replaceChildren();
  add("strong", problem.title);
  add("p", problem.detail);
  for (const { pointer, message } of problem.errors ?? []) add("p", `${pointer}: ${message}`);
  const id = problem.instance?.split(":").at(-1);
  const facts = [problem.code, problem.status && `status ${problem.status}`, id && `request ${id}`];
  const known = facts.filter(Boolean).join(", ");
  if (known) add("p", known).className = "small";
  if (mayPass(error)) {
    const button = add("button", "Try again");
    button.type = "button";
    button.addEventListener("click", again);
  }
}

/** Return the problem document of a refusal; anything else is a mistake of the page. */
export function problemOf(error) {
  if (error instanceof Refusal) return error.problem;
  console.error(error);
  return { title: "The page failed", detail: String(error) };
}

// Status 0: the service did not answer at all; null: the page itself refused.
function mayPass({ status }) {
  return status === 0 || status === 429 || status >= 500;
}
