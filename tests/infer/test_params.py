"""What a request may ask for: every wrong value is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from groundup.errors import UserError
from groundup.infer.params import Grammar, SamplingParams, params_from_dir


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1, 1.5, "7", True, None]),
        ("temperature", [-1.0, float("nan"), float("inf"), 1e300, "hot", None, True]),
        ("top_k", [-1, 2.5, None]),
        ("top_p", [0.0, 1.5, -0.1, float("nan"), "all"]),
        ("min_p", [2.0, -0.1, float("nan")]),
        ("repetition_penalty", [0.0, -1.0, 1e300, float("nan")]),
        ("presence_penalty", [2.1, -2.1, float("nan"), "x"]),
        ("frequency_penalty", [2.1, -2.1, float("nan"), None]),
        ("logit_bias", [{1: 101}, {1: -101}, {-1: 0}, {"1": 0}, {1: float("nan")}, {1: None}, [1], None]),
        ("seed", [1.5, "7", 2**63, True]),
        ("stop", [["a", ""], [""], "", [1], None, 5]),
        ("stop_token_ids", [[-1], ["a"], [1.0], 5, "12", None]),
        ("ignore_eos", [1, None, "yes"]),
        ("n", [0, -1, 1.0, None]),
        ("logprobs", [-1, 1.0, True, "5"]),
        ("prompt_logprobs", [-1, 1.0, True]),
        ("grammar", ["json", {"type": "object"}]),
    ],
)
def test_wrong_values_are_named(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{name}: ") as caught:
            SamplingParams(**{name: value})  # type: ignore[arg-type]
        assert len(str(caught.value)) < 200


def test_an_enormous_value_is_not_repeated_in_full() -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(stop=["x"] * 100_000 + [""])
    assert len(str(caught.value)) < 200


def test_the_ends_of_the_ranges_are_in() -> None:
    SamplingParams(
        max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2,
        logit_bias={0: -100, 5: 100}, seed=-(2**63), stop=(), n=1, logprobs=0, prompt_logprobs=0, grammar=None,
    )  # fmt: skip


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_a_running_request_is_out_of_its_callers_reach() -> None:
    stop, ids, bias = ["a"], [7], {3: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("b"), ids.append(8), bias.update({4: 1.0})
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (7,), {3: 1.0})
    assert replace(params, seed=1).stop == ("a",)


def test_greedy() -> None:
    assert SamplingParams().greedy
    assert SamplingParams(temperature=1e-40).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_an_unknown_kind_of_grammar_is_named() -> None:
    with pytest.raises(UserError, match="response_format: 'xml' is unknown; one of json_object, json_schema"):
        Grammar("xml")


def test_a_folders_own_settings(tmp_path) -> None:
    file = tmp_path / "generation_config.json"
    assert params_from_dir(tmp_path).temperature == 0
    file.write_text('{"temperature": 0.6, "top_k": 20}')
    assert params_from_dir(tmp_path).temperature == 0  # as in transformers: without do_sample it is greedy
    file.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20}')
    params = params_from_dir(tmp_path, top_k=None, max_tokens=7, top_p=0.5)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 20, 0.5, 7)
    assert params_from_dir(tmp_path, temperature=0).temperature == 0
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        params_from_dir(tmp_path)
