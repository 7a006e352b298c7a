"""Quantised matrices: the fast products equal the plain ones, keep little, and never let rows disturb each other."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import shutil
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from groundup.data.batch import Batch
from groundup.errors import UserError
from groundup.infer import linear as linear_module
from groundup.infer.linear import GROUP, SCHEMES, NativeInt8, Plain, TorchInt8, make_linear
from groundup.infer.quality import Quantized, quality
from groundup.model.transformer import Transformer
from groundup.ops.native import FLAGS, SOURCES, native
from groundup.ops.quant import dynamic_linear, quantize, quantize_groups

ROOT = Path(__file__).parents[2]
# outputs, inputs: whole panels and tiles, and neither; one output; more than a chunk of outputs
SHAPES = [(64, 128), (40, 100), (1, 7), (97, 33), (4100, 32)]
ROWS = [1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 70]

needs_compiler = pytest.mark.skipif(native("int8") is None, reason="no C compiler here")


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on the C kernels, and on torch alone as without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(linear_module, "native", lambda name: None)
    elif native("int8") is None:
        pytest.skip("no C compiler here")
    return request.param


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def reference(weight: torch.Tensor, bias: torch.Tensor | None, scheme: str, x: torch.Tensor) -> torch.Tensor:
    if scheme == "int8":
        return dynamic_linear(x, quantize(weight), bias, digits=2)
    if scheme == "int8-weight":
        return F.linear(x, quantize(weight).dequantize(), bias)
    inputs = weight.shape[1]
    return F.linear(x, quantize_groups(F.pad(weight, (0, -inputs % GROUP))).dequantize()[:, :inputs], bias)


def assert_parity(
    out: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scheme: str
) -> None:
    """Up to the order of fp32 sums; int8: a second digit on the edge of two levels may take either."""
    edge = (x.abs().amax() / 127 / 254 * weight.abs().max()).item() * 3 if scheme == "int8" else 0.0
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * x.abs().max().item() + edge)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_plain_reference(scheme, shape, biased, way):
    weight, bias = random(*shape, scale=0.05), random(shape[0], seed=1) if biased else None
    product = make_linear(weight, bias, scheme)
    for n in ROWS:
        x = random(n, shape[1], seed=n, scale=3.0)
        assert_parity(product(x), reference(weight, bias, scheme, x), x, weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_with_giants_and_zeros(scheme, way):
    weight, x = random(48, 64, scale=0.05), random(5, 64)
    weight[7] = 0  # an output that is always 0
    x[1], x[2, 9], x[3] = 0, 1e4, x[3] * 1e-6
    out = make_linear(weight, None, scheme)(x)
    for row in range(len(x)):
        one = x[row : row + 1]
        assert_parity(out[row : row + 1], reference(weight, None, scheme, one), one, weight, scheme)
    assert not out[1].any() and not out[:, 7].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_a_number_stays_none(scheme, way):
    """A model that overflows must not go on with something else; the other rows know nothing of it."""
    product, x = make_linear(random(48, 64), None, scheme), random(4, 64)
    clean = product(x)
    x[1, 5], x[2, 60] = torch.nan, torch.inf
    out = product(x)
    assert out[1].isnan().all() and not out[2].isfinite().any()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])


@needs_compiler
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_is_the_same_alone_and_among_others(scheme):
    """Bit for bit: no request ever changes another's output, whatever the batch and whatever kernel it takes."""
    product, x = make_linear(random(80, 96), random(80, seed=1), scheme), random(70, 96, seed=2)
    whole = product(x)
    for start, end in [(0, 1), (69, 70), (3, 5), (5, 12), (10, 25), (20, 53), (1, 70)]:
        assert torch.equal(product(x[start:end]), whole[start:end])


