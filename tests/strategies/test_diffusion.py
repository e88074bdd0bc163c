"""LD-Pruner on tiny random U-Nets: a removed operator adds exactly nothing, the score is the paper's, every subset."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunekit as pk
from prunekit.models.places import located
from prunekit.plugins.registry import ALLOCATORS, OBJECTIVES
from prunekit.search.ledger import Ledger
from prunekit.system.files import digest
from prunekit.system.progress import Progress

diffusers = pytest.importorskip("diffusers")
from prunekit_strategies.diffusion import prune_pipeline, unets  # noqa: E402
from prunekit_strategies.diffusion.__main__ import main  # noqa: E402
from prunekit_strategies.diffusion.latents import Conditions, Latents, make_noise  # noqa: E402
from prunekit_strategies.diffusion.prune import make_space, run_search  # noqa: E402

SMALL: dict[str, Any] = {"samples": 3, "steps": 2, "device": "cpu", "quiet": True, "verify": False}


def make_unet(**overrides: Any) -> Any:
    """A U-Net without conditions, of six operators."""
    torch.manual_seed(3)
    sizes = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "block_out_channels": (4,), "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    rest = {"attention_head_dim": 2, "norm_num_groups": 2}
    return diffusers.UNet2DModel(**(sizes | blocks | rest | overrides)).eval()


def make_conditional(**overrides: Any) -> Any:
    """A U-Net with conditions, of two resolutions."""
    torch.manual_seed(3)
    sizes = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (4, 8), "layers_per_block": 1}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    rest = {"attention_head_dim": 2, "norm_num_groups": 2, "cross_attention_dim": 6}
    return diffusers.UNet2DConditionModel(**(sizes | blocks | rest | overrides)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """A pipeline of a U-Net and DDIM in a folder of its own; one with conditions has these two parts alone."""

    def save(unet: Any) -> Path:
        folder = tmp_path_factory.mktemp("pipeline") / "tiny"
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=20)
        if isinstance(unet, diffusers.UNet2DModel):
            diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)
            return folder
        unet.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")
        parts = {"unet": ["diffusers", type(unet).__name__], "scheduler": ["diffusers", "DDIMScheduler"]}
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "Mine"} | parts))
        return folder

    return save


@pytest.fixture(scope="module")
def tiny(saved: Callable[[Any], Path]) -> Path:
    return saved(make_unet())


def run(unet: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What a U-Net predicts on seeded noise, and on seeded conditions if it has them."""
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(2, unet.config.in_channels, 4, 4, generator=draw, dtype=torch.float64).to(dtype)
    given = []
    if isinstance(unet, diffusers.UNet2DConditionModel):
        given = [torch.randn(2, 3, 6, generator=draw, dtype=torch.float64).to(dtype)]
    with ExitStack() as stack, torch.no_grad():
        for module in unet.modules():  # whose sums have another order where the channels are last in memory
            if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
                hook = module.register_forward_pre_hook(lambda module, given: tuple(x.contiguous() for x in given))
                stack.callback(hook.remove)
        return unet(latents, torch.tensor(7), *given, return_dict=False)[0]


@contextmanager
def silenced(unet: Any, names: list[str]) -> Iterator[None]:
    """Multiply by zero what branches add, at the last layer of each; nothing is taken out."""
    with ExitStack() as stack:
        for name in names:
            operator = unet.get_submodule(name)
            last = operator
            if isinstance(operator, diffusers.models.resnet.ResnetBlock2D):
                last = operator.conv2
            elif getattr(operator, "residual_connection", False):
                last = operator.to_out[1]
            hook = last.register_forward_hook(lambda module, given, made: made * 0)
            stack.callback(hook.remove)
        yield


UNETS = {
    "stable-diffusion": make_conditional,
    "linear-projections": partial(make_conditional, use_linear_projection=True, only_cross_attention=True),
    "resnet-resampling": partial(
        make_unet, block_out_channels=(4, 8), downsample_type="resnet", upsample_type="resnet",
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ),
    "scaled": partial(make_unet, mid_block_scale_factor=1.4),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNETS)
