// Made by generate.py from the OpenAPI document. Do not edit.

export interface paths {
  "/storage/evaluations/{eval_id}": {
    /** Read a record The record as it is now. Content up to 64 KiB is in it; of larger content its size, beginning and address. With `as_of` it is the record as it was: `provisional: true` says that a commit under way may still change the answer. With `wait` the answer comes after that time at the latest: the record as it is then, or 304. An evaluation may be created in that time. */
    get: {
      parameters: {
        path: {
          eval_id: string;
        };
        query?: {
          as_of?: string | null;
          wait?: number | null;
        };
        header?: {
          "If-None-Match"?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Record"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        304: {
          content: never;
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
    /** Change an evaluation Stores an event: `status` and its fields. `attempt` is the record's by default. The same change again stores nothing. Without a record this is the first event of the evaluation, and the answer is 201. */
    put: {
      parameters: {
        path: {
          eval_id: string;
        };
        header?: {
          "If-Match"?: string | null;
          "Idempotency-Key"?: string | null;
          Prefer?: string | null;
        };
      };
      requestBody: {
        content: {
          "application/json": components["schemas"]["Change"];
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Record"] | components["schemas"]["Written"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        201: {
          content: {
            "application/json": components["schemas"]["Record"] | components["schemas"]["Written"];
          };
        };
        202: {
          content: {
            "application/json": components["schemas"]["Accepted"];
          };
        };
        408: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        409: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        410: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        412: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        413: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        415: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
    /** Erase an evaluation Erases it everywhere, for good: record, events, content, dead letters and objects. Later events of it are answered 410. May be repeated. 409 while a worker of an older release runs. An object that something else may name goes with the sweep. */
    delete: {
      parameters: {
        path: {
          eval_id: string;
        };
        query?: {
          reason?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Erased"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        409: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/evaluations": {
    /** List evaluations Records without content, by `created_at`, newest first. By `cursor` (empty for the first page, then `next`) the time for a page does not depend on the number of evaluations. Filters by `run_id`, `submitter`, `executor_id`, `eval_id_prefix`, statuses other than `completed`, and metadata keys in EVALSTORE_INDEXED_METADATA use an index. With other filters, or with several, a page may hold fewer than `limit`, even none, although there is a `next`. A cursor belongs to its filters and order. By `offset` pages are full. If a filter matches so few that this takes more than 5 s, the page holds the matches among the first 200,000, and `next` goes on. */
    get: {
      parameters: {
        query?: {
          status?: ("queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost")[] | null;
          language?: string | null;
          submitter?: string | null;
          executor_id?: string | null;
          executor?: string | null;
          run_id?: string | null;
          eval_id_prefix?: string | null;
          since?: string | null;
          until?: string | null;
          order?: "newest" | "oldest";
          sort?: "created_at" | "eval_id" | "duration_ms" | "memory_bytes" | "score" | null;
          limit?: number;
          offset?: number | null;
          cursor?: string | null;
          total?: boolean;
          format?: "json" | "ndjson";
          metadata?: Record<string, string>;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Page"];
            "application/x-ndjson": string;
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
    /** Create an evaluation Stores a queued event. The same event again, by `event_id` or `Idempotency-Key`, gets the same answer. 409 if another event created the evaluation. Later events of the evaluation may be stored before. */
    post: {
      parameters: {
        header?: {
          "Idempotency-Key"?: string | null;
          Prefer?: string | null;
        };
      };
      requestBody: {
        content: {
          "application/json": components["schemas"]["NewEvaluation"];
        };
      };
      responses: {
        201: {
          content: {
            "application/json": components["schemas"]["Record"] | components["schemas"]["Written"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        202: {
          content: {
            "application/json": components["schemas"]["Accepted"];
          };
        };
        408: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        409: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        410: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        413: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        415: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/runs": {
    /** List runs The newest first, by `first_at`. `submitter`: runs all of whose evaluations are of this submitter. With filters a page may hold fewer than `limit`, even none, although there is a `next`. The sums are late by some seconds. */
    get: {
      parameters: {
        query?: {
          run_id_prefix?: string | null;
          submitter?: string | null;
          since?: string | null;
          until?: string | null;
          limit?: number;
          cursor?: string;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["RunPage"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/runs/{run_id}": {
    /** Read a run Sums of its evaluations, which are late by some seconds. `state` is `finished` when the run was declared complete and no evaluation is queued or running. */
    get: {
      parameters: {
        path: {
          run_id: string;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Run"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
    /** Declare a run complete `expected`: the run is complete when it has so many evaluations. `closed`: it is complete as it is. A run that is complete and has no unfinished evaluation left sends `storage:run:finished`. A run may be declared before its first event, but by a key that is restricted to a submitter only after it. */
    put: {
      parameters: {
        path: {
          run_id: string;
        };
      };
      requestBody: {
        content: {
          "application/json": components["schemas"]["RunDeclaration"];
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Run"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        413: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        415: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/stats": {
    /** Statistics of finished evaluations Exact counts, and quantiles within 1 %, at most a minute late. The range is rounded outwards to whole buckets, at most 10,000. Buckets and values without evaluations have no row. Lost evaluations have no `finished_at`, so they do not count. */
    get: {
      parameters: {
        query?: {
          group_by?: "status" | "language" | "submitter" | "executor" | "run" | null;
          value?: string | null;
          bucket?: "hour" | "day" | "month" | "all";
          since?: string | null;
          until?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Statistics"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/stream": {
    /** Follow changes The confirmation of each change that is committed from now on. A change may come twice: ignore an `updated` whose version is not above the last. Where the place of `Last-Event-ID` is gone, `event: snapshot` comes first: read the evaluations again. */
    get: {
      parameters: {
        query?: {
          eval_id?: string | null;
          run_id?: string | null;
          status?: ("queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost")[] | null;
        };
        header?: {
          "Last-Event-ID"?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "text/event-stream": string;
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/evaluations/{eval_id}/events": {
    /** Read an event log The events of an evaluation by (`occurred_at`, `event_id`), with content up to 4 KiB. */
    get: {
      parameters: {
        path: {
          eval_id: string;
        };
        query?: {
          limit?: number;
          cursor?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Log"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
    /** Store events of one evaluation One event as JSON, or up to 10,000 as NDJSON. The valid lines are stored in one transaction. Events may leave out `eval_id`. */
    post: {
      parameters: {
        path: {
          eval_id: string;
        };
        header?: {
          "Idempotency-Key"?: string | null;
          Prefer?: string | null;
        };
      };
      requestBody: {
        content: {
          "application/json": components["schemas"]["Event"];
          "application/x-ndjson": string;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Outcome"];
            "application/x-ndjson": string;
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        202: {
          content: {
            "application/json": components["schemas"]["Accepted"];
            "application/x-ndjson": string;
          };
        };
        408: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        409: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        410: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        413: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        415: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/events:batch": {
    /** Store events of many evaluations Up to 10,000 events as NDJSON. The valid lines are stored in one transaction. The answer has a line for each. */
    post: {
      parameters: {
        header?: {
          "Idempotency-Key"?: string | null;
          Prefer?: string | null;
        };
      };
      requestBody: {
        content: {
          "application/x-ndjson": string;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": unknown;
            "application/x-ndjson": string;
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        202: {
          content: {
            "application/x-ndjson": string;
          };
        };
        408: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        413: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        415: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/evaluations/{eval_id}/code": {
    /** Read code The bytes as they were sent, as an attachment, so that no browser shows them as a page. */
    get: {
      parameters: {
        path: {
          eval_id: string;
        };
        query?: {
          event_id?: string | null;
        };
        header?: {
          Range?: string | null;
          "If-Range"?: string | null;
          "If-None-Match"?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "text/plain": string;
            "application/octet-stream": Blob | ArrayBuffer;
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        206: {
          content: {
            "text/plain": string;
            "application/octet-stream": Blob | ArrayBuffer;
          };
        };
        304: {
          content: never;
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        416: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/evaluations/{eval_id}/output": {
    /** Read output The bytes as they were sent, as an attachment, so that no browser shows them as a page. */
    get: {
      parameters: {
        path: {
          eval_id: string;
        };
        query?: {
          event_id?: string | null;
        };
        header?: {
          Range?: string | null;
          "If-Range"?: string | null;
          "If-None-Match"?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "text/plain": string;
            "application/octet-stream": Blob | ArrayBuffer;
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        206: {
          content: {
            "text/plain": string;
            "application/octet-stream": Blob | ArrayBuffer;
          };
        };
        304: {
          content: never;
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        416: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/evaluations/{eval_id}/error": {
    /** Read error The bytes as they were sent, as an attachment, so that no browser shows them as a page. */
    get: {
      parameters: {
        path: {
          eval_id: string;
        };
        query?: {
          event_id?: string | null;
        };
        header?: {
          Range?: string | null;
          "If-Range"?: string | null;
          "If-None-Match"?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "text/plain": string;
            "application/octet-stream": Blob | ArrayBuffer;
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        206: {
          content: {
            "text/plain": string;
            "application/octet-stream": Blob | ArrayBuffer;
          };
        };
        304: {
          content: never;
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        416: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/content": {
    /** Upload content Takes raw bytes, as many as content may hold, and answers with a reference. This key may use the reference in events, as `code_ref`, `output_ref` or `error_ref`, for some days. Another key must upload the bytes itself. They are stored once. */
    post: {
      parameters: {
        header?: {
          "Content-Digest"?: string | null;
        };
      };
      requestBody?: {
        content: {
          "application/octet-stream": Blob | ArrayBuffer;
        };
      };
      responses: {
        201: {
          content: {
            "application/json": components["schemas"]["Reference"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        408: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        413: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        415: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        501: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/webhooks": {
    /** List webhooks All of them, the oldest first, without their secrets. */
    get: {
      parameters: Record<string, never>;
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Webhooks"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
    /** Subscribe to confirmations The answer holds the secret, which is shown this once. */
    post: {
      parameters: Record<string, never>;
      requestBody: {
        content: {
          "application/json": components["schemas"]["Subscription"];
        };
      };
      responses: {
        201: {
          content: {
            "application/json": components["schemas"]["NewWebhook"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        409: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/webhooks/{webhook_id}": {
    /** Read a webhook */
    get: {
      parameters: {
        path: {
          webhook_id: string;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Webhook"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
    /** Remove a webhook Delete a subscription with its history. Its pending deliveries are not sent. */
    delete: {
      parameters: {
        path: {
          webhook_id: string;
        };
      };
      responses: {
        204: {
          content: never;
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/webhooks/{webhook_id}/enable": {
    /** Enable a webhook Goes on with what is pending for a webhook that was disabled. */
    post: {
      parameters: {
        path: {
          webhook_id: string;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Webhook"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/webhooks/{webhook_id}/rotate": {
    /** Change the secret Deliveries carry signatures by the new and by the old secret until `previous_valid_until`. The new one is shown this once. */
    post: {
      parameters: {
        path: {
          webhook_id: string;
        };
      };
      requestBody?: {
        content: {
          "application/json": components["schemas"]["Rotation"];
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Rotated"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/webhooks/{webhook_id}/test": {
    /** Send a test Queues a delivery of type `storage:webhook:test`. The sinks process sends it once; the history shows its outcome. */
    post: {
      parameters: {
        path: {
          webhook_id: string;
        };
      };
      responses: {
        202: {
          content: {
            "application/json": components["schemas"]["Delivery"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        409: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/webhooks/{webhook_id}/deliveries": {
    /** List deliveries of a webhook The newest first. Those that are settled are kept for some days. */
    get: {
      parameters: {
        path: {
          webhook_id: string;
        };
        query?: {
          state?: "pending" | "delivered" | "failed" | null;
          limit?: number;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Deliveries"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver": {
    /** Send a delivery again With the same `webhook-id`, after what is pending of its evaluation. One that is pending stays as it is. */
    post: {
      parameters: {
        path: {
          webhook_id: string;
          delivery_id: string;
        };
      };
      responses: {
        202: {
          content: {
            "application/json": components["schemas"]["Delivery"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        409: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/anomalies": {
    /** List anomalies The newest first, by `detected_at`. A key that is restricted to a submitter gets those about the submitter alone. */
    get: {
      parameters: {
        query?: {
          state?: "open" | "acknowledged" | null;
          kind?: "drift" | "outlier" | null;
          dimension?: "language" | "submitter" | "executor" | null;
          value?: string | null;
          metric?: string | null;
          limit?: number;
          cursor?: string | null;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Anomalies"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/anomalies/{anomaly_id}": {
    /** Read an anomaly */
    get: {
      parameters: {
        path: {
          anomaly_id: string;
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Anomaly"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/storage/anomalies/{anomaly_id}/acknowledge": {
    /** Acknowledge an anomaly Notes the key and the reason. One that is acknowledged already stays as it is. */
    post: {
      parameters: {
        path: {
          anomaly_id: string;
        };
      };
      requestBody?: {
        content: {
          "application/json": components["schemas"]["Acknowledgement"];
        };
      };
      responses: {
        200: {
          content: {
            "application/json": components["schemas"]["Anomaly"];
          };
        };
        401: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        403: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        422: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        429: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        500: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        503: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
        404: {
          content: {
            "application/problem+json": components["schemas"]["Problem"];
          };
        };
      };
    };
  };
  "/health/live": {
    /** Does the process make progress? 200 unless a thread is stuck. Asks no server. */
    get: {
      parameters: Record<string, never>;
      responses: {
        200: {
          content: {
            "application/json": unknown;
          };
        };
        503: {
          content: {
            "application/json": unknown;
          };
        };
      };
    };
  };
  "/health/ready": {
    /** Can it answer requests? Asks PostgreSQL and Redis. Without Redis it is ready: reads are slower, and `respond-async` is refused. */
    get: {
      parameters: Record<string, never>;
      responses: {
        200: {
          content: {
            "application/json": unknown;
          };
        };
        503: {
          content: {
            "application/json": unknown;
          };
        };
      };
    };
  };
  "/metrics": {
    /** Prometheus metrics Metrics of all processes of the service on this machine that were started together, in Prometheus's text format. */
    get: {
      parameters: Record<string, never>;
      responses: {
        200: {
          content: {
            "text/plain": string;
            "application/openmetrics-text": string;
          };
        };
      };
    };
  };
}

export interface components {
  schemas: {
    NewEvaluation: {
      type?: "evaluation:queued";
      eval_id: string;
      event_id?: string | null;
      occurred_at?: string | null;
      attempt?: number | null;
      metadata?: Record<string, unknown> | null;
      run_id?: string | null;
      language?: string | null;
      submitter?: string | null;
      code?: string | null;
      code_b64?: string | null;
      code_ref?: components["schemas"]["Reference"] | null;
    };
    Reference: {
      sha256: string;
      /** Bytes. */
      size: number;
      /** How it is stored. */
      encoding: "identity" | "zstd";
    };
    Change: {
      status?: "queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled";
      /** The event's type, instead of a status. */
      type?: "evaluation:queued" | "evaluation:started" | "evaluation:running" | "evaluation:completed" | "evaluation:failed" | "evaluation:timed_out" | "evaluation:cancelled";
      eval_id?: string;
      event_id?: string | null;
      occurred_at?: string | null;
      attempt?: number | null;
      metadata?: Record<string, unknown> | null;
      run_id?: string | null;
      language?: string | null;
      submitter?: string | null;
      code?: string | null;
      code_b64?: string | null;
      code_ref?: components["schemas"]["Reference"] | null;
      executor_id?: string | null;
      container_id?: string | null;
      timeout_s?: number | null;
      exit_code?: number | null;
      duration_ms?: number | null;
      memory_bytes?: number | null;
      score?: number | null;
      reason?: string | null;
      output?: string | null;
      output_b64?: string | null;
      output_ref?: components["schemas"]["Reference"] | null;
      error?: string | null;
      error_b64?: string | null;
      error_ref?: components["schemas"]["Reference"] | null;
    };
    Event: {
      type: "evaluation:queued" | "evaluation:started" | "evaluation:running" | "evaluation:completed" | "evaluation:failed" | "evaluation:timed_out" | "evaluation:cancelled";
      eval_id?: string;
      event_id?: string | null;
      occurred_at?: string | null;
      attempt?: number | null;
      metadata?: Record<string, unknown> | null;
      run_id?: string | null;
      language?: string | null;
      submitter?: string | null;
      code?: string | null;
      code_b64?: string | null;
      code_ref?: components["schemas"]["Reference"] | null;
      executor_id?: string | null;
      container_id?: string | null;
      timeout_s?: number | null;
      exit_code?: number | null;
      duration_ms?: number | null;
      memory_bytes?: number | null;
      score?: number | null;
      reason?: string | null;
      output?: string | null;
      output_b64?: string | null;
      output_ref?: components["schemas"]["Reference"] | null;
      error?: string | null;
      error_b64?: string | null;
      error_ref?: components["schemas"]["Reference"] | null;
    };
    Record: {
      eval_id: string;
      status: "queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost";
      attempt: number;
      /** The number of its events; also the ETag. */
      version: number;
      run_id: string | null;
      language: string | null;
      submitter: string | null;
      executor_id: string | null;
      container_id: string | null;
      timeout_s: number | null;
      exit_code: number | null;
      duration_ms: number | null;
      memory_bytes: number | null;
      score: number | null;
      reason: string | null;
      metadata: Record<string, unknown>;
      queued_at: string | null;
      started_at: string | null;
      finished_at: string | null;
      created_at: string;
      updated_at: string;
      /** Where enrichers are installed: what they returned for its events. */
      enrichment?: Record<string, unknown>;
      /** Where `metadata` is less than its events gave. */
      metadata_truncated?: true;
      /** With `as_of`: where a commit under way may still change the answer. */
      provisional?: true;
      code: string | null;
      /** If it is not text, and up to 64 KiB. */
      code_b64?: string;
      /** Bytes. */
      code_size?: number;
      /** The beginning of larger content. */
      code_preview?: string;
      /** The address of larger content. */
      code_url?: string;
      output: string | null;
      /** If it is not text, and up to 64 KiB. */
      output_b64?: string;
      /** Bytes. */
      output_size?: number;
      /** The beginning of larger content. */
      output_preview?: string;
      /** The address of larger content. */
      output_url?: string;
      error: string | null;
      /** If it is not text, and up to 64 KiB. */
      error_b64?: string;
      /** Bytes. */
      error_size?: number;
      /** The beginning of larger content. */
      error_preview?: string;
      /** The address of larger content. */
      error_url?: string;
    };
    Erased: {
      eval_id: string;
      events: number;
      /** Those that are gone. */
      objects: number;
      /** Those that go with the sweep. */
      objects_left: number;
    };
    Written: {
      eval_id: string;
      /** The number of its events; also the ETag. */
      version: number;
      status: "queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost";
    };
    Listed: {
      eval_id: string;
      status: "queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost";
      attempt: number;
      /** The number of its events; also the ETag. */
      version: number;
      run_id: string | null;
      language: string | null;
      submitter: string | null;
      executor_id: string | null;
      container_id: string | null;
      timeout_s: number | null;
      exit_code: number | null;
      duration_ms: number | null;
      memory_bytes: number | null;
      score: number | null;
      reason: string | null;
      metadata: Record<string, unknown>;
      queued_at: string | null;
      started_at: string | null;
      finished_at: string | null;
      created_at: string;
      updated_at: string;
      /** Where `metadata` is less than its events gave. */
      metadata_truncated?: true;
    };
    Page: {
      evaluations: (components["schemas"]["Listed"])[];
      next: string | null;
      /** With total=true: the number of matches. */
      total?: number;
      /** Whether `total` is estimated: above 1,000,000, or where counting takes more than 5 s. */
      total_is_estimate?: boolean;
    };
    Logged: {
      event_id: string;
      type: string;
      attempt: number;
      occurred_at: string;
      recorded_at: string;
      /** Fields that this release does not know. */
      extra?: Record<string, unknown>;
    };
    Log: {
      events: (components["schemas"]["Logged"])[];
      next: string | null;
    };
    Accepted: {
      eval_id: string;
      event_id: string;
      status: "accepted";
    };
    Outcome: {
      line: number;
      outcome: "applied" | "duplicate" | "reused" | "erased" | "invalid" | "accepted";
      eval_id?: string;
      event_id?: string;
      faults?: (components["schemas"]["Fault"])[];
    };
    Run: {
      run_id: string;
      state: "open" | "finished";
      evaluations: number;
      by_status: {
        queued: number;
        running: number;
        completed: number;
        failed: number;
        timed_out: number;
        cancelled: number;
        lost: number;
      };
      pass_rate: number | null;
      mean_score: number | null;
      /** Within 1 %. */
      duration_ms: {
        p50: number | null;
        p95: number | null;
        p99: number | null;
      };
      /** Within 1 %. */
      memory_bytes: {
        p50: number | null;
        p95: number | null;
        p99: number | null;
      };
      /** Queued or running. */
      unfinished: number;
      expected: number | null;
      closed: boolean;
      /** When its first evaluation was stored, or the run declared. */
      first_at: string;
      /** When one of its evaluations last changed. */
      last_at: string;
      finished_at: string | null;
    };
    RunPage: {
      runs: (components["schemas"]["Run"])[];
      next: string | null;
    };
    RunDeclaration: {
      expected?: number | null;
      closed?: boolean;
    };
    Statistics: {
      since: string;
      until: string;
      bucket: "hour" | "day" | "month" | "all";
      group_by: string | null;
      rows: ({
        bucket: string | null;
        status?: string | null;
        language?: string | null;
        submitter?: string | null;
        executor?: string | null;
        run?: string | null;
        evaluations: number;
        by_status: {
          queued: number;
          running: number;
          completed: number;
          failed: number;
          timed_out: number;
          cancelled: number;
          lost: number;
        };
        pass_rate: number | null;
        mean_score: number | null;
        /** Within 1 %. */
        duration_ms: {
          p50: number | null;
          p95: number | null;
          p99: number | null;
        };
        /** Within 1 %. */
        memory_bytes: {
          p50: number | null;
          p95: number | null;
          p99: number | null;
        };
      })[];
    };
    Subscription: {
      /** https; http for networks in EVALSTORE_WEBHOOK_ALLOW alone. */
      url: string;
      /** Types of events or of confirmations; one of them has to match. Empty: all. */
      event_types?: ("evaluation:queued" | "evaluation:started" | "evaluation:completed" | "evaluation:failed" | "evaluation:timed_out" | "evaluation:cancelled" | "evaluation:lost" | "storage:evaluation:created" | "storage:evaluation:updated" | "storage:evaluation:erased" | "storage:evaluation:repaired" | "storage:run:finished" | "storage:run:updated" | "storage:anomaly:detected")[];
      /** Empty: all. */
      statuses?: ("queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost")[];
      run_id?: string | null;
      submitter?: string | null;
      secret?: string | null;
    };
    Webhook: {
      id: string;
      /** https; http for networks in EVALSTORE_WEBHOOK_ALLOW alone. */
      url: string;
      /** Types of events or of confirmations; one of them has to match. Empty: all. */
      event_types: ("evaluation:queued" | "evaluation:started" | "evaluation:completed" | "evaluation:failed" | "evaluation:timed_out" | "evaluation:cancelled" | "evaluation:lost" | "storage:evaluation:created" | "storage:evaluation:updated" | "storage:evaluation:erased" | "storage:evaluation:repaired" | "storage:run:finished" | "storage:run:updated" | "storage:anomaly:detected")[];
      /** Empty: all. */
      statuses: ("queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost")[];
      run_id: string | null;
      submitter: string | null;
      state: "active" | "disabled";
      created_by: string;
      created_at: string;
      delivered: number;
      /** Attempts that failed. */
      failed: number;
      /** Deliveries that wait, counted up to 10,000. */
      pending: number;
      delivered_at: string | null;
      last_error: string | null;
      failing_since: string | null;
      disabled_at: string | null;
      previous_valid_until: string | null;
    };
    NewWebhook: {
      id: string;
      /** https; http for networks in EVALSTORE_WEBHOOK_ALLOW alone. */
      url: string;
      /** Types of events or of confirmations; one of them has to match. Empty: all. */
      event_types: ("evaluation:queued" | "evaluation:started" | "evaluation:completed" | "evaluation:failed" | "evaluation:timed_out" | "evaluation:cancelled" | "evaluation:lost" | "storage:evaluation:created" | "storage:evaluation:updated" | "storage:evaluation:erased" | "storage:evaluation:repaired" | "storage:run:finished" | "storage:run:updated" | "storage:anomaly:detected")[];
      /** Empty: all. */
      statuses: ("queued" | "running" | "completed" | "failed" | "timed_out" | "cancelled" | "lost")[];
      run_id: string | null;
      submitter: string | null;
      state: "active" | "disabled";
      created_by: string;
      created_at: string;
      delivered: number;
      /** Attempts that failed. */
      failed: number;
      /** Deliveries that wait, counted up to 10,000. */
      pending: number;
      delivered_at: string | null;
      last_error: string | null;
      failing_since: string | null;
      disabled_at: string | null;
      previous_valid_until: string | null;
      /** whsec_ and the base64 of 24 to 64 bytes. */
      secret: string;
    };
    Webhooks: {
      webhooks: (components["schemas"]["Webhook"])[];
    };
    Rotation: {
      secret?: string | null;
      /** By default a day. */
      overlap_s?: number;
    };
    Rotated: {
      id: string;
      /** whsec_ and the base64 of 24 to 64 bytes. */
      secret: string;
      previous_valid_until: string;
    };
    Delivery: {
      /** The header webhook-id. */
      id: string;
      webhook_id: string;
      type: string;
      eval_id: string | null;
      version: number;
      state: "pending" | "delivered" | "failed";
      attempts: number;
      status_code: number | null;
      error: string | null;
      created_at: string;
      next_at: string | null;
      finished_at: string | null;
    };
    Deliveries: {
      deliveries: (components["schemas"]["Delivery"])[];
    };
    Anomaly: {
      id: string;
      sink: string;
      kind: "drift" | "outlier";
      dimension: "language" | "submitter" | "executor";
      /** The language, submitter or executor. */
      value: string;
      metric: "failure_rate" | "duration_ms" | "memory_bytes" | "output_bytes" | "arrivals_per_minute";
      /** The level before; of an outlier the mean. */
      expected: number;
      /** The latest level or outlier. */
      observed: number;
      /** How often it was seen. */
      occurrences: number;
      /** The first and the last evaluations that show it. */
      eval_ids: (string)[];
      detected_at: string;
      first_at: string;
      last_at: string;
      state: "open" | "acknowledged";
      acknowledged_by: string | null;
      acknowledged_at: string | null;
      reason: string | null;
    };
    Anomalies: {
      anomalies: (components["schemas"]["Anomaly"])[];
      next: string | null;
    };
    Acknowledgement: {
      reason?: string | null;
    };
    Fault: {
      field: string;
      problem: string;
    };
    Problem: {
      type: string;
      title: string;
      status: number;
      detail: string;
      request_id: string;
      faults?: (components["schemas"]["Fault"])[];
    };
  };
}
