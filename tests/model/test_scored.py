"""A model that scores: transformers' numbers, transformers' files, documents that do not hear each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import SIZES as FOREIGN_SIZES
from foreign_models import save_stock

from groundup.adapt.build import adapt
from groundup.adapt.folder import save_adapter
from groundup.adapt.open import open_model
from groundup.adapt.scored import is_scoring, open_scorer, with_score, write_labels
from groundup.config import AdaptConfig
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import load_model, save_model
from groundup.model.scored import Scored, begin_scored, load_scorer, save_scorer
from groundup.model.transformer import Transformer

VOCAB, PAD = 97, 0
FOREIGN = ("gpt2", "opt-350m", "gpt_neox", "gemma", "phi", "mistral", "bloom", "gptj")


def noise(model: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter away from where it starts: a norm applied twice, or not at all, shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def trunk(kind: str = "qwen3", tied: bool = True) -> Transformer:
    config = ModelConfig(VOCAB, 32, 48, 2, 4, 2, 8, model_type=kind, tie_word_embeddings=tied, pad_token_id=PAD,
                         max_position_embeddings=128)  # fmt: skip
    return noise(Transformer(config))


def scorer(kind: str = "qwen3", tied: bool = True) -> Scored:
    return noise(Scored(trunk(kind, tied)).drop_head(), 1)


def texts(lengths: tuple[int, ...] = (7, 12, 3)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def row(documents: list[list[int]], filler: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Side by side in one row: ids, positions, documents."""
    ids = [token for document in documents for token in document] + [PAD] * filler
    places = [at for document in documents for at in range(len(document))] + list(range(filler))
    owners = [n for n, document in enumerate(documents) for _ in document] + [-1] * filler
    return torch.tensor([ids]), torch.tensor([places]), torch.tensor([owners], dtype=torch.int32)


@torch.no_grad()
def last_scores(model: Scored, documents: list[list[int]]) -> torch.Tensor:
    """Of documents that share a row."""
    scores_T = model.scores_BT(*row(documents))[0]
    ends = torch.tensor([len(document) for document in documents]).cumsum(0) - 1
    return scores_T[ends]


@torch.no_grad()
def alone(model: Scored, document: list[int]) -> torch.Tensor:
    return model.scores_BT(torch.tensor([document]))[0, -1]


