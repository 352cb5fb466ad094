"""The loss head compared with its three matrix products and other implementations.

    python bench/loss_head.py [--device cuda|cpu] [--shapes 2048x896x151936,...]
                              [--dtypes fp32,bf16] [--peers torch-eager,trl,cpp,...]
                              [--rounds 5] [--threads 1] [--clock cpu] [--table FILE]

A shape is N x D x V: tokens, hidden width, vocabulary. First log-probs and gradients of a few
tokens of the same shape are compared with float64. A turnfast implementation that fails ends the
run; a peer is timed and its error is shown. The floor is the three matrix products alone in the
same run, 6 N V D flops, split in the faster of two ways. --threads 1,2 measures both numbers of
threads. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.clocks import CLOCKS
from harness.loss_head_peers import Contender, Data, contenders, ppo
from harness.provenance import RESULTS, provenance, write
from harness.timing import medians_s, peak_bytes, table

SHAPES = {
    "cuda": "8192x2048x151936,8192x3584x151936,32768x2048x151936,32768x3584x151936,"
    "32768x4096x151936",
    "cpu": "2048x128x600,16384x128x600,2048x128x32000,2048x896x151936",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GATE_TOKENS = 64
FLOOR = "floor: three products"
# error bounds against float64: log-prob absolute, gradients relative in norm
GATE = {"bf16": (1e-4, 3e-3), "fp16": (1e-4, 3e-3), "fp32": (1e-4, 1e-4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cuda", "cpu"))
    parser.add_argument("--shapes", help="NxDxV, comma separated")
    parser.add_argument("--dtypes", help="of bf16, fp16, fp32, comma separated; CPU: fp32,bf16")
    parser.add_argument("--peers", help="comma-separated; default: all that are installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default=str(torch.get_num_threads()), help="comma separated")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: shared machine"
    )
    parser.add_argument("--table", type=Path, help="print a result file as a table and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    device = torch.device(options.device)
    wanted = set(options.peers.split(",")) if options.peers else None
    rows: list[dict[str, Any]] = []
    dtypes = options.dtypes or {"cuda": "bf16", "cpu": "fp32,bf16"}[options.device]
    for text in (options.shapes or SHAPES[options.device]).split(","):
        N, D, V = (int(n) for n in text.split("x"))
        for dtype in dtypes.split(","):
            for threads in options.threads.split(","):
                torch.set_num_threads(int(threads))
                timed = bench_shape(
                    N, D, V, dtype, device, wanted, options.rounds, CLOCKS[options.clock]
                )
                rows += [{"threads": int(threads), **row} for row in timed]
    record = {**provenance(device), "clock": options.clock, "rows": rows}
    print(table(record))
    print(write(record, RESULTS / f"loss_head_{options.device}.json"))


def bench_shape(
    N: int,
    D: int,
    V: int,
    dtype: str,
    device: torch.device,
    wanted: set[str] | None,
    rounds: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """The rows of one shape."""
    # otherwise the compiled peers exceed the recompilation limit and run eagerly
    torch.compiler.reset()
    found, missing = contenders(device, wanted)
    print("\n".join(missing))
    errors = {}
    gate = make_data(min(GATE_TOKENS, N), D, V, DTYPES[dtype], device)
    for one in list(found):
        try:
            errors[one.name] = gate_errors(one, gate)
        except Exception as error:
            # a peer may raise anything; it is reported and skipped
            print(f"{one.name}: not timed, {type(error).__name__}: {str(error)[:200]}")
            found.remove(one)
            continue
        print(f"{one.name}: log-prob error {errors[one.name][0]}, gradients {errors[one.name][1]}")
        bound = GATE[dtype]
        if one.name.startswith("turnfast") and not (
            errors[one.name][0] <= bound[0] and errors[one.name][1] <= bound[1]
        ):
            raise SystemExit(f"{one.name} fails the correctness gate {bound}: {errors[one.name]}")
    del gate
    gc.collect()
    data = make_data(N, D, V, DTYPES[dtype], device)
    leaves = (data.hidden_ND.requires_grad_(), data.head_VD.requires_grad_())
    calls = {one.name: step(one, leaves, data) for one in found}
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    cuts = {"by tokens": products_by_tokens(data), "by vocabulary": products_by_vocabulary(data)}
    times = medians_s(calls | cuts, rounds, device, clock)
    cut = min(cuts, key=lambda name: times[name])
    floor_s = times[cut]
    times = {name: seconds for name, seconds in times.items() if name not in cuts}
    times[FLOOR] = floor_s
    flops = 6 * N * V * D
    notes = {one.name: one.note for one in found} | {FLOOR: f"cut {cut}"}
    return [
        {
            "N": N,
            "D": D,
            "V": V,
            "dtype": dtype,
            "what": name,
            "ms": seconds * 1e3,
            "TFLOP/s": flops / seconds / 1e12,
            "of the floor": floor_s / seconds,
            "peak MB": peaks[name] / 1e6 if name in peaks else None,
            "log-prob error": errors.get(name, (None, None))[0],
            "gradient error": errors.get(name, (None, None))[1],
            "note": notes.get(name, ""),
        }
        for name, seconds in times.items()
    ]


def make_data(N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> Data:
    """Random data: logits of standard deviation 2, random targets, turns of 64 tokens."""
    g = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    hidden = normal(N, D).to(dtype)
    head = (normal(V, D) * (2.0 / D**0.5)).to(dtype)
    targets = torch.randint(V, (N,), generator=g, device=device)
    K = max(1, N // 64)
    data = Data(
        hidden_ND=hidden,
        head_VD=head,
        targets_N=targets,
        advantages_K=normal(K),
        old_N=torch.zeros(N, device=device),
    )
    with torch.no_grad():
        logprobs = [
            (x.float() @ head.float().T).log_softmax(-1).gather(1, y[:, None]).squeeze(1)
            for x, y in zip(hidden.split(256), targets.split(256), strict=True)
        ]
    old = torch.cat(logprobs) + 0.1 * normal(N)
    return Data(
        hidden_ND=hidden,
        head_VD=head,
        targets_N=targets,
        advantages_K=data.advantages_K,
        old_N=old,
    )


def gate_errors(one: Contender, data: Data) -> tuple[float | None, float | None]:
    """Largest log-prob error and the larger relative gradient error, both against float64."""
    x64 = data.hidden_ND.double().requires_grad_()
    w64 = data.head_VD.double().requires_grad_()
    logprobs64 = (x64 @ w64.T).log_softmax(-1).gather(1, data.targets_N[:, None]).squeeze(1)
    if one.policy:
        ppo(logprobs64, data).backward()
    else:
        (-logprobs64.mean()).backward()
    x = data.hidden_ND.detach().clone().requires_grad_()
    w = data.head_VD.detach().clone().requires_grad_()
    loss, logprobs = one.loss(x, w, data)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    assert x64.grad is not None and w64.grad is not None
    gradient = max(
        float((found.double() - true).norm() / true.norm())
        for found, true in ((x.grad, x64.grad), (w.grad, w64.grad))
    )
    if logprobs is None:
        return None, gradient
    return float((logprobs.detach().double() - logprobs64.detach()).abs().max()), gradient


def step(one: Contender, leaves: tuple[torch.Tensor, torch.Tensor], data: Data) -> Any:
    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss, _ = one.loss(*leaves, data)
        loss.backward()
        for leaf in leaves:
            leaf.grad = None

    return call


def products_by_tokens(data: Data) -> Callable[[], None]:
    """x @ W^T, E @ W and E^T @ x in the model's dtype, split by tokens.

    Buffers are allocated and written beforehand, so that only arithmetic is timed.
    """
    x_ND, w_VD = data.hidden_ND.detach(), data.head_VD.detach()
    chunk = min(len(x_ND), 4096 if x_ND.is_cuda else 512)
    e_CV = x_ND.new_zeros(chunk, len(w_VD))
    d_x_CD = x_ND.new_zeros(chunk, x_ND.shape[1])
    d_head_VD = torch.zeros_like(w_VD)

    def call() -> None:
        for x_CD in x_ND.split(chunk):
            rows = len(x_CD)
            torch.mm(x_CD, w_VD.T, out=e_CV[:rows])
            torch.mm(e_CV[:rows], w_VD, out=d_x_CD[:rows])
            d_head_VD.addmm_(e_CV[:rows].T, x_CD)

    return call


def products_by_vocabulary(data: Data) -> Callable[[], None]:
    """The same products, split by the vocabulary: E stays in cache."""
    x_ND, w_VD = data.hidden_ND.detach(), data.head_VD.detach()
    block = min(len(w_VD), 1 << 15 if x_ND.is_cuda else 2048)
    e_NB = x_ND.new_zeros(len(x_ND), block)
    d_x_ND, d_head_VD = torch.zeros_like(x_ND), torch.zeros_like(w_VD)

    def call() -> None:
        for w_BD, d_BD in zip(w_VD.split(block), d_head_VD.split(block), strict=True):
            e_Nb = e_NB[:, : len(w_BD)]
            torch.mm(x_ND, w_BD.T, out=e_Nb)
            d_x_ND.addmm_(e_Nb, w_BD)
            torch.mm(e_Nb.T, x_ND, out=d_BD)

    return call


if __name__ == "__main__":
    main()
