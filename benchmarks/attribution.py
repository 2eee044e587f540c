"""Attribution of tokens, beside captum and shap as their users call them, and how faithful each method is.

The prompts are of 30 tokens, bare or as the text in a template of about 120 more. captum's integrated gradients get
the embeddings and `logits_to_keep=1`; captum's KernelSHAP masked token ids, one input a pass, which is its default,
and 50 a pass, which its users may ask for; shap its Text masker and a function of lists of strings, which
tokenizes, pads and runs them, as its documentation does. All masked tokens are the padding token, and all methods
have as many evaluations. The correlation with ours is among the facts.

shap's Text masker asks about other inputs than ours: it joins what is left into a string, where neighbouring masks
become one or are parted by spaces, so the tokens are others, and so are the values. On token ids its Partition
explainer divides the very game that ours does, and must give the same.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import mechinterp as mi
from benchmarks.timing import arguments, compare, environment, interleave, report
from mechinterp.studies import erase_tokens

STEPS, EVALUATIONS = 50, 100
TEXT = (
    "The doctor said that the old bridge over the river was closed for repairs after the storm, so the"
    " children walked along the northern road to the"
)
TEMPLATE = (
    "You are a careful reader. Below are sentences that were cut off, each with the word that came next.\n"
    "Sentence: The cat climbed up the tall green\nNext: tree\n"
    "Sentence: She poured hot water into the white\nNext: cup\n"
    "Sentence: They drove all night along the dark\nNext: road\nSentence: He opened the book and began to\nNext: read\n"
    "Sentence: In the morning the farmer milked the brown\nNext: cow\n"
    "Sentence: Every winter the lake is covered by thick\nNext: ice\nSentence: "
)
AFTER = "\nNext:"
METHODS = (
    "saliency", "grad-x-input", "integrated-gradients", "head-x-representation",
    "lime", "kernel-shap", "partition-shap",
)  # fmt: skip


def main() -> None:
    options = arguments(__doc__)
    model = mi.Model.load("smollm2")
    rounds = 1 if options.quick else 5
    evaluations = 20 if options.quick else EVALUATIONS
    facts: dict[str, Any] = {}
    lines = []
    bare, long = prompt(model, "", ""), prompt(model, TEMPLATE, AFTER)
    ways = {"ours": lambda: ours(model, bare, "integrated-gradients"), "captum": lambda: captum_ig(model, bare)}
    facts["ig_r"] = agree(ways, 0.999)
    seconds = interleave(ways, rounds)
    lines.append(compare(f"integrated gradients, {STEPS} steps", seconds["ours"], "captum", seconds["captum"], 1.0))
    ways = {"ours": ways["ours"], "captum": lambda: captum_ig(model, bare, delta=True)}
    seconds = interleave(ways, rounds)
    lines.append(compare("the same", seconds["ours"], "captum, with its error", seconds["captum"], None))
    for name, one, limit in (("bare", bare, 0.5), ("in a template", long, 0.2)):
        for method, peer, beside, asked in (
            ("kernel-shap", captum_shap, "captum", limit),
            ("kernel-shap", captum_shap_of_50, "captum, 50 a pass", None),
            ("partition-shap", shap_partition, "shap", limit),
            ("partition-shap", shap_of_ids, "shap on token ids, 64 a pass", None),
        ):
            ways = {
                "ours": lambda one=one, method=method: ours(model, one, method, evaluations),
                "theirs": lambda one=one, peer=peer: peer(model, one, evaluations),
            }
            same = peer is not shap_partition
            facts[f"{peer.__name__}_{name.split()[-1]}_r"] = agree(ways, 0.999 if same else None)
            seconds = interleave(ways, rounds)
            work = f"{method}, 30 tokens {name}, {evaluations} evaluations"
            lines.append(compare(work, seconds["ours"], beside, seconds["theirs"], asked))
    facts["template_tokens"] = len(long.ids) - len(bare.ids)
    report("Attribution of tokens", lines, environment(model="smollm2", **facts), options.json)
    print(faithfulness(model, 2 if options.quick else 32, evaluations))


class Prompt:
    """A text in a template, as text and as tokens, and the answer that is attributed: the model's own next token."""

    def __init__(self, model: mi.Model, before: str, text: str, after: str) -> None:
        self.before, self.text, self.after = before, text, after
        span = {"text": [(len(before), len(before) + len(text))]}
        plain = mi.Examples.of([before + text + after], spans=span)
        tokens = model.tokenize(plain)
        self.ids, self.span = tokens.ids[0], tokens.spans["text"][0]
        logits = model.hf(torch.tensor([self.ids]), logits_to_keep=1).logits[0, -1]
        self.answer = int(logits.argmax())
        self.examples = mi.Examples.of([before + text + after], answers=[self.answer], spans=span)


def prompt(model: mi.Model, before: str, after: str) -> Prompt:
    return Prompt(model, before, TEXT, after)


