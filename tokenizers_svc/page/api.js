// What the page asks the service for, and what a refusal looks like.

/** A request that was not answered with what was asked for; status 0 stands for no answer at all. */
export class Refusal extends Error {
  constructor(problem, status) {
    super(problem.detail ?? problem.title);
    this.problem = problem;
    this.status = status;
  }
}

/** Return the absolute address of a path of the service, wherever it is mounted. */
export function address(path, query = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null) url.searchParams.set(name, value);
  }
  // Commas are legal in a query, and a view is read more easily with them.
  url.search = url.search.replaceAll("%2C", ",");
  return url.href;
}

/** Ask; return the response. Throws a Refusal, or an AbortError when `signal` says stop. */
export async function ask(path, { query, body, key, signal } = {}) {
  const headers = { Accept: "*/*" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/octet-stream";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(address(path, query), { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const detail = "It may have been stopped, or the connection is gone.";
    throw new Refusal({ title: "The service does not answer", detail }, 0);
  }
  if (!response.ok) throw new Refusal(await problemOf(response), response.status);
  return response;
}

async function problemOf(response) {
  const type = response.headers.get("Content-Type") ?? "";
  const retryAfter = response.headers.get("Retry-After");
  if (type.startsWith("application/problem+json")) {
    return { ...(await response.json()), retryAfter };
  }
  return { title: `Status ${response.status}`, detail: "Whatever answered is not the service.", retryAfter };
}

/** Return Server-Timing as [[name, milliseconds or null, description], ...]. */
export function timingsOf(response) {
  const header = response.headers.get("Server-Timing") ?? "";
  return header.split(",").filter((part) => part.trim()).map((part) => {
    const [name, ...fields] = part.split(";").map((text) => text.trim());
    const field = (key) => fields.find((text) => text.startsWith(`${key}=`))?.slice(key.length + 1);
    const milliseconds = field("dur");
    return [name, milliseconds === undefined ? null : Number(milliseconds), field("desc") ?? ""];
  });
}