@needs_compiler
@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_change_nothing(scheme):
    product, x = make_linear(random(80, 96), None, scheme), random(19, 96, seed=2)
    alone = product(x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(product(x), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weight_may_go_and_little_stays(scheme, way):
    weight = random(256, 512, scale=0.05)
    product, x = make_linear(weight, None, scheme), random(3, 512)
    expected, before = product(x), weakref.ref(weight.untyped_storage())
    bits = {"int8": 8 + 32 / 512, "int8-weight": 8 + 32 / 512, "int4": 4 + 32 / GROUP}[scheme]
    assert product.nbytes * 8 == bits * weight.numel()
    weight.zero_()
    assert torch.equal(product(x), expected)  # a copy
    del weight
    gc.collect()
    assert before() is None


def test_without_a_scheme_the_storage_is_shared():
    weight, bias, x = random(20, 16), random(20, seed=1), random(3, 16, seed=2)
    product = make_linear(weight, bias, None)
    assert isinstance(product, Plain)
    torch.testing.assert_close(product(x), F.linear(x, weight, bias))
    weight.mul_(2)
    torch.testing.assert_close(product(x), F.linear(x, weight, bias))
    assert product.nbytes == 4 * (20 * 16 + 20)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_types_and_layouts(scheme, way):
    """Parameters, bf16, and an x that is a view."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    product, x = make_linear(layer.weight, layer.bias, scheme), random(64, 9).T
    with torch.no_grad():
        out = product(x)
        torch.testing.assert_close(out, product(x.clone(memory_format=torch.contiguous_format)))
        assert (out - layer(x)).abs().max() < (0.02 if "8" in scheme else 0.3)
        half = make_linear(layer.weight.bfloat16(), layer.bias.bfloat16(), scheme)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, atol=0.3 if "4" in scheme else 0.05, rtol=0.05)
    assert product(x[:0]).shape == (0, 48)


@needs_compiler
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_of_another_width_is_refused(scheme):
    """The kernels read as far as they are told: nobody may hand them less."""
    with pytest.raises(ValueError, match=r"x is \(2, 15\), the matrix takes rows of 16"):
        make_linear(random(8, 16), None, scheme)(random(2, 15))


def test_an_unknown_scheme_is_named():
    with pytest.raises(UserError, match="'int3' is no scheme; use int8, int8-weight, int4"):
        make_linear(random(8, 16), None, "int3")


def test_without_a_compiler_torch_answers(monkeypatch):
    monkeypatch.setattr(linear_module, "native", lambda name: None)
    assert isinstance(make_linear(random(8, 16), None, "int8"), TorchInt8)


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 instruction sets")
@pytest.mark.parametrize("march", ["haswell", "alderlake", "x86-64"])
def test_every_instruction_set_gives_the_same(march, tmp_path, monkeypatch):
    """AVX2 alone, AVX2 with dot products, neither: what other people's machines compile."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {"haswell": ["avx2", "fma"], "alderlake": ["avx_vnni", "gfni"], "x86-64": []}[march]
    if any(flag not in flags for flag in needed):
        pytest.skip(f"this processor does not run {march} code")
    libraries = {}
    for name in ("int8", "int4"):
        unit, target = tmp_path / f"{name}.o", tmp_path / f"{name}.so"
        compiler = shutil.which("cc") or shutil.which("gcc") or "clang"
        options = [f"-march={march}" if flag.startswith("-march") else flag for flag in FLAGS]
        subprocess.run([compiler, *options, "-c", str(SOURCES / f"{name}.c"), "-o", str(unit)], check=True)
        subprocess.run([compiler, "-shared", "-fopenmp", str(unit), "-o", str(target), "-lm"], check=True)
        libraries[name] = ctypes.CDLL(str(target))
    weight, bias = random(100, 96, scale=0.05), random(100, seed=1)
    here = {scheme: make_linear(weight, bias, scheme) for scheme in SCHEMES}
    monkeypatch.setattr(linear_module, "native", libraries.__getitem__)
    for scheme in SCHEMES:
        there = make_linear(weight, bias, scheme)
        for n in (1, 3, 9, 33):
            x = random(n, 96, seed=n)
            torch.testing.assert_close(there(x), here[scheme](x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_cuda(scheme):
    weight, bias = random(256, 128, scale=0.05), random(256, seed=1)
    product = make_linear(weight.cuda().bfloat16(), bias.cuda().bfloat16(), scheme)
    for n in (1, 17, 40):
        x = random(n, 128, seed=n).bfloat16()
        expected = reference(weight.bfloat16().float(), bias.bfloat16().float(), scheme, x.float())
        torch.testing.assert_close(product(x.cuda()).float().cpu(), expected, rtol=0.02, atol=0.05)


# what it costs


def batches() -> list[Batch]:
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    positions = torch.arange(24).expand(2, -1)
    return [Batch(ids, labels, positions, torch.zeros(2, 24, dtype=torch.int32))]


def test_quality_of_the_model_itself_is_whole(model: Transformer):
    found = quality(model, Quantized(model, None), batches(), text_bytes=100)
    assert found["kl"] == pytest.approx(0, abs=1e-5) and found["top1_agreement"] == 1
    assert found["bits_per_byte_delta"] == pytest.approx(0, abs=1e-4)


def test_quality_falls_with_the_bits(model: Transformer):
    found = {scheme: quality(model, Quantized(model, scheme), batches(), text_bytes=100) for scheme in SCHEMES}
    assert 0 < found["int8-weight"]["kl"] < found["int4"]["kl"]
    assert 0 < found["int8"]["kl"] < found["int4"]["kl"]
    assert found["int8"]["top1_agreement"] > found["int4"]["top1_agreement"] > 0.2


def test_quality_by_hand():
    """Two tokens, one label: KL of (1/2, 1/2) from (3/4, 1/4), another favourite, and what the label costs more."""
    zero, two = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 2)
    batch = Batch(zero, torch.tensor([[1, -100]]), zero, zero.int())
    ours, theirs = two + torch.tensor([0.5, 0.5001]).log(), two + torch.tensor([0.75, 0.25]).log()
    found = quality(lambda *_: ours, lambda *_: theirs, [batch], text_bytes=4)
    assert found["kl"] == pytest.approx(0.1438, abs=1e-3)  # ln(0.5 / 0.75) / 2 + ln(0.5 / 0.25) / 2
    assert found["top1_agreement"] == 0
    assert found["bits_per_byte_delta"] == pytest.approx(1 / 4, abs=1e-3)  # half the probability: one bit


def test_a_quantised_model_keeps_less_and_shares_the_rest(model: Transformer):
    quantized = Quantized(model, "int4")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n] + [model.head_weight]
    assert quantized.nbytes < 0.2 * sum(p.numel() * 4 for p in matrices)
    assert quantized.model.head_weight is model.head_weight
    assert all(type(part) is not torch.nn.Linear for part in quantized.model.blocks.modules())
    assert any(type(part) is torch.nn.Linear for part in model.blocks.modules())  # the one given is as it was


@pytest.mark.parametrize("page", ["quantisation.md", "quantisation.zh.md"])
def test_the_experiment_of_the_page_prints_what_the_page_says(page: str, capsys: pytest.CaptureFixture[str]):
    text = (ROOT / "docs" / "learn" / page).read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```\n```\n(.*?)```", text, re.DOTALL)
    assert found
    exec(found[1], {})
    assert capsys.readouterr().out == found[2]


def test_the_quality_command_of_the_page_runs(model: Transformer, tokenizer, tmp_path: Path, monkeypatch, capsys):
    """The second snippet, on a random model and a few lines, in both languages."""
    from groundup.model.io import save_model

    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The cat sat on the mat. 小猫坐在垫子上。\n" * 20, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["quality.py", str(tmp_path / "model"), "text", str(tmp_path / "text.txt")])
    snippets = [
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "learn" / page).read_text(encoding="utf-8"), re.DOTALL)[1]
        for page in ("quantisation.md", "quantisation.zh.md")
    ]
    assert snippets[0] == snippets[1]
    exec(snippets[0], {})
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["None", *SCHEMES]


@needs_compiler
def test_the_fast_ones_are_taken():
    assert isinstance(make_linear(random(8, 16), None, "int8"), NativeInt8)
