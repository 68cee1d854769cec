"""The Grafana dashboard: each query is PromQL over metrics that the server has, and Grafana's own types hold it all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.repository import REPOSITORY

TEXT = (REPOSITORY / "docs" / "grafana" / "internvl-edge.json").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads(TEXT)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
# What a query says -> what Grafana puts in its place.
_FILLED = {"$__rate_interval": "1m", "$instance": ".*", "$job": ".*"}
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
# Labels that Prometheus itself adds.
_OUTER = {"instance", "job", "le"}


def filled(query: str) -> str:
    for name, value in _FILLED.items():
        query = query.replace(name, value)
    return query


def nodes(tree: Any) -> Iterator[Any]:
    """Every expression of a parsed query."""
    yield tree
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "args"):
        below = getattr(tree, name, None)
        for each in below if isinstance(below, list) else [below]:
            if each is not None and not isinstance(each, (str, int, float)):
                yield from nodes(each)


def test_the_dashboard_shows_something() -> None:
    assert len(PANELS) > 12
    assert len(QUERIES) > 20
    assert all(panel["description"] for panel in PANELS)


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_everything_asks_the_data_source_that_was_chosen() -> None:
    """A dashboard with the number of somebody's data source shows nothing anywhere else."""
    found = re.findall(r'"uid": "([^"]+)"', TEXT)
    assert set(found) == {"internvl-edge", "${datasource}"}
    assert VARIABLES["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?([a-z]+)\}?", TEXT)) - {"__rate_interval", "__all"}
    assert used <= set(VARIABLES)


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{n}" for n, (title, _) in enumerate(QUERIES)])
def test_each_query_can_be_read(title: str, query: str) -> None:
    promql = pytest.importorskip("promql_parser")
    tree = promql.parse(filled(query))
    assert any(type(node).__name__ == "VectorSelector" for node in nodes(tree))


@pytest.fixture(scope="module")
def served() -> dict[str, set[str]]:
    """Each series of the server -> its labels."""
    pytest.importorskip("prometheus_client")
    from internvl_edge.server.metrics import Metrics

    admission: Any = SimpleNamespace(running=0)
    model: Any = SimpleNamespace(progress=0.0, peek=None)
    metrics = Metrics(admission, model)
    labels = {
        metric._name: set(metric._labelnames) for metric in vars(metrics).values() if hasattr(metric, "_labelnames")
    }
    return {
        family.name + suffix: labels.get(family.name, set())
        for family in metrics.registry.collect()
        for suffix in _SUFFIXES[family.type]
    }


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{n}" for n, (title, _) in enumerate(QUERIES)])
def test_each_query_asks_for_what_the_server_has(title: str, query: str, served: dict[str, set[str]]) -> None:
    promql = pytest.importorskip("promql_parser")
    tree = promql.parse(filled(query))
    selectors = [node for node in nodes(tree) if type(node).__name__ == "VectorSelector"]
    assert selectors
    assert {selector.name for selector in selectors} <= set(served)
    known = _OUTER.union(*(served[selector.name] for selector in selectors))
    used = {matcher.name for selector in selectors for matcher in selector.matchers.matchers}
    used |= set(
        re.findall(
            r"\{\{(\w+)\}\}", str([t["legendFormat"] for p in PANELS for t in p["targets"] if t["expr"] == query])
        )
    )
    used |= {name for node in nodes(tree) if getattr(node, "modifier", None) for name in grouped(node.modifier)}
    assert used <= known


def test_every_metric_of_the_server_is_on_the_dashboard(served: dict[str, set[str]]) -> None:
    own = {re.sub("_(bucket|sum|count)$", "", name) for name in served if name.startswith("internvl_edge_")}
    assert len(own) > 15
    assert {name for name in own if name not in TEXT} == set()


def grouped(modifier: Any) -> list[str]:
    """The labels of `by (...)`."""
    return list(getattr(modifier, "labels", ()))


def test_a_query_that_is_none_is_found() -> None:
    promql = pytest.importorskip("promql_parser")
    with pytest.raises(ValueError, match="invalid promql query"):
        promql.parse("sum by (le (rate(x[1m])))")


def test_grafana_knows_every_field() -> None:
    """Grafana's own types read the file; what they do not know is lost on the way back."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")

    def back(values: dict[str, Any]) -> Any:
        return json.loads(json.dumps(models.Dashboard.from_json(values), cls=encoder.JSONEncoder))

    assert list(lost(DASHBOARD, back(DASHBOARD))) == []
    strange = json.loads(TEXT)
    strange["panels"][0]["colour"] = strange["templating"]["list"][0]["nam"] = 1
    assert list(lost(strange, back(strange))) == ["/templating/list/0/nam", "/panels/0/colour"]


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """The places whose value is another one afterwards. What is added are defaults."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            yield from lost(value, after[name], f"{path}/{name}") if name in after else [f"{path}/{name}"]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}/{number}")
    elif before != after:
        yield path