def stock(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def stock_scores(model: Any, documents: list[list[int]]) -> torch.Tensor:
    return model(**padded(documents)).logits.squeeze(-1)


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("llama", False), ("llama", True), ("qwen2", False)])
def test_transformers_reads_our_files_and_computes_our_scores(kind: str, tied: bool, tmp_path: Path) -> None:
    model = scorer(kind, tied)
    save_scorer(model, tmp_path)
    theirs = stock(tmp_path)
    assert type(theirs).__name__ == f"{kind.capitalize()}ForSequenceClassification"
    assert theirs.config.num_labels == 1 and theirs.config.id2label == {0: "reward"}
    torch.testing.assert_close(last_scores(model, texts()), stock_scores(theirs, texts()), atol=1e-4, rtol=0)
    assert set(model.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Qwen2"])
def test_we_read_the_files_of_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    sizes = {**FOREIGN_SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    theirs = noise(getattr(transformers, f"{kind}ForSequenceClassification")(config))
    theirs.save_pretrained(tmp_path)
    model = load_scorer(tmp_path)
    torch.testing.assert_close(last_scores(model, texts()), stock_scores(theirs, texts()), atol=1e-4, rtol=0)
    save_scorer(model, tmp_path / "again")
    torch.testing.assert_close(
        stock_scores(stock(tmp_path / "again"), texts()), stock_scores(theirs, texts()), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_that_transformers_computes_scores_as_its_own_class_does(name: str, tmp_path: Path) -> None:
    save_stock(name, tmp_path / "base")
    model = begin_scored(load_model(tmp_path / "base"), seed=0)
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.pad_token_id = PAD
    before = last_scores(model, texts())
    save_scorer(model, tmp_path / "scorer")
    theirs = stock(tmp_path / "scorer")
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    torch.testing.assert_close(before, stock_scores(theirs, texts()), atol=1e-4, rtol=0)
    again = load_scorer(tmp_path / "scorer")
    torch.testing.assert_close(last_scores(again, texts()), before, atol=1e-5, rtol=0)
    assert again.labels == ("reward",) and again.pad_token_id == PAD
    save_scorer(again, tmp_path / "twice")
    assert stock_scores(stock(tmp_path / "twice"), texts()).tolist() == stock_scores(theirs, texts()).tolist()


def test_an_architecture_without_such_a_class_is_refused_before_training(tmp_path: Path) -> None:
    save_stock("cohere", tmp_path)
    with pytest.raises(UserError, match="transformers has no sequence classification for cohere"):
        begin_scored(load_model(tmp_path), seed=0)


def test_documents_of_a_row_do_not_hear_each_other() -> None:
    model, documents = scorer(), texts((9, 4, 14))
    together = last_scores(model, documents)
    for score, document in zip(together, documents, strict=True):
        torch.testing.assert_close(score, alone(model, document), atol=1e-5, rtol=0)
    others = last_scores(model, [documents[0], texts((4, 4))[1], documents[2]])
    assert others[0] == together[0] and abs(others[2] - together[2]) < 1e-5 and others[1] != together[1]


def test_the_head_reads_the_normalised_hidden_state_once() -> None:
    writer = trunk()
    model = Scored(writer).init_score(0)
    ids, places, owners = row(texts())
    with torch.no_grad():
        x = writer.model.embed_tokens(ids)
        before = writer._rows(x, places, owners, None)
        for block in writer.blocks:
            x = block(x, before)
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * writer.model.norm.weight
        wanted = normal @ model.score.weight[0]
        torch.testing.assert_close(model.scores_BT(ids, places, owners), wanted, atol=1e-5, rtol=1e-4)


def test_a_shared_trunk_goes_on_writing() -> None:
    """A policy with a value head on it: one set of weights, and the policy keeps its own head."""
    policy = trunk(tied=False)
    value = Scored(policy)
    ids = torch.tensor(texts()[:1])
    with torch.no_grad():
        logits = policy(ids)
        value.score.weight.add_(1)
        assert torch.equal(policy(ids), logits) and "lm_head.weight" not in value.state_dict()
        value.score.weight.zero_()
    assert value.model is policy.model and "score.weight" not in policy.state_dict()
    assert value.scores_BT(ids).abs().sum() == 0, "a fresh value head says nothing"


def test_a_fresh_head_is_small_and_depends_on_the_seed_alone() -> None:
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 50)
        heads.append(begin_scored(trunk(), seed=seed).score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0 < heads[0].std() < 2 / 33
    writer, state = trunk(), torch.random.get_rng_state()
    Scored(writer).init_score(0)
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn from the run's random numbers"


def test_scores_stay_fp32_where_the_trunk_computes_in_half() -> None:
    model = scorer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model.scores_BT(torch.tensor(texts()[:1]))
    assert scores.dtype == torch.float32


def test_what_writes_and_what_scores_are_not_mixed_up(tmp_path: Path) -> None:
    save_scorer(scorer(), tmp_path / "scorer")
    save_model(trunk(), tmp_path / "writer")
    with pytest.raises(UserError, match="holds a reward model: it scores answers and writes none"):
        load_model(tmp_path / "scorer")
    with pytest.raises(UserError, match="holds a model that writes, and no score head"):
        load_scorer(tmp_path / "writer")


def test_a_folder_without_its_score_head_is_refused(tmp_path: Path) -> None:
    save_model(trunk(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "reward"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"1 tensors are missing, first score\.weight"):
        load_scorer(tmp_path)


def test_labels_without_numbers_are_refused(tmp_path: Path) -> None:
    save_scorer(scorer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"good": "LABEL_0"}}))
    with pytest.raises(UserError, match="its id2label does not count from 0"):
        load_scorer(tmp_path)


def test_several_labels_are_several_numbers(tmp_path: Path) -> None:
    model = noise(Scored(trunk(), ("bad", "good")).drop_head(), 1)
    save_scorer(model, tmp_path)
    again, theirs = load_scorer(tmp_path), stock(tmp_path)
    assert again.labels == ("bad", "good") and theirs.config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(UserError, match=r"has 2 numbers \(bad, good\), and one score is trained"):
        begin_scored(again, 0)
    with torch.no_grad():
        numbers = again.scores_BT(torch.tensor(texts()[:1]))[0, -1]
        torch.testing.assert_close(numbers, theirs(torch.tensor(texts()[:1])).logits[0], atol=1e-4, rtol=0)


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[..., tuple[Scored, Path]]:
    """adapted(kind, **settings) -> (a reward model with an adapter as if trained, the adapter's folder)."""

    def make(kind: str = "qwen3", **told: Any) -> tuple[Scored, Path]:
        if kind in FOREIGN:
            save_stock(kind, tmp_path / "base")
        else:
            save_model(trunk(kind, tied=kind != "llama"), tmp_path / "base")
        model = begin_scored(load_model(tmp_path / "base"), seed=0)
        settings = AdaptConfig.model_validate({"method": "lora", "rank": 4, **told})
        part = adapt(model, with_score(settings), 0)
        assert part is not None
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        save_adapter(part, tmp_path / "adapter", str(tmp_path / "base"))
        write_labels(tmp_path / "adapter", model.labels)
        return model.eval(), tmp_path / "adapter"

    return make


@pytest.mark.parametrize(("kind", "told"), [
    ("qwen3", {}), ("llama", {"dora": True}), ("qwen3", {"init": "pissa"}), ("gpt2", {}), ("qwen3", {"method": "ia3"}),
    ("qwen3", {"save": ["embed_tokens"]}),
])  # fmt: skip
def test_peft_reads_an_adapter_of_a_reward_model(
    kind: str, told: dict[str, Any], adapted: Callable[..., tuple[Scored, Path]]
) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    from transformers import AutoModelForSequenceClassification

    model, folder = adapted(kind, **told)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and "score" in settings["modules_to_save"]
    base = AutoModelForSequenceClassification.from_pretrained(folder.parent / "base", num_labels=1, pad_token_id=PAD)
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    scores = last_scores(model, texts())
    torch.testing.assert_close(scores, stock_scores(theirs, texts()), atol=1e-4, rtol=0)
    opened = open_scorer(folder)
    torch.testing.assert_close(last_scores(opened, texts()), scores, atol=1e-5, rtol=0)
    assert is_scoring(folder) and not is_scoring(folder.parent / "base")


def test_we_read_an_adapter_that_peft_made(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    from transformers import AutoModelForSequenceClassification

    save_model(trunk(), tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=PAD)
    told = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, told).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = open_scorer(tmp_path / "adapter")
    torch.testing.assert_close(last_scores(model, texts()), stock_scores(theirs, texts()), atol=1e-4, rtol=0)


def test_a_bottleneck_stays_beside_its_layers(adapted: Callable[..., tuple[Scored, Path]]) -> None:
    model, folder = adapted(method="bottleneck", width=4)
    opened = open_scorer(folder)
    torch.testing.assert_close(last_scores(opened, texts()), last_scores(model, texts()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_soft_prompts_have_no_place_for_a_score_head(method: str) -> None:
    with pytest.raises(UserError, match=f"{method} saves virtual tokens and nothing beside them"):
        with_score(AdaptConfig.model_validate({"method": method}))


def test_an_adapter_of_a_reward_model_does_not_write(adapted: Callable[..., tuple[Scored, Path]]) -> None:
    _, folder = adapted()
    with pytest.raises(UserError, match="makes a reward model of its base: it scores answers and writes none"):
        open_model(folder)


def test_an_adapter_of_a_model_that_writes_is_no_reward_model(tmp_path: Path) -> None:
    model = trunk()
    save_model(model, tmp_path / "base")
    part = adapt(model, AdaptConfig.model_validate({"method": "lora"}), 0)
    assert part is not None
    save_adapter(part, tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.raises(UserError, match="its task_type is CAUSAL_LM, not SEQ_CLS"):
        open_scorer(tmp_path / "adapter")