def ours(model: mi.Model, one: Prompt, method: Any, evaluations: int = EVALUATIONS) -> np.ndarray:
    baseline = "mean" if method == "integrated-gradients" else "pad"
    analyzer = mi.TokenAttribution(
        method, positions="text", baseline=baseline, steps=STEPS, tolerance=1e9, evaluations=evaluations
    )
    values = mi.run(model, one.examples, analyzer).data["attribution"].values[0]
    return values[np.isfinite(values)]


def captum_ig(model: mi.Model, one: Prompt, delta: bool = False) -> np.ndarray:
    from captum.attr import IntegratedGradients

    own = model.hf.get_input_embeddings()(torch.tensor([one.ids])).detach()
    base = own.clone()
    base[:, slice(*one.span)] = model.baseline("mean")

    def forward(embeddings: torch.Tensor) -> torch.Tensor:
        return model.hf(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits[:, -1, one.answer]

    options = {"n_steps": STEPS, "method": "gausslegendre", "return_convergence_delta": delta}
    found = IntegratedGradients(forward).attribute(own, base, **options)
    found = found[0] if delta else found
    return found.sum(-1)[0, slice(*one.span)].detach().numpy()


def captum_shap_of_50(model: mi.Model, one: Prompt, evaluations: int) -> np.ndarray:
    return captum_shap(model, one, evaluations, 50)


def captum_shap(model: mi.Model, one: Prompt, evaluations: int, at_once: int = 1) -> np.ndarray:
    from captum.attr import KernelShap

    start, stop = one.span

    @torch.no_grad()
    def forward(text: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([one.ids]).repeat(len(text), 1)
        ids[:, start:stop] = text
        return model.hf(ids, use_cache=False).logits[:, -1, one.answer]

    torch.manual_seed(0)
    own = torch.tensor([one.ids[start:stop]])
    found = KernelShap(forward).attribute(
        own, torch.full_like(own, model.tokenizer.pad_token_id), n_samples=evaluations, perturbations_per_eval=at_once
    )
    return found[0].numpy()


def shap_partition(model: mi.Model, one: Prompt, evaluations: int) -> np.ndarray:
    import shap

    pad = model.tokenizer.decode([model.tokenizer.pad_token_id])

    @torch.no_grad()
    def forward(texts: Any) -> np.ndarray:
        prompts = [one.before + str(text) + one.after for text in texts]
        batch = model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        return model.hf(**batch, use_cache=False).logits[:, -1, one.answer].numpy()

    explainer = shap.Explainer(forward, shap.maskers.Text(model.tokenizer, mask_token=pad), algorithm="partition")
    return np.asarray(explainer([one.text], max_evals=evaluations, silent=True).values[0])


def shap_of_ids(model: mi.Model, one: Prompt, evaluations: int) -> np.ndarray:
    import shap
    from shap.maskers._text import partition_tree

    start, stop = one.span
    own = np.array([one.ids[start:stop]])
    tree = partition_tree(list(model.to_str_tokens(one.ids[start:stop])), [])
    masker = shap.maskers.Partition(np.full_like(own, model.tokenizer.pad_token_id), clustering=tree)

    @torch.no_grad()
    def forward(text: Any) -> np.ndarray:
        ids = torch.tensor([one.ids]).repeat(len(text), 1)
        ids[:, start:stop] = torch.as_tensor(text)
        return model.hf(ids, use_cache=False).logits[:, -1, one.answer].numpy()

    explainer: Any = shap.explainers.Partition(forward, masker)
    return np.asarray(explainer(own, max_evals=evaluations, batch_size=64, silent=True).values[0]).reshape(-1)


def agree(ways: dict[str, Callable[[], np.ndarray]], least: float | None) -> float:
    """Run each once, and correlate what they find, which must be `least`."""
    one, two = (way() for way in ways.values())
    r = float(np.corrcoef(one, two)[0, 1]) if len(one) == len(two) else float("nan")
    if least is not None and not r >= least:
        sys.exit(f"ours and theirs correlate by {r:.4f}; {least} was asked")
    return r


def faithfulness(model: mi.Model, n: int, evaluations: int) -> str:
    """Comprehensiveness and sufficiency of every method on questions about countries, with the answer's probability."""
    examples = mi.tasks.capitals(n=n, seed=0, model=model)
    metric = mi.answer_prob()
    rest = [(str(text).index(" "), len(str(text))) for text in examples.texts]  # the first token is a sink
    plain = mi.Examples.of(examples.texts, answers=examples.answers, spans={"rest": rest})
    results = mi.run(
        model,
        plain,
        # Integrated gradients at 50 steps, whether they add up or not: some prompts would take hundreds.
        [
            mi.TokenAttribution(method, mi.answer_logit(), "rest", steps=STEPS, tolerance=1e9, evaluations=evaluations)
            for method in METHODS
        ],
    )
    found = erase_tokens(model, plain, dict(zip(METHODS, results, strict=True)), metric)
    table = found.table("aopc_comprehensiveness")
    return "\nFaithfulness (answer's probability, mean over 1, 5, 10, 20 and 50% of tokens)\n" + table.to_string(
        index=False
    )


if __name__ == "__main__":
    main()
