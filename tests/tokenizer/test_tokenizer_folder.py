from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
from tokenizer_samples import text
from tokenizers import Tokenizer as Backend
from tokenizers import models

from groundup.errors import UserError
from groundup.tokenizer import Tokenizer, load_tokenizer

CHAT = [{"role": "user", "content": "你好 <|im_end|>"}, {"role": "assistant", "content": "hello"}]


def test_a_saved_folder_is_the_same_tokenizer(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    again = load_tokenizer(folder)
    assert again.fingerprint() == tokenizer.fingerprint() and again.render(CHAT) == tokenizer.render(CHAT)
    again.save(tmp_path / "deep" / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "deep" / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_a_copy_in_another_process_is_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint() == tokenizer.fingerprint() and copy.render(CHAT) == tokenizer.render(CHAT)
    assert copy.encode("<|im_end|>") == tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_transformers_loads_the_folder_whatever_model_is_in_it(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, model_type: str | None
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 800}))
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert (stock.pad_token_id, stock.bos_token_id, stock.eos_token_id) == (0, 1, 2)
    assert len(stock) == tokenizer.vocab_size and stock.model_max_length == 32768
    rng = random.Random(4)
    for _ in range(200):
        one = text(rng)
        assert stock(one)["input_ids"] == tokenizer.encode(one), one
        assert stock.decode(tokenizer.encode(one)) == one
    assert stock("<|im_end|><think>")["input_ids"] == [2, 3]
    assert stock.decode([1, 3, 2], skip_special_tokens=True) == tokenizer.decode([1, 3, 2], True) == "<think>"


def edit(folder: Path, target: Path, **config: object) -> Path:
    """A copy of the folder with these keys in tokenizer_config.json, and no chat_template.jinja."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").unlink()
    old = json.loads((target / "tokenizer_config.json").read_text())
    new = {key: value for key, value in {**old, **config}.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(new))
    return target


def test_the_template_is_found_where_stock_folders_keep_it(folder: Path, tmp_path: Path) -> None:
    inside = edit(folder, tmp_path / "inside", chat_template="inside")
    assert load_tokenizer(inside).chat_template == "inside"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    assert load_tokenizer(edit(folder, tmp_path / "named", chat_template=named)).chat_template == "yes"
    (inside / "chat_template.json").write_text('{"chat_template": "beside"}')
    assert load_tokenizer(inside).chat_template == "beside"
    (inside / "chat_template.jinja").write_text("file")
    assert load_tokenizer(inside).chat_template == "file"
    assert load_tokenizer(edit(folder, tmp_path / "none")).chat_template == ""


def test_tokens_may_be_objects_missing_or_in_the_other_file(folder: Path, tmp_path: Path) -> None:
    written = edit(folder, tmp_path / "object", bos_token={"content": "<|reserved_1|>", "lstrip": False})
    assert load_tokenizer(written).bos_id == 13
    qwen = load_tokenizer(edit(folder, tmp_path / "no_bos", bos_token=None))
    assert (qwen.bos_id, qwen.pad_id, qwen.eos_id) == (0, 0, 2)
    gpt2 = load_tokenizer(edit(folder, tmp_path / "eos_only", bos_token=None, pad_token=None))
    assert (gpt2.bos_id, gpt2.pad_id, gpt2.eos_id) == (2, 2, 2)
    beside = edit(folder, tmp_path / "map", eos_token=None)
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(beside)
    (beside / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_tokenizer(beside).eos_id == 2


def test_the_ends_of_an_answer_are_gathered_from_all_who_name_them(folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|reserved_3|>{% endfor %}"
    base = edit(folder, tmp_path / "base", chat_template=template)
    assert load_tokenizer(base).stop_ids == [2, 15]
    for ends, ids in ((0, [0, 2, 15]), ([0, 5], [0, 2, 5, 15])):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert load_tokenizer(base).stop_ids == ids


def test_what_cannot_be_loaded_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"looked for tokenizer\.json .*tokenizer_config\.json.*chat_template\.jinja"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"has tokenizer\.model but no tokenizer\.json.*AutoTokenizer"):
        load_tokenizer(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_keep_a_spelling_apart_refuses_it() -> None:
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((char, -9.0) for char in "</s>ab")], unk_id=0))
    backend.add_special_tokens(["</s>"])
    unigram = Tokenizer(backend, {"eos_token": "</s>"}, "")
    assert unigram.decode(unigram.encode("ab")).replace(" ", "") == "ab"
    with pytest.raises(UserError, match="spells </s>"):
        unigram.encode("a</s>b")
