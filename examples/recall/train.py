"""Train the demo model: a small stock Llama that recalls facts from its prompt, on the CPU, from nothing.

    .venv/bin/python examples/recall/train.py --out examples/recall/fleet-recall

It learns by induction: prompts list facts, then questions whose answers are copied from the list (see
vllm_fleet.bench.recall). Short lists first, longer ones as soon as the loss is low. The run ends when every token of
the answers to held-out prompts of every length is right with the weights rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_fleet.bench.recall import WORDS, make_prompt

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
IGNORE = -100
# (most facts, tokens per sequence, sequences per step, learning rate, mean loss at which the next stage begins)
STAGES = (
    (6, 96, 16, 2e-3, 0.10),
    (16, 224, 12, 2e-3, 0.05),
    (60, 512, 8, 1.5e-3, 0.02),
    (120, 1024, 5, 1e-3, 0.01),
    (254, 1792, 3, 1e-3, 0.003),
    (254, 1792, 8, 5e-4, 0.0004),
    (254, 1792, 8, 1e-4, 0.00005),
)


def build_tokenizer() -> Tokenizer:
    """Every word of the task and every byte is one token, so that any text can be encoded and decoded unchanged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, EOS, PAD, *alphabet, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[a-z]+|[\s\S]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    return tokenizer


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            initializer_range=0.08,
            max_position_embeddings=16384,
            rope_theta=100000.0,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
        )
    )
    look_back(model)
    return model


@torch.no_grad()  # type: ignore[untyped-decorator]
def look_back(model: LlamaForCausalLM) -> None:
    """Start six heads off looking 1 to 6 tokens back, as far as a fact is long; they train on like everything else.

    Learning by induction begins with heads that find the previous tokens, and gradient descent is slow to discover
    them. One embedding dimension is made constant; queries and keys made from it alone meet, through the rotary
    embedding, at a fixed distance. It takes hours of training down to minutes.
    """
    config = model.config
    half, size = config.head_dim // 2, config.head_dim
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    sharp = angles > 0.05  # slow dimensions tell near from nearer badly
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 0.3
    for block in model.model.layers:  # keep what a token is in sight of the later layers
        block.self_attn.o_proj.weight.mul_(0.2)
        block.mlp.down_proj.weight.mul_(0.1)
        block.self_attn.o_proj.weight[0] = 0.0  # and the constant constant
        block.mlp.down_proj.weight[0] = 0.0
    constant = (embedding / embedding.pow(2).mean(-1, keepdim=True).sqrt())[:, 0].mean()
    per_group = config.num_attention_heads // config.num_key_value_heads
    # By the second layer the constant is a smaller part of what a token holds.
    for layer, strength, distances in ((0, 8.0, (1, 2, 3, 4)), (1, 24.0, (5, 6))):
        attention = model.model.layers[layer].self_attn
        for head, distance in enumerate(distances):
            turn = distance * angles
            query = torch.cat([torch.cos(turn) * sharp, -torch.sin(turn) * sharp]) * strength
            _read_constant(attention.q_proj.weight[head * size : (head + 1) * size], query / constant)
            group = head // per_group
            key = torch.cat([sharp.float(), torch.zeros(half)]) * strength
            if head % per_group == 0:
                _read_constant(attention.k_proj.weight[group * size : (group + 1) * size], key / constant)


def _read_constant(rows: torch.Tensor, vector: torch.Tensor) -> None:
    """Make a projection answer ``vector`` for every token, and little else."""
    rows.mul_(0.05)
    rows[:, 0] = vector


class Sampler:
    """Makes training sequences: a list of facts, then recitations from random places in it."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.rng = rng
        self.words = tokenizer.encode("".join(f"{word} " for word in WORDS)).ids[::2]
        self.digits = tokenizer.encode("0123456789").ids
        self.equals, self.question, self.space = tokenizer.encode("=? ").ids
        self.eos = tokenizer.encode(EOS).ids[0]

    def sequence(self, most: int, length: int) -> tuple[list[int], list[int]]:
        """Token ids and labels, both of ``length``; a label is IGNORE where the next token cannot be known."""
        rng = self.rng
        facts = rng.randint(2, most)
        keys = rng.sample(self.words, facts)
        items = []
        for key in keys:
            value = [rng.choice(self.digits) for _ in range(3)]
            items.append([key, self.equals, *value, self.space])
        lead = rng.choice((0, 0, 0, rng.randint(1, 8)))  # spaces in front, so that a prompt can have any length
        ids = [self.space] * lead + [token for item in items for token in item] + [self.question]
        known = [False] * lead + [k in (1, 5) for _ in items for k in range(6)] + [False]
        while len(ids) < length:
            start = rng.randrange(facts)
            stop = facts if rng.random() < 0.3 else min(facts, start + rng.randint(1, 4))
            ids.append(self.space)
            known.append(True)
            for index in range(start, stop):
                ids += items[index]
                known += [index > start, True, True, True, True, True]
            if stop == facts:
                ids += [self.question, self.eos, self.question]
                known += [True, True, False]
            else:
                ids.pop()
                known.pop()
        return ids[:length], [t if k else IGNORE for t, k in zip(ids, known, strict=True)][:length]

    def batch(self, count: int, most: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self.sequence(most, length) for _ in range(count)]
        return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])


def train(model: LlamaForCausalLM, sampler: Sampler, minutes: float, first: int = 0) -> Iterator[str]:
    """Run the stages from ``first`` on; yields a line of progress every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    begin, step, deadline = time.monotonic(), 0, time.monotonic() + 60 * minutes
    for stage, (most, length, count, rate, target) in list(enumerate(STAGES))[first:]:
        mean = 5.0
        while mean > target:
            if time.monotonic() > deadline:
                yield f"time is up in stage {stage} with loss {mean:.4f}"
                return
            ids, labels = sampler.batch(count, most, length)
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
            wanted = labels[:, 1:]
            kept = wanted != IGNORE
            loss = F.cross_entropy(model.lm_head(hidden[kept]), wanted[kept])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 100)
            optimizer.step()
            mean = 0.97 * mean + 0.03 * loss.item() if mean < 5.0 else loss.item()
            step += 1
            if step % 50 == 0:
                yield f"step {step} length {length} loss {mean:.4f} {time.monotonic() - begin:.0f} s"


@torch.no_grad()  # type: ignore[untyped-decorator]
def accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, rng: random.Random, prompts: int) -> float:
    """Share of prompts whose whole answer is predicted, with the right answer fed as context."""
    right = 0
    for index in range(prompts):
        prompt = make_prompt(rng, facts=3 + (index * 246) // max(1, prompts - 1))
        ids = tokenizer.encode(" " * rng.randrange(6) + prompt.text).ids
        answer = [*tokenizer.encode(prompt.answer).ids, tokenizer.token_to_id(EOS)]
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        right += logits.argmax(-1).tolist() == answer
    return right / prompts


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", type=Path, default=None, help="go on from this model ...")
    parser.add_argument("--stage", type=int, default=0, help="... at this stage")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    for line in train(model, Sampler(tokenizer, random.Random(0)), args.minutes, args.stage):
        print(line, flush=True)
    save(model, tokenizer, args.out)
    share = accuracy(model.float(), tokenizer, random.Random(1), 400)
    print(f"answers right on held-out prompts of 22 to 1504 tokens, bf16 weights: {share:.2%}")


if __name__ == "__main__":
    main()
