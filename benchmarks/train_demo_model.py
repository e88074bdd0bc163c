"""Train the bundled demo model: a Llama of 1.9 million parameters on the train split of python-docs.

    python benchmarks/train_demo_model.py

makes prunekit/demo/model again, in about ten minutes on two idle CPU cores. The same seed on the same machine
and Python gives the same model; elsewhere sums round differently and give one as good.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from prunekit.data.python_docs import text
from prunekit.demo import MODEL

END_OF_TEXT = "<|endoftext|>"

CARD = """\
---
license: psf-2.0
language: en
library_name: transformers
---

# prunekit demo model

A `LlamaForCausalLM` with {parameters:,} parameters, small enough to ship with prunekit and to prune in
seconds on a CPU. It has learned the prose of Python documentation, nothing else; it is good for demos and
tests, not for use.

| | |
|---|---|
| shape | {layers} layers, hidden {hidden}, MLP {intermediate}, tied embeddings |
| attention | {heads} heads over {kv_heads} key-value heads, each of {head_dim} |
| tokens | byte-level BPE, {vocabulary} tokens, trained on the same text |
| perplexity per token | train {train:.2f}, validation {validation:.2f} (windows of {length} tokens, bfloat16 weights) |
| training | {steps} steps of {batch} × {length} tokens ({epochs:.0f} epochs), AdamW |

**Data.** The train split of `python-docs` (`prunekit.data.python_docs`): the documentation topics and
the standard library docstrings of CPython {python}, © Python Software Foundation, PSF License Version 2.

**Make it again** from a checkout: `python benchmarks/train_demo_model.py`
"""


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults give the bundled model."""

    steps: int = 1600
    batch: int = 8  # windows in a step
    length: int = 256  # tokens in a window
    rate: float = 3e-3  # peak learning rate
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm
    vocabulary: int = 2048
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to write, replaced if it exists")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    for name, default in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    out = options.pop("out")
    torch.set_num_threads(options.pop("threads"))
    make(Recipe(**options), out)


def make(recipe: Recipe, out: Path) -> None:
    """Train tokenizer and model and write them with their model card to the folder `out`."""
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(text("train"), recipe.vocabulary)
    train, validation = (
        torch.tensor(tokenizer(text(split), verbose=False)["input_ids"]) for split in ("train", "validation")
    )
    model = LlamaForCausalLM(config(recipe, tokenizer.get_vocab()[END_OF_TEXT]))
    print(f"{model.num_parameters():,} parameters, {len(train):,} train tokens, {len(validation):,} validation tokens")

    train_model(model, train, validation, recipe)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".model-") as folder:
        finished = Path(folder, "new")
        save(model, tokenizer, finished)
        (finished / "README.md").write_text(card(finished, recipe, train, validation), encoding="utf-8")
        if out.exists():
            out.rename(Path(folder, "old"))  # goes with the temporary folder
        finished.rename(out)
    print(f"wrote {out}, {(out / 'model.safetensors').stat().st_size:,} bytes of weights")


def train_tokenizer(corpus: str, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def config(recipe: Recipe, end_of_text: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=160,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,  # a padding index would freeze the row of the end-of-text token
    )


def train_model(model: LlamaForCausalLM, train: Tensor, validation: Tensor, recipe: Recipe) -> None:
    """AdamW with warm-up and cosine over random windows of `train` (tokens,); `validation` is only watched."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, recipe))
    windows = train.unfold(0, recipe.length, 1)  # (tokens - length + 1, length), a view
    begin, running = time.monotonic(), 0.0
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = windows[torch.randint(len(windows), (recipe.batch,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % 100 == 0:
            print(f"step {step:5d}  train loss {running / 100:.3f}  {time.monotonic() - begin:6.0f} s", flush=True)
            running = 0.0
        if step % 400 == 0 or step == recipe.steps:
            print(f"step {step:5d}  validation loss {mean_loss(model, validation, recipe.length):.3f}", flush=True)
            model.train()
    model.eval()


def rate_share(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, tokens: Tensor, length: int) -> float:
    """Mean negative log-likelihood per token (nats) over windows that do not overlap."""
    model.eval()
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in windows.split(16)]
    return float(sum(losses)) / len(windows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer to a new folder."""
    end = model.config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vocabulary = folder / "tokenizer.json"  # written again without its indentation
    content = json.loads(vocabulary.read_text(encoding="utf-8"))
    vocabulary.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only; a wheel would keep that


def card(folder: Path, recipe: Recipe, train: Tensor, validation: Tensor) -> str:
    """The model card, with the perplexities of the model as saved in `folder`."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    return CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        epochs=recipe.steps * recipe.batch * recipe.length / len(train),
        python=".".join(map(str, sys.version_info[:2])),
        train=math.exp(mean_loss(model, train, recipe.length)),
        validation=math.exp(mean_loss(model, validation, recipe.length)),
        **vars(recipe),
    )


if __name__ == "__main__":
    main()
