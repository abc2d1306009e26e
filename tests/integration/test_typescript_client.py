"""The TypeScript client on Node, against the real service."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import BOTH, READ, Api

CLIENT = Path(__file__).parents[2] / "clients" / "typescript"
NODE = shutil.which("node")

SMOKE = """
import { createClient, ServiceError } from "./index.js";
const { API_URL: baseUrl, BOTH, READ } = process.env;
const client = createClient({ baseUrl, apiKey: BOTH });
const id = "ts-1:a+b@c";
const path = { eval_id: id };
const out = {};

const created = await client.POST("/storage/evaluations", {
  body: { eval_id: id, code: "print('\\u2603')", language: "python", run_id: "r", metadata: { team: "blue" } },
});
out.created = created.response.status;
const ending = { status: "completed", exit_code: 0, output: "42\\n", score: 0.5 };
await client.PUT("/storage/evaluations/{eval_id}", { params: { path }, body: ending });
const { data: record, response } = await client.GET("/storage/evaluations/{eval_id}", { params: { path } });
out.record = record;
const header = { "If-None-Match": response.headers.get("etag") };
out.unchanged = (await client.GET("/storage/evaluations/{eval_id}", { params: { path, header } })).response.status;
const blue = { limit: 10, metadata: { "metadata.team": "blue" } };
const listed = await client.GET("/storage/evaluations", { params: { query: blue } });
out.listed = listed.data.evaluations.map((one) => one.eval_id);
const none = await client.GET("/storage/evaluations", { params: { query: { metadata: { "metadata.team": "red" } } } });
out.none = none.data.evaluations.length;
out.text = (await client.GET("/storage/evaluations/{eval_id}/output", { params: { path } })).data;

const refused = createClient({ baseUrl, apiKey: READ });
for (const work of [
  () => refused.POST("/storage/evaluations", { body: { eval_id: "e", code: "x" } }),
  () => client.POST("/storage/evaluations", { body: { eval_id: "e", code: 7 } }),
  () => client.GET("/storage/evaluations/{eval_id}", { params: { path: { eval_id: "absent" } } }),
]) {
  try { await work(); } catch (error) {
    (out.errors ??= []).push([error instanceof ServiceError, error.status, error.problem.faults?.[0]?.field ?? null]);
  }
}

let calls = 0;
const flaky = createClient({ baseUrl, apiKey: BOTH, fetch: (...all) => {
  if (++calls === 1) throw new TypeError("connection reset");
  return calls === 2 ? new Response("", { status: 503, headers: { "retry-after": "0.01" } }) : fetch(...all);
} });
out.repeated = [(await flaky.GET("/storage/evaluations/{eval_id}", { params: { path } })).data.eval_id, calls];
calls = 0;
const body = { eval_id: "e", code: "x" };
out.once = await flaky.POST("/storage/evaluations", { body }).then(() => "sent", (error) => error.message);
console.log(JSON.stringify(out));
"""

TYPED = """
import { createClient, type Evaluation } from "./index.js";
const client = createClient({ baseUrl: "http://127.0.0.1", apiKey: "k" });
const { data } = await client.GET("/storage/evaluations/{eval_id}", { params: { path: { eval_id: "e" } } });
const record: Evaluation | undefined = data;
const status: string | undefined = record?.status;
await client.POST("/storage/evaluations", { body: { eval_id: "e", code: "print(1)" } });
await client.GET("/health/live");
// @ts-expect-error - there is no such path
await client.GET("/storage/nothing");
// @ts-expect-error - eval_id is missing
await client.GET("/storage/evaluations/{eval_id}", { params: { path: {} } });
// @ts-expect-error - the path has no POST
await client.POST("/health/live");
export { status };
"""


@pytest.mark.skipif(NODE is None, reason="needs Node 18 or later")
def test_the_client_writes_reads_lists_and_repeats_on_node(api: Api, tmp_path: Path) -> None:
    script = tmp_path / "smoke.mjs"
    script.write_text(SMOKE.replace("./index.js", (CLIENT / "index.js").as_uri()))
    given = {**os.environ, "API_URL": api.url, "BOTH": BOTH, "READ": READ}
    done = subprocess.run([str(NODE), script], env=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    assert out["created"] == 201
    record = out["record"]
    assert (record["status"], record["run_id"], record["score"]) == ("completed", "r", 0.5)
    assert (record["code"], record["output"]) == ("print('\N{SNOWMAN}')", "42\n")
    assert (out["unchanged"], out["listed"], out["none"], out["text"]) == (304, ["ts-1:a+b@c"], 0, "42\n")
    assert out["errors"] == [[True, 403, None], [True, 422, "code"], [True, 404, None]]
    assert out["repeated"] == ["ts-1:a+b@c", 3]
    assert out["once"] == "connection reset"


def test_the_types_accept_right_calls_and_refuse_wrong_ones(tmp_path: Path) -> None:
    compiler = shutil.which("tsc")
    if compiler is None:
        pytest.skip("no tsc: `npm install --global typescript` checks the types of the client")
    for name in ("index.d.ts", "schema.d.ts", "index.js", "package.json"):
        shutil.copy(CLIENT / name, tmp_path)
    (tmp_path / "typed.ts").write_text(TYPED)
    options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--moduleResolution", "nodenext"]
    options += ["--lib", "es2022,dom,dom.iterable"]
    done = subprocess.run([compiler, *options, "typed.ts"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
