// Requests to the server: the API key, waiting while it is busy or away, its errors.

const KEY = "llave-api-key";
const LONGEST_WAIT = 30;

/** An answer that waiting does not change. */
export class ServerError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/**
 * The server this page came from.
 *
 * wait({seconds, reason, message, signal}) resolves when the request is to be tried again; reason is "gone", "busy" or
 * "loading". askKey(wrong) resolves to a key, or to null if the user gives none.
 */
export class Server {
  #asking = null;

  constructor({ wait, askKey }) {
    this.wait = wait;
    this.askKey = askKey;
  }

  get key() {
    return sessionStorage.getItem(KEY);
  }

  /** The address of a path of the server, also behind a proxy that puts something in front of it. */
  address(path) {
    return new URL(path.replace(/^\//, ""), document.baseURI).href;
  }

  /** The JSON of an answer; waits as long as the server is busy or away, until `signal`. */
  async json(path, { body, signal } = {}) {
    for (let attempt = 0; ; attempt++) {
      const response = await this.#send(path, body, signal);
      if (response?.ok) return response.json();
      const error = response ? await errorOf(response) : null;
      if (error?.status === 401) {
        await this.#newKey();
      } else if (!error || error.status === 429 || error.status === 503) {
        const asked = Number(response?.headers.get("retry-after"));
        const seconds = Math.min(asked || 2 ** Math.min(attempt + 1, 5), LONGEST_WAIT);
        const reason = !error ? "gone" : error.status === 429 ? "busy" : "loading";
        await this.wait({ seconds, reason, message: error?.message, signal });
      } else {
        throw error;
      }
      signal?.throwIfAborted();
    }
  }

  /** The address of a picture for an img: with an API key it has to be fetched, as an img sends no headers. */
  async picture(path) {
    if (!this.key) return this.address(path);
    const response = await this.#send(path);
    if (!response?.ok) throw new Error("no picture");
    return URL.createObjectURL(await response.blob());
  }

  async #send(path, body, signal) {
    const headers = body ? { "content-type": "application/json" } : {};
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    try {
      return await fetch(this.address(path), {
        method: body ? "POST" : "GET",
        headers,
        body: body && JSON.stringify(body),
        signal,
      });
    } catch (error) {
      signal?.throwIfAborted();
      return null;
    }
  }

  async #newKey() {
    const wrong = this.key !== null;
    sessionStorage.removeItem(KEY);
    this.#asking ??= this.askKey(wrong).finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (!key) throw new ServerError(401, "no_key", "Without a key this server answers no search.");
    sessionStorage.setItem(KEY, key);
  }
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ServerError(response.status, error.code, error.message);
  } catch {
    return new ServerError(response.status, null, `The server answered with status ${response.status}.`);
  }
}
