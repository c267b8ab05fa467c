"""The operator's routes: drain, reopen, rebalance."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from ds_cp.errors import EngineDeadError
from tests.server.conftest import Running, error_of

ROUTES = ("/ranks/0/drain", "/ranks/0/reopen", "/rebalance", "/reset_prefix_cache")


def test_drain_reopen_rebalance(served: Running) -> None:
    reply = served.post("/ranks/1/drain")
    assert reply.status_code == 200 and reply.json() == {"rank": 1, "drained": True}
    assert served.engine.drained == {1}
    reply = served.post("/ranks/1/reopen")
    assert reply.status_code == 200 and reply.json() == {"rank": 1, "drained": False}
    assert served.engine.drained == set()
    served.engine.moving = 12
    reply = served.post("/rebalance")
    assert reply.status_code == 200 and reply.json() == {"moving": 12}
    served.engine.prefix_blocks = 3
    assert served.post("/reset_prefix_cache").json() == {"blocks_freed": 3}
    assert served.post("/reset_prefix_cache").json() == {"blocks_freed": 0}


def test_a_rank_is_drained_when_it_is_empty(served: Running) -> None:
    """Not before: the answer says how many blocks are left, and GET /ranks and the metrics follow
    them."""

    def states() -> list[tuple[str, int]]:
        ranks = served.get("/ranks").json()["ranks"]
        assert [entry["rank"] for entry in ranks] == list(range(len(ranks)))
        return [(entry["state"], entry["kv_blocks"]["used"]) for entry in ranks]

    def metric(name: str) -> str:
        start = f'ds_cp:rank_{name}{{model_name="fake-model",rank="1"}} '
        lines = served.get("/metrics").text.splitlines()
        return next(line for line in lines if line.startswith(start)).split()[1]

    served.engine.blocks[1] = 7
    reply = served.post("/ranks/1/drain")
    assert reply.status_code == 202
    assert reply.json() == {"rank": 1, "drained": False, "blocks_left": 7}
    assert states() == [("open", 0), ("draining", 7)]
    assert (metric("drained"), metric("draining")) == ("0.0", "1.0")
    served.engine.blocks[1] = 2
    assert served.post("/ranks/1/drain").json()["blocks_left"] == 2  # asked again
    served.engine.blocks.clear()
    assert states() == [("open", 0), ("drained", 0)]
    assert (metric("drained"), metric("draining")) == ("1.0", "0.0")
    reply = served.post("/ranks/1/drain")
    assert reply.status_code == 200 and reply.json() == {"rank": 1, "drained": True}


def test_refusals(served: Running) -> None:
    for action in ("drain", "reopen"):
        error = error_of(served.post(f"/ranks/99/{action}"), 400)
        assert error["param"] == "rank" and "no rank 99" in error["message"]
        assert error["type"] == "invalid_request_error"
        error_of(served.post(f"/ranks/-1/{action}"), 400)
        for wrong in ("x", "1.5", "9" * 5000):
            error = error_of(served.post(f"/ranks/{wrong}/{action}"), 400)
            assert error["param"] == "rank" and len(error["message"]) < 300
    served.post("/ranks/0/drain")
    error = error_of(served.post("/ranks/1/drain"), 400)
    assert error["code"] == "kv_capacity_exceeded" and error["param"] == "rank"
    assert "need 300" in error["message"]
    assert served.engine.drained == {0}


@pytest.mark.parametrize("path", ROUTES)
def test_only_a_post_without_a_body(served: Running, path: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        reply = httpx.request(method, served.url + path, verify=False)
        error_of(reply, 405)
        assert reply.headers["allow"] == "POST"
    assert "no body" in error_of(served.post(path, {"rank": 1}), 400)["message"]
    error_of(served.post("/ranks//drain"), 404)
    assert served.engine.drained == set()


@pytest.mark.parametrize("path", ROUTES)
def test_pages_of_other_sites_are_refused(served: Running, path: str) -> None:
    for origin in ("http://evil.example", "null", "http://[", f"http://127.0.0.1:{served.port}1"):
        error = error_of(served.post(path, headers={"Origin": origin}), 403)
        assert error["type"] == "permission_error"
    assert served.engine.drained == set()
    assert served.post(path, headers={"Origin": served.url}).status_code == 200
    two = [("Origin", served.url), ("Origin", "http://evil.example")]
    error_of(httpx.post(served.url + path, headers=two, verify=False), 403)


def test_the_origins_scheme_counts(launch: Any) -> None:
    """A page behind a proxy that speaks TLS is of another origin; it is one that can be listed.
    "*" lists none: that any page may read answers does not let it move requests about."""
    for listed, status in (([], 403), (["*"], 403), (["https://ops.example"], 200)):
        server = launch(cors_origins=listed, allowed_hosts=["ops.example"])
        headers = {"Host": "ops.example", "Origin": "https://ops.example"}
        assert server.post("/rebalance", headers=headers).status_code == status
        tls = f"https://127.0.0.1:{server.port}"
        assert server.post("/rebalance", headers={"Origin": tls}).status_code == 403
        assert server.post("/rebalance", headers={"Origin": "null"}).status_code == 403
        headers["Origin"] = "HTTP://ops.example:80"  # this server's own, in another spelling
        assert server.post("/rebalance", headers=headers).status_code == 200


def test_the_key_is_asked_for(launch: Any) -> None:
    server = launch(api_key=("secret",))
    error_of(server.get("/ranks"), 401)
    for path in ROUTES:
        error_of(server.post(path), 401)
        reply = server.post(path, headers={"Authorization": "Bearer secret"})
        assert reply.status_code == 200


def test_engine_that_is_not_there(served: Running) -> None:
    served.engine.state = "dead"
    error_of(served.get("/ranks"), 503)
    for path in ROUTES:
        assert error_of(served.post(path), 503)["code"] == "engine_dead"
    served.engine.state = "ready"

    def die(*_: Any) -> int:
        raise EngineDeadError("worker 2 at 10.0.0.7 was killed")

    for name in ("drain", "reopen", "rebalance", "reset_prefix_cache"):
        setattr(served.engine, name, die)
    for path in ROUTES:
        assert "10.0.0.7" not in error_of(served.post(path), 503)["message"]


def test_openapi(served: Running) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    assert set(paths["/ranks"]) == {"get"}
    assert "202" in paths["/ranks/{rank}/drain"]["post"]["responses"]
    for path in ("/ranks/{rank}/drain", "/ranks/{rank}/reopen", "/rebalance"):
        assert set(paths[path]) == {"post"}
        assert "requestBody" not in paths[path]["post"]
        assert {"4XX", "5XX"} <= set(paths[path]["post"]["responses"])