def test_removed_is_masked_exactly_and_prices_are_what_leaves(kind: str, tmp_path: Path) -> None:
    unet = UNETS[kind]().double()
    operators = unets.operators(unet)
    before, weights = run(unet), [p.clone() for p in unet.parameters()]
    every = [op.name for op in operators]
    for names in [*([name] for name in every), every[::2], every]:
        with silenced(unet, names):
            masked = run(unet)
        with unets.without(unet, names):
            assert torch.equal(run(unet), masked), names
        assert not torch.equal(masked, before), names
    assert torch.equal(run(unet), before)
    assert all(map(torch.equal, unet.parameters(), weights))

    small = unets.pruned(unet, every[::2])
    assert unets.count(small) == unets.count(unet) - sum(op.parameters for op in operators[::2])
    assert [op.name for op in unets.operators(small)] == every[1::2]
    again = unets.pruned(small, every[1::2])
    again.save_pretrained(tmp_path)
    loaded = type(again).from_pretrained(tmp_path, torch_dtype=torch.float64).eval()
    assert loaded.config.removed == every[::2] + every[1::2]
    with silenced(unet, every):
        assert torch.equal(run(loaded), run(unet))
    assert unets.operators(loaded) == []


def test_operators_are_what_blocks_add() -> None:
    found = {op.name: op.kind for op in unets.operators(make_conditional())}
    assert set(found.values()) == {"resnet", "self-attention", "cross-attention", "feed-forward"}
    block = "up_blocks.1.attentions.1.transformer_blocks.0"
    assert {name: kind for name, kind in found.items() if name.startswith(block)} == {
        f"{block}.attn1": "self-attention", f"{block}.attn2": "cross-attention", f"{block}.ff": "feed-forward"
    }  # fmt: skip
    blocks = [op.block for op in unets.operators(make_conditional())]
    assert blocks == sorted(blocks)
    assert "mid_block.attentions.0" in {op.name for op in unets.operators(make_unet())}


# -- the score --------------------------------------------------------------------------------------


def answers(unet: Any, sparsity: float = 0.5, samples: int = 3, steps: int = 2, **more: Any) -> Latents:
    """Answers about a U-Net in float64."""
    operators = unets.operators(unet)
    space = make_space(operators, unets.count(unet), sparsity)
    noise = make_noise(samples, (unet.config.in_channels, 4, 4), 0).double()
    scheduler = more.pop("scheduler", None) or diffusers.DDIMScheduler(num_train_timesteps=20)
    given = more.pop("conditions", Conditions(None, None))
    return Latents(unet.double(), scheduler, operators, space, steps, noise, given, **more)


def generated(net: Latents, names: list[str], guidance: float = 1.0) -> np.ndarray:
    """The final latents of DDIM, one sample at a time."""
    found = []
    net.scheduler.set_timesteps(net.steps)
    for i, latents in enumerate(net.noise):
        z = latents[None] * net.scheduler.init_noise_sigma
        with silenced(net.unet, names), torch.no_grad():
            for t in net.scheduler.timesteps:
                if net.conditions.wanted is None:
                    predicted = net.unet(z, t).sample
                else:
                    yes, no = net.conditions.wanted[i][None], net.conditions.unwanted
                    both = net.unet(torch.cat([z, z]), t, torch.cat([no, yes])).sample
                    predicted = both[:1] + guidance * (both[1:] - both[:1])
                z = net.scheduler.step(predicted, t, z).prev_sample
        found.append(z[0].numpy())
    return np.stack(found)


def score(dense: np.ndarray, other: np.ndarray) -> float:
    """(1), over samples."""
    mean, spread = dense.mean(0) - other.mean(0), dense.std(0) - other.std(0)
    return float(np.linalg.norm(mean) + np.linalg.norm(spread))


def test_latent_stats_is_the_change_of_mean_and_spread_of_final_latents() -> None:
    judge = OBJECTIVES.build("latent-stats")
    net = answers(make_unet(), chunk=2)
    dense, names = generated(net, []), [op.name for op in net.operators]
    assert net.dense_loss(judge, net.batch) == 0
    for gone in (1, 3):
        allocation = tuple(int(i >= gone) for i in range(len(names)))
        expected = score(dense, generated(net, names[:gone]))
        assert net.loss(judge, allocation, net.batch) == pytest.approx(expected, rel=1e-9)
        assert net.site_errors(allocation) == [1.0] * gone + [0.0] * (len(names) - gone)


