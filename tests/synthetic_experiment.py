"""Tables of a suite that no model ran, with effects planted in them."""

from dataclasses import dataclass

from tempo_mlx.experiments.tables import Tables

import numpy as np
import pandas as pd

CATEGORIES = ("narrative", "factual", "technical", "dialogue", "descriptive")
VOCABULARY = 50_000
TOKENS = ["run_id", "step", "position", "slot", "id", "text", "probability", "set_size"]
TOKENS += ["pruned_at"]
KL = ["prompt_id", "category", "seed", "step", "condition_a", "condition_b", "kl_ab", "kl_ba"]
#: Of the Dirichlet distribution of a set's probabilities: how alike they are.
EVEN = 8.0


@dataclass(frozen=True)
class Planted:
    """A suite, and what siblings do in it. Attention is a part of a row, which sums to one.

    A key at distance d from its query draws base * decay^d * exp(noise), and the prompt's first
    token whatever is left of the row: attention pools there, and decays with distance.

    Args:
        prompts: in each category.
        categories: names.
        conditions: visibilities.
        seeds: of the runs of each prompt and condition; (None,): deterministic, one run.
        steps, prompt_tokens, layers, heads: of each run.
        base, decay: attention of a key at distance 0, and its factor for each further step.
        noise: standard deviation of the logarithm of each entry's attention.
        effect: added to what a sibling token draws.
        condition_effect: added in the second condition in addition.
        prompt_sd, seed_sd: standard deviation of that addition between prompts and between runs.
        by_probability: added to what any generated token draws, times the logit of its probability.
        dilution: part of its attention that a generated token loses, linearly, by the last query.
        early: of a step's sets of several tokens in the second half, the part that is single.
        outlier: added to siblings of the first prompt.
        single: probability that a step has one token.
        without_controls: category whose sets all have two tokens.
        softmax: whether siblings share: a row is divided by its sum, the first token's part being
            what it is in the other rows, a weight of 1.
    """

    prompts: int = 2
    categories: tuple[str, ...] = CATEGORIES
    conditions: tuple[str, ...] = ("isolated", "visible")
    seeds: tuple[int | None, ...] = (None,)
    steps: int = 10
    prompt_tokens: int = 4
    layers: int = 2
    heads: int = 2
    base: float = 0.03
    decay: float = 0.8
    noise: float = 0.3
    effect: float = 0.0
    condition_effect: float = 0.0
    prompt_sd: float = 0.0
    seed_sd: float = 0.0
    by_probability: float = 0.0
    dilution: float = 0.0
    early: float = 0.0
    outlier: float = 0.0
    single: float = 0.5
    without_controls: str | None = None
    softmax: bool = False

    def tables(self, seed: int = 0) -> Tables:
        """The tables, drawn from a seed."""
        rng = np.random.default_rng(seed)
        runs, tokens, entries, received, entropy, kl = [], [], [], [], [], []
        for number in range(self.prompts * len(self.categories)):
            category = self.categories[number % len(self.categories)]
            prompt_id = f"{category}-{number // len(self.categories) + 1}"
            extra = rng.normal(0, self.prompt_sd) + (self.outlier if number == 0 else 0)
            for run_seed in self.seeds:
                # Both conditions of a prompt see the same sets; what they draw differs.
                plan = self._sets(rng, category)
                for condition in self.conditions:
                    run_id = f"{prompt_id}/{condition}/{run_seed}"
                    change = self.effect + extra + rng.normal(0, self.seed_sd)
                    change += self.condition_effect if condition == self.conditions[-1] else 0
                    slots = self._slots(rng, plan)
                    rows, attention = self._attention(rng, slots, change)
                    entries.append(rows.assign(run_id=run_id))
                    received.append(attention)
                    generated = slots[~slots["is_prompt"]]
                    tokens.append(generated.assign(run_id=run_id))
                    runs.append(
                        {
                            "run_id": run_id,
                            "prompt_id": prompt_id,
                            "category": category,
                            "prompt": f"The {category} prompt {number}",
                            "seed": run_seed,
                            "visibility": condition,
                            "condition": condition,
                            "n_steps": self.steps,
                            "n_tokens": len(generated),
                            "text": f" text {run_id}",
                            "finish_reason": "length",
                            "seconds": 0.5,
                        }
                    )
                    entropy.append(self._entropy(rng, run_id))
                if len(self.conditions) > 1:
                    kl.append(self._kl(rng, prompt_id, category, run_seed))
        all_tokens = pd.concat(tokens, ignore_index=True)
        all_tokens["pruned_at"] = pd.array([pd.NA] * len(all_tokens), dtype="Int64")
        all_tokens["step"] = all_tokens["key_step"]
        all_tokens["position"] = all_tokens["step"] + self.prompt_tokens
        all_tokens["id"] = rng.integers(0, VOCABULARY, len(all_tokens))
        all_tokens["text"] = " word"
        table = pd.DataFrame(runs)
        return Tables(
            runs=table.astype({"seed": "Int64"}),
            tokens=all_tokens[TOKENS],
            entries=pd.concat(entries, ignore_index=True),
            received=np.concatenate(received).astype(np.float32),
            entropy=pd.concat(entropy, ignore_index=True),
            next_tokens=pd.DataFrame(
                columns=["run_id", "step", "rank", "id", "text", "probability"]
            ),
            kl=pd.concat(kl, ignore_index=True) if kl else pd.DataFrame(columns=KL),
            suite={"name": "synthetic", "max_tokens": self.steps, "threshold": 0.1},
            manifest={"model": "none", "versions": {"tempo-mlx": "0"}, "device": "none"},
        )

    def _sets(self, rng, category):
        """Set sizes and probabilities by step; those of sets and single tokens overlap."""
        if category == self.without_controls:
            sizes = np.full(self.steps, 2)
        else:
            single = rng.random(self.steps) < self.single
            late = 2 * np.arange(self.steps) > self.steps
            single |= late & (rng.random(self.steps) < self.early)
            sizes = np.where(single, 1, rng.integers(2, 5, self.steps))
        totals = np.where(sizes == 1, rng.uniform(0.08, 0.9, self.steps), rng.uniform(0.3, 0.95))
        return [
            total * rng.dirichlet(np.full(size, EVEN))
            for total, size in zip(totals, sizes, strict=True)
        ]

    def _slots(self, rng, plan):
        sizes = np.array([len(probabilities) for probabilities in plan])
        prompt = self.prompt_tokens
        return pd.DataFrame(
            {
                "slot": np.arange(prompt + sizes.sum()),
                "key_step": [*range(-prompt, 0), *np.repeat(np.arange(self.steps), sizes)],
                "set_size": [*[1] * prompt, *np.repeat(sizes, sizes)],
                "probability": [*[1.0] * prompt, *np.concatenate(plan)],
                "is_prompt": [True] * prompt + [False] * int(sizes.sum()),
                "is_first": [True] + [False] * int(prompt - 1 + sizes.sum()),
            }
        )

    def _attention(self, rng, slots, change):
        """Entries of one run, and what each draws, [entries, layers, heads]."""
        steps, keys = np.nonzero(slots["key_step"].to_numpy() <= np.arange(self.steps)[:, None])
        rows = slots.iloc[keys].reset_index(drop=True)
        distance = steps - rows["key_step"].to_numpy()
        rows = rows.assign(query_step=steps, distance=distance)
        rows["queries"] = np.bincount(slots.loc[~slots["is_prompt"], "key_step"])[steps]
        drawn = self.base * self.decay**distance
        noise = rng.normal(0, self.noise, (len(rows), self.layers, self.heads))
        # The mean of exp(noise) is 1.
        attention = drawn[:, None, None] * np.exp(noise - self.noise**2 / 2)
        sibling = (rows["set_size"] > 1).to_numpy()
        generated = ~rows["is_prompt"].to_numpy()
        p = rows["probability"].to_numpy()
        logit = np.log(np.where(generated, p / (1 - np.where(generated, p, 0)), 1))
        attention *= (1 - self.dilution * steps * generated / self.steps)[:, None, None]
        attention += (change * sibling + self.by_probability * logit)[:, None, None]
        attention = np.maximum(attention, 0)
        first = rows["is_first"].to_numpy()
        attention[first] = 1 if self.softmax else 0
        totals = np.zeros((self.steps, self.layers, self.heads))
        np.add.at(totals, steps, attention)
        if self.softmax:
            attention /= totals[steps]
        else:
            attention[first] = 1 - totals[steps[first]]
        return rows, attention

    def _entropy(self, rng, run_id):
        step, layer, head = np.indices((self.steps, self.layers, self.heads)).reshape(3, -1)
        return pd.DataFrame(
            {
                "run_id": run_id,
                "step": step,
                "layer": layer,
                "head": head,
                "entropy": rng.uniform(1, 2, len(step)),
            }
        )

    def _kl(self, rng, prompt_id, category, seed):
        size = 0.02 * np.arange(self.steps)
        return pd.DataFrame(
            {
                "prompt_id": prompt_id,
                "category": category,
                "seed": pd.array([seed] * self.steps, dtype="Int64"),
                "step": np.arange(self.steps),
                "condition_a": self.conditions[0],
                "condition_b": self.conditions[1],
                "kl_ab": size * rng.uniform(0.5, 1.5, self.steps),
                "kl_ba": size * rng.uniform(0.4, 1.2, self.steps),
            }
        )
