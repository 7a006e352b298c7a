"""Names of a hub, with no network and a cache that we made ourselves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from groundup.errors import UserError
from groundup.model.hub import UNWANTED, WANTED, is_hub_name, resolve

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")
NAME, COMMIT = "Someone/Model-0.6B", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, an empty cache, an empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def cached(root: Path, name: str = NAME) -> Path:
    """A snapshot as huggingface_hub leaves it."""
    repo = root / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return fill(repo / "snapshots" / COMMIT)


def no_download(*args: Any, **kwargs: Any) -> str:
    raise AssertionError("asked the hub")


def test_a_folder_always_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is called as a model of a hub is."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    cached(tmp_path / "cache")
    folder = fill(tmp_path / NAME)
    for name in (NAME, f"./{NAME}", str(folder), folder, f"{NAME}/"):
        assert resolve(name).resolve() == folder


@pytest.mark.parametrize(
    "name",
    ["./Someone/Model", "/Someone/Model", "../Model", "~/Model", "Model", "a/b/c", "models/mine/", "Someone\\Model",
     "C:/Model", "Someone/.hidden", "", "https://Someone/Model", "own/modle"],
)  # fmt: skip
def test_a_misspelt_path_is_never_taken_for_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    fill(tmp_path / "own" / "model")
    assert not is_hub_name(name)
    with pytest.raises(UserError, match="no such folder") as caught:
        resolve(name)
    assert ("did you mean own/model?" in str(caught.value)) == (name == "own/modle")


def test_what_was_fetched_before_is_found(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "cache")
    assert is_hub_name(NAME)
    assert resolve(NAME) == snapshot
    (tmp_path / "Someone").mkdir()  # now the plain name could be a misspelt folder
    assert not is_hub_name(NAME)
    assert resolve(f"hf:{NAME}") == snapshot


def test_without_a_network_it_says_what_to_bring_and_where() -> None:
    with pytest.raises(UserError) as caught:
        resolve(NAME)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{NAME}: is no folder here, was not fetched before, and the hub cannot be reached")
    for file in ("config.json", "model*.safetensors", "tokenizer.json", "chat_template.jinja", f"the folder {NAME}"):
        assert file in said


def test_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in safetensors and small files; no pickle, no code, no second copy of the model."""
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(fill(tmp_path / "fetched"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(NAME) == tmp_path / "fetched"
    assert asked == {"name": NAME, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
    files = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.model", "chat_template.jinja", "merges.txt", "pytorch_model.bin", "modeling_x.py", "README.md",
        "consolidated.00.pth", "consolidated.safetensors", "onnx/model.safetensors", "flax_model.msgpack",
    ]  # fmt: skip
    kept = list(filter_repo_objects(files, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    assert kept == files[:7]


@pytest.mark.parametrize("kind, said", [("RepositoryNotFoundError", "neither a folder here nor on the hub"),
                                        ("GatedRepoError", "accept their terms first")])  # fmt: skip
def test_what_the_hub_answers(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = getattr(errors, kind)

    def refused(*args: Any, **kwargs: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(UserError, match=said):
        resolve(NAME)


def test_a_snapshot_without_weights_we_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(tmp_path / "cache")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights in safetensors"):
        resolve(NAME)
    (snapshot / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve(NAME)


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(
        UserError, match=rf"modelscope:{NAME}: needs the package modelscope; pip install modelscope, or"
    ):
        resolve(f"modelscope:{NAME}")
    hub, asked, gone = ModuleType("modelscope"), [], []

    def download(name: str, local_files_only: bool = False, **options: Any) -> str:
        asked.append((name, options))
        if gone or (len(asked) > 1 and not local_files_only):
            raise ValueError("no route")
        return str(tmp_path / "fetched")

    fill(tmp_path / "fetched")
    hub.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", hub)
    assert resolve(f"modelscope:{NAME}") == tmp_path / "fetched"
    assert asked == [(NAME, {"allow_patterns": WANTED, "ignore_patterns": UNWANTED})]
    assert resolve(f"modelscope:{NAME}") == tmp_path / "fetched", "the network went, what was fetched is there"
    gone.append(True)
    with pytest.raises(UserError, match=rf"cannot be reached \(no route\); put its files .* into the folder {NAME}"):
        resolve(f"modelscope:{NAME}")
