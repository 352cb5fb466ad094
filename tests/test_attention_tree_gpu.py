"""The compiled Triton tree attention on a CUDA device, and a model that trains over trees there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from families import whole_rows
from transformers import AutoModelForCausalLM, Qwen3Config
from turnfast.kernels.attention import TreeRows, pick_tree_backend, tree_attention
from turnfast.kernels.attention.tree import reference
from turnfast.kernels.packing.tree import prefix_tree

from turnfast.model import ATTENTION, Policy, hidden_states
from turnfast.packing.pack import batch_of

pytestmark = pytest.mark.gpu


def random_rows(seed: int, count: int, longest: int) -> list[list[int]]:
    draw = random.Random(seed)
    made: list[list[int]] = []
    for _ in range(count):
        before = draw.choice(made) if made and draw.random() < 0.85 else []
        keep = before[: draw.randrange(len(before) + 1)]
        made.append((keep + [draw.randrange(97) for _ in range(1 + longest // 2)])[:longest])
    return made


def attend(function, qkv, rows, **options):
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = function(*leaves, rows, **options)
    generator = torch.Generator(out.device).manual_seed(5)
    out.backward(torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "width", "window"),
    [((4, 2), 64, 0), ((7, 1), 128, 0), ((2, 2), 128, 300), ((2, 1), 80, 7), ((2, 2), 256, 0)],
)
def test_equals_every_score_computed(dtype, heads, width, window):
    if pick_tree_backend(torch.device("cuda"), head_dim=width, dtype=dtype) != "triton":
        pytest.skip("SDPA attends here")
    rows = random_rows(1, 12, 700)
    tree = prefix_tree(torch.tensor([t for row in rows for t in row]), [len(row) for row in rows])
    layout = TreeRows(
        ends_T=tree.ends_T.cuda(), positions_T=tree.positions_T.cuda(), backend="triton"
    )
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(len(tree.ends_T), h, width, device="cuda", dtype=dtype).transpose(0, 1)
        for h in (heads[0], heads[1], heads[1])
    )
    options = {"scale": width**-0.5, "window": window}
    got = attend(tree_attention, (q, k, v), layout, **options)
    again = attend(tree_attention, (q, k, v), layout, **options)
    truth = attend(reference, (q.double(), k.double(), v.double()), layout, **options)
    plain = attend(reference, (q, k, v), layout, **options)
    floor = 1e-5 if dtype == torch.float32 else 1e-2
    for name, a, b, c, d in zip(("out", "dq", "dk", "dv"), got, truth, plain, again, strict=True):
        error, budget = (a - b).abs().max(), 2 * (c - b).abs().max() + floor
        assert error <= budget, f"{name}: {error} > {budget}"
        assert torch.equal(a, d), f"{name} does not repeat"


def test_a_model_over_a_tree_has_the_gradients_of_its_rows():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).cuda()
    device = torch.device("cuda")
    assert pick_tree_backend(device, head_dim=16) == "triton"
    policy = Policy(
        model=model,
        tokenizer=None,  # type: ignore[arg-type]
        folder=Path(),
        device=device,
        attention="sdpa",
    )
    rows = whole_rows(random_rows(3, 12, 300))

    def gradients(share_prefixes: bool) -> list[torch.Tensor]:
        batch = batch_of(rows, [1.0] * len(rows), device, share_prefixes=share_prefixes)
        model.zero_grad()
        hidden = hidden_states(policy, batch)[batch.rows_N]
        model.lm_head(hidden).log_softmax(-1).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert (a - b).abs().max() < 1e-5
