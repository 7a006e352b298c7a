"""Text completions, embeddings and token endpoints, asked by the OpenAI client."""

from __future__ import annotations

import math

import numpy as np
import openai
import pytest
import torch
from api_server import Api, api, pair, script  # noqa: F401  (fixtures)

from groundup.infer.generate import generate
from groundup.infer.params import SamplingParams


def complete(api: Api, prompt, **more):  # noqa: F811
    return api.client.completions.create(model="tiny", prompt=prompt, **more)


def direct(api: Api, prompts, **params):  # noqa: F811
    return generate(api.model, api.tokenizer, prompts, SamplingParams(**params))


def test_prompts_of_every_kind(api: Api) -> None:  # noqa: F811
    """Text, texts, ids, lists of ids: the same answers, and all at once or one by one."""
    tokenizer = api.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("The cat")]
    wanted = [c.text for c in direct(api, ["The cat", "小猫"], max_tokens=9)]
    assert complete(api, "The cat", max_tokens=9).choices[0].text == wanted[0]
    assert complete(api, ids, max_tokens=9).choices[0].text == wanted[0]
    answer = complete(api, ["The cat", "小猫"], max_tokens=9)
    assert [c.text for c in answer.choices] == wanted
    assert [c.index for c in answer.choices] == [0, 1]
    other = [tokenizer.bos_id, *tokenizer.encode("小猫")]
    assert [c.text for c in complete(api, [ids, other], max_tokens=9).choices] == wanted
    assert answer.usage.prompt_tokens == len(ids) + len(other)


