"""The serving bench and the soak run, say what they promise and count right. How fast anything is, is not tested."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from bench import material, serve, soak
from bench.peers import environments
from bench.serving import speed, traffic
from bench.serving.programs import Programs
from bench.serving.replies import BadReply, fault_of_error, streamed, whole
from bench.serving.rounds import Watch, percentile
from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import train_tokenizer
from groundup.world import World


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Random, with logits far enough apart that rounding decides no argmax."""
    path = tmp_path_factory.mktemp("small")
    tokenizer = train_tokenizer(World(0).documents(100), 600)
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=256,
        )
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    save_model(model, path)
    tokenizer.save(path)
    return path


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(material, "real", lambda names: [])
    monkeypatch.setattr(material, "WORLD", {"text": 300, "chats": 50})


def test_json_line_has_the_keys(folder, tmp_path, small_world, capsys):
    out = tmp_path / "bench.json"
    line = ["--model", str(folder), "--programs", "ours-fp32,transformers", "--requests", "2", "--rounds", "2"]
    small = ["--prompt", "24", "--new", "9", "--threads", "1", "--work", str(tmp_path / "work")]
    serve.main([*line, *small, "--json-out", str(out)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert {"models", "shared_prefix_ratio", "aims", "runs"} <= result.keys()
    (model,) = result["models"].values()
    figures = model["requests"]["2"]
    for key in ("tokens_per_second", "ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95", "memory_mb", "resident_mb"):
        assert figures[key].keys() == {"ours-fp32", "transformers"}
        assert all(value > 0 for value in figures[key].values())
    assert figures["ratios"]["ours-fp32/transformers"] > 0
    assert figures["agreement"] == {"ours-fp32": 1.0}  # the same work: the same tokens
    assert figures["short"] == {}
    memory = figures["memory"]["ours-fp32"]
    assert memory["used_blocks"] > 0
    assert memory["weights"] + memory["used_blocks"] + memory["rest"] == pytest.approx(memory["peak"])
    assert next(iter(result["shared_prefix_ratio"].values())) > 0
    assert model["prefix"]["shared"] == 256 - 24


def test_small_soak_passes(folder, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason="the server is an extra")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = soak.main([str(folder), "--requests", "60", "--at-once", "12"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["passed"]
    assert result["counts"]["hung up on"] > 0
    assert result["counts"]["wrong bodies refused"] > 0
    assert result["counts"]["answers whole"] + result["counts"]["answers streamed"] > 30
    assert result["generated_tokens"] > 0


def test_a_soak_that_finds_something_fails():
    seen = soak.Seen(rss_mb=[100.0])
    quiet = {"blocks_used": 0.0, "running": 0.0, "waiting": 0.0}
    assert soak.verdict(seen, quiet, 110.0, [], None, 0, 1.0)["passed"]
    for name, wrong in {
        "no leaked block": (seen, quiet | {"blocks_used": 1.0}, 100.0, [], None, 0, 1.0),
        "memory flat": (seen, quiet, 200.0, [], None, 0, 1.0),
        "every answer as given alone": (seen, quiet, 100.0, ["x"], None, 0, 1.0),
        "SIGTERM lets answers finish": (seen, quiet, 100.0, [], "cut off", 0, 1.0),
        "no request failed": (soak.Seen(faults=["500"], rss_mb=[100.0]), quiet, 100.0, [], None, 0, 1.0),
    }.items():
        result = soak.verdict(*wrong)
        assert not result["passed"]
        assert [check for check, fine in result["checks"].items() if not fine] == [name]


def test_gauges_are_read_by_name():
    text = '# HELP x\ngroundup_blocks_used{model="a"} 3.0\ngroundup_preemptions_total{model="a"} 1e+03\nother{} 5\n'
    assert soak.gauges(text) == {"blocks_used": 3.0, "preemptions_total": 1000.0}


def test_figures_count_first_tokens_and_gaps():
    watch = Watch(2)
    watch.stamps = [[(0.5, 1), (0.6, 2), (0.9, 5)], [(1.0, 1)]]  # three tokens came together
    watch.seconds = 2.0
    figures = watch.figures()
    assert figures["tokens"] == 6
    assert figures["ttft_p50"] == pytest.approx(750)
    assert figures["tpot_p50"] == pytest.approx(100)
    assert figures["seconds"] == 2.0


def test_a_watch_follows_the_server_s_own_count():
    watch = Watch(1)
    watch.came(0, [7], 1)
    watch.came(0, [], 1)  # nothing new
    watch.came(0, [8], 3)
    assert [count for _, count in watch.stamps[0]] == [1, 3]
    assert watch.ids == [[7, 8]]


def test_pieces_of_unknown_size_share_the_tokens():
    watch = Watch(1)
    watch.spread(0, [watch.began + 1.0, watch.began + 2.0, watch.began + 4.0], 7)
    assert [count for _, count in watch.stamps[0]] == [2, 4, 7]
    assert watch.figures()["tokens"] == 7
    assert watch.figures()["ttft_p50"] == pytest.approx(1000)


def test_percentiles_are_numpy_s():
    values = [3.0, 1.0, 8.0, 2.5, 9.0, 4.0]
    for share in (0, 5, 50, 95, 100):
        assert percentile(values, share) == pytest.approx(np.percentile(values, share))
    assert percentile([], 50) == 0


def test_answers_that_differ_are_measured_to_the_first_difference():
    assert speed.alike([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert speed.alike([1, 2], [1, 2]) == 1.0
    assert speed.alike([1, 2], [1, 2, 3, 4]) == 0.5


def test_pieces_merge_model_by_model():
    level = {"ratios": {"ours-fp32/transformers": 2.5}, "memory": {"ours-fp32": {"rest": 100.0}}}
    first = {"models": {"big": {"parameters": 10**8, "requests": {"8": level}, "missing": {}}}, "runs": [1]}
    prefix = {"shared": 1000, "ratios": {"ours-fp32": 7.0}}
    second = {"models": {"big": {"parameters": 10**8, "prefix": prefix, "missing": {"vllm": "no"}}}, "runs": [2]}
    both = serve.merged(serve.merged({}, first), second)
    assert both["models"]["big"]["requests"] == {"8": level}
    assert both["shared_prefix_ratio"] == {"big": 7.0}
    assert both["runs"] == [1, 2]
    assert {name: aim["reached"] for name, aim in both["aims"].items()} == {
        "big: ours-fp32 / transformers at 8": True,
        "big: MB beside weights and used blocks at 8": True,
        "big: first token sooner with 1000 shared tokens": True,
    }


def test_unknown_names_are_refused(capsys):
    for line in (["--only", "speeed"], ["--programs", "ollama"]):
        with pytest.raises(SystemExit):
            serve.main(line)
        assert line[1] in capsys.readouterr().err


def test_a_peer_that_is_not_there_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.serving.programs.python_of", lambda name: None)
    options = serve.read_options(serve.parse([]), tmp_path)
    said: list[str] = []
    programs = Programs(folder, options, said.append)
    assert programs.start(("vllm", "onnx"), 1, 32, {}) == []
    assert programs.missing.keys() == {"vllm", "onnx"}
    assert "bench.peers install vllm" in programs.missing["vllm"]
    assert len(said) == 2


def test_an_environment_is_only_there_when_it_has_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(environments.ENVIRONMENTS, "vllm", environments.Environment(tmp_path, "vllm", ()))
    assert environments.python_of("vllm") is None


def test_weights_are_counted_as_they_are_computed_with(folder, tmp_path):
    programs = Programs(folder, serve.read_options(serve.parse([]), tmp_path), print)
    table = programs.config["vocab_size"] * programs.config["hidden_size"]
    vectors = programs.parameters - programs.matrices
    assert programs.weights_mb(None) * 2**20 == pytest.approx(4 * programs.parameters)
    assert programs.weights_mb("int8") * 2**20 == pytest.approx(programs.matrices + 4 * (vectors + table))
    assert math.isclose(programs.kv_bytes(), 2 * 2 * 1 * 32 * 4)


@pytest.fixture(scope="module")
def mixed():
    texts = list(World(0).documents(20))
    return traffic.Traffic(texts, lambda text: len(text.split()), 256, "m", seed=0, distinct=40)


def test_traffic_has_one_right_answer_each(mixed):
    plans = mixed.plans(400)
    assert {plan.kind for plan in plans} == set(traffic.SHARES)
    for plan in plans:
        if plan.kind == "ask":
            assert plan.body["temperature"] == 0 or "seed" in plan.body
    asked = [plan.number for plan in plans if plan.kind == "ask"]
    assert set(asked) == set(range(40))
    bodies = [body for _, body in mixed.bodies]
    assert any(body.get("n", 1) > 1 for body in bodies)
    assert any("stop" in body for body in bodies)
    assert any(plan.kind == "cancel" and plan.streamed for plan in plans)


def test_prompts_of_the_traffic_fit(mixed):
    for text in mixed.shared:
        assert 0 < len(text.split()) <= mixed.longest // 3


def events(*chunks):
    return [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]


USAGE = {"choices": [], "usage": {"completion_tokens": 2}}


def test_streamed_and_whole_answers_compare():
    said = {"index": 0, "message": {"content": "ab", "reasoning_content": "t"}, "finish_reason": "stop"}
    one_piece = whole(json.dumps({"choices": [said], "usage": {"completion_tokens": 2}}))
    chunks = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"reasoning_content": "t"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]},
        USAGE,
    ]
    assert streamed(events(*chunks)) == one_piece


@pytest.mark.parametrize(
    "chunks",
    [
        [{"choices": [{"index": 0, "text": "a", "finish_reason": None}]}, USAGE],
        [{"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}],
        [{"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}] * 2 + [USAGE],
        [{"error": {"message": "it broke"}}],
    ],
)
def test_streams_that_break_the_rules_are_found(chunks):
    with pytest.raises(BadReply):
        streamed(events(*chunks))


def test_what_a_wrong_body_must_get():
    error = {"message": "temperature: too hot", "type": "invalid_request_error", "param": "temperature", "code": None}
    assert fault_of_error(400, json.dumps({"error": error})) is None
    assert fault_of_error(500, json.dumps({"error": error}))
    assert fault_of_error(200, "{}")
    assert fault_of_error(400, "Bad Request")
    assert fault_of_error(422, json.dumps({"detail": []}))