def test_guidance_and_conditions_are_those_of_every_sample() -> None:
    draw = torch.Generator().manual_seed(1)
    wanted, unwanted = (torch.randn(n, 3, 6, generator=draw, dtype=torch.float64) for n in (3, 1))
    net = answers(make_conditional(), conditions=Conditions(wanted, unwanted, 7.5), chunk=2)
    names = [op.name for op in net.operators]
    expected = score(generated(net, [], 7.5), generated(net, names[:2], 7.5))
    allocation = (0, 0, *(1 for _ in names[2:]))
    assert net.loss(OBJECTIVES.build("latent-stats"), allocation, net.batch) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, with numpy 2
@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_same_question_has_the_same_answer(name: str) -> None:
    """With schedulers that add noise or remember steps, in any chunks and in any order."""
    scheduler = getattr(diffusers, name)(num_train_timesteps=20)
    net, parts = (answers(make_unet(), scheduler=scheduler, samples=4, steps=3, chunk=chunk) for chunk in (4, 3))
    judge, allocation = OBJECTIVES.build("latent-stats"), (0, 1, 1, 0, 1, 1)
    first = net.loss(judge, allocation, net.batch)
    assert net.loss(judge, (1, 1, 0, 0, 1, 1), net.batch) != first
    assert net.loss(judge, allocation, net.batch) == first
    assert net.dense_loss(judge, net.batch) == 0
    assert parts.loss(judge, allocation, parts.batch) == pytest.approx(first, rel=1e-9)
    fewer = net.batch.first(2)
    assert parts.loss(judge, allocation, fewer) == pytest.approx(net.loss(judge, allocation, fewer), rel=1e-9)


# -- the search -------------------------------------------------------------------------------------


def every_subset(net: Latents) -> dict[tuple[int, ...], float]:
    judge = OBJECTIVES.build("latent-stats")
    return {a: net.loss(judge, a, net.batch) for a in product((0, 1), repeat=len(net.operators))}


def test_drop_against_every_subset(tmp_path: Path) -> None:
    net = answers(make_unet(), sparsity=0.4)
    table, space, top = every_subset(net), net.space, (1,) * 6
    cheap, limit = space.cost, space.budget.limit

    def search(name: str, **options: Any) -> tuple[int, ...]:
        allocator = ALLOCATORS.build({"name": "drop", "compete": False, **options})
        ledger = Ledger(tmp_path / f"{name}.jsonl")
        return run_search(allocator, OBJECTIVES.build("latent-stats"), net, ledger, 0, Progress())[0]

    def without(a: tuple[int, ...], i: int) -> tuple[int, ...]:
        return (*a[:i], 0, *a[i + 1 :])

    def brought_back(a: tuple[int, ...]) -> tuple[int, ...]:
        """The dearest removed operator that still fits, and so on."""
        while able := [i for i in range(6) if not a[i] and cheap(a) + space.sites[i].params_per_group <= limit]:
            i = max(able, key=lambda i: (space.sites[i].params_per_group, i))
            a = (*a[:i], 1, *a[i + 1 :])
        return a

    order = sorted(range(6), key=lambda i: table[without(top, i)])
    once = top
    for i in order:
        once = once if cheap(once) <= limit else without(once, i)
    greedy = top
    while cheap(greedy) > limit:
        greedy = min((without(greedy, i) for i in range(6) if greedy[i]), key=table.__getitem__)
    found = {name: search(name, order=name) for name in ("once", "greedy")}
    assert found == {"once": brought_back(once), "greedy": brought_back(greedy)}
    able = {a: loss for a, loss in table.items() if cheap(a) <= limit}
    ranked = sorted(able, key=able.__getitem__)
    assert {*found.values()} == {ranked[0]}  # here; benchmarks/unet_subsets.py counts how often
    for answer in found.values():  # tight: no removed operator fits any more
        assert cheap(answer) <= limit
        assert all(cheap(answer) + site.params_per_group > limit for site, k in zip(space.sites, answer) if not k)  # noqa: B905


