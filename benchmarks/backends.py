"""The tables of docs/backends.md: every site and nearly every analyzer on TransformerLens and nnsight.

One tiny model a family, a tiny classifier, and SmolLM2, in fp32; then the tiny ones in bf16 and fp16, sites alone, with
whether the logits of one text are to the bit those of transformers with eager attention. No times are compared.
"""

import copy
import json
import time

import torch

import mechinterp as mi
from benchmarks.timing import arguments, environment
from mechinterp.studies.equivalence import OTHERS, Equivalence, equivalence, markdown

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
IDS = torch.tensor([[3, 5, 7, 9, 11, 2, 8, 4]])


def main() -> None:
    options = arguments(__doc__)
    facts = environment(threads=torch.get_num_threads())
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    families = FAMILIES[:1] if options.quick else FAMILIES
    found: dict[str, Equivalence] = {}
    for name in [*families, *([] if options.quick else ["classifier", "SmolLM2"])]:
        started = time.perf_counter()
        model = made(name)
        found[name] = equivalence(model)
        print(f"{name}: {found[name].summary}, in {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n{markdown(found)}\n", flush=True)

    halves: dict[str, Equivalence] = {}
    lines = ["| dtype | family | backend | read | write | gradient | logits |", "|---|---|---|---|---|---|---|"]
    for dtype in (torch.bfloat16, torch.float16):
        for family in families:
            model = mi.testing.tiny(family, dtype=dtype)
            each = halves[f"{family}, {dtype}"] = equivalence(model, analyzers=False)
            lines += [half(model, backend, each) for backend in OTHERS]
    print("\n".join(lines))
    if options.json is not None:
        rows = {name: json.loads(one.table().to_json(orient="records")) for name, one in (found | halves).items()}
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1, default=str) + "\n")


def made(name: str) -> mi.Model:
    if name == "SmolLM2":
        return mi.Model.load("smollm2")
    if name != "classifier":
        return mi.testing.tiny(name)
    model = mi.testing.tiny("qwen3", num_labels=2)
    model.hf.config.pad_token_id = 0
    return model


def half(model: mi.Model, backend: str, found: Equivalence) -> str:
    """One line of the table of half precision: the largest relative difference, and the site."""
    eager = copy.deepcopy(model.hf)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model.with_backend(backend).trace(IDS, "logits")["logits"]
        same = "transformers' to the bit" if torch.equal(logits, eager(IDS).logits) else "**not transformers'**"
    cells: list[str] = []
    for what in ("read", "write", "gradient"):
        rows = [r for r in found.rows if (r.backend, r.what) == (backend, what) and r.verdict != "lacks"]
        worst = max(rows, key=lambda row: row.relative)
        text = f"{worst.relative:.1e} at `{worst.name}`"
        cells.append(text if worst.verdict == "agrees" else f"**{text}**")
    dtype = str(model.dtype).removeprefix("torch.")
    return f"| {dtype} | {model.arch.family} | `{backend}` | {' | '.join(cells)} | {same} |"


if __name__ == "__main__":
    main()
