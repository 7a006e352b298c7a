"""The bench of LoRA runs, says what it promises and counts right. How fast anything is, is not tested."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench import adapt, adapt_peers, material
from bench.measure import Program, ProgramFailed
from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import train_tokenizer
from groundup.train.run import train
from groundup.world import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    tokenizer = train_tokenizer(World(0).documents(100), 600)
    sizes = dict(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256)
    model = Transformer(ModelConfig(**sizes, **heads, model_type="llama"))
    model.init_weights(0)
    save_model(model, path)
    tokenizer.save(path)
    return path


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setattr(material, "real", lambda names: [])
    monkeypatch.setattr(adapt, "real", lambda names: [])
    monkeypatch.setattr(material, "WORLD", {"text": 300, "chats": 60})


def asked(folder, tmp_path, *more):
    line = ["--model", str(folder), "--quick", "--threads", "1", "--seq-len", "64", "--work", str(tmp_path / "work")]
    return [*line, *more]


def test_json_line_has_the_keys(folder, tmp_path, small_world, monkeypatch, capsys):
    def train_here(options, base):
        recipe = options.recipe(base=base) | {"output": str(tmp_path / base), "eval": {"fraction": 0.1}}
        recipe["train"] |= {"steps": options.steps}
        return train(recipe, peak=1.0)["metrics"] | {"peak_mb": 1.0, "seconds": 1.0}

    monkeypatch.setattr(adapt, "train_alone", train_here)
    out = tmp_path / "bench.json"
    adapt.main(asked(folder, tmp_path, "--peers", "", "--json-out", str(out)))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    speed, qlora = result["speed"], result["qlora"]
    assert speed["useful_tokens_per_second"]["ours"] > 0 and speed["memory_mb"]["ours"] > 50
    assert 0.5 < speed["useful_share"]["ours"] <= 1
    assert speed["ratio"] is speed["memory_ratio"] is None  # nobody to compare with
    assert 0.5 < qlora["bytes_per_parameter"] <= 0.6  # a small matrix rounds its scales' scales up
    assert qlora["bytes_per_parameter"] < qlora["bytes_per_parameter_with_embeddings"] < 4
    assert qlora["loss_ratio"] == pytest.approx(1, abs=0.02)
    assert [aim["reached"] for aim in result["aims"].values()] == [True, True]
    assert len(result["runs"]) == 2


@pytest.mark.slow
def test_everything_runs_with_both_peers(folder, tmp_path, small_world, capsys):
    pytest.importorskip("peft", reason="the peers train with it")
    pytest.importorskip("trl", reason="a peer")
    adapt.main(asked(folder, tmp_path))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = result["speed"]
    assert speed["missing"] == {}
    assert speed["useful_tokens_per_second"].keys() == speed["memory_mb"].keys() == {"ours", "trainer", "trl"}
    assert speed["ratio"] == min(speed["ratios"].values()) > 0
    assert all(0.5 < share <= 1 for share in speed["useful_share"].values())
    assert result["qlora"]["qlora"]["peak_mb"] > 50
    assert len(result["aims"]) == 4


def test_rows_for_trainer_are_our_rows(folder, tmp_path, small_world):
    options = adapt.read_options(adapt.parse(asked(folder, tmp_path)), tmp_path / "work")
    paths = adapt.make_rows(options)
    rows, arrays = adapt_peers.packed(paths["rows"]), np.load(paths["rows"])
    for row, docs in zip(rows, arrays["doc_ids_BT"], strict=True):
        seen = row["labels"] != -100
        assert seen.any() and np.array_equal(row["labels"][seen], row["input_ids"][seen])
        assert row["real"] == (docs >= 0).sum()
        assert not seen[row["position_ids"] == 0].any()  # a first token is nobody's next one
    chats = np.load(paths["chats"])
    assert chats["lengths"].sum() == len(chats["tokens"]) == sum(row["real"] for row in rows)
    trained = sum(int((row["labels"] != -100).sum()) for row in rows)
    assert chats["mask"].sum() == trained


def test_transformers_computes_our_loss_on_these_rows(folder, tmp_path, small_world):
    """The peers train on the same rows in the same sense: documents apart, the same targets."""
    from transformers import AutoModelForCausalLM

    from groundup.model.io import load_model
    from groundup.ops.loss import linear_cross_entropy

    paths = adapt.make_rows(adapt.read_options(adapt.parse(asked(folder, tmp_path)), tmp_path / "work"))
    arrays = {name: torch.from_numpy(value[:2]) for name, value in np.load(paths["rows"]).items()}
    rows = [{name: torch.as_tensor(value) for name, value in row.items()} for row in adapt_peers.packed(paths["rows"])]
    names = ("input_ids", "labels", "position_ids")
    batch = {name: torch.stack([row[name] for row in rows[:2]]) for name in names}
    ours = load_model(folder)
    hidden = ours.hidden(arrays["input_ids_BT"], arrays["position_ids_BT"], arrays["doc_ids_BT"])
    total = linear_cross_entropy(hidden, ours.head_weight, arrays["labels_BT"])
    theirs = AutoModelForCausalLM.from_pretrained(folder)(**batch).loss
    torch.testing.assert_close(total / (arrays["labels_BT"] != -100).sum(), theirs)


def test_aims_are_judged_in_their_direction():
    result = {
        "speed": {"ratio": 1.25, "memory_ratio": 0.9},
        "qlora": {"bytes_per_parameter": 0.61, "loss_ratio": 1.01},
    }
    assert [aim["reached"] for aim in adapt.aims(result).values()] == [False, True, False, True]
    assert adapt.aims({"speed": {"ratio": None, "memory_ratio": None}}) == {}


def test_a_peer_that_does_not_run_is_named_and_left_out(folder, tmp_path, small_world, monkeypatch):
    def start(self):
        if self.name == "trl":
            raise ProgramFailed("trl: no such module")
        self.hello = {"first_step": 1.0, "peak_mb": 10.0}
        return self

    def turn(self, ask):
        self.rounds.append({"tokens_per_second": 30.0 if self.name == "ours" else 20.0, "peak_mb": 10.0})

    monkeypatch.setattr(Program, "start", start)
    monkeypatch.setattr(Program, "turn", turn)
    monkeypatch.setattr(Program, "stop", lambda self: None)
    options = adapt.read_options(adapt.parse(asked(folder, tmp_path)), tmp_path / "work")
    found = adapt.measure_speed(options, lambda text: None)
    assert found["missing"] == {"trl": "trl: no such module"}
    assert found["ratio"] == 1.5 and found["memory_ratio"] == 1.0


def test_unknown_names_are_refused(capsys):
    for line in (["--only", "speeed"], ["--peers", "axolotl"]):
        with pytest.raises(SystemExit):
            adapt.parse(line)
        assert line[1] in capsys.readouterr().err