def test_other_allocators_ask_too(tmp_path: Path) -> None:
    net, judge = answers(make_unet(), sparsity=0.4), OBJECTIVES.build("latent-stats")
    allocator = ALLOCATORS.build(
        {"name": "evolution", "generations": 2, "offspring": 4, "selections": [[2, 1], [1, 3]]}
    )
    found, known = run_search(allocator, judge, net, Ledger(tmp_path / "ledger.jsonl"), 0, Progress())
    assert net.space.is_feasible(found)
    assert known[found, 3] <= net.loss(judge, net.space.nearest(net.space.uniform()), net.batch)


# -- from folder to folder --------------------------------------------------------------------------


def test_a_pipeline_becomes_smaller_and_loads_with_diffusers(tiny: Path, tmp_path: Path) -> None:
    (tiny / "LICENSE").write_text("as it was")
    report = prune_pipeline(tiny, tmp_path / "a", sparsity=0.4, **SMALL)
    sizes = report["parameters"]
    gone = [op for op in report["operators"] if not op["kept"]]
    assert sizes["pruned"] == sizes["dense"] - sum(op["parameters"] for op in gone) <= sizes["limit"]
    assert sizes["limit"] == sizes["dense"] * 6 // 10
    assert report["search"]["latents"] == (len(report["operators"]) + 1) * 3  # each alone, and the answer
    assert report == json.loads((tmp_path / "a/report.json").read_text())
    scores = [op["loss without it"] for op in report["operators"]]
    assert all(score > 0 for score in scores)

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "a")
    assert type(pipeline.unet) is unets.PrunedUNet2DModel
    assert unets.count(pipeline.unet) == sizes["pruned"]
    assert pipeline.unet.config["removed"] == [op["name"] for op in gone]
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 4, 4, 2)
    with silenced(unet := make_unet(), pipeline.unet.config["removed"]):
        assert torch.equal(run(pipeline.unet, torch.float32), run(unet, torch.float32))
    pipeline.save_pretrained(tmp_path / "again")  # diffusers keeps the class
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["unet"] == ["prunekit_strategies.diffusion.unets", "PrunedUNet2DModel"]
    assert (tmp_path / "a/LICENSE").read_text() == "as it was"
    assert (tmp_path / "a/scheduler/scheduler_config.json").is_file()

    prune_pipeline(tiny, tmp_path / "b", sparsity=0.4, **SMALL)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert digest(tmp_path / "a" / weights) == digest(tmp_path / "b" / weights)
    with pytest.raises(pk.WrongInput, match="exists and is not empty"):
        prune_pipeline(tiny, tmp_path / "b", sparsity=0.2, **SMALL)
    once_more = prune_pipeline(tmp_path / "a", tmp_path / "b", sparsity=0.2, overwrite=True, **SMALL)
    assert once_more["parameters"]["dense"] == sizes["pruned"]


