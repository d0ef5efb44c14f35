# SPDX-License-Identifier: Apache-2.0
"""The text-to-image measurement on a model of a few thousand weights and made-up pictures."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the measurement trains a diffusers U-Net")
pytest.importorskip("peft", reason="adapters are written as PEFT writes them")

from safetensors.torch import save_file

import lorax_transfer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality import image_adapters as adapters
from benchmarks.quality import (
    image_data,
    image_methods,
    image_model,
    image_noise,
    image_report,
    image_scan,
    image_score,
    image_training,
    image_transfer,
)
from benchmarks.quality.image_training import Data, Run, Schedule, train

SIZE = image_transfer.SIZES["tiny"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 64 names: a square whose place is the name's and whose colour is the style's."""
    names = [f"thing-{i}" for i in range(64)]
    images = np.full((4, 64, 16, 16, 3), 255, np.uint8)
    for i in range(64):
        for style in range(4):
            colour = [60 * style, 255 - 60 * style, 128]
            images[style, i, i % 8 : i % 8 + 6, i // 8 : i // 8 + 6] = colour
    text = np.random.default_rng(0).standard_normal((64, 3, 8)).astype(np.float16)
    path = tmp_path_factory.mktemp("images") / "emoji.npz"
    styles = np.array(image_data.STYLES)
    np.savez_compressed(path, images=images, text=text, names=np.array(names), styles=styles)
    return path


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    """One run of everything, stopped by its budget after the first of two seeds."""
    output = tmp_path_factory.mktemp("output")
    image_transfer.measure(data, output, SIZE, device="cpu", budget=0.0)
    image_transfer.main(["scan", "--output", str(output)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_noise, "METHODS", ("copy", "lorax core"))
        image_transfer.main(["noise", "--data", str(data), "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return image_model.build(8, (8, 16), 1, width=8).requires_grad_(False)


@pytest.fixture(scope="module")
def pair(unet):
    """A source and a target that is a little noise away."""
    layers = image_model.layers_of(unet)
    weights = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    moved = {k: v + 0.05 * v.std() * torch.randn(v.shape) for k, v in weights.items() if v.dim()}
    source = adapters.Checkpoint("source", weights, layers)
    return source, adapters.Checkpoint("target", weights | moved, layers)


def random_factors(base, rank):
    """An adapter with something in it."""
    learner = adapters.Trainable("lora", base, rank, 0, torch.float32)
    for name, value in learner.parameters.items():
        if name.endswith("B"):
            value.copy_(0.1 * torch.randn(value.shape))
    return learner.adapter(learner.parameters).factors


def called(model, x, t, text):
    """The velocity by way of the module itself, with the weights that it holds."""
    return image_model.through(lambda arguments: model(*arguments), x, t, text, x.dtype)


def test_people_who_do_one_thing_share_a_role():
    assert image_data.role("man-surfing") == image_data.role("woman-surfing")
    roles = [image_data.role(f"name-{i}") for i in range(1000)]
    shares = [roles.count(role) / 1000 for role in ("adapt", "tune", "test", "new")]
    # A binomial share of 1000 is within 0.05 of its mean by more than three deviations.
    assert shares == pytest.approx([0.54, 0.06, 0.25, 0.15], abs=0.05)


def test_drawing_follows_the_box_of_the_icon():
    pytest.importorskip("resvg_py", reason="draws the pictures")
    body = '<path fill="#ff0000" d="M10 10h8v16h-8z"/>'
    icons = {"width": 16, "height": 16, "icons": {"half": {"body": body, "left": 10, "top": 10}}}
    picture = image_data.draw(icons, "half", side=8)
    assert (picture[:, :4] == [255, 0, 0]).all()
    assert (picture[:, 4:] == 255).all()


def test_everything_is_measured_once(measured):
    result = json.loads((measured / "images.json").read_text())
    rows = result["rows"]
    assert {row["seed"] for row in rows} == {0}, "a spent budget stops after the seed at hand"
    for kind in ("lora", "lorax"):
        found = [row["method"] for row in rows if row["kind"] == kind and row["pair"] == "near"]
        assert found == ["trained", *image_methods.methods(kind)]
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers)), row
    assert result["drift"]["near"] > 0
    scanned = [(row["pair"], row["kind"]) for row in result["scan"]]
    assert scanned == [("near", "lora"), ("near", "lorax")]
    # The other rate of the LoRA is a millionth: nothing is learnt with it.
    assert result["rates"] == {"lora": 2e-2, "lorax": 2e-2}


def test_methods_are_compared_picture_by_picture(measured):
    rows = json.loads((measured / "images.json").read_text())["noise"]
    assert [(row["kind"], row["method"]) for row in rows] == [
        ("lora", "copy"),
        ("lora", "restore 16, by drift"),
        ("lorax", "copy"),
        ("lorax", "lorax core"),
        ("lorax", "restore 16, by drift"),
    ]
    copies = [row for row in rows if row["method"] == "copy"]
    assert [(row["change"], row["error"]) for row in copies] == [(0, 0), (0, 0)]
    for row in rows:
        assert row["method"] == "copy" or row["error"] > 0
        copy = next(each["loss"] for each in copies if each["kind"] == row["kind"])
        # The mean of the differences, in float64.
        assert row["loss"] - copy == pytest.approx(row["change"], abs=1e-12)


def test_losses_of_pictures_have_the_loss_of_all_as_their_mean(unet, pair):
    images, text = torch.rand(5, 3, 8, 8), torch.randn(5, 3, 8)
    weights = pair[0].weights
    predict = image_model.Predictor(unet, weights, 4, tuple(text.shape[1:]))
    whole = image_model.denoising_loss(predict, images, text, image_noise.TIMES, seed=7)
    with torch.no_grad():
        found = image_noise.losses(unet, weights, images, text)
    assert found.shape == (5,)
    # Batches of another size: float32 sums in another order.
    assert found.mean().item() == pytest.approx(whole, rel=1e-5)


def test_advice_is_held_against_the_best_method():
    losses = {("none", "none"): 10, ("lora", "trained"): 5, ("lora", "copy"): 8}
    losses |= {("lora", "anchor both"): 5.99, ("lora", "restore 16, half"): 5.9}
    losses |= {("lora", "undo all (control)"): 1}
    rows = [
        {"pair": "p", "kind": kind, "method": method, "seed": 0, "loss": loss, "style": 0}
        for (kind, method), loss in losses.items()
    ]

    def advice(*verdicts):
        scanned = [{"pair": "p", "kind": "lora", "verdict": verdict} for verdict in verdicts]
        return image_report.advice({"rows": rows, "scan": scanned, "drift": {"p": 0.1}})

    text = advice("copy", "anchor", "restore", "do not")
    assert "| p | ordinary LoRA | copy | 40 | 40 | restore 16, half: 82 |" in text
    assert "| p | ordinary LoRA | do not |  | 40 |" in text
    assert text.endswith("2 of 4 name the best method, or one within 2 points of it.")


def test_training_and_adapters_lower_the_loss(measured):
    rows = json.loads((measured / "images.json").read_text())["rows"]
    for pair in ("source", "near"):
        none = next(r["loss"] for r in rows if r["pair"] == pair and r["kind"] == "none")
        for kind in ("lora", "lorax"):
            own = [r for r in rows if r["pair"] == pair and r["kind"] == kind]
            assert own[0]["method"] == "trained"
            assert own[0]["loss"] < none


def test_models_that_were_kept_are_read_back(measured, data):
    run = image_transfer.Measurement(data, measured, SIZE, torch.device("cpu"))
    drift = json.loads((measured / "images.json").read_text())["drift"]
    run.models(measured / "models")
    # Sums of float64 squares, in another order.
    assert run.facts["drift"] == pytest.approx(drift, rel=1e-12)
    assert "base" not in run.facts["seconds"]


def test_seeds_share_their_models_and_methods_may_be_left_out(
    measured, data, tmp_path, monkeypatch
):
    """What the command line says of seeds, rates and methods; the models are those at hand."""
    monkeypatch.setattr(image_transfer, "SIZES", {"full": SIZE})
    names = list(image_methods.methods("lora") | image_methods.methods("lorax"))
    command = ["run", "--data", str(data), "--output", str(tmp_path), "--device", "cpu"]
    command += [
        "--models",
        str(measured / "models"),
        "--seeds",
        "4",
        "2",
        "--rates",
        "0.01",
        "0.02",
    ]
    image_transfer.main([*command, "--without", *(n for n in names if n != "copy")])
    result = json.loads((tmp_path / "images.json").read_text())
    assert result["rates"] == {"lora": 0.01, "lorax": 0.02}
    assert {row["method"] for row in result["rows"]} == {"none", "trained", "copy"}
    moved = [r for r in result["rows"] if r["method"] == "copy" and r["kind"] == "lora"]
    assert [row["seed"] for row in moved] == [4, 2]
    assert moved[0]["loss"] != moved[1]["loss"]
    text = image_report.table(result["rows"], "near", "lora")
    losses = [1000 * row["loss"] for row in moved]
    assert f"| copy | {np.mean(losses):.2f} ± {np.std(losses, ddof=1):.2f} |" in text
    with pytest.raises(SystemExit, match="no method 'restores'"):
        image_transfer.main([*command, "--without", "restores"])


def test_report_of_a_run(measured, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{image_report.BEGIN}\nold\n{image_report.END}\nafter\n")
    arguments = [str(measured), "--images", str(tmp_path / "images"), "--document", str(document)]
    image_report.main(arguments)
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| transport 1/2 |" in text
    for name in ("quality_images.png", "contact_sheet_near.png"):
        assert 0 < (tmp_path / "images" / name).stat().st_size < 400_000


def test_shares_of_lift_and_gap():
    losses = {("none", "none"): 10, ("lora", "trained"): 6, ("lora", "copy"): 8, ("lora", "x"): 7}
    rows = [
        {"pair": "p", "kind": kind, "method": method, "seed": 0, "loss": loss}
        for (kind, method), loss in losses.items()
    ]
    assert image_report.shares(rows, "p", "lora", "x") == {"lift": [75.0], "gap": [50.0]}


def test_a_run_is_its_seed(unet):
    weights = dict(unet.state_dict())
    data = Data(torch.randn(20, 3, 8, 8), torch.randn(20, 3, 8))

    def once(seed):
        parameters = {name: value.clone() for name, value in weights.items()}
        schedule = Schedule(steps=3, batch=4, lr=1e-3, warmup=1)
        run = Run(unet, parameters, lambda values: values, data, schedule, seed)
        train([run], "", lambda text: None)
        return run.result()

    first, again, other = once(1), once(1), once(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_packed_weights_are_the_weights(unet):
    weights = dict(unet.state_dict())
    packed = image_model.Packed(weights)
    found = packed.unpack(packed.pack(weights))
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    starts = [v.storage_offset() for v in found.values() if v.numel() % 64 == 0]
    assert starts
    assert all(start % 64 == 0 for start in starts)


def test_training_is_cut_to_its_seconds(unet, monkeypatch):
    data = Data(torch.randn(20, 3, 8, 8), torch.randn(20, 3, 8))
    monkeypatch.setattr(image_training, "PROBE", (1, 3))

    def steps(seconds):
        parameters = {name: value.clone() for name, value in unet.state_dict().items()}
        schedule = Schedule(steps=12, batch=2, lr=1e-3, warmup=2, seconds=seconds)
        run = Run(unet, parameters, lambda values: values, data, schedule, 0)
        train([run], "", lambda text: None)
        assert run.done == run.schedule.steps
        return run.done

    assert steps(0.0) == 4, "never within the warm-up"
    assert steps(1e6) == 12


def test_a_size_is_read_back(measured):
    facts = json.loads((measured / "images.json").read_text())
    assert image_scan.measured_size(facts).channels == SIZE.channels
    assert image_scan.measured_size(facts).base == SIZE.base


def test_a_core_moves_by_the_published_formula(pair):
    source, target = pair
    bases = dict(zip(source.layers, adapters.lorax_bases(source, 2), strict=True))
    cores = {name: torch.randn(svd.rank, svd.rank) for name, svd in bases.items()}
    adapter = adapters.Adapter("lorax", adapters.lorax_factors(cores, bases), cores)
    move = image_methods.Move(source, target, adapter)
    found, _ = image_methods.transfer(move, image_methods.methods("lorax")["lorax core"])
    for name, (B, A) in found.items():
        W, k = target.matrices[name].double(), len(cores[name])
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        U, V = U[:, :k], Vh[:k].mT
        dW = adapter.factors[name][0].double() @ adapter.factors[name][1].double()
        expected = U @ U.mT @ dW @ V @ V.mT
        # float32 bases: the weights are random, so the gap at the cut is of the order of 1/k.
        error = (B.double() @ A.double() - expected).norm() / dW.norm()
        assert error < 1e-3, name


def test_cores_act_as_in_peft(unet, pair):
    from lorax_transfer.peft import add_lorax_adapter, lorax_layers

    source, _ = pair
    width = adapters.core_rank(source.layers, 2)
    bases = dict(zip(source.layers, adapters.lorax_bases(source, 2), strict=True))
    cores = {name: 0.1 * torch.randn(svd.rank, svd.rank) for name, svd in bases.items()}
    factors = adapters.lorax_factors(cores, bases)
    model = image_model.build(8, (8, 16), 1, width=8)
    model.load_state_dict(source.weights)
    wrapped = add_lorax_adapter(model, width, target_modules=list(source.layers))
    for name, layer in lorax_layers(wrapped).items():
        layer.lora_core["default"].weight.data.copy_(cores[name])
    x, t, text = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 3, 8)
    merged = adapters.merge(source.weights, factors, torch.float32)
    ours = image_model.velocity(unet, merged, x, t, text)
    with torch.no_grad():
        theirs = called(wrapped, x, t, text)
    # Same numbers in another order of float32 sums.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_both_kinds_of_adapter_train_as_much(pair):
    source, sizes = pair[0], {}
    for kind in ("lora", "lorax"):
        learner = adapters.Trainable(kind, source, 2, 0, torch.float32)
        sizes[kind] = sum(value.numel() for value in learner.parameters.values())
    wider = adapters.core_rank(source.layers, 2) + 1
    sides = [(shape[0], math.prod(shape[1:])) for shape in source.layers.values()]
    assert sizes["lorax"] <= sizes["lora"]
    assert sum(min(wider, *side) ** 2 for side in sides) > sizes["lora"]


@pytest.mark.parametrize("kind", ["lora", "lorax"])
def test_a_stored_adapter_is_read_back(pair, kind):
    base = adapters.Checkpoint("base", pair[0].weights, pair[0].layers)
    learner = adapters.Trainable(kind, base, 2, 0, torch.float32)
    for value in learner.parameters.values():
        value.copy_(torch.randn(value.shape))
    adapter = learner.adapter(learner.parameters)
    again = adapters.restored(adapters.stored(adapter, "0.a"), "0.a", base, 2)
    assert again.kind == kind
    assert list(again.factors) == list(adapter.factors)
    for name, (B, A) in adapter.factors.items():
        # The same numbers, by way of the same bases.
        torch.testing.assert_close(again.factors[name][0] @ again.factors[name][1], B @ A)


@pytest.mark.parametrize("kind", ["lora", "lorax"])
def test_weights_in_training_are_those_of_the_adapter(pair, kind):
    base = pair[0]
    learner = adapters.Trainable(kind, base, 2, 0, torch.float32)
    for value in learner.parameters.values():
        value.copy_(torch.randn(value.shape))
    found = learner.weights(learner.parameters)
    factors = learner.adapter(learner.parameters).factors
    expected = adapters.merge(base.weights, factors, torch.float32)
    assert list(factors) == list(base.layers)
    for name, value in expected.items():
        # One product of float32 in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_adapters_act_as_in_peft_and_files_move_the_same(unet, pair, tmp_path):
    from peft import PeftModel

    source, target = pair
    factors = random_factors(source, 2)
    adapters.save_peft(tmp_path / "adapter", factors, source.layers, "source")
    for base in (source, target):
        path = tmp_path / f"{base.name}.safetensors"
        save_file({k: v.contiguous() for k, v in base.weights.items()}, path)

    x, t, text = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 3, 8)
    merged = adapters.merge(source.weights, factors, torch.float32)
    ours = image_model.velocity(unet, merged, x, t, text)
    copy = image_model.build(8, (8, 16), 1, width=8)
    copy.load_state_dict(source.weights)
    with torch.no_grad():
        theirs = called(PeftModel.from_pretrained(copy, tmp_path / "adapter"), x, t, text)
    # Same numbers in another order of float32 sums.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    files = [tmp_path / name for name in ("adapter", "source.safetensors", "target.safetensors")]
    lorax_transfer.transfer(*files, tmp_path / "moved", method="lorax", rank=4, device="cpu")
    adapter = adapters.Adapter("lora", factors)
    cut = [svd.truncate(min(4, svd.rank)) for svd in target.full_bases().values()]
    B, A = adapters.lk.transfer_lora(*image_methods.Move(source, target, adapter).lists(), cut)
    moved = PeftModel.from_pretrained(
        image_model.build(8, (8, 16), 1, width=8), tmp_path / "moved"
    ).state_dict()
    for name, b, a in zip(factors, B, A, strict=True):
        prefix = f"base_model.model.{name}"
        found = moved[f"{prefix}.lora_B.default.weight"].flatten(1) @ moved[
            f"{prefix}.lora_A.default.weight"
        ].flatten(1)
        # The tool stops at a projector error of 1e-3, where here every direction was computed.
        assert (found - b @ a).norm() <= 5e-3 * (b @ a).norm() + 1e-6, name


def test_kernel_distance_sees_a_shift_and_not_a_second_draw():
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(count, 16, generator=generator, dtype=torch.float64)

    reference = draw(400)
    repeated = [image_score.kernel_distance(draw(100), reference) for _ in range(20)]
    mean = sum(repeated) / len(repeated)
    deviation = torch.tensor(repeated).std().item()
    # Unbiased: the mean of twenty is within four of its standard errors of zero.
    assert abs(mean) < 4 * deviation / math.sqrt(20)
    assert image_score.kernel_distance(draw(100) + 1, reference) > 10 * deviation


def test_sampling_is_the_noise_where_nothing_moves():
    class Still:
        batch, x = 4, torch.zeros(1, 3, 8, 8)

        def __call__(self, x, t, text):
            return torch.zeros_like(x)

    text = torch.randn(3, 2, 8)
    first = image_model.sample(Still(), text, steps=3, guidance=2.0, seed=1)
    again = image_model.sample(Still(), text[:2], steps=1, guidance=5.0, seed=1)
    assert first.shape == (3, 3, 8, 8)
    assert first.abs().max() <= 1
    assert again.shape == (2, 3, 8, 8)
