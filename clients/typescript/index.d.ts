import type { components, paths } from "./schema.js";

export type { components, paths } from "./schema.js";
export type Evaluation = components["schemas"]["Record"];
export type Event = components["schemas"]["Event"];
export type Problem = components["schemas"]["Problem"];

type Verb = "get" | "put" | "post" | "delete";
type PathsWith<V extends Verb> = { [P in keyof paths]: paths[P] extends { [K in V]: unknown } ? P : never }[keyof paths];
type Operation<P extends keyof paths, V extends Verb> = paths[P] extends { [K in V]: infer O } ? O : never;
type Content<T> = T extends { content: infer C } ? (C extends object ? C[keyof C] : undefined) : undefined;
type Success<O> = O extends { responses: infer R }
  ? { [S in keyof R]: S extends 200 | 201 | 202 | 204 | 206 | 304 ? Content<R[S]> : never }[keyof R]
  : never;
type Body<O> = O extends { requestBody: { content: infer C } }
  ? { body: C[keyof C] }
  : O extends { requestBody?: { content: infer C } }
    ? { body?: C[keyof C] }
    : { body?: never };
type Params<O> = O extends { parameters: infer P } ? ({} extends P ? { params?: P } : { params: P }) : {};
type Options<O> = Params<O> & Body<O> & { headers?: Record<string, string>; signal?: AbortSignal };
type Arguments<O> = {} extends Options<O> ? [options?: Options<O>] : [options: Options<O>];

/** Sends a request and returns the content of a success. Throws ServiceError for every other answer. */
export type Call<V extends Verb> = <P extends PathsWith<V>>(
  path: P,
  ...options: Arguments<Operation<P, V>>
) => Promise<{ data: Success<Operation<P, V>>; response: Response }>;

export interface Client {
  GET: Call<"get">;
  PUT: Call<"put">;
  POST: Call<"post">;
  DELETE: Call<"delete">;
}

export interface ClientOptions {
  baseUrl: string;
  apiKey?: string;
  fetch?: typeof globalThis.fetch;
  /** How often a request that may be repeated is sent again while the service is unavailable; 4 by default. */
  retries?: number;
  headers?: Record<string, string>;
}

export function createClient(options: ClientOptions): Client;

export class ServiceError extends Error {
  readonly status: number;
  readonly problem: Problem | undefined;
  readonly response: Response;
}