def test_a_killed_run_goes_on_from_its_ledger(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(net: Latents, rows: slice) -> Any:
        asked.append(rows)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return states(net, rows)

    states = Latents._states
    monkeypatch.setattr(Latents, "_states", generate)
    with pytest.raises(KeyboardInterrupt):
        prune_pipeline(tiny, tmp_path / "a", sparsity=0.4, **SMALL)
    report = prune_pipeline(tiny, tmp_path / "a", sparsity=0.4, **SMALL)
    assert len(asked) == 5 + 1 + 7 - 3 + 1  # the dense latents again, what was not on record, and the result
    assert report["search"]["questions"] == 7
    assert not (tmp_path / "a.partial").exists()


def test_random_conditions_where_there_is_no_text_encoder(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    folder = saved(make_conditional())
    assert main([str(folder), "--sparsity", "0.2", "-o", str(tmp_path / "a"), "--samples", "2", "--steps", "1",
                 "--no-verify", "-q"]) == 0  # fmt: skip
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert report["settings"]["guidance"] == 1
    assert report["parameters"]["sparsity"] >= 0.2


@pytest.mark.slow
def test_stable_diffusion_with_its_text_encoder(tmp_path: Path) -> None:
    """A whole pipeline, in half precision, verified in a fresh process, which knows the result's folder alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["[pad]", "a", "red", "dog", "[unk]"])}
    text = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="[pad]", model_max_length=5)
    sizes: dict[str, Any] = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 0}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=5, max_position_embeddings=5, **sizes, **ends))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    parts = {"vae": vae, "text_encoder": encoder, "unet": make_conditional(), "tokenizer": tokenizer}
    for part in (vae, encoder, parts["unet"]):
        part.half()
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "sd" / name)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=20, steps_offset=1, clip_sample=False)
    scheduler.save_pretrained(tmp_path / "sd/scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, "safety_checker": [None, None],
        "feature_extractor": [None, None], "image_encoder": [None, None], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"],
    }  # fmt: skip
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    (tmp_path / "sd/unet/flax_model.msgpack").write_bytes(b"none")
    (tmp_path / "sd/vae/code.py").write_text("raise SystemExit")
    options: dict[str, Any] = SMALL | {"verify": True}
    told = prune_pipeline(tmp_path / "sd", tmp_path / "small", sparsity=0.3, prompts=["a red dog", "dog"], **options)
    assert told["verified"]
    assert told["settings"]["guidance"] == 7.5
    assert told["files left out"] == ["vae/code.py"]
    small = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "small", dtype=torch.float32)
    small.set_progress_bar_config(disable=True)
    assert small("a dog", num_inference_steps=2, output_type="np", height=8, width=8).images.shape == (1, 8, 8, 3)
    loaded = unets.PrunedUNet2DConditionModel.from_pretrained(tmp_path / "small/unet", torch_dtype=torch.float16)
    old = make_conditional().half().state_dict()
    assert all(torch.equal(value, old[name]) for name, value in loaded.state_dict().items())


# -- what is refused --------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too much": ({"sparsity": 0.999}, "reachable is 0 to"),
    "nothing": ({"sparsity": 0.0}, "more than 0"),
    "no samples": ({"samples": 0}, "samples is at least 1"),
    "prompts": ({"prompts": ["a dog"]}, "no text encoder"),
    "guidance": ({"guidance": 3.0}, "needs a text encoder"),
    "layer signals": ({"allocator": "owl"}, "do not have"),
    "scores": ({"allocator": {"name": "drop", "by": "scores", "order": "once"}}, "do not have"),
    "logits": ({"objective": "perplexity"}, "latents alone"),
    "probabilities": ({"objective": "divergence"}, "latents alone"),
    "tables": ({"objective": "expected-error"}, "latents alone"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_unet_cannot_answer_is_refused_before_work(what: str, tiny: Path, tmp_path: Path) -> None:
    own, sentence = REFUSED[what]
    options: dict[str, Any] = SMALL | {"sparsity": 0.4} | own
    with pytest.raises(pk.WrongInput, match=sentence):
        prune_pipeline(tiny, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_other_unets_and_other_files_are_refused(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    folder = saved(make_unet(num_class_embeds=3))
    with pytest.raises(pk.WrongInput, match="num_class_embeds 3"):
        prune_pipeline(folder, tmp_path / "a", sparsity=0.4, **SMALL)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(pk.WrongInput, match="no safetensors file"):
        prune_pipeline(folder, tmp_path / "a", sparsity=0.4, **SMALL)
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "Transformer2DModel"]}')
    with pytest.raises(pk.WrongInput, match="has no unet; its parts are transformer"):
        prune_pipeline(folder, tmp_path / "a", sparsity=0.4, **SMALL)
    assert main([str(tmp_path / "none"), "--sparsity", "0.2", "-o", str(tmp_path / "a")]) == 2


@pytest.mark.parametrize("named", ["DiffusionPipeline", "UNet2DModel", "logging", "nothing"])
def test_no_other_class_is_opened_as_a_scheduler(named: str, saved: Callable[[Any], Path], tmp_path: Path) -> None:
    index = (folder := saved(make_unet())) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", named]}))
    with pytest.raises(pk.WrongInput, match=f"diffusers has no scheduler '{named}'"):
        prune_pipeline(folder, tmp_path / "a", sparsity=0.4, **SMALL)


def test_prune_names_the_command_for_pipelines(tiny: Path) -> None:
    with pytest.raises(pk.WrongInput, match=r"python -m prunekit_strategies\.diffusion"):
        located(str(tiny))