def test_sixteen_tokens_unless_told(api: Api) -> None:  # noqa: F811
    answer = complete(api, "The cat", extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_a_stream_joins_to_the_whole(api: Api) -> None:  # noqa: F811
    ask = {"max_tokens": 12, "n": 2, "temperature": 1.2, "seed": 3}
    whole = complete(api, ["The cat", "Why?"], **ask)
    chunks = api.events("/v1/completions", {"prompt": ["The cat", "Why?"], **ask})
    assert len({c["id"] for c in chunks}) == 1 and {c["object"] for c in chunks} == {"text_completion"}
    for choice in whole.choices:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice.index]
        assert "".join(p["text"] for p in pieces) == choice.text
        assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == [choice.finish_reason]
    *_, last = complete(api, "The cat", max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 3


def test_echo_with_logprobs(api: Api) -> None:  # noqa: F811
    """The prompt comes first, its tokens judged by the model too: the numbers of a plain forward pass."""
    text = "The cat sat"
    choice = complete(api, text, echo=True, logprobs=2, max_tokens=4).choices[0]
    assert choice.text == text + direct(api, [text], max_tokens=4)[0].text
    lp = choice.logprobs
    ids = [api.tokenizer.bos_id, *api.tokenizer.encode(text)]
    assert "".join(lp.tokens[: len(ids) - 1]) == text
    logits_TV = api.model(torch.tensor([ids]))[0].log_softmax(-1)
    wanted = [logits_TV[i, token].item() for i, token in enumerate(ids[1:])]
    np.testing.assert_allclose(lp.token_logprobs[: len(wanted)], wanted, atol=1e-4)
    assert lp.text_offset[0] == 0 and lp.text_offset == sorted(lp.text_offset)
    starts = [choice.text[a:] for a in lp.text_offset]
    assert all(start.startswith(token) for start, token in zip(starts, lp.tokens, strict=True) if "bytes" not in token)
    assert all(token in top for token, top in zip(lp.tokens, lp.top_logprobs, strict=True))


def test_echo_alone_scores_a_text(api: Api) -> None:  # noqa: F811
    """max_tokens 0: what evaluation harnesses ask for. Ids have nothing before their first."""
    ids = api.tokenizer.encode("The cat sat")
    answer = complete(api, ids, echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("The cat sat", "length", 0)
    assert len(choice.logprobs.tokens) == len(ids)
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert complete(api, "The cat", max_tokens=0).choices[0].text == ""


def test_echo_in_a_stream(api: Api) -> None:  # noqa: F811
    ask = {"prompt": ["The cat", "Why?"], "echo": True, "logprobs": 1, "max_tokens": 5}
    whole = api.post("/v1/completions", ask).json()
    chunks = api.events("/v1/completions", ask)
    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(p["text"] for p in pieces) == choice["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for p in pieces for x in p["logprobs"][key]] == choice["logprobs"][key]


def test_tokens_that_are_no_characters_are_spelled_as_bytes(api: Api, script) -> None:  # noqa: F811
    script("🙂")
    choice = complete(api, "x", logprobs=0).choices[0]
    assert choice.text == "🙂"
    assert choice.logprobs.tokens[0].startswith("bytes:\\xf0")


def test_best_of_keeps_the_likeliest(api: Api) -> None:  # noqa: F811
    ask = {"temperature": 1.5, "seed": 5, "max_tokens": 8}
    all_four = complete(api, "The cat", n=4, logprobs=0, extra_body={"ignore_eos": True}, **ask).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in all_four]
    best = sorted(range(4), key=lambda i: -means[i])[:2]
    answer = complete(api, "The cat", n=2, best_of=4, extra_body={"ignore_eos": True}, **ask)
    assert [c.text for c in answer.choices] == [all_four[i].text for i in best]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 4 * 8


def test_what_is_refused_names_its_field(api: Api) -> None:  # noqa: F811
    def param(**body) -> str:
        answer = api.post("/v1/completions", {"prompt": "x", "max_tokens": 2, **body})
        assert answer.status_code == 400
        return answer.json()["error"]["param"].split("[")[0]

    assert param(suffix="end") == "suffix"
    assert param(n=2, best_of=1) == "best_of"
    assert param(best_of=2, stream=True) == "best_of"
    assert param(prompt=[]) == "prompt"
    assert param(prompt=[[]]) == "prompt"
    assert param(prompt=[99999]) == "prompt"
    assert param(prompt=[1, -2]) == "prompt"
    assert param(prompt=["x"] * 1000) == "prompt"
    assert param(prompt="cat " * 1500) == "prompt"


def test_embeddings(api: Api) -> None:  # noqa: F811
    """base64, which the client asks for, and numbers are the same; of unit length; independent of the neighbours."""
    texts = ["The cat", "小猫", "The cat sat on the mat. " * 20]
    found = api.client.embeddings.create(model="tiny", input=texts)
    assert [item.index for item in found.data] == [0, 1, 2]
    vectors = np.array([item.embedding for item in found.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    floats = api.client.embeddings.create(model="tiny", input=texts[1], encoding_format="float")
    np.testing.assert_allclose(floats.data[0].embedding, vectors[1], atol=1e-5)
    ids = [api.tokenizer.bos_id, *api.tokenizer.encode("The cat")]
    np.testing.assert_allclose(
        api.client.embeddings.create(model="tiny", input=ids).data[0].embedding, vectors[0], atol=1e-5
    )
    hidden_TD = api.model.hidden(torch.tensor([ids]))[0].mean(0)
    np.testing.assert_allclose(vectors[0], (hidden_TD / hidden_TD.norm()).detach().numpy(), atol=1e-4)
    assert found.usage.prompt_tokens == found.usage.total_tokens > len(ids)


@pytest.mark.parametrize(
    ("field", "value"), [("dimensions", 7), ("input", ""), ("input", []), ("input", "cat " * 1500), ("input", [["x"]])]
)
def test_bad_embeddings(api: Api, field: str, value) -> None:  # noqa: F811
    answer = api.post("/v1/embeddings", {"input": "x", field: value})
    if value == "":  # a document without words is one token, its start
        assert answer.status_code == 200
        return
    assert (answer.status_code, answer.json()["error"]["param"].split("[")[0]) == (400, field)


def test_tokenize_and_back(api: Api) -> None:  # noqa: F811
    text = "The cat, 小猫 🙂"
    found = api.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == [api.tokenizer.bos_id, *api.tokenizer.encode(text)]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 1024)
    assert len(found["token_strs"]) == found["count"]
    plain = api.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert plain == found["tokens"][1:]
    assert api.post("/detokenize", {"tokens": plain}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    rendered = api.tokenizer.render(messages, add_generation_prompt=True).ids
    assert api.post("/tokenize", {"messages": messages}).json()["tokens"] == rendered
    assert api.post("/detokenize", {"tokens": [99999]}).json()["error"]["param"] == "tokens"
    assert api.post("/tokenize", {}).status_code == 400


def test_models(api: Api) -> None:  # noqa: F811
    (card,) = api.client.models.list().data
    assert (card.id, card.object, card.owned_by, card.max_model_len) == ("tiny", "model", "groundup", 1024)
    assert api.client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError):
        api.client.models.retrieve("other/model")


def test_json_has_no_infinity(api: Api) -> None:  # noqa: F811
    """A token that the model holds for impossible has OpenAI's least number, not -Infinity."""
    from groundup.serve.api_logprobs import LEAST, _finite

    assert _finite(-math.inf) == _finite(math.nan) == _finite(-1e5) == LEAST
