// The client of evalstore's HTTP service: `createClient({ baseUrl, apiKey })`. It needs nothing but fetch.

const METHODS = ["GET", "PUT", "POST", "DELETE"];
const UNAVAILABLE = new Set([429, 502, 503, 504]);

/** An answer that is not a success. `problem` is the body (RFC 9457), if it has one. */
export class ServiceError extends Error {
  constructor(response, problem) {
    super(problem?.detail ?? problem?.title ?? `HTTP ${response.status}`);
    this.name = "ServiceError";
    this.status = response.status;
    this.problem = problem;
    this.response = response;
  }
}

/** Make a client. `retries`: how often a request that may be repeated is sent again while the service is unavailable. */
export function createClient({ baseUrl, apiKey, fetch = globalThis.fetch, retries = 4, headers = {} }) {
  const base = baseUrl.replace(/\/+$/, "");
  const shared = { ...(apiKey ? { authorization: `Bearer ${apiKey}` } : {}), ...headers };

  async function request(method, path, { params = {}, body, headers: own = {}, signal } = {}) {
    const url = base + fill(path, params.path ?? {}) + search(params.query ?? {});
    const sent = { ...shared, ...lower(params.header ?? {}), ...lower(own) };
    const isRaw = typeof body === "string" || body instanceof Uint8Array || body instanceof ArrayBuffer || body instanceof Blob;
    if (body !== undefined && !("content-type" in sent)) {
      sent["content-type"] = typeof body === "string" ? "application/x-ndjson" : isRaw ? "application/octet-stream" : "application/json";
    }
    const init = { method, headers: sent, body: body === undefined || isRaw ? body : JSON.stringify(body), signal };
    const mayRepeat = method !== "POST" || "idempotency-key" in sent;
    for (let attempt = 0; ; attempt++) {
      const last = !mayRepeat || attempt >= retries;
      let response;
      try {
        response = await fetch(url, init);
      } catch (error) {
        if (last || signal?.aborted) throw error;
        await pause(attempt);
        continue;
      }
      if (!last && UNAVAILABLE.has(response.status)) {
        await response.arrayBuffer();
        await pause(attempt, Number(response.headers.get("retry-after")));
        continue;
      }
      if (!response.ok && response.status !== 304) throw new ServiceError(response, await content(response).catch(() => undefined));
      return { data: await content(response), response };
    }
  }

  return Object.fromEntries(METHODS.map((method) => [method, (path, options) => request(method, path, options)]));
}

function fill(path, values) {
  return path.replace(/\{(\w+)\}/g, (_, name) => {
    if (values[name] === undefined) throw new TypeError(`missing path parameter: ${name}`);
    return encodeURIComponent(values[name]);
  });
}

function search(query) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (value === undefined || value === null) continue;
    if (Array.isArray(value)) for (const each of value) pairs.append(name, each);
    else if (typeof value === "object") for (const [key, each] of Object.entries(value)) pairs.append(key, each);
    else pairs.append(name, value);
  }
  return pairs.size ? `?${pairs}` : "";
}

function lower(headers) {
  return Object.fromEntries(Object.entries(headers).filter(([, value]) => value != null).map(([name, value]) => [name.toLowerCase(), value]));
}

async function content(response) {
  const kind = response.headers.get("content-type") ?? "";
  if (response.status === 204 || response.status === 304) return undefined;
  if (/^application\/(\w+\+)?(problem\+)?json/.test(kind)) return response.json();
  return kind.startsWith("application/octet-stream") ? response.arrayBuffer() : response.text();
}

function pause(attempt, seconds) {
  const ms = seconds > 0 ? Math.min(seconds, 30) * 1000 : Math.min(100 * 2 ** attempt, 2000) * (0.5 + Math.random() / 2);
  return new Promise((resolve) => setTimeout(resolve, ms));
}
